//! What a decoder asks of the device on which it computes.
//!
//! The forward pass is written once, in [`super::forward`]; a backend holds the weights, the pages and the buffers in its
//! own way, and does what happens to them. Shapes are the forward pass's business.

use std::fmt::Debug;
use std::ops::Range;

use bytemuck::Pod;
use plumb_kernels::activation::Activation;
use plumb_kernels::attention::Rule;
use plumb_kernels::linear::{Held, Matrix};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;
use plumb_kernels::sample::{Draw, Drawn, Undrawn};

use super::Device;
use super::build::Load;
use super::step::{Progress, Step, StepSize};
use crate::Result;
use crate::config::Config;

/// What arrays hold.
pub(super) trait Number: Pod + Default + Debug + Send + Sync {}

impl<T: Pod + Default + Debug + Send + Sync> Number for T {}

/// Numbers that were asked for.
#[derive(Debug)]
pub(super) enum Floats {
    /// They are there.
    There(Vec<f32>),
    /// They come from a GPU.
    #[cfg(feature = "gpu")]
    Fetched(plumb_kernels::gpu::Fetch<f32>),
}

impl Floats {
    /// Whether [`Floats::wait`] would not wait.
    pub(super) fn are_there(&self) -> bool {
        match self {
            Self::There(_) => true,
            #[cfg(feature = "gpu")]
            Self::Fetched(fetch) => fetch.is_done(),
        }
    }

    pub(super) fn wait(self) -> Result<Vec<f32>> {
        match self {
            Self::There(floats) => Ok(floats),
            #[cfg(feature = "gpu")]
            Self::Fetched(fetch) => Ok(fetch.wait()?),
        }
    }
}

