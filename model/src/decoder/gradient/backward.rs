//! The way back through a layer.

use std::ops::Range;

use plumb_kernels::attention::{KvPages, padded};
use plumb_kernels::element::round_all;
use plumb_kernels::gradient::{self, Keys, Outer, column_sums, unprepare};
use plumb_kernels::linear::{Linear, Store};
use plumb_kernels::norm::Norm;

use super::super::build::{Load, interleaved};
use super::super::cpu::{CHUNK, Cpu, Kepts, resize};
use super::super::forward::chunks;
use super::{LayerRanges, Stack};
use crate::config::{Block, Config};

/// A layer's matrices the other way round: gradients go back through them.
#[derive(Debug)]
pub(super) struct Transposed<E> {
    qkv: Linear<E>,
    output: Linear<E>,
    gate: Option<Linear<E>>,
    up: Linear<E>,
    down: Linear<E>,
}

impl<E: Load> Default for Transposed<E> {
    fn default() -> Self {
        Self { qkv: Linear::empty(), output: Linear::empty(), gate: None, up: Linear::empty(), down: Linear::empty() }
    }
}

impl<E: Load> Transposed<E> {
    /// Takes new weights; those of q, k and v in the decoder's order.
    pub(super) fn set(&mut self, values: &[f32], ranges: &LayerRanges, qkv: &[f32], config: &Config) {
        let (hidden, heads) = (config.hidden_size, config.num_heads * config.head_dim);
        self.qkv.fill_transposed_f32(qkv, hidden);
        self.output.fill_transposed_f32(&values[ranges.output.clone()], heads);
        if !ranges.gate.is_empty() {
            let gate = self.gate.get_or_insert_with(Linear::empty);
            gate.fill_transposed_f32(&values[ranges.gate.clone()], hidden);
        }
        self.up.fill_transposed_f32(&values[ranges.up.clone()], hidden);
        self.down.fill_transposed_f32(&values[ranges.down.clone()], config.intermediate_size);
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { qkv, output, gate, up, down } = self;
        [qkv, output, up, down].into_iter().chain(gate).map(Linear::bytes).sum()
    }
}

/// Buffers that are kept from one layer, and step, to the next.
#[derive(Debug)]
pub(super) struct Scratch<E> {
    /// Gradient of the residual stream, `[rows, hidden]`.
    pub(super) dx: Vec<f32>,
    /// Gradient of a branch before its norm, `[rows, hidden]`.
    branch: Vec<f32>,
    /// Gradient of a branch as the inner loop takes it, `[rows, hidden]`.
    dy: Vec<E>,
    /// What a matrix was given, `[rows, hidden]`.
    normed: Vec<E>,
    /// `[rows, intermediate]`.
    inner: Vec<E>,
    /// Of a chunk, `[CHUNK, ...]`: gradients of the activation's result, of a norm's result, of the attention's result.
    d_inner: Vec<f32>,
    d_normed: Vec<f32>,
    d_attended: Vec<f32>,
    /// `[rows, heads * head_dim]`.
    attended: Vec<E>,
    /// `[rows, (heads + 2 * kv_heads) * head_dim]`.
    dqkv: Vec<f32>,
    qkv: Vec<E>,
    /// A gradient in the decoder's order.
    ordered: Vec<f32>,
    outer: Outer<E>,
}

impl<E: Load> Default for Scratch<E> {
    fn default() -> Self {
        Self {
            dx: Vec::new(),
            branch: Vec::new(),
            dy: Vec::new(),
            normed: Vec::new(),
            inner: Vec::new(),
            d_inner: Vec::new(),
            d_normed: Vec::new(),
            d_attended: Vec::new(),
            attended: Vec::new(),
            dqkv: Vec::new(),
            qkv: Vec::new(),
            ordered: Vec::new(),
            outer: Outer::default(),
        }
    }
}

impl<E: Load> Scratch<E> {
    pub(super) fn bytes(&self) -> usize {
        let Self { dx, branch, dy, normed, inner, d_inner, d_normed, d_attended, attended, dqkv, qkv, ordered, outer } =
            self;
        let floats =
            [dx, branch, d_inner, d_normed, d_attended, dqkv, ordered].map(Vec::capacity).iter().sum::<usize>();
        let elements = [dy, normed, inner, attended, qkv].map(Vec::capacity).iter().sum::<usize>();
        floats * 4 + elements * size_of::<E>() + outer.bytes()
    }
}

