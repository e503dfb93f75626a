//! The processes that a run is spread over: all hold the same weights and take the same steps, and each computes some
//! shards of a batch.
//!
//! How many there are changes no bit. Where numbers of several processes are added up, the order is that of the shards,
//! not of whoever is ready first: an MPI library may add in any order, so it only carries numbers here.

#[cfg(feature = "mpi")]
mod mpi;

use std::env;
use std::ops::Range;

use plumb_model::decoder::gradient::{Numbers, Peers};
use sha2::{Digest as _, Sha256};

use crate::examples::Examples;
use crate::{Error, Result};

/// Where a launcher tells how many processes it started: Open MPI's, and those that speak PMI (MPICH's, Intel's, Slurm's).
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// Where Slurm tells a process of a PMIx job its rank, and nobody the size.
#[cfg(feature = "mpi")]
const RANK: &str = "PMIX_RANK";

/// This process, and those that were started with it.
pub(crate) enum Processes {
    /// There is no other.
    Alone,
    /// There are others.
    #[cfg(feature = "mpi")]
    Several(mpi::World),
}

impl Processes {
    /// Meets the processes that a launcher, such as `mpirun`, started together.
    ///
    /// # Errors
    /// If there are several, and the program was built to be alone or for another MPI library.
    pub(crate) fn join() -> Result<Self> {
        let started = SIZES.iter().find_map(|name| env::var(name).ok()?.parse::<usize>().ok());
        // Without a launcher, an MPI library would start a daemon to serve a single process.
        #[cfg(feature = "mpi")]
        if started.is_some() || env::var_os(RANK).is_some() {
            return mpi::join(started);
        }
        match started {
            Some(count) if count > 1 => {
                let message = format!(
                    "{count} processes were started, but this plumb-train can only be one: build it with \
                     `--features mpi`, or start it without mpirun"
                );
                Err(Error::Processes(message))
            }
            _ => Ok(Self::Alone),
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Alone => 1,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.count,
        }
    }

    /// Which one this is, from 0 on.
    pub(crate) fn rank(&self) -> usize {
        match self {
            Self::Alone => 0,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.rank,
        }
    }

    /// Which one of those on its machine this is, from 0 on.
    pub(crate) fn rank_here(&self) -> usize {
        match self {
            Self::Alone => 0,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.rank_here,
        }
    }

    /// Whether this is the one that writes files and talks to the user.
    pub(crate) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Threads that compute in this process, if the recipe leaves it open: the machine's cores, shared with the others
    /// on it.
    pub(crate) fn threads(&self, wanted: Option<usize>) -> usize {
        match self {
            Self::Alone => wanted.unwrap_or_else(num_cpus::get_physical),
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.threads(wanted),
        }
    }

    /// The result, if every process has one. Of errors the first process that has one keeps it, with its rank if that
    /// is not 0; the others get [`Error::Reported`]. All have to call it.
    pub(crate) fn agree<T>(&self, result: Result<T>) -> Result<T> {
        match self {
            Self::Alone => result,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.agree(result),
        }
    }

    /// Compares what has to be the same in all processes; `advice` is for when it is not. All have to call it.
    ///
    /// # Errors
    /// In all processes, if one has another digest than the first.
    pub(crate) fn compare(&self, what: &str, digest: impl FnOnce() -> Digest, advice: &str) -> Result<()> {
        match self {
            Self::Alone => {
                let _ = (what, digest, advice);
                Ok(())
            }
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.compare(what, digest(), advice),
        }
    }

    /// The numbers of all processes, in their order. All have to call it, with the same count of numbers.
    pub(crate) fn gather<const N: usize>(&self, own: [f64; N]) -> Vec<[f64; N]> {
        match self {
            Self::Alone => vec![own],
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.gather(own),
        }
    }

    /// The lists of all processes, one behind the other. All have to call it.
    pub(crate) fn gather_list(&self, own: Vec<f64>) -> Vec<f64> {
        match self {
            Self::Alone => own,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.gather_list(&own),
        }
    }

    /// How many numbers of a vector's sum this process keeps.
    pub(crate) fn share(&self, len: usize) -> usize {
        match self {
            Self::Alone => len,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.share(len),
        }
    }

    /// Adds the vectors of all processes, in the order of the processes, to a sum of which each keeps its share; the
    /// first one replaces what is there if the sum is to be `new`. All have to call it, with vectors of one length.
    pub(crate) fn add(&self, own: &[f32], sum: &mut [f32], new: bool) {
        match self {
            Self::Alone => add_to(sum, own, new),
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.add(own, sum, new),
        }
    }

    /// Puts the shares of a sum together. All have to call it.
    pub(crate) fn collect(&self, share: &[f32], whole: &mut [f32]) {
        match self {
            Self::Alone => whole.copy_from_slice(share),
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.collect(share, whole),
        }
    }

    /// The GPUs of all processes, if these numbers lie on GPUs, and they can meet. All have to call it.
    pub(crate) fn peers(&self, numbers: &Numbers) -> Option<Peers> {
        match self {
            Self::Alone => Peers::alone(numbers),
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.peers(numbers),
        }
    }

    /// Ends what the processes did together. Where there are several, this one's error is told here, and one that the
    /// others did not agree on ends them too: they may wait for this process.
    pub(crate) fn leave<T>(self, result: Result<T>) -> Result<T> {
        match self {
            Self::Alone => result,
            #[cfg(feature = "mpi")]
            Self::Several(world) => world.leave(result),
        }
    }
}

/// What is compared instead of the thing itself.
pub(crate) type Digest = [u8; 32];

/// Of bytes.
pub(crate) fn digest(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// Of examples in their order.
pub(crate) fn digest_examples(examples: &Examples) -> Result<Digest> {
    let mut hasher = Sha256::new();
    for i in 0..examples.len() {
        hasher.update(bytemuck::cast_slice(&examples.get(i)?.encode()));
    }
    Ok(hasher.finalize().into())
}

/// One of so many parts of nearly equal length.
pub(crate) fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}

fn add_to(sum: &mut [f32], values: &[f32], new: bool) {
    if new {
        sum.copy_from_slice(values);
    } else {
        plumb_kernels::gradient::add(values, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_without_gaps() {
        for (len, lengths) in [(10, [2, 3, 2, 3]), (3, [0, 1, 1, 1]), (0, [0; 4])] {
            let parts: Vec<Range<usize>> = (0..4).map(|i| part(len, 4, i)).collect();
            assert_eq!(parts.iter().map(Range::len).collect::<Vec<_>>(), lengths);
            assert_eq!(parts.into_iter().flatten().collect::<Vec<_>>(), (0..len).collect::<Vec<_>>());
        }
    }
}
