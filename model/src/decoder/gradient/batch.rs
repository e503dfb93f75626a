//! What a gradient is computed of.

use std::ops::Range;

use plumb_kernels::attention::PAGE;

use super::super::step::{Read, Step, StepSequence};

/// Sequences with a common beginning, such as the two sides of a pair. What they share is computed once, forwards and
/// backwards, up to the last whole page of 32 tokens.
#[derive(Clone, Debug, Default)]
pub struct Group<'a> {
    /// Its sequences.
    pub sequences: Vec<Sequence<'a>>,
}

/// A sequence and what is wanted of it.
#[derive(Clone, Debug)]
pub struct Sequence<'a> {
    /// Token ids; at least one.
    pub tokens: &'a [u32],
    /// Whether the reward at its last token is wanted.
    pub reward: bool,
    /// What its log-probabilities are compared with.
    pub language: Language<'a>,
}

/// What log-probabilities are compared with. Every row's loss counts with the same weight.
#[derive(Clone, Debug)]
pub enum Language<'a> {
    /// Nothing.
    Nothing,
    /// The next token after each of the rows: cross-entropy.
    Next {
        /// Rows of the sequence, the last token's not among them.
        rows: Range<usize>,
        /// Of a row's loss in the whole.
        weight: f32,
    },
    /// A teacher's likeliest next tokens after each row from the first on, no two the same (Askell et al. 2021, equation 2.1
    /// and appendix B.5). What is left of its probability belongs to all other tokens together.
    Teacher {
        /// The first row.
        first: usize,
        /// Tokens for each row.
        top: usize,
        /// Their ids, `[rows, top]`.
        ids: &'a [u32],
        /// Their log-probabilities in nats, `[rows, top]`.
        log_probs: &'a [f32],
        /// Of a row's loss in the whole.
        weight: f32,
    },
}

/// What came of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The reward, if it was wanted: the head's raw value.
    pub reward: f32,
    /// Sum of the rows' losses, without their weight, in nats.
    pub loss: f64,
    /// Number of rows.
    pub rows: usize,
}

/// How groups become a step.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    slices: Vec<Slice<'a>>,
    sequences: Vec<Placed<'a>>,
    pages: usize,
    rows: usize,
}

#[derive(Debug)]
struct Slice<'a> {
    tokens: &'a [u32],
    position: usize,
    pages: Vec<u32>,
}

/// Where a sequence's rows are in the step.
#[derive(Debug)]
pub(super) struct Placed<'a> {
    pub(super) sequence: Sequence<'a>,
    shared: usize,
    first_shared: usize,
    first_own: usize,
}

impl Placed<'_> {
    /// The step's row of the sequence's row.
    pub(super) fn row(&self, row: usize) -> usize {
        if row < self.shared { self.first_shared + row } else { self.first_own + row - self.shared }
    }
}

impl<'a> Plan<'a> {
    pub(super) fn new(groups: &[Group<'a>]) -> Self {
        let mut plan = Self { slices: Vec::new(), sequences: Vec::new(), pages: 0, rows: 0 };
        for group in groups {
            let shared = shared(&group.sequences);
            let (mut first_shared, mut pages) = (0, Vec::new());
            if shared > 0 {
                (first_shared, pages) = plan.slice(&group.sequences[0].tokens[..shared], 0, &[]);
            }
            for sequence in &group.sequences {
                let (first_own, _) = plan.slice(&sequence.tokens[shared..], shared, &pages);
                plan.sequences.push(Placed { sequence: sequence.clone(), shared, first_shared, first_own });
            }
        }
        plan
    }

    /// Adds a slice; answers its first row and its pages.
    fn slice(&mut self, tokens: &'a [u32], position: usize, before: &[u32]) -> (usize, Vec<u32>) {
        let own = tokens.len().div_ceil(PAGE);
        let pages: Vec<u32> = before.iter().copied().chain((self.pages..self.pages + own).map(|p| p as u32)).collect();
        let row = self.rows;
        self.slices.push(Slice { tokens, position, pages: pages.clone() });
        self.pages += own;
        self.rows += tokens.len();
        (row, pages)
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn sequences(&self) -> &[Placed<'a>] {
        &self.sequences
    }

    pub(super) fn step(&self) -> Step<'_> {
        let sequences = self.slices.iter().map(|Slice { tokens, position, pages }| StepSequence {
            tokens,
            position: *position,
            pages,
            read: Read::Nothing,
        });
        Step { sequences: sequences.collect() }
    }
}

/// Tokens that all sequences begin with, in whole pages; each has one more at least.
fn shared(sequences: &[Sequence<'_>]) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let common = |other: &Sequence<'_>| first.tokens.iter().zip(other.tokens).take_while(|(a, b)| a == b).count();
    let shared = others.iter().map(common).min().unwrap_or(0);
    let shortest = sequences.iter().map(|s| s.tokens.len()).min().unwrap_or(0);
    shared.min(shortest.saturating_sub(1)) / PAGE * PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sequences: &[Vec<u32>], expected: usize, rows: usize) {
        let sequence = |tokens| Sequence { tokens, reward: true, language: Language::Nothing };
        let group = Group { sequences: sequences.iter().map(|tokens| sequence(&tokens[..])).collect() };
        let plan = Plan::new(&[group.clone(), group.clone()]);
        assert_eq!((shared(&group.sequences), plan.rows()), (expected, 2 * rows));
        let step = plan.step();
        let flat: Vec<u32> = step.sequences.iter().flat_map(|s| s.tokens).copied().collect();
        for placed in &plan.sequences {
            let tokens = placed.sequence.tokens;
            assert!((0..tokens.len()).all(|i| flat[placed.row(i)] == tokens[i]));
        }
    }

    #[test]
    fn common_beginnings_are_shared_in_whole_pages() {
        let tokens = |beginning: usize, end: u32, len: usize| -> Vec<u32> {
            (0..beginning as u32).chain(std::iter::repeat_n(1000 + end, len - beginning)).collect()
        };
        check(&[tokens(40, 1, 50)], 0, 50);
        check(&[tokens(40, 1, 50), tokens(40, 2, 60)], 32, 78);
        check(&[tokens(31, 1, 50), tokens(31, 2, 60)], 0, 110);
        check(&[tokens(64, 1, 64), tokens(64, 1, 90)], 32, 32 + 32 + 58);
        check(&[tokens(70, 1, 80), tokens(70, 2, 90), tokens(33, 3, 90)], 32, 48 + 58 + 58 + 32);
    }
}
