//! Speed of the kernels at the shapes of a 135M-parameter model: `cargo bench -p plumb-kernels`.
//!
//! The linear layers' throughput in elements per second is multiply-adds; twice that is FLOP/s.

#![expect(clippy::unwrap_used, reason = "a benchmark without memory ends")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use plumb_kernels::Element;
use plumb_kernels::activation::Activation;
use plumb_kernels::attention::{KvPages, PAGE, Prepare, Rule, Run, Span, Work, attention, padded, prepare};
use plumb_kernels::head::{dot, token_log_probs};
use plumb_kernels::linear::{Activated, Linear, Matrix, Rows, Store};
use plumb_kernels::memory::Buffer;
use plumb_kernels::norm::Norm;
use plumb_kernels::quantised::{Described, QuantRows, Scales};
use plumb_kernels::rotary::Rotary;
use rayon::prelude::*;

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;

fn values<E: Element>(n: usize) -> Vec<E> {
    (0..n).map(|i| E::from_f32((i * 7919 % 1013) as f32 / 5060.0 - 0.1)).collect()
}

fn layer<E: Element>(outputs: usize, inputs: usize) -> Linear<E> {
    Linear::new(&[Matrix { weights: Rows::Plain(&values(outputs * inputs)), bias: None }], inputs).unwrap()
}

/// What the machine can do at most, on all threads: the matrix kernel over operands that stay in the caches of a core, and
/// sequential reads of memory.
fn limits(c: &mut Criterion) {
    let threads = rayon::current_num_threads();
    let mut group = c.benchmark_group("limits");
    let (outputs, inputs, rows, times) = (64, 1024, 96, 100);
    let layer = layer::<bf16>(outputs, inputs);
    let x = values::<bf16>(rows * inputs);
    group.throughput(Throughput::Elements((threads * times * rows * outputs * inputs) as u64));
    group.bench_function("bf16 matrix loop", |b| {
        b.iter(|| {
            rayon::broadcast(|_| {
                let mut out = vec![0.0; rows * outputs];
                (0..times).for_each(|_| layer.forward(black_box(&x), black_box(&mut out), Store::Set));
            })
        });
    });
    // Far more than any cache holds; written, since zeros that nobody has written all lie in the same page.
    let mut words = Buffer::<u64>::zeros(1 << 26).unwrap();
    words.fill(1);
    group.throughput(Throughput::Bytes(size_of_val(&*words) as u64));
    group.bench_function("reads", |b| {
        b.iter(|| words.par_chunks(words.len() / threads).map(read).reduce(|| 0, |a, b| a ^ b));
    });
}

/// Reads memory as fast as one thread can: wide vectors, fetched ahead.
fn read(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn wide(words: &[u64]) -> u64 {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let mut sums = [0u64; 32];
        for chunk in words.chunks_exact(32) {
            for line in chunk.chunks_exact(8) {
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(1024).cast());
            }
            sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum ^= word);
        }
        sums.iter().fold(0, |a, b| a ^ b)
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        #[expect(unsafe_code, reason = "wide vectors that were detected")]
        return unsafe { wide(words) };
    }
    words.iter().fold(0, |a, b| a ^ b)
}

fn linear<E: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("linear/{}", E::NAME));
    for (outputs, inputs) in [(HIDDEN, HIDDEN), ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, INNER)] {
        let layer = layer::<E>(outputs, inputs);
        for rows in [1, 16, 512, 4096] {
            let x = values::<E>(rows * inputs);
            let mut out = vec![0.0; rows * outputs];
            group.throughput(Throughput::Elements((rows * outputs * inputs) as u64));
            group.bench_function(BenchmarkId::new(format!("{outputs}x{inputs}"), rows), |b| {
                b.iter(|| layer.forward(black_box(&x), &mut out, Store::Set));
            });
        }
    }
}

/// As Q4_1 and Q8_0: codes of four bits with an offset, of eight without.
fn quantised(c: &mut Criterion) {
    let mut group = c.benchmark_group("quantised/bf16");
    let (outputs, inputs) = (INNER, HIDDEN);
    for (name, bits, offsets) in [("4 bits", 4, true), ("8 bits", 8, false)] {
        let described = Described { group: 32, block: 1, least: if bits == 8 { i8::MIN } else { 0 }, bits, offsets };
        let numbers =
            |x, len| Scales { factors: vec![f16::from_f32(x); len * outputs * inputs / 32], integers: Vec::new() };
        let rows = QuantRows {
            inputs,
            described,
            codes: (0..outputs * inputs).map(|i| (i * 31 % (1 << bits)) as u8 as i8).collect(),
            scales: numbers(1.0 / 512.0, 1),
            offsets: numbers(-1.0 / 64.0, usize::from(offsets)),
        };
        let layer = Linear::<bf16>::new(&[Matrix { weights: Rows::Quantised(&rows), bias: None }], inputs).unwrap();
        for rows in [1, 16, 512] {
            let x = values::<bf16>(rows * inputs);
            let mut out = vec![0.0; rows * outputs];
            group.throughput(Throughput::Elements((rows * outputs * inputs) as u64));
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| layer.forward(black_box(&x), &mut out, Store::Set));
            });
        }
    }
}

