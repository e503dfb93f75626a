use serde_json::json;

use super::*;
use crate::config::{Rope, RopeScaling};

fn parse_json(json: &Value) -> Result<Config> {
    parse(Path::new("config.json"), json, &Holdings::default())
}

/// The keys without defaults.
fn minimal(class: &str) -> Value {
    json!({
        "architectures": [class],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    let changes = changes.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(changes);
    config
}

/// What `minimal("LlamaForCausalLM")` means.
fn llama() -> Config {
    Config {
        architecture: "LlamaForCausalLM".to_owned(),
        family: Family::Llama,
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 100,
        max_position_embeddings: 2048,
        norm: Norm::Rms { eps: 1e-6, offset: 0.0 },
        rope: Rope { dim: 16, theta: 10_000.0, scaling: RopeScaling::None },
        activation: Activation::Silu,
        gated: true,
        qkv_bias: false,
        attention_output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        block: Block::PreNorm,
        embedding_scale: 1.0,
        attention_scale: 0.25,
        attention_softcap: None,
        logit_softcap: None,
        windows: vec![None; 3],
        tie_word_embeddings: false,
        head: Head::Language,
    }
}

#[test]
fn keys_that_are_absent_have_the_defaults_of_transformers() {
    let named = |architecture: &str| Config { architecture: architecture.to_owned(), ..llama() };
    let expected = [
        llama(),
        Config { qkv_bias: true, max_position_embeddings: 32_768, ..named("Qwen2ForCausalLM") },
        Config {
            head_dim: 128,
            rope: Rope { dim: 128, ..llama().rope },
            attention_scale: 128f32.sqrt().recip(),
            qk_norm: true,
            max_position_embeddings: 32_768,
            ..named("Qwen3ForCausalLM")
        },
        Config { max_position_embeddings: 131_072, windows: vec![Some(4096); 3], ..named("MistralForCausalLM") },
        Config {
            head_dim: 256,
            rope: Rope { dim: 256, ..llama().rope },
            norm: Norm::Rms { eps: 1e-6, offset: 1.0 },
            activation: Activation::GeluTanh,
            block: Block::SandwichNorm,
            embedding_scale: 8.0,
            attention_scale: 1.0 / 16.0,
            attention_softcap: Some(50.0),
            logit_softcap: Some(30.0),
            windows: vec![Some(4096), None, Some(4096)],
            tie_word_embeddings: true,
            max_position_embeddings: 8192,
            ..named("Gemma2ForCausalLM")
        },
        Config {
            family: Family::GptNeoX,
            num_kv_heads: 4,
            rope: Rope { dim: 4, ..llama().rope },
            norm: Norm::Layer { eps: 1e-5 },
            activation: Activation::Gelu,
            gated: false,
            qkv_bias: true,
            attention_output_bias: true,
            mlp_bias: true,
            block: Block::Parallel,
            ..named("GPTNeoXForCausalLM")
        },
    ];
    for expected in expected {
        let class = expected.architecture.clone();
        assert_eq!(parse_json(&minimal(&class)).unwrap(), expected, "{class}");
    }
}

/// Checks what a change of the minimal configuration changes.
#[track_caller]
fn check(class: &str, changes: Value, expect: impl Fn(&mut Config)) {
    let mut expected = parse_json(&minimal(class)).unwrap();
    expect(&mut expected);
    assert_eq!(parse_json(&with(minimal(class), changes)).unwrap(), expected);
}

#[test]
fn llama_values() {
    let class = "LlamaForCausalLM";
    check(class, json!({ "head_dim": 32 }), |c| {
        (c.head_dim, c.rope.dim, c.attention_scale) = (32, 32, 32f32.sqrt().recip());
    });
    check(class, json!({ "num_key_value_heads": null }), |c| c.num_kv_heads = 4);
    check(class, json!({ "rms_norm_eps": 1e-5 }), |c| c.norm = Norm::Rms { eps: 1e-5, offset: 0.0 });
    check(class, json!({ "max_position_embeddings": 77 }), |c| c.max_position_embeddings = 77);
    check(class, json!({ "tie_word_embeddings": true }), |c| c.tie_word_embeddings = true);
    check(class, json!({ "mlp_bias": true }), |c| c.mlp_bias = true);
    check(class, json!({ "attention_bias": true }), |c| {
        (c.qkv_bias, c.attention_output_bias) = (true, true);
    });
    // Keys that mean nothing to this class.
    check(class, json!({ "sliding_window": 9, "attn_logit_softcapping": 2.0, "torch_dtype": "float16" }), |_| {});
}

#[test]
fn activations() {
    let cases = [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_python", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_fast", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("gelu_python_tanh", Activation::GeluTanh),
    ];
    for (name, activation) in cases {
        check("LlamaForCausalLM", json!({ "hidden_act": name }), |c| c.activation = activation);
        check("Gemma2ForCausalLM", json!({ "hidden_activation": name }), |c| c.activation = activation);
        check("Gemma2ForCausalLM", json!({ "hidden_act": name }), |_| {});
    }
}

#[test]
fn rope_in_the_old_and_the_new_spelling() {
    let class = "LlamaForCausalLM";
    check(class, json!({ "rope_theta": 500_000.0, "rope_scaling": null }), |c| c.rope.theta = 500_000.0);
    let nested = json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 500_000.0 } });
    check(class, nested, |c| c.rope.theta = 500_000.0);

    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 2 }, "rope_theta": 7.0 });
    let nested_linear = json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0 } });
    for json in [linear, nested_linear] {
        check(class, json, |c| {
            c.rope = Rope { dim: 16, theta: 7.0, scaling: RopeScaling::Linear { factor: 2.0 } };
        });
    }

    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let scaled = |original_max_position_embeddings| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings,
    };
    check(class, json!({ "rope_scaling": llama3 }), |c| c.rope.scaling = scaled(64));
    check(class, json!({ "rope_parameters": llama3 }), |c| c.rope.scaling = scaled(64));
    // The model's own context where nothing is said, and a key beside the object wins.
    let unsaid = with(llama3.clone(), json!({ "original_max_position_embeddings": null }));
    check(class, json!({ "rope_parameters": unsaid }), |c| c.rope.scaling = scaled(2048));
    let both = json!({ "rope_parameters": llama3, "original_max_position_embeddings": 32 });
    check(class, both, |c| c.rope.scaling = scaled(32));

    let one = json!({ "rope_type": "default", "rope_theta": 9.0 });
    let each = json!({ "rope_parameters": { "sliding_attention": one, "full_attention": one } });
    check("Gemma2ForCausalLM", each, |c| c.rope.theta = 9.0);
    check("Gemma2ForCausalLM", json!({ "rope_parameters": { "sliding_attention": one } }), |c| c.rope.theta = 9.0);
}

