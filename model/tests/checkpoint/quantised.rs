//! Quantised GGUF files stay quantised in memory, and compute what their expanded weights compute.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType as TensorType, Device, Tensor};
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::{Checkpoint, Source, Stored};
use plumb_model::config::Head;
use plumb_model::decoder::{DType, Decoder, Device as Place, Read, Step, StepSequence, StepSize};
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel};
use serde_json::json;
use tempfile::TempDir;

use crate::gguf::{Draft, gguf_name};
use crate::support::{Copy, explained, fixture, open_with_adapter, source, take_all, tensors_of, values};

/// Widths of the Llama fixture, and those of a model that is wide enough for blocks of 256 weights.
const WIDTHS: [(usize, usize); 3] = [(32, 256), (16, 128), (48, 512)];

fn widen(tensor: &Tensor, seed: u64) -> Tensor {
    let shape: Vec<usize> = tensor
        .dims()
        .iter()
        .map(|size| WIDTHS.iter().find(|(narrow, _)| narrow == size).map_or(*size, |(_, wide)| *wide))
        .collect();
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let values: Vec<f32> = match shape.len() {
        1 => (0..shape[0]).map(|_| 0.5 + next()).collect(),
        _ => (0..shape.iter().product()).map(|_| (next() - 0.5) / 4.0).collect(),
    };
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn widen_all(copy: &Copy) {
    copy.edit_tensors(|tensors| {
        let mut names: Vec<_> = tensors.keys().cloned().collect();
        names.sort();
        for (seed, name) in names.into_iter().enumerate() {
            let wide = widen(&tensors[&name], seed as u64);
            tensors.insert(name, wide);
        }
    });
}

/// A Llama in GGUF, and a folder with what candle makes of its tensors, in f32.
struct Pair {
    file: (TempDir, std::path::PathBuf),
    folder: Copy,
}

impl Pair {
    /// `type_of` goes by the file's names.
    fn new(tied: bool, type_of: &dyn Fn(&str) -> GgmlDType) -> Self {
        let folder = Copy::of("llama-lm");
        folder.edit("config.json", |config| {
            config["hidden_size"] = json!(256);
            config["intermediate_size"] = json!(512);
            config["head_dim"] = json!(64);
            config["rope_scaling"] = json!(null);
            config["tie_word_embeddings"] = json!(tied);
        });
        widen_all(&folder);
        if tied {
            folder.edit_tensors(|tensors| drop(tensors.remove("lm_head.weight")));
        }
        let draft = Draft::of_folder(folder.path(), "llama");
        assert_eq!(draft.tensors.contains_key("output.weight"), !tied);
        let file = draft.write_as(type_of);
        folder.edit_tensors(|tensors| {
            for (name, tensor) in tensors.iter_mut().filter(|(_, tensor)| tensor.rank() == 2) {
                let quantised = QTensor::quantize(tensor, type_of(&gguf_name(name, "llama"))).unwrap();
                *tensor = quantised.dequantize(&Device::Cpu).unwrap();
            }
        });
        Self { file, folder }
    }

    /// Both compute the same bits and take the bytes that were foretold; the answer is the bytes of their weights.
    #[track_caller]
    fn check(&self, dtype: DType, adapter: Option<&Copy>) -> [u64; 2] {
        let ([file, folder], bytes) = self.run(dtype, adapter, &Place::default());
        assert!(bits(&file) == bits(&folder), "{dtype:?}");
        bytes
    }

    /// What both answer, and the bytes of their weights, which are those that were foretold.
    #[track_caller]
    fn run(&self, dtype: DType, adapter: Option<&Copy>, device: &Place) -> ([Vec<f32>; 2], [u64; 2]) {
        let [file, folder] = [self.file.1.as_path(), self.folder.path()].map(|path| match adapter {
            Some(adapter) => run(open_with_adapter(path, adapter.path()).unwrap(), dtype, device),
            None => run(Checkpoint::open(&source(path)).unwrap(), dtype, device),
        });
        assert_eq!(file.1.0, folder.1.0);
        let foretold = [self.file.1.as_path(), self.folder.path()].map(|path| {
            let adapter = adapter.map(|adapter| adapter.path().to_str().unwrap().to_owned());
            foretold(&Source { adapter, ..source(path) }, dtype, device)
        });
        assert_eq!(foretold, [file.1.1, folder.1.1], "{dtype:?}");
        ([file.0, folder.0], foretold)
    }
}

fn bits(answers: &[f32]) -> Vec<u32> {
    answers.iter().map(|answer| answer.to_bits()).collect()
}

/// Bytes of weights, from headers.
fn foretold(source: &Source, dtype: DType, device: &Place) -> u64 {
    let options = LoadOptions {
        dtype: if dtype == DType::F32 { DTypeChoice::F32 } else { DTypeChoice::Bf16 },
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 24,
        device: device.clone(),
        background: Background::default(),
    };
    LoadedModel::footprint(source, &options, StepSize { tokens: 1, sequences: 1 }).unwrap().weights
}

/// All that a model answers, and the number and bytes of its weights.
fn run(mut checkpoint: Checkpoint, dtype: DType, device: &Place) -> (Vec<f32>, (u64, u64)) {
    let config = &checkpoint.config;
    let decoder = Decoder::build(config, &mut checkpoint.weights, dtype, 128, device).unwrap();
    checkpoint.weights.finish().unwrap();
    let tokens: Vec<u32> = (0..99).map(|i| i * 37 % config.vocab_size as u32).collect();
    let pages: Vec<u32> = (0..8).collect();
    let long = match config.head {
        Head::Language => Read::LogProbs { rows: 0..98, targets: &tokens[1..] },
        Head::Reward(_) => Read::Rewards,
    };
    let short = if config.head == Head::Language { Read::LastLogits } else { Read::LastReward };
    // Many rows, and so few that each weight is read once, take different ways through the kernel.
    let mut all = Vec::new();
    for (tokens, read) in [(&tokens[..], long), (&tokens[..3], short)] {
        let sequence = StepSequence { tokens, position: 0, pages: &pages[..tokens.len().div_ceil(PAGE)], read };
        let step = Step { sequences: vec![sequence] };
        let answers = decoder.step(&step, &mut decoder.kv_store(8).unwrap(), &mut decoder.workspace()).unwrap();
        assert!(answers[0].iter().all(|answer| answer.is_finite()));
        all.extend_from_slice(&answers[0]);
    }
    assert!(all.len() > 99 && all.iter().any(|other| *other != all[0]));
    (all, decoder.size())
}

/// Bytes in which 32 weights are held: their codes and scales, and their offsets if there are any.
const HELD: [(GgmlDType, u64); 10] = [
    (GgmlDType::Q4_0, 16 + 2),
    (GgmlDType::Q4_1, 16 + 4),
    (GgmlDType::Q5_0, 32 + 2),
    (GgmlDType::Q5_1, 32 + 4),
    (GgmlDType::Q8_0, 32 + 2),
    (GgmlDType::Q2K, 16 + 16),
    (GgmlDType::Q3K, 16 + 8),
    (GgmlDType::Q4K, 16 + 8),
    (GgmlDType::Q5K, 32 + 8),
    (GgmlDType::Q6K, 32 + 8),
];

#[test]
fn every_type_computes_the_bits_of_its_expanded_weights_and_takes_less_memory() {
    for (dtype, held) in HELD {
        let pair = Pair::new(true, &|_| dtype);
        let [file, folder] = pair.check(DType::Bf16, None);
        assert_eq!(file * 64, folder * held, "{dtype:?}");
        assert_eq!(pair.check(DType::F32, None), [file, 2 * folder]);
    }
}

/// Bytes in which a GPU holds 256 weights, whose scales are as small as in the file.
#[cfg(feature = "emulated")]
const HELD_ON_A_GPU: [(GgmlDType, u64); 10] = [
    (GgmlDType::Q4_0, 8 * (16 + 2)),
    (GgmlDType::Q4_1, 8 * (16 + 4)),
    (GgmlDType::Q5_0, 8 * (20 + 2)),
    (GgmlDType::Q5_1, 8 * (20 + 4)),
    (GgmlDType::Q8_0, 8 * (32 + 2)),
    (GgmlDType::Q2K, 8 * (8 + 4) + 4),
    (GgmlDType::Q3K, 8 * (12 + 2) + 2),
    (GgmlDType::Q4K, 8 * (16 + 2) + 4),
    (GgmlDType::Q5K, 8 * (20 + 2) + 4),
    (GgmlDType::Q6K, 8 * (24 + 2) + 2),
];

#[test]
#[cfg(feature = "emulated")]
fn on_a_gpu_every_type_computes_what_its_expanded_weights_compute() {
    let device = Place::Gpu(plumb_kernels::gpu::Gpu::emulated());
    for (dtype, held) in HELD_ON_A_GPU {
        let pair = Pair::new(true, &|_| dtype);
        // In bf16 the emulated tensor cores take long.
        let narrow = matches!(dtype, GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q6K);
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 0.1)].into_iter().take(1 + usize::from(narrow)) {
            let (answers, [file, folder]) = pair.run(dtype, None, &device);
            let [file_says, folder_says] = answers;
            let worst = file_says.iter().zip(&folder_says).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "{dtype:?} {worst}");
            // Beside 280 rows of the vocabulary lie eight that fill up sixteen.
            let (element, more) = (if dtype == DType::F32 { 4 } else { 2 }, 8);
            assert_eq!(file * 256 * element, (folder + more * 256 * element) * held, "{dtype:?}");
        }
    }
}

