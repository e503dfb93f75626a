//! LoRA adapters on folders and on a GGUF file.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::support::{Copy, explained, fixture, largest_difference, ones, open, open_with_adapter, take_all, values};

/// Merges as its own file does, and compares all tensors.
fn check_adapter(base: &str, adapter: &str, scale: f64) -> HashMap<String, Tensor> {
    let weights = fixture(adapter).join("adapter_model.safetensors");
    let deltas = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
    let plain = take_all(open(base)).unwrap();
    let merged = take_all(open_with_adapter(&fixture(base), &fixture(adapter)).unwrap()).unwrap();
    let mut changed = 0;
    for (name, tensor) in &merged {
        let key = format!("base_model.model.{}", name.trim_end_matches(".weight"));
        let Some(a) = deltas.get(&format!("{key}.lora_A.weight")) else {
            if let Some(base) = plain.get(name) {
                assert_eq!(values(tensor), values(base), "{name}");
            }
            continue;
        };
        let b = deltas[&format!("{key}.lora_B.weight")].to_dtype(DType::F32).unwrap();
        let product = (b.matmul(&a.to_dtype(DType::F32).unwrap()).unwrap() * scale).unwrap();
        let exact = (plain[name].to_dtype(DType::F32).unwrap() + product).unwrap();
        assert_eq!(tensor.dtype(), DType::F32);
        assert_eq!(values(tensor), values(&exact), "{name}");
        assert!(largest_difference(tensor, &plain[name]) > 0.01, "{name}");
        changed += 1;
    }
    assert!(changed > 0);
    merged
}

#[test]
fn a_classifier_adapter_makes_a_language_model_a_preference_model() {
    let merged = check_adapter("llama-lm", "lora-pm", 8.0 / 4.0);
    assert_eq!(merged["score.weight"].dims(), [1, 32]);
    assert!(!merged.contains_key("lm_head.weight"));
}

#[test]
fn a_rank_stabilised_adapter_is_scaled_by_the_root() {
    check_adapter("qwen2-lm", "lora-lm", 9.0 / 6f64.sqrt());
}

#[test]
fn an_adapter_fits_a_gguf_file() {
    let checkpoint = open_with_adapter(&fixture("gguf/llama-lm.gguf"), &fixture("lora-pm")).unwrap();
    let merged = take_all(checkpoint).unwrap();
    let expected = take_all(open_with_adapter(&fixture("llama-lm"), &fixture("lora-pm")).unwrap()).unwrap();
    for (name, tensor) in &expected {
        assert!(largest_difference(tensor, &merged[name]) < 0.02, "{name}");
    }
}

#[test]
fn alphas_by_module_and_saved_names_with_default() {
    let adapter = Copy::of("lora-pm");
    adapter.edit("adapter_config.json", |config| {
        config["alpha_pattern"] = json!({ "layers.0.self_attn.q_proj": 2.0, "proj": 100.0 });
    });
    adapter.rename_tensors(|name| {
        let name = name.replace("lora_A.weight", "lora_A.default.weight");
        name.replace("score.weight", "score.modules_to_save.default.weight")
    });
    let scaled = take_all(open_with_adapter(&fixture("llama-lm"), adapter.path()).unwrap()).unwrap();
    let plain = take_all(open_with_adapter(&fixture("llama-lm"), &fixture("lora-pm")).unwrap()).unwrap();
    let differ = |name: &str| largest_difference(&scaled[name], &plain[name]) > 0.0;
    assert!(differ("model.layers.0.self_attn.q_proj.weight"));
    // The name is a whole part of a path, so `proj` is no module.
    assert!(!differ("model.layers.1.self_attn.q_proj.weight"));
    assert_eq!(values(&scaled["score.weight"]), values(&plain["score.weight"]));
}

#[test]
fn the_adapters_tokenizer_and_template_win() {
    let adapter = Copy::of("lora-pm");
    adapter.write("chat_template.jinja", "of the adapter");
    let checkpoint = open_with_adapter(&fixture("llama-lm"), adapter.path()).unwrap();
    assert_eq!(checkpoint.chat_template.as_deref(), Some("of the adapter"));
    assert_eq!(checkpoint.special.bos.as_deref(), Some("<|bos|>"));

    let adapter = Copy::of("lora-pm");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("qwen3-lm").join(file), adapter.path().join(file)).unwrap();
    }
    let checkpoint = open_with_adapter(&fixture("llama-lm"), adapter.path()).unwrap();
    assert_eq!(checkpoint.special.bos, None);
    assert_eq!(
        checkpoint.tokenizer.encode("yes", true).unwrap().get_ids()[0],
        open("qwen3-lm").tokenizer.encode("yes", true).unwrap().get_ids()[0]
    );
    // The adapter has no template of its own.
    assert!(checkpoint.chat_template.unwrap().contains("<|assistant|>"));
}

