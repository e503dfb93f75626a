//! The one decoder: packed token ids in, rewards, log-probabilities or logits out.
//!
//! A [`Step`] holds slices of many sequences, none padded. Their keys and values live in pages (see [`crate::cache`]),
//! so a slice may continue what earlier steps, or other sequences with the same beginning, have computed. On a CPU,
//! and on a GPU that is to be invariant, a row's result has the same bits whatever else the step holds and however a
//! sequence was cut into steps.

mod backend;
mod build;
mod choice;
mod cpu;
mod device;
mod forward;
#[cfg(feature = "gpu")]
mod gpu;
pub mod gradient;
mod names;
mod plan;
mod shards;
mod slices;
mod step;

use std::any::Any;
use std::fmt::Debug;

use half::bf16;
use plumb_kernels::Element;
use plumb_kernels::memory::OutOfMemory;

pub use choice::DeviceChoice;
pub use device::{Device, Split};
pub use plumb_kernels::head::log_sum_exp;
pub use plumb_kernels::sample::{Draw, Drawn, TokenSet, Undrawn};
pub use step::{Asked, Progress, Read, Step, StepSequence, StepSize};

use crate::checkpoint::Weights;
use crate::config::Config;
use crate::faults::{Fault, asked};
use crate::{Error, Result};
use backend::Backend;
use forward::Buffers;
use shards::Shards;

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

    /// Bytes of an element.
    pub(crate) fn bytes(self) -> usize {
        match self {
            DType::F32 => size_of::<f32>(),
            DType::Bf16 => size_of::<bf16>(),
        }
    }
}

/// An expression for the backend of a device and a type; where several share a model, that of a single one.
macro_rules! on {
    ($device:expr, $dtype:expr, $B:ident => $body:expr) => {
        match ($device.kind(), $dtype) {
            ($crate::decoder::device::Kind::Cpu, $crate::decoder::DType::F32) => {
                type $B = $crate::decoder::cpu::Cpu<f32>;
                $body
            }
            ($crate::decoder::device::Kind::Cpu, $crate::decoder::DType::Bf16) => {
                type $B = $crate::decoder::cpu::Cpu<half::bf16>;
                $body
            }
            #[cfg(feature = "gpu")]
            ($crate::decoder::device::Kind::Gpu, $crate::decoder::DType::F32) => {
                type $B = $crate::decoder::gpu::OnGpu<f32>;
                $body
            }
            #[cfg(feature = "gpu")]
            ($crate::decoder::device::Kind::Gpu, $crate::decoder::DType::Bf16) => {
                type $B = $crate::decoder::gpu::OnGpu<half::bf16>;
                $body
            }
        }
    };
}
use on;

/// A decoder with its weights, which never change.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    computes: Box<dyn Computes>,
}

/// Keys and values of a decoder's sequences.
#[derive(Debug)]
pub struct KvStore(Box<dyn Pages>);

/// Buffers that are kept from step to step.
#[derive(Debug)]
pub struct Workspace(Box<dyn Kept>);

