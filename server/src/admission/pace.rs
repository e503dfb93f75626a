//! How fast admitted work gets done, seen from the gate: from admission to the answer, so that tokenizing, cached
//! beginnings and whatever else the machine does are all in it.

use std::time::{Duration, Instant};

/// Time with work at hand that makes a sample. Batches end many sequences at once: a shorter one would see all or none.
const WINDOW: Duration = Duration::from_millis(500);
/// The same for a first guess: clients that have been refused wait for nothing as long as there is none.
const FIRST: Duration = Duration::from_millis(20);
/// How long a sample is remembered.
const MEMORY: Duration = Duration::from_secs(2);

/// Tokens per second while there is work.
///
/// Only a window in which work was always at hand, and plenty of it, tells what the server can do; a lone call tells how
/// long it took. So other windows may raise the rate and never lower it, as those of a sender with too little to send in
/// BBR (Cardwell et al. 2016, "BBR: Congestion-Based Congestion Control", ACM Queue 14(5)).
#[derive(Debug, Default)]
pub(super) struct Pace {
    rate: f64,
    /// A crowded window has been seen.
    known: bool,
    tokens: usize,
    given_up: usize,
    busy: Duration,
    /// Since when there is work, or when some was done last.
    since: Option<Instant>,
    crowded: bool,
    idled: bool,
}

impl Pace {
    /// Tokens per second; 0 before the first sample.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    /// Tokens per second, once it has been seen what the server can do.
    pub(super) fn known_rate(&self) -> Option<f64> {
        (self.known && self.rate > 0.0).then_some(self.rate)
    }

    /// How long the server has been at what it does now, at most: since something was done, or since it was idle.
    pub(super) fn at_work(&self, now: Instant) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// There is work.
    pub(super) fn begin(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// There is plenty of it.
    pub(super) fn crowd(&mut self) {
        self.crowded = true;
    }

    /// Some has been given up, and some is left.
    pub(super) fn given_up(&mut self, tokens: usize, left: usize, now: Instant) {
        self.given_up += tokens;
        self.done(0, left, now);
    }

    /// Some has been done, and some is left.
    pub(super) fn done(&mut self, tokens: usize, left: usize, now: Instant) {
        let Some(since) = self.since else { return };
        self.tokens += tokens;
        self.busy += now.saturating_duration_since(since);
        self.since = (left > 0).then_some(now);
        self.idled |= left == 0;
        if self.busy >= if self.rate > 0.0 { WINDOW } else { FIRST } {
            self.sample();
        }
    }

    fn sample(&mut self) {
        let sample = self.tokens as f64 / self.busy.as_secs_f64();
        // What was given up may have been computed in part: where it is most of it, nobody knows how much.
        let tells = self.crowded && !self.idled && self.given_up <= self.tokens;
        if tells && self.busy >= WINDOW {
            let weight = match self.known {
                true => 1.0 - (-self.busy.as_secs_f64() / MEMORY.as_secs_f64()).exp(),
                false => 1.0,
            };
            self.rate += weight * (sample - self.rate);
            self.known = true;
        } else {
            self.rate = self.rate.max(sample);
        }
        *self = Self { rate: self.rate, known: self.known, since: self.since, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(seconds, tokens done, tokens left, whether there was plenty)`, and the rate in the end.
    fn check(events: &[(f64, usize, usize, bool)], rate: f64, known: bool) {
        let start = Instant::now();
        let mut pace = Pace::default();
        pace.begin(start);
        for &(at, tokens, left, crowded) in events {
            let now = start + Duration::from_secs_f64(at);
            pace.begin(now);
            if crowded {
                pace.crowd();
            }
            pace.done(tokens, left, now);
        }
        assert!((pace.rate() - rate).abs() < 1.0, "{} for {events:?}", pace.rate());
        assert_eq!(pace.known_rate().is_some(), known, "{events:?}");
    }

    #[test]
    fn only_plenty_of_work_tells_what_the_server_can_do() {
        check(&[], 0.0, false);
        check(&[(0.01, 100, 0, false)], 0.0, false);
        check(&[(0.1, 100, 900, true)], 1000.0, false);
        // Calls one after the other: a lower bound.
        check(&[(0.5, 500, 0, false), (9.0, 1, 1, false), (9.5, 200, 0, false)], 1000.0, false);
        check(&[(0.5, 500, 0, false), (9.0, 1, 1, false), (9.5, 900, 0, false)], 1802.0, false);
        check(&[(0.6, 600, 500, true)], 1000.0, true);
        // The first crowded sample replaces what was guessed; the next ones move it.
        check(&[(0.5, 2000, 0, false), (1.0, 0, 9, true), (1.5, 500, 500, true)], 1000.0, true);
        check(&[(1.0, 1000, 500, true), (4.0, 6000, 500, true)], 1000.0 + 776.9, true);
    }

    #[test]
    fn idle_time_does_not_count() {
        check(&[(0.3, 300, 0, false), (5.0, 0, 1, false), (5.3, 300, 0, false)], 1000.0, false);
    }
}
