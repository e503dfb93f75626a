//! From named tensors to packed layers.

use candle_core::{DType as TensorType, Tensor};
use half::bf16;
use plumb_kernels::Element;
use plumb_kernels::activation::Activation;
use plumb_kernels::linear::{Activated, Linear, LinearBuilder, Matrix};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;

use super::{Head, Layer, Stack};
use crate::checkpoint::Weights;
use crate::config::{self, Block, Config, Family, Rope, RopeScaling};
use crate::{Error, Result};

/// Reads a tensor into the element's type.
pub(super) trait Load: Element {
    /// All values in row order.
    fn load(tensor: &Tensor) -> Result<Vec<Self>>;
}

impl Load for f32 {
    fn load(tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_dtype(TensorType::F32)?.flatten_all()?.to_vec1()?)
    }
}

impl Load for bf16 {
    fn load(tensor: &Tensor) -> Result<Vec<bf16>> {
        Ok(tensor.to_dtype(TensorType::BF16)?.flatten_all()?.to_vec1()?)
    }
}

/// Where a layer's tensors are, by family.
struct Names {
    embedding: &'static str,
    final_norm: &'static str,
    language_head: &'static str,
}

impl Names {
    fn of(family: Family) -> Self {
        match family {
            Family::Llama => Self {
                embedding: "model.embed_tokens.weight",
                final_norm: "model.norm",
                language_head: "lm_head.weight",
            },
            Family::GptNeoX => Self {
                embedding: "gpt_neox.embed_in.weight",
                final_norm: "gpt_neox.final_layer_norm",
                language_head: "embed_out.weight",
            },
        }
    }
}

impl<E: Load> Stack<E> {
    /// Takes the weights; `positions` is the longest sequence that will be run.
    pub(super) fn build(config: &Config, weights: &mut Weights, positions: usize) -> Result<Self> {
        if config.hidden_size % 2 + config.intermediate_size % 2 + config.head_dim % 2 != 0 {
            return Err(Error::Unsupported("hidden_size, intermediate_size and head_dim must be even".into()));
        }
        let mut taker = Taker { config, weights, parameters: 0 };
        let names = Names::of(config.family);
        let vocabulary = [config.vocab_size, config.hidden_size];
        let table: Vec<E> = taker.vector(names.embedding, &vocabulary)?;
        let layers = (0..config.num_layers)
            .map(|i| match config.family {
                Family::Llama => taker.llama_layer(&format!("model.layers.{i}")),
                Family::GptNeoX => taker.gpt_neox_layer(&format!("gpt_neox.layers.{i}")),
            })
            .collect::<Result<Vec<_>>>()?;
        let final_norm = taker.norm(names.final_norm, config.hidden_size)?;
        let (embedding, head) = match &config.head {
            config::Head::Language => {
                let logits =
                    |rows: &[E]| LinearBuilder::new(config.vocab_size, config.hidden_size).rows(rows).finish(None);
                let softcap = config.logit_softcap;
                if config.tie_word_embeddings {
                    (None, Head::Language { logits: logits(&table), softcap })
                } else {
                    let head = taker.vector(names.language_head, &vocabulary)?;
                    (Some(table), Head::Language { logits: logits(&head), softcap })
                }
            }
            config::Head::Reward(head) => {
                let weight = taker.vector(&head.weight, &[1, config.hidden_size])?;
                let bias = match &head.bias {
                    Some(name) => taker.vector::<f32>(name, &[1])?[0],
                    None => 0.0,
                };
                (Some(table), Head::Reward { weight, bias, normalization: head.normalization })
            }
        };
        let parameters = taker.parameters;
        Ok(Self {
            embedding,
            layers,
            final_norm,
            head,
            rotary: Rotary::new(&inverse_frequencies(&config.rope), positions),
            parameters,
            config: config.clone(),
        })
    }

