//! How much memory a decoder will take, from what is known of its weights before they are read.
//!
//! Follows [`super::build`] matrix by matrix; a test holds the two together.

use std::marker::PhantomData;

use half::f16;
use plumb_kernels::linear::{Held, PANEL};

use super::backend::Backend;
use super::names::{LayerNames, Names, Qkv};
use super::{DType, Decoder, Device, StepSize, on};
use crate::checkpoint::{Foreseen, Weights};
use crate::config::{Config, Head, Norm};

/// Bytes that a decoder takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Linear layers, embedding and head: what [`Decoder::size`] will say, or a little more.
    pub(crate) weights: u64,
    /// Norms, the rotary embedding's table, and what all layers share.
    pub(crate) tables: u64,
    /// By how much the most that is taken at a time, copies on the way from the file included, is above what is held in
    /// the end. Little: the largest matrices come first.
    pub(crate) reading: u64,
}

impl Decoder {
    /// What [`Decoder::build`] would take.
    pub(crate) fn plan(config: &Config, weights: &Weights, dtype: DType, positions: usize, device: &Device) -> Plan {
        on!(device, dtype, B => Planner::<B>::plan(config, weights, positions))
    }

    /// What steps up to the `largest` compute in: [`super::Workspace::bytes`], and the copies of the rows that are read.
    pub(crate) fn workspace_bytes(config: &Config, dtype: DType, largest: StepSize, device: &Device) -> u64 {
        on!(device, dtype, B => B::workspace_bytes(config, largest))
    }
}

struct Planner<'a, B> {
    config: &'a Config,
    weights: &'a Weights,
    plan: Plan,
    /// The most at a time so far.
    peak: u64,
    /// Bytes of what all layers share.
    shared: usize,
    backend: PhantomData<B>,
}

/// A matrix of a checkpoint on its way.
struct Part {
    /// While it is read, with what it then is.
    reading: usize,
    /// Until it is packed.
    kept: usize,
    held: Held,
}

impl<'a, B: Backend> Planner<'a, B> {
    fn plan(config: &'a Config, weights: &'a Weights, positions: usize) -> Plan {
        let mut planner = Self { config, weights, plan: Plan::default(), peak: 0, shared: 0, backend: PhantomData };
        planner.ends();
        (0..config.num_layers).for_each(|layer| planner.layer(&LayerNames::of(config, layer)));
        planner.norm(config.hidden_size);
        planner.plan.reading = planner.peak.saturating_sub(planner.held());
        planner.plan.tables += (positions * config.rope.dim * size_of::<f32>() + planner.shared) as u64;
        planner.plan
    }

    fn ends(&mut self) {
        let Config { vocab_size, hidden_size, tie_word_embeddings: tied, .. } = *self.config;
        let names = Names::of(self.config.family);
        match self.config.head {
            Head::Language if tied => self.linear(&[(names.embedding, vocab_size)], hidden_size, 1, false, false),
            Head::Language => {
                self.embedding(names.embedding);
                self.linear(&[(names.language_head, vocab_size)], hidden_size, 1, false, false);
            }
            Head::Reward(_) => {
                self.embedding(names.embedding);
                self.plan.weights += (hidden_size * size_of::<f32>()) as u64;
            }
        }
    }

    fn layer(&mut self, names: &LayerNames) {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        match &names.qkv {
            Qkv::Separate([q_name, k_name, v_name]) => {
                self.linear(&[(q_name, q), (k_name, kv), (v_name, kv)], hidden, 1, config.qkv_bias, true);
            }
            // Cut into heads, for which it has to be expanded.
            Qkv::Interleaved(name) => {
                let part = self.part(name, [3 * q, hidden], true);
                let held = if self.weights.are_rounded_to_fp8() { Held::Fp8 } else { Held::Plain };
                let [bytes, shared] = B::stacked_bytes(&[(3 * q, held)], hidden);
                self.shared = self.shared.max(shared);
                self.reads(&[part], bytes, config.qkv_bias.then_some(3 * q), true);
            }
        }
        self.linear(&[(&names.output, hidden)], q, 1, config.attention_output_bias, true);
        // Each half begins with a panel of its own.
        let gate = names.gate.as_deref().map(|gate| (gate, inner));
        let halves: Vec<(&str, usize)> = gate.into_iter().chain([(&names.up[..], inner)]).collect();
        self.linear(&halves, hidden, PANEL, config.mlp_bias, true);
        self.linear(&[(&names.down, hidden)], inner, 1, config.mlp_bias, true);

        self.norm(hidden);
        self.norm(hidden);
        for (name, width) in [
            (&names.q_norm, config.head_dim),
            (&names.k_norm, config.head_dim),
            (&names.attention_post_norm, hidden),
            (&names.mlp_post_norm, hidden),
        ] {
            if name.is_some() {
                self.norm(width);
            }
        }
    }

