//! How much work is let in, counted in tokens: a call is admitted whole or refused at once, with the time after which
//! there should be room.
//!
//! Each sequence of a call holds a [`TokenPermit`] for its tokens and gives them back when it is done, cancelled or
//! failed; what is given back per second is the throughput from which the time to wait is estimated.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::telemetry::events::AdmissionChanged;

/// The estimate never asks a client to come back sooner, or later, than this.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));
/// Waited for where no throughput is known yet.
const RETRY_UNKNOWN: Duration = Duration::from_secs(1);
/// Throughput is measured over stretches of at least this length.
const STRETCH: Duration = Duration::from_millis(500);
/// Weight of the newest stretch in the throughput.
const NEWEST: f64 = 0.5;

/// The tokens of work that may be admitted and not yet done.
#[derive(Debug)]
pub struct TokenBudget {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    throughput: Throughput,
}

impl TokenBudget {
    /// A budget of `limit` tokens.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// Admits a call's sequences, one permit for each number of tokens, or none of them.
    ///
    /// # Errors
    /// `InvalidArgument` if there can never be room for so much, `ResourceExhausted` if there is none now.
    pub fn admit(self: &Arc<Self>, sequences: &[usize]) -> Result<Vec<TokenPermit>> {
        let tokens: usize = sequences.iter().sum();
        if tokens > self.limit {
            return Err(Error::invalid(
                "",
                format!("the call is {tokens} tokens of work, {} are allowed at a time; split it", self.limit),
            ));
        }
        let mut state = self.lock();
        let excess = (state.used + tokens).saturating_sub(self.limit);
        if excess > 0 {
            return Err(Error::ResourceExhausted {
                what: format!("{} of {} tokens are queued, the call needs {tokens}", state.used, self.limit),
                retry_after: state.throughput.time_for(excess),
            });
        }
        if state.used == 0 {
            // The time of idleness says nothing about the throughput.
            state.throughput.begin(Instant::now());
        }
        state.used += tokens;
        AdmissionChanged { tokens: state.used }.emit();
        drop(state);
        Ok(sequences.iter().map(|&tokens| TokenPermit { tokens, budget: Arc::clone(self) }).collect())
    }

    fn release(&self, tokens: usize, now: Instant) {
        let mut state = self.lock();
        state.used -= tokens;
        state.throughput.done(tokens, now);
        AdmissionChanged { tokens: state.used }.emit();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Numbers stay numbers: nothing in here can be half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.budget.release(self.tokens, Instant::now());
    }
}

/// Tokens per second, as an exponential average over stretches of work.
#[derive(Debug, Default)]
struct Throughput {
    per_second: Option<f64>,
    stretch: Option<(Instant, usize)>,
}

impl Throughput {
    fn begin(&mut self, now: Instant) {
        self.stretch = Some((now, 0));
    }

    fn done(&mut self, tokens: usize, now: Instant) {
        let Some((began, before)) = self.stretch else { return };
        let (tokens, elapsed) = (before + tokens, now.saturating_duration_since(began));
        if elapsed < STRETCH {
            self.stretch = Some((began, tokens));
            return;
        }
        let newest = tokens as f64 / elapsed.as_secs_f64();
        self.per_second = Some(self.per_second.map_or(newest, |old| old + NEWEST * (newest - old)));
        self.stretch = Some((now, 0));
    }

    /// How long it takes until so many tokens are done.
    fn time_for(&self, tokens: usize) -> Duration {
        let seconds = self.per_second.filter(|rate| *rate > 0.0).map(|rate| tokens as f64 / rate);
        let time = seconds.map_or(Some(RETRY_UNKNOWN), |seconds| Duration::try_from_secs_f64(seconds).ok());
        time.unwrap_or(RETRY_AFTER.1).clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_admitted_whole_or_not_at_all() {
        let budget = TokenBudget::new(100);
        let mut permits = budget.admit(&[30, 50]).unwrap();
        assert_eq!(permits.len(), 2);
        let refused = budget.admit(&[10, 20]).unwrap_err();
        assert!(matches!(&refused, Error::ResourceExhausted { retry_after, .. } if *retry_after == RETRY_UNKNOWN));
        budget.admit(&[20]).unwrap();
        // A sequence that is done makes room although its call goes on.
        permits.remove(0);
        let _rest = budget.admit(&[10, 20, 20]).unwrap();
        assert_eq!(budget.lock().used, 100);
        drop(permits);
        assert_eq!(budget.lock().used, 50);
    }

    #[test]
    fn what_never_fits_is_not_worth_a_retry() {
        let budget = TokenBudget::new(100);
        assert!(matches!(budget.admit(&[60, 60]), Err(Error::InvalidArgument { .. })));
        assert!(budget.admit(&[]).unwrap().is_empty());
    }

    #[test]
    fn the_time_to_wait_follows_the_throughput() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let mut throughput = Throughput::default();
        assert_eq!(throughput.time_for(1_000_000), RETRY_UNKNOWN);
        throughput.begin(at(0));
        throughput.done(400, at(250));
        assert_eq!(throughput.time_for(1), RETRY_UNKNOWN, "a stretch is not over");
        throughput.done(600, at(1000));
        assert_eq!(throughput.time_for(2000), Duration::from_secs(2), "1,000 tokens/s");
        throughput.done(3000, at(2000));
        assert_eq!(throughput.time_for(2000), Duration::from_secs(1), "halfway to 3,000 tokens/s");
        assert_eq!(throughput.time_for(1), RETRY_AFTER.0);
        assert_eq!(throughput.time_for(usize::MAX), RETRY_AFTER.1);
        // A pause between two bursts is not slowness.
        throughput.begin(at(100_000));
        throughput.done(1000, at(100_500));
        assert_eq!(throughput.time_for(2000), Duration::from_secs(1));
    }
}
