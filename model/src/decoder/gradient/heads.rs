//! Losses on what the decoder ends in, and their gradients.

use plumb_kernels::gradient::TopK;

use super::super::backend::Stream;
use super::backend::{Gradients, RewardHead, Sums, Targets, VocabularyBack};
use super::batch::Plan;
use super::{Head, Inner, Language, Outcome};
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

/// What came of a step's sequences, as it lies where it was computed.
#[derive(Debug)]
pub(super) struct Results<B: Gradients> {
    sequences: usize,
    /// Of whom the numbers are: first rewards, then losses of rows.
    rewards: Vec<usize>,
    losses: Vec<usize>,
    numbers: B::Array<f32>,
}

impl<B: Gradients> Results<B> {
    /// Once it is computed; and the array, to be used again.
    pub(super) fn read(self, backend: &B) -> Result<(Vec<Outcome>, B::Array<f32>)> {
        let mut outcomes = vec![Outcome::default(); self.sequences];
        let numbers = backend.read(B::part(&self.numbers, 0..self.rewards.len() + self.losses.len()))?;
        let (rewards, losses) = numbers.split_at(self.rewards.len());
        for (i, reward) in self.rewards.iter().zip(rewards) {
            outcomes[*i].reward = *reward;
        }
        for (i, loss) in self.losses.iter().zip(losses) {
            outcomes[*i].loss += f64::from(*loss);
            outcomes[*i].rows += 1;
        }
        Ok((outcomes, self.numbers))
    }
}

impl<B: Gradients> Inner<B> {
    /// Rewards and losses, from the residual stream in `buffers.x`; their gradients go to `scratch.dx` and to the list.
    /// That of pairs counts as much as is said.
    pub(super) fn heads(&mut self, plan: &Plan<'_>, gradient: Option<(f32, &mut B::Array<f32>)>) -> Result<Results<B>> {
        let rewarded = plan.sequences().iter().enumerate().filter(|(_, placed)| placed.sequence.reward);
        let (rewards, last_rows): (Vec<usize>, Vec<u32>) =
            rewarded.map(|(i, placed)| (i, placed.row(placed.sequence.tokens.len() - 1) as u32)).unzip();
        // Rows of one kind together.
        let (tokens, teachers): (Vec<_>, Vec<_>) =
            language_rows(plan).into_iter().partition(|row| matches!(row.target, Target::Token(_)));
        let mut numbers = self.spare.pop().unwrap_or_else(|| self.stack.backend.array());
        self.stack.backend.resize(&mut numbers, rewards.len() + tokens.len() + teachers.len())?;

        let (weight, mut gradient) = gradient.map_or((0.0, None), |(weight, gradient)| (weight, Some(gradient)));
        let of_rewards = B::part_mut(&mut numbers, 0..rewards.len());
        self.rewards(plan, &last_rows, of_rewards, weight, gradient.as_deref_mut())?;
        let mut at = rewards.len();
        for rows in tokens.chunks(B::LANGUAGE_ROWS).chain(teachers.chunks(B::LANGUAGE_ROWS)) {
            let losses = B::part_mut(&mut numbers, at..at + rows.len());
            self.language(plan, rows, losses, gradient.as_deref_mut())?;
            at += rows.len();
        }
        let losses = tokens.iter().chain(&teachers).map(|row| row.sequence).collect();
        Ok(Results { sequences: plan.sequences().len(), rewards, losses, numbers })
    }

    fn rewards(
        &mut self,
        plan: &Plan<'_>,
        rows: &[u32],
        rewards: B::PartMut<'_, f32>,
        pair_weight: f32,
        gradient: Option<&mut B::Array<f32>>,
    ) -> Result<()> {
        let Head::Reward { weight, bias, .. } = &self.stack.head else { return Ok(()) };
        if rows.is_empty() {
            return Ok(());
        }
        let hidden = self.stack.config.hidden_size;
        let len = plan.rows() * hidden;
        let stream = Stream { x: B::part(&self.buffers.x, 0..len), width: hidden, norm: &self.stack.final_norm };
        let dx = &mut self.scratch.dx;
        let sums = gradient.map(|gradient| Sums { dx: B::part_mut(dx, 0..len), gradient, ranges: &self.parameters });
        let head = RewardHead { weight, bias: *bias };
        self.stack.backend.pairs(stream, rows, head, pair_weight, rewards, sums, &mut self.scratch.room)
    }

    /// A chunk of rows of one kind.
    fn language<'a>(
        &mut self,
        plan: &Plan<'_>,
        rows: &[Row<'a>],
        losses: B::PartMut<'_, f32>,
        gradient: Option<&mut B::Array<f32>>,
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
        backend.losses(stream, &numbers, head, &targets, &weights, losses, sums, &mut self.scratch.room)
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
