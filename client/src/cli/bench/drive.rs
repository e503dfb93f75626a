//! When requests start: closed loop or open loop.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::report::Recorder;
use super::workload::Workload;

/// What makes a request start.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// The end of another one.
    Closed { concurrency: usize },
    /// Its time.
    Open { per_second: f64, poisson: bool, max_in_flight: usize, seed: u64 },
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "{concurrency} requests in flight"),
            Self::Open { per_second, poisson, .. } => {
                write!(f, "{per_second} requests/s ({} arrivals)", if *poisson { "poisson" } else { "uniform" })
            }
        }
    }
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    For(Duration),
    Requests(u64),
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(duration) => write!(f, "{:.1} s", duration.as_secs_f64()),
            Self::Requests(n) => write!(f, "{n} requests"),
        }
    }
}

/// Sends requests from number `first` on until the limit, waits for those in flight; answers the seconds it took.
pub(super) async fn drive(
    workload: &Arc<Workload>,
    pace: Pace,
    limit: Limit,
    first: u64,
    recorder: &Arc<Recorder>,
) -> f64 {
    let start = Instant::now();
    match pace {
        Pace::Closed { concurrency } => closed(workload, concurrency, limit, first, recorder, start).await,
        Pace::Open { per_second, poisson, max_in_flight, seed } => {
            let gaps = gaps(per_second, poisson, seed);
            open(workload, gaps, max_in_flight, limit, first, recorder, start).await;
        }
    }
    start.elapsed().as_secs_f64()
}

async fn closed(
    workload: &Arc<Workload>,
    concurrency: usize,
    limit: Limit,
    first: u64,
    recorder: &Arc<Recorder>,
    start: Instant,
) {
    let next = Arc::new(AtomicU64::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..concurrency {
        let (workload, recorder, next) = (workload.clone(), recorder.clone(), next.clone());
        workers.spawn(async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if reached(limit, n, start.elapsed()) {
                    return;
                }
                let begun = Instant::now();
                recorder.record(begun, workload.send(first + n).await);
            }
        });
    }
    while workers.join_next().await.is_some() {}
}

async fn open(
    workload: &Arc<Workload>,
    gaps: impl Iterator<Item = Duration>,
    max_in_flight: usize,
    limit: Limit,
    first: u64,
    recorder: &Arc<Recorder>,
    start: Instant,
) {
    let permits = Arc::new(Semaphore::new(max_in_flight));
    let mut calls = JoinSet::new();
    for (n, offset) in (0..).zip(times(gaps)) {
        if reached(limit, n, offset) {
            break;
        }
        let intended = start + offset;
        sleep_until(intended).await;
        let Ok(permit) = permits.clone().acquire_owned().await else { break };
        let (workload, recorder) = (workload.clone(), recorder.clone());
        calls.spawn(async move {
            let answer = workload.send(first + n).await;
            // From the intended time: a request that had to wait here waited for the server.
            recorder.record(intended, answer);
            drop(permit);
        });
        // Finished calls are let go as they come, not kept to the end.
        while calls.try_join_next().is_some() {}
    }
    while calls.join_next().await.is_some() {}
}

fn reached(limit: Limit, n: u64, elapsed: Duration) -> bool {
    match limit {
        Limit::For(duration) => elapsed >= duration,
        Limit::Requests(count) => n >= count,
    }
}

/// Gaps between requests, without end.
fn gaps(per_second: f64, poisson: bool, seed: u64) -> impl Iterator<Item = Duration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    std::iter::repeat_with(move || {
        // The gaps of a Poisson process are exponential; 1 - u is never 0.
        let share = if poisson { -(1.0 - rng.random::<f64>()).ln() } else { 1.0 };
        Duration::try_from_secs_f64(share / per_second).unwrap_or(Duration::MAX)
    })
}

/// The first request starts at once.
fn times(gaps: impl Iterator<Item = Duration>) -> impl Iterator<Item = Duration> {
    let later = gaps.scan(Duration::ZERO, |at, gap| {
        *at = at.saturating_add(gap);
        Some(*at)
    });
    std::iter::once(Duration::ZERO).chain(later)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_loop_times() {
        let uniform: Vec<_> = times(gaps(4.0, false, 0)).take(4).collect();
        assert_eq!(uniform, [0, 250, 500, 750].map(Duration::from_millis));
        let at = |seed| times(gaps(100.0, true, seed)).nth(10_000).unwrap().as_secs_f64();
        assert!((at(1) / 100.0 - 1.0).abs() < 0.05, "{}", at(1));
        assert_eq!(at(1), at(1));
        assert_ne!(at(1), at(2));
    }

    #[test]
    fn limits() {
        let s = Duration::from_secs;
        assert!(!reached(Limit::For(s(2)), 1_000_000, s(1)));
        assert!(reached(Limit::For(s(2)), 0, s(2)));
        assert!(!reached(Limit::Requests(3), 2, s(1000)));
        assert!(reached(Limit::Requests(3), 3, s(0)));
    }
}
