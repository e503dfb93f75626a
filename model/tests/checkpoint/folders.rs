//! What is in a folder.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};
use plumb_model::checkpoint::Checkpoint;
use plumb_model::config::{Head, RewardHead};
use serde_json::{Value, json};

use crate::support::{Copy, FOLDERS, fixture, open, take_all, values};

#[test]
fn every_tensor_of_every_folder_is_taken_as_it_is_stored() {
    for name in FOLDERS {
        let checkpoint = open(name);
        assert_eq!(checkpoint.stored_dtype, DType::BF16, "{name}");
        let mut stored = HashMap::new();
        for file in std::fs::read_dir(fixture(name)).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|extension| extension == "safetensors") {
                stored.extend(candle_core::safetensors::load(file, &Device::Cpu).unwrap());
            }
        }
        let taken = take_all(checkpoint).unwrap();
        for (tensor, value) in &taken {
            assert_eq!(value.dtype(), stored[tensor].dtype(), "{name} {tensor}");
            assert_eq!(values(value), values(&stored[tensor]), "{name} {tensor}");
        }
        stored.retain(|tensor, _| !taken.contains_key(tensor));
        let mut left: Vec<_> = stored.keys().map(String::as_str).collect();
        left.sort_unstable();
        let inert: &[&str] = match name {
            "neox-lm-sequential" => {
                &["gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]
            }
            _ => &[],
        };
        assert_eq!(left, inert, "{name}");
    }
}

#[test]
fn texts_become_the_token_ids_of_transformers() {
    let check = |checkpoint: &Checkpoint, expected: &Path| {
        let expected: Value = serde_json::from_slice(&std::fs::read(expected).unwrap()).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let encoding = checkpoint.tokenizer.encode(case["text"].as_str().unwrap(), true).unwrap();
            assert_eq!(json!(encoding.get_ids()), case["token_ids"], "{}", checkpoint.source.model);
        }
    };
    for name in FOLDERS {
        check(&open(name), &fixture(name).join("expected.json"));
    }
    check(&open("gguf/llama-lm.gguf"), &fixture("gguf/llama-lm.expected.json"));
    check(&open("gguf/qwen2-lm.gguf"), &fixture("gguf/qwen2-lm.expected.json"));
}

#[test]
fn heads() {
    let head = |name: &str| open(name).config.head;
    let reward = |weight: &str, bias: Option<&str>, normalization| {
        Head::Reward(RewardHead { weight: weight.to_owned(), bias: bias.map(str::to_owned), normalization })
    };
    assert_eq!(head("llama-lm"), Head::Language);
    for name in ["llama-pm", "qwen2-pm", "qwen3-pm", "mistral-pm", "gemma2-pm", "neox-pm"] {
        assert_eq!(head(name), reward("score.weight", None, None), "{name}");
    }
    assert_eq!(head("openrlhf-pm"), reward("value_head.weight", None, Some((-0.421_7, 1.836))));
    assert_eq!(head("trl-value-head"), reward("v_head.summary.weight", Some("v_head.summary.bias"), None));
}

#[test]
fn special_tokens_and_templates() {
    let llama = open("llama-lm");
    assert_eq!(llama.special.bos.as_deref(), Some("<|bos|>"));
    assert_eq!(llama.special.eos.as_deref(), Some("<|eos|>"));
    assert_eq!(llama.special.eos_ids, [1]);
    assert!(llama.chat_template.unwrap().starts_with("{%- for message in messages %}"));
    // Tokens as objects; a template in tokenizer_config.json; none at all.
    assert_eq!(open("llama-lm-sharded").special.bos.as_deref(), Some("<|bos|>"));
    let qwen = open("qwen2-lm");
    assert_eq!(qwen.special.bos, None);
    assert!(qwen.chat_template.unwrap().contains("<|assistant|>"));
    assert_eq!(open("qwen3-lm").chat_template, None);
    assert!(open("gguf/llama-lm.gguf").chat_template.unwrap().contains("<|assistant|>"));
}

#[test]
fn generation_config_names_the_ends() {
    let copy = Copy::of("llama-lm");
    copy.write("generation_config.json", r#"{"eos_token_id": [3, 2]}"#);
    assert_eq!(copy.open().unwrap().special.eos_ids, [1, 2, 3]);
}

#[test]
fn named_templates_and_special_tokens_map() {
    let copy = Copy::of("qwen3-lm");
    let templates = json!([{ "name": "tool_use", "template": "a" }, { "name": "default", "template": "b" }]);
    copy.edit("tokenizer_config.json", |config| {
        config["chat_template"] = templates;
        config.as_object_mut().unwrap().remove("eos_token");
    });
    copy.write("special_tokens_map.json", r#"{"eos_token": {"content": "<|user|>"}, "bos_token": "<|eos|>"}"#);
    let checkpoint = copy.open().unwrap();
    assert_eq!(checkpoint.chat_template.as_deref(), Some("b"));
    assert_eq!(checkpoint.special.eos.as_deref(), Some("<|user|>"));
    // tokenizer_config.json says null, and wins.
    assert_eq!(checkpoint.special.bos, None);
}

#[test]
fn training_leftovers_in_the_tokenizer_are_switched_off() {
    let copy = Copy::of("llama-lm");
    copy.edit("tokenizer.json", |tokenizer| {
        tokenizer["truncation"] =
            json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        let strategy = json!({ "Fixed": 64 });
        tokenizer["padding"] = json!({
            "strategy": strategy, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0,
            "pad_token": "<|eos|>",
        });
    });
    let ids = |checkpoint: Checkpoint| {
        checkpoint.tokenizer.encode("The reward is the last token.", true).unwrap().get_ids().to_vec()
    };
    assert_eq!(ids(copy.open().unwrap()), ids(open("llama-lm")));
}
