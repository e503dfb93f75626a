//! What a decoder is given to do at once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// No values: until the next step, [`Decoder::draw`](super::Decoder::draw) draws the token after the last one.
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
