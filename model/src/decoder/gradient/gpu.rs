//! Gradients on a GPU.

use std::ops::Range;

use plumb_kernels::attention::{Rule, Span};
use plumb_kernels::gpu::gradient::{self, Columns, Losses, Scatter, Slopes};
use plumb_kernels::gpu::{Buffer, Linear, Norm, Output, View, ViewMut};
use plumb_kernels::gradient::{AdamW, Keys};

use super::super::Device;
use super::super::backend::{Backend, How, Number, Stream};
use super::super::build::Load;
use super::super::gpu::{Activated, OnGpu};
use super::backend::{Attended, Gradients, RewardHead, Sums, Targets, VocabularyBack};
use super::numbers::{Numbers, Place};
use super::parameters::LayerRanges;
use super::set::New;
use crate::Result;

/// What is needed on the way.
#[derive(Debug)]
pub(in super::super) struct Room<E> {
    /// Parts of sums over rows.
    parts: Buffer<f32>,
    scatter: Scatter,
    attention: gradient::Attention,
    losses: Losses<E>,
    /// Rows that are read in the end, `[rows, hidden]`: which, before and after the final norm, and the gradients of both.
    rows: Buffer<u32>,
    x: Buffer<f32>,
    normed: Buffer<E>,
    wide: Buffer<f32>,
    d_normed: Buffer<f32>,
    dx: Buffer<f32>,
    /// Of rewards.
    slopes: Buffer<f32>,
}

impl<E: Load + Number + Output<E>> OnGpu<E>
where
    f32: Output<E>,
{
    /// Takes the gradients of the final norm's results back to the rows that were read.
    fn scatter(&self, from: &Stream<'_, Self>, rows: &[u32], sums: Sums<'_, Self>, room: &mut Room<E>) -> Result<()> {
        let len = rows.len() * from.width;
        let x = self.resize(&mut room.x, len)?;
        self.gpu.embed(from.x, room.rows.view(0..rows.len()), 1.0, from.width, x)?;
        let dx = self.resize(&mut room.dx, len)?;
        self.gpu.fill(dx, 0.0)?;
        let (x, d_normed, dx) = (room.x.view(0..len), room.d_normed.view(0..len), room.dx.view_mut(0..len));
        let d_norm = sums.gradient.view_mut(sums.ranges.final_norm.clone());
        from.norm.backward(&self.gpu, x, d_normed, dx, d_norm, &mut room.parts)?;
        room.scatter.set(rows)?;
        Ok(self.gpu.add_rows(room.dx.view(0..len), &room.scatter, 1.0, sums.dx, from.width)?)
    }
}

impl<E> Room<E> {
    fn set_rows(&mut self, rows: &[u32]) -> Result<()> {
        self.rows.grow(rows.len())?;
        Ok(self.rows.write(0, rows)?)
    }
}

