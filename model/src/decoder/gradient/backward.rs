//! The way back through a layer.

use std::ops::Range;

use super::super::Stack;
use super::super::build::interleaved;
use super::super::forward::{chunks, of};
use super::LayerRanges;
use super::backend::{Attended, Gradients};
use super::tape::Kepts;
use crate::Result;
use crate::config::Block;

/// A layer's matrices as gradients go back through them.
#[derive(Debug)]
pub(super) struct Backs<B: Gradients> {
    pub(super) qkv: B::Back,
    pub(super) output: B::Back,
    pub(super) up: B::ActivatedBack,
    pub(super) down: B::Back,
}

impl<B: Gradients> Backs<B> {
    pub(super) fn new(backend: &B) -> Self {
        Self { qkv: backend.back(), output: backend.back(), up: backend.activated_back(), down: backend.back() }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { qkv, output, up, down } = self;
        [qkv, output, down].map(B::back_bytes).iter().sum::<usize>() + B::activated_back_bytes(up)
    }
}

/// Buffers that are kept from one layer, and step, to the next.
#[derive(Debug)]
pub(super) struct Scratch<B: Gradients> {
    /// Gradient of the residual stream, `[rows, hidden]`.
    pub(super) dx: B::Array<f32>,
    /// Gradient of a branch before its norm, `[rows, hidden]`.
    branch: B::Array<f32>,
    /// Gradient of a branch as the inner loop takes it, `[rows, hidden]`.
    dy: B::Array<B::Element>,
    /// What a matrix was given, `[rows, hidden]`.
    normed: B::Array<B::Element>,
    /// `[rows, intermediate]`.
    inner: B::Array<B::Element>,
    /// Of a chunk, `[CHUNK, ...]`: gradients of the activation's result, of a norm's result, of the attention's result.
    d_inner: B::Array<f32>,
    d_normed: B::Array<f32>,
    d_attended: B::Array<f32>,
    /// `[rows, heads * head_dim]`.
    attended: B::Array<B::Element>,
    /// `[rows, (heads + 2 * kv_heads) * head_dim]`.
    dqkv: B::Array<f32>,
    qkv: B::Array<B::Element>,
    /// A gradient in the decoder's order.
    ordered: B::Array<f32>,
    pub(super) room: B::Room,
}

