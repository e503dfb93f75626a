//! What a load will take, foretold from headers, against what it took.

use std::path::Path;

use plumb_model::Error;
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::Source;
use plumb_model::decoder::{DType, Device, Draw, Read, Step, StepSequence, StepSize, TokenSet};
use plumb_model::loaded::{Background, DTypeChoice, Footprint, LoadOptions, LoadedModel};

use crate::support::{Copy, FOLDERS, fixture, ones, source};

const LARGEST: StepSize = StepSize { tokens: 2 * 416, sequences: 2 };

fn options(dtype: DTypeChoice) -> LoadOptions {
    let background = Background::default();
    LoadOptions {
        dtype,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 22,
        device: Default::default(),
        background,
    }
}

/// Weights and cache as foretold, and as they are.
fn both(source: &Source, dtype: DTypeChoice) -> (Footprint, u64) {
    let footprint = LoadedModel::footprint(source, &options(dtype), LARGEST).unwrap();
    let model = LoadedModel::load(source, &options(dtype)).unwrap();
    assert_eq!(footprint.cache, (model.kv_pages * model.page_bytes) as u64);
    (footprint, model.info.weight_bytes)
}

#[test]
fn weights_are_foretold_to_the_byte() {
    for name in FOLDERS.into_iter().chain(["gguf/llama-lm.gguf", "gguf/qwen2-lm.gguf"]) {
        for dtype in [DTypeChoice::Auto, DTypeChoice::F32, DTypeChoice::Bf16] {
            let (footprint, held) = both(&source(&fixture(name)), dtype);
            assert_eq!(footprint.weights, held, "{name} {dtype:?}");
            assert!(footprint.reading > 0 && footprint.tables > 0, "{name}: {footprint}");
            assert!(footprint.reading < 16 * held, "{name}: {footprint}");
        }
    }
}

#[test]
#[cfg(feature = "emulated")]
fn weights_on_a_gpu_are_foretold_to_the_byte() {
    let device = plumb_model::decoder::Device::Gpu(plumb_kernels::gpu::Gpu::emulated());
    for name in FOLDERS.into_iter().chain(["gguf/llama-lm.gguf", "gguf/qwen2-lm.gguf"]) {
        for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
            let options = LoadOptions { device: device.clone(), ..options(dtype) };
            let footprint = LoadedModel::footprint(&source(&fixture(name)), &options, LARGEST).unwrap();
            let before = device.free_memory().unwrap().unwrap();
            let model = LoadedModel::load(&source(&fixture(name)), &options).unwrap();
            assert_eq!(footprint.weights, model.info.weight_bytes, "{name} {dtype:?}");
            // Nothing else stays there but norms and tables.
            let taken = before - device.free_memory().unwrap().unwrap();
            assert_eq!(footprint.weights + footprint.tables, taken, "{name} {dtype:?}");
            // What is read is not held here.
            assert!(footprint.peak() > 0 && footprint.device_peak() > footprint.weights + footprint.cache, "{name}");
        }
    }
}

#[test]
fn the_largest_step_computes_in_what_is_foretold() {
    for name in FOLDERS {
        let (taken, foretold) = largest_step(name, Device::Cpu);
        assert!(taken <= foretold && foretold < 3 * taken, "{name}: {taken} taken, {foretold} foretold");
    }
}

/// Their keys are cut, and what becomes of them takes room.
#[test]
#[cfg(feature = "emulated")]
fn a_step_of_few_rows_on_a_gpu_computes_in_what_is_foretold() {
    let device = plumb_model::decoder::Device::Gpu(plumb_kernels::gpu::Gpu::emulated());
    let options = LoadOptions { device, ..options(DTypeChoice::Auto) };
    for name in ["llama-pm", "qwen3-pm", "gemma2-pm"] {
        let source = source(&fixture(name));
        let largest = StepSize { tokens: 4, sequences: 4 };
        let foretold = LoadedModel::footprint(&source, &options, largest).unwrap().workspace;
        let model = LoadedModel::load(&source, &options).unwrap();
        let taken = |position: usize| {
            let count = (position / PAGE + 1) as u32;
            let pages: Vec<Vec<u32>> = (0..4).map(|i| (i * count..(i + 1) * count).collect()).collect();
            let sequence = |pages| StepSequence { tokens: &[1], position, pages, read: Read::LastReward };
            let step = Step { sequences: pages.iter().map(|pages| sequence(pages)).collect() };
            let mut workspace = model.decoder.workspace();
            model
                .decoder
                .step(&step, &mut model.decoder.kv_store(4 * count as usize).unwrap(), &mut workspace)
                .unwrap();
            workspace.bytes() as u64
        };
        let (whole, cut) = (taken(200), taken(300));
        assert!(whole < cut && cut <= foretold && foretold < 3 * cut, "{name}: {whole}, {cut}, {foretold} foretold");
    }
}