#[test]
fn gpt_neox_values() {
    let class = "GPTNeoXForCausalLM";
    check(class, json!({ "rotary_pct": 0.5, "rotary_emb_base": 9 }), |c| (c.rope.dim, c.rope.theta) = (8, 9.0));
    let new = json!({ "rope_parameters": { "partial_rotary_factor": 0.5, "rope_theta": 9.0 } });
    check(class, new, |c| (c.rope.dim, c.rope.theta) = (8, 9.0));
    check(class, json!({ "use_parallel_residual": false }), |c| c.block = Block::PreNorm);
    check(class, json!({ "layer_norm_eps": 1e-3 }), |c| c.norm = Norm::Layer { eps: 1e-3 });
    check(class, json!({ "attention_bias": false }), |c| {
        (c.qkv_bias, c.attention_output_bias) = (false, false);
    });
}

#[test]
fn windows_of_each_class() {
    for class in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let on = json!({ "use_sliding_window": true, "sliding_window": 8 });
        let from = |layers: u32| with(on.clone(), json!({ "max_window_layers": layers }));
        check(class, json!({ "sliding_window": 8, "max_window_layers": 0 }), |_| {});
        check(class, on.clone(), |_| {});
        check(class, from(1), |c| c.windows = vec![None, Some(8), Some(8)]);
        check(class, from(0), |c| c.windows = vec![Some(8); 3]);
        let types = json!({ "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] });
        check(class, with(on.clone(), types), |c| c.windows = vec![Some(8), None, Some(8)]);
        let full = json!({ "layer_types": ["full_attention", "full_attention", "full_attention"] });
        check(class, full, |_| {});
    }
    check("MistralForCausalLM", json!({ "sliding_window": 8 }), |c| c.windows = vec![Some(8); 3]);
    check("MistralForCausalLM", json!({ "sliding_window": null }), |c| c.windows = vec![None; 3]);
    check("Gemma2ForCausalLM", json!({ "sliding_window": 8 }), |c| c.windows = vec![Some(8), None, Some(8)]);
    let types = json!({ "layer_types": ["full_attention", "full_attention", "sliding_attention"] });
    check("Gemma2ForCausalLM", types, |c| c.windows = vec![None, None, Some(4096)]);
}

#[test]
fn gemma2_values() {
    let class = "Gemma2ForCausalLM";
    let none = json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null });
    check(class, none, |c| (c.attention_softcap, c.logit_softcap) = (None, None));
    let some = json!({ "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4 });
    check(class, some, |c| (c.attention_softcap, c.logit_softcap) = (Some(5.0), Some(4.0)));
    check(class, json!({ "query_pre_attn_scalar": 144 }), |c| c.attention_scale = 1.0 / 12.0);
    check(class, json!({ "attention_bias": true }), |c| {
        (c.qkv_bias, c.attention_output_bias) = (true, true);
    });
}

/// A store that holds names and nothing else.
struct Names(&'static [&'static str]);

