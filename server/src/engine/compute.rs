//! The threads that compute, kept awake from one step to the next.
//!
//! A step of a stream takes milliseconds. Threads that fall asleep between two of them are woken one after the other,
//! sometimes on the same core, and the step waits for the last one. So they stay awake for a while, always ready to let
//! others have their core.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::time::{Duration, Instant};

use plumb_model::parallel::with_team;

use crate::error::{Error, Result};

/// How long threads stay awake after a step: longer than it takes to draw tokens, to answer, and to plan the next one.
const LINGER: Duration = Duration::from_millis(2);

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads of which one takes jobs, and all others stand by for it.
pub(super) struct Compute {
    jobs: Sender<Job>,
    #[expect(dead_code, reason = "only held: its threads end with it")]
    pool: rayon::ThreadPool,
}

impl Compute {
    pub(super) fn start(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("plumb-compute-{i}"))
            .build()
            .map_err(|error| Error::internal(format!("cannot start the compute threads: {error}")))?;
        let (jobs, receiver) = channel();
        pool.spawn(|| lead(receiver));
        Ok(Self { jobs, pool })
    }

    /// Runs a job on the pool, and `meanwhile` on this thread.
    ///
    /// # Errors
    /// `DeviceLost` if the job has panicked, now or before.
    pub(super) fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce() -> R + Send + 'static,
        meanwhile: impl FnOnce(),
    ) -> Result<R> {
        let (result, answer) = sync_channel(1);
        // Whoever asked waits below.
        self.jobs.send(Box::new(move || drop(result.send(job())))).map_err(|_| Error::DeviceLost)?;
        meanwhile();
        answer.recv().map_err(|_| Error::DeviceLost)
    }
}

/// Runs jobs until nobody can send any more.
fn lead(mut jobs: Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        jobs = with_team(move || {
            job();
            let mut idle = Instant::now();
            while idle.elapsed() < LINGER {
                match jobs.try_recv() {
                    Ok(job) => {
                        job();
                        idle = Instant::now();
                    }
                    Err(TryRecvError::Empty) => std::thread::yield_now(),
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            jobs
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_run_one_after_the_other_while_their_caller_does_something_else() {
        let compute = Compute::start(2).unwrap();
        for i in 0..100 {
            let mut meanwhile = 0;
            assert_eq!(compute.run(move || i * 2, || meanwhile = i), Ok(i * 2));
            assert_eq!(meanwhile, i);
            if i == 50 {
                // All asleep.
                std::thread::sleep(2 * LINGER);
            }
        }
    }
}
