//! GGUF files: the committed ones, and others written here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use plumb_model::Result;
use plumb_model::checkpoint::Checkpoint;
use plumb_model::config::RopeScaling;
use tempfile::TempDir;

use crate::support::{explained, fixture, largest_difference, open, source, take_all, values};

#[test]
fn a_gguf_file_is_the_checkpoint_that_it_was_written_from() {
    for (name, dtype, tolerance) in [("llama-lm", DType::F16, 1e-6), ("qwen2-lm", DType::BF16, 0.01)] {
        let gguf = open(&format!("gguf/{name}.gguf"));
        assert_eq!(gguf.stored_dtype, dtype);
        let folder = open(name);
        let mut expected = folder.config.clone();
        expected.architecture = gguf.config.architecture.clone();
        if name == "llama-lm" {
            assert_ne!(expected.rope.scaling, RopeScaling::None);
            expected.rope.scaling = RopeScaling::None;
        }
        assert_eq!(gguf.config, expected);
        let (gguf, folder) = (take_all(gguf).unwrap(), take_all(folder).unwrap());
        for (tensor, value) in &folder {
            assert!(largest_difference(value, &gguf[tensor]) <= tolerance, "{name} {tensor}");
        }
    }
}

#[test]
fn damaged_gguf_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let good = std::fs::read(fixture("gguf/llama-lm.gguf")).unwrap();
    let check = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&source(&path)).and_then(take_all).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "`{word}` is not in: {error}"));
    };
    check(b"", &["model.gguf", "not GGUF"]);
    check(b"GGUF", &["model.gguf", "not GGUF"]);
    check(&good[..good.len() / 2], &["model.gguf"]);
    check(&good[..good.len() - 64], &["model.gguf", "bytes"]);
    // Counts beyond the file's size.
    for at in [8, 16] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        check(&bad, &["not GGUF"]);
    }
    let replaced = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).unwrap();
        let mut bad = good.clone();
        bad[at..at + to.len()].copy_from_slice(to);
        bad
    };
    check(&replaced(b"llama-bpe", b"unknown-x"), &["tokenizer.ggml.pre", "unknown-x", "qwen2"]);
    check(&replaced(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"), &["architecture `mamba`", "gemma2"]);
    check(&replaced(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), &["model.layers.1.self_attn.q_proj.weight"]);
    check(&replaced(b"llama.block_count", b"llama.block_xxxxx"), &["llama.block_count", "missing"]);
}

/// The metadata and tensors of a file to be written.
pub(crate) struct Draft {
    metadata: HashMap<String, Value>,
    pub(crate) tensors: HashMap<String, Tensor>,
}

impl Draft {
    fn of(fixture_name: &str, architecture: &str) -> Self {
        Self::of_folder(&fixture(fixture_name), architecture)
    }

    /// What llama.cpp's converter makes of a folder with one file of weights.
    pub(crate) fn of_folder(folder: &Path, architecture: &str) -> Self {
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&read("config.json")).unwrap();
        let tokenizer: serde_json::Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
        let number = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
        let mut metadata = HashMap::from([("general.architecture".to_owned(), text(architecture))]);
        for (key, value) in [
            ("block_count", number("num_hidden_layers")),
            ("context_length", number("max_position_embeddings")),
            ("embedding_length", number("hidden_size")),
            ("feed_forward_length", number("intermediate_size")),
            ("attention.head_count", number("num_attention_heads")),
            ("attention.head_count_kv", number("num_key_value_heads")),
            ("attention.key_length", number("head_dim")),
            ("attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32)),
            ("rope.freq_base", Value::F32(config["rope_theta"].as_f64().unwrap() as f32)),
        ] {
            metadata.insert(format!("{architecture}.{key}"), value);
        }
        let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
        let mut tokens = vec![String::new(); vocabulary.len()];
        vocabulary.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
        let merge = |pair: &serde_json::Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        let merges: Vec<_> = tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
        metadata.insert("tokenizer.ggml.model".to_owned(), text("gpt2"));
        metadata.insert("tokenizer.ggml.pre".to_owned(), text("qwen2"));
        metadata.insert("tokenizer.ggml.tokens".to_owned(), texts(&tokens));
        metadata.insert("tokenizer.ggml.merges".to_owned(), texts(&merges));

        let stored = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let tensors = stored.into_iter().map(|(name, tensor)| {
            let tensor = tensor.to_dtype(DType::F32).unwrap();
            let heads = match name.rsplit('.').nth(1) {
                Some("q_proj") => &config["num_attention_heads"],
                _ => &config["num_key_value_heads"],
            };
            let tensor = match architecture {
                "gemma2" if name.contains("norm") => (tensor + 1.0).unwrap(),
                "llama" if name.contains("q_proj") || name.contains("k_proj") => interleaved(&tensor, heads),
                _ => tensor,
            };
            (gguf_name(&name, architecture), tensor)
        });
        Self { metadata, tensors: tensors.collect() }
    }

    fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    /// Writes the file with all numbers as they are; the folder goes with the value.
    fn write(&self) -> (TempDir, PathBuf) {
        self.write_as(&|_| GgmlDType::F32)
    }

    /// As `write`, with the matrices in types by their name.
    pub(crate) fn write_as(&self, type_of: &dyn Fn(&str) -> GgmlDType) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let quantize = |name: &str, tensor: &Tensor| {
            let dtype = if tensor.rank() == 2 { type_of(name) } else { GgmlDType::F32 };
            QTensor::quantize(tensor, dtype).unwrap()
        };
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), quantize(name, tensor))).collect();
        let borrowed: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &borrowed).unwrap();
        (folder, path)
    }

    fn open(&self) -> Result<Checkpoint> {
        let (_folder, path) = self.write();
        Checkpoint::open(&source(&path))
    }
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn texts(list: &[String]) -> Value {
    Value::Array(list.iter().map(|entry| text(entry)).collect())
}

