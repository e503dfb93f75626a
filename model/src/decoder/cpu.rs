//! The CPU as a backend: arrays are vectors, and the kernels take slices.

use std::marker::PhantomData;
use std::ops::Range;

use plumb_kernels::activation::Activation;
use plumb_kernels::attention::{KvPages, Prepare, Rule, Run, Work, attention, padded, prepare};
use plumb_kernels::head::{LogProb, dot, soft_cap, token_log_probs, top_log_probs};
use plumb_kernels::linear::{Activated, Held, Kept, Linear, Matrix, PANEL, Store};
use plumb_kernels::norm::Norm;
use plumb_kernels::parallel::with_team;
use plumb_kernels::quantised::packed_bytes;
use plumb_kernels::rotary::Rotary;
use plumb_kernels::sample::{self, Draw, Drawn, Undrawn};

use super::backend::{Backend, Embedding, Floats, How, Number, Stream, Vocabulary};
use super::build::Load;
use super::forward::{runs, spans};
use super::shards::Joined;
use super::step::{Progress, Step, StepSize};
use super::{Device, Split};
use crate::Result;
use crate::config::{Block, Config, Head};

/// Rows that go through a linear layer together: what lies between two of them stays small and in the cache.
pub(super) const CHUNK: usize = 384;

/// Rows whose log-probabilities are computed at a time: many, for whom the weights are read once, and not so many that
/// nothing seems to happen meanwhile.
const ROWS_AT_A_TIME: usize = 512;

/// The CPU, with weights of one type.
#[derive(Clone, Debug, Default)]
pub(super) struct Cpu<E>(PhantomData<E>);

/// How a step's rows are cut.
pub(super) struct Cut<'a> {
    runs: Vec<Run>,
    pub(super) work: Work<'a>,
}

/// Kept from step to step.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    rows: Gathered,
    /// `[reads, vocab_size]`.
    logits: Vec<f32>,
    /// What draws compute in, `[draws, vocab_size]`.
    weights: Vec<f32>,
}

/// Rows that are read, before and after the norm, `[rows, hidden]`.
#[derive(Debug, Default)]
struct Gathered {
    before: Vec<f32>,
    after: Vec<f32>,
}

impl<E: Load + Number> Backend for Cpu<E> {
    type Element = E;
    type Sum = f32;
    type Array<T: Number> = Vec<T>;
    type Part<'a, T: Number> = &'a [T];
    type PartMut<'a, T: Number> = &'a mut [T];
    type Linear = Linear<E>;
    type Activated = Activated<E>;
    type Norm = Norm;
    type Rotary = Rotary;
    type KvPages = KvPages<E>;
    type Cut<'a> = Cut<'a>;
    type Used = ();
    type Shape = ();
    type Graphs = ();
    type Kept<'a> = Kept<'a, E>;
    type Scratch = Scratch;

    const CHUNK: usize = CHUNK;
    const PACKED: bool = true;
    const BESIDE: bool = false;

    fn on(_: &Device) -> Result<Self> {
        Ok(Self::default())
    }

    fn array<T: Number>(&self) -> Vec<T> {
        Vec::new()
    }

    fn hold<T: Number>(&self, values: Vec<T>) -> Result<Vec<T>> {
        Ok(values)
    }

