//! Losses on what a decoder ends in, and their gradients.

use super::super::driver::Argument::{Address, F32, U32};
use super::super::head::{ROWS, THREADS, TILE, Vocabulary};
use super::super::{Buffer, Gpu, Linear, Output, Result, View, ViewMut};
use super::Columns;
use crate::gradient::TopK;

/// What the log-probabilities of rows are compared with.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// The next token after each row: cross-entropy.
    Tokens(&'a [u32]),
    /// A teacher's likeliest tokens after each row: the Kullback-Leibler divergence from it over these and one category of
    /// all others (Askell et al. 2021, appendix B.5).
    Teachers(&'a [TopK<'a>]),
}

/// Where gradients of the rows' losses, times their weights, go.
#[derive(Debug)]
pub struct Slopes<'a> {
    /// One for each row.
    pub weights: &'a [f32],
    /// The gradient of `x`, `[rows, inputs]`.
    pub d_x: ViewMut<'a, f32>,
    /// That of the head's weights is added to this, `[tokens, inputs]`.
    pub d_head: ViewMut<'a, f32>,
}

/// What it takes to compute losses a tile of the vocabulary at a time; kept from one step to the next.
#[derive(Debug)]
pub struct Losses<E> {
    sweep: Vocabulary,
    weights: Buffer<f32>,
    /// Gradient of a tile's logits.
    d: Buffer<E>,
    /// A teacher's tokens at all rows and their log-probabilities, where those of a row begin, and the model's logits.
    ids: Buffer<u32>,
    taught: Buffer<f32>,
    starts: Buffer<u32>,
    logits: Buffer<f32>,
    /// By what the probabilities of all others are multiplied in a row's gradient.
    factors: Buffer<f32>,
}

