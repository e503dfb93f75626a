//! Where a decoder's tensors are in a checkpoint.

use crate::config::{Block, Config, Family};

/// Names of what lies outside of the layers, without `.weight` and `.bias`.
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) language_head: &'static str,
}

impl Names {
    pub(super) fn of(family: Family) -> Self {
        match family {
            Family::Llama => {
                Self { embedding: "model.embed_tokens", final_norm: "model.norm", language_head: "lm_head" }
            }
            Family::GptNeoX => Self {
                embedding: "gpt_neox.embed_in",
                final_norm: "gpt_neox.final_layer_norm",
                language_head: "embed_out",
            },
        }
    }
}

/// A layer's names, without `.weight` and `.bias`.
pub(super) struct LayerNames {
    pub(super) attention_norm: String,
    pub(super) qkv: Qkv,
    pub(super) q_norm: Option<String>,
    pub(super) k_norm: Option<String>,
    pub(super) output: String,
    pub(super) attention_post_norm: Option<String>,
    pub(super) mlp_norm: String,
    pub(super) gate: Option<String>,
    pub(super) up: String,
    pub(super) down: String,
    pub(super) mlp_post_norm: Option<String>,
}

/// How q, k and v are stored.
pub(super) enum Qkv {
    /// A matrix each.
    Separate([String; 3]),
    /// q, k and v of head 0, then of head 1, and so on, in one matrix.
    Interleaved(String),
}

impl LayerNames {
    pub(super) fn of(config: &Config, layer: usize) -> Self {
        match config.family {
            Family::Llama => {
                let prefix = format!("model.layers.{layer}");
                let name = |part: &str| format!("{prefix}.{part}");
                let sandwich = config.block == Block::SandwichNorm;
                let mlp_norm = if sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
                Self {
                    attention_norm: name("input_layernorm"),
                    qkv: Qkv::Separate(["q_proj", "k_proj", "v_proj"].map(|part| name(&format!("self_attn.{part}")))),
                    q_norm: config.qk_norm.then(|| name("self_attn.q_norm")),
                    k_norm: config.qk_norm.then(|| name("self_attn.k_norm")),
                    output: name("self_attn.o_proj"),
                    attention_post_norm: sandwich.then(|| name("post_attention_layernorm")),
                    mlp_norm: name(mlp_norm),
                    gate: config.gated.then(|| name("mlp.gate_proj")),
                    up: name("mlp.up_proj"),
                    down: name("mlp.down_proj"),
                    mlp_post_norm: sandwich.then(|| name("post_feedforward_layernorm")),
                }
            }
            Family::GptNeoX => {
                let prefix = format!("gpt_neox.layers.{layer}");
                let name = |part: &str| format!("{prefix}.{part}");
                Self {
                    attention_norm: name("input_layernorm"),
                    qkv: Qkv::Interleaved(name("attention.query_key_value")),
                    q_norm: None,
                    k_norm: None,
                    output: name("attention.dense"),
                    attention_post_norm: None,
                    mlp_norm: name("post_attention_layernorm"),
                    gate: None,
                    up: name("mlp.dense_h_to_4h"),
                    down: name("mlp.dense_4h_to_h"),
                    mlp_post_norm: None,
                }
            }
        }
    }
}
