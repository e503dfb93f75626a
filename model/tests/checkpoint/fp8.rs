//! Linear layers in e4m3: rounded when they are read, or so in the checkpoint.

use std::collections::HashMap;

use candle_core::{DType as TensorType, Device, Tensor};
use plumb_kernels::fp8::Fp8Rows;
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::{Checkpoint, Stored};
use plumb_model::config::Head;
use plumb_model::decoder::{DType, Device as Place, Read, Step, StepSequence, StepSize};
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::support::{Copy, FOLDERS, explained, fixture, source, values};

fn options(dtype: DTypeChoice, device: Place) -> LoadOptions {
    LoadOptions {
        dtype,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 22,
        device,
        background: Background::default(),
    }
}

/// What a model answers, whose weights take as many bytes as was foretold; and how many.
#[track_caller]
fn run(path: &std::path::Path, options: &LoadOptions) -> (Vec<f32>, u64) {
    let foretold = LoadedModel::footprint(&source(path), options, StepSize { tokens: 64, sequences: 1 }).unwrap();
    let free = || options.device.free_memory().unwrap();
    let before = free();
    let model = LoadedModel::load(&source(path), options).unwrap();
    assert_eq!(foretold.weights, model.info.weight_bytes, "{path:?}");
    if let (Some(before), Some(after)) = (before, free()) {
        assert_eq!(foretold.weights + foretold.tables, before - after, "{path:?}");
    }
    (answers(&model), model.info.weight_bytes)
}

fn answers(model: &LoadedModel) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % model.info.vocab_size as u32).collect();
    let read = match model.decoder.config().head {
        Head::Language => Read::LogProbs { rows: 0..39, targets: &tokens[1..] },
        Head::Reward(_) => Read::Rewards,
    };
    let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE) as u32).collect();
    let sequence = StepSequence { tokens: &tokens, position: 0, pages: &pages, read };
    let (mut kv, mut workspace) = (model.decoder.kv_store(pages.len()).unwrap(), model.decoder.workspace());
    let mut answers = model.decoder.step(&Step { sequences: vec![sequence] }, &mut kv, &mut workspace).unwrap();
    assert!(answers[0].iter().all(|answer| answer.is_finite()));
    answers.remove(0)
}

/// The linear layers of the stack, by their names.
fn is_inner(name: &str, tensor: &Tensor) -> bool {
    tensor.rank() == 2 && name.contains(".layers.") && name.ends_with(".weight")
}

fn fp8_rows(tensor: &Tensor) -> Fp8Rows {
    Fp8Rows::quantise(&values(&tensor.to_dtype(TensorType::BF16).unwrap()), tensor.dims()[1])
}

/// A copy in which the linear layers have the values that e4m3 gives them, in f32.
fn rounded(name: &str) -> Copy {
    let copy = Copy::of(name);
    copy.edit_tensors(|tensors| {
        for (_, tensor) in tensors.iter_mut().filter(|(name, tensor)| is_inner(name, tensor)) {
            *tensor = Tensor::from_vec(fp8_rows(tensor).expand::<f32>(), tensor.dims(), &Device::Cpu).unwrap();
        }
    });
    copy
}

#[test]
fn on_a_cpu_weights_are_rounded_and_nothing_else() {
    for name in FOLDERS.into_iter().filter(|name| *name != "llama-lm-sharded") {
        let (found, bytes) = run(&fixture(name), &options(DTypeChoice::Fp8, Place::Cpu));
        let (expected, same) = run(rounded(name).path(), &options(DTypeChoice::Bf16, Place::Cpu));
        let (plain, _) = run(&fixture(name), &options(DTypeChoice::Bf16, Place::Cpu));
        assert!(found == expected && found != plain && bytes == same, "{name}");
    }
}

#[test]
#[cfg(feature = "emulated")]
fn on_a_gpu_half_the_memory_gives_nearly_the_same_answers() {
    let device = Place::Gpu(plumb_kernels::gpu::Gpu::emulated());
    for name in FOLDERS {
        let (found, bytes) = run(&fixture(name), &options(DTypeChoice::Fp8, device.clone()));
        let (expected, more) = run(&fixture(name), &options(DTypeChoice::Bf16, device.clone()));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(bytes < more && found != expected && worst < 0.5, "{name}: {worst}, {bytes} {more}");
    }
}

