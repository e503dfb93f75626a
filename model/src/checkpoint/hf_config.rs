//! From a `config.json`, as Transformers 4 and 5 write it, to a [`Config`].
//!
//! A key that is absent has the default of the model's Transformers configuration class (read in Transformers 5.23);
//! those defaults are the table [`KINDS`]. A key that is null means "none".

use std::path::Path;

use serde_json::Value;

use super::fields::{Fields, excerpt};
use super::hf_rope::rope;
use super::lora::Adapter;
use super::weights::TensorStore;
use crate::config::{Activation, Block, Config, Family, Head, Norm, RewardHead};
use crate::{Error, Result};

// Above any published decoder, and small enough that no product of two of them overflows.
const MOST_WIDTH: usize = 1 << 20;
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 12;
const MOST_TOKENS: usize = 1 << 26;
/// A context, or a window in it.
pub(super) const MOST_POSITIONS: usize = 1 << 26;

/// Weight of TRL's value head, `[1, hidden_size]`, and its bias, `[1]`.
const TRL_HEAD: (&str, &str) = ("v_head.summary.weight", "v_head.summary.bias");

/// Names that OpenRLHF's reward model classes have had.
const OPENRLHF_CLASSES: [&str; 2] = ["RewardModel", "LLMForSequenceRegression"];

/// An architecture, as far as code has to tell it from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Llama,
    Qwen2,
    Qwen3,
    Mistral,
    Gemma2,
    GptNeoX,
}

/// What Transformers' configuration class says where `config.json` says nothing.
struct Defaults {
    kind: Kind,
    /// Class names begin with it.
    prefix: &'static str,
    model_type: &'static str,
    max_position_embeddings: usize,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<usize>,
    /// `None`: hidden size / query heads.
    head_dim: Option<usize>,
    tie_word_embeddings: bool,
    hidden_act: &'static str,
}

const KINDS: [Defaults; 6] = [
    Defaults {
        kind: Kind::Llama,
        prefix: "Llama",
        model_type: "llama",
        max_position_embeddings: 2048,
        num_key_value_heads: None,
        head_dim: None,
        tie_word_embeddings: false,
        hidden_act: "silu",
    },
    Defaults {
        kind: Kind::Qwen2,
        prefix: "Qwen2",
        model_type: "qwen2",
        max_position_embeddings: 32_768,
        num_key_value_heads: Some(32),
        head_dim: None,
        tie_word_embeddings: false,
        hidden_act: "silu",
    },
    Defaults {
        kind: Kind::Qwen3,
        prefix: "Qwen3",
        model_type: "qwen3",
        max_position_embeddings: 32_768,
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        tie_word_embeddings: false,
        hidden_act: "silu",
    },
    Defaults {
        kind: Kind::Mistral,
        prefix: "Mistral",
        model_type: "mistral",
        max_position_embeddings: 131_072,
        num_key_value_heads: Some(8),
        head_dim: None,
        tie_word_embeddings: false,
        hidden_act: "silu",
    },
    Defaults {
        kind: Kind::Gemma2,
        prefix: "Gemma2",
        model_type: "gemma2",
        max_position_embeddings: 8192,
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        tie_word_embeddings: true,
        hidden_act: "gelu_pytorch_tanh",
    },
    Defaults {
        kind: Kind::GptNeoX,
        prefix: "GPTNeoX",
        model_type: "gpt_neox",
        max_position_embeddings: 2048,
        num_key_value_heads: None,
        head_dim: None,
        tie_word_embeddings: false,
        hidden_act: "gelu",
    },
];

/// The files beside `config.json`, which decide about the head.
#[derive(Clone, Copy, Default)]
pub(super) struct Holdings<'a> {
    /// `None` if only language models are stored in this way.
    pub(super) store: Option<&'a dyn TensorStore>,
    pub(super) adapter: Option<&'a Adapter>,
}

impl Holdings<'_> {
    fn hold(&self, tensor: &str) -> bool {
        self.adapter.is_some_and(|adapter| adapter.replaces(tensor))
            || self.store.is_some_and(|store| store.holds(tensor))
    }

    fn have_classifier_adapter(&self) -> bool {
        self.adapter.is_some_and(Adapter::is_classifier)
    }
}

