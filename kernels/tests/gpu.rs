//! The kernels of every GPU that there is, the emulated one among them, against the reference.

#![cfg(feature = "gpu")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

mod common;
#[path = "gpu/cut_attention.rs"]
mod cut_attention;
#[path = "gpu/fp8.rs"]
mod fp8;
#[path = "gpu/quantised.rs"]
mod quantised;
#[path = "sample.rs"]
mod sample;

use common::{assert_close, assert_within, numbers, on_each, on_each_way, rounded, runs, widened};
use half::bf16;
use plumb_kernels::activation::Activation;
use plumb_kernels::attention::{PAGE, Rule, Run, Span};
use plumb_kernels::gpu::{self, CutRule, Gpu, KvPages, Partials, Pieces, Prepare};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;
use plumb_kernels::{Element, reference};

fn norms<E: Element>(gpu: &Gpu) {
    for (rows, width) in [(1, 4), (3, 64), (2, 100), (5, 2304), (2, 8196)] {
        let (x, weight, bias) = (numbers(rows * width, 1), numbers(width, 2), numbers(width, 3));
        let rms = (Norm::Rms { weight: weight.clone(), eps: 1e-5 }, reference::rms_norm(&x, &weight, 1e-5));
        let layer = Norm::Layer { weight: weight.clone(), bias: bias.clone(), eps: 1e-5 };
        let layer = (layer, reference::layer_norm(&x, &weight, &bias, 1e-5));
        let gpu_x = gpu.upload(&x).unwrap();
        for (name, (norm, expected)) in [("rms", rms), ("layer", layer)] {
            let what = format!("{name} norm of {rows} x {width}");
            let norm = gpu::Norm::new(gpu, &norm).unwrap();
            let mut out = gpu.zeros::<E>(rows * width).unwrap();
            norm.forward(gpu, gpu_x.all(), None, out.all_mut()).unwrap();
            assert_close(&out.to_vec().unwrap(), &expected, &what);

            let wanted = gpu.upload(&[rows as u32 - 1, 0]).unwrap();
            let mut out = gpu.zeros::<E>(2 * width).unwrap();
            norm.forward(gpu, gpu_x.all(), Some(wanted.all()), out.all_mut()).unwrap();
            let rows_wanted = [&expected[(rows - 1) * width..], &expected[..width]].concat();
            assert_close(&out.to_vec().unwrap(), &rows_wanted, &what);

            let before = numbers(rows * width, 4);
            let mut sum = gpu.upload(&before).unwrap();
            norm.add_to(gpu, gpu_x.all(), sum.all_mut()).unwrap();
            let expected: Vec<f32> = before.iter().zip(&expected).map(|(before, y)| before + y).collect();
            assert_close(&sum.to_vec().unwrap(), &expected, &what);
        }
    }
}

#[test]
fn norms_are_those_of_the_reference() {
    on_each(|gpu| {
        norms::<f32>(gpu);
        norms::<bf16>(gpu);
    });
}

fn embeddings<E: Element>(gpu: &Gpu) {
    let (tokens, width) = (7, 72);
    let table: Vec<E> = rounded(&numbers(tokens * width, 1));
    let ids = [6u32, 0, 3, 3];
    let mut x = gpu.zeros::<f32>(ids.len() * width).unwrap();
    let (gpu_table, gpu_ids) = (gpu.upload(&table).unwrap(), gpu.upload(&ids).unwrap());
    gpu.embed(gpu_table.all(), gpu_ids.all(), 3.0, width, x.all_mut()).unwrap();
    let expected: Vec<f32> =
        ids.iter().flat_map(|id| table[*id as usize * width..][..width].iter().map(|x| x.to_f32() * 3.0)).collect();
    assert_eq!(x.to_vec().unwrap(), expected);
}

#[test]
fn embeddings_are_rows_of_the_table() {
    on_each(|gpu| {
        embeddings::<f32>(gpu);
        embeddings::<bf16>(gpu);
    });
}

/// The error function (Abramowitz and Stegun 1964, 7.1.26, good to 1.5e-7).
fn erf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let factors = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
    let sum = factors.iter().fold(0.0, |sum, factor| (sum + factor) * t);
    (1.0 - sum * (-x * x).exp()).copysign(x)
}