#[test]
fn adapters_that_cannot_be_merged_are_refused_by_option() {
    let options = [
        ("peft_type", json!("IA3"), "LORA"),
        ("task_type", json!("SEQ_2_SEQ_LM"), "SEQ_CLS"),
        ("use_dora", json!(true), "use_dora"),
        ("use_qalora", json!(true), "use_qalora"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out"),
        ("bias", json!("all"), "bias"),
        ("lora_bias", json!(true), "lora_bias"),
        ("init_lora_weights", json!("pissa"), "pissa"),
        ("layer_replication", json!([[0, 1]]), "layer_replication"),
        ("alora_invocation_tokens", json!([1]), "alora_invocation_tokens"),
        ("target_parameters", json!(["x"]), "target_parameters"),
        ("trainable_token_indices", json!([1]), "trainable_token_indices"),
        ("loftq_config", json!({ "loftq_bits": 4 }), "loftq_config"),
        ("invented_tomorrow", json!(1), "invented_tomorrow"),
        ("alpha_pattern", json!({ ".*q_proj": 2 }), ".*q_proj"),
        ("alpha_pattern", json!({ "q_proj": 0 }), "q_proj"),
        ("r", json!(0), "`r`"),
        ("r", json!(5), "rank 4"),
        ("lora_alpha", json!(null), "lora_alpha"),
    ];
    for (key, value, word) in options {
        let adapter = Copy::of("lora-pm");
        adapter.edit("adapter_config.json", |config| config[key] = value);
        adapter.refused_on("llama-lm", &[word]);
    }
    let adapter = Copy::of("lora-pm");
    adapter.edit("adapter_config.json", |config| {
        config["r"] = json!(5);
        config["rank_pattern"] = json!({ "proj": 4 });
    });
    take_all(open_with_adapter(&fixture("llama-lm"), adapter.path()).unwrap()).unwrap();
}

#[test]
fn every_tensor_of_an_adapter_has_a_use() {
    let check = |edit: fn(&mut HashMap<String, Tensor>), words: &[&str]| {
        let adapter = Copy::of("lora-pm");
        adapter.edit_tensors(edit);
        adapter.refused_on("llama-lm", words);
    };
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    check(|tensors| drop(tensors.remove(A)), &["layers.0.self_attn.q_proj", "only one of lora_A and lora_B"]);
    check(|tensors| drop(tensors.insert(A.to_owned(), ones(&[4, 31]))), &[A, "[32, 31]", "[32, 32]"]);
    check(|tensors| drop(tensors.insert(A.to_owned(), ones(&[3, 32]))), &[A, "rank 3"]);
    check(|tensors| drop(tensors.insert(A.to_owned(), ones(&[4]))), &[A, "not matrices"]);
    check(|tensors| drop(tensors.insert("x".to_owned(), ones(&[4]))), &["`x`", "base_model.model."]);
    check(
        |tensors| drop(tensors.insert("base_model.model.model.norm.weight".to_owned(), ones(&[32]))),
        &["model.norm.weight", "modules_to_save"],
    );
    check(
        |tensors| {
            for key in [A, B] {
                let tensor = tensors.remove(key).unwrap();
                tensors.insert(key.replace("layers.0", "layers.9"), tensor);
            }
        },
        &["layers.9.self_attn.q_proj.lora_A.weight", "no use"],
    );
    check(|tensors| drop(tensors.remove("base_model.model.score.weight")), &["`score.weight` is missing"]);
}

#[test]
fn adapters_without_files_are_refused() {
    let adapter = Copy::of("lora-pm");
    adapter.remove("adapter_model.safetensors");
    adapter.refused_on("llama-lm", &["adapter_model.safetensors", "missing"]);
    adapter.write("adapter_model.bin", "pickle");
    adapter.refused_on("llama-lm", &["adapter_model.bin", "run code"]);
    adapter.remove("adapter_config.json");
    adapter.refused_on("llama-lm", &["adapter_config.json", "missing"]);
    let gguf = fixture("gguf/llama-lm.gguf");
    explained(open_with_adapter(&fixture("llama-lm"), &gguf), &["adapter", "folders"]);
}