/// Reads a `config.json`; `path` is only named in errors.
pub(super) fn parse(path: &Path, json: &Value, holdings: &Holdings<'_>) -> Result<Config> {
    let fields = Fields::new(path, json)?;
    let architecture = architecture(&fields)?;
    let defaults = kind_of(&fields, &architecture)?;
    let kind = defaults.kind;
    refuse_variants(&fields)?;

    let hidden_size = fields.required_size("hidden_size", MOST_WIDTH)?;
    let num_layers = fields.required_size("num_hidden_layers", MOST_LAYERS)?;
    let num_heads = fields.required_size("num_attention_heads", MOST_HEADS)?;
    let num_kv_heads = num_kv_heads(&fields, defaults, num_heads)?;
    let head_dim = head_dim(&fields, defaults, hidden_size, num_heads)?;
    let max_position_embeddings =
        fields.size("max_position_embeddings", MOST_POSITIONS)?.unwrap_or(defaults.max_position_embeddings);
    let attention_bias = fields.flag("attention_bias", kind == Kind::GptNeoX)?;
    let gemma = kind == Kind::Gemma2;

    Ok(Config {
        family: if kind == Kind::GptNeoX { Family::GptNeoX } else { Family::Llama },
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size", MOST_WIDTH)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: fields.required_size("vocab_size", MOST_TOKENS)?,
        max_position_embeddings,
        norm: norm(&fields, kind)?,
        rope: rope(&fields, kind, head_dim, max_position_embeddings)?,
        activation: activation(&fields, defaults)?,
        gated: kind != Kind::GptNeoX,
        qkv_bias: match kind {
            Kind::Qwen2 => true,
            Kind::Mistral => false,
            _ => attention_bias,
        },
        attention_output_bias: !matches!(kind, Kind::Qwen2 | Kind::Mistral) && attention_bias,
        mlp_bias: kind == Kind::GptNeoX || (kind == Kind::Llama && fields.flag("mlp_bias", false)?),
        qk_norm: kind == Kind::Qwen3,
        block: match kind {
            Kind::Gemma2 => Block::SandwichNorm,
            Kind::GptNeoX if fields.flag("use_parallel_residual", true)? => Block::Parallel,
            _ => Block::PreNorm,
        },
        embedding_scale: if gemma { (hidden_size as f64).sqrt() as f32 } else { 1.0 },
        attention_scale: match gemma {
            true => fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
            false => head_dim as f64,
        }
        .powf(-0.5) as f32,
        attention_softcap: if gemma { softcap(&fields, "attn_logit_softcapping", 50.0)? } else { None },
        logit_softcap: if gemma { softcap(&fields, "final_logit_softcapping", 30.0)? } else { None },
        windows: windows(&fields, kind, num_layers)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
        head: head(&fields, &architecture, holdings)?,
        architecture,
    })
}

/// `architectures[0]`.
fn architecture(fields: &Fields<'_>) -> Result<String> {
    match fields.list("architectures")?.and_then(<[Value]>::first) {
        Some(Value::String(name)) => Ok(name.clone()),
        _ => Err(fields.wrong("architectures", "a list with the name of the model's class")),
    }
}

