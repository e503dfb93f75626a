//! Work that must not disturb whoever computes: on few threads of its own, which the system puts behind the others.

use std::num::{NonZeroU64, NonZeroUsize};

use rayon::{ThreadBuilder, ThreadPoolBuilder};

use crate::{Error, Result};

/// What is added to the niceness of the threads: of a core that others want too, they get about a tenth. More would
/// starve a load on a server that is never idle, which then would not get its new version either.
const NICENESS: i32 = 10;

/// How a load goes about its work. The default is that of a program that does nothing else: on the current threads, as
/// fast as it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Background {
    /// Threads of its own, of low priority, for all that it does. Two passes over the weights, hashing and packing, each
    /// mostly on one thread: more of them help with checkpoints of several files.
    pub threads: Option<NonZeroUsize>,
    /// Bytes a second that are read, hashing and packing counted each.
    pub bytes_per_second: Option<NonZeroU64>,
}

impl Background {
    /// One thread, at whatever rate.
    pub const ONE: Self = Self { threads: Some(NonZeroUsize::MIN), bytes_per_second: None };

    /// Does the work where it is to be done.
    ///
    /// # Errors
    /// Those of the work, and [`Error::OutOfMemory`] if there is no thread for it.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let Some(threads) = self.threads else { return work() };
        let mut handles = Vec::new();
        let spawn = |thread: ThreadBuilder| {
            let name = format!("plumb-load-{}", thread.index());
            let run = || {
                step_back();
                thread.run();
            };
            handles.push(std::thread::Builder::new().name(name).spawn(run)?);
            Ok(())
        };
        let pool = ThreadPoolBuilder::new().num_threads(threads.get()).spawn_handler(spawn).build();
        let result = match pool {
            Ok(pool) => pool.install(work),
            Err(error) => Err(Error::OutOfMemory(format!("no threads for loading: {error}"))),
        };
        // The pool has told them to end. When they have, the arenas in which they allocated are free for the threads of
        // the next load, which would begin others, and leave their rests in them too.
        handles.into_iter().for_each(|handle| drop(handle.join()));
        result
    }
}

/// Lowers the priority of the current thread.
fn step_back() {
    // To Linux a thread is a process here. Elsewhere this would be about the whole process, and nothing is done. A
    // system that refuses leaves a load that disturbs more, which is better than none.
    #[cfg(target_os = "linux")]
    if let Ok(now) = rustix::process::getpriority_process(None) {
        let _ = rustix::process::setpriority_process(None, now + NICENESS);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn work_steps_back_on_threads_of_its_own() {
        let niceness = || rustix::process::getpriority_process(None).unwrap();
        let here = std::thread::current().id();
        let before = niceness();
        let background = Background { threads: NonZeroUsize::new(2), ..Background::default() };
        let (inside, thread, threads) =
            background.run(|| Ok((niceness(), std::thread::current().id(), rayon::current_num_threads()))).unwrap();
        assert_eq!((inside, threads), ((before + NICENESS).min(19), 2));
        assert_ne!(thread, here);
        assert_eq!(niceness(), before, "others are as they were");
        assert_eq!(Background::default().run(|| Ok(std::thread::current().id())).unwrap(), here);
    }
}
