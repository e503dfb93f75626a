//! One model over several devices: tensor parallelism (Shoeybi et al. 2019, "Megatron-LM", arXiv 1909.08053, section 3).
//!
//! A shard has whole heads of attention with their keys and values, and an equal part of the feed-forward layer: the
//! matrices that lead there are split by their outputs, those that lead back by their inputs. What the latter make of a
//! row is a part of a sum, which is added up over the shards before it meets the residual stream: twice a layer. All else,
//! the residual stream, norms and embedding, every shard has for itself; what is read in the end, the first one computes.

use std::fmt::Debug;
use std::ops::Range;

use plumb_kernels::activation::Activation;
use plumb_kernels::attention::Rule;
use plumb_kernels::linear::{Held, Matrix};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;
use plumb_kernels::sample::{Draw, Drawn, Undrawn};

use super::backend::{Backend, Embedding, Floats, How, Number, Stream, Vocabulary};
use super::slices::Slice;
use super::step::{Progress, Step, StepSize};
use super::{Device, Split};
use crate::config::Config;
use crate::{Error, Result};

/// A backend of which several can have a model together.
pub(super) trait Joined: Backend {
    /// What adds up.
    type Group: Clone + Debug + Send + Sync;

    /// That of these devices.
    fn group(split: &Split) -> Result<Self::Group>;

    /// The parts, one of each shard, all become their sum, which has the same bits everywhere.
    fn all_reduce(group: &Self::Group, parts: Vec<Self::PartMut<'_, f32>>) -> Result<()>;
}

/// Backends that have a model together. What a trait's type is for one of them, here is one for each.
#[derive(Clone, Debug)]
pub(super) struct Shards<B: Joined> {
    shards: Vec<B>,
    group: B::Group,
}

/// The same part of each shard's array.
pub(super) struct Part<'a, B: Backend, T: Number> {
    arrays: &'a [B::Array<T>],
    start: usize,
    end: usize,
}

impl<B: Backend, T: Number> Clone for Part<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend, T: Number> Copy for Part<'_, B, T> {}

impl<'a, B: Backend, T: Number> Part<'a, B, T> {
    fn of(self, shard: usize) -> B::Part<'a, T> {
        B::part(&self.arrays[shard], self.start..self.end)
    }
}

/// The same part of each shard's array, to be written.
pub(super) struct PartMut<'a, B: Backend, T: Number> {
    arrays: &'a mut [B::Array<T>],
    range: Range<usize>,
}

impl<B: Backend, T: Number> PartMut<'_, B, T> {
    fn of(&mut self, shard: usize) -> B::PartMut<'_, T> {
        B::part_mut(&mut self.arrays[shard], self.range.clone())
    }

    fn all(&mut self) -> Vec<B::PartMut<'_, T>> {
        self.arrays.iter_mut().map(|array| B::part_mut(array, self.range.clone())).collect()
    }
}

impl<B: Joined> Shards<B> {
    /// Something of each.
    fn each<T>(&self, of: impl FnMut((usize, &B)) -> Result<T>) -> Result<Vec<T>> {
        self.shards.iter().enumerate().map(of).collect()
    }

    /// Asks each in turn.
    fn ask(&self, mut ask: impl FnMut(usize, &B) -> Result<()>) -> Result<()> {
        self.shards.iter().enumerate().try_for_each(|(i, shard)| ask(i, shard))
    }

    fn first(&self) -> Result<&B> {
        self.shards.first().ok_or_else(|| Error::Device("a model without a device".to_owned()))
    }
}

impl<B: Joined> Backend for Shards<B> {
    type Element = B::Element;
    type Sum = B::Sum;
    type Array<T: Number> = Vec<B::Array<T>>;
    type Part<'a, T: Number> = Part<'a, B, T>;
    type PartMut<'a, T: Number> = PartMut<'a, B, T>;
    type Linear = Vec<B::Linear>;
    type Activated = Vec<B::Activated>;
    type Norm = Vec<B::Norm>;
    type Rotary = Vec<B::Rotary>;
    type KvPages = Vec<B::KvPages>;
    type Cut<'a> = Vec<B::Cut<'a>>;
    type Used = Vec<B::Used>;
    // Sums over the shards are not recorded.
    type Shape = ();
    type Graphs = ();
    // Training has one device.
    type Kept<'a> = std::convert::Infallible;
    type Scratch = Vec<B::Scratch>;