    /// Matrices that become one layer, inside of the stack or not.
    fn linear(&mut self, parts: &[(impl AsRef<str>, usize)], inputs: usize, align: usize, bias: bool, inner: bool) {
        let align = if B::PACKED { align } else { 1 };
        let part = |(name, outputs): &(_, usize)| self.part(AsRef::as_ref(name), [*outputs, inputs], inner);
        let read: Vec<Part> = parts.iter().map(part).collect();
        let aligned = |(part, (_, outputs)): (&Part, &(_, usize))| (outputs.next_multiple_of(align), part.held);
        let parts: Vec<_> = read.iter().zip(parts).map(aligned).collect();
        let outputs: usize = parts.iter().map(|(outputs, _)| outputs).sum();
        let [bytes, shared] = B::stacked_bytes(&parts, inputs);
        self.shared = self.shared.max(shared);
        // In one form are only those panels whose parts are all quantised.
        let expanding = B::PACKED && read.iter().any(|part| !matches!(part.held, Held::Quantised(_)));
        self.reads(&read, bytes, bias.then_some(outputs), expanding);
    }

    /// The table from which rows are taken: not packed.
    fn embedding(&mut self, name: &str) {
        let len = self.config.vocab_size * self.config.hidden_size;
        let part = self.part(name, [self.config.vocab_size, self.config.hidden_size], false);
        let held = len * size_of::<B::Element>();
        let expanding = if part.held == Held::Plain { held } else { part.kept + held };
        self.takes(part.reading.max(expanding));
        self.plan.weights += held as u64;
    }

    fn part(&self, name: &str, [outputs, inputs]: [usize; 2], inner: bool) -> Part {
        let Foreseen { dtype, held, reading } = self.weights.foresee(&format!("{name}.weight"));
        let len = outputs * inputs;
        let as_fp8 = len + outputs * size_of::<f32>();
        match held {
            Held::Plain => {
                let kept = len * size_of::<B::Element>();
                let converted = if dtype.size_in_bytes() == size_of::<B::Element>() { 0 } else { kept };
                let reading = len * reading + converted + kept;
                match inner && self.weights.are_rounded_to_fp8() {
                    true => Part { reading: reading.max(kept + as_fp8), kept: as_fp8, held: Held::Fp8 },
                    false => Part { reading, kept, held },
                }
            }
            // Codes of a byte, scales and offsets of two at most.
            Held::Quantised(described) => {
                let kept = len + 2 * len / described.group * size_of::<f16>();
                Part { reading: len * reading, kept, held }
            }
            Held::Fp8 => Part { reading: len * reading + as_fp8, kept: as_fp8, held },
        }
    }

    /// One is read while those before it wait for the last; then all are packed into so many bytes, the longest that is
    /// quantised expanded first where `expanding`.
    fn reads(&mut self, parts: &[Part], packed: usize, bias: Option<usize>, expanding: bool) {
        let mut kept = 0;
        for part in parts {
            self.takes(kept + part.reading);
            kept += part.kept;
        }
        let expanded = parts.iter().filter(|part| expanding && part.held != Held::Plain);
        self.takes(kept + packed + expanded.map(|part| part.kept * size_of::<B::Element>()).max().unwrap_or(0));
        // Where it is not packed, it is there for results of both types.
        let of_bias = size_of::<f32>() + if B::PACKED { 0 } else { size_of::<B::Element>() };
        self.plan.weights += (packed + bias.unwrap_or(0) * of_bias) as u64;
    }

    /// For a moment, beside what is held already.
    fn takes(&mut self, bytes: usize) {
        self.peak = self.peak.max(self.held() + bytes as u64);
    }

    /// Of the weights so far, what is in the process's own memory.
    fn held(&self) -> u64 {
        if B::PACKED { self.plan.weights } else { 0 }
    }

    fn norm(&mut self, width: usize) {
        let vectors = match self.config.norm {
            Norm::Rms { .. } => 1,
            Norm::Layer { .. } => 2,
        };
        self.plan.tables += (vectors * width * size_of::<f32>()) as u64;
    }
}