/// A decoder, whatever it computes on and in.
trait Computes: Debug + Send + Sync {
    fn dtype(&self) -> DType;
    fn kv_store(&self, pages: usize) -> Result<KvStore>;
    fn workspace(&self) -> Workspace;
    fn size(&self) -> (u64, u64);
    fn computes_beside(&self) -> bool;
    fn ask(&self, step: &Step<'_>, kv: &mut KvStore, workspace: &mut Workspace) -> Result<Asked>;
    fn draw(&self, draws: &[Draw<'_>], workspace: &mut Workspace) -> Result<Vec<Result<Drawn, Undrawn>>>;
}

/// Pages of some backend.
trait Pages: Any + Debug + Send + Sync {}

impl<T: Any + Debug + Send + Sync> Pages for T {}

/// Buffers of some backend.
trait Kept: Any + Debug + Send + Sync {
    fn count(&mut self, progress: Progress);
    fn bytes(&self) -> usize;
}

impl<B: Backend> Kept for Buffers<B> {
    fn count(&mut self, progress: Progress) {
        self.progress = progress;
    }

    fn bytes(&self) -> usize {
        Buffers::bytes(self)
    }
}

impl<B: Backend> Computes for Stack<B> {
    fn dtype(&self) -> DType {
        if size_of::<B::Element>() == DType::F32.bytes() { DType::F32 } else { DType::Bf16 }
    }

    fn kv_store(&self, pages: usize) -> Result<KvStore> {
        refuse_beyond(B::page_bytes(&self.config).saturating_mul(pages))?;
        Ok(KvStore(Box::new(self.backend.kv_pages(&self.config, pages)?)))
    }

    fn workspace(&self) -> Workspace {
        Workspace(Box::new(Buffers::new(&self.backend)))
    }

    fn size(&self) -> (u64, u64) {
        Stack::size(self)
    }

    fn computes_beside(&self) -> bool {
        B::BESIDE
    }

    fn ask(&self, step: &Step<'_>, kv: &mut KvStore, workspace: &mut Workspace) -> Result<Asked> {
        let (kv, buffers): (&mut dyn Any, &mut dyn Any) = (&mut *kv.0, &mut *workspace.0);
        match (kv.downcast_mut(), buffers.downcast_mut()) {
            (Some(kv), Some(buffers)) => B::run(|| Stack::ask(self, step, kv, buffers)),
            _ => Err(Error::InvalidInput("the cache belongs to a model of another type".into())),
        }
    }

    fn draw(&self, draws: &[Draw<'_>], workspace: &mut Workspace) -> Result<Vec<Result<Drawn, Undrawn>>> {
        let buffers: &mut dyn Any = &mut *workspace.0;
        match buffers.downcast_mut() {
            Some(buffers) => B::run(|| Stack::draw(self, draws, buffers)),
            None => Err(Error::InvalidInput("the workspace belongs to a model of another type".into())),
        }
    }
}

impl Workspace {
    /// Has the progress of all steps counted there.
    #[must_use]
    pub fn counted(mut self, progress: Progress) -> Self {
        self.0.count(progress);
        self
    }

    /// Bytes that the buffers take, which grow with the largest step so far.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Decoder {
    /// Takes every weight that the configuration implies.
    pub fn build(
        config: &Config,
        weights: &mut Weights,
        dtype: DType,
        positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let computes: Box<dyn Computes> = on!(device, dtype, B => match device {
            Device::Split(_) => Box::new(Stack::build(Shards::<B>::on(device)?, config, weights, positions)?),
            _ => Box::new(Stack::build(B::on(device)?, config, weights, positions)?),
        });
        Ok(Self { config: config.clone(), computes })
    }

    /// What it is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Type of its weights and caches.
    pub fn dtype(&self) -> DType {
        self.computes.dtype()
    }

    /// Bytes of one page of keys and values, on all devices that share it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model cannot be shared out between them.
    pub fn page_bytes(config: &Config, dtype: DType, device: &Device) -> Result<usize> {
        let shards = device.parts().len();
        let share = config.share(shards)?;
        Ok(shards * on!(device, dtype, B => B::page_bytes(&share)))
    }

    /// Room for `pages` pages, whose memory is taken from the system: that takes up to a second for a GiB.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is none.
    pub fn kv_store(&self, pages: usize) -> Result<KvStore> {
        self.computes.kv_store(pages)
    }

    /// Empty buffers.
    pub fn workspace(&self) -> Workspace {
        self.computes.workspace()
    }

    /// Weights in number and in bytes.
    pub fn size(&self) -> (u64, u64) {
        self.computes.size()
    }

    /// Runs a step, on the current rayon pool where it computes on the CPU, and answers what each sequence asked for, in
    /// order.
    ///
    /// Fails if a sequence does not fit the model (a token outside the vocabulary, a position beyond the context, a
    /// read that the head cannot serve) or if the store or workspace belongs to another model.
    pub fn step(&self, step: &Step<'_>, kv: &mut KvStore, workspace: &mut Workspace) -> Result<Vec<Vec<f32>>> {
        self.ask(step, kv, workspace)?.collect()
    }

    /// Whether a step that was asked for is computed beside the process, so that the next one may be asked for meanwhile.
    /// The CPU has computed it by then.
    pub fn computes_beside(&self) -> bool {
        self.computes.computes_beside()
    }

    /// Asks for a step, and leaves it to [`Asked::collect`] to wait for it. Steps happen in the order in which they are
    /// asked for, so that store and workspace may be those of steps that are not done yet. Logits and likeliest tokens are
    /// waited for here.
    ///
    /// # Errors
    /// As [`Decoder::step`]; what a device fails at later is told by [`Asked::collect`].
    pub fn ask(&self, step: &Step<'_>, kv: &mut KvStore, workspace: &mut Workspace) -> Result<Asked> {
        self.computes.ask(step, kv, workspace)
    }

    /// Draws tokens from logits that the step that was asked for last leaves in the workspace, as often as is wanted: row `i` is that of
    /// the `i`-th sequence that asked for [`Read::Draw`]. Only tokens and their log-probabilities leave the device; the
    /// same draw from the same logits gives the same token on every one.
    ///
    /// # Errors
    /// [`Error::InvalidInput`] if there is no such row, a number is out of its range, or a set of tokens is one of
    /// another vocabulary.
    pub fn draw(&self, draws: &[Draw<'_>], workspace: &mut Workspace) -> Result<Vec<Result<Drawn, Undrawn>>> {
        self.computes.draw(draws, workspace)
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
struct Stack<B: Backend> {
    /// No other one's.
    number: u64,
    backend: B,
    /// Of each shard, where the model is split.
    config: Config,
    /// `[vocab_size, hidden_size]`; absent where the language head holds the same numbers.
    embedding: Option<B::Array<B::Element>>,
    layers: Vec<Layer<B>>,
    final_norm: B::Norm,
    head: Head<B>,
    rotary: B::Rotary,
    /// The longest sequence.
    positions: usize,
    parameters: u64,
}

#[derive(Debug)]
struct Layer<B: Backend> {
    attention_norm: B::Norm,
    /// q, k and v on top of one another.
    qkv: B::Linear,
    q_norm: Option<B::Norm>,
    k_norm: Option<B::Norm>,
    output: B::Linear,
    /// Over the attention's result, before it is added (sandwich norm).
    attention_post_norm: Option<B::Norm>,
    mlp_norm: B::Norm,
    /// Up with its non-linearity, and with its gate if there is one.
    up: B::Activated,
    down: B::Linear,
    /// Over the feed-forward's result, before it is added (sandwich norm).
    mlp_post_norm: Option<B::Norm>,
}

#[derive(Debug)]
enum Head<B: Backend> {
    Language { logits: B::Linear, softcap: Option<f32> },
    Reward { weight: B::Array<f32>, bias: f32, normalization: Option<(f32, f32)> },
}
