//! A decoder as data: what differs between architectures is a field here, not a copy of the decoder.

use crate::{Error, Result};

/// Everything that the decoder has to know about a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `architectures[0]` of `config.json`, or `general.architecture` of a GGUF file.
    pub architecture: String,
    /// How the checkpoint names its tensors.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; a divisor of `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Most positions in a sequence.
    pub max_position_embeddings: usize,
    /// Normalisation, everywhere in the model.
    pub norm: Norm,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Feed-forward: `down(act(gate(x)) * up(x))` if true, `down(act(up(x)))` if false.
    pub gated: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub attention_output_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// RMS norm over each head of q and k before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// How a layer's parts are wired.
    pub block: Block,
    /// Multiplies the embeddings (Gemma: sqrt(hidden_size)); 1 elsewhere.
    pub embedding_scale: f32,
    /// Multiplies the attention scores before soft cap and mask.
    pub attention_scale: f32,
    /// `cap * tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f32>,
    /// The same on vocabulary logits.
    pub logit_softcap: Option<f32>,
    /// For each layer: how many keys a query sees, itself included; `None` means all.
    pub windows: Vec<Option<usize>>,
    /// The language head is the embedding.
    pub tie_word_embeddings: bool,
    /// What is on top.
    pub head: Head,
}

impl Config {
    /// That of one of so many shards, each of which has whole heads with their key heads, and an equal part of the
    /// feed-forward layer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they cannot be shared out evenly.
    pub(crate) fn share(&self, shards: usize) -> Result<Self> {
        let Self { num_heads, num_kv_heads, intermediate_size, .. } = *self;
        let fits = |shards: &usize| {
            // Kernels take feed-forward layers of multiples of four.
            let divides = |count: usize| count.is_multiple_of(*shards);
            divides(num_heads)
                && divides(num_kv_heads)
                && (*shards == 1 || intermediate_size.is_multiple_of(4 * shards))
        };
        if !fits(&shards) {
            let possible = (2..=num_kv_heads).filter(fits).map(|count| count.to_string()).collect::<Vec<_>>();
            let advice = match &possible[..] {
                [] => "give the model one device".to_owned(),
                counts => format!("split it over {}", counts.join(" or ")),
            };
            return Err(Error::Unsupported(format!(
                "{num_heads} heads, {num_kv_heads} key-value heads and a feed-forward layer of {intermediate_size} cannot \
                 be shared out between {shards} devices; {advice} (--device)"
            )));
        }
        Ok(Self {
            num_heads: num_heads / shards,
            num_kv_heads: num_kv_heads / shards,
            intermediate_size: intermediate_size / shards,
            ..self.clone()
        })
    }
}

/// Naming scheme of a checkpoint's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `model.layers.N.self_attn.q_proj.weight` and so on: Llama, Qwen2, Qwen3, Mistral, Gemma2.
    Llama,
    /// `gpt_neox.layers.N.attention.query_key_value.weight` and so on.
    GptNeoX,
}

/// A normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// `x / rms(x) * (weight + offset)`; `offset` is 1 for Gemma, 0 elsewhere.
    Rms {
        /// Added to the mean square.
        eps: f32,
        /// Added to the weight.
        offset: f32,
    },
    /// `(x - mean(x)) / std(x) * weight + bias`.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

/// A rotary position embedding that rotates the first and second half of a head's first `dim` elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Elements of a head that are rotated; the rest pass.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f32,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// A stretching of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by the factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3: low frequencies divided by the factor, a smooth passage, high ones kept.
    Llama3 {
        /// The factor.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are stretched fully.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context of the original model.
        original_max_position_embeddings: usize,
    },
    /// Divisors of each frequency, `dim / 2` of them (GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// An element-wise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// How a layer's parts are wired; `n` are norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// `x += attn(n1(x)); x += mlp(n2(x))`.
    PreNorm,
    /// `x += n2(attn(n1(x))); x += n4(mlp(n3(x)))` (Gemma2).
    SandwichNorm,
    /// `x += attn(n1(x)) + mlp(n2(x))` (GPT-NeoX).
    Parallel,
}

/// What turns the last hidden state into numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Head {
    /// A vocabulary head.
    Language,
    /// A scalar head.
    Reward(RewardHead),
}

/// A scalar head: `weight . norm(x) + bias`, then normalised if the checkpoint asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardHead {
    /// Name of its weight, `[1, hidden_size]`.
    pub weight: String,
    /// Name of its bias, `[1]`, where there is one.
    pub bias: Option<String>,
    /// `(mean, std)` where `config.json` sets `normalize_reward`: reward = (logit - mean) / std.
    pub normalization: Option<(f32, f32)>,
}
