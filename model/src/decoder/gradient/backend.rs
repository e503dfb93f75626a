//! What the way back asks of the device on which a decoder computes, beyond what the way there does.
//!
//! As there, the way is written once; a gradient goes into an array that is as long as the list of weights.

use std::fmt::Debug;
use std::ops::Range;

use plumb_kernels::attention::{Rule, Span};
use plumb_kernels::gradient::{AdamW, TopK};

use super::super::Device;
use super::super::backend::{Backend, How, Number, Stream};
use super::numbers::Numbers;
use super::parameters::{LayerRanges, Parameters};
use super::set::New;
use crate::Result;

/// A device on which gradients are computed.
pub(in super::super) trait Gradients: Backend {
    /// A linear layer as gradients go back through it, where that is not the layer itself.
    type Back: Debug + Send + Sync;
    /// An activated layer, the same way.
    type ActivatedBack: Debug + Send + Sync;
    /// What a layer's non-linearity is given, and later the gradient of that.
    type Activations: Debug + Send + Sync;
    /// Which rows of a step hold the keys of which pages, for all layers.
    type Keys<'a>;
    /// What is needed on the way, kept from one layer, and step, to the next.
    type Room: Debug + Send + Sync;

    /// Rows whose losses on the vocabulary are computed together.
    const LANGUAGE_ROWS: usize;
    /// Whether the way back through attention takes the logarithms of its sums.
    const LOG_SUMS: bool;

    /// That of a device, on which layers compute the same bits whether they leave something for the way back or not.
    fn for_gradients(device: &Device) -> Result<Self>;
    fn room(&self) -> Self::Room;
    /// Bytes that it takes.
    fn room_bytes(room: &Self::Room) -> usize;

    // ---- numbers ----

    /// Numbers that are where this computes.
    fn list(numbers: &Numbers) -> Option<&Self::Array<f32>>;
    fn list_mut(numbers: &mut Numbers) -> Option<&mut Self::Array<f32>>;

