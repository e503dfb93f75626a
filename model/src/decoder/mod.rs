//! The one decoder: packed token ids in, rewards, log-probabilities or logits out.
//!
//! A [`Step`] holds slices of many sequences, none padded. Their keys and values live in pages (see [`crate::cache`]),
//! so a slice may continue what earlier steps, or other sequences with the same beginning, have computed. A row's
//! result has the same bits whatever else the step holds and however a sequence was cut into steps.

mod build;
mod forward;
pub mod gradient;
mod names;
mod plan;
mod step;

use half::bf16;
use plumb_kernels::Element;
use plumb_kernels::attention::KvPages;
use plumb_kernels::linear::{Activated, Linear};
use plumb_kernels::memory::OutOfMemory;
use plumb_kernels::norm::Norm;
use plumb_kernels::parallel::with_team;
use plumb_kernels::rotary::Rotary;

pub use plumb_kernels::head::log_sum_exp;
pub use step::{Progress, Read, Step, StepSequence, StepSize};

use crate::checkpoint::Weights;
use crate::config::Config;
use crate::faults::{Fault, asked};
use crate::{Error, Result};

/// Types in which weights and caches are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32 bits.
    F32,
    /// 16 bits, sums in f32.
    Bf16,
}

impl DType {
    /// Name as in `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => f32::NAME,
            DType::Bf16 => bf16::NAME,
        }
    }
}

impl Workspace {
    /// Has the progress of all steps counted there.
    #[must_use]
    pub fn counted(mut self, progress: Progress) -> Self {
        match &mut self.0 {
            Typed::F32(buffers) => buffers.progress = progress,
            Typed::Bf16(buffers) => buffers.progress = progress,
        }
        self
    }

    /// Bytes that the buffers take, which grow with the largest step so far.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Typed::F32(buffers) => buffers.bytes(),
            Typed::Bf16(buffers) => buffers.bytes(),
        }
    }
}

/// A decoder with its weights, which never change.
#[derive(Debug)]
pub struct Decoder(Typed<Stack<f32>, Stack<bf16>>);

/// Keys and values of a decoder's sequences.
#[derive(Debug)]
pub struct KvStore(Typed<KvPages<f32>, KvPages<bf16>>);

/// Buffers that are kept from step to step.
#[derive(Debug)]
pub struct Workspace(Typed<forward::Buffers<f32>, forward::Buffers<bf16>>);

#[derive(Debug)]
enum Typed<A, B> {
    F32(A),
    Bf16(B),
}

impl Decoder {
    /// Takes every weight that the configuration implies.
    pub fn build(config: &Config, weights: &mut Weights, dtype: DType, positions: usize) -> Result<Self> {
        Ok(Self(match dtype {
            DType::F32 => Typed::F32(Stack::build(config, weights, positions)?),
            DType::Bf16 => Typed::Bf16(Stack::build(config, weights, positions)?),
        }))
    }

    /// What it is.
    pub fn config(&self) -> &Config {
        match &self.0 {
            Typed::F32(stack) => &stack.config,
            Typed::Bf16(stack) => &stack.config,
        }
    }

    /// Type of its weights and caches.
    pub fn dtype(&self) -> DType {
        match &self.0 {
            Typed::F32(_) => DType::F32,
            Typed::Bf16(_) => DType::Bf16,
        }
    }

    /// Bytes of one page of keys and values.
    pub fn page_bytes(config: &Config, dtype: DType) -> usize {
        let bytes = match dtype {
            DType::F32 => KvPages::<f32>::page_bytes,
            DType::Bf16 => KvPages::<bf16>::page_bytes,
        };
        bytes(config.num_layers, config.num_kv_heads, config.head_dim)
    }

    /// Room for `pages` pages, whose memory is taken from the system: that takes up to a second for a GiB.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has none.
    pub fn kv_store(&self, pages: usize) -> Result<KvStore> {
        fn pages_of<E: Element>(stack: &Stack<E>, pages: usize) -> Result<KvPages<E>> {
            let Config { num_layers, num_kv_heads, head_dim, .. } = stack.config;
            refuse_beyond(KvPages::<E>::page_bytes(num_layers, num_kv_heads, head_dim).saturating_mul(pages))?;
            Ok(KvPages::new(num_layers, num_kv_heads, head_dim, pages)?)
        }
        Ok(KvStore(match &self.0 {
            Typed::F32(stack) => Typed::F32(pages_of(stack, pages)?),
            Typed::Bf16(stack) => Typed::Bf16(pages_of(stack, pages)?),
        }))
    }

    /// Empty buffers.
    pub fn workspace(&self) -> Workspace {
        Workspace(match &self.0 {
            Typed::F32(_) => Typed::F32(forward::Buffers::default()),
            Typed::Bf16(_) => Typed::Bf16(forward::Buffers::default()),
        })
    }

    /// Weights in number and in bytes.
    pub fn size(&self) -> (u64, u64) {
        match &self.0 {
            Typed::F32(stack) => stack.size(),
            Typed::Bf16(stack) => stack.size(),
        }
    }

    /// Runs a step on the current rayon pool and answers what each sequence asked for, in order.
    ///
    /// Fails if a sequence does not fit the model (a token outside the vocabulary, a position beyond the context, a
    /// read that the head cannot serve) or if the store or workspace belongs to another model.
    pub fn step(&self, step: &Step<'_>, kv: &mut KvStore, workspace: &mut Workspace) -> Result<Vec<Vec<f32>>> {
        with_team(|| match (&self.0, &mut kv.0, &mut workspace.0) {
            (Typed::F32(stack), Typed::F32(kv), Typed::F32(buffers)) => stack.step(step, kv, buffers),
            (Typed::Bf16(stack), Typed::Bf16(kv), Typed::Bf16(buffers)) => stack.step(step, kv, buffers),
            _ => Err(Error::InvalidInput("the cache belongs to a model of another type".into())),
        })
    }
}

/// Fails if a test wants no model to have so much memory.
fn refuse_beyond(bytes: usize) -> Result<()> {
    match asked(Fault::FailedAllocation) {
        Some(most) if bytes as u64 > most => Err(OutOfMemory { bytes }.into()),
        _ => Ok(()),
    }
}

/// Embedding, layers, final norm and head.
#[derive(Debug)]
struct Stack<E> {
    config: Config,
    /// `[vocab_size, hidden_size]`; absent where the language head holds the same numbers.
    embedding: Option<Vec<E>>,
    layers: Vec<Layer<E>>,
    final_norm: Norm,
    head: Head<E>,
    rotary: Rotary,
    parameters: u64,
}

#[derive(Debug)]
struct Layer<E> {
    attention_norm: Norm,
    /// q, k and v on top of one another.
    qkv: Linear<E>,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    output: Linear<E>,
    /// Over the attention's result, before it is added (sandwich norm).
    attention_post_norm: Option<Norm>,
    mlp_norm: Norm,
    /// Up with its non-linearity, and with its gate if there is one.
    up: Activated<E>,
    down: Linear<E>,
    /// Over the feed-forward's result, before it is added (sandwich norm).
    mlp_post_norm: Option<Norm>,
}

#[derive(Debug)]
enum Head<E> {
    Language { logits: Linear<E>, softcap: Option<f32> },
    Reward { weight: Vec<f32>, bias: f32, normalization: Option<(f32, f32)> },
}
