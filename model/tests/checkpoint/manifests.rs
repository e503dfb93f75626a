//! Manifests, the digest, and publishing.

use std::path::Path;

use plumb_model::checkpoint::Checkpoint;
use plumb_model::checkpoint::manifest::{Manifest, Probe, ProbeInput, publish};
use plumb_model::decoder::DType;

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

fn many_files(count: usize, digest: &str) -> String {
    (0..count).map(|i| format!(r#""{i}": "{digest}""#)).collect::<Vec<_>>().join(", ")
}

fn many_probes(count: usize) -> String {
    vec![r#"{"text": "a", "score": 1, "dtype": "f32"}"#; count].join(", ")
}

#[test]
fn what_a_manifest_lists_is_a_plain_file_of_its_folder() {
    use std::os::unix::fs::symlink;

    // A link, be it to a file of the same content, and one to what never ends.
    let elsewhere = Copy::of("llama-lm");
    for target in [elsewhere.path().join("expected.json"), "/dev/zero".into()] {
        let copy = Copy::of("llama-lm");
        Manifest::write(copy.path(), &[]).unwrap();
        copy.remove("expected.json");
        symlink(target, copy.path().join("expected.json")).unwrap();
        copy.refused(&["expected.json", "not a plain file"]);
    }
    let copy = Copy::of("llama-lm");
    Manifest::write(copy.path(), &[]).unwrap();
    copy.remove("expected.json");
    std::fs::create_dir(copy.path().join("expected.json")).unwrap();
    copy.refused(&["expected.json", "not a plain file"]);

    let copy = Copy::of("llama-lm");
    Manifest::write(elsewhere.path(), &[]).unwrap();
    symlink(elsewhere.path().join("manifest.json"), copy.path().join("manifest.json")).unwrap();
    copy.refused(&["manifest.json", "not a plain file"]);
}

#[test]
fn a_file_that_was_cut_is_found_by_its_size() {
    let copy = Copy::of("llama-lm");
    Manifest::write(copy.path(), &[]).unwrap();
    let weights = copy.path().join("model.safetensors");
    let size = std::fs::metadata(&weights).unwrap().len();
    std::fs::File::options().write(true).open(&weights).unwrap().set_len(size - 4).unwrap();
    copy.refused(&["model.safetensors", &format!("{} bytes, manifest.json says {size}", size - 4)]);
}

#[test]
fn manifests_without_sizes_and_probes_are_read() {
    let copy = Copy::of("llama-lm");
    let whole = Manifest::write(copy.path(), &[]).unwrap();
    copy.edit("manifest.json", |manifest| drop(manifest.as_object_mut().unwrap().remove("sizes")));
    let old = Manifest::read(copy.path()).unwrap().unwrap();
    assert_eq!((old.files(), old.probes()), (whole.files(), &[][..]));
    take_all(copy.open().unwrap()).unwrap();
}

#[test]
fn probes_go_with_a_version_and_not_with_an_adapter_on_top_of_it() {
    let copy = Copy::of("llama-lm");
    let probe = Probe { input: ProbeInput::Text("ab".to_owned()), score: -2.5, dtype: DType::F32 };
    Manifest::write(copy.path(), std::slice::from_ref(&probe)).unwrap();
    assert_eq!(copy.open().unwrap().probes, std::slice::from_ref(&probe));
    assert_eq!(copy.open().unwrap().files_digest, open("llama-lm").files_digest, "probes are no part of the digest");
    assert_eq!(open_with_adapter(copy.path(), &fixture("lora-lm")).unwrap().probes, []);
    assert_eq!(open("llama-lm").probes, []);
    let error = Manifest::write(copy.path(), &vec![probe.clone(); 65]).unwrap_err().to_string();
    assert!(error.contains("65 probes"), "{error}");
    let long = Probe { input: ProbeInput::Text("a".repeat(1 << 20)), ..probe };
    let error = Manifest::write(copy.path(), &[long]).unwrap_err().to_string();
    assert!(error.contains("shorter probes"), "{error}");
}

/// Files that begin like drafts, beside the versions.
fn drafts(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("pm")).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect()
}

#[test]
#[cfg(target_os = "linux")]
fn what_killed_publishers_have_left_is_removed_and_what_others_write_is_not() {
    let root = tempfile::tempdir().unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().replace('-', "");
    let make = |name: &str| {
        let folder = root.path().join("pm").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("model.safetensors"), "half").unwrap();
        std::fs::File::open(folder).unwrap()
    };
    // Of this machine: one whose process is gone, and one that somebody holds.
    make(&format!(".publishing-{boot}-1-1"));
    let held = make(&format!(".publishing-{boot}-1-2"));
    held.lock().unwrap();
    // Of another one: a fresh one, and one that nobody has touched for days.
    make(".publishing-0f0f0f0f-1-3");
    let days_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3 * 24 * 60 * 60);
    make(".publishing-0f0f0f0f-1-4").set_modified(days_ago).unwrap();
    publish(&fixture("llama-pm"), root.path(), "pm", None, &[], &[]).unwrap();
    let mut left = drafts(root.path());
    left.sort();
    assert_eq!(left, [".publishing-0f0f0f0f-1-3".to_owned(), format!(".publishing-{boot}-1-2")]);
}

#[test]
fn senseless_manifests_are_refused() {
    let copy = Copy::of("llama-lm");
    let digest = "0".repeat(64);
    for (text, word) in [
        ("{".to_owned(), "not a manifest"),
        (r#"{"files": {}}"#.to_owned(), "format"),
        (r#"{"format": 2, "files": {}}"#.to_owned(), "format 2"),
        (format!(r#"{{"format": 1, "files": {{"../x": "{digest}"}}}}"#), "`../x`"),
        (r#"{"format": 1, "files": {"config.json": "12"}}"#.to_owned(), "64 hexadecimal"),
        (r#"{"format": 1, "files": {}, "sizes": {"x": 1}}"#.to_owned(), "a size for `x`"),
        (r#"{"format": 1, "files": {}, "probes": [{"text": "a", "score": 1}]}"#.to_owned(), "missing field `dtype`"),
        (format!(r#"{{"format": 1, "files": {{{}}}}}"#, many_files(1025, &digest)), "1025 files"),
        (format!(r#"{{"format": 1, "files": {{}}, "probes": [{}]}}"#, many_probes(65)), "65 probes"),
        (format!(r#"{{"format": 1, "files": {{}}, "probes": [{}]}}"#, " ".repeat(1 << 20)), "are allowed"),
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
