//! How a loss changes with a decoder's weights.
//!
//! A [`Trainable`] runs the same layers as a served [`Decoder`](super::Decoder) and keeps what they computed on a tape;
//! going back over it gives the gradient of every weight. Weights live outside, in f32, as one list of numbers
//! ([`Parameters`]), of which the decoder holds a copy that is packed and rounded to its type. A gradient has the same
//! bits on any number of threads.

mod backward;
mod batch;
mod heads;
mod parameters;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use half::bf16;
use plumb_kernels::attention::KvPages;
use plumb_kernels::gradient::{Keys, Outer, add_rows};
use plumb_kernels::linear::{Linear, Matrix, Rows};
use plumb_kernels::norm::Norm;
use plumb_kernels::parallel::with_team;

pub use batch::{Group, Language, Outcome, Sequence};
pub use parameters::{Parameter, Parameters};

use super::backend::{Backend, Tape};
use super::build::{Load, interleaved};
use super::cpu::{Cpu, Kepts, resize};
use super::forward::{Buffers, spans};
use super::{DType, Head, Stack};
use crate::checkpoint::Weights;
use crate::config::{self, Config};
use crate::{Error, Result};
use backward::{Backward, Scratch, Transposed};
use batch::Plan;
use heads::HeadBuffers;
use parameters::LayerRanges;

#[derive(Debug)]
enum Typed<A, B> {
    F32(A),
    Bf16(B),
}

/// A decoder whose weights change.
#[derive(Debug)]
pub struct Trainable(Typed<Box<Inner<f32>>, Box<Inner<bf16>>>);

/// What a gradient costs in memory and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainOptions {
    /// Gives a reward model a vocabulary head too, for the auxiliary loss (Askell et al. 2021, equation C.1).
    pub language_head: bool,
    /// Keeps only each layer's input and computes the layer again on the way back: a third more time, a fraction of the
    /// memory.
    pub checkpointing: bool,
}

/// Tells how the loss changes with each reward, in the order of the sequences that want one.
pub type RewardSlopes<'a> = dyn FnMut(&[f32]) -> Vec<f32> + Send + 'a;

macro_rules! each_type {
    ($this:expr, $inner:ident => $body:expr) => {
        match &mut $this.0 {
            Typed::F32($inner) => $body,
            Typed::Bf16($inner) => $body,
        }
    };
}

impl Trainable {
    /// A decoder with the weights `values`, in the order of its [`Parameters`], for sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// If the decoder cannot be built, such as for a hidden size that is odd.
    pub fn new(config: &Config, values: &[f32], dtype: DType, positions: usize, options: TrainOptions) -> Result<Self> {
        Ok(Self(match dtype {
            DType::F32 => Typed::F32(Box::new(Inner::new(config, values, positions, options)?)),
            DType::Bf16 => Typed::Bf16(Box::new(Inner::new(config, values, positions, options)?)),
        }))
    }

    /// Takes new weights.
    ///
    /// # Panics
    /// If there are more or fewer than before.
    pub fn set(&mut self, values: &[f32]) {
        with_team(|| each_type!(self, inner => inner.set(values)));
    }

    /// Where the weights are in their list.
    pub fn parameters(&self) -> &Parameters {
        match &self.0 {
            Typed::F32(inner) => &inner.parameters,
            Typed::Bf16(inner) => &inner.parameters,
        }
    }

    /// Computes the rewards and losses of all sequences, in their order.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    pub fn evaluate(&mut self, groups: &[Group<'_>]) -> Result<Vec<Outcome>> {
        with_team(|| each_type!(self, inner => inner.run(groups, None)))
    }

    /// As [`Trainable::evaluate`], and adds to `gradient`, in the order of the weights, how the sum of all losses changes
    /// with each weight: the rows' losses by their weights, and a loss on the rewards whose slopes `rewards` tells.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    ///
    /// # Panics
    /// If `gradient` is not as long as the list of weights, or there is not one slope for each reward.
    pub fn gradient(
        &mut self,
        groups: &[Group<'_>],
        rewards: &mut RewardSlopes<'_>,
        gradient: &mut [f32],
    ) -> Result<Vec<Outcome>> {
        with_team(|| each_type!(self, inner => inner.run(groups, Some((rewards, gradient)))))
    }

    /// Bytes that the copies of the weights, the tape and all buffers take.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Typed::F32(inner) => inner.bytes(),
            Typed::Bf16(inner) => inner.bytes(),
        }
    }
}