fn gated(c: &mut Criterion) {
    let weights = values::<bf16>(INNER * HIDDEN);
    let part = Matrix { weights: Rows::Plain(&weights), bias: None };
    let layer = Activated::new(Activation::Silu, part, HIDDEN, Some(part)).unwrap();
    let mut group = c.benchmark_group("gated/bf16");
    for rows in [1, 16, 512, 4096] {
        let x = values::<bf16>(rows * HIDDEN);
        let mut out = vec![bf16::default(); rows * INNER];
        group.throughput(Throughput::Elements((rows * 2 * INNER * HIDDEN) as u64));
        group.bench_function(rows.to_string(), |b| b.iter(|| layer.forward(black_box(&x), &mut out, None)));
    }
}

fn heads(c: &mut Criterion) {
    let head = layer::<bf16>(49_152, HIDDEN);
    let mut group = c.benchmark_group("token_log_probs/bf16");
    for rows in [1, 64] {
        let x = values::<f32>(rows * HIDDEN);
        let targets: Vec<u32> = (0..rows as u32).collect();
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(rows.to_string(), |b| b.iter(|| token_log_probs(&head, None, black_box(&x), &targets)));
    }
}

fn attend<E: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("attention/{}", E::NAME));
    for (tokens, before) in [(256, 0), (2048, 0), (1, 6000)] {
        let total: usize = tokens + before;
        let pages: Vec<u32> = (0..total.div_ceil(PAGE) as u32).collect();
        let mut kv = KvPages::<E>::new(1, KV_HEADS, HEAD_DIM, pages.len()).unwrap();
        let rotary = Rotary::new(&[0.1; HEAD_DIM / 2], total);
        let how = Prepare { heads: HEADS, head_dim: HEAD_DIM, q_norm: None, k_norm: None, rotary: &rotary };
        let width = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
        let runs: Vec<Run> = (0..total)
            .step_by(PAGE)
            .map(|row| Run { row, len: PAGE.min(total - row), position: row, page: (row / PAGE) as u32 })
            .collect();
        let mut q = vec![E::default(); total * HEADS * padded(HEAD_DIM)];
        let qkv = values(total * width);
        prepare(&qkv, 0, &runs, how, &mut q, &mut kv, 0);
        if before == 0 {
            group.throughput(Throughput::Elements(tokens as u64));
            group.bench_function(format!("rotary and cache write of {tokens}"), |b| {
                b.iter(|| prepare(black_box(&qkv), 0, &runs, how, &mut q, &mut kv, 0));
            });
        }
        let rule = Rule { heads: HEADS, head_dim: HEAD_DIM, scale: 0.125, softcap: None, window: None };
        let q = &q[before * HEADS * padded(HEAD_DIM)..];
        let mut out = vec![E::default(); tokens * HEADS * HEAD_DIM];
        let span = Span { row: 0, len: tokens, position: before, pages: &pages };
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(format!("{tokens} after {before}"), |b| {
            let work = Work::new(&[span], HEADS / KV_HEADS, KV_HEADS);
            b.iter(|| attention(black_box(q), &kv, 0, &work, rule, &mut out));
        });
    }
}

fn rows(c: &mut Criterion) {
    let x = values::<f32>(512 * HIDDEN);
    let mut normed = vec![bf16::default(); x.len()];
    let norm = Norm::Rms { weight: vec![1.0; HIDDEN], eps: 1e-5 };
    let mut group = c.benchmark_group("rows/bf16");
    group.throughput(Throughput::Elements(512));
    group.bench_function("rms_norm", |b| b.iter(|| norm.forward(black_box(&x), &mut normed)));
    let head = values::<f32>(HIDDEN);
    group.bench_function("reward head", |b| {
        b.iter(|| x.chunks_exact(HIDDEN).map(|x| dot(&head, black_box(x))).sum::<f32>());
    });
}

criterion_group!(benches, limits, linear::<bf16>, linear::<f32>, quantised, gated, heads, attend::<bf16>, rows);
criterion_main!(benches);
