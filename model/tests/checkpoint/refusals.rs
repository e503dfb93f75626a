//! What is refused, and what may be left over.

use candle_core::{DType, Device, Tensor};
use plumb_model::Error;
use plumb_model::checkpoint::{Checkpoint, Source};
use serde_json::{Value, json};

use crate::support::{Copy, explained, fixture, ones, open, take_all};

#[test]
fn a_missing_tensor_is_named_with_its_shape() {
    let copy = Copy::of("llama-lm");
    copy.edit_tensors(|tensors| drop(tensors.remove("model.norm.weight")));
    let error = copy.refused(&["`model.norm.weight` is missing", "[32]"]);
    assert!(matches!(error, Error::MissingTensor { .. }));
    let copy = Copy::of("llama-pm");
    copy.edit_tensors(|tensors| drop(tensors.remove("score.weight")));
    copy.refused(&["`score.weight` is missing", "[1, 32]"]);
    let copy = Copy::of("openrlhf-pm");
    copy.edit_tensors(|tensors| drop(tensors.remove("value_head.weight")));
    copy.refused(&["`value_head.weight` is missing"]);
}

#[test]
fn extra_tensors_are_named() {
    let copy = Copy::of("llama-lm");
    copy.edit_tensors(|tensors| {
        tensors.insert("model.layers.2.input_layernorm.weight".to_owned(), ones(&[32]));
        tensors.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), ones(&[32]));
    });
    let words = ["holds 2 tensors", "LlamaForCausalLM", "model.layers.2.input_layernorm.weight", "q_proj.bias"];
    let error = copy.refused(&words);
    assert!(matches!(error, Error::ExtraTensors { .. }));
    // A vocabulary head has no place in a classifier, though it has beside a value head.
    let copy = Copy::of("llama-pm");
    copy.edit_tensors(|tensors| drop(tensors.insert("lm_head.weight".to_owned(), ones(&[280, 32]))));
    copy.refused(&["lm_head.weight", "LlamaForSequenceClassification"]);
}

#[test]
fn misshapen_tensors_are_named_with_both_shapes() {
    let copy = Copy::of("llama-lm");
    let name = "model.layers.1.mlp.up_proj.weight";
    copy.edit_tensors(|tensors| drop(tensors.insert(name.to_owned(), ones(&[48, 31]))));
    let error = copy.refused(&[name, "[48, 31]", "[48, 32]"]);
    assert!(matches!(error, Error::MisshapenTensor { .. }));
    let copy = Copy::of("qwen3-pm");
    copy.edit_tensors(|tensors| drop(tensors.insert("score.weight".to_owned(), ones(&[2, 32]))));
    copy.refused(&["score.weight", "[2, 32]", "[1, 32]"]);
}

#[test]
fn inert_tensors_are_left_alone() {
    let inert = [
        ("qwen3-lm", "lm_head.weight", vec![280, 32]),
        ("trl-value-head", "lm_head.weight", vec![280, 32]),
        ("openrlhf-pm", "mean", vec![1]),
        ("openrlhf-pm", "std", vec![1]),
        ("neox-lm", "gpt_neox.layers.1.attention.bias", vec![1, 1, 8, 8]),
        ("llama-lm", "model.layers.0.self_attn.rotary_emb.inv_freq", vec![4]),
    ];
    for (name, tensor, shape) in inert {
        let copy = Copy::of(name);
        copy.edit_tensors(|tensors| drop(tensors.insert(tensor.to_owned(), ones(&shape))));
        take_all(copy.open().unwrap()).unwrap();
    }
    let copy = Copy::of("llama-lm");
    copy.edit_tensors(|tensors| drop(tensors.insert("mean".to_owned(), ones(&[1]))));
    copy.refused(&["mean"]);
}

#[test]
fn a_wrapped_value_head_is_unwrapped() {
    let copy = Copy::of("trl-value-head");
    copy.rename_tensors(|name| match name.starts_with("v_head") {
        true => name.to_owned(),
        false => format!("pretrained_model.{name}"),
    });
    let wrapped = take_all(copy.open().unwrap()).unwrap();
    assert_eq!(wrapped.len(), take_all(open("trl-value-head")).unwrap().len());
}