fn activations<E: Element>(gpu: &Gpu) {
    let (rows, width) = (3, 92);
    let x: Vec<E> = rounded(&numbers(rows * 2 * width, 1).iter().map(|x| x * 6.0).collect::<Vec<_>>());
    let gpu_x = gpu.upload(&x).unwrap();
    type Function = fn(f64) -> f64;
    let activations: [(Activation, Function); 3] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Gelu, |x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))),
        (Activation::GeluTanh, |x| 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh())),
    ];
    for (activation, function) in activations {
        let act = |x: &E| function(f64::from(x.to_f32()));
        let mut out = gpu.zeros::<E>(x.len()).unwrap();
        gpu.activate(activation, false, gpu_x.all(), 2 * width, out.all_mut()).unwrap();
        let expected: Vec<f32> = x.iter().map(|x| act(x) as f32).collect();
        assert_close(&out.to_vec().unwrap(), &expected, &format!("{activation:?}"));

        let mut out = gpu.zeros::<E>(rows * width).unwrap();
        gpu.activate(activation, true, gpu_x.all(), width, out.all_mut()).unwrap();
        let gated = |row: &[E]| -> Vec<f32> {
            let (gate, up) = row.split_at(width);
            gate.iter().zip(up).map(|(gate, up)| (act(gate) * f64::from(up.to_f32())) as f32).collect()
        };
        let expected: Vec<f32> = x.chunks_exact(2 * width).flat_map(gated).collect();
        assert_close(&out.to_vec().unwrap(), &expected, &format!("gated {activation:?}"));
    }
}

#[test]
fn activations_are_those_of_the_reference() {
    on_each(|gpu| {
        activations::<f32>(gpu);
        activations::<bf16>(gpu);
    });
}

fn products<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    for (rows, inputs, outputs) in [(1, 64, 8), (5, 40, 72), (130, 256, 136)] {
        let (x, w): (Vec<E>, Vec<E>) = (rounded(&numbers(rows * inputs, 1)), rounded(&numbers(outputs * inputs, 2)));
        let bias = numbers(outputs, 3);
        let gpu_x = gpu.upload(&x).unwrap();
        for bias in [None, Some(&bias[..])] {
            let what = format!("{rows} x {inputs} x {outputs}, bias: {}", bias.is_some());
            let layer = gpu::Linear::new(gpu, &w, bias, inputs).unwrap();
            // Tensor cores cut off what they add up.
            let wide = if size_of::<E>() == 2 { 1e-4 } else { 1e-5 };
            let expected = reference::linear(&widened(&x), &widened(&w), bias, inputs);
            let mut y = gpu.zeros::<f32>(rows * outputs).unwrap();
            layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
            assert_within(&y.to_vec().unwrap(), &expected, wide, &what);
            layer.add_to(gpu, gpu_x.all(), y.all_mut()).unwrap();
            let twice: Vec<f32> = expected.iter().map(|y| 2.0 * y).collect();
            assert_within(&y.to_vec().unwrap(), &twice, wide, &what);
            let mut y = gpu.zeros::<E>(rows * outputs).unwrap();
            layer.forward(gpu, gpu_x.all(), y.all_mut()).unwrap();
            assert_close(&y.to_vec().unwrap(), &expected, &what);

            let mut part = gpu.zeros::<f32>(rows * 8).unwrap();
            layer.part(gpu, outputs - 8, 8, gpu_x.all(), part.all_mut()).unwrap();
            let expected: Vec<f32> =
                expected.chunks_exact(outputs).flat_map(|row| row[outputs - 8..].to_vec()).collect();
            assert_within(&part.to_vec().unwrap(), &expected, wide, &what);
        }
    }
}

