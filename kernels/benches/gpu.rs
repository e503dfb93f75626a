//! Speed of the kernels on a GPU beside what it can do at most: `cargo bench -p plumb-kernels --features cuda --bench gpu`.
//!
//! First the limits are measured: copies of memory and a large product of matrices. Then each kernel at the shapes of a
//! model of 8B parameters (Llama 3), with its share of the limit that binds it. With `--json`, a line of JSON each.

#![expect(clippy::unwrap_used, reason = "a benchmark that the GPU refuses ends")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use half::bf16;
use plumb_kernels::activation::Activation;
use plumb_kernels::attention::{PAGE, Rule, Run, Span};
use plumb_kernels::gpu::{self, Gpu, KvPages, Linear, Pieces, Prepare, Vocabulary};
use plumb_kernels::norm::Norm;
use plumb_kernels::rotary::Rotary;

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

/// What binds a kernel.
#[derive(Clone, Copy)]
enum Bound {
    /// Bytes that it must read and write.
    Bytes(usize),
    /// Multiplications and additions that it must do.
    Operations(f64),
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

    fn report(&self, name: &str, seconds: f64, bound: Bound) {
        let (rate, unit, limit) = match bound {
            Bound::Bytes(bytes) => (bytes as f64 / seconds / 1e9, "GB/s", self.limits[0] / 1e9),
            Bound::Operations(operations) => (operations / seconds / 1e12, "TFLOP/s", self.limits[1] / 1e12),
        };
        let micros = seconds * 1e6;
        match self.json {
            true => println!(
                r#"{{"name": "{name}", "us": {micros:.2}, "rate": {rate:.1}, "unit": "{unit}", "limit": {limit:.1}}}"#
            ),
            false => println!("{name:44} {micros:12.1} us {rate:10.1} {unit:8} {:6.1} %", 100.0 * rate / limit),
        }
    }

    fn measure(&self, name: &str, bound: Bound, work: impl FnMut()) {
        self.report(name, self.time(work), bound);
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
        self.report("limit: copy of 1 GiB", copy, Bound::Bytes(2 * bytes));
        self.report("limit: product of 8192 x 8192 x 8192", product, Bound::Operations(operations));
    }

