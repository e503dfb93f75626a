//! What a GPU computes in ways of its own, against the CPU.

#![cfg(feature = "emulated")]

use plumb_kernels::gpu::Gpu;
use plumb_model::checkpoint::Checkpoint;
use plumb_model::decoder::{DType, Decoder, Device, Read, Step, StepSequence};
use serde_json::json;

use crate::support::{Copy, source};

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
