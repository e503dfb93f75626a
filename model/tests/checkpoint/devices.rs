//! What a GPU computes in ways of its own, against the CPU.

#![cfg(feature = "emulated")]

use plumb_kernels::gpu::Gpu;
use plumb_model::checkpoint::Checkpoint;
use plumb_model::decoder::{DType, Decoder, Device, Read, Step, StepSequence};
use serde_json::json;

use crate::support::{Copy, fixture, source};

/// Few rows meet quantised weights in another way than many do, unless that is not to be.
#[test]
fn on_invariant_gpus_that_share_a_model_a_text_has_the_same_bits_beside_others() {
    let both = Device::split(vec![Device::Gpu(Gpu::emulated()), Device::Gpu(Gpu::emulated())]).unwrap();
    let texts = [0, 1, 2].map(|text| (0..30).map(|i| (i * 11 + text) % 250).collect::<Vec<u32>>());
    let beside_others = |device: &Device, count: u32| {
        let mut checkpoint = Checkpoint::open(&source(&fixture("gguf/qwen2-lm.gguf"))).unwrap();
        let decoder = Decoder::build(&checkpoint.config, &mut checkpoint.weights, DType::F32, 64, device).unwrap();
        let pages: Vec<[u32; 1]> = (0..count).map(|page| [page]).collect();
        let sequence = |(tokens, pages)| {
            let (tokens, pages): (&Vec<u32>, &[u32; 1]) = (tokens, pages);
            StepSequence { tokens, position: 0, pages, read: Read::LogProbs { rows: 0..29, targets: &tokens[1..] } }
        };
        let step = Step { sequences: texts.iter().zip(&pages).map(sequence).collect() };
        decoder.step(&step, &mut decoder.kv_store(3).unwrap(), &mut decoder.workspace()).unwrap().remove(0)
    };
    assert_eq!(beside_others(&both.invariant(), 1), beside_others(&both.invariant(), 3));
    assert_ne!(beside_others(&both, 1), beside_others(&both, 3), "a test that shows nothing");
}

/// The non-linearity of a feed-forward without a gate, where cuBLASLt has the same one, is a part of the product.
#[test]
fn a_non_linearity_in_the_product_is_that_of_the_cpu() {
    let copy = Copy::of("neox-lm");
    copy.edit("config.json", |config| config["hidden_act"] = json!("gelu_new"));
    let tokens: Vec<u32> = (0..21).map(|i| i * 11 % 250).collect();
    let run = |device: &Device, dtype| {
        let mut checkpoint = Checkpoint::open(&source(copy.path())).unwrap();
        let decoder = Decoder::build(&checkpoint.config, &mut checkpoint.weights, dtype, 64, device).unwrap();
        let read = Read::LogProbs { rows: 0..20, targets: &tokens[1..] };
        let sequence = StepSequence { tokens: &tokens, position: 0, pages: &[0], read };
        let (mut kv, mut workspace) = (decoder.kv_store(1).unwrap(), decoder.workspace());
        decoder.step(&Step { sequences: vec![sequence] }, &mut kv, &mut workspace).unwrap().remove(0)
    };
    let gpu = Gpu::emulated();
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 3e-2)] {
        let expected = run(&Device::Cpu, dtype);
        for gpu in [gpu.clone(), gpu.clone().invariant()] {
            let found = run(&Device::Gpu(gpu), dtype);
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "{dtype:?}: {worst}");
        }
    }
}