impl<B: Gradients> Scratch<B> {
    pub(super) fn new(backend: &B) -> Self {
        Self {
            dx: backend.array(),
            branch: backend.array(),
            dy: backend.array(),
            normed: backend.array(),
            inner: backend.array(),
            d_inner: backend.array(),
            d_normed: backend.array(),
            d_attended: backend.array(),
            attended: backend.array(),
            dqkv: backend.array(),
            qkv: backend.array(),
            ordered: backend.array(),
            room: backend.room(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { dx, branch, dy, normed, inner, d_inner, d_normed, d_attended, attended, dqkv, qkv, ordered, room } =
            self;
        let floats = [dx, branch, d_inner, d_normed, d_attended, dqkv, ordered].map(B::bytes).iter().sum::<usize>();
        let elements = [dy, normed, inner, attended, qkv].map(B::bytes).iter().sum::<usize>();
        floats + elements + B::room_bytes(room)
    }
}

/// The way back through one layer.
pub(super) struct Backward<'a, 'k, B: Gradients> {
    pub(super) stack: &'a Stack<B>,
    pub(super) index: usize,
    /// Of the step.
    pub(super) rows: usize,
    pub(super) backs: &'a Backs<B>,
    pub(super) ranges: &'a LayerRanges,
    pub(super) keys: &'a B::Keys<'k>,
    pub(super) kv: &'a B::KvPages,
}

impl<B: Gradients> Backward<'_, '_, B> {
    /// Turns the gradient of what the layer leaves in the residual stream, `scratch.dx`, into that of what it found there,
    /// and adds those of its weights to the list. The tape is used up.
    pub(super) fn run(
        &self,
        tape: &mut Kepts<B>,
        scratch: &mut Scratch<B>,
        gradient: &mut B::Array<f32>,
    ) -> Result<()> {
        let layer = &self.stack.layers[self.index];
        let norm = layer.mlp_post_norm.as_ref();
        self.branch(norm, &tape.mlp_branch, &self.ranges.mlp_post_norm, scratch, gradient)?;
        self.feed_forward(tape, scratch, gradient)?;
        // The two branches of a parallel block end in the same place.
        if self.stack.config.block != Block::Parallel {
            let norm = layer.attention_post_norm.as_ref();
            self.branch(norm, &tape.attention_branch, &self.ranges.attention_post_norm, scratch, gradient)?;
        }
        self.attend(tape, scratch, gradient)
    }

    /// The gradient `scratch.dy` of a branch's last matrix, from that of the residual stream that it is added to.
    fn branch(
        &self,
        norm: Option<&B::Norm>,
        branch: &B::Array<f32>,
        range: &Range<usize>,
        scratch: &mut Scratch<B>,
        gradient: &mut B::Array<f32>,
    ) -> Result<()> {
        let backend = &self.stack.backend;
        let len = self.rows * self.stack.config.hidden_size;
        let dx = B::part(&scratch.dx, 0..len);
        backend.resize(&mut scratch.dy, len)?;
        let d_branch = match norm {
            None => dx,
            Some(norm) => {
                let d_branch = backend.resize(&mut scratch.branch, len)?;
                backend.clear(d_branch)?;
                let (d_branch, d_norm) =
                    (B::part_mut(&mut scratch.branch, 0..len), B::part_mut(gradient, range.clone()));
                backend.norm_back(norm, B::part(branch, 0..len), dx, d_branch, d_norm, &mut scratch.room)?;
                B::part(&scratch.branch, 0..len)
            }
        };
        backend.round(d_branch, B::part_mut(&mut scratch.dy, 0..len))
    }

    fn feed_forward(&self, tape: &mut Kepts<B>, scratch: &mut Scratch<B>, gradient: &mut B::Array<f32>) -> Result<()> {
        let Self { stack, ranges, backs, rows, .. } = self;
        let (backend, layer, rows) = (&stack.backend, &stack.layers[self.index], *rows);
        let (hidden, width) = (stack.config.hidden_size, stack.config.intermediate_size);
        let before = match stack.config.block {
            Block::Parallel => B::part(&tape.x, 0..rows * hidden),
            _ => B::part(&tape.mid, 0..rows * hidden),
        };
        let Scratch { dx, dy, normed, inner, d_inner, d_normed, room, .. } = scratch;
        let normed_rows = backend.resize(normed, rows * hidden)?;
        backend.normed(&layer.mlp_norm, before, normed_rows)?;
        backend.resize(inner, rows * width)?;
        for chunk in chunks(rows, B::CHUNK) {
            let (narrow, wide) = (of(&chunk, hidden), of(&chunk, width));
            let d = backend.resize(d_inner, wide.len())?;
            backend.multiply_back(&layer.down, &backs.down, B::part(dy, narrow.clone()), d)?;
            let (d, inner) = (B::part(d_inner, 0..wide.len()), B::part_mut(inner, wide));
            let back = backend.resize(d_normed, narrow.len())?;
            backend.activate_back(&layer.up, &backs.up, &mut tape.activations, chunk, d, inner, back)?;
            let (d, before) = (B::part(d_normed, 0..narrow.len()), B::within(&before, narrow.clone()));
            let d_norm = B::part_mut(gradient, ranges.mlp_norm.clone());
            backend.norm_back(&layer.mlp_norm, before, d, B::part_mut(dx, narrow), d_norm, room)?;
        }
        let (dy, inner) = (B::part(dy, 0..rows * hidden), B::part(inner, 0..rows * width));
        backend.add_outer(inner, width, dy, B::part_mut(gradient, ranges.down.clone()), room)?;
        self.add_bias(dy, &ranges.down_bias, gradient, room)?;
        let normed = B::part(normed, 0..rows * hidden);
        backend.add_activated(&layer.up, normed, &tape.activations, rows, gradient, ranges, room)
    }

    fn attend(&self, tape: &mut Kepts<B>, scratch: &mut Scratch<B>, gradient: &mut B::Array<f32>) -> Result<()> {
        let Self { stack, index, ranges, backs, keys, kv, rows } = self;
        let (backend, layer, config) = (&stack.backend, &stack.layers[*index], &stack.config);
        let (rows, hidden, heads) = (*rows, config.hidden_size, config.num_heads * config.head_dim);
        let width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        let Scratch { dx, dy, normed, d_normed, d_attended, attended, dqkv, qkv, ordered, room, .. } = scratch;
        let result = B::part(&tape.attended, 0..rows * heads);
        let d_output = B::part(dy, 0..rows * hidden);
        backend.add_outer(result, heads, d_output, B::part_mut(gradient, ranges.output.clone()), room)?;
        self.add_bias(d_output, &ranges.output_bias, gradient, room)?;
        backend.resize(attended, rows * heads)?;
        for chunk in chunks(rows, B::CHUNK) {
            let d = backend.resize(d_attended, chunk.len() * heads)?;
            backend.multiply_back(&layer.output, &backs.output, B::part(dy, of(&chunk, hidden)), d)?;
            let d = B::part(d_attended, 0..chunk.len() * heads);
            backend.round(d, B::part_mut(attended, of(&chunk, heads)))?;
        }
        let d = backend.resize(dqkv, rows * width)?;
        let q = B::part(&tape.q, 0..rows * B::q_width(config));
        let log_sums = B::part(&tape.log_sums, 0..if B::LOG_SUMS { rows * config.num_heads } else { 0 });
        let from = Attended { q, kv: *kv, layer: *index, out: result, log_sums };
        let d_result = B::part(attended, 0..rows * heads);
        backend.attention_back(from, keys, stack.rule(*index), d_result, d, room)?;
        backend.resize(qkv, rows * width)?;
        let before = B::part(&tape.qkv, 0..if config.qk_norm { rows * width } else { 0 });
        // The norms of q and k are neighbours in the list.
        let d_norms = B::part_mut(gradient, ranges.q_norm.start..ranges.k_norm.end);
        let (d, d_qkv) = (B::part(dqkv, 0..rows * width), B::part_mut(qkv, 0..rows * width));
        backend.unprepare(d, before, keys, stack.how(*index), d_norms, d_qkv, room)?;

        let x = B::part(&tape.x, 0..rows * hidden);
        let normed_rows = backend.resize(normed, rows * hidden)?;
        backend.normed(&layer.attention_norm, x, normed_rows)?;
        let (normed, d_qkv) = (B::part(normed, 0..rows * hidden), B::part(qkv, 0..rows * width));
        match ranges.interleaved {
            false => {
                backend.add_outer(normed, hidden, d_qkv, B::part_mut(gradient, ranges.qkv.clone()), room)?;
                self.add_bias(d_qkv, &ranges.qkv_bias, gradient, room)?;
            }
            true => {
                let sums = backend.resize(ordered, width * hidden)?;
                backend.clear(sums)?;
                backend.add_outer(normed, hidden, d_qkv, B::part_mut(ordered, 0..width * hidden), room)?;
                self.add_ordered(ordered, &ranges.qkv, hidden, gradient)?;
                if !ranges.qkv_bias.is_empty() {
                    backend.clear(B::part_mut(ordered, 0..width))?;
                    backend.add_columns(d_qkv, B::part_mut(ordered, 0..width), room)?;
                    self.add_ordered(ordered, &ranges.qkv_bias, 1, gradient)?;
                }
            }
        }
        for chunk in chunks(rows, B::CHUNK) {
            let narrow = of(&chunk, hidden);
            let d = backend.resize(d_normed, narrow.len())?;
            backend.multiply_back(&layer.qkv, &backs.qkv, B::part(qkv, of(&chunk, width)), d)?;
            let (d, x) = (B::part(d_normed, 0..narrow.len()), B::within(&x, narrow.clone()));
            let d_norm = B::part_mut(gradient, ranges.attention_norm.clone());
            backend.norm_back(&layer.attention_norm, x, d, B::part_mut(dx, narrow), d_norm, room)?;
        }
        Ok(())
    }

    /// Adds the gradient of q, k and v, rows of `width` in the decoder's order, to that in the checkpoint's.
    fn add_ordered(
        &self,
        ordered: &B::Array<f32>,
        range: &Range<usize>,
        width: usize,
        gradient: &mut B::Array<f32>,
    ) -> Result<()> {
        let config = &self.stack.config;
        let len = config.head_dim * width;
        for (from, to) in interleaved(config.num_heads, config.head_dim).enumerate() {
            let to = range.start + to * width;
            let sums = B::part_mut(gradient, to..to + len);
            self.stack.backend.accumulate(B::part(ordered, from * len..(from + 1) * len), sums)?;
        }
        Ok(())
    }

    /// Adds the gradient of a bias, where there is one.
    fn add_bias(
        &self,
        dy: B::Part<'_, B::Element>,
        range: &Range<usize>,
        gradient: &mut B::Array<f32>,
        room: &mut B::Room,
    ) -> Result<()> {
        match range.is_empty() {
            true => Ok(()),
            false => self.stack.backend.add_columns(dy, B::part_mut(gradient, range.clone()), room),
        }
    }
}
