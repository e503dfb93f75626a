//! GGUF files, llama.cpp's format: the metadata becomes what a `config.json` would say, so that one parser checks both.

use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use serde_json::json;

use super::fields::excerpt;
use super::gguf_header;
use super::gguf_tensors::GgufTensors;
use super::gguf_tokenizer;
use super::hf_config::{self, Holdings};
use super::read::{Bytes, Reader};
use super::tokenizer::TextParts;
use super::weights::TensorStore;
use crate::config::{Config, RopeScaling};
use crate::{Error, Result};

/// llama.cpp's architectures that are served, and the class of the same decoder. Mistral calls itself `llama` there.
const ARCHITECTURES: [(&str, &str); 4] = [
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
];

/// A tensor that belongs to the configuration: divisors of the rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// All that a file holds; its weights have not been read.
pub(super) struct Gguf {
    pub(super) config: Config,
    pub(super) tensors: GgufTensors,
    pub(super) text: TextParts,
}

/// Opens a file; `holdings` is what an adapter adds.
pub(super) fn open(path: &Path, holdings: &Holdings<'_>, reader: &Reader) -> Result<Gguf> {
    let file = reader.open(path)?;
    let content = read_content(&file)?;
    let metadata = Metadata { path, content: &content };
    let name = metadata.text("general.architecture")?;
    let Some((architecture, class)) = ARCHITECTURES.iter().find(|(architecture, _)| *architecture == name) else {
        let served: Vec<&str> = ARCHITECTURES.iter().map(|(architecture, _)| *architecture).collect();
        let (name, served) = (excerpt(name), served.join(", "));
        return Err(Error::Unsupported(format!("GGUF architecture `{name}`; served are {served}")));
    };
    let text = gguf_tokenizer::read(&metadata)?;
    let json = config_json(&metadata, architecture, class)?;
    let mut config = hf_config::parse(path, &json, holdings)?;
    config.architecture = name.to_owned();
    let mut tensors = GgufTensors::new(file, content, &config);
    if *architecture == "llama" {
        // The metadata does not say; conversions of Llama models with biases have the tensors.
        config.qkv_bias = tensors.holds("model.layers.0.self_attn.q_proj.bias");
        config.attention_output_bias = tensors.holds("model.layers.0.self_attn.o_proj.bias");
        config.mlp_bias = tensors.holds("model.layers.0.mlp.gate_proj.bias");
    }
    if tensors.holds(ROPE_FACTORS) {
        config.rope.scaling = RopeScaling::Factors(rope_factors(path, &tensors, config.rope.dim)?);
        tensors.forget(ROPE_FACTORS);
    }
    Ok(Gguf { config, tensors, text })
}

fn read_content(file: &Bytes) -> Result<Content> {
    let content = gguf_header::read(BufReader::new(file.stream()), file.len());
    content.map_err(|reason| Error::Malformed { path: file.path().to_owned(), reason: format!("not GGUF: {reason}") })
}

/// Divisors of the frequencies, `[dim / 2]`.
fn rope_factors(path: &Path, tensors: &GgufTensors, dim: usize) -> Result<Vec<f32>> {
    let described = tensors.describe().remove(ROPE_FACTORS);
    if described.is_some_and(|tensor| tensor.shape == [dim / 2]) {
        let factors = tensors.read(ROPE_FACTORS)?.to_vec1::<f32>()?;
        if factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
            return Ok(factors);
        }
    }
    let reason = format!("`{ROPE_FACTORS}` should be {} numbers above 0", dim / 2);
    Err(Error::Malformed { path: path.to_owned(), reason })
}