#[test]
fn types_that_are_not_read_are_named() {
    let copy = Copy::of("llama-lm");
    let name = "model.norm.weight";
    copy.edit_tensors(|tensors| {
        let tensor = Tensor::ones(32, DType::F64, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), tensor);
    });
    copy.refused(&[name, "F64", "BF16"]);
    copy.edit_tensors(|tensors| {
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F64).unwrap());
    });
    copy.refused(&["F32, F16, BF16"]);
}

#[test]
fn the_stored_type_is_that_of_the_linear_weights() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let copy = Copy::of("llama-lm");
        copy.edit_tensors(|tensors| {
            for (name, tensor) in tensors {
                let dtype = if name.contains("norm") { DType::F32 } else { dtype };
                *tensor = tensor.to_dtype(dtype).unwrap();
            }
        });
        let checkpoint = copy.open().unwrap();
        assert_eq!(checkpoint.stored_dtype, dtype);
        assert_eq!(take_all(checkpoint).unwrap()["model.norm.weight"].dtype(), DType::F32);
    }
}

#[test]
fn sources_that_are_none_are_refused() {
    let refused = |model: &str, words: &[&str]| {
        explained(Checkpoint::open(&Source { model: model.to_owned(), ..Source::default() }), words);
    };
    refused("/no/such/folder", &["/no/such/folder", "org/name", "missing"]);
    refused("gpt2", &["gpt2", "org/name"]);
    refused(fixture("llama-lm/config.json").to_str().unwrap(), &["config.json", ".gguf"]);
    let empty = tempfile::tempdir().unwrap();
    refused(empty.path().to_str().unwrap(), &["config.json", "missing"]);
    refused(fixture("lora-pm").to_str().unwrap(), &["config.json", "adapter", "name the model"]);
}

#[test]
fn files_that_are_missing_or_senseless_are_named() {
    let missing = |file: &str, words: &[&str]| {
        let copy = Copy::of("llama-lm");
        copy.remove(file);
        copy.refused(words);
    };
    missing("tokenizer.json", &["tokenizer.json", "missing", "save_pretrained"]);
    missing("model.safetensors", &["model.safetensors", "missing"]);
    let copy = Copy::of("llama-lm");
    copy.remove("model.safetensors");
    copy.write("pytorch_model.bin", "pickle");
    copy.refused(&["pytorch_model.bin", "run code", "safe_serialization=True"]);
    for (file, text, words) in [
        ("config.json", "{", &["config.json", "not valid JSON"][..]),
        ("config.json", "[]", &["config.json", "object"]),
        ("tokenizer.json", "{}", &["tokenizer.json", "not a tokenizer"]),
        ("tokenizer_config.json", r#"{"eos_token": 3}"#, &["tokenizer_config.json", "eos_token"]),
        ("tokenizer_config.json", r#"{"chat_template": 3}"#, &["tokenizer_config.json", "chat_template"]),
        ("generation_config.json", r#"{"eos_token_id": ["a"]}"#, &["generation_config.json", "eos_token_id"]),
    ] {
        let copy = Copy::of("qwen3-lm");
        copy.write(file, text);
        copy.refused(words);
    }
}

#[test]
fn a_tokenizer_beyond_the_embedding_is_refused() {
    let copy = Copy::of("llama-lm");
    copy.edit("config.json", |config| config["vocab_size"] = json!(279));
    copy.refused(&["tokenizer", "id 279", "279 rows", "vocab_size"]);
}

#[test]
fn damaged_safetensors_are_refused() {
    let bytes = std::fs::read(fixture("llama-lm/model.safetensors")).unwrap();
    let check = |bytes: &[u8], words: &[&str]| {
        let copy = Copy::of("llama-lm");
        std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
        copy.refused(words);
    };
    check(b"", &["model.safetensors", "0 bytes"]);
    check(&bytes[..bytes.len() - 1], &["model.safetensors", "describes", "again"]);
    check(&[&bytes[..], b"x"].concat(), &["model.safetensors", "describes"]);
    check(&[&(1u64 << 62).to_le_bytes()[..], &bytes[8..]].concat(), &["a header of", "in a file of"]);
    check(&[&bytes[..8], b"!", &bytes[9..]].concat(), &["not safetensors"]);
}

#[test]
fn headers_that_are_only_large_are_refused() {
    let check = |header: String, words: &[&str]| {
        let copy = Copy::of("llama-lm");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
        copy.refused(words);
    };
    let empty =
        |name: &str, shape: &[usize]| format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,0]}}"#);
    check(format!("{{{}}}", empty(&"x".repeat(513), &[0])), &["name has 513 bytes, 512 are allowed"]);
    check(format!("{{{}}}", empty("x", &[0; 9])), &["tensor `x` has 9 dimensions, 8 are allowed"]);
    let many: Vec<_> = (0..65_537).map(|i| empty(&i.to_string(), &[0])).collect();
    check(format!("{{{}}}", many.join(",")), &["65537 tensors, 65536 are allowed"]);
    check(" ".repeat((16 << 20) + 1), &["a header of 16777217 bytes"]);
    let copy = Copy::of("llama-lm");
    copy.write("config.json", &" ".repeat((16 << 20) + 1));
    copy.refused(&["config.json", "16777217 bytes, 16777216 are allowed"]);
}

