//! Sees from outside when the engine gets no further, on a thread that does nothing else.
//!
//! A step may take long: its size is bounded, the model's is not. So what counts is not how long a step takes but whether
//! anything is done meanwhile: a command, a layer, a step. Time is told by looks at it, not by a clock, so that a
//! process that was stopped for a while is not taken for one that got stuck.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use plumb_model::decoder::Progress;

/// Looks within the time without progress that is too long: the verdict is late by at most one of them.
const LOOKS: u32 = 16;

/// What the engine's thread shows of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Pulse {
    busy: Arc<AtomicBool>,
    /// Steps count their layers here.
    pub(super) progress: Progress,
}

impl Pulse {
    /// Something is about to be done.
    pub(super) fn beat(&self) {
        self.busy.store(true, Ordering::Relaxed);
        self.progress.advance();
    }

    /// There is nothing to do.
    pub(super) fn rest(&self) {
        self.busy.store(false, Ordering::Relaxed);
    }
}

/// Calls `stuck` if the pulse shows no progress for so long, and ends with it or when the sender is dropped.
pub(super) fn watch(pulse: &Pulse, timeout: Duration, ended: &Receiver<Infallible>, stuck: impl FnOnce()) {
    let mut vigil = Vigil::default();
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(timeout / LOOKS) {
        if vigil.is_stuck(pulse.busy.load(Ordering::Relaxed), pulse.progress.read()) {
            return stuck();
        }
    }
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Vigil {
    progress: u64,
    /// Looks that found the engine busy with no progress since the one before.
    looks: u32,
}

impl Vigil {
    fn is_stuck(&mut self, busy: bool, progress: u64) -> bool {
        let stands = busy && progress == self.progress;
        self.looks = if stands { self.looks + 1 } else { 0 };
        self.progress = progress;
        self.looks >= LOOKS
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// The first look that finds the engine stuck; each is whether it is busy, and its progress.
    fn check(looks: impl IntoIterator<Item = (bool, u64)>, expected: Option<usize>) {
        let mut vigil = Vigil::default();
        let found = looks.into_iter().position(|(busy, progress)| vigil.is_stuck(busy, progress));
        assert_eq!(found, expected);
    }

    #[test]
    fn stuck_is_who_has_something_to_do_and_gets_no_further() {
        let looks = LOOKS as usize;
        check([(true, 7); 100], Some(looks));
        check([(false, 7); 100], None);
        check((1..100).map(|look| (true, look)), None);
        // A layer takes almost as long as it may.
        check((0..100).map(|look| (true, 1 + look / u64::from(LOOKS))), None);
        check((0..100).map(|look| (look % 10 != 0, 7)), None);
        // Idle for long, then stuck.
        check((0..100).map(|look| (look >= 50, 7)), Some(50 + looks - 1));
    }

    #[test]
    fn the_watch_ends_with_the_engine_or_with_a_verdict() {
        let (engine, ended) = channel();
        let pulse = Pulse::default();
        pulse.beat();
        let mut stuck = false;
        watch(&pulse, Duration::from_millis(16), &ended, || stuck = true);
        assert!(stuck);
        drop(engine);
        watch(&pulse, Duration::from_secs(3600), &ended, || panic!("the engine has ended"));
    }
}
