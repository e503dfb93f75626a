//! Work that may take too long, on a thread of its own that is given up when it does.
//!
//! A thread cannot be stopped, so the work needs an end of its own. While it goes on with nobody waiting, it takes one
//! of a few places; when none is left, no such work is begun. So it costs others a few cores and never their answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use crate::{Error, Result};

/// Longest wait. A conversation of four megabytes takes a fifth of it on one core.
const PATIENCE: Duration = Duration::from_secs(2);
/// Threads that may be left alone at a time, in the whole process.
const MAX_GIVEN_UP: usize = 2;

/// How many are.
static GIVEN_UP: AtomicUsize = AtomicUsize::new(0);

/// The result of `work`.
///
/// # Errors
///
/// [`Error::InvalidInput`] if it takes too long, or if too much that took too long still goes on.
pub(super) fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    run_for(PATIENCE, &GIVEN_UP, work)
}

fn run_for<T: Send + 'static>(
    patience: Duration,
    given_up: &'static AtomicUsize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let refused = |reason: &str| Err(Error::InvalidInput(format!("the chat template {reason}")));
    if given_up.load(Ordering::Relaxed) >= MAX_GIVEN_UP {
        return refused("takes long, and renderings that took too long still go on");
    }
    let (sender, receiver) = sync_channel(0);
    let thread = std::thread::Builder::new().name("plumb-template".to_owned()).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        // Nobody takes it: this was given up, and counted before the receiver went.
        if sender.send(result).is_err() {
            given_up.fetch_sub(1, Ordering::Relaxed);
        }
    });
    if thread.is_err() {
        return refused("takes long, and the system has no thread for it");
    }
    match receiver.recv_timeout(patience) {
        Ok(Ok(result)) => Ok(result),
        Err(RecvTimeoutError::Timeout) => {
            given_up.fetch_add(1, Ordering::Relaxed);
            refused(&format!("takes more than {} s for this conversation", patience.as_secs_f64()))
        }
        Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => refused("fails on this conversation"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_takes_too_long_is_given_up_and_takes_a_place_until_it_ends() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let soon = Duration::from_millis(1);
        let long = Duration::from_secs(60);
        assert_eq!(run_for(long, &COUNT, || 7).unwrap(), 7);
        let mut ends = Vec::new();
        for _ in 0..MAX_GIVEN_UP {
            let (end, ended) = channel::<()>();
            let error = run_for(soon, &COUNT, move || ended.recv()).unwrap_err();
            assert!(error.to_string().contains("more than 0.001 s"), "{error}");
            ends.push(end);
        }
        let error = run_for(long, &COUNT, || 7).unwrap_err();
        assert!(error.to_string().contains("still go on"), "{error}");
        drop(ends);
        while run_for(long, &COUNT, || 7).is_err() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let error = run_for(Duration::from_secs(60), &COUNT, || assert!(std::hint::black_box(false))).unwrap_err();
        assert!(error.to_string().contains("fails"), "{error}");
    }
}
