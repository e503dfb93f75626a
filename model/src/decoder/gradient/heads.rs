//! Losses on what the decoder ends in, and their gradients.

use plumb_kernels::gradient::TopK;

use super::super::backend::Stream;
use super::backend::{Gradients, Sums, Targets, VocabularyBack};
use super::batch::Plan;
use super::{Head, Inner, Language, Outcome, RewardSlopes};
use crate::Result;

/// A row whose log-probabilities are compared with something.
struct Row<'a> {
    sequence: usize,
    row: usize,
    weight: f32,
    target: Target<'a>,
}

#[derive(Clone, Copy)]
enum Target<'a> {
    Token(u32),
    Teacher(TopK<'a>),
}

impl<B: Gradients> Inner<B> {
    /// Rewards and losses, from the residual stream in `buffers.x`; their gradients go to `scratch.dx` and to the list.
    pub(super) fn heads(
        &mut self,
        plan: &Plan<'_>,
        gradient: Option<(&mut RewardSlopes<'_>, &mut B::Array<f32>)>,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = vec![Outcome::default(); plan.sequences().len()];
        let mut gradient = gradient;
        let of_rewards = gradient.as_mut().map(|(slopes, gradient)| (&mut **slopes, &mut **gradient));
        self.rewards(plan, of_rewards, &mut outcomes)?;
        let mut gradient = gradient.map(|(_, gradient)| gradient);
        // Rows of one kind together.
        let (tokens, teachers): (Vec<_>, Vec<_>) =
            language_rows(plan).into_iter().partition(|row| matches!(row.target, Target::Token(_)));
        for rows in tokens.chunks(B::LANGUAGE_ROWS).chain(teachers.chunks(B::LANGUAGE_ROWS)) {
            self.language(plan, rows, gradient.as_deref_mut(), &mut outcomes)?;
        }
        Ok(outcomes)
    }

    fn rewards(
        &mut self,
        plan: &Plan<'_>,
        gradient: Option<(&mut RewardSlopes<'_>, &mut B::Array<f32>)>,
        outcomes: &mut [Outcome],
    ) -> Result<()> {
        let Head::Reward { weight, bias, .. } = &self.stack.head else { return Ok(()) };
        let (backend, hidden) = (&self.stack.backend, self.stack.config.hidden_size);
        let len = plan.rows() * hidden;
        let sequences = plan.sequences().iter().enumerate().filter(|(_, placed)| placed.sequence.reward);
        let (wanted, rows): (Vec<usize>, Vec<u32>) =
            sequences.map(|(i, placed)| (i, placed.row(placed.sequence.tokens.len() - 1) as u32)).unzip();
        if rows.is_empty() {
            return Ok(());
        }
        let stream = || Stream { x: B::part(&self.buffers.x, 0..len), width: hidden, norm: &self.stack.final_norm };
        let rewards = backend.rewards(stream(), &rows, weight, *bias, &mut self.buffers.scratch)?.wait()?;
        for (i, reward) in wanted.iter().zip(&rewards) {
            outcomes[*i].reward = *reward;
        }
        let Some((slopes, gradient)) = gradient else { return Ok(()) };
        // A few numbers: what the loss is, the caller knows.
        let slopes = slopes(&rewards);
        assert_eq!(slopes.len(), rewards.len(), "one slope for each reward");
        let sums = Sums { dx: B::part_mut(&mut self.scratch.dx, 0..len), gradient, ranges: &self.parameters };
        backend.rewards_back(stream(), &rows, weight, &slopes, sums, &mut self.scratch.room)
    }

    /// A chunk of rows of one kind.
    fn language<'a>(
        &mut self,
        plan: &Plan<'_>,
        rows: &[Row<'a>],
        gradient: Option<&mut B::Array<f32>>,
        outcomes: &mut [Outcome],
    ) -> Result<()> {
        let (logits, softcap) = match (&self.stack.head, &self.language_head) {
            (Head::Language { logits, softcap }, _) => (logits, *softcap),
            (Head::Reward { .. }, Some(logits)) => (logits, self.stack.config.logit_softcap),
            (Head::Reward { .. }, None) => return Ok(()),
        };
        let (backend, config) = (&self.stack.backend, &self.stack.config);
        let len = plan.rows() * config.hidden_size;
        let targets = match rows[0].target {
            Target::Token(_) => {
                let id = |row: &Row<'_>| if let Target::Token(id) = row.target { id } else { 0 };
                Targets::Tokens(rows.iter().map(id).collect())
            }
            Target::Teacher(_) => {
                let top = |row: &Row<'a>| if let Target::Teacher(top) = row.target { Some(top) } else { None };
                Targets::Teachers(rows.iter().filter_map(top).collect())
            }
        };
        let x = B::part(&self.buffers.x, 0..len);
        let stream = Stream { x, width: config.hidden_size, norm: &self.stack.final_norm };
        let head = VocabularyBack { logits, back: &self.head_back, softcap, size: config.vocab_size };
        let numbers: Vec<u32> = rows.iter().map(|row| row.row as u32).collect();
        let weights: Vec<f32> = rows.iter().map(|row| row.weight).collect();
        let dx = &mut self.scratch.dx;
        let sums = gradient.map(|gradient| Sums { dx: B::part_mut(dx, 0..len), gradient, ranges: &self.parameters });
        let losses = backend.losses(stream, &numbers, head, &targets, &weights, sums, &mut self.scratch.room)?;
        for (row, loss) in rows.iter().zip(&losses) {
            outcomes[row.sequence].loss += f64::from(*loss);
            outcomes[row.sequence].rows += 1;
        }
        Ok(())
    }
}

fn language_rows<'a>(plan: &Plan<'a>) -> Vec<Row<'a>> {
    let mut list = Vec::new();
    for (i, placed) in plan.sequences().iter().enumerate() {
        let tokens = placed.sequence.tokens;
        match &placed.sequence.language {
            Language::Nothing => {}
            Language::Next { rows, weight } => list.extend(rows.clone().map(|row| Row {
                sequence: i,
                row: placed.row(row),
                weight: *weight,
                target: Target::Token(tokens[row + 1]),
            })),
            Language::Teacher { first, top, ids, log_probs, weight } => {
                let rows = ids.chunks_exact(*top).zip(log_probs.chunks_exact(*top)).enumerate();
                list.extend(rows.map(|(row, (ids, log_probs))| Row {
                    sequence: i,
                    row: placed.row(first + row),
                    weight: *weight,
                    target: Target::Teacher(TopK { ids, log_probs }),
                }));
            }
        }
    }
    list
}
