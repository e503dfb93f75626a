//! Speed of the kernels on a GPU beside what it can do at most: `cargo bench -p plumb-kernels --features cuda --bench gpu`.
//!
//! First the limits are measured: copies of memory and a large product of matrices. Then each kernel at the shapes of a
//! model of 8B parameters (Llama 3): what it takes at these limits, in percent of what it takes. What only reads may pass
//! the rate of a copy by a little. With `--json`, a line of JSON each.

#![expect(clippy::unwrap_used, reason = "a benchmark that the GPU refuses ends")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use plumb_kernels::activation::Activation;
use plumb_kernels::attention::{PAGE, Rule, Run, Span};
use plumb_kernels::fp8::Fp8Rows;
use plumb_kernels::gpu::{self, CutRule, Gpu, KvPages, Linear, Partials, Pieces, Prepare, Room, Sampler, Vocabulary};
use plumb_kernels::linear::{Matrix, Rows};
use plumb_kernels::norm::Norm;
use plumb_kernels::quantised::{Described, QuantRows, Scales};
use plumb_kernels::rotary::Rotary;
use plumb_kernels::sample::Draw;

const HIDDEN: usize = 4096;
const INNER: usize = 14_336;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const VOCABULARY: usize = 128_256;
/// Rows of a large step.
const ROWS: usize = 8192;
/// Each measurement takes at least so long, and is made so many times, of which the median counts.
const LEAST: Duration = Duration::from_millis(30);
const TIMES: usize = 5;

/// What a kernel must do at least.
#[derive(Clone, Copy)]
struct Work {
    /// Bytes that are read and written.
    bytes: usize,
    /// Multiplications and additions.
    operations: f64,
}

impl Work {
    fn bytes(bytes: usize) -> Self {
        Self { bytes, operations: 0.0 }
    }
}

struct Bench {
    gpu: Gpu,
    json: bool,
    /// Bytes and operations a second, as measured.
    limits: [f64; 2],
}

impl Bench {
    /// Seconds that one call takes, as one of many without a pause between them.
    fn time(&self, mut work: impl FnMut()) -> f64 {
        let mut run = |calls: usize| {
            let started = Instant::now();
            (0..calls).for_each(|_| work());
            self.gpu.synchronize().unwrap();
            started.elapsed()
        };
        run(2);
        let mut calls = 1;
        while run(calls) < LEAST {
            calls *= 2;
        }
        let mut times: Vec<f64> = (0..TIMES).map(|_| run(calls).as_secs_f64() / calls as f64).collect();
        times.sort_by(f64::total_cmp);
        times[TIMES / 2]
    }

    /// The rate is that of what takes longest at the limits, and so is the share.
    fn report(&self, name: &str, seconds: f64, work: Work) {
        let [copy, product] = [work.bytes as f64 / self.limits[0], work.operations / self.limits[1]];
        let (rate, unit) = match work.operations > 0.0 && (product >= copy || copy.is_nan()) {
            true => (work.operations / seconds / 1e12, "TFLOP/s"),
            false => (work.bytes as f64 / seconds / 1e9, "GB/s"),
        };
        let (micros, percent) = (seconds * 1e6, 100.0 * copy.max(product) / seconds);
        match self.json {
            true => println!(
                r#"{{"name": "{name}", "us": {micros:.2}, "rate": {rate:.1}, "unit": "{unit}", "percent": {percent:.1}}}"#
            ),
            false => println!("{name:52} {micros:12.1} us {rate:10.1} {unit:8} {percent:6.1} %"),
        }
    }

    fn measure(&self, name: &str, work: Work, call: impl FnMut()) {
        self.report(name, self.time(call), work);
    }

    /// Copies of a GiB, and a product of square matrices.
    fn limits(&mut self) {
        let bytes = 1usize << 30;
        let from = self.gpu.zeros::<u8>(bytes).unwrap();
        let mut to = self.gpu.zeros::<u8>(bytes).unwrap();
        let copy = self.time(|| self.gpu.copy(from.all(), to.all_mut()).unwrap());
        let side = 8192;
        let layer = Linear::new(&self.gpu, &numbers(side * side), None, side).unwrap();
        let x = self.gpu.upload(&numbers(side * side)).unwrap();
        let mut y = self.gpu.zeros::<bf16>(side * side).unwrap();
        let product = self.time(|| layer.forward(&self.gpu, x.all(), y.all_mut()).unwrap());
        let operations = 2.0 * (side as f64).powi(3);
        self.limits = [2.0 * bytes as f64 / copy, operations / product];
        self.report("limit: copy of 1 GiB", copy, Work::bytes(2 * bytes));
        self.report("limit: product of 8192 x 8192 x 8192", product, Work { bytes: 0, operations });
    }

