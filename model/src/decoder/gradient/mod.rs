//! How a loss changes with a decoder's weights.
//!
//! A [`Trainable`] runs the same layers as a served [`Decoder`](super::Decoder) and keeps what they computed on a tape;
//! going back over it gives the gradient of every weight. Weights live outside, in f32, as one list of numbers
//! ([`Parameters`]), of which the decoder holds a copy that is packed and rounded to its type. A gradient has the same
//! bits on any number of threads.

mod backend;
mod backward;
mod batch;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
mod heads;
mod numbers;
mod parameters;
mod peers;
mod set;
mod tape;

use std::collections::BTreeMap;
use std::fmt::Debug;

use candle_core::Tensor;
use plumb_kernels::Element;
use plumb_kernels::gradient::AdamW;
use plumb_kernels::linear::{Matrix, Rows};

pub use batch::{Group, Language, Outcome, Sequence};
pub use numbers::Numbers;
pub use parameters::{Parameter, Parameters};
pub use peers::{MeetingId, Peers};

use super::backend::Tape;
use super::forward::{Buffers, spans};
use super::step::Step;
use super::{DType, Device, Head, Stack, on};
use crate::checkpoint::Weights;
use crate::config::{self, Config};
use crate::{Error, Result};
use backend::Gradients;
use backward::{Backs, Backward, Scratch};
use batch::Plan;
use heads::Results;
use numbers::elsewhere;
use parameters::LayerRanges;
use set::{New, Stepped};
use tape::Kepts;

/// A decoder whose weights change.
#[derive(Debug)]
pub struct Trainable(Box<dyn Trains>);

/// What a gradient costs in memory and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainOptions {
    /// Gives a reward model a vocabulary head too, for the auxiliary loss (Askell et al. 2021, equation C.1).
    pub language_head: bool,
    /// Keeps only each layer's input and computes the layer again on the way back: a third more time, a fraction of the
    /// memory.
    pub checkpointing: bool,
}

