//! GGUF files: the committed ones, and others written here.

use candle_core::DType;
use plumb_model::checkpoint::Checkpoint;
use plumb_model::config::RopeScaling;

use crate::support::{fixture, largest_difference, open, source, take_all};

#[test]
fn a_gguf_file_is_the_checkpoint_that_it_was_written_from() {
    for (name, dtype, tolerance) in [("llama-lm", DType::F16, 1e-6), ("qwen2-lm", DType::BF16, 0.01)] {
        let gguf = open(&format!("gguf/{name}.gguf"));
        assert_eq!(gguf.stored_dtype, dtype);
        let folder = open(name);
        let mut expected = folder.config.clone();
        expected.architecture = gguf.config.architecture.clone();
        if name == "llama-lm" {
            assert_ne!(expected.rope.scaling, RopeScaling::None);
            expected.rope.scaling = RopeScaling::None;
        }
        assert_eq!(gguf.config, expected);
        let (gguf, folder) = (take_all(gguf).unwrap(), take_all(folder).unwrap());
        for (tensor, value) in &folder {
            assert!(largest_difference(value, &gguf[tensor]) <= tolerance, "{name} {tensor}");
        }
    }
}

#[test]
fn damaged_gguf_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let good = std::fs::read(fixture("gguf/llama-lm.gguf")).unwrap();
    let check = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&source(&path)).and_then(take_all).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "`{word}` is not in: {error}"));
    };
    check(b"", &["model.gguf", "not GGUF"]);
    check(b"GGUF", &["model.gguf", "not GGUF"]);
    check(&good[..good.len() / 2], &["model.gguf"]);
    check(&good[..good.len() - 64], &["model.gguf", "bytes"]);
    // Counts beyond the file's size.
    for at in [8, 16] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        check(&bad, &["not GGUF"]);
    }
    let replaced = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).unwrap();
        let mut bad = good.clone();
        bad[at..at + to.len()].copy_from_slice(to);
        bad
    };
    check(&replaced(b"llama-bpe", b"unknown-x"), &["tokenizer.ggml.pre", "unknown-x", "qwen2"]);
    check(&replaced(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"), &["architecture `mamba`", "gemma2"]);
    check(&replaced(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), &["model.layers.1.self_attn.q_proj.weight"]);
    check(&replaced(b"llama.block_count", b"llama.block_xxxxx"), &["llama.block_count", "missing"]);
}
