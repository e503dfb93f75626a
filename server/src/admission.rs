//! How much work is let in, counted in tokens: a call is admitted whole or refused at once, with the time after which
//! there should be room.
//!
//! Each sequence of a call holds a [`TokenPermit`] for its tokens and gives them back when it is done, cancelled or
//! failed. The engine's recent speed tells when there should be room.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::telemetry::events::AdmissionChanged;

/// The estimate never asks a client to come back sooner, or later, than this.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));
/// Waited for where the speed is not known yet.
const RETRY_UNKNOWN: Duration = Duration::from_secs(1);

/// The tokens of work that may be admitted and not yet done.
#[derive(Debug)]
pub struct TokenBudget {
    limit: usize,
    used: Mutex<usize>,
}

impl TokenBudget {
    /// A budget of `limit` tokens.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::new(0) })
    }

    /// Admits a call's sequences, one permit for each number of tokens, or none of them. `tokens_per_second` is the
    /// engine's speed; 0 if it is not known.
    ///
    /// # Errors
    /// `InvalidArgument` if there can never be room for so much, `ResourceExhausted` if there is none now.
    pub fn admit(self: &Arc<Self>, sequences: &[usize], tokens_per_second: f64) -> Result<Vec<TokenPermit>> {
        let tokens: usize = sequences.iter().sum();
        if tokens > self.limit {
            return Err(Error::invalid(
                "",
                format!("the call is {tokens} tokens of work, {} are allowed at a time; split it", self.limit),
            ));
        }
        let mut used = self.lock();
        let excess = (*used + tokens).saturating_sub(self.limit);
        if excess > 0 {
            return Err(Error::ResourceExhausted {
                what: format!("{used} of {} tokens are queued, the call needs {tokens}", self.limit),
                retry_after: time_for(excess, tokens_per_second),
            });
        }
        *used += tokens;
        AdmissionChanged { tokens: *used }.emit();
        drop(used);
        Ok(sequences.iter().map(|&tokens| TokenPermit { tokens, budget: Arc::clone(self) }).collect())
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // A number is never half written.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for a sequence. It is only held.
#[derive(Debug)]
pub struct TokenPermit {
    tokens: usize,
    budget: Arc<TokenBudget>,
}

impl Drop for TokenPermit {
    fn drop(&mut self) {
        let mut used = self.budget.lock();
        *used -= self.tokens;
        AdmissionChanged { tokens: *used }.emit();
    }
}

/// How long the engine takes for so many tokens.
fn time_for(tokens: usize, tokens_per_second: f64) -> Duration {
    if tokens_per_second <= 0.0 {
        return RETRY_UNKNOWN;
    }
    let time = Duration::try_from_secs_f64(tokens as f64 / tokens_per_second);
    time.unwrap_or(RETRY_AFTER.1).clamp(RETRY_AFTER.0, RETRY_AFTER.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_admitted_whole_or_not_at_all() {
        let budget = TokenBudget::new(100);
        let mut permits = budget.admit(&[30, 50], 0.0).unwrap();
        assert_eq!(permits.len(), 2);
        let refused = budget.admit(&[10, 20], 5.0).unwrap_err();
        assert!(matches!(&refused, Error::ResourceExhausted { retry_after, .. } if retry_after.as_secs() == 2));
        drop(budget.admit(&[20], 0.0).unwrap());
        // A sequence that is done makes room although its call goes on.
        permits.remove(0);
        let _rest = budget.admit(&[10, 20, 20], 0.0).unwrap();
        assert_eq!(*budget.lock(), 100);
        drop(permits);
        assert_eq!(*budget.lock(), 50);
    }

    #[test]
    fn what_never_fits_is_not_worth_a_retry() {
        let budget = TokenBudget::new(100);
        assert!(matches!(budget.admit(&[60, 60], 0.0), Err(Error::InvalidArgument { .. })));
        assert!(budget.admit(&[], 0.0).unwrap().is_empty());
    }

    #[test]
    fn the_time_to_wait_follows_the_speed() {
        let check = |tokens, speed, expected| assert_eq!(time_for(tokens, speed), expected, "{tokens} at {speed}/s");
        check(1_000_000, 0.0, RETRY_UNKNOWN);
        check(2000, 1000.0, Duration::from_secs(2));
        check(1, 1000.0, RETRY_AFTER.0);
        check(usize::MAX, 1e-300, RETRY_AFTER.1);
    }
}
