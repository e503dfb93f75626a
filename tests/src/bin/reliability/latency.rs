//! Latency of calls inside and outside of stretches of time.

use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::load::{Call, End, Kind};

/// From one moment to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

/// Latencies of a kind of call, in microseconds.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    /// Of calls no part of which lies in a window.
    pub(crate) steady: Histogram<u64>,
    /// Of calls some part of which lies in one.
    pub(crate) during: Histogram<u64>,
}

impl Split {
    /// Calls that were answered, apart by whether they touch a window. A long call touches one more often than a short
    /// one, so that the comparison is a little to the disadvantage of what happens in the windows.
    pub(crate) fn of(calls: &[Call], kind: Kind, windows: &[Window]) -> Result<Self> {
        let mut split = Self { steady: Histogram::new(3)?, during: Histogram::new(3)? };
        for call in calls.iter().filter(|call| call.kind == kind && call.end == End::Right) {
            let touches = windows.iter().any(|window| call.began <= window.to && window.from <= call.ended);
            record(if touches { &mut split.during } else { &mut split.steady }, call.took());
        }
        Ok(split)
    }

    /// p99 during over p99 steady; `None` if one of them is empty.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let is_complete = !self.steady.is_empty() && !self.during.is_empty();
        is_complete.then(|| milliseconds(&self.during, 0.99) / milliseconds(&self.steady, 0.99))
    }
}

/// Records a time in microseconds.
pub(crate) fn record(histogram: &mut Histogram<u64>, took: Duration) {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    // A histogram that grows takes every value; `saturating_record` alone would not let it grow.
    if histogram.record(micros).is_err() {
        histogram.saturating_record(micros);
    }
}

/// A quantile of a histogram of microseconds, in milliseconds.
pub(crate) fn milliseconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_touches_a_window_belongs_to_it() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let call = |from, to| Call { kind: Kind::Single, began: at(from), ended: at(to), end: End::Right };
        let windows = [Window { from: at(100), to: at(200) }, Window { from: at(300), to: at(400) }];
        let calls = [call(0, 50), call(90, 110), call(150, 160), call(190, 250), call(50, 450), call(210, 290)];
        let split = Split::of(&calls, Kind::Single, &windows).unwrap();
        assert_eq!((split.steady.len(), split.during.len()), (2, 4));
        assert!((split.ratio().unwrap() - 400.0 / 80.0).abs() < 0.05);
        assert!(Split::of(&calls, Kind::Rank, &windows).unwrap().ratio().is_none());
    }
}