#[test]
#[cfg(feature = "emulated")]
fn on_a_gpu_matrices_of_mixed_types_and_adapted_ones_compute_what_expanded_ones_do() {
    let device = Place::Gpu(plumb_kernels::gpu::Gpu::emulated());
    let mixed = |name: &str| match name.rsplit('.').nth(1) {
        Some("attn_v" | "ffn_down" | "output") => GgmlDType::Q6K,
        Some("ffn_up") => GgmlDType::F16,
        Some("token_embd") => GgmlDType::Q5_1,
        _ => GgmlDType::Q4K,
    };
    let adapter = Copy::of("lora-pm");
    widen_all(&adapter);
    for (tied, adapter) in [(true, None), (false, None), (false, Some(&adapter))] {
        let ([file, folder], [fewer, more]) = Pair::new(tied, &mixed).run(DType::F32, adapter, &device);
        let worst = file.iter().zip(&folder).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 && fewer < more, "{worst}");
    }
}

#[test]
fn mixed_types_compute_the_bits_of_their_expanded_weights() {
    // As llama.cpp's Q4_K_M.
    let medium = |name: &str| match name.rsplit('.').nth(1) {
        Some("attn_v" | "ffn_down" | "token_embd" | "output") => GgmlDType::Q6K,
        _ => GgmlDType::Q4K,
    };
    let legacy = |name: &str| match name.rsplit('.').nth(1) {
        Some("attn_v") => GgmlDType::Q5_1,
        Some("attn_k") => GgmlDType::Q8_0,
        Some("ffn_gate") => GgmlDType::Q5_0,
        Some("output") => GgmlDType::F16,
        _ => GgmlDType::Q4_0,
    };
    // A layer of which one part is plain is plain.
    let partly_plain = |name: &str| match name.rsplit('.').nth(1) {
        Some("attn_v" | "ffn_up") => GgmlDType::F16,
        Some("attn_k" | "token_embd") => GgmlDType::BF16,
        _ => GgmlDType::Q3K,
    };
    for tied in [false, true] {
        for type_of in [&medium as &dyn Fn(&str) -> GgmlDType, &legacy, &partly_plain] {
            let pair = Pair::new(tied, type_of);
            for dtype in [DType::Bf16, DType::F32] {
                let [file, folder] = pair.check(dtype, None);
                assert!(file < folder, "{file} {folder}");
            }
        }
    }
}