impl<E: Load + Number + Output<E>> Gradients for OnGpu<E>
where
    f32: Output<E>,
{
    // Products take a matrix either way round.
    type Back = ();
    type ActivatedBack = ();
    /// Gate and up beside one another, `[rows, 2 * intermediate]`, or up alone.
    type Activations = Buffer<E>;
    /// They are in the room.
    type Keys<'a> = ();
    type Room = Room<E>;

    const LANGUAGE_ROWS: usize = 1024;
    const LOG_SUMS: bool = true;

    fn for_gradients(device: &Device) -> Result<Self> {
        let mut backend = Self::on(device)?;
        backend.joins = false;
        Ok(backend)
    }

    fn room(&self) -> Room<E> {
        let gpu = &self.gpu;
        Room {
            parts: gpu.empty(),
            scatter: Scatter::new(gpu),
            attention: gradient::Attention::new(gpu),
            losses: Losses::new(gpu),
            rows: gpu.empty(),
            x: gpu.empty(),
            normed: gpu.empty(),
            wide: gpu.empty(),
            d_normed: gpu.empty(),
            dx: gpu.empty(),
            slopes: gpu.empty(),
        }
    }

    fn room_bytes(room: &Room<E>) -> usize {
        let Room { parts, scatter, attention, losses, rows, x, normed, wide, d_normed, dx, slopes } = room;
        let floats = [parts, x, wide, d_normed, dx, slopes].map(Buffer::bytes).iter().sum::<usize>();
        floats + scatter.bytes() + attention.bytes() + losses.bytes() + rows.bytes() + normed.bytes()
    }

    fn list(numbers: &Numbers) -> Option<&Buffer<f32>> {
        match &numbers.0 {
            Place::Gpu(_, values) => Some(values),
            Place::Host(_) => None,
        }
    }

    fn list_mut(numbers: &mut Numbers) -> Option<&mut Buffer<f32>> {
        match &mut numbers.0 {
            Place::Gpu(_, values) => Some(values),
            Place::Host(_) => None,
        }
    }

    fn with_list<R>(&self, values: &[f32], f: impl FnOnce(View<'_, f32>) -> Result<R>) -> Result<R> {
        f(self.gpu.upload(values)?.all())
    }

    fn within<'a>(part: &'a View<'_, f32>, range: Range<usize>) -> Self::Part<'a, f32> {
        part.part(range)
    }

    fn within_mut<'a, T: Number>(part: &'a mut ViewMut<'_, T>, range: Range<usize>) -> ViewMut<'a, T> {
        part.part(range)
    }

    fn len<T: Number>(part: View<'_, T>) -> usize {
        part.len()
    }

    fn read(&self, part: View<'_, f32>) -> Result<Vec<f32>> {
        Ok(self.gpu.read(part)?)
    }

    fn copy(&self, from: View<'_, f32>, to: ViewMut<'_, f32>) -> Result<()> {
        Ok(self.gpu.copy(from, to)?)
    }

    fn round(&self, from: View<'_, f32>, to: ViewMut<'_, E>) -> Result<()> {
        Ok(self.gpu.round(from, to)?)
    }

    fn round_sums(&self, from: View<'_, E>, to: ViewMut<'_, E>) -> Result<()> {
        Ok(self.gpu.copy(from, to)?)
    }

    fn clear(&self, x: ViewMut<'_, f32>) -> Result<()> {
        Ok(self.gpu.fill(x, 0.0)?)
    }

    fn accumulate(&self, x: View<'_, f32>, sum: ViewMut<'_, f32>) -> Result<()> {
        Ok(self.gpu.add(x, sum)?)
    }

    fn update(
        &self,
        how: &AdamW,
        weights: ViewMut<'_, f32>,
        gradient: View<'_, f32>,
        means: [ViewMut<'_, f32>; 2],
        rounded: Option<ViewMut<'_, E>>,
    ) -> Result<()> {
        Ok(how.update_on(&self.gpu, weights, gradient, means, rounded)?)
    }

    fn back(&self) {}

    fn back_bytes((): &()) -> usize {
        0
    }

    fn activated_back(&self) {}

    fn activated_back_bytes((): &()) -> usize {
        0
    }

    fn activations(&self) -> Buffer<E> {
        self.gpu.empty()
    }

    fn activations_bytes(activations: &Buffer<E>) -> usize {
        activations.bytes()
    }

    fn kept<'a>(
        &self,
        activations: &'a mut Buffer<E>,
        rows: Range<usize>,
        total: usize,
        width: usize,
        gated: bool,
    ) -> Result<ViewMut<'a, E>> {
        let all = if gated { 2 * width } else { width };
        activations.grow(total * all)?;
        Ok(activations.view_mut(rows.start * all..rows.end * all))
    }

    fn set_linear(
        &self,
        linear: &mut Linear<E>,
        (): &mut (),
        _: usize,
        new: &mut New<'_, Self>,
        [rows, bias]: [&Range<usize>; 2],
    ) -> Result<()> {
        new.round(self, rows, linear.weights_mut(0, linear.outputs())?)?;
        if !bias.is_empty() {
            linear.set_bias(&self.gpu, 0, new.take(self, bias)?)?;
        }
        Ok(())
    }

    fn set_activated(
        &self,
        Activated { linear, gated, .. }: &mut Activated<E>,
        (): &mut (),
        _: usize,
        new: &mut New<'_, Self>,
        ranges: &LayerRanges,
    ) -> Result<()> {
        let width = if *gated { linear.outputs() / 2 } else { linear.outputs() };
        for (first, rows, bias) in activated_parts(linear.outputs(), width, ranges) {
            new.round(self, rows, linear.weights_mut(first, width)?)?;
            if !bias.is_empty() {
                linear.set_bias(&self.gpu, first, new.take(self, bias)?)?;
            }
        }
        Ok(())
    }

    fn set_norm(&self, norm: &mut Norm, values: View<'_, f32>, offset: f32) -> Result<()> {
        Ok(norm.set(&self.gpu, values, offset)?)
    }

    fn multiply_back(&self, linear: &Linear<E>, (): &(), dy: View<'_, E>, dx: ViewMut<'_, f32>) -> Result<()> {
        Ok(linear.backward(&self.gpu, dy, dx)?)
    }

    fn activate_back(
        &self,
        Activated { linear, activation, gated }: &Activated<E>,
        (): &(),
        activations: &mut Buffer<E>,
        rows: Range<usize>,
        d: View<'_, f32>,
        inner: ViewMut<'_, E>,
        dx: ViewMut<'_, f32>,
    ) -> Result<()> {
        let all = linear.outputs();
        let range = rows.start * all..rows.end * all;
        let width = if *gated { all / 2 } else { all };
        let before = activations.view_mut(range.clone());
        self.gpu.activate_backward(*activation, *gated, before, width, d, inner)?;
        Ok(linear.backward(&self.gpu, activations.view(range), dx)?)
    }

    fn add_activated(
        &self,
        Activated { linear, gated, .. }: &Activated<E>,
        x: View<'_, E>,
        activations: &Buffer<E>,
        rows: usize,
        gradient: &mut Buffer<f32>,
        ranges: &LayerRanges,
        room: &mut Room<E>,
    ) -> Result<()> {
        let (all, inputs) = (linear.outputs(), linear.inputs());
        let width = if *gated { all / 2 } else { all };
        for (first, weights, bias) in activated_parts(all, width, ranges) {
            let d = Columns::part(activations.view(0..rows * all), all, first, width);
            self.gpu.add_outer(x, inputs, d, gradient.view_mut(weights.clone()))?;
            if !bias.is_empty() {
                self.gpu.column_sums(d, gradient.view_mut(bias.clone()), &mut room.parts)?;
            }
        }
        Ok(())
    }

    fn add_outer(
        &self,
        x: View<'_, E>,
        inputs: usize,
        dy: View<'_, E>,
        sums: ViewMut<'_, f32>,
        _: &mut Room<E>,
    ) -> Result<()> {
        let outputs = sums.as_view().len() / inputs;
        Ok(self.gpu.add_outer(x, inputs, Columns::all(dy, outputs), sums)?)
    }

    fn add_columns(&self, x: View<'_, E>, sums: ViewMut<'_, f32>, room: &mut Room<E>) -> Result<()> {
        let columns = sums.as_view().len();
        Ok(self.gpu.column_sums(Columns::all(x, columns), sums, &mut room.parts)?)
    }

    fn add_rows(
        &self,
        x: View<'_, f32>,
        to: &[u32],
        factor: f32,
        sums: ViewMut<'_, f32>,
        width: usize,
        room: &mut Room<E>,
    ) -> Result<()> {
        room.scatter.set(to)?;
        Ok(self.gpu.add_rows(x, &room.scatter, factor, sums, width)?)
    }

    fn norm_back(
        &self,
        norm: &Norm,
        x: View<'_, f32>,
        dy: View<'_, f32>,
        dx: ViewMut<'_, f32>,
        d_weights: ViewMut<'_, f32>,
        room: &mut Room<E>,
    ) -> Result<()> {
        Ok(norm.backward(&self.gpu, x, dy, dx, d_weights, &mut room.parts)?)
    }

    fn keys<'a>(&self, spans: &[Span<'a>], group: usize, room: &mut Room<E>) -> Result<()> {
        Ok(room.attention.set(&Keys::new(spans), group)?)
    }

    fn attention_back(
        &self,
        Attended { q, kv, layer, out, log_sums }: Attended<'_, Self>,
        (): &(),
        rule: Rule,
        d_out: View<'_, E>,
        dqkv: ViewMut<'_, f32>,
        room: &mut Room<E>,
    ) -> Result<()> {
        Ok(room.attention.backward(q, kv, layer, rule, out, log_sums, d_out, dqkv)?)
    }

    fn unprepare(
        &self,
        dqkv: View<'_, f32>,
        before: View<'_, E>,
        (): &(),
        how: How<'_, Self>,
        d_norms: ViewMut<'_, f32>,
        qkv: ViewMut<'_, E>,
        room: &mut Room<E>,
    ) -> Result<()> {
        let dim = how.head_dim;
        let (d_q_norm, d_k_norm) = d_norms.split_at(how.q_norm.map_or(0, Norm::width));
        Ok(room.attention.unprepare(dqkv, before, dim, how.into(), d_q_norm, d_k_norm, qkv)?)
    }

    fn pairs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        RewardHead { weight, bias }: RewardHead<'_, Self>,
        pair_weight: f32,
        mut rewards: ViewMut<'_, f32>,
        sums: Option<Sums<'_, Self>>,
        room: &mut Room<E>,
    ) -> Result<()> {
        let len = rows.len() * from.width;
        room.set_rows(rows)?;
        let wide = self.resize(&mut room.wide, len)?;
        from.norm.forward(&self.gpu, from.x, Some(room.rows.view(0..rows.len())), wide)?;
        let x = room.wide.view(0..len);
        self.gpu.rewards(x, weight.all(), bias, rewards.reborrow())?;
        let Some(sums) = sums else { return Ok(()) };
        self.gpu.pair_slopes(rewards.as_view(), pair_weight, self.resize(&mut room.slopes, rows.len())?)?;
        let d_x = self.resize(&mut room.d_normed, len)?;
        // The bias stands behind the weight.
        let (score, score_bias) = (&sums.ranges.score, &sums.ranges.score_bias);
        let d_head = sums.gradient.view_mut(score.start..score.end + score_bias.len());
        self.gpu.rewards_backward(x, weight.all(), room.slopes.view(0..rows.len()), d_x, d_head)?;
        self.scatter(&from, rows, sums, room)
    }

    fn losses(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: VocabularyBack<'_, Self>,
        targets: &Targets<'_>,
        weights: &[f32],
        losses: ViewMut<'_, f32>,
        mut sums: Option<Sums<'_, Self>>,
        room: &mut Room<E>,
    ) -> Result<()> {
        let len = rows.len() * from.width;
        room.set_rows(rows)?;
        let normed = self.resize(&mut room.normed, len)?;
        from.norm.forward(&self.gpu, from.x, Some(room.rows.view(0..rows.len())), normed)?;
        let targets = match targets {
            Targets::Tokens(ids) => gradient::Targets::Tokens(ids),
            Targets::Teachers(top) => gradient::Targets::Teachers(top),
        };
        room.d_normed.grow(len)?;
        let slopes = sums.as_mut().map(|sums| Slopes {
            weights,
            d_x: room.d_normed.view_mut(0..len),
            d_head: sums.gradient.view_mut(sums.ranges.language_head.clone()),
        });
        room.losses.run(head.logits, head.softcap, room.normed.view(0..len), targets, losses, slopes)?;
        sums.map_or(Ok(()), |sums| self.scatter(&from, rows, sums, room))
    }
}

/// Up, and gate where there is one: the first of their outputs of so many, and their weights and biases in the list.
fn activated_parts(
    all: usize,
    width: usize,
    ranges: &LayerRanges,
) -> impl Iterator<Item = (usize, &Range<usize>, &Range<usize>)> {
    let parts = [(all - width, &ranges.up, &ranges.up_bias), (0, &ranges.gate, &ranges.gate_bias)];
    parts.into_iter().filter(|(_, weights, _)| !weights.is_empty())
}
