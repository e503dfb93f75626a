//! What a decoder is given to do at once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::backend::Floats;
use crate::Result;

/// Counts what a decoder gets done, a layer after the other, for whoever watches from another thread.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Something is done.
    pub fn advance(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that is another one if anything was done since.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Slices of sequences that run together.
#[derive(Debug, Default)]
pub struct Step<'a> {
    /// The slices; no two write the same page.
    pub sequences: Vec<StepSequence<'a>>,
}

/// How large a step may be.
#[derive(Clone, Copy, Debug)]
pub struct StepSize {
    /// Tokens of all slices.
    pub tokens: usize,
    /// Slices.
    pub sequences: usize,
}

/// The next tokens of one sequence.
#[derive(Debug)]
pub struct StepSequence<'a> {
    /// Their ids; at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them.
    pub position: usize,
    /// Pages of positions 0 up to the last token's.
    pub pages: &'a [u32],
    /// What to answer.
    pub read: Read<'a>,
}

/// What a step answers for a sequence.
#[derive(Clone, Debug)]
pub enum Read<'a> {
    /// Nothing: only keys and values are wanted.
    Nothing,
    /// The reward head at the last token: one value.
    LastReward,
    /// The reward head at each of the slice's tokens.
    Rewards,
    /// Log-probability, in nats, of `targets[i]` as the token after the slice's row `rows.start + i`.
    LogProbs {
        /// Rows of the slice.
        rows: Range<usize>,
        /// As many as rows.
        targets: &'a [u32],
    },
    /// As `LogProbs`, each followed by 1 if the target is the token that greedy decoding takes, of equally likely ones that
    /// of the lowest id, and by 0 if not. Two values a row.
    GreedyLogProbs {
        /// Rows of the slice.
        rows: Range<usize>,
        /// As many as rows.
        targets: &'a [u32],
    },
    /// The `count` likeliest tokens after each of the slice's rows: their ids, as numbers, then their log-probabilities in
    /// nats, the likeliest first. `2 * count` values a row.
    TopLogProbs {
        /// Rows of the slice.
        rows: Range<usize>,
        /// At most the vocabulary's size.
        count: usize,
    },
    /// No values: until the next step is asked for, [`Decoder::draw`](super::Decoder::draw) draws the token after the last
    /// one.
    Draw,
    /// Vocabulary logits after the last token.
    LastLogits,
}

impl Read<'_> {
    /// Rows of a slice of `len` tokens that the head has to see.
    pub(super) fn rows(&self, len: usize) -> Range<usize> {
        match self {
            Read::Nothing => 0..0,
            Read::LastReward | Read::Draw | Read::LastLogits => len - 1..len,
            Read::Rewards => 0..len,
            Read::LogProbs { rows, .. } | Read::GreedyLogProbs { rows, .. } | Read::TopLogProbs { rows, .. } => {
                rows.clone()
            }
        }
    }
}

/// A step that was asked for: [`Decoder::ask`](super::Decoder::ask). It may be dropped without being collected.
#[derive(Debug)]
pub struct Asked {
    pub(super) floats: Floats,
    /// What rewards are normalised by: mean and standard deviation.
    pub(super) normalization: Option<(f32, f32)>,
    /// One for each sequence.
    pub(super) answers: Vec<Answer>,
}

/// Where the values for a sequence are.
#[derive(Debug)]
pub(super) enum Answer {
    /// So many of the floats, behind those of the sequences before.
    Next(usize),
    /// The first ones of so many pairs of them.
    NextFirsts(usize),
    There(Vec<f32>),
}

impl Asked {
    /// Whether the step is done, so that [`Asked::collect`] does not wait.
    pub fn is_done(&self) -> bool {
        self.floats.are_there()
    }

    /// Waits for the step, and answers what each sequence asked for, in order.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if a device failed, in this step or before.
    pub fn collect(self) -> Result<Vec<Vec<f32>>> {
        let normalised = |value: f32| self.normalization.map_or(value, |(mean, std)| (value - mean) / std);
        let mut floats = self.floats.wait()?.into_iter().map(normalised);
        let values = |answer| match answer {
            Answer::Next(count) => floats.by_ref().take(count).collect(),
            Answer::NextFirsts(count) => floats.by_ref().take(2 * count).step_by(2).collect(),
            Answer::There(values) => values,
        };
        Ok(self.answers.into_iter().map(values).collect())
    }
}
