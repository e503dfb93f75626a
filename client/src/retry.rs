//! When a failed call is tried again: policy only, no clock and no network.

use std::time::Duration;

use tonic::Code;

/// Exponential back-off with jitter.
///
/// Tried again are `UNAVAILABLE`, and `RESOURCE_EXHAUSTED` only where the server says when to come back (a `RetryInfo`
/// detail): without it the request itself is too large and would fail for ever. A `RetryInfo` delay is always waited
/// for in full. A server that is busy and says for how long is asked again until the deadline, however often that is,
/// and without a deadline for ever: such tries are not counted.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Most tries that are counted, the first included; 1 never tries again. Default 5.
    pub max_attempts: u32,
    /// Longest pause after the first try. Default 100 ms.
    pub initial_backoff: Duration,
    /// Longest pause at all, a server's own wish aside. Default 5 s.
    pub max_backoff: Duration,
    /// Growth of the pause from try to try. Default 2.
    pub multiplier: f64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            initial_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            multiplier: 2.0,
        }
    }
}

impl RetryPolicy {
    /// Never tries again.
    pub fn none() -> Self {
        Self { max_attempts: 1, ..Self::default() }
    }

    /// Whether a failure uses up a try.
    pub fn counts(&self, failure: Failure) -> bool {
        let busy = failure.code == Code::ResourceExhausted && failure.retry_after.is_some();
        self.max_attempts <= 1 || !busy
    }

    /// How long to wait before trying again, or `None` if the failure stands.
    ///
    /// `attempt` is the number of tries that are counted, from 1, `jitter` lies in `0.0..=1.0`, `remaining` is the time
    /// to the deadline. The pause is the server's delay plus `jitter` times the back-off, so that clients that failed
    /// together come back apart.
    pub fn delay(&self, attempt: u32, failure: Failure, remaining: Option<Duration>, jitter: f64) -> Option<Duration> {
        let worth_it = match failure.code {
            Code::Unavailable => true,
            Code::ResourceExhausted => failure.retry_after.is_some(),
            _ => false,
        };
        let used_up = attempt >= self.max_attempts && self.counts(failure);
        if !worth_it || used_up {
            return None;
        }
        let growth = self.multiplier.max(1.0).powi(attempt.saturating_sub(1).min(64) as i32);
        let seconds = (self.initial_backoff.as_secs_f64() * growth).min(self.max_backoff.as_secs_f64());
        let backoff = Duration::try_from_secs_f64(seconds * jitter.clamp(0.0, 1.0)).unwrap_or(self.max_backoff);
        let delay = failure.retry_after.unwrap_or_default().saturating_add(backoff);
        // A try that would start after the deadline is not worth the wait.
        remaining.is_none_or(|remaining| delay < remaining).then_some(delay)
    }
}

/// What a policy has to know about a failure.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// The status code.
    pub code: Code,
    /// The server's `RetryInfo`.
    pub retry_after: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: f64 = 1.0;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn check(attempt: u32, code: Code, info: Option<u64>, remaining: Option<u64>, expect: Option<u64>) {
        let failure = Failure { code, retry_after: info.map(ms) };
        let delay = RetryPolicy::default().delay(attempt, failure, remaining.map(ms), FULL);
        assert_eq!(delay, expect.map(ms), "attempt {attempt}, {code:?}, info {info:?}, remaining {remaining:?}");
    }

    #[test]
    fn delays() {
        let (unavailable, exhausted) = (Code::Unavailable, Code::ResourceExhausted);
        // The pause doubles until the tries are used up.
        check(1, unavailable, None, None, Some(100));
        check(2, unavailable, None, None, Some(200));
        check(4, unavailable, None, None, Some(800));
        check(5, unavailable, None, None, None);
        // The server's own delay comes first, whatever the code.
        check(1, unavailable, Some(1000), None, Some(1100));
        check(1, exhausted, Some(1000), None, Some(1100));
        check(1, exhausted, None, None, None);
        // Not past the deadline.
        check(1, unavailable, None, Some(100), None);
        check(1, unavailable, None, Some(101), Some(100));
        check(1, exhausted, Some(1000), Some(900), None);
        // A busy server is asked until the deadline, and for ever where there is none.
        check(5, exhausted, Some(1000), Some(2601), Some(2600));
        check(5, exhausted, Some(1000), None, Some(2600));
        check(5, unavailable, Some(1000), Some(2601), None);
        // Nothing else is worth it.
        for code in [Code::InvalidArgument, Code::NotFound, Code::Internal, Code::DeadlineExceeded, Code::Unknown] {
            check(1, code, Some(10), None, None);
        }
    }

    #[test]
    fn backoff_is_capped_and_jittered() {
        let policy = RetryPolicy { max_attempts: u32::MAX, ..RetryPolicy::default() };
        let failure = Failure { code: Code::Unavailable, retry_after: None };
        assert_eq!(policy.delay(1000, failure, None, FULL), Some(policy.max_backoff));
        assert_eq!(policy.delay(1000, failure, None, 0.0), Some(Duration::ZERO));
        assert_eq!(policy.delay(1, failure, None, 0.5), Some(ms(50)));
        assert_eq!(RetryPolicy::none().delay(1, failure, None, FULL), None);
        let busy = Failure { code: Code::ResourceExhausted, retry_after: Some(ms(1)) };
        assert_eq!(RetryPolicy::none().delay(1, busy, Some(ms(1000)), FULL), None);
    }
}