/// Finds the architecture by the class name or, for the classes of OpenRLHF, which say nothing, by `model_type`.
fn kind_of(fields: &Fields<'_>, architecture: &str) -> Result<&'static Defaults> {
    let named = KINDS.iter().find(|kind| {
        let class = architecture.strip_prefix(kind.prefix);
        matches!(class, Some("ForCausalLM" | "ForSequenceClassification"))
    });
    if let Some(named) = named {
        return Ok(named);
    }
    if OPENRLHF_CLASSES.contains(&architecture) || fields.has("value_head_prefix") {
        let model_type = fields.text("model_type")?;
        if let Some(typed) = KINDS.iter().find(|kind| Some(kind.model_type) == model_type) {
            return Ok(typed);
        }
    }
    let prefixes: Vec<&str> = KINDS.iter().map(|kind| kind.prefix).collect();
    let model_type = fields.text("model_type")?.unwrap_or("unknown");
    Err(Error::Unsupported(format!(
        "architecture `{}` (model type `{}`); served are {} with ForCausalLM or \
         ForSequenceClassification",
        excerpt(architecture),
        excerpt(model_type),
        prefixes.join(", ")
    )))
}

/// Refuses what changes the model's numbers and is not implemented.
fn refuse_variants(fields: &Fields<'_>) -> Result<()> {
    if let Some(quantization) = fields.object("quantization_config")?
        && !is_dynamic_fp8(&quantization)?
    {
        let method = quantization.text("quant_method")?.unwrap_or("unknown method");
        return Err(Error::Unsupported(format!(
            "`quantization_config` ({}); take the checkpoint in bf16, f16 or f32, as GGUF, or in e4m3 with a scale for \
             every output and for every token (compressed-tensors, FP8-Dynamic)",
            excerpt(method)
        )));
    }
    if fields.flag("use_bidirectional_attention", false)? {
        return Err(Error::Unsupported("`use_bidirectional_attention`; only causal attention is served".to_owned()));
    }
    Ok(())
}

/// Whether linear layers are e4m3 with a scale for every output, and what they are given is to become e4m3 with one for
/// every token: what llm-compressor calls FP8-Dynamic. Which tensors are in e4m3 is for themselves to say.
fn is_dynamic_fp8(quantization: &Fields<'_>) -> Result<bool> {
    let is = |fields: &Fields<'_>, key: &str, value: &str| Ok::<_, Error>(fields.text(key)? == Some(value));
    let is_fp8 = |fields: Option<Fields<'_>>, strategy: &str, dynamic: bool| match fields {
        Some(fields) => Ok::<_, Error>(
            is(&fields, "type", "float")?
                && is(&fields, "strategy", strategy)?
                && fields.size("num_bits", 64)? == Some(8)
                && fields.flag("dynamic", false)? == dynamic
                && fields.flag("symmetric", true)?,
        ),
        None => Ok(false),
    };
    let Some(groups) = quantization.object("config_groups")? else { return Ok(false) };
    for (name, _) in groups.iter() {
        let Some(group) = groups.object(name)? else { return Ok(false) };
        let weights = is_fp8(group.object("weights")?, "channel", false)?;
        if !weights
            || !is_fp8(group.object("input_activations")?, "token", true)?
            || group.get("output_activations").is_some()
        {
            return Ok(false);
        }
    }
    Ok(is(quantization, "quant_method", "compressed-tensors")?
        && is(quantization, "format", "float-quantized")?
        && quantization.get("kv_cache_scheme").is_none())
}

fn num_kv_heads(fields: &Fields<'_>, defaults: &Defaults, num_heads: usize) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    if defaults.kind == Kind::GptNeoX {
        return Ok(num_heads);
    }
    let absent = if fields.has(KEY) { None } else { defaults.num_key_value_heads };
    let num_kv_heads = fields.size(KEY, MOST_HEADS)?.or(absent).unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(fields.wrong(KEY, format_args!("a divisor of `num_attention_heads`, {num_heads}")));
    }
    Ok(num_kv_heads)
}

fn head_dim(fields: &Fields<'_>, defaults: &Defaults, hidden_size: usize, num_heads: usize) -> Result<usize> {
    const KEY: &str = "head_dim";
    let absent = if fields.has(KEY) { None } else { defaults.head_dim };
    match fields.size(KEY, MOST_WIDTH)?.or(absent) {
        Some(head_dim) if defaults.kind != Kind::GptNeoX => Ok(head_dim),
        _ if hidden_size.is_multiple_of(num_heads) => Ok(hidden_size / num_heads),
        _ => Err(fields.wrong("num_attention_heads", format_args!("a divisor of `hidden_size`, {hidden_size}"))),
    }
}

fn norm(fields: &Fields<'_>, kind: Kind) -> Result<Norm> {
    Ok(match kind {
        Kind::GptNeoX => Norm::Layer { eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-5) as f32 },
        _ => Norm::Rms {
            eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            offset: if kind == Kind::Gemma2 { 1.0 } else { 0.0 },
        },
    })
}

fn activation(fields: &Fields<'_>, defaults: &Defaults) -> Result<Activation> {
    // Gemma2's own key; its `hidden_act` was written by mistake and is not read by Transformers either.
    let key = if defaults.kind == Kind::Gemma2 { "hidden_activation" } else { "hidden_act" };
    match fields.text(key)?.unwrap_or(defaults.hidden_act) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        // One formula, written four times.
        "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        other => Err(Error::Unsupported(format!(
            "`{key}` `{}`; served are silu, gelu, gelu_new, gelu_fast and gelu_pytorch_tanh",
            excerpt(other)
        ))),
    }
}

fn softcap(fields: &Fields<'_>, key: &str, absent: f32) -> Result<Option<f32>> {
    if fields.has(key) { Ok(fields.positive(key)?.map(|cap| cap as f32)) } else { Ok(Some(absent)) }
}

