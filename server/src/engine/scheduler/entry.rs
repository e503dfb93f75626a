//! A sequence, from its arrival to its last value.

use std::cmp::Reverse;
use std::ops::Range;
use std::time::Instant;

use plumb_model::cache::Table;

use super::{ModelKey, SequenceId, WaitingKey};

/// How urgent a sequence is; the greater goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Behind everything else.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Before everything else.
    High,
}

/// What is wanted of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// The reward at the last token.
    Reward,
    /// The reward at every token.
    TokenRewards,
    /// Log-probabilities of the tokens in the range, each given everything before it; the range starts at 1 or later.
    LogProbs(Range<usize>),
    /// Logits after the last token, again and again, up to so many new tokens.
    Generate {
        /// Most new tokens.
        max_new_tokens: usize,
    },
}

/// Names a client inside the engine.
pub type Client = u64;

/// A sequence as it is handed in.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// The model that runs it.
    pub model: ModelKey,
    /// Its token ids; at least one.
    pub tokens: Vec<u32>,
    /// What is wanted.
    pub want: Want,
    /// How urgent it is.
    pub priority: Priority,
    /// When its answer is of no use any more.
    pub deadline: Option<Instant>,
    /// When it came.
    pub arrived: Instant,
    /// Leading tokens whose state is worth keeping for as long as the model lives: the HHH prompt.
    pub pinned_prefix: usize,
    /// Whose it is: clients of the same priority take turns.
    pub client: Client,
    /// What it counts for when they do, in tokens: what is likely to be in the cache does not.
    pub work: usize,
}

/// A sequence in the scheduler.
#[derive(Debug)]
pub struct Entry {
    pub(super) sequence: NewSequence,
    /// Tokens that it came with.
    prompt: usize,
    /// Pages, once it has begun.
    pub(super) table: Option<Table>,
    /// Tokens whose state was there when it began.
    pub(super) cached: usize,
    /// Tokens whose keys and values are computed or in a step that is planned.
    pub(super) done: usize,
    pub(super) passed_over: usize,
    /// Its place among the waiting sequences of its priority.
    pub(super) turn: u64,
    pub(super) started: Option<Instant>,
    pub(super) values: Vec<f32>,
}

impl Entry {
    pub(super) fn new(sequence: NewSequence) -> Self {
        let prompt = sequence.tokens.len();
        Self {
            sequence,
            prompt,
            table: None,
            cached: 0,
            done: 0,
            passed_over: 0,
            turn: 0,
            started: None,
            values: Vec::new(),
        }
    }

    /// Where it stands among those that wait.
    pub(super) fn waiting_key(&self, id: SequenceId) -> WaitingKey {
        (Reverse(self.sequence.priority), self.turn, id)
    }

    /// Forgets what was computed; tokens that were drawn stay. Gives back the pages.
    pub(super) fn restart(&mut self) -> Option<Table> {
        (self.cached, self.done) = (0, 0);
        self.values.clear();
        self.table.take()
    }

    /// Token ids, those generated so far included.
    pub fn tokens(&self) -> &[u32] {
        &self.sequence.tokens
    }

    /// Its pages; empty before it has begun.
    pub fn pages(&self) -> &[u32] {
        self.table.as_ref().map_or(&[], Table::pages)
    }

    /// Tokens that were computed before it came.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// When its first step began.
    pub fn started(&self) -> Option<Instant> {
        self.started
    }

    /// When it came.
    pub fn arrived(&self) -> Instant {
        self.sequence.arrived
    }

    /// What is wanted.
    pub fn want(&self) -> &Want {
        &self.sequence.want
    }

    /// Values so far.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    pub(super) fn remaining(&self) -> usize {
        self.sequence.tokens.len() - self.done
    }

    /// Nothing but the token that was drawn last is left to compute.
    pub(super) fn decodes(&self) -> bool {
        matches!(self.sequence.want, Want::Generate { .. }) && self.table.is_some() && self.remaining() == 1
    }

    /// It has got its pages.
    pub(super) fn begin(&mut self, table: Table, now: Instant) {
        self.cached = table.cached();
        self.done = self.cached;
        self.table = Some(table);
        self.started.get_or_insert(now);
    }

    /// Leading tokens whose state may come from the cache: what is left must produce every wanted value.
    pub(super) fn reusable(&self) -> usize {
        match &self.sequence.want {
            Want::Reward | Want::Generate { .. } => self.sequence.tokens.len() - 1,
            Want::TokenRewards => 0,
            Want::LogProbs(range) => range.start.saturating_sub(1),
        }
    }

    /// Tokens that it may grow to. Room for all of them is taken at the start, so that a sequence that has begun can
    /// always end.
    pub(super) fn final_length(&self) -> usize {
        let new = if let Want::Generate { max_new_tokens } = self.sequence.want { max_new_tokens } else { 0 };
        self.prompt + new
    }
}

/// Rows of a slice, relative to its first, after which a log-probability is wanted.
pub fn log_prob_rows(range: &Range<usize>, positions: &Range<usize>) -> Range<usize> {
    // The probability of token i is read after position i - 1.
    let start = (range.start - 1).max(positions.start).min(positions.end);
    let end = range.end.saturating_sub(1).min(positions.end).max(start);
    start - positions.start..end - positions.start
}
