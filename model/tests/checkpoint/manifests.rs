//! Manifests, the digest, and publishing.

use std::path::Path;

use plumb_model::checkpoint::Checkpoint;
use plumb_model::checkpoint::manifest::{Manifest, publish};

use crate::support::{Copy, fixture, open, open_with_adapter, source, take_all};

#[test]
fn a_manifest_is_verified_and_does_not_change_the_digest() {
    let copy = Copy::of("llama-lm-sharded");
    let digest = copy.open().unwrap().files_digest;
    assert_eq!(digest.len(), 64);
    assert_eq!(Manifest::read(copy.path()).unwrap(), None);
    let written = Manifest::write(copy.path(), &[]).unwrap();
    let read = Manifest::read(copy.path()).unwrap().unwrap();
    assert_eq!(read, written);
    assert!(read.files().contains_key("config.json") && read.files().contains_key("expected.json"));
    read.verify(copy.path()).unwrap();
    assert_eq!(copy.open().unwrap().files_digest, digest);

    for file in ["model-00002-of-00002.safetensors", "tokenizer.json", "expected.json"] {
        let copy = Copy::of("llama-lm-sharded");
        Manifest::write(copy.path(), &[]).unwrap();
        copy.flip_last_byte(file);
        copy.refused(&[file, "sha256", "manifest.json says", "publish the version again"]);
        std::fs::remove_file(copy.path().join(file)).unwrap();
        assert!(Manifest::read(copy.path()).unwrap().unwrap().verify(copy.path()).is_err());
    }
}

#[test]
fn a_file_that_the_manifest_does_not_list_is_refused() {
    let copy = Copy::of("llama-lm");
    Manifest::write(copy.path(), &[]).unwrap();
    copy.write("special_tokens_map.json", "{}");
    copy.refused(&["special_tokens_map.json", "does not list"]);
}

#[test]
fn senseless_manifests_are_refused() {
    let copy = Copy::of("llama-lm");
    let digest = "0".repeat(64);
    for (text, word) in [
        ("{".to_owned(), "not valid JSON"),
        (r#"{"files": {}}"#.to_owned(), "format"),
        (r#"{"format": 2, "files": {}}"#.to_owned(), "format 2"),
        (format!(r#"{{"format": 1, "files": {{"../x": "{digest}"}}}}"#), "`../x`"),
        (r#"{"format": 1, "files": {"config.json": "12"}}"#.to_owned(), "64 hexadecimal"),
    ] {
        copy.write("manifest.json", &text);
        copy.refused(&["manifest.json", word]);
    }
}

#[test]
fn the_digest_follows_every_file_that_is_read() {
    let digest = |copy: &Copy| copy.open().unwrap().files_digest;
    let copy = Copy::of("llama-lm");
    let plain = digest(&copy);
    assert_eq!(digest(&Copy::of("llama-lm")), plain);
    copy.write("notes.txt", "not read");
    assert_eq!(digest(&copy), plain);
    copy.write("chat_template.jinja", "changed");
    assert_ne!(digest(&copy), plain);
    let adapted = open_with_adapter(&fixture("llama-lm"), &fixture("lora-pm")).unwrap();
    assert_ne!(adapted.files_digest, plain);
}

#[test]
fn publishing_numbers_versions_and_never_replaces_one() {
    let root = tempfile::tempdir().unwrap();
    let publish = |version| publish(&fixture("llama-pm"), root.path(), "pm", version, &[], &[]);
    let versions = root.path().join("pm");
    assert_eq!(publish(None).unwrap(), versions.join("1"));
    assert_eq!(publish(Some(7)).unwrap(), versions.join("7"));
    assert_eq!(publish(None).unwrap(), versions.join("8"));
    let error = publish(Some(7)).unwrap_err().to_string();
    assert!(error.contains("exists") && error.contains("7"), "{error}");
    let published = Checkpoint::open(&source(&versions.join("8"))).unwrap();
    assert_eq!(published.files_digest, open("llama-pm").files_digest);
    take_all(published).unwrap();
    // Nothing half-written is left.
    assert_eq!(std::fs::read_dir(versions).unwrap().count(), 3);
}

#[test]
fn files_that_are_added_are_listed_and_take_the_place_of_others() {
    let root = tempfile::tempdir().unwrap();
    let copy = Copy::of("llama-pm");
    copy.write("README.md", "old");
    let added = [("README.md", "new"), ("notes.txt", "added")];
    let folder = publish(copy.path(), root.path(), "pm", None, &added, &[]).unwrap();
    for (name, content) in added {
        assert_eq!(std::fs::read_to_string(folder.join(name)).unwrap(), content);
    }
    let manifest = Manifest::read(&folder).unwrap().unwrap();
    assert!(added.iter().all(|(name, _)| manifest.files().contains_key(*name)));
    manifest.verify(&folder).unwrap();
}

#[test]
fn two_that_publish_at_once_get_two_versions() {
    let root = tempfile::tempdir().unwrap();
    let folders: Vec<_> = std::thread::scope(|scope| {
        let publish = || publish(&fixture("qwen2-pm"), root.path(), "pm", None, &[], &[]).unwrap();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(publish)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut versions: Vec<_> = folders.iter().map(|folder| folder.file_name().unwrap().to_str().unwrap()).collect();
    versions.sort_unstable();
    assert_eq!(versions, ["1", "2", "3", "4"]);
}

#[test]
fn what_cannot_be_published_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let refused = |source: &Path, name: &str, word: &str| {
        let error = publish(source, root.path(), name, None, &[], &[]).unwrap_err().to_string();
        assert!(error.contains(word), "`{word}` is not in: {error}");
    };
    for name in ["", "..", "a/b", ".hidden"] {
        refused(&fixture("llama-pm"), name, "name of a model");
    }
    let copy = Copy::of("llama-pm");
    std::fs::create_dir(copy.path().join("runs")).unwrap();
    refused(copy.path(), "pm", "runs");
    refused(&fixture("gguf"), "pm", "config.json");
    assert_eq!(std::fs::read_dir(root.path().join("pm")).unwrap().count(), 0);
}