/// The way back through one layer.
pub(super) struct Backward<'a, E: Load> {
    pub(super) stack: &'a Stack<Cpu<E>>,
    pub(super) index: usize,
    pub(super) transposed: &'a Transposed<E>,
    pub(super) ranges: &'a LayerRanges,
    pub(super) keys: &'a Keys<'a>,
    pub(super) kv: &'a KvPages<E>,
}

impl<E: Load> Backward<'_, E> {
    /// Turns the gradient of what the layer leaves in the residual stream, `scratch.dx`, into that of what it found there,
    /// and adds those of its weights to the list. The tape is used up.
    pub(super) fn run(&self, tape: &mut Kepts<E>, scratch: &mut Scratch<E>, gradient: &mut [f32]) {
        let layer = &self.stack.layers[self.index];
        let norm = layer.mlp_post_norm.as_ref();
        self.branch(norm, &tape.mlp_branch, &self.ranges.mlp_post_norm, scratch, gradient);
        self.feed_forward(tape, scratch, gradient);
        // The two branches of a parallel block end in the same place.
        if self.stack.config.block != Block::Parallel {
            let norm = layer.attention_post_norm.as_ref();
            self.branch(norm, &tape.attention_branch, &self.ranges.attention_post_norm, scratch, gradient);
        }
        self.attend(tape, scratch, gradient);
    }

    /// The gradient `scratch.dy` of a branch's last matrix, from that of the residual stream that it is added to.
    fn branch(
        &self,
        norm: Option<&Norm>,
        branch: &[f32],
        range: &Range<usize>,
        scratch: &mut Scratch<E>,
        gradient: &mut [f32],
    ) {
        let len = self.keys.rows() * self.stack.config.hidden_size;
        let dx = &scratch.dx[..len];
        let dy = resize(&mut scratch.dy, len);
        match norm {
            None => round_all(dx, dy),
            Some(norm) => {
                let d_branch = resize(&mut scratch.branch, len);
                d_branch.fill(0.0);
                norm.backward(&branch[..len], dx, d_branch, &mut gradient[range.clone()]);
                round_all(d_branch, dy);
            }
        }
    }

    fn feed_forward(&self, tape: &mut Kepts<E>, scratch: &mut Scratch<E>, gradient: &mut [f32]) {
        let Self { ranges, transposed, .. } = self;
        let layer = &self.stack.layers[self.index];
        let (rows, hidden) = (self.keys.rows(), self.stack.config.hidden_size);
        let width = layer.up.outputs();
        let before = match self.stack.config.block {
            Block::Parallel => &tape.x[..rows * hidden],
            _ => &tape.mid[..rows * hidden],
        };
        let Scratch { dx, dy, normed, inner, d_inner, d_normed, outer, .. } = scratch;
        let dy = &dy[..rows * hidden];
        let normed = resize(normed, rows * hidden);
        layer.mlp_norm.forward(before, normed);
        let inner = resize(inner, rows * width);
        let (gate, up) = (&mut tape.gate, &mut tape.up[..rows * width]);
        for chunk in chunks(rows, CHUNK) {
            let narrow = chunk.start * hidden..chunk.end * hidden;
            let wide = chunk.start * width..chunk.end * width;
            let d_inner = resize(d_inner, wide.len());
            transposed.down.forward(&dy[narrow.clone()], d_inner, Store::Set);
            let chunk_gate = transposed.gate.is_some().then(|| &mut gate[wide.clone()]);
            layer.up.activation().backward(chunk_gate, &mut up[wide.clone()], d_inner, &mut inner[wide.clone()]);
            let d_normed = resize(d_normed, narrow.len());
            transposed.up.forward(&up[wide.clone()], d_normed, Store::Set);
            if let Some(transposed) = &transposed.gate {
                transposed.forward(&gate[wide], d_normed, Store::Add);
            }
            let d_norm = &mut gradient[ranges.mlp_norm.clone()];
            layer.mlp_norm.backward(&before[narrow.clone()], d_normed, &mut dx[narrow], d_norm);
        }
        outer.take(inner, width);
        outer.add(dy, &mut gradient[ranges.down.clone()]);
        add_bias(dy, &mut gradient[ranges.down_bias.clone()]);
        outer.take(normed, hidden);
        outer.add(up, &mut gradient[ranges.up.clone()]);
        add_bias(up, &mut gradient[ranges.up_bias.clone()]);
        if transposed.gate.is_some() {
            let gate = &gate[..rows * width];
            outer.add(gate, &mut gradient[ranges.gate.clone()]);
            add_bias(gate, &mut gradient[ranges.gate_bias.clone()]);
        }
    }

    fn attend(&self, tape: &mut Kepts<E>, scratch: &mut Scratch<E>, gradient: &mut [f32]) {
        let Self { stack, index, ranges, transposed, keys, kv } = self;
        let (config, layer) = (&stack.config, &stack.layers[*index]);
        let (rows, hidden, heads) = (keys.rows(), config.hidden_size, config.num_heads * config.head_dim);
        let width = layer.qkv.outputs();
        let Scratch { dx, dy, normed, d_normed, d_attended, attended, dqkv, qkv, ordered, outer, .. } = scratch;
        let (dx, dy) = (&mut dx[..rows * hidden], &dy[..rows * hidden]);
        outer.take(&tape.attended[..rows * heads], heads);
        outer.add(dy, &mut gradient[ranges.output.clone()]);
        add_bias(dy, &mut gradient[ranges.output_bias.clone()]);
        let attended = resize(attended, rows * heads);
        for chunk in chunks(rows, CHUNK) {
            let d_attended = resize(d_attended, chunk.len() * heads);
            transposed.output.forward(&dy[chunk.start * hidden..chunk.end * hidden], d_attended, Store::Set);
            round_all(d_attended, &mut attended[chunk.start * heads..chunk.end * heads]);
        }
        let dqkv = resize(dqkv, rows * width);
        let q = &tape.q[..rows * config.num_heads * padded(config.head_dim)];
        gradient::attention(q, kv, *index, keys, stack.rule(*index), attended, dqkv);
        let qkv = resize(qkv, rows * width);
        let before = tape.qkv.get(..rows * width).unwrap_or(&[]);
        // The norms of q and k are neighbours in the list.
        let (d_q_norm, d_k_norm) = gradient[ranges.q_norm.start..ranges.k_norm.end].split_at_mut(ranges.q_norm.len());
        unprepare(dqkv, before, keys, stack.how(*index).into(), d_q_norm, d_k_norm, qkv);

        let normed = resize(normed, rows * hidden);
        layer.attention_norm.forward(&tape.x[..rows * hidden], normed);
        outer.take(normed, hidden);
        match ranges.interleaved {
            false => {
                outer.add(qkv, &mut gradient[ranges.qkv.clone()]);
                add_bias(qkv, &mut gradient[ranges.qkv_bias.clone()]);
            }
            true => {
                let mut add = |ordered: &[f32], range: &Range<usize>, width: usize| {
                    let sums = &mut gradient[range.clone()];
                    let rows = config.head_dim * width;
                    for (from, to) in ordered.chunks_exact(rows).zip(interleaved(config.num_heads, config.head_dim)) {
                        sums[to * width..][..rows].iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
                    }
                };
                let ordered = resize(ordered, width * hidden);
                ordered.fill(0.0);
                outer.add(qkv, ordered);
                add(ordered, &ranges.qkv, hidden);
                if !ranges.qkv_bias.is_empty() {
                    let ordered = &mut ordered[..width];
                    ordered.fill(0.0);
                    column_sums(qkv, ordered);
                    add(ordered, &ranges.qkv_bias, 1);
                }
            }
        }
        for chunk in chunks(rows, CHUNK) {
            let range = chunk.start * hidden..chunk.end * hidden;
            let d_normed = resize(d_normed, range.len());
            transposed.qkv.forward(&qkv[chunk.start * width..chunk.end * width], d_normed, Store::Set);
            let d_norm = &mut gradient[ranges.attention_norm.clone()];
            layer.attention_norm.backward(&tape.x[range.clone()], d_normed, &mut dx[range], d_norm);
        }
    }
}

/// Adds the gradient of a bias, where there is one.
fn add_bias<E: Load>(dy: &[E], bias: &mut [f32]) {
    if !bias.is_empty() {
        column_sums(dy, bias);
    }
}
