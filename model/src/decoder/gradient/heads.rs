//! Losses on what the decoder ends in, and their gradients.

use plumb_kernels::gradient::{TopK, add_rows, cross_entropy, distillation};
use plumb_kernels::head::dot;
use plumb_kernels::linear::Store;

use super::super::cpu::resize;
use super::batch::Plan;
use super::{Head, Inner, Language, Load, Outcome, Outer, RewardSlopes};
use crate::Result;

/// Rows whose logits exist at once.
const CHUNK: usize = 256;

/// Buffers that are kept from one step to the next.
#[derive(Debug)]
pub(super) struct HeadBuffers<E> {
    /// `[rows, hidden]`: before and after the final norm, and the gradients of both.
    x: Vec<f32>,
    normed: Vec<E>,
    d_normed: Vec<f32>,
    dx: Vec<f32>,
    /// `[rows, vocab_size]`.
    logits: Vec<f32>,
    d_logits: Vec<E>,
    outer: Outer<E>,
}

impl<E: Load> Default for HeadBuffers<E> {
    fn default() -> Self {
        Self {
            x: Vec::new(),
            normed: Vec::new(),
            d_normed: Vec::new(),
            dx: Vec::new(),
            logits: Vec::new(),
            d_logits: Vec::new(),
            outer: Outer::default(),
        }
    }
}

impl<E: Load> HeadBuffers<E> {
    pub(super) fn bytes(&self) -> usize {
        let Self { x, normed, d_normed, dx, logits, d_logits, outer } = self;
        let floats = [x, d_normed, dx, logits].map(Vec::capacity).iter().sum::<usize>();
        let elements = [normed, d_logits].map(Vec::capacity).iter().sum::<usize>();
        floats * 4 + elements * size_of::<E>() + outer.bytes()
    }
}

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