#[test]
fn tokenizers_that_would_not_come_back_are_refused() {
    let check = |part: &str, value: Value, words: &[&str]| {
        let copy = Copy::of("llama-lm");
        copy.edit("tokenizer.json", |tokenizer| tokenizer[part] = value);
        copy.refused(words);
    };
    let nested = json!({ "type": "Split", "pattern": { "Regex": "(a+)+$" }, "behavior": "Isolated", "invert": false });
    check("pre_tokenizer", nested, &["tokenizer.json", "pre_tokenizer", "regular expression"]);
    // The crate would take it for whatever has such fields.
    let untyped = json!({ "pattern": { "String": "a" }, "content": "b" });
    check("normalizer", untyped.clone(), &["tokenizer.json", "normalizer", "a step has no `type`"]);
    let within = json!({ "type": "Sequence", "decoders": [untyped] });
    check("decoder", within, &["tokenizer.json", "decoder", "a step has no `type`"]);
    let copy = Copy::of("llama-lm");
    copy.write("chat_template.jinja", &"x".repeat((1 << 20) + 1));
    copy.refused(&["chat_template.jinja", "1048577 bytes, 1048576 are allowed"]);
}

#[test]
fn senseless_indices_are_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    let name = "model.norm.weight";
    let check = |file: Value, words: &[&str]| {
        let copy = Copy::of("llama-lm-sharded");
        copy.edit(INDEX, |index| index["weight_map"][name] = file);
        copy.refused(words);
    };
    check(json!("../model-00002-of-00002.safetensors"), &[INDEX, name, "same folder"]);
    check(json!("model.bin"), &[INDEX, name]);
    check(json!("model-00001-of-00002.safetensors"), &["model-00001-of-00002.safetensors", name, "not here"]);
    check(json!("model-00003-of-00003.safetensors"), &["model-00003-of-00003.safetensors"]);
    let copy = Copy::of("llama-lm-sharded");
    copy.write(INDEX, "{}");
    copy.refused(&[INDEX, "weight_map"]);
    let copy = Copy::of("llama-lm-sharded");
    std::fs::copy(copy.path().join("model-00001-of-00002.safetensors"), copy.path().join("again.safetensors")).unwrap();
    copy.edit(INDEX, |index| index["weight_map"]["x"] = json!("again.safetensors"));
    copy.refused(&["also in another shard"]);
}

#[test]
fn a_tensor_can_be_taken_once() {
    let mut weights = open("llama-lm").weights;
    weights.take("model.norm.weight", &[32]).unwrap();
    explained(weights.take("model.norm.weight", &[32]), &["`model.norm.weight` is missing"]);
    // What was asked for in a wrong shape is still there.
    explained(weights.take("lm_head.weight", &[32, 280]), &["[280, 32]", "[32, 280]"]);
    assert!(weights.contains("lm_head.weight"));
    explained(weights.finish(), &["holds 20 tensors", "lm_head.weight", "model.embed_tokens.weight"]);
}
