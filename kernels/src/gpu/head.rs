//! What is read of the last hidden rows.

use bytemuck::{Pod, Zeroable};

use super::driver::Argument::{Address, F32, U32};
use super::linear::Output;
use super::{Buffer, Gpu, GpuError, Linear, Result, View, ViewMut};
use crate::Element;

/// Threads that take a row; `THREADS` in `cuda/head.cu`.
const THREADS: usize = 256;
/// Tokens whose logits are there at a time.
const TILE: usize = 8192;
/// Rows that go over the vocabulary together: with a tile of logits, what the GPU's cache holds.
const ROWS: usize = 1024;
/// Most tokens of [`Gpu::top_log_probs`], whose lists are in a block's memory.
pub const MAX_TOP: usize = 2048;

/// As in `cuda/head.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// A vocabulary that is gone over a tile at a time.
struct Sweep<'a, E> {
    gpu: &'a Gpu,
    head: &'a Linear<E>,
    softcap: f32,
    logits: Buffer<f32>,
    largest: Buffer<f32>,
    sums: Buffer<f32>,
}

impl<'a, E: Element> Sweep<'a, E>
where
    f32: Output<E>,
{
    fn new(gpu: &'a Gpu, head: &'a Linear<E>, softcap: Option<f32>, rows: usize) -> Result<Self> {
        let rows = rows.min(ROWS);
        Ok(Self {
            gpu,
            head,
            softcap: softcap.unwrap_or(0.0),
            logits: gpu.zeros(rows * TILE.min(head.outputs()))?,
            largest: gpu.zeros(rows)?,
            sums: gpu.zeros(rows)?,
        })
    }

    /// Goes over the vocabulary with at most [`ROWS`] rows; `each` gets to see every tile, by its logits, its width and
    /// its first token.
    fn run(
        &mut self,
        x: View<'_, E>,
        targets: Option<View<'_, u32>>,
        chosen: u64,
        mut each: impl FnMut(&Gpu, View<'_, f32>, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let rows = x.len / self.head.inputs();
        for first in (0..self.head.outputs()).step_by(TILE) {
            let tile = TILE.min(self.head.outputs() - first);
            self.head.part(self.gpu, first, tile, x, self.logits.view_mut(0..rows * tile))?;
            let arguments = [
                Address(self.logits.all().address),
                U32(tile as u32),
                U32(first as u32),
                F32(self.softcap),
                Address(targets.map_or(0, |targets| targets.address)),
                Address(self.largest.all_mut().address),
                Address(self.sums.all_mut().address),
                Address(chosen),
            ];
            // SAFETY: as in `cuda/head.cu`; `chosen` is looked at only where there are targets.
            unsafe { self.gpu.launch("fold_logits", [rows, 1, 1], THREADS, 0, &arguments)? };
            each(self.gpu, self.logits.view(0..rows * tile), tile, first)?;
        }
        Ok(())
    }
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

    /// Log-probability, in nats, of `targets[i]` as the token after row `i` of `x[rows, inputs]`.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for a tile of logits.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn token_log_probs<E: Element>(
        &self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: &Buffer<E>,
        targets: &[u32],
    ) -> Result<Vec<f32>>
    where
        f32: Output<E>,
    {
        let inputs = head.inputs();
        assert!(x.len() >= targets.len() * inputs, "shapes of a language head");
        let mut sweep = Sweep::new(self, head, softcap, targets.len())?;
        let mut chosen = self.zeros::<f32>(ROWS.min(targets.len()))?;
        let mut result = vec![0.0; targets.len()];
        for (part, (targets, result)) in targets.chunks(ROWS).zip(result.chunks_mut(ROWS)).enumerate() {
            let rows = targets.len();
            let targets = self.upload(targets)?;
            let first = part * ROWS * inputs;
            let x = x.view(first..first + rows * inputs);
            sweep.run(x, Some(targets.all()), chosen.all_mut().address, |_, _, _, _| Ok(()))?;
            let mut log_probs = self.zeros::<f32>(rows)?;
            let arguments = [
                Address(chosen.all().address),
                Address(sweep.largest.all().address),
                Address(sweep.sums.all().address),
                Address(log_probs.all_mut().address),
                U32(rows as u32),
            ];
            // SAFETY: as in `cuda/head.cu`.
            unsafe { self.launch("log_probs", [rows.div_ceil(THREADS), 1, 1], THREADS, 0, &arguments)? };
            log_probs.read(0, result)?;
        }
        Ok(result)
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
        &self,
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
        let mut sweep = Sweep::new(self, head, softcap, rows)?;
        let mut best = self.zeros::<Candidate>(rows.min(ROWS) * count)?;
        let softcap = sweep.softcap;
        for (part, (ids, log_probs)) in ids.chunks_mut(ROWS * count).zip(log_probs.chunks_mut(ROWS * count)).enumerate()
        {
            let (first, rows) = (part * ROWS * inputs, ids.len() / count);
            let best_address = best.all_mut().address;
            sweep.run(x.view(first..first + rows * inputs), None, 0, |gpu, logits, tile, first| {
                let arguments = [
                    Address(logits.address),
                    U32(tile as u32),
                    U32(first as u32),
                    F32(softcap),
                    U32(count as u32),
                    Address(best_address),
                ];
                let shared = 2 * count * size_of::<Candidate>();
                // SAFETY: as in `cuda/head.cu`.
                unsafe { gpu.launch("fold_top", [rows, 1, 1], THREADS, shared, &arguments) }
            })?;
            let (mut gpu_ids, mut gpu_log_probs) = (self.zeros::<u32>(ids.len())?, self.zeros::<f32>(ids.len())?);
            let arguments = [
                Address(best.all().address),
                Address(sweep.largest.all().address),
                Address(sweep.sums.all().address),
                U32(count as u32),
                U32(ids.len() as u32),
                Address(gpu_ids.all_mut().address),
                Address(gpu_log_probs.all_mut().address),
            ];
            let blocks = ids.len().div_ceil(THREADS);
            // SAFETY: as in `cuda/head.cu`.
            unsafe { self.launch("top_log_probs", [blocks, 1, 1], THREADS, 0, &arguments)? };
            gpu_ids.read(0, ids)?;
            gpu_log_probs.read(0, log_probs)?;
        }
        Ok((ids, log_probs))
    }
}
