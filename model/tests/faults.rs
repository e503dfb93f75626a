//! Loads from a disk, and with memory, that fail on demand. Only with the feature `faults`, which the whole-system tests
//! switch on: `cargo test -p plumb-model --features faults --test faults`.

#![cfg(feature = "faults")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;

use plumb_model::checkpoint::Source;
use plumb_model::checkpoint::manifest::Manifest;
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel};

fn load(folder: &Path) -> plumb_model::Result<LoadedModel> {
    let options = LoadOptions {
        dtype: DTypeChoice::Auto,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 24,
        device: Default::default(),
        background: Background { threads: NonZeroUsize::new(1), ..Background::default() },
    };
    LoadedModel::load(&Source { model: folder.to_str().unwrap().to_owned(), ..Source::default() }, &options)
}

/// The variable that names the file has to be there before the first thread: this program again, with it.
#[test]
fn a_disk_or_an_allocator_that_fails_is_an_error_of_the_load() {
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os("PLUMB_FAULTS").is_none() {
        let again = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_disk_or_an_allocator_that_fails_is_an_error_of_the_load"])
            .env("PLUMB_FAULTS", folder.path().join("faults"))
            .status();
        assert!(again.unwrap().success());
        return;
    }
    let faults = PathBuf::from(std::env::var_os("PLUMB_FAULTS").unwrap());
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-pm");
    for entry in std::fs::read_dir(fixture).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    Manifest::write(folder.path(), &[]).unwrap();
    let size = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
    let with = |line: &str| {
        std::fs::write(&faults, line).unwrap();
        load(folder.path())
    };
    for (line, words) in [
        (format!("corrupt-byte {}", size - 1), "sha256"),
        (format!("short-read {}", size - 1), "sha256"),
        ("short-read 3".to_owned(), "manifest.json: not a manifest"),
        ("failed-allocation 0".to_owned(), "not enough memory"),
        // Half-way through.
        ("failed-allocation 20000".to_owned(), "not enough memory"),
    ] {
        let error = with(&line).unwrap_err().to_string();
        assert!(error.contains(words), "{line}: {error}");
    }
    let model = with("slow-read 1").unwrap();
    std::fs::write(&faults, "failed-allocation 1000").unwrap();
    let error = model.decoder.kv_store(model.kv_pages).unwrap_err().to_string();
    assert!(error.contains("not enough memory"), "{error}");
    std::fs::write(&faults, "").unwrap();
    model.decoder.kv_store(model.kv_pages).unwrap();
}
