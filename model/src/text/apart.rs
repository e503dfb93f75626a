//! Work that may take too long, on a thread of its own that is given up when it does.
//!
//! A thread cannot be stopped, so the work needs an end of its own. A thread takes one of [`MAX_THREADS`] places before
//! it begins and has it until it ends, waited for or not: there are never more of them, however many callers there are.
//! Who finds no place waits for one, as what runs ends or is given up after [`PATIENCE`]. While [`MAX_GIVEN_UP`] go on
//! with nobody waiting, no such work is begun; what ran already may be given up too. So it costs others a few cores and
//! never their answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Error, Result};

/// Longest wait for a result. A conversation of four megabytes takes a fifth of it on one core.
const PATIENCE: Duration = Duration::from_secs(2);
/// Threads at a time, in the whole process. Each renders ten megabytes a second, more than a model reads.
const MAX_THREADS: usize = 4;
/// As many left alone, and no more are begun.
const MAX_GIVEN_UP: usize = 2;

static THREADS: Threads = Threads::new();

/// The threads that there are.
struct Threads {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    /// Those that were given up among them.
    all: usize,
    given_up: usize,
}

impl Threads {
    const fn new() -> Self {
        Self { counts: Mutex::new(Counts { all: 0, given_up: 0 }), changed: Condvar::new() }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place, once there is one; `false` if too many were given up.
    fn begin(&self) -> bool {
        let mut counts = self.counts();
        while counts.given_up < MAX_GIVEN_UP && counts.all >= MAX_THREADS {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
        let begins = counts.given_up < MAX_GIVEN_UP;
        counts.all += usize::from(begins);
        begins
    }

    fn give_up(&self) {
        self.counts().given_up += 1;
        self.changed.notify_all();
    }

    fn end(&self, given_up: bool) {
        let mut counts = self.counts();
        counts.all -= 1;
        counts.given_up -= usize::from(given_up);
        self.changed.notify_all();
    }
}

/// The result of `work`.
///
/// # Errors
///
/// [`Error::InvalidInput`] if it takes too long, or if too much that took too long still goes on.
pub(super) fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    run_for(PATIENCE, &THREADS, work)
}

fn run_for<T: Send + 'static>(
    patience: Duration,
    threads: &'static Threads,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let refused = |reason: &str| Err(Error::InvalidInput(format!("the chat template {reason}")));
    if !threads.begin() {
        return refused("takes long, and renderings that took too long still go on");
    }
    let (sender, receiver) = sync_channel(0);
    let thread = std::thread::Builder::new().name("plumb-template".to_owned()).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(work));
        // If nobody takes it, this was given up, and counted before the receiver went.
        let given_up = sender.send(result).is_err();
        threads.end(given_up);
    });
    if thread.is_err() {
        threads.end(false);
        return refused("takes long, and the system has no thread for it");
    }
    match receiver.recv_timeout(patience) {
        Ok(Ok(result)) => Ok(result),
        Err(RecvTimeoutError::Timeout) => {
            threads.give_up();
            refused(&format!("takes more than {} s for this conversation", patience.as_secs_f64()))
        }
        Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => refused("fails on this conversation"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::RwLock;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_takes_too_long_is_given_up_and_takes_a_place_until_it_ends() {
        static THREADS: Threads = Threads::new();
        let soon = Duration::from_millis(1);
        let long = Duration::from_secs(60);
        assert_eq!(run_for(long, &THREADS, || 7).unwrap(), 7);
        let mut ends = Vec::new();
        for _ in 0..MAX_GIVEN_UP {
            let (end, ended) = channel::<()>();
            let error = run_for(soon, &THREADS, move || ended.recv()).unwrap_err();
            assert!(error.to_string().contains("more than 0.001 s"), "{error}");
            ends.push(end);
        }
        let error = run_for(long, &THREADS, || 7).unwrap_err();
        assert!(error.to_string().contains("still go on"), "{error}");
        drop(ends);
        while run_for(long, &THREADS, || 7).is_err() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn however_many_call_at_once_threads_are_few_and_short_work_is_done() {
        static THREADS: Threads = Threads::new();
        static GATE: RwLock<()> = RwLock::new(());
        const CALLERS: usize = 4 * MAX_THREADS;
        let closed = GATE.write().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..CALLERS {
                scope.spawn(|| {
                    run_for(Duration::from_millis(1), &THREADS, || drop(GATE.read())).unwrap_err();
                });
            }
        });
        let Counts { all, given_up } = *THREADS.counts();
        assert_eq!(all, given_up);
        assert!((MAX_GIVEN_UP..=MAX_THREADS).contains(&all), "{all}");
        drop(closed);
        while *THREADS.counts() != (Counts { all: 0, given_up: 0 }) {
            std::thread::yield_now();
        }
        std::thread::scope(|scope| {
            for i in 0..CALLERS {
                scope.spawn(move || assert_eq!(run_for(Duration::from_secs(60), &THREADS, move || i).unwrap(), i));
            }
        });
    }

    #[test]
    fn a_panic_is_an_error() {
        static THREADS: Threads = Threads::new();
        let error = run_for(Duration::from_secs(60), &THREADS, || assert!(std::hint::black_box(false))).unwrap_err();
        assert!(error.to_string().contains("fails"), "{error}");
    }
}