impl Trainable {
    /// A decoder with the weights `values`, in the order of its [`Parameters`], for sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// If the decoder cannot be built, such as for a hidden size that is odd, or the device has no memory for it.
    pub fn new(
        config: &Config,
        values: &[f32],
        dtype: DType,
        positions: usize,
        options: TrainOptions,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self(on!(device, dtype, B => Box::new(Inner::<B>::new(device, config, values, positions, options)?))))
    }

    /// Takes new weights.
    ///
    /// # Errors
    /// If a GPU has failed.
    ///
    /// # Panics
    /// If there are more or fewer than before.
    pub fn set(&mut self, values: &Numbers) -> Result<()> {
        self.0.set(values)
    }

    /// Takes an optimiser's step: changes weights by their gradient and its running means `[mean, square]`, tensor by tensor
    /// as `how` says, and takes them as they are made.
    ///
    /// # Errors
    /// If the numbers are on another device, or a GPU has failed.
    ///
    /// # Panics
    /// If there are more or fewer than weights.
    pub fn step(
        &mut self,
        weights: &mut Numbers,
        gradient: &Numbers,
        means: [&mut Numbers; 2],
        how: &dyn Fn(&Parameter) -> AdamW,
    ) -> Result<()> {
        self.0.step(weights, gradient, means, how)
    }

    /// Where the weights are in their list.
    pub fn parameters(&self) -> &Parameters {
        self.0.parameters()
    }

    /// Computes the rewards and losses of all sequences, in their order.
    ///
    /// # Errors
    /// If a sequence does not fit the model, or a GPU has failed.
    pub fn evaluate(&mut self, groups: &[Group<'_>]) -> Result<Vec<Outcome>> {
        self.0.evaluate(groups)
    }

    /// Adds to `gradient`, in the order of the weights, how the sum of all losses changes with each weight: the rows'
    /// losses by their weights, and by `pair_weight` `softplus(r_rejected - r_chosen)` (Askell et al. 2021, equation 3.1)
    /// of the sequences with a reward, which are pairs in their order, chosen before rejected. A GPU is not waited for;
    /// [`Trainable::outcomes`] tells what came of the sequences.
    ///
    /// # Errors
    /// If a sequence does not fit the model, one of a pair is missing, the gradient is on another device, or a GPU has
    /// failed.
    ///
    /// # Panics
    /// If `gradient` is not as long as the list of weights.
    pub fn gradient(&mut self, groups: &[Group<'_>], pair_weight: f32, gradient: &mut Numbers) -> Result<()> {
        self.0.gradient(groups, pair_weight, gradient)
    }

    /// The rewards and losses of all sequences of all gradients since it was asked last, in their order, once they are
    /// computed.
    ///
    /// # Errors
    /// If a GPU has failed.
    pub fn outcomes(&mut self) -> Result<Vec<Outcome>> {
        self.0.outcomes()
    }

    /// Bytes that the copies of the weights, the tape and all buffers take.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// A decoder, whatever it computes on and in.
trait Trains: Debug + Send {
    fn set(&mut self, values: &Numbers) -> Result<()>;
    fn step(
        &mut self,
        weights: &mut Numbers,
        gradient: &Numbers,
        means: [&mut Numbers; 2],
        how: &dyn Fn(&Parameter) -> AdamW,
    ) -> Result<()>;
    fn parameters(&self) -> &Parameters;
    fn evaluate(&mut self, groups: &[Group<'_>]) -> Result<Vec<Outcome>>;
    fn gradient(&mut self, groups: &[Group<'_>], pair_weight: f32, gradient: &mut Numbers) -> Result<()>;
    fn outcomes(&mut self) -> Result<Vec<Outcome>>;
    fn bytes(&self) -> usize;
}

impl<B: Gradients> Trains for Inner<B> {
    fn set(&mut self, values: &Numbers) -> Result<()> {
        assert_eq!(values.len(), self.parameters.len(), "as many weights as before");
        B::run(|| match B::list(values) {
            Some(list) => Inner::set(self, New::There(B::part(list, 0..values.len()))),
            None => {
                let backend = self.stack.backend.clone();
                backend.with_list(&values.to_host()?, |values| Inner::set(self, New::There(values)))
            }
        })
    }

    fn step(
        &mut self,
        weights: &mut Numbers,
        gradient: &Numbers,
        [mean, square]: [&mut Numbers; 2],
        how: &dyn Fn(&Parameter) -> AdamW,
    ) -> Result<()> {
        let lengths = [weights.len(), gradient.len(), mean.len(), square.len()];
        assert_eq!(lengths, [self.parameters.len(); 4], "numbers of a step");
        let steps = self.parameters.list().iter().map(|parameter| (parameter.range.clone(), Some(how(parameter))));
        let stepped = Stepped {
            weights: B::list_mut(weights).ok_or_else(elsewhere)?,
            gradient: B::list(gradient).ok_or_else(elsewhere)?,
            means: [B::list_mut(mean).ok_or_else(elsewhere)?, B::list_mut(square).ok_or_else(elsewhere)?],
            steps: steps.collect(),
        };
        B::run(|| Inner::set(self, New::Stepped(stepped)))
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn evaluate(&mut self, groups: &[Group<'_>]) -> Result<Vec<Outcome>> {
        B::run(|| {
            let results = Inner::run(self, groups, None)?;
            self.read(results)
        })
    }

    fn gradient(&mut self, groups: &[Group<'_>], pair_weight: f32, gradient: &mut Numbers) -> Result<()> {
        let gradient = B::list_mut(gradient).ok_or_else(elsewhere)?;
        B::run(|| {
            let results = Inner::run(self, groups, Some((pair_weight, gradient)))?;
            self.unread.extend(results);
            Ok(())
        })
    }

    fn outcomes(&mut self) -> Result<Vec<Outcome>> {
        let unread = std::mem::take(&mut self.unread);
        self.read(unread)
    }

    fn bytes(&self) -> usize {
        Inner::bytes(self)
    }
}

/// A decoder of one kind.
#[derive(Debug)]
struct Inner<B: Gradients> {
    stack: Stack<B>,
    parameters: Parameters,
    backs: Vec<Backs<B>>,
    /// The vocabulary head of a reward model.
    language_head: Option<B::Linear>,
    /// The way back through the vocabulary head, whichever it is.
    head_back: B::Back,
    checkpointing: bool,
    kv: B::KvPages,
    pages: usize,
    buffers: Buffers<B>,
    /// Of the last step.
    used: Option<B::Used>,
    /// One for every layer, or one for all with checkpointing.
    tapes: Vec<Kepts<B>>,
    /// With checkpointing, the residual stream before each layer.
    inputs: Vec<B::Array<f32>>,
    /// q, k and v in the decoder's order, and their biases, where a checkpoint has another.
    ordered: B::Array<f32>,
    scratch: Scratch<B>,
    /// Of gradients.
    unread: Vec<Results<B>>,
    /// For results.
    spare: Vec<B::Array<f32>>,
}

impl<B: Gradients> Inner<B> {
    fn new(device: &Device, config: &Config, values: &[f32], positions: usize, options: TrainOptions) -> Result<Self> {
        let parameters = Parameters::new(config, options.language_head);
        if values.len() != parameters.len() {
            return Err(Error::InvalidInput(format!("{} weights for {}", values.len(), parameters.len())));
        }
        let tensors = parameters.list().iter().map(|parameter| {
            let values = &values[parameter.range.clone()];
            Ok((parameter.name.clone(), Tensor::from_slice(values, &parameter.shape[..], &candle_core::Device::Cpu)?))
        });
        let tensors: BTreeMap<String, Tensor> = tensors.collect::<Result<_>>()?;
        let backend = B::for_gradients(device)?;
        let stack = Stack::build(backend.clone(), config, &mut Weights::from_tensors(tensors), positions)?;
        let hidden = config.hidden_size;
        let language_head = match config.head {
            config::Head::Reward(_) if options.language_head => {
                let rows = vec![B::Element::default(); config.vocab_size * hidden];
                Some(backend.linear(&[Matrix { weights: Rows::Plain(&rows), bias: None }], hidden)?)
            }
            _ => None,
        };
        let mut inner = Self {
            backs: parameters.layers.iter().map(|_| Backs::new(&backend)).collect(),
            parameters,
            language_head,
            head_back: backend.back(),
            checkpointing: options.checkpointing,
            kv: backend.kv_pages(config, 0)?,
            pages: 0,
            buffers: Buffers::new(&backend),
            used: None,
            tapes: Vec::new(),
            inputs: Vec::new(),
            ordered: backend.array(),
            scratch: Scratch::new(&backend),
            unread: Vec::new(),
            spare: Vec::new(),
            stack,
        };
        backend.with_list(values, |values| inner.set(New::There(values)))?;
        Ok(inner)
    }

    /// Forwards, and backwards if a gradient is wanted, in which pairs count so much. Nothing comes of no sequences.
    fn run(&mut self, groups: &[Group<'_>], gradient: Option<(f32, &mut B::Array<f32>)>) -> Result<Option<Results<B>>> {
        let plan = Plan::new(groups);
        let step = plan.step();
        step.sequences.iter().try_for_each(|sequence| self.stack.check(sequence))?;
        self.check(&plan)?;
        let rewards = plan.sequences().iter().filter(|placed| placed.sequence.reward).count();
        if gradient.is_some() && !rewards.is_multiple_of(2) {
            return Err(Error::InvalidInput(format!("{rewards} rewards are not of pairs")));
        }
        if plan.rows() == 0 {
            return Ok(None);
        }
        let config = &self.stack.config;
        if self.pages < plan.pages() {
            // First the old ones go.
            self.kv = self.stack.backend.kv_pages(config, 0)?;
            self.kv = self.stack.backend.kv_pages(config, plan.pages())?;
            self.pages = plan.pages();
        }
        let cut = self.stack.backend.cut(config, &step, self.used.take())?;
        self.forward(&step, &cut, gradient.is_some())?;
        let results = match gradient {
            None => self.heads(&plan, None),
            Some((pair_weight, gradient)) => self.backward(&plan, &step, &cut, pair_weight, gradient),
        };
        self.used = Some(B::used(cut));
        results.map(Some)
    }

    fn read(&mut self, results: impl IntoIterator<Item = Results<B>>) -> Result<Vec<Outcome>> {
        let mut all = Vec::new();
        for results in results {
            let (outcomes, numbers) = results.read(&self.stack.backend)?;
            all.extend(outcomes);
            self.spare.push(numbers);
        }
        Ok(all)
    }

    /// All layers; on tapes, or with what these can be made of again, if there is to be a way back.
    fn forward(&mut self, step: &Step<'_>, cut: &B::Cut<'_>, backwards: bool) -> Result<()> {
        let backend = self.stack.backend.clone();
        let (layers, len) = (self.stack.config.num_layers, self.len(cut));
        self.stack.embed(step, B::rows(cut), &mut self.buffers)?;
        if backwards {
            self.tapes.resize_with(if self.checkpointing { 1 } else { layers }, || Kepts::new(&backend));
            self.inputs.resize_with(if self.checkpointing { layers } else { 0 }, || backend.array());
        }
        for layer in 0..layers {
            let tape = match self.checkpointing {
                false if backwards => Some(&mut self.tapes[layer] as &mut dyn Tape<B>),
                true if backwards => {
                    let input = backend.resize(&mut self.inputs[layer], len)?;
                    backend.copy(B::part(&self.buffers.x, 0..len), input)?;
                    None
                }
                _ => None,
            };
            self.stack.layer(layer, cut, &mut self.kv, &mut self.buffers, tape)?;
        }
        Ok(())
    }

    fn backward(
        &mut self,
        plan: &Plan<'_>,
        step: &Step<'_>,
        cut: &B::Cut<'_>,
        pair_weight: f32,
        gradient: &mut B::Array<f32>,
    ) -> Result<Results<B>> {
        let backend = self.stack.backend.clone();
        let Config { hidden_size: hidden, num_layers: layers, num_heads, num_kv_heads, .. } = self.stack.config;
        let rows = plan.rows();
        let dx = backend.resize(&mut self.scratch.dx, rows * hidden)?;
        backend.clear(dx)?;
        let results = self.heads(plan, Some((pair_weight, &mut *gradient)))?;
        let spans = spans(step);
        let keys = backend.keys(&spans, num_heads / num_kv_heads, &mut self.scratch.room)?;
        let len = self.len(cut);
        for layer in (0..layers).rev() {
            if self.checkpointing {
                let x = B::part_mut(&mut self.buffers.x, 0..len);
                backend.copy(B::part(&self.inputs[layer], 0..len), x)?;
                let tape: &mut dyn Tape<B> = &mut self.tapes[0];
                self.stack.layer(layer, cut, &mut self.kv, &mut self.buffers, Some(tape))?;
            }
            let tape = &mut self.tapes[if self.checkpointing { 0 } else { layer }];
            let back = Backward {
                stack: &self.stack,
                index: layer,
                rows,
                backs: &self.backs[layer],
                ranges: &self.parameters.layers[layer],
                keys: &keys,
                kv: &self.kv,
            };
            back.run(tape, &mut self.scratch, gradient)?;
        }
        let ids: Vec<u32> = step.sequences.iter().flat_map(|s| s.tokens).copied().collect();
        // Rows were multiplied by this, and so are their gradients.
        let scale = B::Element::from_f32(self.stack.config.embedding_scale).to_f32();
        let d_embedding = B::part_mut(gradient, self.parameters.embedding.clone());
        let dx = B::part(&self.scratch.dx, 0..rows * hidden);
        backend.add_rows(dx, &ids, scale, d_embedding, hidden, &mut self.scratch.room)?;
        Ok(results)
    }

    /// Numbers in the residual stream of a step, to which a device may have added rows that are of no token.
    fn len(&self, cut: &B::Cut<'_>) -> usize {
        B::rows(cut) * self.stack.config.hidden_size
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
        let language_head = self.language_head.as_ref().map_or(0, B::linear_bytes);
        self.stack.size().1 as usize
            + self.backs.iter().map(Backs::bytes).sum::<usize>()
            + language_head
            + B::back_bytes(&self.head_back)
            + self.pages * B::page_bytes(&self.stack.config)
            + self.buffers.bytes()
            + self.tapes.iter().map(Kepts::bytes).sum::<usize>()
            + self.inputs.iter().chain([&self.ordered]).chain(&self.spare).map(B::bytes).sum::<usize>()
            + self.scratch.bytes()
    }
}