fn products_with_gelu<E: gpu::Output<E>>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    let (rows, inputs, outputs) = (5, 40, 72);
    let (x, w): (Vec<E>, Vec<E>) = (rounded(&numbers(rows * inputs, 1)), rounded(&numbers(outputs * inputs, 2)));
    let bias = numbers(outputs, 3);
    for bias in [None, Some(&bias[..])] {
        let layer = gpu::Linear::new(gpu, &w, bias, inputs).unwrap();
        let narrow = bias.map(|bias| widened(&rounded::<E>(bias)));
        let sums = reference::linear(&widened(&x), &widened(&w), narrow.as_deref(), inputs);
        let gelu = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh());
        let expected: Vec<f32> = sums.iter().map(|x| gelu(f64::from(*x)) as f32).collect();
        let gpu_x = gpu.upload(&x).unwrap();
        let mut y = gpu.zeros::<E>(rows * outputs).unwrap();
        // A device may have no such product in f32.
        if layer.forward_gelu_tanh(gpu, gpu_x.all(), y.all_mut()).unwrap() {
            assert_within(&y.to_vec().unwrap(), &expected, if size_of::<E>() == 2 { 1.0 / 64.0 } else { 1e-4 }, "gelu");
        } else {
            assert_ne!(gpu.name(), "emulated");
        }
        assert!(!layer.forward_gelu_tanh(&gpu.clone().invariant(), gpu_x.all(), y.all_mut()).unwrap());
    }
}

#[test]
fn products_with_their_non_linearity_are_those_of_the_reference() {
    on_each(|gpu| {
        products_with_gelu::<f32>(gpu);
        products_with_gelu::<bf16>(gpu);
    });
}

#[test]
fn products_are_those_of_the_reference() {
    on_each(|gpu| {
        products::<f32>(gpu);
        products::<bf16>(gpu);
    });
}

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    rotated: usize,
    softcap: Option<f32>,
    window: Option<usize>,
    normed: bool,
    tokens: usize,
}

const CASE: Case =
    Case { heads: 4, kv_heads: 2, dim: 64, rotated: 64, softcap: None, window: None, normed: false, tokens: 150 };

/// More positions than any case has.
const POSITIONS: usize = 2048;

impl Case {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    fn rule(&self) -> Rule {
        Rule {
            heads: self.heads,
            head_dim: self.dim,
            scale: 1.0 / (self.dim as f32).sqrt(),
            softcap: self.softcap,
            window: self.window,
        }
    }

    fn rotary(&self) -> Rotary {
        Rotary::new(&(0..self.rotated / 2).map(|i| 0.3 / (i + 1) as f32).collect::<Vec<_>>(), POSITIONS)
    }

    /// Of a head of q, or of k.
    fn norm(&self, q: bool) -> Vec<f32> {
        numbers(self.dim, if q { 11 } else { 12 })
    }
}

/// A device with the pages of a case.
struct Attending<'a, E> {
    gpu: &'a Gpu,
    case: Case,
    kv: KvPages<E>,
    angles: gpu::Buffer<f32>,
    norms: [gpu::Norm; 2],
    invariant: bool,
    partial_bytes: usize,
    /// Used again from step to step, as a decoder does.
    pieces: Pieces,
    partials: Partials,
}

impl<'a, E: Element> Attending<'a, E> {
    fn new(gpu: &'a Gpu, case: Case, pages: usize) -> Self {
        let norm = |q| gpu::Norm::new(gpu, &Norm::Rms { weight: case.norm(q), eps: 1e-6 }).unwrap();
        Self {
            gpu,
            case,
            kv: KvPages::new(gpu, 1, case.kv_heads, case.dim, pages).unwrap(),
            angles: gpu.upload(case.rotary().table()).unwrap(),
            norms: [norm(true), norm(false)],
            invariant: gpu.is_invariant(),
            partial_bytes: gpu::PARTIAL_BYTES,
            pieces: Pieces::new(gpu),
            partials: Partials::new(gpu),
        }
    }

