//! The tensors of a GGUF file, under the names and in the layout of Hugging Face checkpoints.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use plumb_kernels::linear::Held;

use super::gguf_blocks::Format;
use super::read::Bytes;
use super::weights::{Description, Stored, TensorStore};
use crate::config::{Block, Config};
use crate::{Error, Result};

/// An open file. Tensors are read one at a time.
pub(super) struct GgufTensors {
    file: Bytes,
    content: Content,
    /// By Hugging Face name; names that have no such counterpart stay.
    tensors: BTreeMap<String, Origin>,
}

struct Origin {
    name: String,
    layout: Layout,
}

/// How llama.cpp's converter changed a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    AsIs,
    /// Llama's q and k: a head's rows `[2, half]` became `[half, 2]`, for a rotary embedding of neighbouring rows.
    Interleaved {
        half: usize,
    },
    /// Gemma's norms, which multiply by 1 + weight: the 1 was added.
    PlusOne,
}

impl GgufTensors {
    pub(super) fn new(file: Bytes, content: Content, config: &Config) -> Self {
        let named = |name: &String| {
            let hf_name = hf_name(name, config.block);
            let layout = match hf_name.rsplit('.').nth(1) {
                Some("q_proj" | "k_proj") if config.architecture == "llama" => {
                    Layout::Interleaved { half: config.head_dim / 2 }
                }
                Some(part) if config.architecture == "gemma2" && part.ends_with("norm") => Layout::PlusOne,
                _ => Layout::AsIs,
            };
            (hf_name, Origin { name: name.clone(), layout })
        };
        let tensors = content.tensor_infos.keys().map(named).collect();
        Self { file, content, tensors }
    }

    /// Reads a tensor as llama.cpp's converter left it.
    fn open(&self, name: &str) -> Result<(&Origin, QTensor)> {
        let missing = || Error::MissingTensor { name: name.to_owned(), expected: Vec::new() };
        let origin = self.tensors.get(name).ok_or_else(missing)?;
        let info = self.content.tensor_infos.get(&origin.name).ok_or_else(missing)?;
        let stored = info.read(&mut self.file.stream(), self.content.tensor_data_offset, &Device::Cpu);
        Ok((origin, stored.map_err(|error| self.malformed(origin, error.to_string()))?))
    }

    fn malformed(&self, origin: &Origin, reason: String) -> Error {
        Error::Malformed { path: self.file.path().to_owned(), reason: format!("tensor `{}`: {reason}", origin.name) }
    }

    /// Leaves out a tensor that has been dealt with.
    pub(super) fn forget(&mut self, name: &str) {
        self.tensors.remove(name);
    }
}

/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
fn hf_name(name: &str, block: Block) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let mut parts = name.splitn(4, '.');
    let (Some("blk"), Some(layer), Some(part), Some(kind)) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return name.to_owned();
    };
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "post_attention_norm" => "post_attention_layernorm",
        "ffn_norm" if block == Block::SandwichNorm => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return name.to_owned(),
    };
    format!("model.layers.{layer}.{part}.{kind}")
}

impl TensorStore for GgufTensors {
    fn describe(&self) -> BTreeMap<String, Description> {
        let describe = |(name, origin): (&String, &Origin)| {
            let info = self.content.tensor_infos.get(&origin.name)?;
            let dtype = match info.ggml_dtype {
                GgmlDType::F32 => DType::F32,
                GgmlDType::F16 => DType::F16,
                _ => DType::BF16,
            };
            let shape = info.shape.dims().to_vec();
            let quantised =
                Format::of(info.ggml_dtype).filter(|_| shape.len() == 2 && origin.layout != Layout::PlusOne);
            let held = quantised.map_or(Held::Plain, |format| Held::Quantised(format.described()));
            // As stored, twice for a moment; then codes and scales, or f32; and once more to put rows in their order.
            let stays = held != Held::Plain;
            let reading = if stays { 4 } else { dtype.size_in_bytes() + 2 * size_of::<f32>() };
            Some((name.clone(), Description { shape, dtype: Some(dtype), held, reading }))
        };
        self.tensors.iter().filter_map(describe).collect()
    }

    fn holds(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        let (origin, stored) = self.open(name)?;
        origin.layout.undo(&stored)
    }

    fn read_stored(&self, name: &str) -> Result<Stored> {
        let (origin, stored) = self.open(name)?;
        match (Format::of(stored.dtype()), stored.shape().dims()) {
            (Some(format), [rows, inputs]) if origin.layout != Layout::PlusOne => {
                let unpacked = format.unpack(&stored.data()?, *rows, *inputs);
                let unpacked = unpacked.map_err(|reason| self.malformed(origin, reason))?;
                Ok(Stored::Quantised(match origin.layout.order(*rows) {
                    Some(order) => unpacked.select(order),
                    None => unpacked,
                }))
            }
            _ => origin.layout.undo(&stored).map(Stored::Plain),
        }
    }
}

impl Layout {
    /// Which of the stored rows comes in each row's place, where that is another one.
    fn order(self, rows: usize) -> Option<impl Iterator<Item = usize> + Clone> {
        let Self::Interleaved { half } = self else { return None };
        Some((0..rows).map(move |row| {
            let within = row % (2 * half);
            row - within + within % half * 2 + within / half
        }))
    }

    /// One number a weight, in the type to compute in.
    fn undo(self, stored: &QTensor) -> Result<Tensor> {
        let tensor = stored.dequantize(&Device::Cpu)?;
        let rows = tensor.dims().first().copied().unwrap_or(0);
        let tensor = match (self, self.order(rows)) {
            (Self::PlusOne, _) => (tensor - 1.0)?,
            (_, Some(order)) => {
                tensor.index_select(&Tensor::from_iter(order.map(|row| row as u32), &Device::Cpu)?, 0)?
            }
            (_, None) => tensor,
        };
        Ok(match stored.dtype() {
            GgmlDType::F16 => tensor.to_dtype(DType::F16)?,
            GgmlDType::BF16 => tensor.to_dtype(DType::BF16)?,
            _ => tensor,
        })
    }
}
