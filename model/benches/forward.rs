//! Speed of the bare forward pass, no server around it: `PLUMB_MODELS=FOLDER cargo bench -p plumb-model`, where the
//! folder holds the checkpoints `pm` (a preference model) and `smollm2` (a language model).
//!
//! Throughput in elements per second is tokens per second, those of all streams together.

#![expect(clippy::unwrap_used, reason = "a benchmark may stop where it stands")]

use std::path::Path;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::Source;
use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel, ModelKind};

/// A model, and sequences that each have pages of their own.
struct Bench {
    model: LoadedModel,
    kv: KvStore,
    workspace: Workspace,
}

/// Slices of so many sequences of the same shape.
#[derive(Clone, Copy)]
struct Shape {
    sequences: usize,
    tokens: usize,
    /// Tokens before the slice; those that all sequences have in common come first.
    position: usize,
    common: usize,
}

impl Bench {
    fn load(path: &Path) -> Self {
        let source = Source { model: path.to_str().unwrap().to_owned(), ..Source::default() };
        let options = LoadOptions {
            dtype: DTypeChoice::Auto,
            hhh: Arc::default(),
            max_input_tokens: None,
            kv_cache_bytes: 1 << 30,
            device: Default::default(),
            background: Default::default(),
        };
        let model = LoadedModel::load(&source, &options).unwrap();
        Self { kv: model.decoder.kv_store(model.kv_pages).unwrap(), workspace: model.decoder.workspace(), model }
    }

    fn step(&mut self, shape: Shape) {
        let Shape { sequences, tokens, position, common } = shape;
        let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % self.model.info.vocab_size) as u32).collect();
        let common = (common / PAGE) as u32;
        let own = (position + tokens).div_ceil(PAGE) as u32 - common;
        let table = |s: u32| (0..common).chain(common + s * own..common + (s + 1) * own).collect();
        let pages: Vec<Vec<u32>> = (0..sequences as u32).map(table).collect();
        let language = self.model.info.kind == ModelKind::Language;
        let read = || if language { Read::Draw } else { Read::LastReward };
        let sequence = |pages| StepSequence { tokens: &ids, position, pages, read: read() };
        let step = Step { sequences: pages.iter().map(|pages| sequence(pages)).collect() };
        self.model.decoder.step(&step, &mut self.kv, &mut self.workspace).unwrap();
    }
}

fn forward(c: &mut Criterion) {
    let Some(folder) = std::env::var_os("PLUMB_MODELS") else {
        eprintln!("skipped: PLUMB_MODELS names no folder with real models");
        return;
    };
    let mut group = c.benchmark_group("forward");
    for (model, shapes) in [
        (
            "pm",
            &[
                ("300 tokens", Shape { sequences: 1, tokens: 300, position: 0, common: 0 }),
                ("16 x 256 tokens", Shape { sequences: 16, tokens: 256, position: 0, common: 0 }),
            ][..],
        ),
        (
            "smollm2",
            &[
                ("decode 1 after 64", Shape { sequences: 1, tokens: 1, position: 64, common: 0 }),
                ("decode 16 after 64", Shape { sequences: 16, tokens: 1, position: 64, common: 0 }),
                ("decode 1 after 6000", Shape { sequences: 1, tokens: 1, position: 6000, common: 0 }),
                ("decode 16 after 6000 in common", Shape { sequences: 16, tokens: 1, position: 6010, common: 6000 }),
            ],
        ),
    ] {
        let mut bench = Bench::load(&Path::new(&folder).join(model));
        for &(name, shape) in shapes {
            if shape.position > 0 {
                // What lies before is really there: memory that nobody has written reads faster than any other.
                let sequences = if shape.common > 0 { 1 } else { shape.sequences };
                bench.step(Shape { sequences, tokens: shape.position, position: 0, common: 0 });
            }
            group.throughput(Throughput::Elements((shape.sequences * shape.tokens) as u64));
            group.bench_function(name, |b| b.iter(|| bench.step(shape)));
        }
    }
}

criterion_group!(benches, forward);
criterion_main!(benches);