    fn step(&mut self, qkv: &[E], spans: &[Span<'_>], runs: &[Run]) -> Vec<E> {
        let q = self.prepare(qkv, spans, runs);
        self.attend(&q).0
    }

    /// Writes keys and values, and answers the queries.
    fn prepare(&mut self, qkv: &[E], spans: &[Span<'_>], runs: &[Run]) -> gpu::Buffer<E> {
        let Self { gpu, case, kv, angles, norms: [q_norm, k_norm], pieces, .. } = self;
        let how = Prepare {
            heads: case.heads,
            q_norm: case.normed.then_some(&*q_norm),
            k_norm: case.normed.then_some(&*k_norm),
            table: angles.all(),
            rotated: case.rotated,
        };
        let rule = CutRule {
            heads: case.heads,
            kv_heads: case.kv_heads,
            head_dim: case.dim,
            invariant: self.invariant,
            partial_bytes: self.partial_bytes,
        };
        // Two rows are of no sequence.
        let rows = qkv.len() / case.width() + 2;
        pieces.set::<E>(spans, runs, rule, rows).unwrap();
        let mut q = gpu.zeros(rows * kv.q_width(case.heads)).unwrap();
        let nothing = vec![E::from_f32(f32::NAN); 2 * case.width()];
        let qkv = gpu.upload(&[qkv, &nothing].concat()).unwrap();
        // In two parts, as rows may be.
        let first = pieces.rows() / 2;
        let (width, q_width) = (case.width(), kv.q_width(case.heads));
        for (start, end) in [(0, first), (first, pieces.rows())] {
            let (x, q) = (qkv.view(start * width..end * width), q.view_mut(start * q_width..end * q_width));
            gpu.prepare(x, pieces, start, how, q, kv, 0).unwrap();
        }
        q
    }

    /// The result for all rows that are of a sequence, and the logarithms of their sums.
    fn attend(&mut self, q: &gpu::Buffer<E>) -> (Vec<E>, Vec<f32>) {
        let Self { gpu, case, kv, pieces, partials, .. } = self;
        let mut out = gpu.zeros(pieces.rows() * case.heads * case.dim).unwrap();
        let mut log_sums = gpu.zeros(pieces.rows() * case.heads).unwrap();
        let sums = Some(log_sums.all_mut());
        gpu.attention(q.all(), kv, 0, pieces, case.rule(), partials, out.all_mut(), sums).unwrap();
        let (mut out, mut log_sums) = (out.to_vec().unwrap(), log_sums.to_vec().unwrap());
        out.truncate((pieces.rows() - 2) * case.heads * case.dim);
        log_sums.truncate((pieces.rows() - 2) * case.heads);
        (out, log_sums)
    }
}

/// Runs a sequence in the given steps, the first of them beside `neighbour` rows of another one that are no numbers; in
/// pages out of order, in which there was something else before.
fn attend<E: Element>(gpu: &Gpu, case: Case, qkv: &[E], steps: &[usize], neighbour: usize) -> Vec<E> {
    let width = case.width();
    let (own, others) = (case.tokens.div_ceil(PAGE) as u32, neighbour.div_ceil(PAGE) as u32);
    let (table, other): (Vec<u32>, Vec<u32>) = ((0..own).rev().collect(), (own..own + others).collect());
    let mut attending = Attending::new(gpu, case, (own + others) as usize);
    for pages in [&table, &other] {
        let len = pages.len() * PAGE;
        if len > 0 {
            let span = Span { row: 0, len, position: 0, pages };
            attending.step(&vec![E::from_f32(f32::NAN); len * width], &[span], &runs(0, 0, len, pages));
        }
    }
    let (mut result, mut position) = (Vec::new(), 0);
    for (i, step) in steps.iter().enumerate() {
        let beside = if i == 0 { neighbour } else { 0 };
        let mut rows = vec![E::from_f32(f32::NAN); beside * width];
        rows.extend_from_slice(&qkv[position * width..(position + step) * width]);
        let cut = [runs(0, 0, beside, &other), runs(beside, position, *step, &table)].concat();
        let mut spans = vec![Span { row: beside, len: *step, position, pages: &table }];
        if beside > 0 {
            spans.insert(0, Span { row: 0, len: beside, position: 0, pages: &other });
        }
        let attended = attending.step(&rows, &spans, &cut);
        result.extend_from_slice(&attended[beside * case.heads * case.dim..]);
        position += step;
    }
    result
}

/// What the reference makes of the same sequence.
fn expected(case: Case, qkv: &[f32]) -> Vec<f32> {
    expected_of_last(case, qkv, case.tokens)
}

/// Of so many of its last rows.
fn expected_of_last(case: Case, qkv: &[f32], rows: usize) -> Vec<f32> {
    let (dim, group, rotary) = (case.dim, case.heads / case.kv_heads, case.rotary());
    let head = |index: usize| -> Vec<f32> {
        let rows = qkv.chunks_exact(case.width()).enumerate();
        let of = |(position, row): (usize, &[f32])| {
            let mut head = row[index * dim..(index + 1) * dim].to_vec();
            if index < case.heads + case.kv_heads {
                if case.normed {
                    head = reference::rms_norm(&head, &case.norm(index < case.heads), 1e-6);
                }
                rotary.apply(position, &mut head);
            }
            head
        };
        rows.flat_map(of).collect()
    };
    let rule = reference::AttentionRule { scale: case.rule().scale, softcap: case.softcap, window: case.window };
    let mut out = vec![0.0; rows * case.heads * dim];
    for h in 0..case.heads {
        let (k, v) = (head(case.heads + h / group), head(case.heads + case.kv_heads + h / group));
        let attended = reference::attention(&head(h)[(case.tokens - rows) * dim..], &k, &v, dim, rule);
        for (row, attended) in attended.chunks_exact(dim).enumerate() {
            out[(row * case.heads + h) * dim..][..dim].copy_from_slice(attended);
        }
    }
    out
}

const CASES: [Case; 6] = [
    CASE,
    Case { heads: 3, kv_heads: 3, dim: 8, rotated: 4, tokens: 37, ..CASE },
    Case { heads: 6, kv_heads: 1, dim: 80, rotated: 20, window: Some(40), ..CASE },
    Case { heads: 4, kv_heads: 1, dim: 128, rotated: 128, normed: true, tokens: 70, ..CASE },
    Case { heads: 2, kv_heads: 1, dim: 256, rotated: 256, softcap: Some(2.0), window: Some(33), tokens: 66, ..CASE },
    Case { heads: 20, kv_heads: 1, tokens: 40, ..CASE },
];

fn attention<E: Element>(gpu: &Gpu) {
    CASES.iter().for_each(|case| attention_of::<E>(gpu, *case));
}

fn attention_of<E: Element>(gpu: &Gpu, case: Case) {
    let qkv: Vec<E> = rounded(&numbers(case.tokens * case.width(), 5));
    let whole = attend(gpu, case, &qkv, &[case.tokens], 0);
    let expected = expected(case, &widened(&qkv));
    let tolerance = if size_of::<E>() == 2 { 0.02 } else { 1e-5 };
    for (i, (found, expected)) in whole.iter().zip(&expected).enumerate() {
        let found = found.to_f32();
        assert!((found - expected).abs() <= tolerance, "{case:?} {i}: {found} {expected}");
    }
    // However it is cut, and whatever stands beside it.
    let cut = attend(gpu, case, &qkv, &[1, 20, case.tokens - 22, 1], 45);
    assert!(whole == cut, "{case:?}: other bits in steps");
}

#[test]
fn attention_is_that_of_the_reference_and_has_the_same_bits_in_steps() {
    on_each_way(|gpu| {
        attention::<f32>(gpu);
        attention::<bf16>(gpu);
    });
}

#[test]
fn long_attention_is_that_of_the_reference_and_has_the_same_bits_in_steps() {
    let alone = Case { heads: 1, kv_heads: 1, ..CASE };
    // So many tiles of keys that each place in shared memory for one is used three times.
    let cases = [
        Case { tokens: 1100, ..alone },
        Case { dim: 128, rotated: 128, tokens: 650, ..alone },
        Case { dim: 256, rotated: 64, tokens: 400, softcap: Some(3.0), ..alone },
        Case { heads: 3, dim: 116, rotated: 116, tokens: 330, window: Some(200), ..alone },
        // A warp group does not see tiles between which another one does.
        Case { dim: 256, rotated: 64, tokens: 300, window: Some(150), ..alone },
    ];
    on_each_way(|gpu| cases.iter().for_each(|case| attention_of::<bf16>(&gpu.invariant(), *case)));
}

#[test]
fn what_is_no_number_reaches_only_those_who_see_it() {
    on_each_way(|gpu| {
        let (case, bad) = (Case { tokens: 70, ..CASE }, 40);
        let width = case.heads * case.dim;
        let mut qkv: Vec<bf16> = rounded(&numbers(case.tokens * case.width(), 5));
        let good = attend(gpu, case, &qkv, &[case.tokens], 0);
        // In the value of the last key head, which is that of the last two heads.
        qkv[(bad + 1) * case.width() - 1] = bf16::INFINITY;
        let found = attend(gpu, case, &qkv, &[case.tokens], 0);
        for (row, (found, good)) in found.chunks(width).zip(good.chunks(width)).enumerate() {
            assert_eq!(found[..width / 2], good[..width / 2], "{row}");
            match row < bad {
                true => assert_eq!(found[width / 2..], good[width / 2..], "{row}"),
                false => assert!(found[width / 2..].iter().all(|x| x.is_nan()), "{row}"),
            }
        }
    });
}

#[test]
fn rewards_are_dot_products() {
    on_each(|gpu| {
        let (rows, width) = (5, 2052);
        let (x, weight) = (numbers(rows * width, 1), numbers(width, 2));
        let mut rewards = gpu.zeros::<f32>(rows).unwrap();
        let (gpu_x, gpu_weight) = (gpu.upload(&x).unwrap(), gpu.upload(&weight).unwrap());
        gpu.rewards(gpu_x.all(), gpu_weight.all(), 0.25, rewards.all_mut()).unwrap();
        let expected = reference::linear(&x, &weight, Some(&[0.25]), width);
        for (found, expected) in rewards.to_vec().unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-3, "{found} {expected}");
        }
    });
}