/// A decoder of one type.
#[derive(Debug)]
struct Inner<E: Load> {
    stack: Stack<Cpu<E>>,
    parameters: Parameters,
    transposed: Vec<Transposed<E>>,
    /// The vocabulary head of a reward model.
    language_head: Option<Linear<E>>,
    /// The vocabulary head, whichever it is, the other way round.
    transposed_head: Linear<E>,
    checkpointing: bool,
    kv: KvPages<E>,
    buffers: Buffers<Cpu<E>>,
    /// One for every layer, or one for all with checkpointing.
    tapes: Vec<Kepts<E>>,
    /// With checkpointing, the residual stream before each layer.
    inputs: Vec<Vec<f32>>,
    heads: HeadBuffers<E>,
    scratch: Scratch<E>,
}

impl<E: Load> Inner<E> {
    fn new(config: &Config, values: &[f32], positions: usize, options: TrainOptions) -> Result<Self> {
        let parameters = Parameters::new(config, options.language_head);
        if values.len() != parameters.len() {
            return Err(Error::InvalidInput(format!("{} weights for {}", values.len(), parameters.len())));
        }
        let tensors = parameters.list().iter().map(|parameter| {
            let values = &values[parameter.range.clone()];
            Ok((parameter.name.clone(), Tensor::from_slice(values, &parameter.shape[..], &Device::Cpu)?))
        });
        let tensors: BTreeMap<String, Tensor> = tensors.collect::<Result<_>>()?;
        let stack = Stack::build(Cpu::default(), config, &mut Weights::from_tensors(tensors), positions)?;
        let hidden = config.hidden_size;
        let language_head = match config.head {
            config::Head::Reward(_) if options.language_head => {
                let rows = vec![E::default(); config.vocab_size * hidden];
                Some(Linear::new(&[Matrix { weights: Rows::Plain(&rows), bias: None }], hidden)?)
            }
            _ => None,
        };
        let mut inner = Self {
            transposed: parameters.layers.iter().map(|_| Transposed::default()).collect(),
            parameters,
            language_head,
            transposed_head: Linear::empty(),
            checkpointing: options.checkpointing,
            kv: KvPages::new(config.num_layers, config.num_kv_heads, config.head_dim, 0)?,
            buffers: Buffers::new(&Cpu::default()),
            tapes: Vec::new(),
            inputs: Vec::new(),
            heads: HeadBuffers::default(),
            scratch: Scratch::default(),
            stack,
        };
        inner.set(values);
        Ok(inner)
    }