    fn resize<'a, T: Number>(&self, array: &'a mut Vec<T>, len: usize) -> Result<&'a mut [T]> {
        Ok(resize(array, len))
    }

    fn part<T: Number>(array: &Vec<T>, range: Range<usize>) -> &[T] {
        &array[range]
    }

    fn part_mut<T: Number>(array: &mut Vec<T>, range: Range<usize>) -> &mut [T] {
        &mut array[range]
    }

    fn bytes<T: Number>(array: &Vec<T>) -> usize {
        array.capacity() * size_of::<T>()
    }

    fn linear(&self, parts: &[Matrix<'_, E>], inputs: usize) -> Result<Linear<E>> {
        Ok(Linear::new(parts, inputs)?)
    }

    fn linear_bytes(linear: &Linear<E>) -> usize {
        linear.bytes()
    }

    fn stacked_bytes(parts: &[(usize, Held)], inputs: usize) -> [usize; 2] {
        let outputs = parts.iter().map(|part| part.0).sum();
        let described = |part: &(_, Held)| match part.1 {
            Held::Quantised(described) => Some(described),
            Held::Plain | Held::Fp8 => None,
        };
        let quantised: Option<Vec<_>> = parts.iter().map(described).collect();
        [quantised.map_or_else(|| Linear::<E>::packed_bytes(outputs, inputs), |q| packed_bytes(&q, outputs, inputs)), 0]
    }

    fn activated(
        &self,
        activation: Activation,
        up: Matrix<'_, E>,
        inputs: usize,
        gate: Option<Matrix<'_, E>>,
    ) -> Result<Activated<E>> {
        Ok(Activated::new(activation, up, inputs, gate)?)
    }

    fn activated_bytes(activated: &Activated<E>) -> usize {
        activated.bytes()
    }

    fn norm(&self, norm: Norm) -> Result<Norm> {
        Ok(norm)
    }

    fn rotary(&self, rotary: Rotary) -> Result<Rotary> {
        Ok(rotary)
    }

    fn kv_pages(&self, config: &Config, pages: usize) -> Result<KvPages<E>> {
        Ok(KvPages::new(config.num_layers, config.num_kv_heads, config.head_dim, pages)?)
    }

    fn page_bytes(config: &Config) -> usize {
        KvPages::<E>::page_bytes(config.num_layers, config.num_kv_heads, config.head_dim)
    }

    fn workspace_bytes(config: &Config, largest: StepSize) -> u64 {
        const FLOAT: usize = size_of::<f32>();
        let element = size_of::<E>();
        let Config { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, .. } = *config;
        let attention = num_heads * (padded(head_dim) + head_dim);
        let parallel = if config.block == Block::Parallel { hidden_size } else { 0 };
        // The residual stream; and of rows that are read a copy, what its norm makes of it, and that again.
        let row = (attention + parallel) * element + 4 * hidden_size * FLOAT;
        let qkv = (num_heads + 2 * num_kv_heads) * head_dim;
        let inner = intermediate_size.next_multiple_of(PANEL);
        let chunk = (hidden_size + inner) * element + (hidden_size + qkv) * FLOAT;
        // Computed, and handed out or drawn from.
        let logits = if config.head == Head::Language { 2 * vocab_size * FLOAT } else { 0 };
        let of = |count: usize, bytes: usize| count.saturating_mul(bytes) as u64;
        let parts = [of(largest.tokens, row), of(CHUNK.min(largest.tokens), chunk), of(largest.sequences, logits)];
        parts.into_iter().fold(0, u64::saturating_add)
    }

    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    fn scratch_bytes(Scratch { rows: Gathered { before, after }, logits, weights }: &Scratch) -> usize {
        [before, after, logits, weights].map(Vec::capacity).iter().sum::<usize>() * size_of::<f32>()
    }

    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        with_team(step)
    }

    fn cut<'a>(&self, config: &Config, step: &Step<'a>, _: Option<()>) -> Result<Cut<'a>> {
        let work = Work::new(&spans(step), config.num_heads / config.num_kv_heads, config.num_kv_heads);
        Ok(Cut { runs: runs(step, CHUNK), work })
    }

    fn used(_: Cut<'_>) {}

    fn rows(cut: &Cut<'_>) -> usize {
        cut.work.rows()
    }

    fn shape(_: &Cut<'_>, _: &KvPages<E>) {}

    fn layers(&self, (): (), (): &mut (), run: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        run()
    }

    fn q_width(config: &Config) -> usize {
        config.num_heads * padded(config.head_dim)
    }

    fn embed(
        &self,
        table: Embedding<'_, Self>,
        ids: &[u32],
        scale: f32,
        width: usize,
        x: &mut [f32],
        _: &mut Scratch,
    ) -> Result<()> {
        for (row, id) in x.chunks_exact_mut(width).zip(ids) {
            match table {
                Embedding::Table(table) => {
                    for (x, e) in row.iter_mut().zip(&table[*id as usize * width..]) {
                        *x = e.to_f32();
                    }
                }
                Embedding::Head(head) => head.row(*id as usize, row),
            }
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(())
    }

    fn normed(&self, norm: &Norm, x: &[f32], out: &mut [E]) -> Result<()> {
        norm.forward(x, out);
        Ok(())
    }

    fn multiply(&self, linear: &Linear<E>, x: &[E], out: &mut [f32]) -> Result<()> {
        linear.forward(x, out, Store::Set);
        Ok(())
    }

    fn add(&self, linear: &Linear<E>, input: &[E], x: &mut [f32]) -> Result<()> {
        linear.forward(input, x, Store::Add);
        Ok(())
    }

    fn project(&self, linear: &Linear<E>, input: &[E], branch: &mut [f32]) -> Result<()> {
        linear.forward(input, branch, Store::Set);
        Ok(())
    }

    fn add_normed(&self, norm: &Norm, branch: &[f32], x: &mut [f32]) -> Result<()> {
        norm.add_to(branch, x);
        Ok(())
    }

    fn prepare(
        &self,
        qkv: &[f32],
        cut: &Cut<'_>,
        rows: Range<usize>,
        how: How<'_, Self>,
        q: &mut [E],
        kv: &mut KvPages<E>,
        layer: usize,
    ) -> Result<()> {
        // Runs end where chunks end.
        let first = cut.runs.partition_point(|run| run.row < rows.start);
        let end = cut.runs.partition_point(|run| run.row < rows.end);
        prepare(qkv, rows.start, &cut.runs[first..end], how.into(), q, kv, layer);
        Ok(())
    }

    fn attention(
        &self,
        q: &[E],
        kv: &KvPages<E>,
        layer: usize,
        cut: &Cut<'_>,
        rule: Rule,
        out: &mut [E],
        _: Option<&mut [f32]>,
        _: &mut Scratch,
    ) -> Result<()> {
        attention(q, kv, layer, &cut.work, rule, out);
        Ok(())
    }

    fn activate(
        &self,
        activated: &Activated<E>,
        x: &[E],
        out: &mut [E],
        kept: Option<Kept<'_, E>>,
        _: &mut Scratch,
    ) -> Result<()> {
        activated.forward(x, out, kept);
        Ok(())
    }

    fn rewards(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        weight: &Vec<f32>,
        bias: f32,
        scratch: &mut Scratch,
    ) -> Result<Floats> {
        let (width, normed) = (from.width, scratch.rows.gather(&from, rows));
        Ok(Floats::There(normed.chunks_exact(width).map(|row| dot(weight, row) + bias).collect()))
    }

    fn log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        Vocabulary { logits, softcap, .. }: Vocabulary<'_, Self>,
        targets: &[u32],
        scratch: &mut Scratch,
        progress: &Progress,
    ) -> Result<Floats> {
        let (width, normed) = (from.width, scratch.rows.gather(&from, rows));
        let mut log_probs = Vec::with_capacity(2 * targets.len());
        let pair = |found: LogProb| [found.value, f32::from(u8::from(found.greedy))];
        for (rows, targets) in normed.chunks(ROWS_AT_A_TIME * width).zip(targets.chunks(ROWS_AT_A_TIME)) {
            log_probs.extend(token_log_probs(logits, softcap, rows, targets).into_iter().flat_map(pair));
            progress.advance();
        }
        Ok(Floats::There(log_probs))
    }

    fn top_log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        Vocabulary { logits, softcap, .. }: Vocabulary<'_, Self>,
        count: usize,
        scratch: &mut Scratch,
    ) -> Result<(Vec<u32>, Vec<f32>)> {
        Ok(top_log_probs(logits, softcap, scratch.rows.gather(&from, rows), count))
    }

    fn logits(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        Vocabulary { logits, softcap, size }: Vocabulary<'_, Self>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let normed = scratch.rows.gather(&from, rows);
        let out = resize(&mut scratch.logits, rows.len() * size);
        logits.forward_f32(normed, out, Store::Set);
        if let Some(cap) = softcap {
            soft_cap(out, cap);
        }
        Ok(())
    }

    fn copy_logits(scratch: &Scratch, rows: Range<usize>, vocabulary: usize) -> Result<Vec<Vec<f32>>> {
        Ok(rows.map(|row| scratch.logits[row * vocabulary..][..vocabulary].to_vec()).collect())
    }

    fn draw(
        &self,
        vocabulary: usize,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<Result<Drawn, Undrawn>>> {
        let weights = resize(&mut scratch.weights, draws.len() * vocabulary);
        Ok(sample::draw(&scratch.logits, vocabulary, draws, weights))
    }
}

impl<E: Load + Number> Joined for Cpu<E> {
    type Group = ();

    fn group(_: &Split) -> Result<()> {
        Ok(())
    }

    fn all_reduce((): &(), mut parts: Vec<&mut [f32]>) -> Result<()> {
        if let Some((sum, others)) = parts.split_first_mut() {
            for other in others.iter() {
                sum.iter_mut().zip(other.iter()).for_each(|(sum, x)| *sum += x);
            }
            others.iter_mut().for_each(|other| other.copy_from_slice(sum));
        }
        Ok(())
    }
}

impl Gathered {
    /// Rows after the norm, in f32.
    fn gather<E: Load + Number>(&mut self, from: &Stream<'_, Cpu<E>>, rows: &[u32]) -> &[f32] {
        let width = from.width;
        let before = resize(&mut self.before, rows.len() * width);
        for (out, row) in before.chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(&from.x[*row as usize * width..][..width]);
        }
        let after = resize(&mut self.after, rows.len() * width);
        from.norm.forward(before, after);
        after
    }
}

impl<'a, E: Load + Number> From<How<'a, Cpu<E>>> for Prepare<'a> {
    fn from(how: How<'a, Cpu<E>>) -> Self {
        let How { heads, head_dim, q_norm, k_norm, rotary } = how;
        Self { heads, head_dim, q_norm, k_norm, rotary }
    }
}

/// The first `len` elements of the buffer, whose values are whatever they were.
pub(super) fn resize<T: Default + Clone>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        // What is foretold has no room for more.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