fn heads<E: Element>(gpu: &Gpu)
where
    f32: gpu::Output<E>,
{
    // More tokens than a tile has.
    let (tokens, inputs, rows, count) = (8192 + 300, 16, 3, 40);
    let weights: Vec<E> = rounded(&numbers(tokens * inputs, 1).iter().map(|w| w * 4.0).collect::<Vec<_>>());
    let head = gpu::Linear::new(gpu, &weights, None, inputs).unwrap();
    let x: Vec<E> = rounded(&numbers(rows * inputs, 2));
    let gpu_x = gpu.upload(&x).unwrap();
    for softcap in [None, Some(3.0f32)] {
        let mut logits = reference::linear(&widened(&x), &widened(&weights), None, inputs);
        if let Some(cap) = softcap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        let logits: Vec<&[f32]> = logits.chunks_exact(tokens).collect();
        let targets = [8300u32, 0, 8191];
        let found =
            gpu::Vocabulary::new(gpu).token_log_probs(&head, softcap, &gpu_x, &targets).unwrap().wait().unwrap();
        for ((found, logits), target) in found.chunks(2).zip(&logits).zip(targets) {
            let expected = reference::log_prob(logits, target as usize);
            assert!((found[0] - expected).abs() < 1e-4, "{found:?} {expected}");
        }
        let (ids, log_probs) = gpu::Vocabulary::new(gpu).top_log_probs(&head, softcap, &gpu_x, rows, count).unwrap();
        for (row, logits) in logits.iter().enumerate() {
            let of = |id: u32| reference::log_prob(logits, id as usize);
            let mut order: Vec<u32> = (0..tokens as u32).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            let (ids, log_probs) = (&ids[row * count..][..count], &log_probs[row * count..][..count]);
            for ((id, found), best) in ids.iter().zip(log_probs).zip(&order) {
                assert!((found - of(*id)).abs() < 1e-4 && (found - of(*best)).abs() < 1e-4, "{id} {best} {found}");
            }
            let mut distinct = ids.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), count);
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_reference() {
    on_each(|gpu| {
        heads::<f32>(gpu);
        heads::<bf16>(gpu);
    });
}

#[test]
fn of_equally_likely_tokens_the_lower_id_comes_first() {
    on_each(|gpu| {
        let head = gpu::Linear::new(gpu, &vec![0f32; 9000 * 4], None, 4).unwrap();
        let x = gpu.upload(&[1f32; 4]).unwrap();
        let (ids, log_probs) = gpu::Vocabulary::new(gpu).top_log_probs(&head, None, &x, 1, 300).unwrap();
        assert_eq!(ids, (0..300).collect::<Vec<u32>>());
        assert!(log_probs.iter().all(|log_prob| (log_prob + 9000f32.ln()).abs() < 1e-4), "{log_probs:?}");
        let nothing = gpu.upload(&[f32::NAN; 4]).unwrap();
        let log_probs = gpu::Vocabulary::new(gpu).token_log_probs(&head, None, &nothing, &[7]).unwrap().wait().unwrap();
        assert!(log_probs[0].is_nan() && log_probs[1] == 0.0);
    });
}

#[test]
fn of_the_likeliest_tokens_greedy_decoding_takes_the_first() {
    on_each(|gpu| {
        // Logits are the weights of the first of four inputs.
        for largest in [vec![0], vec![300, 8000], vec![8191, 8192], vec![8200, 8999]] {
            let mut weights = numbers(9000 * 4, 1);
            largest.iter().for_each(|at| weights[4 * at] = 20.0);
            let head = gpu::Linear::new(gpu, &weights, None, 4).unwrap();
            let targets = [0, 299, 300, 301, 8000, 8191, 8192, 8200, 8999];
            let x = gpu.upload(&[1f32, 0.0, 0.0, 0.0].repeat(targets.len())).unwrap();
            let found = gpu::Vocabulary::new(gpu).token_log_probs(&head, None, &x, &targets).unwrap().wait().unwrap();
            let greedy = targets
                .iter()
                .zip(found.chunks(2))
                .filter(|(_, found)| found[1] == 1.0)
                .map(|(target, _)| *target as usize);
            assert_eq!(greedy.collect::<Vec<_>>(), largest[..1]);
        }
    });
}

#[test]
fn memory_that_is_not_there_is_refused() {
    on_each(|gpu| {
        let free = gpu.memory().unwrap().free;
        let refused = gpu.zeros::<u8>(free + (1 << 40));
        assert!(matches!(refused, Err(gpu::GpuError::OutOfMemory { .. })), "{refused:?}");
        let buffer = gpu.zeros::<f32>(1 << 20).unwrap();
        assert!(gpu.memory().unwrap().free < free);
        drop(buffer);
        let from = gpu.upload(&[1u32, 2, 3]).unwrap();
        assert_eq!(from.to_vec().unwrap(), [1, 2, 3]);
        let mut to = gpu.zeros::<u32>(4).unwrap();
        gpu.copy(from.view(1..3), to.view_mut(2..4)).unwrap();
        assert_eq!(to.to_vec().unwrap(), [0, 0, 2, 3]);
        gpu.synchronize().unwrap();
    });
}

#[test]
fn what_is_fetched_is_what_was_there_when_it_was_asked_for() {
    on_each(|gpu| {
        let mut buffer = gpu.upload(&[1u32, 2, 3]).unwrap();
        let (first, nothing) = (buffer.fetch(1..3).unwrap(), buffer.fetch(0..0).unwrap());
        buffer.write(0, &[4, 5, 6]).unwrap();
        // Nobody waits for it, and another one comes to its place.
        drop(buffer.fetch(0..3).unwrap());
        let second = buffer.fetch(0..2).unwrap();
        let large = gpu.upload(&vec![7u8; 1 << 20]).unwrap().fetch(0..1 << 20).unwrap();
        buffer.write(0, &[8, 8, 8]).unwrap();
        gpu.synchronize().unwrap();
        assert!(first.is_done() && nothing.is_done() && second.is_done() && large.is_done());
        assert_eq!((first.wait().unwrap(), second.wait().unwrap()), (vec![2, 3], vec![4, 5]));
        assert!(nothing.wait().unwrap().is_empty() && large.wait().unwrap() == vec![7; 1 << 20]);
    });
}

/// A sum over a group of these, each of which has numbers of its own.
fn sums(gpus: &[Gpu], len: usize) {
    let group = match gpu::Group::new(gpus) {
        // On a machine without NCCL.
        Err(gpu::GpuError::Missing(reason)) => return eprintln!("skipped: {reason}"),
        group => group.unwrap(),
    };
    let values: Vec<Vec<f32>> = (0..gpus.len()).map(|i| numbers(len, i)).collect();
    let mut buffers: Vec<_> = gpus.iter().zip(&values).map(|(gpu, values)| gpu.upload(values).unwrap()).collect();
    // The first and the last number stay.
    let parts = |buffers: &mut [gpu::Buffer<f32>]| {
        let mut parts: Vec<_> = buffers.iter_mut().map(|buffer| buffer.view_mut(1..len - 1)).collect();
        group.all_reduce(&mut parts).unwrap();
    };
    parts(&mut buffers);
    let sum = |i: usize| values.iter().map(|values| values[i]).sum::<f32>();
    for (buffer, own) in buffers.iter().zip(&values) {
        let found = buffer.to_vec().unwrap();
        assert_eq!((found[0], found[len - 1]), (own[0], own[len - 1]));
        (1..len - 1).for_each(|i| assert!((found[i] - sum(i)).abs() < 1e-6, "{i}: {} {}", found[i], sum(i)));
        assert_eq!(found[1..len - 1], buffers[0].to_vec().unwrap()[1..len - 1], "all have the same bits");
    }
    group.all_reduce(&mut buffers.iter_mut().map(|buffer| buffer.view_mut(3..3)).collect::<Vec<_>>()).unwrap();
}

#[test]
fn groups_add_up_what_each_has() {
    on_each(|gpu| sums(std::slice::from_ref(gpu), 1000));
    #[cfg(feature = "emulated")]
    for size in 2..5 {
        sums(&(0..size).map(|_| Gpu::emulated()).collect::<Vec<_>>(), 1000);
    }
    #[cfg(feature = "cuda")]
    {
        let all: Vec<_> = (0..16).map_while(|number| Gpu::cuda(number).ok()).collect();
        if all.len() > 1 {
            sums(&all, 1000);
        }
    }
    assert!(matches!(gpu::Group::new(&[]), Err(gpu::GpuError::Missing(_))));
}

#[test]
fn what_was_recorded_is_done_again_with_what_is_there_then() {
    on_each(|gpu| {
        let layer = gpu::Linear::new(gpu, &numbers(8 * 16, 1), None, 16).unwrap();
        let mut x = gpu.upload(&numbers(3 * 16, 2)).unwrap();
        let mut y = gpu.zeros::<f32>(3 * 8).unwrap();
        let mut activated = gpu.zeros::<f32>(3 * 8).unwrap();
        let mut work = |x: &gpu::Buffer<f32>, y: &mut gpu::Buffer<f32>| {
            layer.forward(gpu, x.all(), y.all_mut())?;
            gpu.activate(Activation::Silu, false, y.all(), 8, activated.all_mut())
        };
        work(&x, &mut y).unwrap();
        let before = y.to_vec().unwrap();
        let graph = gpu.record(|| work(&x, &mut y)).unwrap();
        x.write(0, &numbers(3 * 16, 3)).unwrap();
        assert_eq!(y.to_vec().unwrap(), before, "nothing is done while it is recorded");
        assert!(graph.replay().unwrap());
        let again = (y.to_vec().unwrap(), activated.to_vec().unwrap());
        assert_ne!(again.0, before);
        for refused in [gpu.record(|| gpu.upload(&[1u32]).map(drop)), gpu.record(|| gpu.empty::<u32>().grow(4))] {
            assert!(matches!(refused, Err(gpu::GpuError::Failed(_))), "{refused:?}");
        }
        let mut other = gpu.zeros::<f32>(3 * 8).unwrap();
        layer.forward(gpu, x.all(), other.all_mut()).unwrap();
        assert_eq!(other.to_vec().unwrap(), again.0, "after a recording that failed, all is as before");

        drop(y);
        assert!(!graph.replay().unwrap(), "an array is gone");
        assert_eq!(activated.to_vec().unwrap(), again.1);
    });
}

#[test]
fn an_invariant_gpu_computes_a_row_by_itself() {
    on_each(|gpu| {
        let gpu = &gpu.invariant();
        // Few outputs and many inputs are what sums in parts would be chosen for.
        for (inputs, outputs, most, bias) in [(768, 264, 300, None), (4096, 64, 70, Some(numbers(64, 3)))] {
            let w: Vec<bf16> = rounded(&numbers(outputs * inputs, 1));
            let layer = gpu::Linear::new(gpu, &w, bias.as_deref(), inputs).unwrap();
            let x = gpu.upload(&rounded::<bf16>(&numbers(most * inputs, 2))).unwrap();
            let of = |rows: std::ops::Range<usize>| {
                let x = x.view(rows.start * inputs..rows.end * inputs);
                let mut wide = gpu.zeros::<f32>(rows.len() * outputs).unwrap();
                layer.forward(gpu, x, wide.all_mut()).unwrap();
                layer.add_to(gpu, x, wide.all_mut()).unwrap();
                let mut narrow = gpu.zeros::<bf16>(rows.len() * outputs).unwrap();
                layer.forward(gpu, x, narrow.all_mut()).unwrap();
                (wide.to_vec().unwrap(), narrow.to_vec().unwrap())
            };
            let all = of(0..most);
            for part in [0..1, 1..3, 8..24, 6..70, 7..most] {
                let (wide, narrow) = of(part.clone());
                let part = part.start * outputs..part.end * outputs;
                assert_eq!(wide, all.0[part.clone()]);
                assert_eq!(narrow, all.1[part]);
            }
        }
    });
}
