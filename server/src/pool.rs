//! The CPU pool: rendering and tokenizing, which may take milliseconds, away from the threads that do input and output.
//!
//! What a computation takes is bounded by its input: a text has at most 4 MiB, and templates are rendered in processes
//! with limits. Nothing can stop a tokenizer in the middle of a text; a call whose deadline passes is answered all the
//! same, and if it was still waiting for a thread, it takes none.

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::telemetry::events::WorkerPanicked;

/// Threads for short computations.
pub(crate) struct CpuPool(ThreadPool);

impl CpuPool {
    /// A pool of so many threads.
    ///
    /// # Errors
    /// If they cannot be started.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("plumb-text-{i}"))
            // Without a handler, a panic ends the process. The answer's channel is dropped, which its caller sees.
            .panic_handler(|_| WorkerPanicked.emit())
            .build();
        Ok(Self(pool.map_err(|error| Error::internal(format!("tokenization workers: {error}")))?))
    }

    /// Computes on the pool; parallel iterators inside spread over it. A caller that goes away does not stop what has
    /// begun.
    ///
    /// # Errors
    /// `Internal` if the computation panicked.
    pub(crate) async fn run<T: Send + 'static>(&self, compute: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        self.0.spawn(move || {
            if !sender.is_closed() {
                // Nobody waits any more if this fails.
                let _ = sender.send(compute());
            }
        });
        receiver.await.map_err(|_| Error::internal("a tokenization worker panicked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_begun() {
        let pool = CpuPool::new(1).unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let holding = pool.run(move || held.recv());
        let (ran, late) = std::sync::mpsc::channel();
        let mut waiting = Box::pin(pool.run(move || ran.send(())));
        let mut holding = Box::pin(holding);
        assert!(futures::poll!(&mut holding).is_pending() && futures::poll!(&mut waiting).is_pending());
        drop(waiting);
        release.send(()).unwrap();
        holding.await.unwrap().unwrap();
        pool.run(|| {}).await.unwrap();
        assert!(late.recv().is_err());
    }

    #[tokio::test]
    async fn a_panic_fails_its_own_call_only() {
        let pool = CpuPool::new(1).unwrap();
        let failed = pool.run(|| panic!("a bad input")).await.map(|()| 0);
        assert_eq!(failed.unwrap_err().code(), tonic::Code::Internal);
        assert_eq!(pool.run(|| 2 + 2).await.unwrap(), 4);
    }
}
