//! GPUs of several processes.

use std::fmt;
use std::ops::Range;

use super::driver::Argument::Address;
use super::driver::Exchange;
use super::{Buffer, Gpu, Result, View, ViewMut};

/// Numbers that one GPU sends another at once: enough for full speed, and bounds what is received.
const PIECE: usize = 1 << 22;

/// What the GPUs of several processes need to meet: made by one of them and told to all.
pub type MeetingId = [u8; 128];

/// A GPU, and those of other processes if there are any, which add up what each of them has. A sum has the order of the
/// processes, and each keeps a share of it.
///
/// Between NVIDIA's, NCCL carries the numbers.
pub struct Peers {
    gpu: Gpu,
    /// With the others.
    exchange: Option<Box<dyn Exchange>>,
    rank: usize,
    count: usize,
    piece: usize,
    /// This one's share of the sum, and what is added to it, `[count, piece]`.
    sum: Buffer<f32>,
    received: Buffer<f32>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Peer {} of {}", self.rank, self.count)
    }
}

impl Gpu {
    /// Whether it could meet others.
    ///
    /// # Errors
    /// [`GpuError::Missing`](super::GpuError::Missing) if not: there is no NCCL.
    pub fn check_peers(&self) -> Result<()> {
        self.driver.check_peers()
    }

    /// By which this GPU, and those of other processes, meet once.
    ///
    /// # Errors
    /// As [`Gpu::check_peers`], or what NCCL has against it.
    pub fn meeting_id(&self) -> Result<MeetingId> {
        self.driver.meeting_id()
    }

    /// Meets the others, of which there are so many with this one; waits for all of them.
    ///
    /// # Errors
    /// As [`Gpu::meeting_id`].
    pub fn meet(&self, id: &MeetingId, rank: usize, count: usize) -> Result<Peers> {
        Ok(Peers::new(self, Some(self.driver.meet(self, id, rank, count)?), rank, count, PIECE))
    }

    /// Without any others.
    pub fn alone(&self) -> Peers {
        Peers::new(self, None, 0, 1, PIECE)
    }
}

impl Peers {
    fn new(gpu: &Gpu, exchange: Option<Box<dyn Exchange>>, rank: usize, count: usize, piece: usize) -> Self {
        Self { gpu: gpu.clone(), exchange, rank, count, piece, sum: gpu.empty(), received: gpu.empty() }
    }

    /// So many that the CPU plays, of this process: for a thread each, which send so many numbers at once.
    #[cfg(feature = "emulated")]
    pub fn emulated(count: usize, piece: usize) -> Vec<(Gpu, Self)> {
        let exchanges = super::emulated::exchanges(count).into_iter().enumerate();
        let peer = |(rank, exchange)| {
            let gpu = Gpu::emulated();
            let peers = Self::new(&gpu, Some(exchange), rank, count, piece);
            (gpu, peers)
        };
        exchanges.map(peer).collect()
    }

    /// Adds the lists of all processes, in the order of the processes, to their sum; the first replaces it if it is to be
    /// `new`. All have to call it, with lists of one length, which stays the same from one sum to the next.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for its share.
    ///
    /// # Panics
    /// If the length is another one than that of the sum.
    pub fn add(&mut self, own: View<'_, f32>, new: bool) -> Result<()> {
        let parts: Vec<_> = (0..self.count).map(|i| part(own.len, self.count, i)).collect();
        let share = parts[self.rank].len();
        if new {
            self.sum.grow(share)?;
        }
        assert_eq!(self.sum.len(), share, "the length of a sum");
        let Some(exchange) = &self.exchange else {
            let sum = self.sum.all_mut();
            return if new { self.gpu.copy(own, sum) } else { self.gpu.add(own, sum) };
        };
        let longest = own.len.div_ceil(self.count);
        self.received.grow(self.count * self.piece.min(longest))?;
        for first in (0..longest).step_by(self.piece) {
            let cut = |part: &Range<usize>| {
                let at = |offset: usize| (part.start + offset).min(part.end);
                at(first)..at(first + self.piece)
            };
            let len = cut(&parts[self.rank]).len();
            let send = addresses(parts.iter().map(|part| own.part(cut(part))));
            let receive = addresses((0..self.count).map(|i| self.received.view(i * len..(i + 1) * len)));
            // SAFETY: they are views of so many numbers, of which nobody else has those that are received. All have lists
            // of one length, from which follows how many go from each to each.
            unsafe { exchange.exchange(&send, &receive)? };
            let mut sum = self.sum.view_mut(first.min(share)..(first + len).min(share));
            let mut all = self.received.view(0..self.count * len);
            if new {
                self.gpu.copy(all.part(0..len), sum.reborrow())?;
                all = all.part(len..all.len);
            }
            self.gpu.add_parts(Address(all.address), all.len / len.max(1), sum)?;
        }
        Ok(())
    }

    /// Puts the shares of a sum together. All have to call it.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the length is another one than that of the sum.
    pub fn collect(&self, whole: ViewMut<'_, f32>) -> Result<()> {
        let parts = (0..self.count).map(|i| part(whole.len, self.count, i));
        assert_eq!(self.sum.len(), part(whole.len, self.count, self.rank).len(), "the length of a sum");
        let Some(exchange) = &self.exchange else { return self.gpu.copy(self.sum.all(), whole) };
        let send = vec![(self.sum.all().address, self.sum.len()); self.count];
        let receive = addresses(parts.map(|part| whole.as_view().part(part)));
        // SAFETY: as before.
        unsafe { exchange.exchange(&send, &receive) }
    }
}

fn addresses<'a>(views: impl Iterator<Item = View<'a, f32>>) -> Vec<(u64, usize)> {
    views.map(|view| (view.address, view.len)).collect()
}

/// One of so many parts of nearly equal length.
fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}