impl<E: Output<E>> Losses<E>
where
    f32: Output<E>,
{
    /// Takes no memory yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            sweep: Vocabulary::new(gpu),
            weights: gpu.empty(),
            d: gpu.empty(),
            ids: gpu.empty(),
            taught: gpu.empty(),
            starts: gpu.empty(),
            logits: gpu.empty(),
            factors: gpu.empty(),
        }
    }

    /// Bytes that it takes now.
    pub fn bytes(&self) -> usize {
        let Self { sweep, weights, d, ids, taught, starts, logits, factors } = self;
        let floats = [weights, taught, logits, factors].map(Buffer::bytes).iter().sum::<usize>();
        sweep.bytes() + d.bytes() + ids.bytes() + starts.bytes() + floats
    }

    /// The loss of every row of `x[rows, inputs]`, in nats, into `losses`, and the gradients where they are wanted. The
    /// logits of a tile are computed once more for these.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for a tile of logits.
    ///
    /// # Panics
    /// If shapes do not fit or a token is not in the vocabulary.
    pub fn run(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        targets: Targets<'_>,
        mut losses: ViewMut<'_, f32>,
        mut slopes: Option<Slopes<'_>>,
    ) -> Result<()> {
        let inputs = head.inputs();
        let rows = match targets {
            Targets::Tokens(tokens) => tokens.len(),
            Targets::Teachers(teachers) => teachers.len(),
        };
        assert_eq!((x.len, losses.len), (rows * inputs, rows), "shapes of a loss");
        if let Some(Slopes { weights, d_x, d_head }) = &slopes {
            assert_eq!((weights.len(), d_x.len), (rows, x.len), "shapes of a loss");
            assert_eq!(d_head.len, head.outputs() * inputs, "shapes of a loss");
        }
        for first in (0..rows).step_by(ROWS) {
            let part = first..rows.min(first + ROWS);
            let within = part.start * inputs..part.end * inputs;
            let targets = match targets {
                Targets::Tokens(tokens) => Targets::Tokens(&tokens[part.clone()]),
                Targets::Teachers(teachers) => Targets::Teachers(&teachers[part.clone()]),
            };
            let slopes = slopes.as_mut().map(|Slopes { weights, d_x, d_head }| Slopes {
                weights: &weights[part.clone()],
                d_x: d_x.part(within.clone()),
                d_head: d_head.reborrow(),
            });
            self.part(head, softcap, x.part(within), targets, losses.part(part), slopes)?;
        }
        Ok(())
    }

    /// The same for at most [`ROWS`] rows.
    fn part(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        targets: Targets<'_>,
        losses: ViewMut<'_, f32>,
        slopes: Option<Slopes<'_>>,
    ) -> Result<()> {
        match targets {
            Targets::Tokens(tokens) => self.cross_entropy(head, softcap, x, tokens, losses)?,
            Targets::Teachers(teachers) => self.distil(head, softcap, x, teachers, losses)?,
        }
        slopes.map_or(Ok(()), |slopes| self.backward(head, softcap, x, targets, slopes))
    }

    fn cross_entropy(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        tokens: &[u32],
        losses: ViewMut<'_, f32>,
    ) -> Result<()> {
        assert!(tokens.iter().all(|id| (*id as usize) < head.outputs()), "a token that the vocabulary does not have");
        let sweep = &mut self.sweep;
        sweep.targets.grow(tokens.len())?;
        sweep.targets.write(0, tokens)?;
        sweep.sweep(head, softcap, x, Some(0), |_, _, _, _| Ok(()))?;
        let arguments = [
            Address(sweep.chosen.all().address),
            Address(sweep.largest.all().address),
            Address(sweep.sums.all().address),
            Address(losses.address),
            U32(tokens.len() as u32),
        ];
        let blocks = tokens.len().div_ceil(THREADS);
        // SAFETY: as in `cuda/head_backward.cu`.
        unsafe { sweep.gpu.launch("token_losses", [blocks, 1, 1], THREADS, 0, &arguments) }
    }

    fn distil(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        teachers: &[TopK<'_>],
        losses: ViewMut<'_, f32>,
    ) -> Result<()> {
        let (mut ids, mut log_probs, mut starts) = (Vec::new(), Vec::new(), vec![0]);
        for top in teachers {
            assert_eq!(top.ids.len(), top.log_probs.len(), "a log-probability for each token");
            ids.extend_from_slice(top.ids);
            log_probs.extend_from_slice(top.log_probs);
            starts.push(ids.len() as u32);
        }
        assert!(ids.iter().all(|id| (*id as usize) < head.outputs()), "a token that the vocabulary does not have");
        for (list, values) in [(&mut self.ids, &ids), (&mut self.starts, &starts)] {
            list.grow(values.len())?;
            list.write(0, values)?;
        }
        self.taught.grow(ids.len())?;
        self.taught.write(0, &log_probs)?;
        self.logits.grow(ids.len())?;
        self.factors.grow(teachers.len())?;
        let (starts, ids) = (Address(self.starts.all().address), Address(self.ids.all().address));
        let logits = Address(self.logits.all_mut().address);
        let grid = [teachers.len(), 1, 1];
        self.sweep.sweep(head, softcap, x, None, |gpu, tile_logits, tile, first| {
            let arguments = [
                Address(tile_logits.address),
                U32(tile as u32),
                U32(first as u32),
                F32(softcap.unwrap_or(0.0)),
                starts,
                ids,
                logits,
            ];
            // SAFETY: as in `cuda/head_backward.cu`.
            unsafe { gpu.launch("gather_taught", grid, THREADS, 0, &arguments) }
        })?;
        let arguments = [
            starts,
            Address(self.taught.all().address),
            logits,
            Address(self.sweep.largest.all().address),
            Address(self.sweep.sums.all().address),
            Address(losses.address),
            Address(self.factors.all_mut().address),
        ];
        // SAFETY: as in `cuda/head_backward.cu`.
        unsafe { self.sweep.gpu.launch("distil", grid, THREADS, 0, &arguments) }
    }

    /// Once what there is to know of all logits is known.
    fn backward(
        &mut self,
        head: &Linear<E>,
        softcap: Option<f32>,
        x: View<'_, E>,
        targets: Targets<'_>,
        slopes: Slopes<'_>,
    ) -> Result<()> {
        let Slopes { weights, mut d_x, mut d_head } = slopes;
        let (rows, inputs) = (weights.len(), head.inputs());
        self.weights.grow(rows)?;
        self.weights.write(0, weights)?;
        self.d.grow(rows * TILE.min(head.outputs()))?;
        let Vocabulary { gpu, logits, largest, sums, targets: tokens, .. } = &mut self.sweep;
        let (name, of_targets) = match targets {
            Targets::Tokens(_) => ("cross_entropy", vec![Address(tokens.all().address)]),
            Targets::Teachers(_) => {
                let lists = [self.starts.all().address, self.ids.all().address, self.taught.all().address];
                (
                    "distillation",
                    [&lists[..], &[self.factors.all().address]].concat().into_iter().map(Address).collect(),
                )
            }
        };
        for first in (0..head.outputs()).step_by(TILE) {
            let tile = TILE.min(head.outputs() - first);
            head.part(gpu, first, tile, x, logits.view_mut(0..rows * tile))?;
            let start =
                [Address(logits.all().address), U32(tile as u32), U32(first as u32), F32(softcap.unwrap_or(0.0))];
            let end = [
                Address(self.weights.all().address),
                Address(largest.all().address),
                Address(sums.all().address),
                Address(self.d.view_mut(0..rows * tile).address),
            ];
            let arguments = [&start[..], &of_targets, &end].concat();
            let kernel = format!("{name}_{}", E::NAME);
            // SAFETY: as in `cuda/head_backward.cu`.
            unsafe { gpu.launch(&kernel, [rows, 1, 1], THREADS, 0, &arguments)? };
            let d = self.d.view(0..rows * tile);
            head.part_backward(gpu, first, tile, d, d_x.reborrow(), first > 0)?;
            let d_tile = d_head.part(first * inputs..(first + tile) * inputs);
            gpu.add_outer(x, inputs, Columns::all(d, tile), d_tile)?;
        }
        Ok(())
    }
}

