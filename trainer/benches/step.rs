//! Time of a step of preference training: four pairs of 512 tokens that share the first half.
//!
//! `PLUMB_MODELS=folder cargo bench -p plumb-trainer`, where `folder/smollm2` is a language model in Hugging Face layout.

#![expect(clippy::unwrap_used, reason = "a benchmark may stop where it stands")]

use std::env;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use plumb_kernels::gradient::AdamW;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::{Head, RewardHead};
use plumb_model::decoder::gradient::{
    Group, Language, Numbers, Parameter, Parameters, Sequence, TrainOptions, Trainable,
};
use plumb_model::decoder::{DType, Device};

const PAIRS: usize = 4;
const SHARED: usize = 256;
const TOKENS: usize = 512;

fn group(sides: &[Vec<u32>]) -> Group<'_> {
    let sequence = |tokens| Sequence { tokens, reward: true, language: Language::Nothing };
    Group { sequences: sides.iter().map(|tokens| sequence(&tokens[..])).collect() }
}

fn step(c: &mut Criterion) {
    let Some(models) = env::var_os("PLUMB_MODELS") else {
        println!("PLUMB_MODELS is not set: skipped");
        return;
    };
    let model = Path::new(&models).join("smollm2").to_string_lossy().into_owned();
    let opened = Checkpoint::open(&Source { model, ..Source::default() });
    let Checkpoint { mut config, mut weights, .. } = opened.unwrap();
    let mut values = Parameters::new(&config, false).read(&mut weights).unwrap();
    config.head = Head::Reward(RewardHead { weight: "score.weight".into(), bias: None, normalization: None });
    values.resize(Parameters::new(&config, false).len(), 0.01);
    let id = |i: usize, seed: usize| (5 + (i * 7919 + seed * 104_729) % 40_000) as u32;
    let sides: Vec<Vec<u32>> = (0..2 * PAIRS)
        .map(|side| (0..TOKENS).map(|i| id(i, if i < SHARED { side / 2 } else { 100 + side })).collect())
        .collect();
    let shared: Vec<Group<'_>> = sides.chunks(2).map(group).collect();
    let apart: Vec<Group<'_>> = sides.chunks(1).map(group).collect();

    let pool = rayon::ThreadPoolBuilder::new().num_threads(num_cpus::get_physical()).build();
    let pool = pool.unwrap();
    let mut benches = c.benchmark_group("train");
    benches
        .sample_size(10)
        .measurement_time(Duration::from_secs(30))
        .throughput(Throughput::Elements((2 * PAIRS * TOKENS) as u64));
    for (name, groups, checkpointing) in
        [("shared", &shared, false), ("apart", &apart, false), ("shared, computed again", &shared, true)]
    {
        let options = TrainOptions { language_head: false, checkpointing };
        let model = Trainable::new(&config, &values, DType::Bf16, TOKENS, options, &Device::Cpu);
        let mut model = model.unwrap();
        let mut values = Numbers::new(values.clone(), &Device::Cpu).unwrap();
        let [mut gradient, mut mean, mut square] = [(); 3].map(|()| values.zeros().unwrap());
        let mut number = 0;
        benches.bench_function(name, |b| {
            b.iter(|| {
                pool.install(|| {
                    number += 1;
                    gradient.clear().unwrap();
                    model.gradient(groups, 0.25, &mut gradient).unwrap();
                    let how = |_: &Parameter| AdamW {
                        lr: 1e-5,
                        beta1: 0.9,
                        beta2: 0.95,
                        eps: 1e-8,
                        weight_decay: 0.0,
                        step: number,
                        scale: 1.0,
                    };
                    model.step(&mut values, &gradient, [&mut mean, &mut square], &how).unwrap();
                    model.outcomes().unwrap()
                })
            });
        });
        println!("{name}: {} MiB for the decoder, its tape and buffers", model.bytes() >> 20);
    }
    benches.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
