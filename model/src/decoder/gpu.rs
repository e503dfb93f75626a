//! A GPU as a backend: arrays are in its memory, and the kernels are asked for in order.
//!
//! Weights that are quantised in the checkpoint stay so, a language head among them, but for an embedding that is no
//! language head and what an adapter changes. What two operations of a row pass on to one another is in the weights' type,
//! the residual stream and what is read in the end are f32, but for the rows that meet a vocabulary, which are in the
//! weights' type too, as in Transformers.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::Range;

use plumb_kernels::activation::Activation;
use plumb_kernels::attention::Rule;
use plumb_kernels::gpu::{
    self, Buffer, CutRule, Gpu, Graph, Group, KvPages, Linear, Norm, Output, Partials, Pieces, Room, Sampler, View,
    ViewMut, Vocabulary as Sweep,
};
use plumb_kernels::linear::{Held, Matrix};
use plumb_kernels::sample::{Draw, Drawn, Undrawn};
use plumb_kernels::{norm, rotary};

use super::backend::{Backend, Embedding, Floats, How, Number, Stream, Vocabulary};
use super::build::Load;
use super::forward::{runs, spans};
use super::shards::Joined;
use super::step::{Progress, Step, StepSize};
use super::{Device, Split};
use crate::config::{Config, Head};
use crate::{Error, Result};

/// Rows that go through a linear layer together: enough to fill any GPU, and so few that what lies between two layers is
/// small beside the weights.
const CHUNK: usize = 8192;

/// Steps of up to so many rows are recorded, as to ask for their operations one by one takes longer than to do them.
const MAX_RECORDED_ROWS: usize = 1024;
/// Shapes of steps of which recordings are kept.
const MAX_RECORDED: usize = 64;

/// Rows of a step of so many tokens: a small one is filled up, so that there are few shapes.
fn filled_up(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        65..=MAX_RECORDED_ROWS => rows.next_multiple_of(64),
        _ => rows,
    }
}

/// Of a step, and of the cache that it uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    step: [usize; 4],
    cache: u64,
}

/// Steps' shapes, the last ones first. The layers of a shape that comes for the second time are recorded.
#[derive(Debug, Default)]
pub(super) struct Graphs(VecDeque<(Shape, Option<Graph>)>);

/// A GPU, with weights of one type.
#[derive(Clone, Debug)]
pub(super) struct OnGpu<E> {
    pub(super) gpu: Gpu,
    /// What layers share whose weights are no numbers of the type.
    room: Room,
    /// Whether a non-linearity may be a part of the product before it, which then rounds once less.
    pub(super) joins: bool,
    element: PhantomData<E>,
}

/// A linear layer, its gate before it where it has one, and its non-linearity.
#[derive(Debug)]
pub(super) struct Activated<E> {
    pub(super) linear: Linear<E>,
    pub(super) activation: Activation,
    pub(super) gated: bool,
}

/// Cosines and sines.
#[derive(Debug)]
pub(super) struct Rotary {
    table: Buffer<f32>,
    dim: usize,
}

/// Kept from step to step.
#[derive(Debug)]
pub(super) struct Scratch<E> {
    ids: Buffer<u32>,
    partials: Partials,
    /// What a non-linearity is given, `[CHUNK, 2 * intermediate]`.
    sums: Buffer<E>,
    /// Which rows are read, and what the norm makes of them.
    rows: Buffer<u32>,
    normed: Buffer<f32>,
    narrow: Buffer<E>,
    rewards: Buffer<f32>,
    /// `[reads, vocab_size]`.
    logits: Buffer<f32>,
    sampler: Sampler,
    sweep: Sweep,
}

