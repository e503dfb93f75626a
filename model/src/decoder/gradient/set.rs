//! New weights for the decoder.

use std::ops::Range;

use plumb_kernels::gradient::AdamW;

use super::super::build::interleaved;
use super::backend::Gradients;
use super::{Head, Inner};
use crate::Result;
use crate::config::{self, Config};

/// New weights, in the order of the list, of which the decoder takes one tensor after the other.
pub(in super::super) enum New<'a, B: Gradients> {
    /// They are there.
    There(B::Part<'a, f32>),
    /// An optimiser makes them when they are taken.
    Stepped(Stepped<'a, B>),
}

/// An optimiser's step, tensor by tensor.
pub(in super::super) struct Stepped<'a, B: Gradients> {
    pub(super) weights: &'a mut B::Array<f32>,
    pub(super) gradient: &'a B::Array<f32>,
    pub(super) means: [&'a mut B::Array<f32>; 2],
    /// For every tensor, how; `None` where that is done.
    pub(super) steps: Vec<(Range<usize>, Option<AdamW>)>,
}

impl<B: Gradients> New<'_, B> {
    /// A range of whole tensors; there may be none in it.
    pub(super) fn take(&mut self, backend: &B, range: &Range<usize>) -> Result<B::Part<'_, f32>> {
        if let Self::Stepped(step) = self {
            step.run(backend, range, None)?;
        }
        Ok(self.part(range))
    }

    /// One that was taken.
    pub(super) fn part(&self, range: &Range<usize>) -> B::Part<'_, f32> {
        match self {
            Self::There(values) => B::within(values, range.clone()),
            Self::Stepped(step) => B::part(step.weights, range.clone()),
        }
    }

    /// A range of whole tensors, rounded to where the decoder has them: as they are made, if they are not there yet.
    pub(super) fn round(&mut self, backend: &B, range: &Range<usize>, to: B::PartMut<'_, B::Element>) -> Result<()> {
        match self {
            Self::Stepped(step) if !step.is_done(range) => step.run(backend, range, Some(to)),
            _ => backend.round(self.part(range), to),
        }
    }
}

impl<B: Gradients> Stepped<'_, B> {
    /// Which tensors are in a range.
    fn tensors(&self, range: &Range<usize>) -> Range<usize> {
        let before = |end: usize| self.steps.partition_point(|(tensor, _)| tensor.start < end);
        before(range.start)..before(range.end)
    }

    /// Whether one of a range's tensors has changed already.
    fn is_done(&self, range: &Range<usize>) -> bool {
        self.steps[self.tensors(range)].iter().any(|(_, how)| how.is_none())
    }

    /// Changes a range's tensors that have not changed yet.
    fn run(&mut self, backend: &B, range: &Range<usize>, mut to: Option<B::PartMut<'_, B::Element>>) -> Result<()> {
        let tensors = self.tensors(range);
        for (tensor, how) in &mut self.steps[tensors] {
            let Some(how) = how.take() else { continue };
            let within = tensor.start - range.start..tensor.end - range.start;
            let to = to.as_mut().map(|to| B::within_mut(to, within));
            let means = self.means.each_mut().map(|means| B::part_mut(means, tensor.clone()));
            let gradient = B::part(self.gradient, tensor.clone());
            backend.update(&how, B::part_mut(self.weights, tensor.clone()), gradient, means, to)?;
        }
        Ok(())
    }
}

impl<B: Gradients> Inner<B> {
    /// Takes weights in the order of the list.
    pub(super) fn set(&mut self, mut new: New<'_, B>) -> Result<()> {
        let Self { stack, parameters, .. } = self;
        let (backend, config) = (&stack.backend, &stack.config);
        let (hidden, heads) = (config.hidden_size, config.num_heads * config.head_dim);
        let offset = match config.norm {
            config::Norm::Rms { offset, .. } => offset,
            config::Norm::Layer { .. } => 0.0,
        };
        let new = &mut new;
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
                norm.map_or(Ok(()), |norm| backend.set_norm(norm, new.take(backend, range)?, offset))?;
            }
            let (qkv, bias) = (&ranges.qkv, &ranges.qkv_bias);
            if ranges.interleaved {
                let [rows, all] = [qkv.len(), qkv.len() + bias.len()];
                backend.resize(&mut self.ordered, all)?;
                let mut ordered = |new: &mut New<'_, B>, range: &Range<usize>, width, to| {
                    order(backend, config, new.take(backend, range)?, width, B::part_mut(&mut self.ordered, to))
                };
                ordered(new, qkv, hidden, 0..rows)?;
                ordered(new, bias, 1, rows..all)?;
                let ranges = [&(0..rows), &(rows..all)];
                let mut ordered = New::There(B::part(&self.ordered, 0..all));
                backend.set_linear(&mut layer.qkv, &mut backs.qkv, hidden, &mut ordered, ranges)?;
            } else {
                backend.set_linear(&mut layer.qkv, &mut backs.qkv, hidden, new, [qkv, bias])?;
            }
            let output = [&ranges.output, &ranges.output_bias];
            backend.set_linear(&mut layer.output, &mut backs.output, heads, new, output)?;
            backend.set_activated(&mut layer.up, &mut backs.up, hidden, new, ranges)?;
            let down = [&ranges.down, &ranges.down_bias];
            backend.set_linear(&mut layer.down, &mut backs.down, config.intermediate_size, new, down)?;
        }
        backend.set_norm(&mut stack.final_norm, new.take(backend, &parameters.final_norm)?, offset)?;
        if let Some(embedding) = &mut stack.embedding {
            let table = B::part_mut(embedding, 0..parameters.embedding.len());
            new.round(backend, &parameters.embedding, table)?;
        }
        let language_head = match (&mut stack.head, &mut self.language_head) {
            (Head::Language { logits, .. }, _) => Some(logits),
            (Head::Reward { weight, bias, .. }, language_head) => {
                backend.copy(new.take(backend, &parameters.score)?, B::part_mut(weight, 0..hidden))?;
                if !parameters.score_bias.is_empty() {
                    *bias = backend.read(new.take(backend, &parameters.score_bias)?)?[0];
                }
                language_head.as_mut()
            }
        };
        if let Some(logits) = language_head {
            let ranges = [&parameters.language_head, &(0..0)];
            backend.set_linear(logits, &mut self.head_back, hidden, new, ranges)?;
        }
        // A decoder has them all by now; nothing is to be left without its step.
        new.take(backend, &(0..parameters.len())).map(|_| ())
    }
}

/// Puts rows of q, k and v, each of this width, in the decoder's order; there may be none.
fn order<B: Gradients>(
    backend: &B,
    config: &Config,
    rows: B::Part<'_, f32>,
    width: usize,
    mut ordered: B::PartMut<'_, f32>,
) -> Result<()> {
    let len = config.head_dim * width;
    let heads = if B::len(rows) == 0 { 0 } else { config.num_heads };
    for (to, from) in interleaved(heads, config.head_dim).enumerate() {
        let to = B::within_mut(&mut ordered, to * len..(to + 1) * len);
        backend.copy(B::within(&rows, from * width..from * width + len), to)?;
    }
    Ok(())
}
