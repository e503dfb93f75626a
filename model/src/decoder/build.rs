//! From named tensors to packed layers.

use candle_core::{DType as TensorType, Tensor};
use half::bf16;
use plumb_kernels::Element;
use plumb_kernels::activation::Activation;
use plumb_kernels::fp8::Fp8Rows;
use plumb_kernels::linear::{Matrix, Rows};
use plumb_kernels::norm::Norm;
use plumb_kernels::quantised::QuantRows;
use plumb_kernels::rotary::Rotary;
use std::sync::atomic::{AtomicU64, Ordering};

use super::backend::Backend;
use super::names::{LayerNames, Names, Qkv};
use super::{Head, Layer, Stack, refuse_beyond};
use crate::checkpoint::{Stored, Weights};
use crate::config::{self, Config, Rope, RopeScaling};
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

impl<B: Backend> Stack<B> {
    /// Takes the weights; `positions` is the longest sequence that will be run.
    pub(super) fn build(backend: B, config: &Config, weights: &mut Weights, positions: usize) -> Result<Self> {
        if config.hidden_size % 2 + config.intermediate_size % 2 + config.head_dim % 2 != 0 {
            return Err(Error::Unsupported("hidden_size, intermediate_size and head_dim must be even".into()));
        }
        let mut taker = Taker { backend: &backend, config, weights, parameters: 0 };
        let names = Names::of(config.family);
        let (embedding, head) = taker.ends(&names)?;
        let layers =
            (0..config.num_layers).map(|i| taker.layer(&LayerNames::of(config, i))).collect::<Result<Vec<_>>>()?;
        let final_norm = taker.norm(names.final_norm, config.hidden_size)?;
        let parameters = taker.parameters;
        static STACKS: AtomicU64 = AtomicU64::new(1);
        Ok(Self {
            number: STACKS.fetch_add(1, Ordering::Relaxed),
            embedding,
            layers,
            final_norm,
            head,
            rotary: backend.rotary(Rotary::new(&inverse_frequencies(&config.rope), positions))?,
            positions,
            parameters,
            config: config.clone(),
            backend,
        })
    }

    /// Weights in number and in bytes.
    pub(super) fn size(&self) -> (u64, u64) {
        let layer = |l: &Layer<B>| {
            let linear = [&l.qkv, &l.output, &l.down].map(B::linear_bytes).iter().sum::<usize>();
            linear + B::activated_bytes(&l.up)
        };
        let head = match &self.head {
            Head::Language { logits, .. } => B::linear_bytes(logits),
            Head::Reward { weight, .. } => B::bytes(weight),
        };
        let embedding = self.embedding.as_ref().map_or(0, B::bytes);
        (self.parameters, (self.layers.iter().map(layer).sum::<usize>() + head + embedding) as u64)
    }
}

/// Rows of a linear layer, with their bias.
struct Part<E> {
    weights: Values<E>,
    bias: Option<Vec<f32>>,
}

/// `[outputs, inputs]`.
enum Values<E> {
    Plain(Vec<E>),
    Quantised(QuantRows),
    Fp8(Fp8Rows),
}

impl<E: Load> Part<E> {
    fn matrix(&self) -> Matrix<'_, E> {
        let weights = match &self.weights {
            Values::Plain(rows) => Rows::Plain(rows),
            Values::Quantised(rows) => Rows::Quantised(rows),
            Values::Fp8(rows) => Rows::Fp8(rows),
        };
        Matrix { weights, bias: self.bias.as_deref() }
    }
}

impl<E: Load> Values<E> {
    /// One number a weight.
    fn into_plain(self) -> Vec<E> {
        match self {
            Self::Plain(rows) => rows,
            Self::Quantised(rows) => rows.expand(),
            Self::Fp8(rows) => rows.expand(),
        }
    }
}

/// `[vocab_size, hidden_size]`.
type Table<B> = <B as Backend>::Array<<B as Backend>::Element>;

/// Takes tensors and counts them.
struct Taker<'a, B> {
    backend: &'a B,
    config: &'a Config,
    weights: &'a mut Weights,
    parameters: u64,
}