#[test]
#[cfg(feature = "emulated")]
fn the_largest_step_on_a_gpu_computes_in_what_is_foretold() {
    // The others compute in the same buffers; one takes its time.
    for name in ["llama-lm", "llama-pm"] {
        let (taken, foretold) = largest_step(name, Device::Gpu(plumb_kernels::gpu::Gpu::emulated()));
        assert!(taken <= foretold, "{name}: {taken} taken, {foretold} foretold");
    }
}

/// Bytes that it has taken, and what was foretold.
fn largest_step(name: &str, device: Device) -> (u64, u64) {
    let options = LoadOptions { device, ..options(DTypeChoice::Auto) };
    let footprint = LoadedModel::footprint(&source(&fixture(name)), &options, LARGEST).unwrap();
    let model = LoadedModel::load(&source(&fixture(name)), &options).unwrap();
    // As many sequences as there have to be, for a model of short ones.
    let length = (LARGEST.tokens / LARGEST.sequences).min(model.info.max_input_tokens);
    let (tokens, pages) = (vec![1; length], length.div_ceil(PAGE) as u32);
    let count = LARGEST.tokens / length;
    let pages: Vec<Vec<u32>> = (0..count as u32).map(|i| (i * pages..(i + 1) * pages).collect()).collect();
    let sequences = pages.iter().enumerate().map(|(i, pages)| {
        let read = match model.info.reward_head {
            Some(_) => Read::Rewards,
            None if i < LARGEST.sequences => Read::Draw,
            None => Read::LogProbs { rows: 0..length, targets: &tokens },
        };
        StepSequence { tokens: &tokens, position: 0, pages, read }
    });
    let step = Step { sequences: sequences.collect() };
    let mut kv = model.decoder.kv_store(pages.len() * pages[0].len()).unwrap();
    let mut workspace = model.decoder.workspace();
    model.decoder.step(&step, &mut kv, &mut workspace).unwrap();
    if model.info.reward_head.is_none() {
        let set = TokenSet::new(model.info.vocab_size);
        let (penalised, excluded) = (Some(&set), Some(&set));
        let draws: Vec<Draw<'_>> =
            (0..LARGEST.sequences).map(|row| Draw { row, penalised, excluded, ..Draw::default() }).collect();
        model.decoder.draw(&draws, &mut workspace).unwrap();
    }
    (workspace.bytes() as u64, footprint.workspace)
}

#[test]
fn an_adapter_is_foretold_too() {
    let adapter = Some(fixture("lora-lm").to_str().unwrap().to_owned());
    let adapted = Source { adapter, ..source(&fixture("qwen2-lm")) };
    let (footprint, held) = both(&adapted, DTypeChoice::Auto);
    assert_eq!(footprint.weights, held);
    let plain = LoadedModel::footprint(&source(&fixture("qwen2-lm")), &options(DTypeChoice::Auto), LARGEST).unwrap();
    assert!(footprint.reading >= plain.reading, "merging takes copies");
}

#[test]
fn headers_are_enough_and_what_they_cannot_be_is_refused() {
    // The digest would not be right, and nobody asks.
    let copy = Copy::of("llama-pm");
    plumb_model::checkpoint::manifest::Manifest::write(copy.path(), &[]).unwrap();
    copy.flip_last_byte("model.safetensors");
    LoadedModel::footprint(&source(copy.path()), &options(DTypeChoice::Auto), LARGEST).unwrap();
    assert!(LoadedModel::load(&source(copy.path()), &options(DTypeChoice::Auto)).is_err());

    let copy = Copy::of("llama-pm");
    copy.remove("model.safetensors");
    let footprint = |path: &Path| LoadedModel::footprint(&source(path), &options(DTypeChoice::Auto), LARGEST);
    assert!(matches!(footprint(copy.path()), Err(Error::MissingFile { .. })));
    assert!(matches!(footprint(&fixture("lora-pm")), Err(Error::MissingFile { .. })));

    let copy = Copy::of("llama-pm");
    copy.edit_tensors(|tensors| drop(tensors.insert("more".to_owned(), ones(&[3]))));
    footprint(copy.path()).unwrap();
}

#[test]
fn the_types_of_the_cache_and_of_the_weights_are_those_of_the_load() {
    let of = |dtype| LoadedModel::footprint(&source(&fixture("llama-pm")), &options(dtype), LARGEST).unwrap();
    assert_eq!(of(DTypeChoice::Auto), of(DTypeChoice::Bf16));
    let (narrow, wide) = (of(DTypeChoice::Bf16), of(DTypeChoice::F32));
    assert!(narrow.weights < wide.weights);
    let model = LoadedModel::load(&source(&fixture("llama-pm")), &options(DTypeChoice::Auto)).unwrap();
    assert_eq!((model.decoder.dtype(), model.info.dtype), (DType::Bf16, "bf16"));
}