    const CHUNK: usize = B::CHUNK;
    const PACKED: bool = B::PACKED;
    const BESIDE: bool = B::BESIDE;

    fn on(device: &Device) -> Result<Self> {
        let Device::Split(split) = device else {
            return Err(Error::Device(format!("a model is not split over {}", device.name())));
        };
        Ok(Self { shards: split.devices.iter().map(B::on).collect::<Result<_>>()?, group: B::group(split)? })
    }

    fn shards(&self) -> usize {
        self.shards.len()
    }

    fn array<T: Number>(&self) -> Vec<B::Array<T>> {
        self.shards.iter().map(B::array).collect()
    }

    fn hold<T: Number>(&self, values: Vec<T>) -> Result<Vec<B::Array<T>>> {
        self.each(|(_, shard)| shard.hold(values.clone()))
    }

    fn resize<'a, T: Number>(&self, array: &'a mut Vec<B::Array<T>>, len: usize) -> Result<PartMut<'a, B, T>> {
        self.ask(|i, shard| shard.resize(&mut array[i], len).map(drop))?;
        Ok(PartMut { arrays: array, range: 0..len })
    }

    fn part<T: Number>(array: &Vec<B::Array<T>>, range: Range<usize>) -> Part<'_, B, T> {
        Part { arrays: array, start: range.start, end: range.end }
    }

    fn part_mut<T: Number>(array: &mut Vec<B::Array<T>>, range: Range<usize>) -> PartMut<'_, B, T> {
        PartMut { arrays: array, range }
    }

    fn bytes<T: Number>(array: &Vec<B::Array<T>>) -> usize {
        array.iter().map(B::bytes).sum()
    }

    fn linear(&self, parts: &[Matrix<'_, B::Element>], inputs: usize) -> Result<Vec<B::Linear>> {
        self.each(|(_, shard)| shard.linear(parts, inputs))
    }

    fn split_outputs(&self, lists: &[Vec<Matrix<'_, B::Element>>], inputs: usize) -> Result<Vec<B::Linear>> {
        self.each(|(i, shard)| {
            let slices: Vec<Slice<'_, B::Element>> =
                lists.iter().flat_map(|list| Slice::outputs(list, inputs, i, self.shards.len())).collect();
            shard.linear(&slices.iter().map(Slice::matrix).collect::<Vec<_>>(), inputs)
        })
    }

    fn split_inputs(&self, matrix: Matrix<'_, B::Element>, inputs: usize) -> Result<Vec<B::Linear>> {
        self.each(|(i, shard)| {
            let slice = Slice::inputs(matrix, inputs, i, self.shards.len());
            shard.linear(&[slice.matrix()], inputs / self.shards.len())
        })
    }

    fn head(&self, rows: Matrix<'_, B::Element>, inputs: usize) -> Result<Vec<B::Linear>> {
        Ok(vec![self.first()?.head(rows, inputs)?])
    }

    fn linear_bytes(linear: &Vec<B::Linear>) -> usize {
        linear.iter().map(B::linear_bytes).sum()
    }

    fn stacked_bytes(parts: &[(usize, Held)], inputs: usize) -> [usize; 2] {
        B::stacked_bytes(parts, inputs)
    }

    fn activated(
        &self,
        activation: Activation,
        up: Matrix<'_, B::Element>,
        inputs: usize,
        gate: Option<Matrix<'_, B::Element>>,
    ) -> Result<Vec<B::Activated>> {
        let count = self.shards.len();
        self.each(|(i, shard)| {
            let slice = |matrix| Slice::outputs_of(matrix, inputs, i, count);
            let (up, gate) = (slice(up), gate.map(slice));
            shard.activated(activation, up.matrix(), inputs, gate.as_ref().map(Slice::matrix))
        })
    }

    fn activated_bytes(activated: &Vec<B::Activated>) -> usize {
        activated.iter().map(B::activated_bytes).sum()
    }

    fn norm(&self, norm: Norm) -> Result<Vec<B::Norm>> {
        self.each(|(_, shard)| shard.norm(norm.clone()))
    }

    fn rotary(&self, rotary: Rotary) -> Result<Vec<B::Rotary>> {
        self.each(|(_, shard)| shard.rotary(rotary.clone()))
    }

    fn kv_pages(&self, config: &Config, pages: usize) -> Result<Vec<B::KvPages>> {
        self.each(|(_, shard)| shard.kv_pages(config, pages))
    }

    fn page_bytes(config: &Config) -> usize {
        B::page_bytes(config)
    }

    fn workspace_bytes(config: &Config, largest: StepSize) -> u64 {
        B::workspace_bytes(config, largest)
    }

    fn scratch(&self) -> Vec<B::Scratch> {
        self.shards.iter().map(B::scratch).collect()
    }

    fn scratch_bytes(scratch: &Vec<B::Scratch>) -> usize {
        scratch.iter().map(B::scratch_bytes).sum()
    }

    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        B::run(step)
    }

    fn cut<'a>(&self, config: &Config, step: &Step<'a>, used: Option<Vec<B::Used>>) -> Result<Vec<B::Cut<'a>>> {
        let mut used = used.into_iter().flatten();
        self.each(|(_, shard)| shard.cut(config, step, used.next()))
    }

    fn used(cut: Vec<B::Cut<'_>>) -> Vec<B::Used> {
        cut.into_iter().map(B::used).collect()
    }

    fn rows(cut: &Vec<B::Cut<'_>>) -> usize {
        cut.first().map_or(0, B::rows)
    }

    fn shape(_: &Vec<B::Cut<'_>>, _: &Vec<B::KvPages>) {}

    fn layers(&self, (): (), (): &mut (), run: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        run()
    }

    fn q_width(config: &Config) -> usize {
        B::q_width(config)
    }

    fn embed(
        &self,
        table: Embedding<'_, Self>,
        ids: &[u32],
        scale: f32,
        width: usize,
        mut x: PartMut<'_, B, f32>,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<()> {
        self.ask(|i, shard| {
            let table = match table {
                Embedding::Table(tables) => Embedding::Table(&tables[i]),
                Embedding::Head(heads) => Embedding::Head(&heads[i]),
            };
            shard.embed(table, ids, scale, width, x.of(i), &mut scratch[i])
        })
    }

    fn normed(&self, norm: &Vec<B::Norm>, x: Part<'_, B, f32>, mut out: PartMut<'_, B, B::Element>) -> Result<()> {
        self.ask(|i, shard| shard.normed(&norm[i], x.of(i), out.of(i)))
    }

    fn multiply(
        &self,
        linear: &Vec<B::Linear>,
        x: Part<'_, B, B::Element>,
        mut out: PartMut<'_, B, B::Sum>,
    ) -> Result<()> {
        self.ask(|i, shard| shard.multiply(&linear[i], x.of(i), out.of(i)))
    }

    fn add(&self, linear: &Vec<B::Linear>, input: Part<'_, B, B::Element>, mut x: PartMut<'_, B, f32>) -> Result<()> {
        // The residual stream is a part of the sum too, that of the first shard; the others have it again from the sum.
        self.ask(|i, shard| match i {
            0 => shard.add(&linear[i], input.of(i), x.of(i)),
            _ => shard.project(&linear[i], input.of(i), x.of(i)),
        })?;
        B::all_reduce(&self.group, x.all())
    }

    fn project(
        &self,
        linear: &Vec<B::Linear>,
        input: Part<'_, B, B::Element>,
        mut branch: PartMut<'_, B, f32>,
    ) -> Result<()> {
        self.ask(|i, shard| shard.project(&linear[i], input.of(i), branch.of(i)))?;
        B::all_reduce(&self.group, branch.all())
    }

    fn add_normed(&self, norm: &Vec<B::Norm>, branch: Part<'_, B, f32>, mut x: PartMut<'_, B, f32>) -> Result<()> {
        self.ask(|i, shard| shard.add_normed(&norm[i], branch.of(i), x.of(i)))
    }

    fn prepare(
        &self,
        qkv: Part<'_, B, B::Sum>,
        cut: &Vec<B::Cut<'_>>,
        rows: Range<usize>,
        how: How<'_, Self>,
        mut q: PartMut<'_, B, B::Element>,
        kv: &mut Vec<B::KvPages>,
        layer: usize,
    ) -> Result<()> {
        let How { heads, head_dim, q_norm, k_norm, rotary } = how;
        self.ask(|i, shard| {
            let how = How {
                heads,
                head_dim,
                q_norm: q_norm.map(|norm| &norm[i]),
                k_norm: k_norm.map(|norm| &norm[i]),
                rotary: &rotary[i],
            };
            shard.prepare(qkv.of(i), &cut[i], rows.clone(), how, q.of(i), &mut kv[i], layer)
        })
    }

    fn attention(
        &self,
        q: Part<'_, B, B::Element>,
        kv: &Vec<B::KvPages>,
        layer: usize,
        cut: &Vec<B::Cut<'_>>,
        rule: Rule,
        mut out: PartMut<'_, B, B::Element>,
        mut log_sums: Option<PartMut<'_, B, f32>>,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<()> {
        self.ask(|i, shard| {
            let log_sums = log_sums.as_mut().map(|sums| sums.of(i));
            shard.attention(q.of(i), &kv[i], layer, &cut[i], rule, out.of(i), log_sums, &mut scratch[i])
        })
    }

    fn activate(
        &self,
        activated: &Vec<B::Activated>,
        x: Part<'_, B, B::Element>,
        mut out: PartMut<'_, B, B::Element>,
        _: Option<std::convert::Infallible>,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<()> {
        self.ask(|i, shard| shard.activate(&activated[i], x.of(i), out.of(i), None, &mut scratch[i]))
    }

    fn rewards(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        weight: &Vec<B::Array<f32>>,
        bias: f32,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<Floats> {
        self.first()?.rewards(first_stream(from), rows, &weight[0], bias, &mut scratch[0])
    }

    fn log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        targets: &[u32],
        scratch: &mut Vec<B::Scratch>,
        progress: &Progress,
    ) -> Result<Floats> {
        self.first()?.log_probs(first_stream(from), rows, first_head(head), targets, &mut scratch[0], progress)
    }

    fn top_log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        count: usize,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<(Vec<u32>, Vec<f32>)> {
        self.first()?.top_log_probs(first_stream(from), rows, first_head(head), count, &mut scratch[0])
    }

    fn logits(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<()> {
        self.first()?.logits(first_stream(from), rows, first_head(head), &mut scratch[0])
    }

    fn copy_logits(scratch: &Vec<B::Scratch>, rows: Range<usize>, vocabulary: usize) -> Result<Vec<Vec<f32>>> {
        B::copy_logits(&scratch[0], rows, vocabulary)
    }

    fn draw(
        &self,
        vocabulary: usize,
        draws: &[Draw<'_>],
        scratch: &mut Vec<B::Scratch>,
    ) -> Result<Vec<Result<Drawn, Undrawn>>> {
        self.first()?.draw(vocabulary, draws, &mut scratch[0])
    }
}

/// The first shard's residual stream, which is that of all.
fn first_stream<'a, B: Joined>(Stream { x, width, norm }: Stream<'a, Shards<B>>) -> Stream<'a, B> {
    Stream { x: x.of(0), width, norm: &norm[0] }
}

fn first_head<'a, B: Joined>(Vocabulary { logits, softcap, size }: Vocabulary<'a, Shards<B>>) -> Vocabulary<'a, B> {
    Vocabulary { logits: &logits[0], softcap, size }
}