impl<E: Load + Number + Output<E>> Backend for OnGpu<E>
where
    f32: Output<E>,
{
    type Element = E;
    type Sum = E;
    type Array<T: Number> = Buffer<T>;
    type Part<'a, T: Number> = View<'a, T>;
    type PartMut<'a, T: Number> = ViewMut<'a, T>;
    type Linear = Linear<E>;
    type Activated = Activated<E>;
    type Norm = Norm;
    type Rotary = Rotary;
    type KvPages = KvPages<E>;
    type Cut<'a> = Pieces;
    type Used = Pieces;
    type Shape = Option<Shape>;
    type Graphs = Graphs;
    /// For gate and up beside one another, or up alone.
    type Kept<'a> = ViewMut<'a, E>;
    type Scratch = Scratch<E>;

    const CHUNK: usize = CHUNK;
    const PACKED: bool = false;
    const BESIDE: bool = true;

    fn on(device: &Device) -> Result<Self> {
        match device {
            Device::Gpu(gpu) => Ok(Self { gpu: gpu.clone(), room: Room::new(gpu), joins: true, element: PhantomData }),
            _ => Err(Error::Device(format!("{} is no GPU", device.name()))),
        }
    }

    fn array<T: Number>(&self) -> Buffer<T> {
        self.gpu.empty()
    }

    fn hold<T: Number>(&self, values: Vec<T>) -> Result<Buffer<T>> {
        Ok(self.gpu.upload(&values)?)
    }

    fn resize<'a, T: Number>(&self, array: &'a mut Buffer<T>, len: usize) -> Result<ViewMut<'a, T>> {
        array.grow(len)?;
        Ok(array.view_mut(0..len))
    }

    fn part<T: Number>(array: &Buffer<T>, range: Range<usize>) -> View<'_, T> {
        array.view(range)
    }

    fn part_mut<T: Number>(array: &mut Buffer<T>, range: Range<usize>) -> ViewMut<'_, T> {
        array.view_mut(range)
    }

    fn bytes<T: Number>(array: &Buffer<T>) -> usize {
        array.bytes()
    }

    fn linear(&self, parts: &[Matrix<'_, E>], inputs: usize) -> Result<Linear<E>> {
        Ok(Linear::stacked(&self.gpu, parts, inputs, &self.room)?)
    }

    fn linear_bytes(linear: &Linear<E>) -> usize {
        linear.bytes()
    }

    fn stacked_bytes(parts: &[(usize, Held)], inputs: usize) -> [usize; 2] {
        gpu::stacked_bytes::<E>(parts, inputs)
    }

    fn activated(
        &self,
        activation: Activation,
        up: Matrix<'_, E>,
        inputs: usize,
        gate: Option<Matrix<'_, E>>,
    ) -> Result<Activated<E>> {
        let parts: Vec<_> = gate.into_iter().chain([up]).collect();
        Ok(Activated { linear: self.linear(&parts, inputs)?, activation, gated: gate.is_some() })
    }

    fn activated_bytes(activated: &Activated<E>) -> usize {
        activated.linear.bytes()
    }

    fn norm(&self, norm: norm::Norm) -> Result<Norm> {
        Ok(Norm::new(&self.gpu, &norm)?)
    }

    fn rotary(&self, rotary: rotary::Rotary) -> Result<Rotary> {
        Ok(Rotary { table: self.gpu.upload(rotary.table())?, dim: rotary.dim() })
    }

    fn kv_pages(&self, config: &Config, pages: usize) -> Result<KvPages<E>> {
        Ok(KvPages::new(&self.gpu, config.num_layers, config.num_kv_heads, config.head_dim, pages)?)
    }

    fn page_bytes(config: &Config) -> usize {
        KvPages::<E>::page_bytes(config.num_layers, config.num_kv_heads, config.head_dim)
    }

    fn workspace_bytes(config: &Config, largest: StepSize) -> u64 {
        const FLOAT: usize = size_of::<f32>();
        let Config { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, .. } = *config;
        // The residual stream, q, what attention makes of it, and what a parallel feed-forward is given; of rows that are
        // read what the norm makes of them, twice.
        let row = hidden_size * (2 * FLOAT + 2 * size_of::<E>()) + 2 * Self::q_width(config) * size_of::<E>();
        let qkv = (num_heads + 2 * num_kv_heads) * head_dim;
        let chunk = (hidden_size + qkv + 3 * intermediate_size) * size_of::<E>() + hidden_size * FLOAT;
        let of = |count: usize, bytes: usize| count.saturating_mul(bytes) as u64;
        let logits = match config.head {
            Head::Language => of(largest.sequences, vocab_size * FLOAT)
                .saturating_add(Sampler::most_bytes(largest.sequences, vocab_size) as u64)
                .saturating_add(Sweep::most_bytes(largest.tokens, vocab_size) as u64),
            Head::Reward(_) => 0,
        };
        let rows = filled_up(largest.tokens);
        let partials = Partials::most_bytes(cut_rule(config, false), rows, config.max_position_embeddings) as u64;
        let parts = [of(rows, row), of(CHUNK.min(rows), chunk), logits, partials];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    fn scratch(&self) -> Scratch<E> {
        let gpu = &self.gpu;
        Scratch {
            ids: gpu.empty(),
            partials: Partials::new(gpu),
            sums: gpu.empty(),
            rows: gpu.empty(),
            normed: gpu.empty(),
            narrow: gpu.empty(),
            rewards: gpu.empty(),
            logits: gpu.empty(),
            sampler: Sampler::new(gpu),
            sweep: Sweep::new(gpu),
        }
    }

    fn scratch_bytes(scratch: &Scratch<E>) -> usize {
        let Scratch { ids, partials, sums, rows, normed, narrow, rewards, logits, sampler, sweep } = scratch;
        let floats = [normed, rewards, logits].map(Buffer::bytes).iter().sum::<usize>();
        let others = partials.bytes() + sampler.bytes() + sweep.bytes();
        ids.bytes() + sums.bytes() + rows.bytes() + narrow.bytes() + floats + others
    }

    fn cut<'a>(&self, config: &Config, step: &Step<'a>, used: Option<Pieces>) -> Result<Pieces> {
        let mut pieces = used.unwrap_or_else(|| Pieces::new(&self.gpu));
        let rows = step.sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let rule = cut_rule(config, self.gpu.is_invariant());
        pieces.set::<E>(&spans(step), &runs(step, usize::MAX), rule, filled_up(rows))?;
        Ok(pieces)
    }

    fn used(cut: Pieces) -> Pieces {
        cut
    }

    fn rows(cut: &Pieces) -> usize {
        cut.rows()
    }

    fn shape(cut: &Pieces, kv: &KvPages<E>) -> Option<Shape> {
        kv.check(cut);
        cut.shape().map(|step| Shape { step, cache: kv.number() })
    }

    fn layers(&self, shape: Option<Shape>, graphs: &mut Graphs, run: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let Some(shape) = shape.filter(|shape| shape.step[0] <= MAX_RECORDED_ROWS) else { return run() };
        // After an error arrays may be missing, so that nothing is known any more.
        let mut shapes = std::mem::take(&mut graphs.0);
        let place = shapes.iter().position(|(other, _)| *other == shape);
        let graph = match place.and_then(|place| shapes.remove(place)) {
            // All arrays are there: the layers of such a step have run before.
            Some((_, Some(graph))) if graph.replay()? => Some(graph),
            Some((_, None)) => {
                let graph = self.gpu.record(&mut *run)?;
                let all_there = graph.replay()?;
                if !all_there {
                    run()?;
                }
                all_there.then_some(graph)
            }
            // Not seen yet, or an array had to grow since.
            _ => {
                run()?;
                None
            }
        };
        shapes.truncate(MAX_RECORDED - 1);
        shapes.push_front((shape, graph));
        graphs.0 = shapes;
        Ok(())
    }

    fn q_width(config: &Config) -> usize {
        config.num_heads * gpu::padded(config.head_dim)
    }

    fn embed(
        &self,
        table: Embedding<'_, Self>,
        ids: &[u32],
        scale: f32,
        width: usize,
        x: ViewMut<'_, f32>,
        scratch: &mut Scratch<E>,
    ) -> Result<()> {
        scratch.ids.grow(ids.len())?;
        scratch.ids.write(0, ids)?;
        let ids = scratch.ids.view(0..ids.len());
        match table {
            Embedding::Table(table) => self.gpu.embed(table.all(), ids, scale, width, x)?,
            Embedding::Head(head) => head.embed(&self.gpu, ids, scale, x)?,
        }
        Ok(())
    }

    fn normed(&self, norm: &Norm, x: View<'_, f32>, out: ViewMut<'_, E>) -> Result<()> {
        Ok(norm.forward(&self.gpu, x, None, out)?)
    }

    fn multiply(&self, linear: &Linear<E>, x: View<'_, E>, out: ViewMut<'_, E>) -> Result<()> {
        Ok(linear.forward(&self.gpu, x, out)?)
    }

    fn add(&self, linear: &Linear<E>, input: View<'_, E>, x: ViewMut<'_, f32>) -> Result<()> {
        Ok(linear.add_to(&self.gpu, input, x)?)
    }

    fn project(&self, linear: &Linear<E>, input: View<'_, E>, branch: ViewMut<'_, f32>) -> Result<()> {
        Ok(linear.forward(&self.gpu, input, branch)?)
    }

    fn add_normed(&self, norm: &Norm, branch: View<'_, f32>, x: ViewMut<'_, f32>) -> Result<()> {
        Ok(norm.add_to(&self.gpu, branch, x)?)
    }

    fn prepare(
        &self,
        qkv: View<'_, E>,
        cut: &Pieces,
        rows: Range<usize>,
        how: How<'_, Self>,
        q: ViewMut<'_, E>,
        kv: &mut KvPages<E>,
        layer: usize,
    ) -> Result<()> {
        Ok(self.gpu.prepare(qkv, cut, rows.start, how.into(), q, kv, layer)?)
    }

    fn attention(
        &self,
        q: View<'_, E>,
        kv: &KvPages<E>,
        layer: usize,
        cut: &Pieces,
        rule: Rule,
        out: ViewMut<'_, E>,
        log_sums: Option<ViewMut<'_, f32>>,
        scratch: &mut Scratch<E>,
    ) -> Result<()> {
        Ok(self.gpu.attention(q, kv, layer, cut, rule, &mut scratch.partials, out, log_sums)?)
    }

    fn activate(
        &self,
        activated: &Activated<E>,
        x: View<'_, E>,
        mut out: ViewMut<'_, E>,
        kept: Option<ViewMut<'_, E>>,
        scratch: &mut Scratch<E>,
    ) -> Result<()> {
        let Activated { linear, activation, gated } = activated;
        let joins = self.joins && !gated && *activation == Activation::GeluTanh;
        if joins && linear.forward_gelu_tanh(&self.gpu, x, out.reborrow())? {
            return Ok(());
        }
        let rows = x.len() / linear.inputs();
        let width = linear.outputs() / if *gated { 2 } else { 1 };
        let mut sums = match kept {
            Some(kept) => kept,
            None => self.resize(&mut scratch.sums, rows * linear.outputs())?,
        };
        linear.forward(&self.gpu, x, sums.reborrow())?;
        Ok(self.gpu.activate(*activation, *gated, sums.as_view(), width, out)?)
    }

    fn rewards(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        weight: &Buffer<f32>,
        bias: f32,
        scratch: &mut Scratch<E>,
    ) -> Result<Floats> {
        scratch.set_rows(rows)?;
        let normed = self.resize(&mut scratch.normed, rows.len() * from.width)?;
        from.norm.forward(&self.gpu, from.x, Some(scratch.rows.view(0..rows.len())), normed)?;
        let normed = scratch.normed.view(0..rows.len() * from.width);
        let rewards = self.resize(&mut scratch.rewards, rows.len())?;
        self.gpu.rewards(normed, weight.all(), bias, rewards)?;
        Ok(Floats::Fetched(scratch.rewards.fetch(0..rows.len())?))
    }

    fn log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        targets: &[u32],
        scratch: &mut Scratch<E>,
        progress: &Progress,
    ) -> Result<Floats> {
        self.gather(&from, rows, scratch)?;
        let log_probs = scratch.sweep.token_log_probs(head.logits, head.softcap, &scratch.narrow, targets)?;
        progress.advance();
        Ok(Floats::Fetched(log_probs))
    }

    fn top_log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        count: usize,
        scratch: &mut Scratch<E>,
    ) -> Result<(Vec<u32>, Vec<f32>)> {
        self.gather(&from, rows, scratch)?;
        Ok(scratch.sweep.top_log_probs(head.logits, head.softcap, &scratch.narrow, rows.len(), count)?)
    }

    fn logits(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        scratch: &mut Scratch<E>,
    ) -> Result<()> {
        self.gather(&from, rows, scratch)?;
        let logits = self.resize(&mut scratch.logits, rows.len() * head.size)?;
        head.logits.forward(&self.gpu, scratch.narrow.view(0..rows.len() * from.width), logits)?;
        if let Some(cap) = head.softcap {
            self.gpu.soft_cap(scratch.logits.view_mut(0..rows.len() * head.size), cap)?;
        }
        Ok(())
    }

    fn copy_logits(scratch: &Scratch<E>, rows: Range<usize>, vocabulary: usize) -> Result<Vec<Vec<f32>>> {
        let copy = |row: usize| {
            let mut logits = vec![0.0; vocabulary];
            scratch.logits.read(row * vocabulary, &mut logits)?;
            Ok(logits)
        };
        rows.map(copy).collect()
    }

    fn draw(
        &self,
        vocabulary: usize,
        draws: &[Draw<'_>],
        scratch: &mut Scratch<E>,
    ) -> Result<Vec<Result<Drawn, Undrawn>>> {
        Ok(scratch.sampler.draw(scratch.logits.all(), vocabulary, draws)?)
    }
}