    /// Weights in number and in bytes.
    pub(super) fn size(&self) -> (u64, u64) {
        let linear: usize =
            self.layers.iter().map(|l| l.qkv.bytes() + l.output.bytes() + l.up.bytes() + l.down.bytes()).sum();
        let head = match &self.head {
            Head::Language { logits, .. } => logits.bytes(),
            Head::Reward { weight, .. } => weight.len() * 4,
        };
        let embedding = self.embedding.as_ref().map_or(0, |e| e.len() * size_of::<E>());
        (self.parameters, (linear + head + embedding) as u64)
    }
}

/// Takes tensors and counts them.
struct Taker<'a> {
    config: &'a Config,
    weights: &'a mut Weights,
    parameters: u64,
}

impl Taker<'_> {
    fn vector<E: Load>(&mut self, name: &str, shape: &[usize]) -> Result<Vec<E>> {
        let tensor = self.weights.take(name, shape)?;
        self.parameters += tensor.elem_count() as u64;
        E::load(&tensor)
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Norm> {
        let mut weight: Vec<f32> = self.vector(&format!("{name}.weight"), &[width])?;
        Ok(match self.config.norm {
            config::Norm::Rms { eps, offset } => {
                weight.iter_mut().for_each(|w| *w += offset);
                Norm::Rms { weight, eps }
            }
            config::Norm::Layer { eps } => {
                Norm::Layer { weight, bias: self.vector(&format!("{name}.bias"), &[width])?, eps }
            }
        })
    }

    /// The named layers, on top of one another.
    fn stacked<E: Load>(&mut self, names: &[(String, usize)], inputs: usize, bias: bool) -> Result<Linear<E>> {
        let outputs = names.iter().map(|(_, outputs)| outputs).sum();
        let mut builder = LinearBuilder::new(outputs, inputs);
        let mut biases = Vec::new();
        for (name, outputs) in names {
            builder = builder.rows(&self.vector::<E>(&format!("{name}.weight"), &[*outputs, inputs])?);
            if bias {
                biases.extend(self.vector::<f32>(&format!("{name}.bias"), &[*outputs])?);
            }
        }
        Ok(builder.finish(bias.then_some(biases)))
    }

    /// The first half of a feed-forward layer.
    fn activated<E: Load>(&mut self, up: &str, gate: Option<&str>) -> Result<Activated<E>> {
        let Config { hidden_size: inputs, intermediate_size: outputs, mlp_bias, .. } = *self.config;
        let mut part = |name: &str| -> Result<(Vec<E>, Option<Vec<f32>>)> {
            let weights = self.vector(&format!("{name}.weight"), &[outputs, inputs])?;
            let bias = if mlp_bias { Some(self.vector(&format!("{name}.bias"), &[outputs])?) } else { None };
            Ok((weights, bias))
        };
        let (up, gate) = (part(up)?, gate.map(part).transpose()?);
        fn matrix<E>((weights, bias): &(Vec<E>, Option<Vec<f32>>)) -> Matrix<'_, E> {
            Matrix { weights, bias: bias.as_deref() }
        }
        let activation = match self.config.activation {
            config::Activation::Silu => Activation::Silu,
            config::Activation::Gelu => Activation::Gelu,
            config::Activation::GeluTanh => Activation::GeluTanh,
        };
        Ok(Activated::new(activation, matrix(&up), inputs, gate.as_ref().map(matrix)))
    }

    fn llama_layer<E: Load>(&mut self, prefix: &str) -> Result<Layer<E>> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let attention = |part: &str| format!("{prefix}.self_attn.{part}");
        let mlp = |part: &str| format!("{prefix}.mlp.{part}");
        let qkv = [(attention("q_proj"), q), (attention("k_proj"), kv), (attention("v_proj"), kv)];
        let sandwich = config.block == Block::SandwichNorm;
        let mlp_norm = if sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let mut optional = |wanted: bool, name: String, width| {
            if wanted { self.norm(&name, width).map(Some) } else { Ok(None) }
        };
        let q_norm = optional(config.qk_norm, attention("q_norm"), config.head_dim)?;
        let k_norm = optional(config.qk_norm, attention("k_norm"), config.head_dim)?;
        let attention_post_norm = optional(sandwich, format!("{prefix}.post_attention_layernorm"), hidden)?;
        let mlp_post_norm = optional(sandwich, format!("{prefix}.post_feedforward_layernorm"), hidden)?;
        Ok(Layer {
            attention_norm: self.norm(&format!("{prefix}.input_layernorm"), hidden)?,
            qkv: self.stacked(&qkv, hidden, config.qkv_bias)?,
            q_norm,
            k_norm,
            output: self.stacked(&[(attention("o_proj"), hidden)], q, config.attention_output_bias)?,
            attention_post_norm,
            mlp_norm: self.norm(&format!("{prefix}.{mlp_norm}"), hidden)?,
            up: self.activated(&mlp("up_proj"), config.gated.then(|| mlp("gate_proj")).as_deref())?,
            down: self.stacked(&[(mlp("down_proj"), hidden)], inner, config.mlp_bias)?,
            mlp_post_norm,
        })
    }

    fn gpt_neox_layer<E: Load>(&mut self, prefix: &str) -> Result<Layer<E>> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Layer {
            attention_norm: self.norm(&format!("{prefix}.input_layernorm"), hidden)?,
            qkv: self.interleaved_qkv(&format!("{prefix}.attention.query_key_value"))?,
            q_norm: None,
            k_norm: None,
            output: self.stacked(
                &[(format!("{prefix}.attention.dense"), hidden)],
                hidden,
                config.attention_output_bias,
            )?,
            attention_post_norm: None,
            mlp_norm: self.norm(&format!("{prefix}.post_attention_layernorm"), hidden)?,
            up: self.activated(&format!("{prefix}.mlp.dense_h_to_4h"), None)?,
            down: self.stacked(&[(format!("{prefix}.mlp.dense_4h_to_h"), hidden)], inner, config.mlp_bias)?,
            mlp_post_norm: None,
        })
    }

    /// GPT-NeoX stores q, k and v of head 0, then of head 1, and so on; the decoder wants all q, all k, all v.
    fn interleaved_qkv<E: Load>(&mut self, name: &str) -> Result<Linear<E>> {
        let Config { hidden_size, num_heads, head_dim, qkv_bias, .. } = *self.config;
        let outputs = 3 * num_heads * head_dim;
        let rows: Vec<E> = self.vector(&format!("{name}.weight"), &[outputs, hidden_size])?;
        let bias: Option<Vec<f32>> =
            if qkv_bias { Some(self.vector(&format!("{name}.bias"), &[outputs])?) } else { None };
        let parts = || (0..3).flat_map(|part| (0..num_heads).map(move |head| (head * 3 + part) * head_dim));
        let mut builder = LinearBuilder::new(outputs, hidden_size);
        for start in parts() {
            builder = builder.rows(&rows[start * hidden_size..(start + head_dim) * hidden_size]);
        }
        Ok(builder.finish(bias.map(|b| parts().flat_map(|start| b[start..start + head_dim].to_vec()).collect())))
    }
}

/// Radians a position for each rotated pair, `dim / 2` of them.
fn inverse_frequencies(rope: &Rope) -> Vec<f32> {
    let plain = (0..rope.dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / rope.dim as f32;
        1.0 / f64::from(rope.theta).powf(f64::from(exponent)) as f32
    });
    match &rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, factor)| f / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = *original_max_position_embeddings as f32;
            plain
                .map(|f| {
                    let turns = original * f / (2.0 * std::f32::consts::PI);
                    if turns < *low_freq_factor {
                        f / factor
                    } else if turns > *high_freq_factor {
                        f
                    } else {
                        let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
        }
    }
}
