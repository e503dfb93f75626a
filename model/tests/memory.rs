//! What a load takes, it gives back: a process of its own, whose memory nobody else uses.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use plumb_model::checkpoint::Source;
use plumb_model::checkpoint::manifest::Manifest;
use plumb_model::decoder::StepSize;
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel};
use serde_json::Value;
use tempfile::TempDir;

const LOADS: usize = 50;
const SOME: usize = 15;
/// Bytes that come and go with where things lie: what the arenas of the loading thread and of this one keep at their ends,
/// 2 MiB each at most.
const ARENAS: u64 = 4 << 20;
/// The process without a model; the model has 34 MiB as bf16, and as many again as f32.
const SMALL: u64 = 30 << 20;

/// Bytes of this process that are in memory and belong to no file.
fn resident() -> u64 {
    status("RssAnon:")
}

/// The most that was resident since it was asked to forget, files included.
fn peak() -> u64 {
    status("VmHWM:")
}

fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The Llama fixture, wide enough for its tensors to be of the sizes that an allocator treats in different ways.
fn wide() -> TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-lm");
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(fixture.join(name), folder.path().join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
    let (hidden, inner, layers, vocabulary) = (512, 1536, 2, 12_000);
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", inner),
        ("num_hidden_layers", layers),
        ("vocab_size", vocabulary),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 64),
    ] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = false.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::BF16, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), ones(&[vocabulary, hidden])),
        ("lm_head.weight".to_owned(), ones(&[vocabulary, hidden])),
        ("model.norm.weight".to_owned(), ones(&[hidden])),
    ]);
    for layer in 0..layers {
        for (name, shape) in [
            ("self_attn.q_proj", &[512, hidden][..]),
            ("self_attn.k_proj", &[256, hidden]),
            ("self_attn.v_proj", &[256, hidden]),
            ("self_attn.o_proj", &[hidden, 512]),
            ("mlp.gate_proj", &[inner, hidden]),
            ("mlp.up_proj", &[inner, hidden]),
            ("mlp.down_proj", &[hidden, inner]),
            ("input_layernorm", &[hidden]),
            ("post_attention_layernorm", &[hidden]),
        ] {
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), ones(shape));
        }
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

fn options(dtype: DTypeChoice) -> LoadOptions {
    let background = Background { threads: NonZeroUsize::new(1), ..Background::default() };
    LoadOptions {
        dtype,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 24,
        device: Default::default(),
        background,
    }
}

fn load(folder: &Path, dtype: DTypeChoice) -> plumb_model::Result<LoadedModel> {
    LoadedModel::load(&Source { model: folder.to_str().unwrap().to_owned(), ..Source::default() }, &options(dtype))
}

/// Does something again and again, and compares the most that was resident after one of the first times, and of the
/// last: between two of them, what an arena keeps goes up and down.
fn stays_flat(what: &str, once: impl Fn(usize)) {
    let after_each: Vec<u64> = (0..LOADS)
        .map(|i| {
            once(i);
            resident()
        })
        .collect();
    let most = |loads: &[u64]| loads.iter().copied().max().unwrap();
    let (first, last) = (most(&after_each[..SOME]), most(&after_each[LOADS - SOME..]));
    println!("{what}: {} KiB, at last {} KiB", first >> 10, last >> 10);
    assert!(last <= first + (first / 20).max(ARENAS), "{what}: {after_each:?}");
    assert!(last < SMALL, "{what}: {last} bytes are kept, of a model that is gone");
}

fn broken(break_it: impl FnOnce(&Path)) -> TempDir {
    let folder = wide();
    break_it(folder.path());
    folder
}

fn edit(folder: &Path, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let file: PathBuf = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, file).unwrap();
}

/// One test, so that nothing else runs in the process.
#[test]
fn loads_that_end_and_loads_that_fail_give_their_memory_back() {
    // As the first load does: the checkpoints below are made in this process too.
    plumb_kernels::memory::return_large_arrays();
    let whole = wide();
    let missing = broken(|folder| edit(folder, |tensors| drop(tensors.remove("model.layers.1.mlp.down_proj.weight"))));
    let misshapen = broken(|folder| {
        edit(folder, |tensors| {
            let wrong = Tensor::ones(&[512, 2047], DType::BF16, &Device::Cpu).unwrap();
            tensors.insert("model.layers.1.mlp.down_proj.weight".to_owned(), wrong);
        })
    });
    let corrupt = broken(|folder| {
        Manifest::write(folder, &[]).unwrap();
        let file = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(file, bytes).unwrap();
    });
    // The order of the tensors is that of the checks: a load that fails late has packed most of the model.
    for (what, folder, words) in [
        ("a missing tensor", &missing, "is missing"),
        ("a misshapen tensor", &misshapen, "has shape"),
        ("a corrupt byte", &corrupt, "sha256"),
    ] {
        stays_flat(what, |_| match load(folder.path(), DTypeChoice::F32) {
            Err(error) => assert!(error.to_string().contains(words), "{what}: {error}"),
            Ok(_) => panic!("{what}: loaded"),
        });
    }
    stays_flat("a model as f32 and as bf16, with its cache", |i| {
        let model = load(whole.path(), [DTypeChoice::F32, DTypeChoice::Bf16][i % 2]).unwrap();
        drop(model.decoder.kv_store(model.kv_pages).unwrap());
    });

    // What is foretold is what is taken.
    let source = Source { model: whole.path().to_str().unwrap().to_owned(), ..Source::default() };
    for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
        let footprint = LoadedModel::footprint(&source, &options(dtype), StepSize { tokens: 1, sequences: 1 }).unwrap();
        let before = resident();
        // Forgets the peak so far.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let start = peak();
        let model = load(whole.path(), dtype).unwrap();
        let most = peak() - start;
        let foretold = footprint.weights + footprint.tables + footprint.tokenizer + footprint.reading;
        println!("{dtype:?}: at most {foretold} foretold while it is read, {most} taken");
        assert!(most.abs_diff(foretold) < foretold / 10, "{footprint}: {most} while it is read");
        let kv = model.decoder.kv_store(model.kv_pages).unwrap();
        let taken = resident() - before;
        println!("{dtype:?}: foretold {}, taken {taken}", footprint.lasting());
        assert!(taken.abs_diff(footprint.lasting()) < footprint.lasting() / 10, "{footprint}: {taken}");
        drop((model, kv));
    }
}