/// The metadata in the words of `config.json`.
fn config_json(metadata: &Metadata<'_>, architecture: &str, class: &str) -> Result<serde_json::Value> {
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| metadata.whole(&key(name));
    let required = |name: &str| metadata.required_whole(&key(name));
    let number = |name: &str| metadata.number(&key(name));
    if let Some(experts @ 1..) = size("expert_count")? {
        return Err(Error::Unsupported(format!("`{}` = {experts}: a mixture of experts", key("expert_count"))));
    }
    let Some(embedding) = metadata.content.tensor_infos.get("token_embd.weight") else {
        return Err(Error::MissingTensor { name: "token_embd.weight".to_owned(), expected: Vec::new() });
    };
    let hidden = required("embedding_length")?;
    let heads = required("attention.head_count")?.max(1);
    let layers = required("block_count")?;
    let head_dim = size("attention.key_length")?.unwrap_or(hidden / heads);
    let rotated = size("rope.dimension_count")?.unwrap_or(head_dim);
    let mut config = json!({
        "architectures": [class],
        "vocab_size": embedding.shape.dims().first(),
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": required("context_length")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
        "tie_word_embeddings": !metadata.content.tensor_infos.contains_key("output.weight"),
        "partial_rotary_factor": rotated as f64 / head_dim.max(1) as f64,
        "rope_scaling": rope_scaling(metadata, architecture)?,
    });
    let mut set = |key: &str, value: serde_json::Value| config[key] = value;
    if let Some(theta) = number("rope.freq_base")? {
        set("rope_theta", json!(theta));
    }
    if architecture == "gemma2" {
        // The 27B model divides by the width per head, the others by the width of a head; llama.cpp knows it by its
        // number of layers.
        set("query_pre_attn_scalar", json!(if layers == 46 { hidden / heads } else { head_dim }));
        for (name, ours) in [
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
            ("attention.sliding_window", "sliding_window"),
        ] {
            if let Some(value) = number(name)? {
                set(ours, if ours == "sliding_window" { json!(value as u64) } else { json!(value) });
            }
        }
    }
    Ok(config)
}

fn rope_scaling(metadata: &Metadata<'_>, architecture: &str) -> Result<serde_json::Value> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let kind = metadata.optional_text(&key("scaling.type"))?;
    let factor = match metadata.number(&key("scaling.factor"))? {
        None => metadata.number(&key("scale_linear"))?,
        factor => factor,
    };
    Ok(match kind {
        Some("none") => serde_json::Value::Null,
        Some(kind) => json!({ "rope_type": kind, "factor": factor }),
        None if factor.is_some_and(|factor| factor != 1.0) => json!({ "rope_type": "linear", "factor": factor }),
        None => serde_json::Value::Null,
    })
}

/// The metadata of a file, read by type.
pub(super) struct Metadata<'a> {
    path: &'a Path,
    content: &'a Content,
}

impl<'a> Metadata<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.content.metadata.get(key)
    }

    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let reason = match self.get(key) {
            // Both can be long.
            Some(Value::Array(_)) => format!("`{key}` is an array, expected {expected}"),
            Some(Value::String(text)) => format!("`{key}` is {:?}, expected {expected}", excerpt(text)),
            Some(found) => format!("`{key}` is {found:?}, expected {expected}"),
            None => format!("`{key}` is missing, expected {expected}"),
        };
        Error::Malformed { path: self.path.to_owned(), reason }
    }

    /// A whole number of any width, not below 0.
    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::U8(n)) => Some(u64::from(*n)),
            Some(Value::U16(n)) => Some(u64::from(*n)),
            Some(Value::U32(n)) => Some(u64::from(*n)),
            Some(Value::U64(n)) => Some(*n),
            Some(Value::I8(n)) => u64::try_from(*n).ok(),
            Some(Value::I16(n)) => u64::try_from(*n).ok(),
            Some(Value::I32(n)) => u64::try_from(*n).ok(),
            Some(Value::I64(n)) => u64::try_from(*n).ok(),
            Some(_) => None,
        };
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number"))
    }

    fn required_whole(&self, key: &str) -> Result<u64> {
        self.whole(key)?.ok_or_else(|| self.wrong(key, "a whole number"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::F32(number)) => Some(f64::from(*number)),
            Some(Value::F64(number)) => Some(*number),
            Some(_) => self.whole(key)?.map(|number| number as f64),
        };
        // JSON, which this becomes, has no other.
        number.filter(|number| number.is_finite()).map(Some).ok_or_else(|| self.wrong(key, "a finite number"))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        self.optional_text(key)?.ok_or_else(|| self.wrong(key, "a text"))
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong(key, "an array")),
        }
    }
}
