//! Gradients on the CPU.

use std::ops::Range;

use plumb_kernels::attention::{KvPages, Rule, Span};
use plumb_kernels::element::round_all;
use plumb_kernels::gradient::{self, AdamW, Keys, Outer};
use plumb_kernels::head::dot;
use plumb_kernels::linear::{Activated, Kept, Linear, Store};
use plumb_kernels::norm::Norm;

use super::super::Device;
use super::super::backend::{Backend, How, Number, Stream};
use super::super::build::Load;
use super::super::cpu::{Cpu, resize};
use super::backend::{Attended, Gradients, RewardHead, Sums, Targets, VocabularyBack};
use super::numbers::{Numbers, Place};
use super::parameters::LayerRanges;
use super::set::New;
use crate::Result;

/// Up and gate, the other way round.
#[derive(Debug)]
pub(in super::super) struct ActivatedBack<E> {
    up: Linear<E>,
    gate: Option<Linear<E>>,
}

/// Of gate and up, `[rows, intermediate]`.
#[derive(Debug, Default)]
pub(in super::super) struct Activations<E> {
    gate: Vec<E>,
    up: Vec<E>,
}

/// What sums are made of, and rows that are read in the end.
#[derive(Debug)]
pub(in super::super) struct Room<E> {
    outer: Outer<E>,
    /// `[rows, hidden]`: before and after the final norm, and the gradients of both.
    x: Vec<f32>,
    normed: Vec<E>,
    d_normed: Vec<f32>,
    dx: Vec<f32>,
    /// `[rows, vocab_size]`.
    logits: Vec<f32>,
    d_logits: Vec<E>,
}

impl<E: Load + Number> Room<E> {
    /// Takes rows of the residual stream.
    fn gather(&mut self, from: &Stream<'_, Cpu<E>>, rows: &[u32]) {
        let x = resize(&mut self.x, rows.len() * from.width);
        for (x, row) in x.chunks_exact_mut(from.width).zip(rows) {
            x.copy_from_slice(&from.x[*row as usize * from.width..][..from.width]);
        }
    }

    /// Takes the gradients of the final norm's results back to the rows that were gathered.
    fn scatter(&mut self, from: &Stream<'_, Cpu<E>>, rows: &[u32], sums: Sums<'_, Cpu<E>>) {
        let len = rows.len() * from.width;
        let dx = resize(&mut self.dx, len);
        dx.fill(0.0);
        let d_norm = &mut sums.gradient[sums.ranges.final_norm.clone()];
        from.norm.backward(&self.x[..len], &self.d_normed[..len], dx, d_norm);
        gradient::add_rows(dx, rows, 1.0, sums.dx, from.width);
    }
}

impl<E: Load + Number> Gradients for Cpu<E> {
    type Back = Linear<E>;
    type ActivatedBack = ActivatedBack<E>;
    type Activations = Activations<E>;
    type Keys<'a> = Keys<'a>;
    type Room = Room<E>;

    const LANGUAGE_ROWS: usize = 256;
    const LOG_SUMS: bool = false;

    fn for_gradients(device: &Device) -> Result<Self> {
        Self::on(device)
    }

    fn room(&self) -> Room<E> {
        Room {
            outer: Outer::default(),
            x: Vec::new(),
            normed: Vec::new(),
            d_normed: Vec::new(),
            dx: Vec::new(),
            logits: Vec::new(),
            d_logits: Vec::new(),
        }
    }

    fn room_bytes(Room { outer, x, normed, d_normed, dx, logits, d_logits }: &Room<E>) -> usize {
        let floats = [x, d_normed, dx, logits].map(Vec::capacity).iter().sum::<usize>();
        let elements = [normed, d_logits].map(Vec::capacity).iter().sum::<usize>();
        floats * 4 + elements * size_of::<E>() + outer.bytes()
    }