/// For each layer, how many keys a query sees.
fn windows(fields: &Fields<'_>, kind: Kind, num_layers: usize) -> Result<Vec<Option<usize>>> {
    const KEY: &str = "sliding_window";
    let absent = if fields.has(KEY) { None } else { Some(4096) };
    let window = match kind {
        Kind::Llama | Kind::GptNeoX => None,
        Kind::Qwen2 | Kind::Qwen3 if !fields.flag("use_sliding_window", false)? => None,
        _ => fields.size(KEY, MOST_POSITIONS)?.or(absent),
    };
    let first_sliding = match kind {
        Kind::Qwen2 | Kind::Qwen3 if !fields.has("max_window_layers") => 28,
        Kind::Qwen2 | Kind::Qwen3 => fields.number("max_window_layers")?.unwrap_or(0.0) as usize,
        _ => 0,
    };
    let usual = |layer: usize| match kind {
        Kind::Gemma2 => layer.is_multiple_of(2),
        _ => window.is_some() && layer >= first_sliding,
    };
    let sliding = match fields.list("layer_types")? {
        None => (0..num_layers).map(usual).collect(),
        Some(types) => layer_types(fields, types, num_layers)?,
    };
    if window.is_none() && kind != Kind::Gemma2 && sliding.contains(&true) {
        return Err(Error::Unsupported(format!(
            "`layer_types` asks for sliding attention, but a {kind:?} model with these settings has no `{KEY}`"
        )));
    }
    if kind == Kind::Mistral && sliding.contains(&window.is_none()) {
        return Err(Error::Unsupported("`layer_types` that differ from layer to layer in a Mistral model".to_owned()));
    }
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

/// Which layers have sliding attention.
fn layer_types(fields: &Fields<'_>, types: &[Value], num_layers: usize) -> Result<Vec<bool>> {
    if types.len() != num_layers {
        return Err(fields.wrong("layer_types", format_args!("{num_layers} entries, one for each layer")));
    }
    let sliding = |entry: &Value| match entry.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(Error::Unsupported(format!(
            "`layer_types` entry {}; served are full_attention and sliding_attention",
            excerpt(&entry.to_string())
        ))),
    };
    types.iter().map(sliding).collect()
}

/// Which head there is. The files decide, because value heads are saved under any class name: OpenRLHF names its tensor
/// in `value_head_prefix`, TRL puts `v_head` beside a causal language model.
fn head(fields: &Fields<'_>, architecture: &str, holdings: &Holdings<'_>) -> Result<Head> {
    if architecture.ends_with("ForSequenceClassification") {
        require_one_label(fields)?;
    }
    let weight = format!("{}.weight", fields.text("value_head_prefix")?.unwrap_or("score"));
    if !holdings.hold(&weight) {
        if holdings.hold(TRL_HEAD.0) {
            let bias = holdings.hold(TRL_HEAD.1).then(|| TRL_HEAD.1.to_owned());
            return Ok(Head::Reward(RewardHead { weight: TRL_HEAD.0.to_owned(), bias, normalization: None }));
        }
        if architecture.ends_with("ForCausalLM") && !holdings.have_classifier_adapter() {
            return Ok(Head::Language);
        }
        // What follows names the tensor that is missing once it is taken.
    }
    Ok(Head::Reward(RewardHead { weight, bias: None, normalization: normalization(fields)? }))
}

fn require_one_label(fields: &Fields<'_>) -> Result<()> {
    let labels = match fields.object("id2label")? {
        Some(labels) => labels.iter().count(),
        // Transformers' default is 2.
        None => fields.size("num_labels", MOST_TOKENS)?.unwrap_or(2),
    };
    if labels == 1 {
        return Ok(());
    }
    Err(Error::Unsupported(format!("`num_labels` is {labels}; a preference model has 1, the reward")))
}

/// OpenRLHF's `mean` and `std`, which it applies only where `normalize_reward` is set.
fn normalization(fields: &Fields<'_>) -> Result<Option<(f32, f32)>> {
    if !fields.flag("normalize_reward", false)? {
        return Ok(None);
    }
    match (fields.number("mean")?, fields.positive("std")?) {
        (Some(mean), Some(std)) => Ok(Some((mean as f32, std as f32))),
        // OpenRLHF starts from 0 and 1 and writes both after an evaluation.
        (None, None) => Ok(None),
        (Some(_), None) => Err(fields.wrong("std", "a number above 0, because `mean` is there")),
        (None, Some(_)) => Err(fields.wrong("mean", "a number, because `std` is there")),
    }
}

#[cfg(test)]
mod tests;
