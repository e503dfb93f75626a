//! A second opinion: candle-transformers' Llama on random token sequences, which the golden values do not hold.

use std::path::PathBuf;

use candle_core::{DType as TensorType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::decoder::{DType, Decoder, Read, Step, StepSequence};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

#[test]
fn random_sequences_agree_with_an_independent_llama() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-lm");

    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let theirs: Config = serde_json::from_str::<LlamaConfig>(&config).unwrap().into_config(false);
    let weights = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let llama = Llama::load(VarBuilder::from_tensors(weights, TensorType::F32, &Device::Cpu), &theirs).unwrap();

    let source = Source { model: folder.to_string_lossy().into_owned(), adapter: None, revision: None };
    let mut checkpoint = Checkpoint::open(&source).unwrap();
    let vocabulary = checkpoint.config.vocab_size as u32;
    let ours =
        Decoder::build(&checkpoint.config, &mut checkpoint.weights, DType::F32, 512, &Default::default()).unwrap();

    let sequences = proptest::collection::vec(0..vocabulary, 1..200);
    TestRunner::new(ProptestConfig::with_cases(32))
        .run(&sequences, |tokens| {
            let (mut kv, mut workspace) = (ours.kv_store(8).unwrap(), ours.workspace());
            let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE) as u32).collect();
            let sequence = StepSequence { tokens: &tokens, position: 0, pages: &pages, read: Read::LastLogits };
            let found = ours.step(&Step { sequences: vec![sequence] }, &mut kv, &mut workspace).unwrap().remove(0);

            let mut cache = Cache::new(false, TensorType::F32, &theirs, &Device::Cpu).unwrap();
            let input = Tensor::new(tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let expected: Vec<f32> =
                llama.forward(&input, 0, &mut cache).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
            for (a, b) in found.iter().zip(&expected) {
                prop_assert!((a - b).abs() < 1e-4, "{} tokens: {} {}", tokens.len(), a, b);
            }
            Ok(())
        })
        .unwrap();
}
