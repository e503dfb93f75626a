//! What is read of the last hidden rows.

use bytemuck::{Pod, Zeroable};

use super::driver::Argument::{Address, F32, U32};
use super::linear::Output;
use super::{Buffer, Fetch, Gpu, GpuError, Linear, Result, View, ViewMut};
use crate::Element;

/// Threads that take a row; `THREADS` in `cuda/head.cu`.
pub(super) const THREADS: usize = 256;
/// Tokens whose logits are there at a time.
pub(super) const TILE: usize = 8192;
/// Rows that go over the vocabulary together: with a tile of logits, what the GPU's cache holds.
pub(super) const ROWS: usize = 1024;
/// Most tokens of [`Vocabulary::top_log_probs`], whose lists are in a block's memory.
pub const MAX_TOP: usize = 2048;

/// As in `cuda/head.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// What it takes to go over a vocabulary a tile at a time; kept from one step to the next.
#[derive(Debug)]
pub struct Vocabulary {
    pub(super) gpu: Gpu,
    pub(super) logits: Buffer<f32>,
    /// Of each row: the largest logit so far, the sum of all exponentials, the logit that is asked for, and the largest
    /// of the tokens before that.
    pub(super) largest: Buffer<f32>,
    pub(super) sums: Buffer<f32>,
    pub(super) chosen: Buffer<f32>,
    ahead: Buffer<f32>,
    pub(super) targets: Buffer<u32>,
    best: Buffer<Candidate>,
    ids: Buffer<u32>,
    log_probs: Buffer<f32>,
}

impl Gpu {
    /// `rewards[i] = weight . x[i] + bias`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn rewards(&self, x: View<'_, f32>, weight: View<'_, f32>, bias: f32, rewards: ViewMut<'_, f32>) -> Result<()> {
        let width = weight.len;
        assert!(x.len == rewards.len * width && width.is_multiple_of(4), "shapes of a reward head");
        let arguments =
            [Address(x.address), Address(weight.address), F32(bias), Address(rewards.address), U32(width as u32)];
        // SAFETY: as in `cuda/head.cu`.
        unsafe { self.launch("reward", [rewards.len, 1, 1], THREADS, 0, &arguments) }
    }
}