impl<E: Load> Inner<E> {
    /// Rewards and losses, from the residual stream in `buffers.x`; their gradients go to `scratch.dx` and to the list.
    pub(super) fn heads(
        &mut self,
        plan: &Plan<'_>,
        gradient: Option<(&mut RewardSlopes<'_>, &mut [f32])>,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = vec![Outcome::default(); plan.sequences().len()];
        let mut gradient = gradient;
        self.rewards(plan, gradient.as_mut().map(|(slopes, gradient)| (&mut **slopes, &mut **gradient)), &mut outcomes);
        let mut gradient = gradient.map(|(_, gradient)| gradient);
        let rows = language_rows(plan);
        // Rows of one kind together.
        let (tokens, teachers): (Vec<_>, Vec<_>) = rows.into_iter().partition(|r| matches!(r.target, Target::Token(_)));
        for rows in tokens.chunks(CHUNK).chain(teachers.chunks(CHUNK)) {
            self.language(rows, gradient.as_deref_mut(), &mut outcomes);
        }
        Ok(outcomes)
    }

    fn rewards(
        &mut self,
        plan: &Plan<'_>,
        gradient: Option<(&mut RewardSlopes<'_>, &mut [f32])>,
        outcomes: &mut [Outcome],
    ) {
        let Head::Reward { weight, bias, .. } = &self.stack.head else { return };
        let hidden = self.stack.config.hidden_size;
        let wanted: Vec<(usize, usize)> = plan
            .sequences()
            .iter()
            .enumerate()
            .filter(|(_, placed)| placed.sequence.reward)
            .map(|(i, placed)| (i, placed.row(placed.sequence.tokens.len() - 1)))
            .collect();
        let x: Vec<f32> =
            wanted.iter().flat_map(|(_, row)| &self.buffers.x[row * hidden..(row + 1) * hidden]).copied().collect();
        let mut normed = vec![0.0f32; x.len()];
        self.stack.final_norm.forward(&x, &mut normed);
        let rewards: Vec<f32> = normed.chunks_exact(hidden).map(|row| dot(weight, row) + bias).collect();
        for ((i, _), reward) in wanted.iter().zip(&rewards) {
            outcomes[*i].reward = *reward;
        }
        let Some((slopes, gradient)) = gradient else { return };
        let slopes = slopes(&rewards);
        assert_eq!(slopes.len(), rewards.len(), "one slope for each reward");
        let d_normed: Vec<f32> = slopes.iter().flat_map(|d| weight.iter().map(move |w| d * w)).collect();
        for (d, normed) in slopes.iter().zip(normed.chunks_exact(hidden)) {
            let score = &mut gradient[self.parameters.score.clone()];
            score.iter_mut().zip(normed).for_each(|(sum, x)| *sum += d * x);
            gradient[self.parameters.score_bias.clone()].iter_mut().for_each(|sum| *sum += d);
        }
        let mut dx = vec![0.0; x.len()];
        self.stack.final_norm.backward(&x, &d_normed, &mut dx, &mut gradient[self.parameters.final_norm.clone()]);
        let rows: Vec<u32> = wanted.iter().map(|(_, row)| *row as u32).collect();
        add_rows(&dx, &rows, 1.0, &mut self.scratch.dx, hidden);
    }

    /// A chunk of rows of one kind.
    fn language<'a>(&mut self, rows: &[Row<'a>], gradient: Option<&mut [f32]>, outcomes: &mut [Outcome]) {
        let (logits_of, softcap) = match (&self.stack.head, &self.language_head) {
            (Head::Language { logits, softcap }, _) => (logits, *softcap),
            (Head::Reward { .. }, Some(logits)) => (logits, self.stack.config.logit_softcap),
            (Head::Reward { .. }, None) => return,
        };
        let (hidden, vocabulary) = (self.stack.config.hidden_size, self.stack.config.vocab_size);
        let HeadBuffers { x, normed, d_normed, dx, logits, d_logits, outer } = &mut self.heads;
        let x = resize(x, rows.len() * hidden);
        for (x, row) in x.chunks_exact_mut(hidden).zip(rows) {
            x.copy_from_slice(&self.buffers.x[row.row * hidden..(row.row + 1) * hidden]);
        }
        let normed = resize(normed, x.len());
        self.stack.final_norm.forward(x, normed);
        let logits = resize(logits, rows.len() * vocabulary);
        logits_of.forward(normed, logits, Store::Set);

        let weights: Vec<f32> = rows.iter().map(|row| row.weight).collect();
        let mut losses = vec![0.0; rows.len()];
        let d_logits = resize(d_logits, logits.len());
        match rows[0].target {
            Target::Token(_) => {
                let id = |row: &Row<'_>| if let Target::Token(id) = row.target { id } else { 0 };
                let targets: Vec<u32> = rows.iter().map(id).collect();
                cross_entropy(logits, softcap, &targets, &weights, &mut losses, d_logits);
            }
            Target::Teacher(_) => {
                let top = |row: &Row<'a>| if let Target::Teacher(top) = row.target { Some(top) } else { None };
                let teachers: Vec<TopK<'a>> = rows.iter().filter_map(top).collect();
                distillation(logits, softcap, &teachers, &weights, &mut losses, d_logits);
            }
        }
        for (row, loss) in rows.iter().zip(&losses) {
            outcomes[row.sequence].loss += f64::from(*loss);
            outcomes[row.sequence].rows += 1;
        }
        let Some(gradient) = gradient else { return };
        let d_normed = resize(d_normed, x.len());
        // The inner loop takes pairs: an odd vocabulary has one more, which counts nothing.
        let inputs = self.transposed_head.inputs();
        if inputs == vocabulary {
            self.transposed_head.forward(d_logits, d_normed, Store::Set);
        } else {
            let filled_up = |row: &[E]| row.iter().copied().chain([E::default()]).collect::<Vec<_>>();
            let even: Vec<E> = d_logits.chunks_exact(vocabulary).flat_map(filled_up).collect();
            self.transposed_head.forward(&even, d_normed, Store::Set);
        }
        outer.take(normed, hidden);
        outer.add(d_logits, &mut gradient[self.parameters.language_head.clone()]);
        let dx = resize(dx, x.len());
        dx.fill(0.0);
        self.stack.final_norm.backward(x, d_normed, dx, &mut gradient[self.parameters.final_norm.clone()]);
        let rows: Vec<u32> = rows.iter().map(|row| row.row as u32).collect();
        add_rows(dx, &rows, 1.0, &mut self.scratch.dx, hidden);
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