/// A device, and a type of weights on it.
pub(super) trait Backend: Clone + Debug + Send + Sync + Sized + 'static {
    /// Of weights, of keys and values, and of what linear layers are given.
    type Element: Load + Number;
    /// Of q, k and v before they are made ready.
    type Sum: Number;

    type Array<T: Number>: Debug + Send + Sync;
    /// Part of an array, to be read.
    type Part<'a, T: Number>: Copy;
    /// Part of an array, to be written.
    type PartMut<'a, T: Number>;

    type Linear: Debug + Send + Sync;
    type Activated: Debug + Send + Sync;
    type Norm: Debug + Send + Sync;
    type Rotary: Debug + Send + Sync;
    type KvPages: Debug + Send + Sync + 'static;

    /// How a step's rows are cut, the same for all layers.
    type Cut<'a>;
    /// What can be used again of one.
    type Used: Debug + Send + Sync;
    /// What steps have in common that do the same with other numbers.
    type Shape;
    /// How the layers of steps have run, by their shapes.
    type Graphs: Debug + Default + Send + Sync;
    /// Where an activated layer puts what its gradient needs.
    type Kept<'a>;
    /// What attention and reading need beside the residual stream.
    type Scratch: Debug + Send + Sync;

    /// Rows that go through a linear layer together.
    const CHUNK: usize;
    /// Whether weights are packed into panels, in the memory of the process.
    const PACKED: bool;
    /// Whether what is asked for is computed later, beside the process.
    const BESIDE: bool;

    /// That of a device.
    fn on(device: &Device) -> Result<Self>;

    /// Between how many a model is split. What belongs to a part of a model has the sizes of a shard's.
    fn shards(&self) -> usize {
        1
    }

    // ---- memory ----

    /// An empty array.
    fn array<T: Number>(&self) -> Self::Array<T>;
    /// An array with these values.
    fn hold<T: Number>(&self, values: Vec<T>) -> Result<Self::Array<T>>;
    /// The first `len` elements of an array that may have to grow; then its values are anything.
    fn resize<'a, T: Number>(&self, array: &'a mut Self::Array<T>, len: usize) -> Result<Self::PartMut<'a, T>>;
    fn part<T: Number>(array: &Self::Array<T>, range: Range<usize>) -> Self::Part<'_, T>;
    fn part_mut<T: Number>(array: &mut Self::Array<T>, range: Range<usize>) -> Self::PartMut<'_, T>;
    /// Bytes that an array takes.
    fn bytes<T: Number>(array: &Self::Array<T>) -> usize;

    // ---- what a model is made of ----

    /// Matrices on top of one another.
    fn linear(&self, parts: &[Matrix<'_, Self::Element>], inputs: usize) -> Result<Self::Linear>;
    /// The same of lists of matrices, where each shard gets an equal part of the outputs of every list.
    fn split_outputs(&self, lists: &[Vec<Matrix<'_, Self::Element>>], inputs: usize) -> Result<Self::Linear> {
        self.linear(&lists.concat(), inputs)
    }
    /// A matrix of which each shard gets an equal part of the inputs, and whose products are the sum over all shards.
    fn split_inputs(&self, matrix: Matrix<'_, Self::Element>, inputs: usize) -> Result<Self::Linear> {
        self.linear(&[matrix], inputs)
    }
    /// A matrix that is for what is read in the end only.
    fn head(&self, rows: Matrix<'_, Self::Element>, inputs: usize) -> Result<Self::Linear> {
        self.linear(&[rows], inputs)
    }
    /// Bytes that it takes.
    fn linear_bytes(linear: &Self::Linear) -> usize;
    /// Bytes that matrices on top of one another will take, each of so many outputs, and those of
    /// what they take beside that, which all layers share.
    fn stacked_bytes(parts: &[(usize, Held)], inputs: usize) -> [usize; 2];
    /// Up and gate, each shard with an equal part of their outputs.
    fn activated(
        &self,
        activation: Activation,
        up: Matrix<'_, Self::Element>,
        inputs: usize,
        gate: Option<Matrix<'_, Self::Element>>,
    ) -> Result<Self::Activated>;
    /// Bytes that it takes.
    fn activated_bytes(activated: &Self::Activated) -> usize;
    fn norm(&self, norm: Norm) -> Result<Self::Norm>;
    fn rotary(&self, rotary: Rotary) -> Result<Self::Rotary>;
    /// Room for so many pages.
    fn kv_pages(&self, config: &Config, pages: usize) -> Result<Self::KvPages>;
    /// Bytes of one page.
    fn page_bytes(config: &Config) -> usize;
    /// What steps up to the `largest` compute in: the buffers, and what is handed out.
    fn workspace_bytes(config: &Config, largest: StepSize) -> u64;
    fn scratch(&self) -> Self::Scratch;
    /// Bytes that it takes.
    fn scratch_bytes(scratch: &Self::Scratch) -> usize;

    // ---- what a step does ----

    /// Runs a step, with whatever it takes around it.
    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        step()
    }

    fn cut<'a>(&self, config: &Config, step: &Step<'a>, used: Option<Self::Used>) -> Result<Self::Cut<'a>>;
    fn used(cut: Self::Cut<'_>) -> Self::Used;
    /// Rows of a step: those of its tokens, and after them perhaps some that are of none.
    fn rows(cut: &Self::Cut<'_>) -> usize;
    /// What a step and its cache have in common with others whose layers do the same.
    fn shape(cut: &Self::Cut<'_>, kv: &Self::KvPages) -> Self::Shape;
    /// Has the layers of a step done: by `run`, or as they were before for a step of the same shape.
    fn layers(&self, shape: Self::Shape, known: &mut Self::Graphs, run: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Elements of q for a row.
    fn q_width(config: &Config) -> usize;

    /// `x = table[ids] * scale`.
    fn embed(
        &self,
        table: Embedding<'_, Self>,
        ids: &[u32],
        scale: f32,
        width: usize,
        x: Self::PartMut<'_, f32>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// `out = norm(x)` for every row.
    fn normed(&self, norm: &Self::Norm, x: Self::Part<'_, f32>, out: Self::PartMut<'_, Self::Element>) -> Result<()>;

    /// `out = linear(x)`.
    fn multiply(
        &self,
        linear: &Self::Linear,
        x: Self::Part<'_, Self::Element>,
        out: Self::PartMut<'_, Self::Sum>,
    ) -> Result<()>;

    /// `x += linear(input)`.
    fn add(&self, linear: &Self::Linear, input: Self::Part<'_, Self::Element>, x: Self::PartMut<'_, f32>)
    -> Result<()>;

    /// `branch = linear(input)`, in f32 as the residual stream is.
    fn project(
        &self,
        linear: &Self::Linear,
        input: Self::Part<'_, Self::Element>,
        branch: Self::PartMut<'_, f32>,
    ) -> Result<()>;

    /// `x += norm(branch)` for every row.
    fn add_normed(&self, norm: &Self::Norm, branch: Self::Part<'_, f32>, x: Self::PartMut<'_, f32>) -> Result<()>;

    /// Splits q, k and v of the step's `rows`, norms and rotates them, writes k and v to their pages and q to `q`.
    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    fn prepare(
        &self,
        qkv: Self::Part<'_, Self::Sum>,
        cut: &Self::Cut<'_>,
        rows: Range<usize>,
        how: How<'_, Self>,
        q: Self::PartMut<'_, Self::Element>,
        kv: &mut Self::KvPages,
        layer: usize,
    ) -> Result<()>;

    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    fn attention(
        &self,
        q: Self::Part<'_, Self::Element>,
        kv: &Self::KvPages,
        layer: usize,
        cut: &Self::Cut<'_>,
        rule: Rule,
        out: Self::PartMut<'_, Self::Element>,
        log_sums: Option<Self::PartMut<'_, f32>>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// `out = activation(gate(x)) * up(x)`, or what there is of it.
    fn activate(
        &self,
        activated: &Self::Activated,
        x: Self::Part<'_, Self::Element>,
        out: Self::PartMut<'_, Self::Element>,
        kept: Option<Self::Kept<'_>>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    // ---- what is read in the end; `rows` of the residual stream ----

    /// `weight . norm(x) + bias` for each row.
    fn rewards(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        weight: &Self::Array<f32>,
        bias: f32,
        scratch: &mut Self::Scratch,
    ) -> Result<Floats>;

    /// Of each target as the token after its row two numbers: its log-probability, and 1 if greedy decoding takes it,
    /// else 0. Counted by parts.
    fn log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        targets: &[u32],
        scratch: &mut Self::Scratch,
        progress: &Progress,
    ) -> Result<Floats>;

    /// The likeliest tokens after each row, `count` of them: ids, and log-probabilities.
    fn top_log_probs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        count: usize,
        scratch: &mut Self::Scratch,
    ) -> Result<(Vec<u32>, Vec<f32>)>;

    /// All logits after each row, which stay in the scratch.
    fn logits(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: Vocabulary<'_, Self>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// Some of the rows of logits that are there, of so many tokens each.
    fn copy_logits(scratch: &Self::Scratch, rows: Range<usize>, vocabulary: usize) -> Result<Vec<Vec<f32>>>;

    /// Draws tokens from the rows of logits that are there, of so many tokens each.
    fn draw(
        &self,
        vocabulary: usize,
        draws: &[Draw<'_>],
        scratch: &mut Self::Scratch,
    ) -> Result<Vec<Result<Drawn, Undrawn>>>;
}

/// Where tokens' first rows come from.
pub(super) enum Embedding<'a, B: Backend> {
    Table(&'a B::Array<B::Element>),
    /// The language head holds the same numbers.
    Head(&'a B::Linear),
}

/// How q, k and v are made ready.
pub(super) struct How<'a, B: Backend> {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) q_norm: Option<&'a B::Norm>,
    pub(super) k_norm: Option<&'a B::Norm>,
    pub(super) rotary: &'a B::Rotary,
}

/// The residual stream, and the norm over it.
pub(super) struct Stream<'a, B: Backend> {
    pub(super) x: B::Part<'a, f32>,
    pub(super) width: usize,
    pub(super) norm: &'a B::Norm,
}

/// A language head.
pub(super) struct Vocabulary<'a, B: Backend> {
    pub(super) logits: &'a B::Linear,
    pub(super) softcap: Option<f32>,
    pub(super) size: usize,
}

/// A tape, where there is to be one.
pub(super) type TapeMut<'a, B> = Option<&'a mut (dyn Tape<B> + 'static)>;

/// What keeps what the gradient of a layer needs of its forward pass. `total` is the number of the step's rows.
pub(super) trait Tape<B: Backend> {
    /// The residual stream before the layer.
    fn keep_input(&mut self, x: B::Part<'_, f32>) -> Result<()>;
    /// q, k and v before their norms, of these rows.
    fn keep_qkv(&mut self, qkv: B::Part<'_, B::Sum>, rows: Range<usize>, total: usize) -> Result<()>;
    /// Where to put the natural logarithms of the sums of so many rows and heads, if the way back asks for them.
    fn log_sums(&mut self, len: usize) -> Result<Option<B::PartMut<'_, f32>>>;
    /// Queries and what attention made of them, for which others are given.
    fn keep_attention(&mut self, q: &mut B::Array<B::Element>, attended: &mut B::Array<B::Element>);
    /// The attention's result before its norm, of these rows.
    fn keep_attention_branch(&mut self, branch: B::Part<'_, f32>, rows: Range<usize>, total: usize) -> Result<()>;
    /// The residual stream before the feed-forward.
    fn keep_middle(&mut self, x: B::Part<'_, f32>) -> Result<()>;
    /// Where to put what the non-linearity of these rows is given.
    fn kept(&mut self, rows: Range<usize>, total: usize, width: usize, gated: bool) -> Result<B::Kept<'_>>;
    /// The feed-forward's result before its norm, of these rows.
    fn keep_mlp_branch(&mut self, branch: B::Part<'_, f32>, rows: Range<usize>, total: usize) -> Result<()>;
}
