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
#[cfg(feature = "emulated")]
fn what_each_gpu_holds_of_a_split_model_is_foretold() {
    use plumb_model::decoder::Device;
    for name in FOLDERS.into_iter().chain(["gguf/llama-lm.gguf", "gguf/qwen2-lm.gguf"]) {
        for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
            let gpus = [(); 2].map(|()| Device::Gpu(plumb_kernels::gpu::Gpu::emulated()));
            let device = Device::split(gpus.clone().into()).unwrap();
            let options = LoadOptions { device: device.clone(), ..options(dtype) };
            let foretold = LoadedModel::footprint(&source(&fixture(name)), &options, LARGEST).unwrap();
            let free = || gpus.each_ref().map(|gpu| gpu.free_memory().unwrap().unwrap());
            let before = free();
            let model = LoadedModel::load(&source(&fixture(name)), &options).unwrap();
            let taken = |before: [u64; 2]| [before[0] - free()[0], before[1] - free()[1]];
            // The head and the biases of what is summed up are the first one's.
            let [first, second] = taken(before);
            assert_eq!(first, foretold.weights + foretold.tables, "{name} {dtype:?}");
            assert!(second <= first, "{name} {dtype:?}: {second} of {first}");
            assert_eq!(model.info.weight_bytes + 2 * foretold.tables, first + second, "{name} {dtype:?}");
            let before = free();
            let _pages = model.decoder.kv_store(model.kv_pages).unwrap();
            assert_eq!(taken(before), [foretold.cache; 2], "{name} {dtype:?}");
            assert_eq!((model.kv_pages * model.page_bytes) as u64, 2 * foretold.cache, "{name} {dtype:?}");
            assert!(device.free_memory().unwrap().unwrap() < free()[1] + 1, "the fewest count");

            // What is there twice is embedding or tied head, and the reward head; biases in both types.
            let whole = LoadOptions { device: Device::Gpu(plumb_kernels::gpu::Gpu::emulated()), ..options.clone() };
            let whole = LoadedModel::load(&source(&fixture(name)), &whole).unwrap();
            let config = model.decoder.config();
            let element = if dtype == DTypeChoice::F32 { 4 } else { 2 };
            let reward = if model.info.reward_head.is_some() { 4 * config.hidden_size } else { 0 };
            let twice = config.vocab_size * config.hidden_size * element + reward;
            // Of that which is quantised the shards have no whole blocks.
            if name != "gguf/qwen2-lm.gguf" {
                assert_eq!(model.info.weight_bytes, whole.info.weight_bytes + twice as u64, "{name} {dtype:?}");
            }
            assert_eq!(model.info.parameters, whole.info.parameters, "{name} {dtype:?}");
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

#[test]
#[cfg(feature = "emulated")]
fn a_cache_on_a_gpu_leaves_room_for_a_second_version() {
    let gpu = || Device::Gpu(plumb_kernels::gpu::Gpu::emulated());
    let (source, largest) = (source(&fixture("llama-pm")), StepSize { tokens: 64, sequences: 4 });
    let planned = |device: Device| {
        let total = device.total_memory().unwrap().unwrap();
        let options = LoadOptions { device, ..options(DTypeChoice::Auto) };
        let planned = LoadedModel::planned_cache(&source, &options, largest, 2).unwrap().unwrap();
        let options = LoadOptions { kv_cache_bytes: planned, ..options };
        let footprint = LoadedModel::footprint(&source, &options, largest).unwrap();
        assert!(planned > 1 << 30 && 2 * footprint.device_peak() <= total, "{planned}, {footprint}");
        planned
    };
    let (one, two) = (planned(gpu()), planned(Device::split(vec![gpu(), gpu()]).unwrap()));
    assert!(two >= 2 * one, "{one} on one and {two} on two");
    let on_cpu = LoadOptions { device: Device::Cpu, ..options(DTypeChoice::Auto) };
    assert_eq!(LoadedModel::planned_cache(&source, &on_cpu, largest, 2).unwrap(), None);
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
