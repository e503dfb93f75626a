//! New weights for the decoder.

use std::ops::Range;

use super::super::build::interleaved;
use super::backend::{Gradients, Values};
use super::{Head, Inner};
use crate::Result;
use crate::config::{self, Config};

impl<B: Gradients> Inner<B> {
    /// Takes weights in the order of the list.
    pub(super) fn set<'a>(&mut self, values: B::Part<'a, f32>) -> Result<()> {
        assert_eq!(B::len(values), self.parameters.len(), "as many weights as before");
        let Self { stack, parameters, .. } = self;
        let (backend, config) = (&stack.backend, &stack.config);
        let (hidden, heads) = (config.hidden_size, config.num_heads * config.head_dim);
        let offset = match config.norm {
            config::Norm::Rms { offset, .. } => offset,
            config::Norm::Layer { .. } => 0.0,
        };
        let part = |range: &Range<usize>| -> B::Part<'a, f32> { B::within(values, range.clone()) };
        let bias = |range: &Range<usize>| (!range.is_empty()).then(|| part(range));
        let matrix = |rows: &Range<usize>, biases: &Range<usize>| Values { rows: part(rows), bias: bias(biases) };
        for ((layer, ranges), backs) in stack.layers.iter_mut().zip(&parameters.layers).zip(&mut self.backs) {
            let norms = [
                (Some(&mut layer.attention_norm), &ranges.attention_norm),
                (Some(&mut layer.mlp_norm), &ranges.mlp_norm),
                (layer.q_norm.as_mut(), &ranges.q_norm),
                (layer.k_norm.as_mut(), &ranges.k_norm),
                (layer.attention_post_norm.as_mut(), &ranges.attention_post_norm),
                (layer.mlp_post_norm.as_mut(), &ranges.mlp_post_norm),
            ];
            for (norm, range) in norms {
                norm.map_or(Ok(()), |norm| backend.set_norm(norm, part(range), offset))?;
            }
            if ranges.interleaved {
                let [rows, bias] = &mut self.ordered;
                order(backend, config, part(&ranges.qkv), hidden, rows)?;
                order(backend, config, part(&ranges.qkv_bias), 1, bias)?;
                let bias = (!ranges.qkv_bias.is_empty()).then(|| B::part(bias, 0..ranges.qkv_bias.len()));
                let qkv = Values { rows: B::part(rows, 0..ranges.qkv.len()), bias };
                backend.set_linear(&mut layer.qkv, &mut backs.qkv, hidden, qkv)?;
            } else {
                let qkv = matrix(&ranges.qkv, &ranges.qkv_bias);
                backend.set_linear(&mut layer.qkv, &mut backs.qkv, hidden, qkv)?;
            }
            let output = matrix(&ranges.output, &ranges.output_bias);
            backend.set_linear(&mut layer.output, &mut backs.output, heads, output)?;
            let gate = (!ranges.gate.is_empty()).then(|| matrix(&ranges.gate, &ranges.gate_bias));
            let up = matrix(&ranges.up, &ranges.up_bias);
            backend.set_activated(&mut layer.up, &mut backs.up, hidden, up, gate)?;
            let down = matrix(&ranges.down, &ranges.down_bias);
            backend.set_linear(&mut layer.down, &mut backs.down, config.intermediate_size, down)?;
        }
        backend.set_norm(&mut stack.final_norm, part(&parameters.final_norm), offset)?;
        if let Some(embedding) = &mut stack.embedding {
            let table = B::part_mut(embedding, 0..parameters.embedding.len());
            backend.round(part(&parameters.embedding), table)?;
        }
        let language_head = match (&mut stack.head, &mut self.language_head) {
            (Head::Language { logits, .. }, _) => Some(logits),
            (Head::Reward { weight, bias, .. }, language_head) => {
                backend.copy(part(&parameters.score), B::part_mut(weight, 0..hidden))?;
                if !parameters.score_bias.is_empty() {
                    *bias = backend.read(part(&parameters.score_bias))?[0];
                }
                language_head.as_mut()
            }
        };
        match language_head {
            Some(logits) => {
                let values = Values { rows: part(&parameters.language_head), bias: None };
                backend.set_linear(logits, &mut self.head_back, hidden, values)
            }
            None => Ok(()),
        }
    }
}

/// Puts rows of q, k and v, each of this width, in the decoder's order; there may be none.
fn order<B: Gradients>(
    backend: &B,
    config: &Config,
    rows: B::Part<'_, f32>,
    width: usize,
    ordered: &mut B::Array<f32>,
) -> Result<()> {
    backend.resize(ordered, B::len(rows))?;
    let len = config.head_dim * width;
    let heads = if B::len(rows) == 0 { 0 } else { config.num_heads };
    for (to, from) in interleaved(heads, config.head_dim).enumerate() {
        let to = B::part_mut(ordered, to * len..(to + 1) * len);
        backend.copy(B::within(rows, from * width..from * width + len), to)?;
    }
    Ok(())
}