    /// What reads and writes, and computes little.
    fn rows(&self) {
        let gpu = &self.gpu;
        let x = gpu.upload(&numbers_f32(ROWS * HIDDEN)).unwrap();
        let mut narrow = gpu.zeros::<bf16>(ROWS * HIDDEN).unwrap();
        let norm = gpu::Norm::new(gpu, &Norm::Rms { weight: vec![1.0; HIDDEN], eps: 1e-5 }).unwrap();
        self.measure("rms norm, 8192 x 4096", Work::bytes(ROWS * HIDDEN * 6), || {
            norm.forward(gpu, x.all(), None, narrow.all_mut()).unwrap();
        });
        let table = gpu.upload(&numbers(32_768 * HIDDEN)).unwrap();
        let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * 7919 % 32_768).collect();
        let ids = gpu.upload(&ids).unwrap();
        let mut embedded = gpu.zeros::<f32>(ROWS * HIDDEN).unwrap();
        self.measure("embedding, 8192 x 4096", Work::bytes(ROWS * HIDDEN * 6), || {
            gpu.embed(table.all(), ids.all(), 1.0, HIDDEN, embedded.all_mut()).unwrap();
        });
        let both = gpu.upload(&numbers(ROWS * 2 * INNER)).unwrap();
        let mut inner = gpu.zeros::<bf16>(ROWS * INNER).unwrap();
        self.measure("gated activation, 8192 x 14336", Work::bytes(ROWS * INNER * 6), || {
            gpu.activate(Activation::Silu, true, both.all(), INNER, inner.all_mut()).unwrap();
        });
        let weight = gpu.upload(&vec![1f32; HIDDEN]).unwrap();
        let mut rewards = gpu.zeros::<f32>(ROWS).unwrap();
        self.measure("reward head, 8192 x 4096", Work::bytes(ROWS * HIDDEN * 4), || {
            gpu.rewards(x.all(), weight.all(), 0.0, rewards.all_mut()).unwrap();
        });
    }

    /// Prefill of whole sequences, and decoding behind a long cache.
    fn attention(&self) {
        for (dim, heads, kv_heads, len) in
            [(64, 32, 8, 1024), (64, 32, 8, 4096), (128, HEADS, KV_HEADS, 1024), (128, HEADS, KV_HEADS, 4096)]
        {
            let count = ROWS / len;
            let spans: Vec<(usize, usize)> = vec![(0, len); count];
            let (seconds, prepared) = self.attend(dim, heads, kv_heads, &spans);
            // Half of the products of q and k, and of the weights and v.
            let operations = count as f64 * 2.0 * (len as f64).powi(2) * (dim * heads) as f64;
            let name = format!("attention, {count} x {len} tokens, {heads} heads of {dim}");
            let bytes = ROWS * 2 * (heads + kv_heads) * dim * 2;
            self.report(&name, seconds, Work { bytes, operations });
            let bytes = ROWS * (heads + 2 * kv_heads) * dim * 4;
            self.report(
                &format!("rotary and cache, {ROWS} rows, {heads} heads of {dim}"),
                prepared,
                Work::bytes(bytes),
            );
        }
        for (streams, cached) in [(1, 1024), (1, 8192), (16, 2048), (64, 2048)] {
            let spans = vec![(cached, 1); streams];
            let (seconds, _) = self.attend(128, HEADS, KV_HEADS, &spans);
            let bytes = streams * cached * 2 * KV_HEADS * 128 * 2;
            self.report(&format!("attention, {streams} x 1 token behind {cached}"), seconds, Work::bytes(bytes));
        }
    }

    /// Products with weights that are no bf16. The limit of e4m3 is that of bf16, which it passes.
    fn narrow_products(&self) {
        let gpu = &self.gpu;
        let (inputs, outputs) = (HIDDEN, 2 * INNER);
        let (count, room) = (inputs * outputs, Room::new(gpu));
        let scales = |len: usize, integers| Scales {
            factors: vec![f16::from_f32(0.01); len],
            integers: vec![3; if integers { count / 32 } else { 0 }],
        };
        let q8 = Described { group: 32, block: 1, least: -128, bits: 8, offsets: false };
        let q4 = Described { group: 32, block: 8, least: 0, bits: 4, offsets: true };
        let codes = |modulus: usize| (0..count).map(|i| (i * 31 % modulus) as i8).collect();
        let q8 = QuantRows {
            inputs,
            described: q8,
            codes: codes(128),
            scales: scales(count / 32, false),
            offsets: Scales::default(),
        };
        let q4 = QuantRows {
            inputs,
            described: q4,
            codes: codes(16),
            scales: scales(count / 256, true),
            offsets: scales(count / 256, true),
        };
        let fp8 = Fp8Rows::quantise(&numbers(count), inputs);
        let kinds = [("Q8_0", Rows::Quantised(&q8)), ("Q4_K", Rows::Quantised(&q4)), ("fp8", Rows::Fp8(&fp8))];
        for (kind, weights) in kinds {
            let part = Matrix { weights, bias: None };
            let layer = || Linear::<bf16>::stacked(gpu, &[part], inputs, &room);
            let first = match layer() {
                Ok(layer) => layer,
                Err(error) => {
                    eprintln!("skipped: {error}");
                    continue;
                }
            };
            let held = first.bytes();
            let layers: Vec<_> = (1..copies(held)).map(|_| layer().unwrap()).chain([first]).collect();
            let mut layers = layers.iter().cycle();
            for rows in [1, 8, 16, 32, 64, 256, ROWS] {
                let x = gpu.upload(&numbers(rows * inputs)).unwrap();
                let mut y = gpu.zeros::<bf16>(rows * outputs).unwrap();
                let bytes = held + 2 * rows * (inputs + outputs);
                let work = Work { bytes, operations: 2.0 * (rows * count) as f64 };
                self.measure(&format!("up and gate in {kind}, {rows} rows"), work, || {
                    layers.next().unwrap().forward(gpu, x.all(), y.all_mut()).unwrap();
                });
            }
        }
    }

    /// Seconds of attention and of what makes it ready, for sequences of so many tokens behind so many.
    fn attend(&self, dim: usize, heads: usize, kv_heads: usize, sequences: &[(usize, usize)]) -> (f64, f64) {
        let gpu = &self.gpu;
        let (mut tables, mut next): (Vec<Vec<u32>>, u32) = (Vec::new(), 0);
        for (cached, len) in sequences {
            let pages = (cached + len).div_ceil(PAGE) as u32;
            tables.push((next..next + pages).collect());
            next += pages;
        }
        let (mut spans, mut runs, mut row) = (Vec::new(), Vec::new(), 0);
        for ((position, len), pages) in sequences.iter().copied().zip(&tables) {
            spans.push(Span { row, len, position, pages });
            let mut at = position;
            while at < position + len {
                let len = (PAGE - at % PAGE).min(position + len - at);
                runs.push(Run { row, len, position: at, page: pages[at / PAGE] });
                (row, at) = (row + len, at + len);
            }
        }
        let layers = copies(KvPages::<bf16>::page_bytes(1, kv_heads, dim) * next as usize);
        let mut kv = KvPages::<bf16>::new(gpu, layers, kv_heads, dim, next as usize).unwrap();
        let mut pieces = Pieces::new(gpu);
        let rule = CutRule { heads, kv_heads, head_dim: dim, invariant: false, partial_bytes: gpu::PARTIAL_BYTES };
        pieces.set::<bf16>(&spans, &runs, rule, row).unwrap();
        let mut partials = Partials::new(gpu);
        let positions = sequences.iter().map(|(cached, len)| cached + len).max().unwrap_or(0);
        let frequencies: Vec<f32> = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let table = gpu.upload(Rotary::new(&frequencies, positions).table()).unwrap();
        let how = Prepare { heads, q_norm: None, k_norm: None, table: table.all(), rotated: dim };
        let qkv = gpu.upload(&numbers(row * (heads + 2 * kv_heads) * dim)).unwrap();
        let mut q = gpu.zeros::<bf16>(row * kv.q_width(heads)).unwrap();
        let prepared = self.time(|| gpu.prepare(qkv.all(), &pieces, 0, how, q.all_mut(), &mut kv, 0).unwrap());
        let rule = Rule { heads, head_dim: dim, scale: 1.0 / (dim as f32).sqrt(), softcap: None, window: None };
        let mut out = gpu.zeros::<bf16>(row * heads * dim).unwrap();
        let mut layer = (0..layers).cycle();
        let attended = self.time(|| {
            gpu.attention(q.all(), &kv, layer.next().unwrap(), &pieces, rule, &mut partials, out.all_mut(), None)
                .unwrap();
        });
        (attended, prepared)
    }

    /// Products of a layer for many rows and for few, and a vocabulary.
    fn products(&self) {
        let gpu = &self.gpu;
        for rows in [1, 16, 256, ROWS] {
            for (name, inputs, outputs) in [("up and gate", HIDDEN, 2 * INNER), ("down", INNER, HIDDEN)] {
                let weights = numbers(inputs * outputs);
                let count = copies(2 * weights.len());
                let layers: Vec<_> = (0..count).map(|_| Linear::new(gpu, &weights, None, inputs).unwrap()).collect();
                let mut layers = layers.iter().cycle();
                let x = gpu.upload(&numbers(rows * inputs)).unwrap();
                let mut y = gpu.zeros::<bf16>(rows * outputs).unwrap();
                let bytes = 2 * (inputs * outputs + rows * (inputs + outputs));
                let work = Work { bytes, operations: 2.0 * (rows * inputs * outputs) as f64 };
                self.measure(&format!("{name}, {rows} rows"), work, || {
                    layers.next().unwrap().forward(gpu, x.all(), y.all_mut()).unwrap();
                });
            }
        }
        let head = Linear::new(gpu, &numbers(VOCABULARY * HIDDEN), None, HIDDEN).unwrap();
        let x = gpu.upload(&numbers(1024 * HIDDEN)).unwrap();
        let targets: Vec<u32> = (0..1024).map(|i| i * 97 % VOCABULARY as u32).collect();
        let mut sweep = Vocabulary::new(gpu);
        let work = Work { bytes: 2 * HIDDEN * VOCABULARY, operations: 2.0 * (1024 * HIDDEN * VOCABULARY) as f64 };
        self.measure("log-probabilities of 1024 rows, 128256 tokens", work, || {
            sweep.token_log_probs(&head, None, &x, &targets).unwrap().wait().unwrap();
        });
    }

    /// A token for each stream, the copies of what is asked and answered included.
    fn draws(&self) {
        for streams in [1, 64] {
            let logits: Vec<f32> = numbers_f32(streams * VOCABULARY).into_iter().map(|logit| 8.0 * logit).collect();
            let logits = self.gpu.upload(&logits).unwrap();
            let mut sampler = Sampler::new(&self.gpu);
            let filtered = Draw { top_k: 50, top_p: 0.9, ..Draw::default() };
            for (name, how) in [("all kept", Draw::default()), ("top-k 50, top-p 0.9", filtered)] {
                let draws: Vec<_> = (0..streams).map(|row| Draw { row, seed: row as u64, ..how }).collect();
                let work = Work::bytes(streams * VOCABULARY * size_of::<f32>());
                self.measure(&format!("draw, {streams} x {VOCABULARY} tokens, {name}"), work, || {
                    sampler.draw(logits.all(), VOCABULARY, &draws).unwrap();
                });
            }
        }
    }
}

/// Copies of so many bytes of weights or cache that together are more than any cache of a GPU holds: in a model other
/// layers' come between.
fn copies(bytes: usize) -> usize {
    (512usize << 20).div_ceil(bytes).min(64)
}

fn numbers_f32(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 1013) as f32 / 506.0 - 1.0).collect()
}

fn numbers(count: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32((i * 7919 % 1013) as f32 / 506.0 - 1.0)).collect()
}

fn main() -> ExitCode {
    let gpu = match Gpu::cuda(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("skipped: {error}");
            return ExitCode::from(u8::from(std::env::var_os("PLUMB_REQUIRE_GPU").is_some()));
        }
    };
    let json = std::env::args().any(|argument| argument == "--json");
    if !json {
        println!("{}: share of the limit, which is the copy's or the product's rate", gpu.name());
    }
    let mut bench = Bench { gpu, json, limits: [f64::NAN; 2] };
    bench.limits();
    bench.rows();
    bench.attention();
    bench.products();
    bench.draws();
    bench.narrow_products();
    ExitCode::SUCCESS
}