impl<B: Backend> Taker<'_, B> {
    fn vector<E: Load>(&mut self, name: &str, shape: &[usize]) -> Result<Vec<E>> {
        let tensor = self.weights.take(name, shape)?;
        self.parameters += tensor.elem_count() as u64;
        E::load(&tensor)
    }

    /// The weights `[outputs, inputs]` of the named layer, quantised if they are so in the checkpoint.
    fn part(&mut self, name: &str, [outputs, inputs]: [usize; 2], bias: bool) -> Result<Part<B::Element>> {
        let weights = match self.weights.take_stored(&format!("{name}.weight"), &[outputs, inputs])? {
            Stored::Plain(tensor) => Values::Plain(B::Element::load(&tensor)?),
            Stored::Quantised(rows) => Values::Quantised(rows),
            Stored::Fp8(rows) => Values::Fp8(rows),
        };
        self.parameters += (outputs * inputs) as u64;
        refuse_beyond(self.parameters as usize * size_of::<B::Element>())?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), &[outputs])?) } else { None };
        Ok(Part { weights, bias })
    }

    /// As [`Taker::part`], of a layer of the stack, whose weights may be wanted in e4m3.
    fn inner(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Part<B::Element>> {
        let Part { weights, bias } = self.part(name, shape, bias)?;
        Ok(Part { weights: self.rounded(weights, shape[1]), bias })
    }

    fn rounded(&self, weights: Values<B::Element>, inputs: usize) -> Values<B::Element> {
        match weights {
            Values::Plain(rows) if self.weights.are_rounded_to_fp8() => Values::Fp8(Fp8Rows::quantise(&rows, inputs)),
            weights => weights,
        }
    }

    /// The embedding, unless the head holds the same numbers, and the head.
    fn ends(&mut self, names: &Names) -> Result<(Option<Table<B>>, Head<B>)> {
        let Config { vocab_size, hidden_size, logit_softcap: softcap, tie_word_embeddings: tied, .. } = *self.config;
        let table = self.part(names.embedding, [vocab_size, hidden_size], false)?;
        Ok(match &self.config.head {
            config::Head::Language if tied => {
                (None, Head::Language { logits: self.linear(&[table], hidden_size)?, softcap })
            }
            config::Head::Language => {
                let table = self.backend.hold(table.weights.into_plain())?;
                let head = self.part(names.language_head, [vocab_size, hidden_size], false)?;
                (Some(table), Head::Language { logits: self.linear(&[head], hidden_size)?, softcap })
            }
            config::Head::Reward(head) => {
                let weight = self.vector(&head.weight, &[1, hidden_size])?;
                let weight = self.backend.hold(weight)?;
                let bias = match &head.bias {
                    Some(name) => self.vector::<f32>(name, &[1])?[0],
                    None => 0.0,
                };
                let table = self.backend.hold(table.weights.into_plain())?;
                (Some(table), Head::Reward { weight, bias, normalization: head.normalization })
            }
        })
    }

    /// The parts on top of one another.
    fn linear(&self, parts: &[Part<B::Element>], inputs: usize) -> Result<B::Linear> {
        self.backend.linear(&parts.iter().map(Part::matrix).collect::<Vec<_>>(), inputs)
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<B::Norm> {
        let mut weight: Vec<f32> = self.vector(&format!("{name}.weight"), &[width])?;
        self.backend.norm(match self.config.norm {
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
    fn stacked(&mut self, names: &[(&String, usize)], inputs: usize, bias: bool) -> Result<B::Linear> {
        let parts = names.iter().map(|(name, outputs)| self.inner(name, [*outputs, inputs], bias));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        self.linear(&parts, inputs)
    }

    /// The first half of a feed-forward layer.
    fn activated(&mut self, up: &str, gate: Option<&str>) -> Result<B::Activated> {
        let Config { hidden_size: inputs, intermediate_size: outputs, mlp_bias, .. } = *self.config;
        let mut part = |name: &str| self.inner(name, [outputs, inputs], mlp_bias);
        let (up, gate) = (part(up)?, gate.map(part).transpose()?);
        let activation = match self.config.activation {
            config::Activation::Silu => Activation::Silu,
            config::Activation::Gelu => Activation::Gelu,
            config::Activation::GeluTanh => Activation::GeluTanh,
        };
        self.backend.activated(activation, up.matrix(), inputs, gate.as_ref().map(Part::matrix))
    }

    fn layer(&mut self, names: &LayerNames) -> Result<Layer<B>> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let mut optional = |name: &Option<String>, width| name.as_ref().map(|name| self.norm(name, width)).transpose();
        let q_norm = optional(&names.q_norm, config.head_dim)?;
        let k_norm = optional(&names.k_norm, config.head_dim)?;
        let attention_post_norm = optional(&names.attention_post_norm, hidden)?;
        let mlp_post_norm = optional(&names.mlp_post_norm, hidden)?;
        Ok(Layer {
            attention_norm: self.norm(&names.attention_norm, hidden)?,
            qkv: match &names.qkv {
                Qkv::Separate([q_name, k_name, v_name]) => {
                    self.stacked(&[(q_name, q), (k_name, kv), (v_name, kv)], hidden, config.qkv_bias)?
                }
                Qkv::Interleaved(name) => self.interleaved_qkv(name)?,
            },
            q_norm,
            k_norm,
            output: self.stacked(&[(&names.output, hidden)], q, config.attention_output_bias)?,
            attention_post_norm,
            mlp_norm: self.norm(&names.mlp_norm, hidden)?,
            up: self.activated(&names.up, names.gate.as_deref())?,
            down: self.stacked(&[(&names.down, hidden)], inner, config.mlp_bias)?,
            mlp_post_norm,
        })
    }

    /// GPT-NeoX stores q, k and v of head 0, then of head 1, and so on; the decoder wants all q, all k, all v.
    fn interleaved_qkv(&mut self, name: &str) -> Result<B::Linear> {
        let Config { hidden_size, num_heads, head_dim, qkv_bias, .. } = *self.config;
        let Part { weights, bias } = self.part(name, [3 * num_heads * head_dim, hidden_size], qkv_bias)?;
        let rows = weights.into_plain();
        let starts = || interleaved(num_heads, head_dim);
        let of_head = |start: usize| &rows[start * hidden_size..(start + head_dim) * hidden_size];
        if self.weights.are_rounded_to_fp8() {
            let rows: Vec<B::Element> = starts().flat_map(of_head).copied().collect();
            let bias = bias.map(|bias| starts().flat_map(|start| bias[start..start + head_dim].to_vec()).collect());
            let part = Part { weights: self.rounded(Values::Plain(rows), hidden_size), bias };
            return self.linear(&[part], hidden_size);
        }
        let parts: Vec<_> = starts()
            .map(|start| Matrix {
                weights: Rows::Plain(of_head(start)),
                bias: bias.as_ref().map(|bias| &bias[start..start + head_dim]),
            })
            .collect();
        self.backend.linear(&parts, hidden_size)
    }
}

/// Where the heads of all q, all k and all v, in this order, begin among interleaved rows.
pub(super) fn interleaved(num_heads: usize, head_dim: usize) -> impl Iterator<Item = usize> {
    (0..3).flat_map(move |part| (0..num_heads).map(move |head| (head * 3 + part) * head_dim))
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
