//! Cutting tokens to a limit.

use std::ops::Range;

use super::Truncation;
use crate::{Error, Result};

/// What is fed to the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tokens {
    pub ids: Vec<u32>,
    /// Which of them are the response.
    pub response: Range<usize>,
    /// How many at the start stay whatever is dropped: the HHH prompt or the leading special tokens.
    pub keep: usize,
}

impl Tokens {
    /// Drops tokens until at most `limit` are left, at least one of them after those that stay. Says whether any were
    /// dropped.
    pub(super) fn truncate(&mut self, truncation: Truncation, limit: usize) -> Result<bool> {
        let tokens = self.ids.len();
        if tokens <= limit {
            return Ok(false);
        }
        if truncation == Truncation::Refuse || limit <= self.keep {
            return Err(Error::TooLong { tokens, limit });
        }
        if truncation == Truncation::Left {
            let dropped = tokens - limit;
            self.ids.drain(self.keep..self.keep + dropped);
            let moved = |index: usize| index.min(self.keep).max(index.saturating_sub(dropped));
            self.response = moved(self.response.start)..moved(self.response.end);
        } else {
            self.ids.truncate(limit);
            self.response = self.response.start.min(limit)..self.response.end.min(limit);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use Truncation::{Left, Refuse, Right};

    use super::*;

    /// Ten tokens, 0 to 9.
    #[track_caller]
    fn check(keep: usize, response: Range<usize>, cut: (Truncation, usize), ids: &[u32], left: Range<usize>) {
        let mut tokens = Tokens { ids: (0..10).collect(), response, keep };
        let truncated = tokens.truncate(cut.0, cut.1).unwrap();
        assert_eq!(tokens, Tokens { ids: ids.to_vec(), response: left, keep });
        assert_eq!(truncated, ids.len() < 10);
    }

    #[test]
    fn the_kept_start_stays_and_the_response_moves() {
        let all: Vec<u32> = (0..10).collect();
        check(0, 4..9, (Refuse, 10), &all, 4..9);
        check(0, 4..9, (Left, 10), &all, 4..9);
        check(0, 4..9, (Left, 7), &[3, 4, 5, 6, 7, 8, 9], 1..6);
        check(0, 4..9, (Left, 3), &[7, 8, 9], 0..2);
        check(2, 4..9, (Left, 7), &[0, 1, 5, 6, 7, 8, 9], 2..6);
        check(2, 4..6, (Left, 4), &[0, 1, 8, 9], 2..2);
        check(1, 1..10, (Left, 2), &[0, 9], 1..2);
        check(2, 4..9, (Right, 7), &[0, 1, 2, 3, 4, 5, 6], 4..7);
        check(2, 4..9, (Right, 3), &[0, 1, 2], 3..3);
        check(0, 10..10, (Left, 5), &[5, 6, 7, 8, 9], 5..5);
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        for (keep, truncation, limit) in [(0, Refuse, 9), (3, Left, 3), (3, Right, 3), (0, Left, 0)] {
            let mut tokens = Tokens { ids: (0..10).collect(), response: 0..0, keep };
            let error = tokens.truncate(truncation, limit).unwrap_err();
            assert!(matches!(error, Error::TooLong { tokens: 10, limit: found } if found == limit), "{error}");
        }
    }
}