    /// A list of numbers of the process, where this computes.
    fn with_list<R>(&self, values: &[f32], f: impl FnOnce(Self::Part<'_, f32>) -> Result<R>) -> Result<R>;
    fn within<'a>(part: &'a Self::Part<'_, f32>, range: Range<usize>) -> Self::Part<'a, f32>;
    fn within_mut<'a, T: Number>(part: &'a mut Self::PartMut<'_, T>, range: Range<usize>) -> Self::PartMut<'a, T>;
    fn len<T: Number>(part: Self::Part<'_, T>) -> usize;
    /// Numbers for the process.
    fn read(&self, part: Self::Part<'_, f32>) -> Result<Vec<f32>>;
    fn copy(&self, from: Self::Part<'_, f32>, to: Self::PartMut<'_, f32>) -> Result<()>;
    fn round(&self, from: Self::Part<'_, f32>, to: Self::PartMut<'_, Self::Element>) -> Result<()>;
    fn round_sums(&self, from: Self::Part<'_, Self::Sum>, to: Self::PartMut<'_, Self::Element>) -> Result<()>;
    fn clear(&self, x: Self::PartMut<'_, f32>) -> Result<()>;
    /// `sum += x`.
    fn accumulate(&self, x: Self::Part<'_, f32>, sum: Self::PartMut<'_, f32>) -> Result<()>;
    /// An optimiser's step; the new weights are rounded to `rounded` too, if that is given.
    fn update(
        &self,
        how: &AdamW,
        weights: Self::PartMut<'_, f32>,
        gradient: Self::Part<'_, f32>,
        means: [Self::PartMut<'_, f32>; 2],
        rounded: Option<Self::PartMut<'_, Self::Element>>,
    ) -> Result<()>;

    // ---- what a model is made of ----

    fn back(&self) -> Self::Back;
    /// Bytes that it takes.
    fn back_bytes(back: &Self::Back) -> usize;
    fn activated_back(&self) -> Self::ActivatedBack;
    /// Bytes that it takes.
    fn activated_back_bytes(back: &Self::ActivatedBack) -> usize;
    fn activations(&self) -> Self::Activations;
    /// Bytes that they take.
    fn activations_bytes(activations: &Self::Activations) -> usize;
    /// Where an activated layer puts what its non-linearity is given, of these of `total` rows.
    fn kept<'a>(
        &self,
        activations: &'a mut Self::Activations,
        rows: Range<usize>,
        total: usize,
        width: usize,
        gated: bool,
    ) -> Result<Self::Kept<'a>>;

    /// Takes new weights `[outputs, inputs]`, and biases where there are some: ranges of the list.
    fn set_linear(
        &self,
        linear: &mut Self::Linear,
        back: &mut Self::Back,
        inputs: usize,
        new: &mut New<'_, Self>,
        ranges: [&Range<usize>; 2],
    ) -> Result<()>;
    /// The same for up and gate.
    fn set_activated(
        &self,
        activated: &mut Self::Activated,
        back: &mut Self::ActivatedBack,
        inputs: usize,
        new: &mut New<'_, Self>,
        ranges: &LayerRanges,
    ) -> Result<()>;
    /// Takes new weights, to which `offset` is added, and the biases behind them where there are some.
    fn set_norm(&self, norm: &mut Self::Norm, values: Self::Part<'_, f32>, offset: f32) -> Result<()>;

    // ---- the way back ----

    /// From the gradient of a layer's result that of what it was given.
    fn multiply_back(
        &self,
        linear: &Self::Linear,
        back: &Self::Back,
        dy: Self::Part<'_, Self::Element>,
        dx: Self::PartMut<'_, f32>,
    ) -> Result<()>;

    /// Of these rows of an activated layer: from the gradient `d` of its result that of what it was given, `dx`. Its result
    /// goes to `inner`, and the gradient of what its non-linearity was given takes the place of that.
    #[expect(clippy::too_many_arguments, reason = "what it reads, and what it writes")]
    fn activate_back(
        &self,
        activated: &Self::Activated,
        back: &Self::ActivatedBack,
        activations: &mut Self::Activations,
        rows: Range<usize>,
        d: Self::Part<'_, f32>,
        inner: Self::PartMut<'_, Self::Element>,
        dx: Self::PartMut<'_, f32>,
    ) -> Result<()>;

    /// Adds the gradients of an activated layer's weights and biases, once its activations are gradients: those of `rows`
    /// rows, which the layer was given as `x`.
    #[expect(clippy::too_many_arguments, reason = "what it reads, and what it writes")]
    fn add_activated(
        &self,
        activated: &Self::Activated,
        x: Self::Part<'_, Self::Element>,
        activations: &Self::Activations,
        rows: usize,
        gradient: &mut Self::Array<f32>,
        ranges: &LayerRanges,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// `sums[outputs, inputs] += dy[rows, outputs]^T x[rows, inputs]`.
    fn add_outer(
        &self,
        x: Self::Part<'_, Self::Element>,
        inputs: usize,
        dy: Self::Part<'_, Self::Element>,
        sums: Self::PartMut<'_, f32>,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// `sums[columns] += ` the sum over rows of `x[rows, columns]`.
    fn add_columns(
        &self,
        x: Self::Part<'_, Self::Element>,
        sums: Self::PartMut<'_, f32>,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// Adds rows, times a factor, to those rows of `sums[_, width]` that `to` names.
    fn add_rows(
        &self,
        x: Self::Part<'_, f32>,
        to: &[u32],
        factor: f32,
        sums: Self::PartMut<'_, f32>,
        width: usize,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// Adds the gradients of what a norm was given, `x`, to `dx`, and those of its weights to `d_weights`.
    fn norm_back(
        &self,
        norm: &Self::Norm,
        x: Self::Part<'_, f32>,
        dy: Self::Part<'_, f32>,
        dx: Self::PartMut<'_, f32>,
        d_weights: Self::PartMut<'_, f32>,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// Sorts out a step's spans, for `group` query heads a key head.
    fn keys<'a>(&self, spans: &[Span<'a>], group: usize, room: &mut Self::Room) -> Result<Self::Keys<'a>>;

    /// Gradients of q, k and v as attention was given them, from that of its result.
    fn attention_back(
        &self,
        from: Attended<'_, Self>,
        keys: &Self::Keys<'_>,
        rule: Rule,
        d_out: Self::Part<'_, Self::Element>,
        dqkv: Self::PartMut<'_, f32>,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// Those of q, k and v as they were projected, `qkv`; where they have norms, these were given `before`, and the
    /// gradients of their weights, q's before k's, are added to `d_norms`.
    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    fn unprepare(
        &self,
        dqkv: Self::Part<'_, f32>,
        before: Self::Part<'_, Self::Element>,
        keys: &Self::Keys<'_>,
        how: How<'_, Self>,
        d_norms: Self::PartMut<'_, f32>,
        qkv: Self::PartMut<'_, Self::Element>,
        room: &mut Self::Room,
    ) -> Result<()>;

    // ---- what the decoder ends in; `rows` of the residual stream ----

    /// The reward of each row into `rewards`, and, where they are wanted, the gradients of `weight * softplus(rejected -
    /// chosen)` of rows in pairs, chosen before rejected.
    #[expect(clippy::too_many_arguments, reason = "what it reads, and what it writes")]
    fn pairs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: RewardHead<'_, Self>,
        weight: f32,
        rewards: Self::PartMut<'_, f32>,
        sums: Option<Sums<'_, Self>>,
        room: &mut Self::Room,
    ) -> Result<()>;

    /// The loss of each row, in nats, into `losses`, and their gradients, times `weights`, where they are wanted.
    #[expect(clippy::too_many_arguments, reason = "what it reads, and what it writes")]
    fn losses(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: VocabularyBack<'_, Self>,
        targets: &Targets<'_>,
        weights: &[f32],
        losses: Self::PartMut<'_, f32>,
        sums: Option<Sums<'_, Self>>,
        room: &mut Self::Room,
    ) -> Result<()>;
}

/// What attention read, and what it made of it.
pub(in super::super) struct Attended<'a, B: Backend> {
    pub(in super::super) q: B::Part<'a, B::Element>,
    pub(in super::super) kv: &'a B::KvPages,
    pub(in super::super) layer: usize,
    #[cfg_attr(not(feature = "gpu"), expect(dead_code, reason = "the CPU goes over the keys again"))]
    pub(in super::super) out: B::Part<'a, B::Element>,
    /// Nothing, unless [`Gradients::LOG_SUMS`].
    #[cfg_attr(not(feature = "gpu"), expect(dead_code, reason = "the CPU goes over the keys again"))]
    pub(in super::super) log_sums: B::Part<'a, f32>,
}

/// A reward head, `weight . x + bias`.
pub(in super::super) struct RewardHead<'a, B: Backend> {
    pub(in super::super) weight: &'a B::Array<f32>,
    pub(in super::super) bias: f32,
}

/// A language head, and the way back through it.
pub(in super::super) struct VocabularyBack<'a, B: Gradients> {
    pub(in super::super) logits: &'a B::Linear,
    pub(in super::super) back: &'a B::Back,
    pub(in super::super) softcap: Option<f32>,
    pub(in super::super) size: usize,
}

/// Where gradients of what a decoder ends in go.
pub(in super::super) struct Sums<'a, B: Backend> {
    /// That of the residual stream, `[rows, hidden]`.
    pub(in super::super) dx: B::PartMut<'a, f32>,
    /// Those of the weights.
    pub(in super::super) gradient: &'a mut B::Array<f32>,
    pub(in super::super) ranges: &'a Parameters,
}

/// What the log-probabilities of rows are compared with.
pub(in super::super) enum Targets<'a> {
    /// The next token after each.
    Tokens(Vec<u32>),
    /// A teacher's likeliest tokens after each.
    Teachers(Vec<TopK<'a>>),
}