/// A copy with a narrower feed-forward layer.
#[cfg(feature = "emulated")]
fn narrowed(name: &str, width: usize) -> Copy {
    let copy = Copy::of(name);
    copy.edit("config.json", |config| config["intermediate_size"] = json!(width));
    copy.edit_tensors(|tensors| {
        for (name, tensor) in tensors.iter_mut() {
            if ["gate_proj", "up_proj", "dense_h_to_4h"].iter().any(|part| name.contains(part)) {
                *tensor = tensor.narrow(0, 0, width).unwrap();
            } else if name.contains("down_proj") || name.ends_with("dense_4h_to_h.weight") {
                *tensor = tensor.narrow(1, 0, width).unwrap().contiguous().unwrap();
            }
        }
    });
    copy
}

#[test]
#[cfg(feature = "emulated")]
fn gpus_that_share_a_model_have_the_e4m3_of_the_whole() {
    let gpus = || [(); 2].map(|()| Place::Gpu(plumb_kernels::gpu::Gpu::emulated()));
    // With biases, with a gate, and with q, k and v that have to be cut into heads.
    for name in ["llama-pm", "qwen2-lm", "neox-lm"] {
        let copy = narrowed(name, 32);
        let gpus = gpus();
        let both = Place::split(gpus.clone().into()).unwrap();
        let of = |dtype| options(dtype, both.clone());
        let foretold = |dtype| {
            LoadedModel::footprint(&source(copy.path()), &of(dtype), StepSize { tokens: 64, sequences: 1 }).unwrap()
        };
        let free = || gpus.each_ref().map(|gpu| gpu.free_memory().unwrap().unwrap());
        let before = free();
        let model = LoadedModel::load(&source(copy.path()), &of(DTypeChoice::Fp8)).unwrap();
        let taken = [before[0] - free()[0], before[1] - free()[1]];
        let plan = foretold(DTypeChoice::Fp8);
        assert_eq!(taken[0], plan.weights + plan.tables, "{name}");
        assert!(taken[1] <= taken[0] && plan.weights < foretold(DTypeChoice::Bf16).weights, "{name}");
        assert_eq!(model.info.weight_bytes + 2 * plan.tables, taken[0] + taken[1], "{name}");

        let (found, (expected, _)) = (answers(&model), run(copy.path(), &options(DTypeChoice::Fp8, gpus[0].clone())));
        let (plain, _) = run(copy.path(), &options(DTypeChoice::Bf16, gpus[0].clone()));
        let error = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        let (own, ones, between) = (error(&found, &plain), error(&expected, &plain), error(&found, &expected));
        // What a row gives to a sum is rounded by each GPU for its own part of it.
        assert!(own < 1.5 * ones && 0.0 < between && between < ones, "{name}: {own}, {ones}, {between}");
    }
    // Parts have to be as they are multiplied, too.
    let refused = LoadedModel::load(
        &source(&fixture("llama-pm")),
        &options(DTypeChoice::Fp8, Place::split(gpus().into()).unwrap()),
    );
    explained(refused, &["multiple of 16", "24", "bf16"]);
}

#[test]
#[cfg(feature = "emulated")]
fn what_e4m3_cannot_be_multiplied_as_is_refused() {
    let copy = narrowed("llama-lm", 40);
    let device = Place::Gpu(plumb_kernels::gpu::Gpu::emulated());
    let load = |dtype| LoadedModel::load(&source(copy.path()), &options(dtype, device.clone()));
    load(DTypeChoice::Bf16).unwrap();
    explained(load(DTypeChoice::Fp8), &["multiple of 16", "40", "bf16"]);
}

#[test]
fn what_is_quantised_already_is_not_rounded_again() {
    let path = fixture("gguf/qwen2-lm.gguf");
    explained(LoadedModel::load(&source(&path), &options(DTypeChoice::Fp8, Place::Cpu)), &["fp8", "quantised already"]);
}

/// What llm-compressor writes into `config.json` with its scheme FP8_DYNAMIC.
fn quantization_config() -> serde_json::Value {
    let of = |strategy: &str, dynamic: bool| {
        json!({
            "actorder": null, "block_structure": null, "dynamic": dynamic, "group_size": null, "num_bits": 8,
            "observer": if dynamic { json!(null) } else { json!("minmax") }, "observer_kwargs": {},
            "strategy": strategy, "symmetric": true, "type": "float",
        })
    };
    json!({
        "config_groups": { "group_0": {
            "input_activations": of("token", true), "output_activations": null, "targets": ["Linear"],
            "weights": of("channel", false),
        } },
        "format": "float-quantized", "global_compression_ratio": 1.46, "ignore": ["lm_head"], "kv_cache_scheme": null,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    })
}