impl Vocabulary {
    /// Takes no memory yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            logits: gpu.empty(),
            largest: gpu.empty(),
            sums: gpu.empty(),
            chosen: gpu.empty(),
            ahead: gpu.empty(),
            targets: gpu.empty(),
            best: gpu.empty(),
            ids: gpu.empty(),
            log_probs: gpu.empty(),
        }
    }

    /// Bytes that it takes now.
    pub fn bytes(&self) -> usize {
        let Self { gpu: _, logits, largest, sums, chosen, ahead, targets, best, ids, log_probs } = self;
        let floats = [logits, largest, sums, chosen, ahead, log_probs].map(Buffer::bytes).iter().sum::<usize>();
        floats + targets.bytes() + best.bytes() + ids.bytes()
    }

    /// Bytes that [`Vocabulary::token_log_probs`] takes at most for so many rows and a vocabulary of so many tokens.
    pub fn most_bytes(rows: usize, tokens: usize) -> usize {
        (ROWS * (TILE.min(tokens) + 4)).saturating_add(rows.saturating_mul(3)).saturating_mul(size_of::<f32>())
    }

    /// Asks what the model says of `targets[i]` as the token after row `i` of `x[rows, inputs]`: two numbers, its
    /// log-probability in nats, and 1 if greedy decoding takes it, of equally likely ones that of the lowest id, else 0.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for a tile of logits.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn token_log_probs<E: Element>(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: &Buffer<E>,
        targets: &[u32],
    ) -> Result<Fetch<f32>>
    where
        f32: Output<E>,
    {
        let inputs = head.inputs();
        assert!(x.len() >= targets.len() * inputs, "shapes of a language head");
        self.targets.grow(targets.len())?;
        self.targets.write(0, targets)?;
        self.log_probs.grow(2 * targets.len())?;
        for first in (0..targets.len()).step_by(ROWS) {
            let rows = ROWS.min(targets.len() - first);
            let x = x.view(first * inputs..(first + rows) * inputs);
            self.sweep(head, softcap, x, Some(first), |_, _, _, _| Ok(()))?;
            let arguments = [
                Address(self.chosen.all().address),
                Address(self.ahead.all().address),
                Address(self.largest.all().address),
                Address(self.sums.all().address),
                Address(self.log_probs.view_mut(2 * first..2 * (first + rows)).address),
                U32(rows as u32),
            ];
            // SAFETY: as in `cuda/head.cu`.
            unsafe { self.gpu.launch("log_probs", [rows.div_ceil(THREADS), 1, 1], THREADS, 0, &arguments)? };
        }
        self.log_probs.fetch(0..2 * targets.len())
    }

    /// The `count` likeliest tokens of each of the first `rows` rows of `x[_, inputs]`, the likeliest first: ids, and
    /// log-probabilities in nats, both `[rows, count]`. Of equally likely ones the lower id comes first.
    ///
    /// # Errors
    /// If the GPU refuses, `count` is more than [`MAX_TOP`], or there is no memory for a tile of logits.
    ///
    /// # Panics
    /// If shapes do not fit or the vocabulary has fewer tokens.
    pub fn top_log_probs<E: Element>(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: &Buffer<E>,
        rows: usize,
        count: usize,
    ) -> Result<(Vec<u32>, Vec<f32>)>
    where
        f32: Output<E>,
    {
        let inputs = head.inputs();
        assert!(x.len() >= rows * inputs, "shapes of a language head");
        assert!((1..=head.outputs()).contains(&count), "more tokens than the vocabulary has");
        if count > MAX_TOP {
            return Err(GpuError::Failed(format!("the {count} likeliest tokens: the kernels take {MAX_TOP}")));
        }
        let (mut ids, mut log_probs) = (vec![0; rows * count], vec![0.0; rows * count]);
        let parts = ids.chunks_mut(ROWS * count).zip(log_probs.chunks_mut(ROWS * count));
        for (part, (ids, log_probs)) in parts.enumerate() {
            let (first, rows) = (part * ROWS * inputs, ids.len() / count);
            self.best.grow(ids.len())?;
            self.ids.grow(ids.len())?;
            self.log_probs.grow(ids.len())?;
            let best = self.best.all_mut().address;
            self.sweep(head, softcap, x.view(first..first + rows * inputs), None, |gpu, logits, tile, first| {
                let arguments = [
                    Address(logits.address),
                    U32(tile as u32),
                    U32(first as u32),
                    F32(softcap.unwrap_or(0.0)),
                    U32(count as u32),
                    Address(best),
                ];
                let shared = 2 * count * size_of::<Candidate>();
                // SAFETY: as in `cuda/head.cu`.
                unsafe { gpu.launch("fold_top", [rows, 1, 1], THREADS, shared, &arguments) }
            })?;
            let arguments = [
                Address(best),
                Address(self.largest.all().address),
                Address(self.sums.all().address),
                U32(count as u32),
                U32(ids.len() as u32),
                Address(self.ids.all_mut().address),
                Address(self.log_probs.all_mut().address),
            ];
            let blocks = ids.len().div_ceil(THREADS);
            // SAFETY: as in `cuda/head.cu`.
            unsafe { self.gpu.launch("top_log_probs", [blocks, 1, 1], THREADS, 0, &arguments)? };
            self.ids.read(0, ids)?;
            self.log_probs.read(0, log_probs)?;
        }
        Ok((ids, log_probs))
    }

    /// Goes over the vocabulary with at most [`ROWS`] rows; `each` gets to see every tile, by its logits, its width and
    /// its first token. The logits of the targets from `chosen` on are kept, one for each row.
    pub(super) fn sweep<E: Element>(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        chosen: Option<usize>,
        mut each: impl FnMut(&Gpu, View<'_, f32>, usize, usize) -> Result<()>,
    ) -> Result<()>
    where
        f32: Output<E>,
    {
        let rows = x.len / head.inputs();
        self.logits.grow(rows * TILE.min(head.outputs()))?;
        self.largest.grow(rows)?;
        self.sums.grow(rows)?;
        self.chosen.grow(rows)?;
        self.ahead.grow(rows)?;
        let targets = chosen.map_or(0, |first| self.targets.view(first..first + rows).address);
        for first in (0..head.outputs()).step_by(TILE) {
            let tile = TILE.min(head.outputs() - first);
            head.part(&self.gpu, first, tile, x, self.logits.view_mut(0..rows * tile))?;
            let arguments = [
                Address(self.logits.all().address),
                U32(tile as u32),
                U32(first as u32),
                F32(softcap.unwrap_or(0.0)),
                Address(targets),
                Address(self.largest.all_mut().address),
                Address(self.sums.all_mut().address),
                Address(self.chosen.all_mut().address),
                Address(self.ahead.all_mut().address),
            ];
            // SAFETY: as in `cuda/head.cu`.
            unsafe { self.gpu.launch("fold_logits", [rows, 1, 1], THREADS, 0, &arguments)? };
            each(&self.gpu, self.logits.view(0..rows * tile), tile, first)?;
        }
        Ok(())
    }
}
