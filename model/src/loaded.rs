//! A checkpoint made ready to run: text in, decoder, and what an operator wants to know about it.

use std::sync::Arc;

use candle_core::DType as TensorType;
use plumb_kernels::memory::return_large_arrays;
use sha2::{Digest, Sha256};

pub use crate::background::Background;
use crate::cache::PAGE;
use crate::checkpoint::manifest::Probe;
use crate::checkpoint::{Checkpoint, Reader, Source};
use crate::config::{Config, Head};
use crate::decoder::{DType, Decoder, Device};
pub use crate::footprint::Footprint;
use crate::text::{HhhPrompts, TextConfig, TextPipeline};
use crate::{Error, Result};

/// Sequences of full length for which there is room in the cache at most: of a tiny model, a usual cache would hold
/// millions of tokens, and that memory is better left to others.
const MOST_SEQUENCES: usize = 64;

/// In which type weights are to be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DTypeChoice {
    /// bf16 if the checkpoint is bf16 or quantised, f32 otherwise: f16 has digits that bf16 lacks.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// bf16, and the linear layers of the stack in e4m3, with a scale for every output. On a GPU what they are given
    /// becomes e4m3 too, with a scale for every token; a CPU computes with what the weights have become.
    Fp8,
}

impl DTypeChoice {
    pub(crate) fn is_fp8(self) -> bool {
        self == Self::Fp8
    }
}

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Type of the weights.
    pub dtype: DTypeChoice,
    /// The HHH prompts.
    pub hhh: Arc<HhhPrompts>,
    /// Most tokens in a sequence, where that is less than the model's own limit.
    pub max_input_tokens: Option<usize>,
    /// Bytes for keys and values; the limit of a sequence is lowered to what fits.
    pub kv_cache_bytes: usize,
    /// Where it is to compute.
    pub device: Device,
    /// How to go about it beside others.
    pub background: Background,
}

/// What a model can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelKind {
    /// Log-probabilities and text.
    Language,
    /// Rewards.
    Preference,
}

/// What was found in a checkpoint.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// What it can do.
    pub kind: ModelKind,
    /// As the checkpoint calls itself.
    pub architecture: String,
    /// Where it came from, as given.
    pub source: String,
    /// Adapter that was merged, as given.
    pub adapter: Option<String>,
    /// `f32`, `bf16` or `fp8`.
    pub dtype: &'static str,
    /// Weights.
    pub parameters: u64,
    /// Bytes that they take.
    pub weight_bytes: u64,
    /// Most tokens in a sequence.
    pub max_input_tokens: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// sha256 over the files and the type: equal digests give equal scores.
    pub weights_digest: String,
    /// Name of the scalar head's weight.
    pub reward_head: Option<String>,
    /// `(mean, std)` by which the checkpoint wants its rewards normalised.
    pub normalization: Option<(f32, f32)>,
}

/// A model that is ready to run. It never changes.
#[derive(Debug)]
pub struct LoadedModel {
    /// What it is.
    pub info: ModelInfo,
    /// Templates and tokenizer.
    pub text: TextPipeline,
    /// Weights.
    pub decoder: Decoder,
    /// Pages of keys and values to make room for.
    pub kv_pages: usize,
    /// Bytes of one of them.
    pub page_bytes: usize,
    /// Inputs with the scores that they had where the version was published.
    pub probes: Vec<Probe>,
}

/// What follows from a configuration and the options.
pub(crate) struct Sizes {
    pub(crate) dtype: DType,
    pub(crate) page_bytes: usize,
    pub(crate) kv_pages: usize,
    pub(crate) max_input_tokens: usize,
}

impl Sizes {
    pub(crate) fn of(config: &Config, stored: TensorType, options: &LoadOptions) -> Result<Self> {
        let dtype = match (options.dtype, stored) {
            (DTypeChoice::F32, _) => DType::F32,
            (DTypeChoice::Bf16 | DTypeChoice::Fp8, _) | (DTypeChoice::Auto, TensorType::BF16) => DType::Bf16,
            (DTypeChoice::Auto, _) => DType::F32,
        };
        let page_bytes = Decoder::page_bytes(config, dtype, &options.device);
        let useful = config.max_position_embeddings.saturating_mul(MOST_SEQUENCES).div_ceil(PAGE);
        let kv_pages = (options.kv_cache_bytes / page_bytes).min(useful);
        let limit = options.max_input_tokens.unwrap_or(usize::MAX);
        let max_input_tokens = config.max_position_embeddings.min(limit).min(kv_pages * PAGE);
        if max_input_tokens == 0 {
            return Err(Error::Unsupported(format!(
                "a page of {PAGE} tokens takes {page_bytes} bytes of keys and values, {} are allowed",
                options.kv_cache_bytes
            )));
        }
        Ok(Self { dtype, page_bytes, kv_pages, max_input_tokens })
    }
}

impl LoadedModel {
    /// Reads, checks and packs a checkpoint. Takes seconds to minutes.
    ///
    /// # Errors
    /// What is missing, damaged or not served, or that there is no memory. Nothing of it stays in memory then.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self> {
        return_large_arrays();
        options.background.run(|| Self::load_here(source, options))
    }

    fn load_here(source: &Source, options: &LoadOptions) -> Result<Self> {
        let Checkpoint {
            config,
            mut weights,
            tokenizer,
            special,
            chat_template,
            stored_dtype,
            files_digest,
            source,
            folder: _,
            probes,
        } = Checkpoint::open_with(source, &Reader::new(options.background.bytes_per_second))?;
        let Sizes { dtype, page_bytes, kv_pages, max_input_tokens } = Sizes::of(&config, stored_dtype, options)?;
        let text = TextPipeline::new(TextConfig {
            tokenizer,
            chat_template,
            special,
            vocab_size: config.vocab_size,
            max_tokens: max_input_tokens,
            hhh: options.hhh.clone(),
        })?;
        if options.dtype.is_fp8() {
            weights.round_to_fp8()?;
        }
        let decoder = Decoder::build(&config, &mut weights, dtype, max_input_tokens, &options.device)?;
        weights.finish()?;
        let (parameters, weight_bytes) = decoder.size();
        let (kind, reward_head, normalization) = match &config.head {
            Head::Language => (ModelKind::Language, None, None),
            Head::Reward(head) => (ModelKind::Preference, Some(head.weight.clone()), head.normalization),
        };
        let dtype = if options.dtype.is_fp8() { "fp8" } else { dtype.name() };
        let digest = Sha256::new().chain_update(dtype).chain_update("\n").chain_update(files_digest);
        let info = ModelInfo {
            kind,
            architecture: config.architecture,
            source: source.model,
            adapter: source.adapter,
            dtype,
            parameters,
            weight_bytes,
            max_input_tokens,
            vocab_size: config.vocab_size,
            weights_digest: hex::encode(digest.finalize()),
            reward_head,
            normalization,
        };
        Ok(Self { info, text, decoder, kv_pages, page_bytes, probes })
    }
}