    fn set(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.parameters.len(), "as many weights as before");
        let Self { stack, parameters, .. } = self;
        let hidden = stack.config.hidden_size;
        let offset = match stack.config.norm {
            config::Norm::Rms { offset, .. } => offset,
            config::Norm::Layer { .. } => 0.0,
        };
        let set_norm = |norm: &mut Norm, range: &std::ops::Range<usize>| match norm {
            Norm::Rms { weight, .. } => {
                weight.iter_mut().zip(&values[range.clone()]).for_each(|(w, value)| *w = value + offset);
            }
            Norm::Layer { weight, bias, .. } => {
                let (weights, biases) = values[range.clone()].split_at(weight.len());
                weight.copy_from_slice(weights);
                bias.copy_from_slice(biases);
            }
        };
        for ((layer, ranges), back) in stack.layers.iter_mut().zip(&parameters.layers).zip(&mut self.transposed) {
            set_norm(&mut layer.attention_norm, &ranges.attention_norm);
            set_norm(&mut layer.mlp_norm, &ranges.mlp_norm);
            let optional = [
                (&mut layer.q_norm, &ranges.q_norm),
                (&mut layer.k_norm, &ranges.k_norm),
                (&mut layer.attention_post_norm, &ranges.attention_post_norm),
                (&mut layer.mlp_post_norm, &ranges.mlp_post_norm),
            ];
            for (norm, range) in optional {
                if let Some(norm) = norm {
                    set_norm(norm, range);
                }
            }
            let (mut qkv, mut qkv_bias) = (&values[ranges.qkv.clone()], &values[ranges.qkv_bias.clone()]);
            let ordered;
            if ranges.interleaved {
                let (heads, dim) = (stack.config.num_heads, stack.config.head_dim);
                let in_order = |values: &[f32], width: usize| -> Vec<f32> {
                    let rows = |start: usize| &values[start * width..(start + dim) * width];
                    interleaved(heads, dim).flat_map(rows).copied().collect()
                };
                let bias = if qkv_bias.is_empty() { Vec::new() } else { in_order(qkv_bias, 1) };
                ordered = (in_order(qkv, hidden), bias);
                (qkv, qkv_bias) = (&ordered.0, &ordered.1);
            }
            layer.qkv.refill(0, qkv);
            layer.output.refill(0, &values[ranges.output.clone()]);
            let gate = (!ranges.gate.is_empty()).then(|| &values[ranges.gate.clone()]);
            layer.up.refill(&values[ranges.up.clone()], gate);
            layer.down.refill(0, &values[ranges.down.clone()]);
            if !qkv_bias.is_empty() {
                layer.qkv.refill_bias(qkv_bias);
            }
            if !ranges.output_bias.is_empty() {
                layer.output.refill_bias(&values[ranges.output_bias.clone()]);
            }
            if !ranges.up_bias.is_empty() {
                let gate = (!ranges.gate_bias.is_empty()).then(|| &values[ranges.gate_bias.clone()]);
                layer.up.refill_bias(&values[ranges.up_bias.clone()], gate);
                layer.down.refill_bias(&values[ranges.down_bias.clone()]);
            }
            back.set(values, ranges, qkv, &stack.config);
        }
        set_norm(&mut stack.final_norm, &parameters.final_norm);
        let head = &values[parameters.language_head.clone()];
        if let Some(embedding) = &mut stack.embedding {
            plumb_kernels::element::round_all(&values[parameters.embedding.clone()], embedding);
        }
        match (&mut stack.head, &mut self.language_head) {
            (Head::Language { logits, .. }, _) => logits.refill(0, head),
            (Head::Reward { weight, bias, .. }, language_head) => {
                weight.copy_from_slice(&values[parameters.score.clone()]);
                if let [value] = values[parameters.score_bias.clone()] {
                    *bias = value;
                }
                if let Some(logits) = language_head {
                    logits.refill(0, head);
                }
            }
        }
        if !head.is_empty() {
            self.transposed_head.fill_transposed_f32(head, hidden);
        }
    }

    /// Forwards, and backwards if a gradient is wanted.
    fn run(
        &mut self,
        groups: &[Group<'_>],
        gradient: Option<(&mut RewardSlopes<'_>, &mut [f32])>,
    ) -> Result<Vec<Outcome>> {
        let plan = Plan::new(groups);
        let step = plan.step();
        step.sequences.iter().try_for_each(|sequence| self.stack.check(sequence))?;
        self.check(&plan)?;
        if plan.rows() == 0 {
            return Ok(Vec::new());
        }
        let config = &self.stack.config;
        let (rows, hidden, layers) = (plan.rows(), config.hidden_size, config.num_layers);
        if self.kv.pages() < plan.pages() {
            self.kv = KvPages::new(layers, config.num_kv_heads, config.head_dim, plan.pages())?;
        }
        let cut = self.stack.backend.cut(config, &step, None)?;
        self.stack.embed(&step, rows, &mut self.buffers)?;
        let backwards = gradient.is_some();
        if backwards {
            self.tapes.resize_with(if self.checkpointing { 1 } else { layers }, Kepts::default);
            self.inputs.resize_with(if self.checkpointing { layers } else { 0 }, Vec::new);
        }
        for layer in 0..layers {
            let tape = match self.checkpointing {
                false if backwards => Some(&mut self.tapes[layer] as &mut dyn Tape<Cpu<E>>),
                true if backwards => {
                    let x = &self.buffers.x[..rows * hidden];
                    resize(&mut self.inputs[layer], rows * hidden).copy_from_slice(x);
                    None
                }
                _ => None,
            };
            self.stack.layer(layer, &cut, &mut self.kv, &mut self.buffers, tape)?;
        }

        let Some((slopes, gradient)) = gradient else { return self.heads(&plan, None) };
        assert_eq!(gradient.len(), self.parameters.len(), "as long a gradient as the list of weights");
        resize(&mut self.scratch.dx, rows * hidden).fill(0.0);
        let outcomes = self.heads(&plan, Some((slopes, gradient)))?;
        let spans = spans(&step);
        let keys = Keys::new(&spans);
        for layer in (0..layers).rev() {
            if self.checkpointing {
                let x = &self.inputs[layer][..rows * hidden];
                self.buffers.x[..rows * hidden].copy_from_slice(x);
                let tape: &mut dyn Tape<Cpu<E>> = &mut self.tapes[0];
                self.stack.layer(layer, &cut, &mut self.kv, &mut self.buffers, Some(tape))?;
            }
            let tape = &mut self.tapes[if self.checkpointing { 0 } else { layer }];
            let back = Backward {
                stack: &self.stack,
                index: layer,
                transposed: &self.transposed[layer],
                ranges: &self.parameters.layers[layer],
                keys: &keys,
                kv: &self.kv,
            };
            back.run(tape, &mut self.scratch, gradient);
        }
        let ids: Vec<u32> = step.sequences.iter().flat_map(|s| s.tokens).copied().collect();
        // Rows were multiplied by this, and so are their gradients.
        let scale = E::from_f32(self.stack.config.embedding_scale).to_f32();
        let d_embedding = &mut gradient[self.parameters.embedding.clone()];
        add_rows(&self.scratch.dx[..rows * hidden], &ids, scale, d_embedding, hidden);
        Ok(outcomes)
    }

    /// What the heads would panic on.
    fn check(&self, plan: &Plan<'_>) -> Result<()> {
        let invalid = |message: String| Err(Error::InvalidInput(message));
        for sequence in plan.sequences().iter().map(|placed| &placed.sequence) {
            let tokens = sequence.tokens.len();
            if sequence.reward && self.parameters.score.is_empty() {
                return invalid("a language model has no reward head".into());
            }
            let (rows, ids): (_, &[u32]) = match &sequence.language {
                Language::Nothing => continue,
                Language::Next { rows, .. } => (rows.clone(), &[]),
                Language::Teacher { first, top, ids, log_probs, .. } => {
                    if *top == 0 || ids.len() % top != 0 || ids.len() != log_probs.len() {
                        return invalid(format!("{} ids and {} log-probabilities", ids.len(), log_probs.len()));
                    }
                    (*first..first + ids.len() / top, ids)
                }
            };
            if self.parameters.language_head.is_empty() {
                return invalid("the model was built without a vocabulary head".into());
            }
            let last = if matches!(sequence.language, Language::Next { .. }) { tokens - 1 } else { tokens };
            if rows.end > last {
                return invalid(format!("rows {rows:?} of {tokens} tokens"));
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= self.stack.config.vocab_size) {
                return invalid(format!("token {id} is outside the vocabulary of {}", self.stack.config.vocab_size));
            }
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let config = &self.stack.config;
        let head = self.language_head.as_ref().map_or(0, Linear::bytes) + self.transposed_head.bytes();
        let page = KvPages::<E>::page_bytes(config.num_layers, config.num_kv_heads, config.head_dim);
        self.stack.size().1 as usize
            + self.transposed.iter().map(Transposed::bytes).sum::<usize>()
            + head
            + self.kv.pages() * page
            + self.buffers.bytes()
            + self.tapes.iter().map(Kepts::bytes).sum::<usize>()
            + self.inputs.iter().map(|x| x.capacity() * 4).sum::<usize>()
            + self.heads.bytes()
            + self.scratch.bytes()
    }
}