#[test]
fn a_preference_model_on_a_quantised_file_computes_the_bits_of_its_expanded_weights() {
    let adapter = Copy::of("lora-pm");
    widen_all(&adapter);
    let pair = Pair::new(false, &|name| if name.contains("attn_q") { GgmlDType::Q5K } else { GgmlDType::Q4_1 });
    for dtype in [DType::Bf16, DType::F32] {
        let [file, folder] = pair.check(dtype, Some(&adapter));
        assert!(file < folder, "{file} {folder}");
    }
}

#[test]
fn only_what_an_adapter_leaves_alone_stays_quantised() {
    let file = fixture("gguf/qwen2-lm.gguf");
    let open = || open_with_adapter(&file, &fixture("lora-lm")).unwrap();
    let mut plain = take_all(open()).unwrap();
    let mut checkpoint = open();
    for (name, shape) in tensors_of(&checkpoint.config) {
        let misshapen = checkpoint.weights.take_stored(&name, &[shape[0], shape.len() + 7]);
        explained(misshapen, &[&name, "expected"]);
        let stored = checkpoint.weights.take_stored(&name, &shape).unwrap();
        let changed = ["gate_proj", "k_proj", "o_proj", "up_proj"].iter().any(|part| name.contains(part));
        assert_eq!(matches!(stored, Stored::Quantised(_)), shape.len() == 2 && !changed, "{name}");
        let tensor = stored.into_tensor().unwrap();
        assert_eq!(tensor.dtype(), TensorType::F32);
        assert_eq!(values(&tensor), values(&plain.remove(&name).unwrap()), "{name}");
        explained(checkpoint.weights.take_stored(&name, &shape), &[&name, "missing"]);
    }
    checkpoint.weights.finish().unwrap();
}

#[test]
fn a_quantised_file_that_is_cut_off_is_refused() {
    let pair = Pair::new(true, &|_| GgmlDType::Q4K);
    let bytes = std::fs::read(&pair.file.1).unwrap();
    std::fs::write(&pair.file.1, &bytes[..bytes.len() - 64]).unwrap();
    explained(Checkpoint::open(&source(&pair.file.1)), &["model.gguf", "tensor `", "bytes"]);
}
