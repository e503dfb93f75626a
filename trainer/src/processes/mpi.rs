//! Several processes, which exchange numbers through MPI.
//!
//! One thread at a time calls the library: the one that joins, then the one that trains, while the other waits for it.

use std::sync::atomic::{AtomicBool, Ordering};

use mpi::Count;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::{Threading, Universe, initialize_with_threading, processor_name};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives as _};
use plumb_model::decoder::gradient::{MeetingId, Numbers, Peers};

use super::{Digest, Processes, SIZES, add_to, part};
use crate::{Error, Result};

/// Numbers that go from one process to another at once: 1 MiB is enough for full speed, and bounds what is received.
const PIECE: usize = 1 << 18;

/// All processes of an `mpirun`; at least two.
pub(crate) struct World {
    universe: Universe,
    pub(super) count: usize,
    pub(super) rank: usize,
    /// How many run on this machine, and which of them this is.
    here: usize,
    pub(super) rank_here: usize,
    /// All processes know that it is over.
    over: AtomicBool,
}

/// Meets the others, of which there are to be so many where the launcher told it.
pub(super) fn join(started: Option<usize>) -> Result<Processes> {
    let wrong = |message: String| Err(Error::Processes(message));
    let Some((universe, threading)) = initialize_with_threading(Threading::Serialized) else {
        return wrong("a process can train once: MPI does not start again".into());
    };
    if threading < Threading::Serialized {
        return wrong("this MPI library can only be called by a program's main thread".into());
    }
    let world = universe.world();
    let (count, rank) = (world.size() as usize, world.rank() as usize);
    if let Some(started) = started.filter(|started| *started != count) {
        return wrong(format!(
            "{started} processes were started, but MPI knows {count}: use the mpirun of the library that plumb-train \
             was built with, and none of {} in the environment otherwise",
            SIZES.join(", ")
        ));
    }
    if count == 1 {
        return Ok(Processes::Alone);
    }
    let machine = world.split_shared(rank as i32);
    let (here, rank_here) = (machine.size() as usize, machine.rank() as usize);
    Ok(Processes::Several(World { universe, count, rank, here, rank_here, over: AtomicBool::new(false) }))
}

impl World {
    fn all(&self) -> SimpleCommunicator {
        self.universe.world()
    }

    pub(super) fn threads(&self, wanted: Option<usize>) -> usize {
        let cores = (num_cpus::get_physical() / self.here).max(1);
        // Launchers may tie a process to a few cores; threads beyond them would only wait for each other.
        let allowed = std::thread::available_parallelism().map_or(cores, usize::from);
        let threads = wanted.unwrap_or(cores);
        if self.rank == 0 && allowed < threads {
            eprintln!(
                "each process could use {threads} threads, but is tied to {allowed} cores: `mpirun --bind-to none` \
                 unties it"
            );
        }
        wanted.unwrap_or(cores.min(allowed))
    }

    pub(super) fn agree<T>(&self, result: Result<T>) -> Result<T> {
        let mut failed = vec![0u8; self.count];
        self.all().all_gather_into(&[u8::from(result.is_err())][..], &mut failed[..]);
        let Some(first) = failed.iter().position(|failed| *failed == 1) else { return result };
        self.over.store(true, Ordering::Relaxed);
        match result {
            Err(error) if first == self.rank => Err(error),
            _ => Err(Error::Reported),
        }
    }

    pub(super) fn compare(&self, what: &str, digest: Digest, advice: &str) -> Result<()> {
        let mut digests = vec![0u8; digest.len() * self.count];
        self.all().all_gather_into(&digest[..], &mut digests[..]);
        let (digests, _) = digests.as_chunks::<32>();
        let differs = digests.iter().position(|other| *other != digests[0]);
        let message = |rank| format!("process {rank} has other {what} than process 0: {advice}");
        self.agree(differs.map_or(Ok(()), |rank| Err(Error::Processes(message(rank)))))
    }

    pub(super) fn gather<const N: usize>(&self, own: [f64; N]) -> Vec<[f64; N]> {
        let mut all = vec![0.0; N * self.count];
        self.all().all_gather_into(&own[..], &mut all[..]);
        let (all, _) = all.as_chunks::<N>();
        all.to_vec()
    }

