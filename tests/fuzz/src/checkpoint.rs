//! What a checkpoint may hold: each file of a folder, and GGUF.

use std::path::Path;

use plumb_model::checkpoint::manifest::Manifest;
use plumb_model::checkpoint::{Checkpoint, Source, read_config};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel};
use plumb_model::text::{RenderMode, RenderOptions, TextInput, TextPipeline};
use tempfile::TempDir;

use crate::template::{HHH, text_config};
use crate::{Target, folder};

/// `config.json`, or `adapter_config.json` if it says `peft_type`.
pub const CONFIG: Target = Target { name: "config", take: config, fixed: 64 << 20, per_byte: 256 };

/// `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, and a text that goes there and back.
pub const TOKENIZER: Target = Target { name: "tokenizer", take: tokenizer, fixed: 64 << 20, per_byte: 4096 };

/// `model.safetensors` of a tiny model; `adapter_model.safetensors` if it says `lora_`; an index if it begins with `{`.
pub const SAFETENSORS: Target = Target { name: "safetensors", take: safetensors, fixed: 64 << 20, per_byte: 256 };

/// A GGUF file, up to a model that could run.
pub const GGUF: Target = Target { name: "gguf", take: gguf, fixed: 64 << 20, per_byte: 4096 };

/// `manifest.json` of a folder with two files.
pub const MANIFEST: Target = Target { name: "manifest", take: manifest, fixed: 64 << 20, per_byte: 256 };

/// The files of a model with 8 tokens and a layer of 4 x 4, all of whose weights are 0: read at once.
const TINY: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../tiny/config.json")),
    ("tokenizer.json", include_bytes!("../tiny/tokenizer.json")),
    ("model.safetensors", include_bytes!("../tiny/model.safetensors")),
];

fn tiny(replaced: &[(&str, &[u8])]) -> TempDir {
    let kept = TINY.into_iter().filter(|(name, _)| replaced.iter().all(|(other, _)| name != other));
    folder::with(&kept.chain(replaced.iter().copied()).collect::<Vec<_>>())
}

fn source(model: &Path, adapter: Option<&Path>) -> Source {
    let name = |path: &Path| path.to_string_lossy().into_owned();
    Source { model: name(model), adapter: adapter.map(name), revision: None }
}

fn load(source: &Source) {
    let hhh = HHH.clone();
    let _ = LoadedModel::load(
        source,
        &LoadOptions {
            dtype: DTypeChoice::Auto,
            hhh,
            max_input_tokens: Some(64),
            kv_cache_bytes: 1 << 20,
            device: Default::default(),
            background: Default::default(),
        },
    );
}

fn config(data: &[u8]) {
    if contains(data, b"peft_type") {
        let adapter = folder::with(&[
            ("adapter_config.json", data),
            ("adapter_model.safetensors", include_bytes!("../tiny/adapter_model.safetensors")),
        ]);
        load(&source(tiny(&[]).path(), Some(adapter.path())));
    } else {
        let _ = read_config(folder::with(&[("config.json", data)]).path());
    }
}

fn tokenizer(data: &[u8]) {
    let mut parts = data.splitn(4, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or(b"{}");
    let (tokenizer, tokenizer_config, generation, text) = (next(), next(), next(), next());
    let folder = tiny(&[
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ]);
    let Ok(checkpoint) = Checkpoint::open(&source(folder.path(), None)) else { return };
    let Ok(pipeline) = TextPipeline::new(text_config(checkpoint)) else { return };
    let input = TextInput::Text(String::from_utf8_lossy(text).into_owned());
    if let Ok(rendered) = pipeline.render(&input, &RenderOptions::default(), RenderMode::Score) {
        let _ = pipeline.decode(&rendered.ids);
        let mut stream = pipeline.stream_decoder();
        for id in rendered.ids {
            let _ = (stream.push(id), pipeline.token_text(id));
        }
        let _ = stream.finish();
    }
}

fn safetensors(data: &[u8]) {
    if data.starts_with(b"{") {
        let folder = folder::with(&[
            TINY[0],
            TINY[1],
            ("model.safetensors.index.json", data),
            ("a.safetensors", TINY[2].1),
            ("b.safetensors", include_bytes!("../tiny/adapter_model.safetensors")),
        ]);
        let _ = Checkpoint::open(&source(folder.path(), None));
    } else if contains(data, b"lora_") {
        let adapter = folder::with(&[
            ("adapter_config.json", include_bytes!("../tiny/adapter_config.json")),
            ("adapter_model.safetensors", data),
        ]);
        load(&source(tiny(&[]).path(), Some(adapter.path())));
    } else {
        load(&source(tiny(&[("model.safetensors", data)]).path(), None));
    }
}

fn gguf(data: &[u8]) {
    let folder = folder::with(&[("model.gguf", data)]);
    load(&source(&folder.path().join("model.gguf"), None));
}

fn manifest(data: &[u8]) {
    let folder = folder::with(&[("manifest.json", data), TINY[0], TINY[1]]);
    if let Ok(Some(manifest)) = Manifest::read(folder.path()) {
        let _ = manifest.verify(folder.path());
    }
}

fn contains(data: &[u8], text: &[u8]) -> bool {
    data.windows(text.len()).any(|window| window == text)
}