/// Rows of heads, `[2, half]`, in llama.cpp's order, `[half, 2]`.
fn interleaved(tensor: &Tensor, heads: &serde_json::Value) -> Tensor {
    let (rows, inputs) = tensor.dims2().unwrap();
    let heads = heads.as_u64().unwrap() as usize;
    let split = tensor.reshape((heads, 2, rows / heads / 2, inputs)).unwrap();
    split.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, inputs)).unwrap()
}

pub(crate) fn gguf_name(name: &str, architecture: &str) -> String {
    let name = name.replace("model.embed_tokens", "token_embd").replace("model.layers", "blk");
    let name = name.replace("model.norm", "output_norm").replace("lm_head", "output");
    let name = name.replace("input_layernorm", "attn_norm");
    let name = match architecture {
        "gemma2" => name
            .replace("post_attention_layernorm", "post_attention_norm")
            .replace("pre_feedforward_layernorm", "ffn_norm")
            .replace("post_feedforward_layernorm", "post_ffw_norm"),
        _ => name.replace("post_attention_layernorm", "ffn_norm"),
    };
    let name = name.replace("self_attn.o_proj", "attn_output").replace("self_attn.", "attn_").replace("mlp.", "ffn_");
    name.replace("_proj", "")
}

#[test]
fn qwen3_and_gemma2_files_are_the_checkpoints_that_they_were_written_from() {
    let mut gemma = Draft::of("gemma2-lm", "gemma2");
    gemma.set("gemma2.attn_logit_softcapping", Value::F32(5.0));
    gemma.set("gemma2.final_logit_softcapping", Value::F32(4.0));
    gemma.set("gemma2.attention.sliding_window", Value::U32(8));
    for (draft, name) in [(Draft::of("qwen3-lm", "qwen3"), "qwen3-lm"), (gemma, "gemma2-lm")] {
        let (_folder, path) = draft.write();
        let file = Checkpoint::open(&source(&path)).unwrap();
        assert_eq!(file.stored_dtype, DType::F32);
        let folder = open(name);
        let mut expected = folder.config.clone();
        expected.architecture = file.config.architecture.clone();
        if name == "gemma2-lm" {
            // The format has no place for the fixture's odd `query_pre_attn_scalar`.
            expected.attention_scale = 0.25;
        }
        assert_eq!(file.config, expected);
        let (file, folder) = (take_all(file).unwrap(), take_all(folder).unwrap());
        for (tensor, value) in &folder {
            assert!(largest_difference(value, &file[tensor]) <= 1e-6, "{name} {tensor}");
        }
    }
}

#[test]
fn rope_settings_of_a_file() {
    let scaling = |edit: &dyn Fn(&mut Draft)| {
        let mut draft = Draft::of("qwen3-lm", "qwen3");
        edit(&mut draft);
        let (_folder, path) = draft.write();
        let checkpoint = Checkpoint::open(&source(&path))?;
        let scaling = checkpoint.config.rope.scaling.clone();
        take_all(checkpoint).map(|_| scaling)
    };
    let linear = |draft: &mut Draft| {
        draft.set("qwen3.rope.scaling.type", text("linear")).set("qwen3.rope.scaling.factor", Value::F32(4.0));
    };
    assert_eq!(scaling(&linear).unwrap(), RopeScaling::Linear { factor: 4.0 });
    let old = |draft: &mut Draft| {
        draft.set("qwen3.rope.scale_linear", Value::F32(2.0));
    };
    assert_eq!(scaling(&old).unwrap(), RopeScaling::Linear { factor: 2.0 });
    let none = |draft: &mut Draft| {
        draft.set("qwen3.rope.scaling.type", text("none"));
    };
    assert_eq!(scaling(&none).unwrap(), RopeScaling::None);
    let yarn = |draft: &mut Draft| {
        draft.set("qwen3.rope.scaling.type", text("yarn"));
    };
    explained(scaling(&yarn), &["rope scaling `yarn`", "llama3"]);

    let factors = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
    let divisors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0];
    let listed = |draft: &mut Draft| drop(draft.tensors.insert("rope_freqs.weight".to_owned(), factors(&divisors)));
    assert_eq!(scaling(&listed).unwrap(), RopeScaling::Factors(divisors.to_vec()));
    let short = |draft: &mut Draft| drop(draft.tensors.insert("rope_freqs.weight".to_owned(), factors(&[1.0])));
    explained(scaling(&short), &["rope_freqs.weight", "8 numbers"]);
}