impl<E: Load + Number + Output<E>> Joined for OnGpu<E>
where
    f32: Output<E>,
{
    type Group = Group;

    fn group(split: &Split) -> Result<Group> {
        split.group.clone().ok_or_else(|| Error::Device(format!("{} are no GPUs", split.name)))
    }

    fn all_reduce(group: &Group, mut parts: Vec<ViewMut<'_, f32>>) -> Result<()> {
        Ok(group.all_reduce(&mut parts)?)
    }
}

impl<E: Load + Number + Output<E>> OnGpu<E>
where
    f32: Output<E>,
{
    /// Rows after the norm, as a vocabulary is given them.
    fn gather(&self, from: &Stream<'_, Self>, rows: &[u32], scratch: &mut Scratch<E>) -> Result<()> {
        scratch.set_rows(rows)?;
        let narrow = self.resize(&mut scratch.narrow, rows.len() * from.width)?;
        Ok(from.norm.forward(&self.gpu, from.x, Some(scratch.rows.view(0..rows.len())), narrow)?)
    }
}

impl<'a, E: Load + Number + Output<E>> From<How<'a, OnGpu<E>>> for gpu::Prepare<'a>
where
    f32: Output<E>,
{
    fn from(How { heads, q_norm, k_norm, rotary, .. }: How<'a, OnGpu<E>>) -> Self {
        Self { heads, q_norm, k_norm, table: rotary.table.all(), rotated: rotary.dim }
    }
}

/// How attention is cut: unless it is invariant, a score may depend in its last bits on how its sequence is cut into
/// steps, as it does on the number of rows that its products had beside it.
fn cut_rule(config: &Config, invariant: bool) -> CutRule {
    CutRule {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        invariant,
        partial_bytes: gpu::PARTIAL_BYTES,
    }
}

impl<E> Scratch<E> {
    fn set_rows(&mut self, rows: &[u32]) -> Result<()> {
        self.rows.grow(rows.len())?;
        Ok(self.rows.write(0, rows)?)
    }
}