    /// What reads and writes, and computes little.
    fn rows(&self) {
        let gpu = &self.gpu;
        let x = gpu.upload(&numbers_f32(ROWS * HIDDEN)).unwrap();
        let mut narrow = gpu.zeros::<bf16>(ROWS * HIDDEN).unwrap();
        let norm = gpu::Norm::new(gpu, &Norm::Rms { weight: vec![1.0; HIDDEN], eps: 1e-5 }).unwrap();
        self.measure("rms norm, 8192 x 4096", Bound::Bytes(ROWS * HIDDEN * 6), || {
            norm.forward(gpu, x.all(), None, narrow.all_mut()).unwrap();
        });
        let table = gpu.upload(&numbers(32_768 * HIDDEN)).unwrap();
        let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * 7919 % 32_768).collect();
        let ids = gpu.upload(&ids).unwrap();
        let mut embedded = gpu.zeros::<f32>(ROWS * HIDDEN).unwrap();
        self.measure("embedding, 8192 x 4096", Bound::Bytes(ROWS * HIDDEN * 6), || {
            gpu.embed(table.all(), ids.all(), 1.0, HIDDEN, embedded.all_mut()).unwrap();
        });
        let both = gpu.upload(&numbers(ROWS * 2 * INNER)).unwrap();
        let mut inner = gpu.zeros::<bf16>(ROWS * INNER).unwrap();
        self.measure("gated activation, 8192 x 14336", Bound::Bytes(ROWS * INNER * 6), || {
            gpu.activate(Activation::Silu, true, both.all(), INNER, inner.all_mut()).unwrap();
        });
        let weight = gpu.upload(&vec![1f32; HIDDEN]).unwrap();
        let mut rewards = gpu.zeros::<f32>(ROWS).unwrap();
        self.measure("reward head, 8192 x 4096", Bound::Bytes(ROWS * HIDDEN * 4), || {
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
            self.report(&name, seconds, Bound::Operations(operations));
            let bytes = ROWS * (heads + 2 * kv_heads) * dim * 4;
            self.report(
                &format!("rotary and cache, {ROWS} rows, {heads} heads of {dim}"),
                prepared,
                Bound::Bytes(bytes),
            );
        }
        for (streams, cached) in [(1, 1024), (1, 8192), (16, 2048), (64, 2048)] {
            let spans = vec![(cached, 1); streams];
            let (seconds, _) = self.attend(128, HEADS, KV_HEADS, &spans);
            let bytes = streams * cached * 2 * KV_HEADS * 128 * 2;
            self.report(&format!("attention, {streams} x 1 token behind {cached}"), seconds, Bound::Bytes(bytes));
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
        let mut kv = KvPages::<bf16>::new(gpu, 1, kv_heads, dim, next as usize).unwrap();
        let mut pieces = Pieces::new(gpu);
        pieces.set(&spans, &runs, heads / kv_heads, row).unwrap();
        let positions = sequences.iter().map(|(cached, len)| cached + len).max().unwrap_or(0);
        let frequencies: Vec<f32> = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let table = gpu.upload(Rotary::new(&frequencies, positions).table()).unwrap();
        let how = Prepare { heads, q_norm: None, k_norm: None, table: table.all(), rotated: dim };
        let qkv = gpu.upload(&numbers(row * (heads + 2 * kv_heads) * dim)).unwrap();
        let mut q = gpu.zeros::<bf16>(row * kv.q_width(heads)).unwrap();
        let prepared = self.time(|| gpu.prepare(qkv.all(), &pieces, 0, how, q.all_mut(), &mut kv, 0).unwrap());
        let rule = Rule { heads, head_dim: dim, scale: 1.0 / (dim as f32).sqrt(), softcap: None, window: None };
        let mut out = gpu.zeros::<bf16>(row * heads * dim).unwrap();
        let attended = self.time(|| gpu.attention(q.all(), &kv, 0, &pieces, rule, out.all_mut()).unwrap());
        (attended, prepared)
    }

    /// Products of a layer for many rows and for few, and a vocabulary.
    fn products(&self) {
        let gpu = &self.gpu;
        for rows in [1, 16, 256, ROWS] {
            for (name, inputs, outputs) in [("up and gate", HIDDEN, 2 * INNER), ("down", INNER, HIDDEN)] {
                let layer = Linear::new(gpu, &numbers(inputs * outputs), None, inputs).unwrap();
                let x = gpu.upload(&numbers(rows * inputs)).unwrap();
                let mut y = gpu.zeros::<bf16>(rows * outputs).unwrap();
                let bound = match rows {
                    0..=16 => Bound::Bytes(inputs * outputs * 2),
                    _ => Bound::Operations(2.0 * (rows * inputs * outputs) as f64),
                };
                self.measure(&format!("{name}, {rows} rows"), bound, || {
                    layer.forward(gpu, x.all(), y.all_mut()).unwrap()
                });
            }
        }
        let head = Linear::new(gpu, &numbers(VOCABULARY * HIDDEN), None, HIDDEN).unwrap();
        let x = gpu.upload(&numbers(1024 * HIDDEN)).unwrap();
        let targets: Vec<u32> = (0..1024).map(|i| i * 97 % VOCABULARY as u32).collect();
        let mut sweep = Vocabulary::new(gpu);
        let operations = Bound::Operations(2.0 * (1024 * HIDDEN * VOCABULARY) as f64);
        self.measure("log-probabilities of 1024 rows, 128256 tokens", operations, || {
            sweep.token_log_probs(&head, None, &x, &targets).unwrap();
        });
    }
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
    ExitCode::SUCCESS
}