/// A copy in which the linear layers are e4m3 with scales in bf16, and what their values are.
fn compressed(name: &str) -> (Copy, Copy) {
    let (copy, plain) = (Copy::of(name), Copy::of(name));
    copy.edit("config.json", |config| config["quantization_config"] = quantization_config());
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    copy.edit_tensors(|all| tensors = all.clone());
    let mut stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let bf16_bytes = |values: &[f32]| -> Vec<u8> {
        values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
    };
    let mut expanded = HashMap::new();
    for (name, tensor) in &tensors {
        if !is_inner(name, tensor) {
            stored.push((name.clone(), Dtype::BF16, tensor.dims().to_vec(), bf16_bytes(&values(tensor))));
            continue;
        }
        let mut rows = fp8_rows(tensor);
        rows.scales.iter_mut().for_each(|scale| *scale = half::bf16::from_f32(*scale).to_f32());
        let scales = format!("{}.weight_scale", name.strip_suffix(".weight").unwrap());
        stored.push((scales, Dtype::BF16, vec![rows.rows(), 1], bf16_bytes(&rows.scales)));
        expanded.insert(name.clone(), Tensor::from_vec(rows.expand::<f32>(), tensor.dims(), &Device::Cpu).unwrap());
        stored.push((name.clone(), Dtype::F8_E4M3, tensor.dims().to_vec(), rows.codes));
    }
    let views = stored
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    plain.edit_tensors(|all| {
        for (name, tensor) in all.iter_mut() {
            *tensor = match expanded.remove(name) {
                Some(expanded) => expanded,
                None => tensor.to_dtype(TensorType::BF16).unwrap(),
            };
        }
    });
    (copy, plain)
}

#[test]
fn a_checkpoint_in_e4m3_is_read() {
    for name in ["llama-lm", "qwen2-pm"] {
        let (copy, plain) = compressed(name);
        let (expected, bytes) = run(plain.path(), &options(DTypeChoice::Bf16, Place::Cpu));
        for dtype in [DTypeChoice::Auto, DTypeChoice::Bf16, DTypeChoice::Fp8] {
            assert!(run(copy.path(), &options(dtype, Place::Cpu)) == (expected.clone(), bytes), "{name} {dtype:?}");
        }
        let wide = run(copy.path(), &options(DTypeChoice::F32, Place::Cpu));
        assert_eq!(wide, run(plain.path(), &options(DTypeChoice::F32, Place::Cpu)), "{name}");
        #[cfg(feature = "emulated")]
        {
            let device = Place::Gpu(plumb_kernels::gpu::Gpu::emulated());
            let wide = options(DTypeChoice::F32, device.clone());
            assert_eq!(run(copy.path(), &wide), run(plain.path(), &wide), "{name}");
            let (found, fewer) = run(copy.path(), &options(DTypeChoice::Auto, device));
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.5 && fewer < bytes, "{name}: {worst}");
        }
        let mut checkpoint = Checkpoint::open(&source(copy.path())).unwrap();
        let weight = "model.layers.0.mlp.down_proj.weight";
        assert!(!checkpoint.weights.contains("model.layers.0.mlp.down_proj.weight_scale"));
        let stored = checkpoint.weights.take_stored(weight, &[32, 48]).unwrap();
        assert!(matches!(stored, Stored::Fp8(_)));
    }
}

#[test]
fn other_kinds_of_e4m3_are_refused() {
    let (copy, _) = compressed("llama-lm");
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        copy.edit("config.json", |config| {
            config["quantization_config"] = quantization_config();
            change(&mut config["quantization_config"]);
        });
        explained(Checkpoint::open(&source(copy.path())), &["quantization_config", "FP8-Dynamic"]);
    };
    refused(&|config| config["format"] = json!("int-quantized"));
    refused(&|config| config["kv_cache_scheme"] = json!({ "num_bits": 8 }));
    refused(&|config| config["config_groups"]["group_0"]["weights"]["strategy"] = json!("tensor"));
    refused(&|config| config["config_groups"]["group_0"]["weights"]["num_bits"] = json!(4));
    refused(&|config| config["config_groups"]["group_0"]["input_activations"]["dynamic"] = json!(false));
    refused(&|config| config["config_groups"]["group_0"]["input_activations"] = json!(null));
    refused(&|config| drop(config.as_object_mut().unwrap().remove("config_groups")));
}

#[test]
fn the_types_are_told_apart() {
    let load = |dtype| LoadedModel::load(&source(&fixture("llama-pm")), &options(dtype, Place::Cpu)).unwrap();
    let [fp8, bf16] = [load(DTypeChoice::Fp8), load(DTypeChoice::Bf16)];
    assert_eq!((fp8.info.dtype, bf16.info.dtype, fp8.decoder.dtype()), ("fp8", "bf16", DType::Bf16));
    assert_ne!(fp8.info.weights_digest, bf16.info.weights_digest);
}