    pub(super) fn gather_list(&self, own: &[f64]) -> Vec<f64> {
        let lengths = self.gather([own.len() as f64]).into_iter().map(|[len]| len as Count);
        let mut start = 0;
        let (counts, starts): (Vec<Count>, Vec<Count>) = lengths.map(|len| (len, (start, start += len).0)).unzip();
        let mut all = vec![0.0; start as usize];
        let mut receive = PartitionMut::new(&mut all[..], &counts[..], &starts[..]);
        self.all().all_gather_varcount_into(own, &mut receive);
        all
    }

    pub(super) fn share(&self, len: usize) -> usize {
        let block = self.count * PIECE;
        let blocks = (0..len).step_by(block).map(|start| block.min(len - start));
        blocks.map(|block| part(block, self.count, self.rank).len()).sum()
    }

    pub(super) fn add(&self, own: &[f32], sum: &mut [f32], new: bool) {
        let mut received = Vec::new();
        let mut rest = sum;
        for block in own.chunks(self.count * PIECE) {
            let share = part(block.len(), self.count, self.rank).len();
            let (sum, after) = std::mem::take(&mut rest).split_at_mut(share);
            rest = after;
            received.resize(share * self.count, 0.0);
            let parts = Parts::new(block.len(), self.count);
            let send = Partition::new(block, &parts.counts[..], &parts.starts[..]);
            let shares = Parts::new(received.len(), self.count);
            let mut receive = PartitionMut::new(&mut received[..], &shares.counts[..], &shares.starts[..]);
            self.all().all_to_all_varcount_into(&send, &mut receive);
            for rank in 0..self.count {
                add_to(sum, &received[rank * share..(rank + 1) * share], new && rank == 0);
            }
        }
    }

    pub(super) fn collect(&self, share: &[f32], whole: &mut [f32]) {
        let mut rest = share;
        for block in whole.chunks_mut(self.count * PIECE) {
            let (own, after) = rest.split_at(part(block.len(), self.count, self.rank).len());
            rest = after;
            let parts = Parts::new(block.len(), self.count);
            let mut receive = PartitionMut::new(block, &parts.counts[..], &parts.starts[..]);
            self.all().all_gather_varcount_into(own, &mut receive);
        }
    }

    pub(super) fn peers(&self, numbers: &Numbers) -> Option<Peers> {
        // They lie alike in all processes.
        Peers::alone(numbers)?;
        let tell = |error: &plumb_model::Error| {
            if self.rank == 0 {
                eprintln!("gradients are added up by the hosts: {error}");
            }
        };
        let id = match self.rank {
            0 => Peers::meeting_id(numbers),
            _ => Peers::check(numbers).map(|()| [0; _]),
        };
        let id: MeetingId = self.if_all(id.inspect_err(tell).ok())?;
        let mut ids = vec![0; id.len() * self.count];
        self.all().all_gather_into(&id[..], &mut ids[..]);
        let (ids, _) = ids.as_chunks();
        // Each waits for the others. What keeps one from them, such as a GPU that two have, NCCL tells all.
        let peers = Peers::meet(numbers, &ids[0], self.rank, self.count);
        self.if_all(peers.inspect_err(tell).ok())
    }

    /// What every process has, if every one has it.
    fn if_all<T>(&self, own: Option<T>) -> Option<T> {
        let all = self.gather([f64::from(u8::from(own.is_some()))]);
        own.filter(|_| all.iter().all(|[has]| *has == 1.0))
    }

    pub(super) fn leave<T>(self, result: Result<T>) -> Result<T> {
        let agreed = self.over.swap(true, Ordering::Relaxed);
        let Err(error) = &result else { return result };
        // Before the end of any process: launchers take the first one that fails as a sign to end the rest.
        if !matches!(error, Error::Reported) {
            let machine = processor_name().unwrap_or_default();
            eprintln!("plumb-train: process {} on {machine}: {error}", self.rank);
        }
        if !agreed {
            self.all().abort(1);
        }
        Err(Error::Reported)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A panic: the others would wait for ever.
        if !self.over.load(Ordering::Relaxed) {
            self.all().abort(1);
        }
    }
}

/// A vector that lies in parts: how many numbers each has, and where it begins.
struct Parts {
    counts: Vec<Count>,
    starts: Vec<Count>,
}

impl Parts {
    fn new(len: usize, parts: usize) -> Self {
        let cuts = (0..parts).map(|i| part(len, parts, i));
        let (counts, starts) = cuts.map(|range| (range.len() as Count, range.start as Count)).unzip();
        Self { counts, starts }
    }
}