#[test]
fn files_that_are_not_served_are_refused_by_key() {
    let check = |key: &str, value: Value, words: &[&str]| {
        let mut draft = Draft::of("qwen3-lm", "qwen3");
        draft.set(key, value);
        explained(draft.open(), words);
    };
    check("qwen3.expert_count", Value::U32(8), &["qwen3.expert_count", "mixture of experts"]);
    check("qwen3.rope.dimension_count", Value::U32(8), &["partial_rotary_factor", "0.5"]);
    check("qwen3.block_count", Value::I32(-1), &["qwen3.block_count", "whole number"]);
    check("qwen3.block_count", Value::U32(0), &["num_hidden_layers"]);
    check("qwen3.feed_forward_length", Value::Array(vec![Value::U32(1)]), &["feed_forward_length", "array"]);
    check("general.architecture", text("llama4"), &["GGUF architecture `llama4`", "llama, qwen2, qwen3, gemma2"]);
    check("general.alignment", Value::U32(0), &["not GGUF", "general.alignment"]);
    check("qwen3.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), &["epsilon", "finite"]);
    check("tokenizer.ggml.pre", text(&"x".repeat(10_000)), &["tokenizer.ggml.pre", "x..."]);
    check("tokenizer.ggml.model", text("bert"), &["tokenizer.ggml.model", "bert", "llama"]);
    check("tokenizer.ggml.pre", text("default"), &["tokenizer.ggml.pre", "default", "llama-bpe"]);
    check("tokenizer.ggml.merges", texts(&["ab".to_owned()]), &["tokenizer.ggml.merges", "a space"]);
    check("tokenizer.ggml.merges", texts(&["a nowhere".to_owned()]), &["tokenizer.ggml.tokens", "fits its merges"]);
    check("tokenizer.ggml.bos_token_id", Value::U32(9999), &["tokenizer.ggml.bos_token_id", "id of a token"]);
    check("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)]), &["token_type", "280 entries"]);
    let mut draft = Draft::of("qwen3-lm", "qwen3");
    draft.tensors.insert("blk.0.ffn_gate_exps.weight".to_owned(), Tensor::ones(4, DType::F32, &Device::Cpu).unwrap());
    let (_folder, path) = draft.write();
    explained(Checkpoint::open(&source(&path)).and_then(take_all), &["blk.0.ffn_gate_exps.weight", "no use"]);
}

#[test]
fn biases_of_a_llama_file_are_found_by_their_tensors() {
    let mut draft = Draft::of("qwen3-lm", "qwen3");
    for (key, value) in draft.metadata.clone() {
        draft.set(&key.replace("qwen3.", "llama."), value);
    }
    draft.set("general.architecture", text("llama"));
    draft.tensors.retain(|name, _| !name.contains("q_norm") && !name.contains("k_norm"));
    // The rows of a head, [2, half] in the order of Hugging Face, in that of llama.cpp.
    let interleaved: Vec<f32> = (0..64).map(|row| (row / 16 * 16 + row % 2 * 8 + row % 16 / 2) as f32).collect();
    for layer in 0..2 {
        let mut insert = |name: &str, values: Vec<f32>| {
            let tensor = Tensor::new(values, &Device::Cpu).unwrap();
            draft.tensors.insert(format!("blk.{layer}.{name}.bias"), tensor);
        };
        insert("attn_q", interleaved.clone());
        insert("attn_k", interleaved[..32].to_vec());
        insert("attn_v", vec![0.0; 32]);
    }
    let checkpoint = draft.open().unwrap();
    let config = &checkpoint.config;
    assert_eq!((config.qkv_bias, config.attention_output_bias, config.mlp_bias), (true, false, false));
    // `open` removed the file's folder, but the file is still open.
    let taken = take_all(checkpoint).unwrap();
    let in_order = |count: usize| (0..count).map(|row| row as f32).collect::<Vec<_>>();
    assert_eq!(values(&taken["model.layers.1.self_attn.q_proj.bias"]), in_order(64));
    assert_eq!(values(&taken["model.layers.1.self_attn.k_proj.bias"]), in_order(32));
}

// --- SentencePiece ---------------------------------------------------------------------------------------------------

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// Replaces the tokenizer by a SentencePiece one: three specials, the 256 bytes, then `pieces`, best first.
fn sentence_piece(architecture: &str, fixture_name: &str, pieces: &[(&str, i32)]) -> Draft {
    let mut draft = Draft::of(fixture_name, architecture);
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let specials = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    let bytes = bytes.iter().map(|byte| (byte.as_str(), BYTE));
    let all: Vec<(&str, i32)> = specials.into_iter().chain(bytes).chain(pieces.iter().copied()).collect();
    let tokens: Vec<String> = all.iter().map(|(token, _)| (*token).to_owned()).collect();
    let score = |id: usize| Value::F32(if id < 259 { 0.0 } else { -((id - 259) as f32) });
    draft.set("tokenizer.ggml.model", text("llama"));
    draft.set("tokenizer.ggml.tokens", texts(&tokens));
    draft.set("tokenizer.ggml.token_type", Value::Array(all.iter().map(|(_, kind)| Value::I32(*kind)).collect()));
    draft.set("tokenizer.ggml.scores", Value::Array((0..all.len()).map(score).collect()));
    draft.set("tokenizer.ggml.bos_token_id", Value::U32(1)).set("tokenizer.ggml.eos_token_id", Value::U32(2));
    draft.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
    draft.metadata.remove("tokenizer.ggml.merges");
    let width = draft.tensors["token_embd.weight"].dims()[1];
    let rows = Tensor::ones((all.len(), width), DType::F32, &Device::Cpu).unwrap();
    draft.tensors.insert("token_embd.weight".to_owned(), rows);
    draft
}

#[track_caller]
fn check_tokens(checkpoint: &Checkpoint, input: &str, tokens: &[&str], decoded: &str) {
    let encoding = checkpoint.tokenizer.encode(input, true).unwrap();
    assert_eq!(encoding.get_tokens(), tokens, "{input:?}");
    assert_eq!(checkpoint.tokenizer.decode(encoding.get_ids(), true).unwrap(), decoded);
}

/// The tokens of Transformers 5.23 for the same vocabulary, but for the text after a special token: llama.cpp, and the
/// tokenizer.json files of Llama 2 and Mistral, put a space before it too.
#[test]
fn a_sentence_piece_vocabulary_of_llama_2() {
    let normal = |token| (token, 1);
    let pieces = ["▁t", "he", "▁the", "in", "▁", "t", "h", "e", "i", "n", "<", "s", ">", "s>"].map(normal);
    let checkpoint = sentence_piece("qwen3", "qwen3-lm", &pieces).open().unwrap();
    assert_eq!(checkpoint.special.bos.as_deref(), Some("<s>"));
    assert_eq!(checkpoint.special.unk.as_deref(), Some("<unk>"));
    assert_eq!(checkpoint.special.eos_ids, [2]);
    check_tokens(&checkpoint, "the then", &["<s>", "▁the", "▁the", "n"], "the then");
    check_tokens(&checkpoint, "in  the", &["<s>", "▁", "in", "▁", "▁the"], "in  the");
    check_tokens(&checkpoint, "thé", &["<s>", "▁t", "h", "<0xC3>", "<0xA9>"], "thé");
    check_tokens(&checkpoint, "the</s> the", &["<s>", "▁the", "</s>", "▁", "▁the"], "the  the");
    check_tokens(&checkpoint, "", &["<s>"], "");
}

/// The tokens of Transformers 5.23 for the same vocabulary.
#[test]
fn a_sentence_piece_vocabulary_of_gemma() {
    let mut pieces: Vec<_> = ["▁t", "he", "▁the", "▁", "t", "h", "e", "b"].map(|token| (token, 1)).to_vec();
    pieces.extend([("  ", USER_DEFINED), ("   ", USER_DEFINED), ("<table>", USER_DEFINED), ("<turn>", CONTROL)]);
    let mut draft = sentence_piece("gemma2", "gemma2-lm", &pieces);
    draft.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    draft.set("tokenizer.ggml.eot_token_id", Value::U32(270));
    let checkpoint = draft.open().unwrap();
    assert_eq!(checkpoint.special.eos_ids, [2, 270]);
    check_tokens(&checkpoint, "the the", &["<s>", "t", "he", "▁the"], "the the");
    check_tokens(&checkpoint, "b   b", &["<s>", "b", "▁▁▁", "b"], "b   b");
    check_tokens(&checkpoint, "<table><turn>b", &["<s>", "<table>", "<turn>", "b"], "<table>b");
    // Said in the file, though a BOS is usual.
    draft
        .set("tokenizer.ggml.add_bos_token", Value::Bool(false))
        .set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    check_tokens(&draft.open().unwrap(), "b", &["b", "</s>"], "b");
}