    fn list(numbers: &Numbers) -> Option<&Vec<f32>> {
        match &numbers.0 {
            Place::Host(values) => Some(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(..) => None,
        }
    }

    fn list_mut(numbers: &mut Numbers) -> Option<&mut Vec<f32>> {
        match &mut numbers.0 {
            Place::Host(values) => Some(values),
            #[cfg(feature = "gpu")]
            Place::Gpu(..) => None,
        }
    }

    fn with_list<R>(&self, values: &[f32], f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
        f(values)
    }

    fn within<'a>(part: &'a &[f32], range: Range<usize>) -> Self::Part<'a, f32> {
        &part[range]
    }

    fn within_mut<'a, T: Number>(part: &'a mut &mut [T], range: Range<usize>) -> &'a mut [T] {
        &mut part[range]
    }

    fn len<T: Number>(part: &[T]) -> usize {
        part.len()
    }

    fn read(&self, part: &[f32]) -> Result<Vec<f32>> {
        Ok(part.to_vec())
    }

    fn copy(&self, from: &[f32], to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn round(&self, from: &[f32], to: &mut [E]) -> Result<()> {
        round_all(from, to);
        Ok(())
    }

    fn round_sums(&self, from: &[f32], to: &mut [E]) -> Result<()> {
        self.round(from, to)
    }

    fn clear(&self, x: &mut [f32]) -> Result<()> {
        x.fill(0.0);
        Ok(())
    }

    fn accumulate(&self, x: &[f32], sum: &mut [f32]) -> Result<()> {
        sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        Ok(())
    }

    fn update(
        &self,
        how: &AdamW,
        weights: &mut [f32],
        gradient: &[f32],
        [mean, square]: [&mut [f32]; 2],
        rounded: Option<&mut [E]>,
    ) -> Result<()> {
        how.update(weights, gradient, mean, square);
        rounded.map_or(Ok(()), |rounded| self.round(weights, rounded))
    }

    fn back(&self) -> Linear<E> {
        Linear::empty()
    }

    fn back_bytes(back: &Linear<E>) -> usize {
        back.bytes()
    }

    fn activated_back(&self) -> ActivatedBack<E> {
        ActivatedBack { up: Linear::empty(), gate: None }
    }

    fn activated_back_bytes(ActivatedBack { up, gate }: &ActivatedBack<E>) -> usize {
        up.bytes() + gate.as_ref().map_or(0, Linear::bytes)
    }

    fn activations(&self) -> Activations<E> {
        Activations::default()
    }

    fn activations_bytes(Activations { gate, up }: &Activations<E>) -> usize {
        (gate.capacity() + up.capacity()) * size_of::<E>()
    }

    fn kept<'a>(
        &self,
        Activations { gate, up }: &'a mut Activations<E>,
        rows: Range<usize>,
        total: usize,
        width: usize,
        gated: bool,
    ) -> Result<Kept<'a, E>> {
        let range = rows.start * width..rows.end * width;
        let up = &mut resize(up, total * width)[range.clone()];
        let gate = resize(gate, if gated { total * width } else { 0 });
        Ok(Kept { gate: if gated { &mut gate[range] } else { gate }, up })
    }

    fn set_linear(
        &self,
        linear: &mut Linear<E>,
        back: &mut Linear<E>,
        inputs: usize,
        new: &mut New<'_, Self>,
        [rows, bias]: [&Range<usize>; 2],
    ) -> Result<()> {
        let rows = new.take(self, rows)?;
        linear.refill(0, rows);
        back.fill_transposed_f32(rows, inputs);
        if !bias.is_empty() {
            linear.refill_bias(new.take(self, bias)?);
        }
        Ok(())
    }

    fn set_activated(
        &self,
        activated: &mut Activated<E>,
        back: &mut ActivatedBack<E>,
        inputs: usize,
        new: &mut New<'_, Self>,
        LayerRanges { gate, gate_bias, up, up_bias, .. }: &LayerRanges,
    ) -> Result<()> {
        for range in [gate, gate_bias, up, up_bias] {
            new.take(self, range)?;
        }
        let some = |range: &Range<usize>| (!range.is_empty()).then(|| new.part(range));
        let (up, gate) = (new.part(up), some(gate));
        activated.refill(up, gate);
        back.up.fill_transposed_f32(up, inputs);
        if let Some(gate) = gate {
            back.gate.get_or_insert_with(Linear::empty).fill_transposed_f32(gate, inputs);
        }
        if let Some(bias) = some(up_bias) {
            activated.refill_bias(bias, some(gate_bias));
        }
        Ok(())
    }

    fn set_norm(&self, norm: &mut Norm, values: &[f32], offset: f32) -> Result<()> {
        match norm {
            Norm::Rms { weight, .. } => weight.iter_mut().zip(values).for_each(|(w, value)| *w = value + offset),
            Norm::Layer { weight, bias, .. } => {
                let (weights, biases) = values.split_at(weight.len());
                weight.copy_from_slice(weights);
                bias.copy_from_slice(biases);
            }
        }
        Ok(())
    }

    fn multiply_back(&self, _: &Linear<E>, back: &Linear<E>, dy: &[E], dx: &mut [f32]) -> Result<()> {
        back.forward(dy, dx, Store::Set);
        Ok(())
    }

    fn activate_back(
        &self,
        activated: &Activated<E>,
        back: &ActivatedBack<E>,
        Activations { gate, up }: &mut Activations<E>,
        rows: Range<usize>,
        d: &[f32],
        inner: &mut [E],
        dx: &mut [f32],
    ) -> Result<()> {
        let width = activated.outputs();
        let range = rows.start * width..rows.end * width;
        let up = &mut up[range.clone()];
        let mut gate = back.gate.as_ref().map(|back| (back, &mut gate[range]));
        activated.activation().backward(gate.as_mut().map(|(_, gate)| &mut **gate), up, d, inner);
        back.up.forward(up, dx, Store::Set);
        if let Some((back, gate)) = gate {
            back.forward(gate, dx, Store::Add);
        }
        Ok(())
    }

    fn add_activated(
        &self,
        activated: &Activated<E>,
        x: &[E],
        Activations { gate, up }: &Activations<E>,
        rows: usize,
        gradient: &mut Vec<f32>,
        ranges: &LayerRanges,
        room: &mut Room<E>,
    ) -> Result<()> {
        let len = rows * activated.outputs();
        room.outer.take(x, x.len() / rows);
        let parts = [(up, &ranges.up, &ranges.up_bias), (gate, &ranges.gate, &ranges.gate_bias)];
        for (d, weights, bias) in parts.into_iter().filter(|(_, weights, _)| !weights.is_empty()) {
            room.outer.add(&d[..len], &mut gradient[weights.clone()]);
            if !bias.is_empty() {
                gradient::column_sums(&d[..len], &mut gradient[bias.clone()]);
            }
        }
        Ok(())
    }

    fn add_outer(&self, x: &[E], inputs: usize, dy: &[E], sums: &mut [f32], room: &mut Room<E>) -> Result<()> {
        room.outer.take(x, inputs);
        room.outer.add(dy, sums);
        Ok(())
    }

    fn add_columns(&self, x: &[E], sums: &mut [f32], _: &mut Room<E>) -> Result<()> {
        gradient::column_sums(x, sums);
        Ok(())
    }

    fn add_rows(
        &self,
        x: &[f32],
        to: &[u32],
        factor: f32,
        sums: &mut [f32],
        width: usize,
        _: &mut Room<E>,
    ) -> Result<()> {
        gradient::add_rows(x, to, factor, sums, width);
        Ok(())
    }

    fn norm_back(
        &self,
        norm: &Norm,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        d_weights: &mut [f32],
        _: &mut Room<E>,
    ) -> Result<()> {
        norm.backward(x, dy, dx, d_weights);
        Ok(())
    }

    fn keys<'a>(&self, spans: &[Span<'a>], _: usize, _: &mut Room<E>) -> Result<Keys<'a>> {
        Ok(Keys::new(spans))
    }

    fn attention_back(
        &self,
        Attended { q, kv, layer, .. }: Attended<'_, Self>,
        keys: &Keys<'_>,
        rule: Rule,
        d_out: &[E],
        dqkv: &mut [f32],
        _: &mut Room<E>,
    ) -> Result<()> {
        let kv: &KvPages<E> = kv;
        gradient::attention(q, kv, layer, keys, rule, d_out, dqkv);
        Ok(())
    }

    fn unprepare(
        &self,
        dqkv: &[f32],
        before: &[E],
        keys: &Keys<'_>,
        how: How<'_, Self>,
        d_norms: &mut [f32],
        qkv: &mut [E],
        _: &mut Room<E>,
    ) -> Result<()> {
        let (d_q_norm, d_k_norm) = d_norms.split_at_mut(how.q_norm.map_or(0, Norm::weights));
        gradient::unprepare(dqkv, before, keys, how.into(), d_q_norm, d_k_norm, qkv);
        Ok(())
    }

    fn pairs(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        RewardHead { weight, bias }: RewardHead<'_, Self>,
        pair_weight: f32,
        rewards: &mut [f32],
        sums: Option<Sums<'_, Self>>,
        room: &mut Room<E>,
    ) -> Result<()> {
        room.gather(&from, rows);
        let (width, len) = (from.width, rows.len() * from.width);
        let mut normed = vec![0.0f32; len];
        from.norm.forward(&room.x[..len], &mut normed);
        let normed = || normed.chunks_exact(width);
        rewards.iter_mut().zip(normed()).for_each(|(reward, row)| *reward = dot(weight, row) + bias);
        let Some(sums) = sums else { return Ok(()) };
        let mut slopes = vec![0.0; rows.len()];
        gradient::pair_slopes(rewards, pair_weight, &mut slopes);
        let d_normed = resize(&mut room.d_normed, len);
        for ((d, normed), d_normed) in slopes.iter().zip(normed()).zip(d_normed.chunks_exact_mut(width)) {
            d_normed.iter_mut().zip(weight).for_each(|(to, w)| *to = d * w);
            let score = &mut sums.gradient[sums.ranges.score.clone()];
            score.iter_mut().zip(normed).for_each(|(sum, x)| *sum += d * x);
            sums.gradient[sums.ranges.score_bias.clone()].iter_mut().for_each(|sum| *sum += d);
        }
        room.scatter(&from, rows, sums);
        Ok(())
    }

    fn losses(
        &self,
        from: Stream<'_, Self>,
        rows: &[u32],
        head: VocabularyBack<'_, Self>,
        targets: &Targets<'_>,
        weights: &[f32],
        losses: &mut [f32],
        sums: Option<Sums<'_, Self>>,
        room: &mut Room<E>,
    ) -> Result<()> {
        let VocabularyBack { logits: logits_of, back, softcap, size } = head;
        room.gather(&from, rows);
        let len = rows.len() * from.width;
        let normed = resize(&mut room.normed, len);
        from.norm.forward(&room.x[..len], normed);
        let logits = resize(&mut room.logits, rows.len() * size);
        logits_of.forward(normed, logits, Store::Set);
        let d_logits = resize(&mut room.d_logits, logits.len());
        match targets {
            Targets::Tokens(ids) => gradient::cross_entropy(logits, softcap, ids, weights, losses, d_logits),
            Targets::Teachers(top) => gradient::distillation(logits, softcap, top, weights, losses, d_logits),
        }
        let Some(sums) = sums else { return Ok(()) };
        let d_normed = resize(&mut room.d_normed, len);
        // The inner loop takes pairs: an odd vocabulary has one more, which counts nothing.
        if back.inputs() == size {
            back.forward(d_logits, d_normed, Store::Set);
        } else {
            let filled_up = |row: &[E]| row.iter().copied().chain([E::default()]).collect::<Vec<_>>();
            let even: Vec<E> = d_logits.chunks_exact(size).flat_map(filled_up).collect();
            back.forward(&even, d_normed, Store::Set);
        }
        room.outer.take(normed, from.width);
        room.outer.add(d_logits, &mut sums.gradient[sums.ranges.language_head.clone()]);
        room.scatter(&from, rows, sums);
        Ok(())
    }
}
