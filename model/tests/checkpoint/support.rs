//! Fixtures, copies of them to break, and the tensors that a decoder takes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::{Block, Config, Family, Head, RewardHead};
use plumb_model::{Error, Result};
use serde_json::Value;
use tempfile::TempDir;

/// The fixtures that are folders of a whole checkpoint.
pub(crate) const FOLDERS: [&str; 16] = [
    "gemma2-lm",
    "gemma2-pm",
    "llama-lm",
    "llama-lm-sharded",
    "llama-pm",
    "mistral-lm",
    "mistral-pm",
    "neox-lm",
    "neox-lm-sequential",
    "neox-pm",
    "openrlhf-pm",
    "qwen2-lm",
    "qwen2-pm",
    "qwen3-lm",
    "qwen3-pm",
    "trl-value-head",
];

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

pub(crate) fn source(model: &Path) -> Source {
    Source { model: model.to_str().unwrap().to_owned(), ..Source::default() }
}

pub(crate) fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&source(&fixture(name))).unwrap()
}

pub(crate) fn open_with_adapter(base: &Path, adapter: &Path) -> Result<Checkpoint> {
    Checkpoint::open(&Source { adapter: Some(adapter.to_str().unwrap().to_owned()), ..source(base) })
}

/// The tensors that a decoder of this configuration has, with their shapes.
pub(crate) fn tensors_of(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let mut tensors = Vec::new();
    let mut linear = |name: String, rows: usize, columns: usize, bias: bool| {
        if bias {
            tensors.push((format!("{name}.bias"), vec![rows]));
        }
        tensors.push((format!("{name}.weight"), vec![rows, columns]));
    };
    for layer in 0..config.num_layers {
        match config.family {
            Family::Llama => {
                let layer = format!("model.layers.{layer}");
                linear(format!("{layer}.self_attn.q_proj"), q, hidden, config.qkv_bias);
                linear(format!("{layer}.self_attn.k_proj"), kv, hidden, config.qkv_bias);
                linear(format!("{layer}.self_attn.v_proj"), kv, hidden, config.qkv_bias);
                linear(format!("{layer}.self_attn.o_proj"), hidden, q, config.attention_output_bias);
                linear(format!("{layer}.mlp.gate_proj"), inner, hidden, config.mlp_bias);
                linear(format!("{layer}.mlp.up_proj"), inner, hidden, config.mlp_bias);
                linear(format!("{layer}.mlp.down_proj"), hidden, inner, config.mlp_bias);
            }
            Family::GptNeoX => {
                let layer = format!("gpt_neox.layers.{layer}");
                linear(format!("{layer}.attention.query_key_value"), 3 * hidden, hidden, config.qkv_bias);
                linear(format!("{layer}.attention.dense"), hidden, hidden, config.attention_output_bias);
                linear(format!("{layer}.mlp.dense_h_to_4h"), inner, hidden, true);
                linear(format!("{layer}.mlp.dense_4h_to_h"), hidden, inner, true);
            }
        }
    }
    let neox = config.family == Family::GptNeoX;
    let head = if neox { "embed_out" } else { "lm_head" };
    if config.head == Head::Language && !config.tie_word_embeddings {
        linear(head.to_owned(), config.vocab_size, hidden, false);
    }
    if let Head::Reward(RewardHead { weight, bias, .. }) = &config.head {
        tensors.push((weight.clone(), vec![1, hidden]));
        tensors.extend(bias.iter().map(|bias| (bias.clone(), vec![1])));
    }
    let norm = |tensors: &mut Vec<_>, name: String, size: usize| {
        if neox {
            tensors.push((format!("{name}.bias"), vec![size]));
        }
        tensors.push((format!("{name}.weight"), vec![size]));
    };
    let prefix = if neox { "gpt_neox" } else { "model" };
    for layer in 0..config.num_layers {
        norm(&mut tensors, format!("{prefix}.layers.{layer}.input_layernorm"), hidden);
        norm(&mut tensors, format!("{prefix}.layers.{layer}.post_attention_layernorm"), hidden);
        if config.block == Block::SandwichNorm {
            norm(&mut tensors, format!("{prefix}.layers.{layer}.pre_feedforward_layernorm"), hidden);
            norm(&mut tensors, format!("{prefix}.layers.{layer}.post_feedforward_layernorm"), hidden);
        }
        if config.qk_norm {
            norm(&mut tensors, format!("{prefix}.layers.{layer}.self_attn.q_norm"), config.head_dim);
            norm(&mut tensors, format!("{prefix}.layers.{layer}.self_attn.k_norm"), config.head_dim);
        }
    }
    norm(&mut tensors, format!("{prefix}.{}", if neox { "final_layer_norm" } else { "norm" }), hidden);
    let embedding = if neox { "gpt_neox.embed_in.weight" } else { "model.embed_tokens.weight" };
    tensors.push((embedding.to_owned(), vec![config.vocab_size, hidden]));
    tensors
}

pub(crate) fn take_all(mut checkpoint: Checkpoint) -> Result<HashMap<String, Tensor>> {
    let mut taken = HashMap::new();
    for (name, shape) in tensors_of(&checkpoint.config) {
        assert!(checkpoint.weights.contains(&name) || checkpoint.weights.take(&name, &shape).is_err());
        let tensor = checkpoint.weights.take(&name, &shape)?;
        assert!(!checkpoint.weights.contains(&name), "{name}");
        taken.insert(name, tensor);
    }
    checkpoint.weights.finish()?;
    Ok(taken)
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A copy of a fixture to break.
pub(crate) struct Copy(TempDir);

impl Copy {
    pub(crate) fn of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        std::fs::write(self.path().join(file), text).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        std::fs::remove_file(self.path().join(file)).unwrap();
    }

    pub(crate) fn edit(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&std::fs::read(self.path().join(file)).unwrap()).unwrap();
        edit(&mut json);
        self.write(file, &json.to_string());
    }

    pub(crate) fn flip_last_byte(&self, file: &str) {
        let mut bytes = std::fs::read(self.path().join(file)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(self.path().join(file), bytes).unwrap();
    }

    /// Rewrites the only safetensors file.
    pub(crate) fn edit_tensors(&self, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let adapter = self.path().join("adapter_model.safetensors");
        let file = if adapter.exists() { adapter } else { self.path().join("model.safetensors") };
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, file).unwrap();
    }

    pub(crate) fn rename_tensors(&self, rename: impl Fn(&str) -> String) {
        self.edit_tensors(|tensors| *tensors = tensors.drain().map(|(name, value)| (rename(&name), value)).collect());
    }

    pub(crate) fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(&source(self.path()))
    }

    /// Opening, or taking every tensor, fails with a message that has all of these words.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) -> Error {
        explained(self.open().and_then(take_all), words)
    }

    #[track_caller]
    pub(crate) fn refused_on(&self, base: &str, words: &[&str]) -> Error {
        explained(open_with_adapter(&fixture(base), self.path()).and_then(take_all), words)
    }
}

#[track_caller]
pub(crate) fn explained<T>(result: Result<T>, words: &[&str]) -> Error {
    let error = result.err().unwrap();
    for word in words {
        assert!(error.to_string().contains(word), "`{word}` is not in: {error}");
    }
    error
}

pub(crate) fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::BF16, &Device::Cpu).unwrap()
}