impl Gpu {
    /// As [`gradient::pair_slopes`](crate::gradient::pair_slopes).
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the lengths differ or are odd.
    pub fn pair_slopes(&self, rewards: View<'_, f32>, weight: f32, slopes: ViewMut<'_, f32>) -> Result<()> {
        assert!(rewards.len == slopes.len && rewards.len.is_multiple_of(2), "rewards of pairs");
        let pairs = rewards.len / 2;
        let arguments = [Address(rewards.address), F32(weight), Address(slopes.address), U32(pairs as u32)];
        // SAFETY: as in `cuda/head_backward.cu`.
        unsafe { self.launch("pair_slopes", [pairs.div_ceil(THREADS), 1, 1], THREADS, 0, &arguments) }
    }

    /// From the gradients `d[rows]` of [`Gpu::rewards`], those of `x[rows, width]` into `d_x`; those of the weight and, behind
    /// it where there is one, of the bias are added to `d_head`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn rewards_backward(
        &self,
        x: View<'_, f32>,
        weight: View<'_, f32>,
        d: View<'_, f32>,
        d_x: ViewMut<'_, f32>,
        d_head: ViewMut<'_, f32>,
    ) -> Result<()> {
        let (rows, width) = (d.len, weight.len);
        assert!(x.len == rows * width && d_x.len == x.len, "shapes of a reward head");
        assert!(d_head.len == width || d_head.len == width + 1, "shapes of a reward head");
        let arguments = [
            Address(x.address),
            Address(weight.address),
            Address(d.address),
            U32(rows as u32),
            U32(width as u32),
            U32((d_head.len > width) as u32),
            Address(d_x.address),
            Address(d_head.address),
        ];
        // SAFETY: as in `cuda/head_backward.cu`.
        unsafe { self.launch("reward_backward", [width.div_ceil(THREADS), 1, 1], THREADS, 0, &arguments) }
    }
}
