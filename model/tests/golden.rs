//! Every architecture and head against Transformers' f32 values, through the real loader.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::collections::VecDeque;

use common::{devices, fixtures};
use plumb_kernels::sample;
use plumb_model::Error;
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::Head;
use plumb_model::decoder::{DType, Decoder, Device, Draw, Read, Step, StepSequence, TokenSet, Workspace};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    token_ids: Vec<u32>,
    reward: Option<f32>,
    normalized_reward: Option<f32>,
    token_rewards: Option<Vec<f32>>,
    token_log_probs: Option<Vec<f32>>,
    last_logits: Option<Vec<f32>>,
    greedy: Option<Vec<u32>>,
}

struct Model {
    decoder: Decoder,
    normalization: Option<(f32, f32)>,
}

/// So many CPUs, and as many emulated GPUs; and as many GPUs, or one in a group of its own where there are fewer.
#[cfg_attr(not(feature = "gpu"), expect(unused_mut, reason = "there is only one kind"))]
fn groups(size: usize) -> Vec<Device> {
    let mut groups = vec![Device::split(vec![Device::Cpu; size]).unwrap()];
    #[cfg(feature = "emulated")]
    {
        let gpus = (0..size).map(|_| Device::Gpu(plumb_kernels::gpu::Gpu::emulated()));
        groups.push(Device::split(gpus.collect()).unwrap());
    }
    #[cfg(feature = "cuda")]
    {
        let mut gpus: Vec<_> = (0..size).map_while(|number| plumb_kernels::gpu::Gpu::cuda(number).ok()).collect();
        gpus.truncate(if gpus.len() < size { 1 } else { size });
        match plumb_kernels::gpu::Group::new(&gpus) {
            Ok(_) => groups.push(Device::split(gpus.into_iter().map(Device::Gpu).collect()).unwrap()),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
    groups
}

fn load(model: &str, adapter: Option<&str>, dtype: DType, device: &Device) -> Model {
    let path = |name: &str| fixtures().join(name).to_string_lossy().into_owned();
    let source = Source { model: path(model), adapter: adapter.map(path), revision: None };
    let mut checkpoint = Checkpoint::open(&source).unwrap();
    let decoder = Decoder::build(&checkpoint.config, &mut checkpoint.weights, dtype, 512, device).unwrap();
    checkpoint.weights.finish().unwrap();
    let normalization = match checkpoint.config.head {
        Head::Reward(head) => head.normalization,
        Head::Language => None,
    };
    Model { decoder, normalization }
}

/// Runs sequences in one step, after their first `split` tokens ran in a step of their own.
fn run(model: &Model, sequences: &[(&[u32], usize, Read<'_>)]) -> Vec<Vec<f32>> {
    let mut kv = model.decoder.kv_store(256).unwrap();
    let mut workspace = model.decoder.workspace();
    let mut next = 0u32;
    let tables: Vec<Vec<u32>> = sequences
        .iter()
        .map(|(tokens, ..)| {
            let pages = tokens.len().div_ceil(PAGE) as u32;
            next += pages;
            (next - pages..next).rev().collect()
        })
        .collect();
    let mut first = Step::default();
    let mut second = Step::default();
    for ((tokens, split, read), pages) in sequences.iter().zip(&tables) {
        if *split > 0 {
            let tokens = &tokens[..*split];
            first.sequences.push(StepSequence { tokens, position: 0, pages, read: Read::Nothing });
        }
        second.sequences.push(StepSequence { tokens: &tokens[*split..], position: *split, pages, read: read.clone() });
    }
    model.decoder.step(&first, &mut kv, &mut workspace).unwrap();
    model.decoder.step(&second, &mut kv, &mut workspace).unwrap()
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn check(model: &str, adapter: Option<&str>, expected: &str, dtype: DType, tolerance: f32) {
    devices().iter().for_each(|device| check_on(device, model, adapter, expected, dtype, tolerance));
}

fn check_on(device: &Device, model: &str, adapter: Option<&str>, expected: &str, dtype: DType, tolerance: f32) {
    // A GPU rounds to bf16 between any two operations, as Transformers does where it computes in bf16.
    let tolerance = tolerance * if device.is_cpu() || dtype == DType::F32 { 1.0 } else { 1.5 };
    let text = std::fs::read_to_string(fixtures().join(expected)).unwrap();
    let expected: Expected = serde_json::from_str(&text).unwrap();
    let loaded = load(model, adapter, dtype, device);
    let mut largest = 0.0f32;
    for case in &expected.cases {
        let ids = case.token_ids.as_slice();
        if let Some(rewards) = &case.token_rewards {
            let (mean, std) = loaded.normalization.unwrap_or((0.0, 1.0));
            let rewards: Vec<f32> = rewards.iter().map(|r| (r - mean) / std).collect();
            largest = largest.max(worst(&run(&loaded, &[(ids, 0, Read::Rewards)])[0], &rewards));
            let last = run(&loaded, &[(ids, 0, Read::LastReward)]);
            let reward = case.normalized_reward.or(case.reward).unwrap();
            largest = largest.max(worst(&last[0], &[reward]));
        }
        if let Some(log_probs) = &case.token_log_probs {
            let read = || Read::LogProbs { rows: 0..ids.len() - 1, targets: &ids[1..] };
            if ids.len() > 1 {
                largest = largest.max(worst(&run(&loaded, &[(ids, 0, read())])[0], log_probs));
            }
            let logits = run(&loaded, &[(ids, 0, Read::LastLogits)]);
            let expected = case.last_logits.as_ref().unwrap();
            largest = largest.max(worst(&logits[0], expected));
            let count = 5;
            let split = ids.len() / 2;
            let read = Read::TopLogProbs { rows: ids.len() - 1 - split..ids.len() - split, count };
            let top = &run(&loaded, &[(ids, split, read)])[0];
            let log_sum = expected.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln() as f32;
            let log_probs: Vec<f32> = top[..count].iter().map(|id| expected[*id as usize] - log_sum).collect();
            largest = largest.max(worst(&top[count..], &log_probs));
            let better = expected.iter().filter(|logit| **logit - log_sum > top[2 * count - 1] + tolerance).count();
            assert!(better < count, "{model} {}: {better} tokens are likelier", case.name);
        }
        // What an emulated one takes long for, and others show as well.
        let greedy = case.greedy.as_ref().filter(|_| !device.name().contains("emulated"));
        if let (Some(greedy), DType::F32) = (greedy, dtype) {
            let mut ids = ids.to_vec();
            for token in greedy {
                let logits = &run(&loaded, &[(&ids, ids.len() / 2, Read::LastLogits)])[0];
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
                assert_eq!(best as u32, *token, "{model} {}", case.name);
                ids.push(*token);
            }
        }
    }
    println!("{model} {} {dtype:?} on {device:?}: largest difference {largest:.2e}", adapter.unwrap_or(""));
    assert!(largest < tolerance, "{model}: {largest} > {tolerance}");
}

const FOLDERS: [&str; 16] = [
    "llama-lm",
    "llama-pm",
    "llama-lm-sharded",
    "qwen2-lm",
    "qwen2-pm",
    "qwen3-lm",
    "qwen3-pm",
    "mistral-lm",
    "mistral-pm",
    "gemma2-lm",
    "gemma2-pm",
    "neox-lm",
    "neox-pm",
    "neox-lm-sequential",
    "openrlhf-pm",
    "trl-value-head",
];

#[test]
fn f32_equals_transformers_for_every_architecture() {
    for folder in FOLDERS {
        check(folder, None, &format!("{folder}/expected.json"), DType::F32, 1e-4);
    }
}

#[test]
fn bf16_is_near_transformers_for_every_architecture() {
    for folder in FOLDERS {
        check(folder, None, &format!("{folder}/expected.json"), DType::Bf16, 2e-2);
    }
}

/// Steps of three tokens, of as many sequences: after the first two, steps of the same shape.
#[test]
fn log_probabilities_token_by_token_are_those_of_transformers() {
    const SEQUENCES: usize = 3;
    for (device, folder) in devices().iter().flat_map(|device| FOLDERS.map(|folder| (device, folder))) {
        let text = std::fs::read_to_string(fixtures().join(folder).join("expected.json")).unwrap();
        let Expected { cases } = serde_json::from_str(&text).unwrap();
        let language = cases.iter().filter(|case| case.token_log_probs.is_some());
        let Some(case) = language.max_by_key(|case| case.token_ids.len()) else { continue };
        let ids = &case.token_ids[..case.token_ids.len().min(PAGE + 8)];
        let model = load(folder, None, DType::F32, device);
        let (mut kv, mut workspace) = (model.decoder.kv_store(8).unwrap(), model.decoder.workspace());
        let pages: [[u32; 2]; SEQUENCES] = [[5, 0], [3, 7], [1, 2]];
        let mut found = vec![Vec::new(); SEQUENCES];
        for (position, pair) in ids.windows(2).enumerate() {
            let read = || Read::LogProbs { rows: 0..1, targets: &pair[1..] };
            let sequence = |pages| StepSequence { tokens: &pair[..1], position, pages, read: read() };
            let step = Step { sequences: pages.iter().map(|pages| sequence(&pages[..])).collect() };
            let log_probs = model.decoder.step(&step, &mut kv, &mut workspace).unwrap();
            found.iter_mut().zip(log_probs).for_each(|(found, log_prob)| found.extend(log_prob));
        }
        for found in found {
            let worst = worst(&found, &case.token_log_probs.as_ref().unwrap()[..found.len()]);
            assert!(worst < 1e-4, "{folder} on {device:?}: {worst}");
        }
    }
}

#[test]
fn adapters_are_merged() {
    check("llama-lm", Some("lora-pm"), "lora-pm/expected.json", DType::F32, 1e-4);
    check("qwen2-lm", Some("lora-lm"), "lora-lm/expected.json", DType::F32, 1e-4);
}

#[test]
fn gguf_files_equal_their_folders() {
    check("gguf/llama-lm.gguf", None, "gguf/llama-lm.expected.json", DType::F32, 1e-4);
    check("gguf/qwen2-lm.gguf", None, "gguf/qwen2-lm.expected.json", DType::F32, 1e-4);
}

/// Rewards of some more tokens of two sequences behind one beginning.
fn behind_a_common_beginning(model: &Model) -> Vec<f32> {
    const COMMON: usize = 8 * PAGE;
    let token = |i: usize| (i * 31 % model.decoder.config().vocab_size) as u32;
    let common: Vec<u32> = (0..COMMON).map(token).collect();
    let own: Vec<Vec<u32>> = (1..3).map(|i| (1000 * i..1000 * i + 5).map(token).collect()).collect();
    let pages: Vec<Vec<u32>> = (8..10).map(|own| (0..8).chain([own]).collect()).collect();
    let sequence = |tokens, position, pages, read| StepSequence { tokens, position, pages, read };
    let (mut kv, mut workspace) = (model.decoder.kv_store(10).unwrap(), model.decoder.workspace());
    let first = Step { sequences: vec![sequence(&common, 0, &pages[0], Read::Nothing)] };
    model.decoder.step(&first, &mut kv, &mut workspace).unwrap();
    let second = own.iter().zip(&pages).map(|(own, pages)| sequence(own, COMMON, pages, Read::Rewards));
    model.decoder.step(&Step { sequences: second.collect() }, &mut kv, &mut workspace).unwrap().concat()
}

#[test]
fn sequences_behind_a_common_beginning_have_the_rewards_that_they_have_on_the_cpu() {
    for folder in ["llama-pm", "gemma2-pm"] {
        let found = |device: &Device| behind_a_common_beginning(&load(folder, None, DType::F32, device));
        let expected = found(&Device::Cpu);
        for device in devices() {
            let largest = worst(&found(&device), &expected);
            assert!(largest < 1e-4, "{folder} on {device:?}: {largest}");
        }
    }
}

#[test]
fn tokens_are_drawn_from_the_logits_of_the_last_step() {
    for device in devices().into_iter().chain(groups(2)) {
        for model in ["llama-lm", "gemma2-lm"] {
            let Model { decoder, .. } = load(model, None, DType::F32, &device);
            let vocabulary = decoder.config().vocab_size;
            let (mut kv, mut workspace) = (decoder.kv_store(8).unwrap(), decoder.workspace());
            let texts = [[5u32, 9, 200], [7, 7, 1], [3, 250, 4]];
            let reads = [Read::LastLogits, Read::Draw, Read::LogProbs { rows: 0..1, targets: &[9] }];
            let reads = reads.into_iter().chain([Read::Draw, Read::LastLogits]).enumerate();
            let pages: Vec<[u32; 1]> = (0..5).map(|page| [page]).collect();
            let sequence = |(i, read): (usize, Read<'static>)| {
                // The first two of them once to draw from and once to see.
                let tokens = &texts[[1, 0, 2, 1, 0][i]];
                StepSequence { tokens, position: 0, pages: &pages[i], read }
            };
            let step = Step { sequences: reads.map(sequence).collect() };
            let values = decoder.step(&step, &mut kv, &mut workspace).unwrap();
            assert_eq!([0, 1, 2, 3, 4].map(|i| values[i].len()), [vocabulary, 0, 1, 0, vocabulary]);
            let logits = [&values[4][..], &values[0]].concat();

            let seen: Vec<Draw<'_>> = (0..20)
                .map(|i| Draw { row: i % 2, seed: 7, index: i as u32, top_p: 0.9, temperature: 0.7, ..Draw::default() })
                .collect();
            let expected = sample::draw(&logits, vocabulary, &seen, &mut vec![0.0; 20 * vocabulary]);
            let found = decoder.draw(&seen, &mut workspace).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                let (found, expected) = (found.unwrap(), expected.unwrap());
                assert_eq!(found.token, expected.token, "{model} on {device:?}");
                assert!((found.log_prob - expected.log_prob).abs() < 1e-4, "{model} on {device:?}");
            }
            // Once more, without what was drawn.
            let mut excluded = TokenSet::new(vocabulary);
            for attempt in 0..5 {
                let again = Draw { row: 1, temperature: 0.0, excluded: Some(&excluded), attempt, ..Draw::default() };
                let drawn = decoder.draw(&[again], &mut workspace).unwrap()[0].unwrap();
                let likelier = values[0].iter().filter(|logit| **logit > values[0][drawn.token as usize]).count();
                assert_eq!(likelier, attempt as usize, "{model} on {device:?}");
                excluded.insert(drawn.token);
            }

            let refused = |workspace: &mut Workspace, draw: Draw<'_>| {
                let drawn = decoder.draw(&[draw], workspace);
                assert!(matches!(drawn, Err(Error::InvalidInput(_))), "{drawn:?}");
            };
            refused(&mut workspace, Draw { row: 2, ..Draw::default() });
            refused(&mut workspace, Draw { top_p: 0.0, ..Draw::default() });
            refused(&mut workspace, Draw { excluded: Some(&TokenSet::new(vocabulary + 1)), ..Draw::default() });
            decoder.step(&Step::default(), &mut kv, &mut workspace).unwrap();
            refused(&mut workspace, Draw::default());
        }
    }
}

#[test]
fn steps_in_flight_have_the_bits_of_steps_one_after_the_other() {
    // Tokens of both sequences of a step. Small ones of a shape are recorded; buffers grow for the large one, and what was
    // recorded is gone then.
    const STEPS: [usize; 9] = [3, 3, 3, 3, 2 * PAGE, 3, 3, 3, 5];
    for device in devices().into_iter().chain(groups(2)) {
        for model in ["llama-pm", "llama-lm"] {
            let Model { decoder, .. } = load(model, None, DType::F32, &device);
            let rewards = matches!(decoder.config().head, Head::Reward(_));
            let token = |i: usize, j: usize| ((i * 31 + j * 7) % 250) as u32;
            let texts: Vec<Vec<u32>> = (0..18).map(|i| (0..STEPS[i / 2]).map(|j| token(i, j)).collect()).collect();
            let pages: Vec<[u32; 2]> = (0..18).map(|i| [2 * i, 2 * i + 1]).collect();
            let sequence = |i: usize| {
                let read = match rewards {
                    true => Read::Rewards,
                    false => Read::LogProbs { rows: 0..2, targets: &texts[i][1..3] },
                };
                StepSequence { tokens: &texts[i], position: 0, pages: &pages[i], read }
            };
            let run = |most_in_flight: usize| {
                let (mut kv, mut workspace) = (decoder.kv_store(36).unwrap(), decoder.workspace());
                let (mut flights, mut values) = (VecDeque::new(), Vec::new());
                for i in 0..STEPS.len() {
                    let step = Step { sequences: vec![sequence(2 * i), sequence(2 * i + 1)] };
                    // One that nobody collects.
                    drop(decoder.ask(&step, &mut kv, &mut workspace).unwrap());
                    flights.push_back(decoder.ask(&step, &mut kv, &mut workspace).unwrap());
                    if flights.len() == most_in_flight {
                        values.extend(flights.pop_front().unwrap().collect().unwrap());
                    }
                }
                flights.into_iter().for_each(|flight| values.extend(flight.collect().unwrap()));
                values
            };
            let one_by_one = run(1);
            assert_eq!(run(2), one_by_one, "{model} on {device:?}");
            assert_eq!(run(STEPS.len()), one_by_one, "{model} on {device:?}");
        }
    }
}

#[test]
fn split_models_equal_transformers() {
    let one_of_each = ["llama-pm", "qwen2-lm", "qwen3-pm", "mistral-lm", "gemma2-pm", "neox-lm"];
    for group in groups(2) {
        // An emulated one takes long.
        let folders: &[&str] = if group.is_cpu() { &FOLDERS } else { &one_of_each };
        for folder in folders {
            check_on(&group, folder, None, &format!("{folder}/expected.json"), DType::F32, 1e-4);
        }
        for folder in ["gemma2-pm", "qwen2-lm", "neox-lm"] {
            check_on(&group, folder, None, &format!("{folder}/expected.json"), DType::Bf16, 2e-2);
        }
        check_on(&group, "llama-lm", Some("lora-pm"), "lora-pm/expected.json", DType::F32, 1e-4);
        check_on(&group, "gguf/qwen2-lm.gguf", None, "gguf/qwen2-lm.expected.json", DType::F32, 1e-4);
    }
    for group in groups(4) {
        for folder in ["neox-lm", "neox-pm", "neox-lm-sequential"] {
            check_on(&group, folder, None, &format!("{folder}/expected.json"), DType::F32, 1e-4);
        }
    }
}

#[test]
fn split_models_compute_what_the_whole_computes() {
    for folder in FOLDERS {
        let whole = load(folder, None, DType::F32, &Device::Cpu);
        let config = whole.decoder.config();
        let tokens: Vec<u32> = (0..90).map(|i| i * 37 % config.vocab_size as u32).collect();
        let language = config.head == Head::Language;
        let all = if language { Read::LogProbs { rows: 0..39, targets: &tokens[51..] } } else { Read::Rewards };
        let last = if language { Read::LastLogits } else { Read::LastReward };
        // Beside one another, one of them cut into two steps.
        let sequences = [(&tokens[..], 50, all), (&tokens[..33], 0, last)];
        let expected = run(&whole, &sequences);
        for size in [1, 2, 4].into_iter().filter(|size| config.num_kv_heads.is_multiple_of(*size)) {
            let split = load(folder, None, DType::F32, &Device::split(vec![Device::Cpu; size]).unwrap());
            assert_eq!(split.decoder.config(), config, "{folder}");
            for (found, expected) in run(&split, &sequences).iter().zip(&expected) {
                let largest = worst(found, expected);
                assert!(largest < 1e-5 && (size > 1 || largest == 0.0), "{folder} in {size}: {largest}");
            }
        }
    }
}

#[test]
fn what_cannot_be_split_evenly_is_refused_with_what_can() {
    let refused = |folder: &str, size: usize| {
        let path = fixtures().join(folder).to_string_lossy().into_owned();
        let mut checkpoint = Checkpoint::open(&Source { model: path, ..Source::default() }).unwrap();
        let device = Device::split(vec![Device::Cpu; size]).unwrap();
        let built = Decoder::build(&checkpoint.config, &mut checkpoint.weights, DType::F32, 512, &device);
        built.unwrap_err().to_string()
    };
    for (folder, size, words) in [
        ("llama-pm", 3, "4 heads, 2 key-value heads and a feed-forward layer of 48"),
        ("llama-pm", 3, "between 3 devices; split it over 2 (--device)"),
        ("llama-pm", 4, "between 4 devices; split it over 2 (--device)"),
        ("neox-pm", 8, "split it over 2 or 4 (--device)"),
    ] {
        let error = refused(folder, size);
        assert!(error.contains(words), "{error}");
    }
    assert!(Device::split(Vec::new()).is_err());
    #[cfg(feature = "emulated")]
    Device::split(vec![Device::Cpu, Device::Gpu(plumb_kernels::gpu::Gpu::emulated())]).unwrap_err();
}