impl TensorStore for Names {
    fn describe(&self) -> std::collections::BTreeMap<String, super::super::weights::Description> {
        Default::default()
    }

    fn holds(&self, name: &str) -> bool {
        self.0.contains(&name)
    }

    fn read(&self, name: &str) -> Result<candle_core::Tensor> {
        Err(Error::MissingTensor { name: name.to_owned(), expected: vec![] })
    }
}

#[test]
fn the_tensors_decide_about_the_head() {
    let reward = |weight: &str, bias: Option<&str>, normalization| {
        let (weight, bias) = (weight.to_owned(), bias.map(str::to_owned));
        Head::Reward(RewardHead { weight, bias, normalization })
    };
    let one_label = json!({ "id2label": { "0": "LABEL_0" } });
    let open_rlhf = json!({ "value_head_prefix": "value_head", "model_type": "llama" });
    let normalized = with(open_rlhf.clone(), json!({ "normalize_reward": true, "mean": -0.5, "std": 2.0 }));
    let switched_off = with(open_rlhf.clone(), json!({ "normalize_reward": false, "mean": -0.5, "std": 2.0 }));
    let never_evaluated = with(open_rlhf.clone(), json!({ "normalize_reward": true }));
    let (lm, pm, open) = ("LlamaForCausalLM", "LlamaForSequenceClassification", "RewardModel");
    let plain = reward("score.weight", None, None);
    let value_head = reward("value_head.weight", None, None);
    const TRL: &str = "v_head.summary.weight";
    let cases: [(&str, Value, &'static [&'static str], Head); 12] = [
        (lm, json!({}), &["lm_head.weight"], Head::Language),
        (lm, json!({}), &["score.weight"], plain.clone()),
        (lm, json!({}), &["lm_head.weight", TRL], reward(TRL, None, None)),
        (lm, json!({}), &[TRL, "v_head.summary.bias"], reward(TRL, Some("v_head.summary.bias"), None)),
        (lm, open_rlhf.clone(), &["value_head.weight"], value_head.clone()),
        (lm, open_rlhf.clone(), &["lm_head.weight"], Head::Language),
        (pm, one_label.clone(), &["score.weight"], plain.clone()),
        (pm, json!({ "num_labels": 1 }), &[], plain.clone()),
        (open, open_rlhf, &["value_head.weight"], value_head.clone()),
        (open, normalized, &["value_head.weight"], reward("value_head.weight", None, Some((-0.5, 2.0)))),
        (open, switched_off, &["value_head.weight"], value_head.clone()),
        (open, never_evaluated, &["value_head.weight"], value_head),
    ];
    for (class, changes, names, head) in cases {
        let json = with(minimal(class), changes.clone());
        let store = Names(names);
        let holdings = Holdings { store: Some(&store), adapter: None };
        let config = parse(Path::new("config.json"), &json, &holdings).unwrap();
        assert_eq!(config.head, head, "{class} {changes} {names:?}");
    }
}

/// Checks that a configuration is refused, and that the message has all of these words.
#[track_caller]
fn refused(class: &str, changes: Value, words: &[&str]) {
    let error = parse_json(&with(minimal(class), changes)).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn architectures_that_are_not_served_are_refused_by_name() {
    let served = "Llama, Qwen2, Qwen3, Mistral, Gemma2, GPTNeoX";
    refused("PhiForCausalLM", json!({ "model_type": "phi" }), &["PhiForCausalLM", "phi", served]);
    refused("LlamaForTokenClassification", json!({}), &["LlamaForTokenClassification", served]);
    refused("RewardModel", json!({ "model_type": "mamba" }), &["RewardModel", "mamba", served]);
    refused("x", json!({ "architectures": null }), &["architectures"]);
    refused("x", json!({ "architectures": [] }), &["architectures"]);
}

#[test]
fn variants_that_are_not_served_are_refused_by_name() {
    let lm = "LlamaForCausalLM";
    refused(lm, json!({ "quantization_config": { "quant_method": "gptq" } }), &["quantization_config", "gptq"]);
    refused("Gemma2ForCausalLM", json!({ "use_bidirectional_attention": true }), &["use_bidirectional_attention"]);
    refused(lm, json!({ "hidden_act": "relu2" }), &["hidden_act", "relu2", "silu"]);
    for name in ["yarn", "dynamic", "longrope", "proportional"] {
        let scaling = json!({ "rope_type": name, "factor": 2.0 });
        refused(lm, json!({ "rope_scaling": scaling }), &["rope scaling", name, "llama3"]);
        refused(lm, json!({ "rope_parameters": scaling }), &["rope scaling", name]);
    }
    refused(lm, json!({ "partial_rotary_factor": 0.5 }), &["partial_rotary_factor", "0.5", "Llama"]);
    refused("GPTNeoXForCausalLM", json!({ "rotary_pct": 0.2 }), &["rotary_pct", "3 of a head's 16"]);
    let different = json!({ "sliding_attention": { "rope_theta": 1.0 }, "full_attention": { "rope_theta": 2.0 } });
    refused("Gemma2ForCausalLM", json!({ "rope_parameters": different }), &["rope_parameters", "different layers"]);
}

#[test]
fn impossible_values_are_refused_by_key() {
    let lm = "LlamaForCausalLM";
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        refused(lm, json!({ key: null }), &[key, "is missing"]);
        for value in [json!(0), json!(-1), json!(1.5), json!("64"), json!(1_u64 << 60)] {
            refused(lm, json!({ key: value }), &[key, &value.to_string(), "from 1 to"]);
        }
    }
    for key in ["num_key_value_heads", "head_dim", "max_position_embeddings"] {
        refused(lm, json!({ key: 0 }), &[key, "from 1 to"]);
    }
    refused(lm, json!({ "num_key_value_heads": 3 }), &["num_key_value_heads", "divisor", "4"]);
    refused(lm, json!({ "num_attention_heads": 6 }), &["num_attention_heads", "divisor of `hidden_size`, 64"]);
    refused(lm, json!({ "head_dim": 15 }), &["head_dim", "even"]);
    refused(lm, json!({ "rms_norm_eps": 0.0 }), &["rms_norm_eps", "above 0"]);
    refused(lm, json!({ "rms_norm_eps": 1e-60 }), &["rms_norm_eps", "above 0"]);
    refused(lm, json!({ "rope_theta": -1.0 }), &["rope_theta", "above 0"]);
    refused(lm, json!({ "rope_scaling": { "type": "linear" } }), &["factor", "missing"]);
    refused(lm, json!({ "rope_scaling": 3 }), &["rope_scaling", "object"]);
    let crossed = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0 });
    refused(lm, json!({ "rope_scaling": crossed }), &["high_freq_factor", "low_freq_factor"]);
    refused(lm, json!({ "tie_word_embeddings": "yes" }), &["tie_word_embeddings", "true or false"]);
    refused("MistralForCausalLM", json!({ "sliding_window": 0 }), &["sliding_window", "from 1"]);
    refused("Gemma2ForCausalLM", json!({ "attn_logit_softcapping": 0 }), &["attn_logit_softcapping", "above 0"]);
    refused("Gemma2ForCausalLM", json!({ "query_pre_attn_scalar": 0 }), &["query_pre_attn_scalar", "above 0"]);
}

#[test]
fn impossible_layers_are_refused() {
    let sliding = json!(["sliding_attention", "sliding_attention", "sliding_attention"]);
    let mixed = json!(["sliding_attention", "full_attention", "full_attention"]);
    refused("Qwen2ForCausalLM", json!({ "layer_types": ["full_attention"] }), &["layer_types", "3 entries"]);
    refused("Qwen3ForCausalLM", json!({ "layer_types": ["a", "b", "c"] }), &["layer_types", "\"a\""]);
    refused("Qwen2ForCausalLM", json!({ "layer_types": sliding }), &["layer_types", "sliding_window"]);
    refused("LlamaForCausalLM", json!({ "layer_types": mixed }), &["layer_types", "sliding_window"]);
    refused("MistralForCausalLM", json!({ "layer_types": mixed }), &["layer_types", "Mistral"]);
}

#[test]
fn a_preference_model_has_one_label() {
    let pm = "LlamaForSequenceClassification";
    refused(pm, json!({}), &["num_labels", "is 2", "has 1"]);
    refused(pm, json!({ "num_labels": 3 }), &["num_labels", "is 3"]);
    refused(pm, json!({ "num_labels": 1, "id2label": { "0": "a", "1": "b" } }), &["num_labels", "is 2"]);
    let half = json!({ "num_labels": 1, "normalize_reward": true, "mean": 1.0 });
    refused(pm, half, &["std", "missing"]);
    let zero = json!({ "num_labels": 1, "normalize_reward": true, "mean": 1.0, "std": 0.0 });
    refused(pm, zero, &["std", "above 0"]);
}
