//! `plumb-train` as a program, on the fixtures.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop where it stands, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::Command;

use plumb_model::cache::PAGE;
use plumb_model::checkpoint::Source;
use plumb_model::checkpoint::manifest::{Manifest, Probe, ProbeInput};
use plumb_model::decoder::{Read, Step, StepSequence};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel};
use tempfile::TempDir;

/// Runs the program: its exit code, standard output and standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_plumb-train")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name).canonicalize().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy of a fixture, to be broken.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// The value of a line of `plumb-train`'s answers.
fn value<'a>(answer: &'a str, name: &str) -> &'a str {
    let line = answer.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {answer}"));
    line[name.len()..].trim()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_published_version_loads_and_is_what_was_published() {
    let root = tempfile::tempdir().unwrap();
    let source = fixture("llama-pm");
    let mut digests = Vec::new();
    for version in ["1", "2"] {
        let (code, out, err) = run(&["publish", text(&source), text(root.path()), "--name", "pm"]);
        assert_eq!((code, err.as_str()), (0, ""));
        let folder = root.path().join("pm").join(version);
        assert_eq!(value(&out, "published"), text(&folder));
        let manifest = Manifest::read(&folder).unwrap().unwrap();
        manifest.verify(&folder).unwrap();
        let mut expected = names(&source);
        expected.push("README.md".to_owned());
        expected.sort();
        assert_eq!(manifest.files().keys().cloned().collect::<Vec<_>>(), expected);

        let (code, inspected, _) = run(&["inspect", text(&folder)]);
        assert_eq!(code, 0);
        assert_eq!(value(&inspected, "digest"), value(&out, "digest"));
        digests.push(value(&out, "digest").to_owned());
    }
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0].len(), 64);
    assert_eq!(names(&root.path().join("pm")), ["1", "2"]);
}

#[test]
fn a_version_that_exists_is_refused_and_stays_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let publish =
        |fixture: PathBuf| run(&["publish", text(&fixture), text(root.path()), "--name", "pm", "--version", "7"]);
    assert_eq!(publish(fixture("llama-pm")).0, 0);
    let folder = root.path().join("pm/7");
    let before = Manifest::read(&folder).unwrap().unwrap();
    let (code, out, err) = publish(fixture("qwen2-pm"));
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("plumb-train: ") && err.contains("a published version never changes"), "{err}");
    before.verify(&folder).unwrap();
    assert_eq!(Manifest::read(&folder).unwrap().unwrap(), before);
    assert_eq!(names(&root.path().join("pm")), ["7"]);
}

#[test]
fn what_does_not_load_is_not_published() {
    let check = |source: &Path, name: &str, words: &str| {
        let root = tempfile::tempdir().unwrap();
        let (code, out, err) = run(&["publish", text(source), text(root.path()), "--name", name]);
        assert_eq!((code, out.as_str()), (1, ""), "{words}");
        assert!(err.contains(words), "{words}: {err}");
        assert_eq!(names(root.path()), [""; 0], "{words}");
    };
    let broken = |break_it: &dyn Fn(&Path)| {
        let folder = copy("llama-pm");
        break_it(folder.path());
        folder
    };
    let cut = broken(&|folder| {
        let weights = std::fs::read(folder.join("model.safetensors")).unwrap();
        std::fs::write(folder.join("model.safetensors"), &weights[..weights.len() - 2]).unwrap();
    });
    check(cut.path(), "pm", "model.safetensors");
    let wider = broken(&|folder| {
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let wider = config.replace("\"intermediate_size\": ", "\"intermediate_size\": 1");
        assert_ne!(wider, config);
        std::fs::write(folder.join("config.json"), wider).unwrap();
    });
    check(wider.path(), "pm", "has shape");
    let mute = broken(&|folder| std::fs::remove_file(folder.join("tokenizer.json")).unwrap());
    check(mute.path(), "pm", "tokenizer.json");

    check(&fixture("lora-pm"), "pm", "the folder holds an adapter");
    check(&fixture("gguf/llama-lm.gguf"), "lm", "a folder with a checkpoint is missing");
    // Not looked for on a hub either, although it reads like a repository.
    check(Path::new("no/such"), "pm", "no/such: a folder with a checkpoint is missing");
    check(&fixture("llama-pm"), "../pm", "`../pm` cannot be the name of a model");
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let check = |source: &str, rows: &[(&str, &str)]| {
        let (code, out, err) = run(&["inspect", text(&fixture(source))]);
        assert_eq!((code, err.as_str()), (0, ""), "{source}");
        for (name, expected) in rows {
            assert_eq!(value(&out, name), *expected, "{source}");
        }
    };
    check(
        "llama-pm",
        &[
            ("architecture", "LlamaForSequenceClassification"),
            ("kind", "preference"),
            ("head", "score.weight"),
            ("dtype", "bf16"),
            ("vocabulary", "280"),
            ("context", "1024"),
        ],
    );
    check("trl-value-head", &[("kind", "preference"), ("head", "v_head.summary.weight"), ("chat template", "none")]);
    check(
        "gguf/llama-lm.gguf",
        &[("architecture", "llama"), ("kind", "language"), ("head", "vocabulary"), ("dtype", "f32")],
    );
    let (code, out, err) = run(&["inspect", text(&fixture("gguf"))]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("config.json"), "{err}");
}

#[test]
fn parameters_are_those_of_the_files() {
    let source = Source { model: text(&fixture("llama-pm")).to_owned(), ..Source::default() };
    let inspection = plumb_trainer::inspect(&source).unwrap();
    let header = std::fs::read(fixture("llama-pm").join("model.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(header[..8].try_into().unwrap());
    // bf16: two bytes each.
    assert_eq!(inspection.info.parameters, (header.len() as u64 - 8 - header_bytes) / 2);
    let template = inspection.chat_template_sha256.clone().unwrap();
    assert!(inspection.to_string().contains(&template));
}

#[test]
fn a_command_line_that_makes_no_sense_is_64() {
    for (arguments, words) in [
        (&[][..], "Usage"),
        (&["publish", "x", "y"], "--name"),
        (&["publish", "x", "y", "--name", "pm", "--version", "0"], "0 is not in"),
        (&["inspect"], "<SOURCE>"),
    ] {
        let (code, out, err) = run(arguments);
        assert_eq!((code, out.as_str()), (64, ""), "{arguments:?}");
        assert!(err.contains(words), "{arguments:?}: {err}");
    }
    assert_eq!(run(&["--help"]).0, 0);
}

/// `results.json` of an evaluation.
fn results(digest: &str) -> String {
    serde_json::json!({
        "plumb": "0.1.0",
        "task": "pairs",
        "model": {"kind": "preference", "source": "x", "dtype": "bf16", "weights_digest": digest},
        "results": [
            {"name": "helpful | <b>", "metric": "accuracy", "score": "reward", "value": 0.75, "low": 0.7, "high": 0.8, "n": 1200},
            {"name": "all", "metric": "mean margin", "value": -0.25, "low": null, "high": null, "n": 1200},
        ],
    })
    .to_string()
}

#[test]
fn a_card_is_published_with_scores() {
    let root = tempfile::tempdir().unwrap();
    let source = fixture("llama-pm");
    let inspection = plumb_trainer::inspect(&Source { model: text(&source).to_owned(), ..Source::default() }).unwrap();
    let file = root.path().join("results.json");
    std::fs::write(&file, results(&inspection.info.weights_digest)).unwrap();
    let arguments = ["publish", text(&source), text(root.path()), "--name", "pm", "--results", text(&file)];
    let (code, out, err) = run(&arguments);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(value(&out, "digest"), inspection.info.weights_digest, "a card does not change what is scored");
    let card = std::fs::read_to_string(root.path().join("pm/1/README.md")).unwrap();
    for part in [
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n",
        "metrics:\n- \"accuracy\"\n- \"mean margin\"\n",
        "model-index:\n- name: \"pm\"\n",
        "      name: \"pairs, helpful | <b>, reward\"\n      type: \"pairs-helpful-b-reward\"\n",
        "    - type: \"accuracy\"\n      value: 0.75\n      name: \"accuracy, 95 % interval 0.7000 to 0.8000, n = 1200\"\n",
        "| helpful \\| &lt;b&gt; | accuracy | reward | 0.7500 | 0.7000 to 0.8000 | 1,200 |\n",
        "| all | mean margin |  | -0.2500 |  | 1,200 |\n",
        "| architecture | LlamaForSequenceClassification |\n",
        "AutoModelForSequenceClassification",
    ] {
        assert!(card.contains(part), "{part} is not in {card}");
    }

    std::fs::write(&file, results(&"0".repeat(64))).unwrap();
    let (code, _, err) = run(&arguments);
    assert!(code == 1 && err.contains("results of another model"), "{err}");
    std::fs::write(&file, "{\"results\": [{\"name\": \"all\"}]}").unwrap();
    let (code, _, err) = run(&arguments);
    assert!(code == 1 && err.contains("missing field `metric`"), "{err}");
    assert_eq!(names(&root.path().join("pm")), ["1"], "nothing else was published");
}

#[test]
fn a_card_of_somebody_else_stays() {
    let root = tempfile::tempdir().unwrap();
    let source = copy("llama-pm");
    std::fs::write(source.path().join("README.md"), "# Mine\n").unwrap();
    let publish =
        |more: &[&str]| run(&[&["publish", text(source.path()), text(root.path()), "--name", "pm"], more].concat());
    assert_eq!(publish(&[]).0, 0);
    assert_eq!(std::fs::read_to_string(root.path().join("pm/1/README.md")).unwrap(), "# Mine\n");
    let (code, _, err) = publish(&["--results", "results.json"]);
    assert!(code == 1 && err.contains("README.md of its own"), "{err}");

    // That of a run gives way, that of a version does not: it may hold scores.
    let mark =
        "<!-- Written by plumb-train run. plumb-train publish writes it anew: to keep changes, take this line out. -->";
    std::fs::write(source.path().join("README.md"), format!("# run\n\n{mark}\n")).unwrap();
    assert_eq!(publish(&[]).0, 0);
    let published = std::fs::read_to_string(root.path().join("pm/2/README.md")).unwrap();
    assert!(published.contains("\n# pm\n") && !published.contains("<!--"), "{published}");
    let version = root.path().join("pm/2");
    let again = ["publish", text(&version), text(root.path()), "--name", "other"];
    assert_eq!(run(&again).0, 0);
    assert_eq!(std::fs::read_to_string(root.path().join("other/1/README.md")).unwrap(), published);
}

#[test]
fn probes_are_recorded_with_the_scores_of_the_decoder_that_serves() {
    let root = tempfile::tempdir().unwrap();
    for (name, count) in [("llama-pm", 4), ("neox-pm", 3), ("qwen2-lm", 3), ("llama-lm", 3)] {
        let (code, out, err) = run(&["publish", text(&fixture(name)), text(root.path()), "--name", name]);
        assert_eq!((code, err.as_str()), (0, ""), "{name}");
        assert_eq!(value(&out, "probes"), count.to_string(), "{name}: those that its context has room for");
        let folder = root.path().join(name).join("1");
        let manifest = Manifest::read(&folder).unwrap().unwrap();
        assert_eq!(manifest.probes().len(), count, "{name}");
        let mut scores: Vec<f32> = manifest.probes().iter().map(|probe| probe.score).collect();
        scores.dedup();
        assert_eq!(scores.len(), count, "{name}: {scores:?}");
        assert!(name.ends_with("-pm") || scores.iter().all(|score| *score < 0.0), "{name}: {scores:?}");
        let (_, inspected, _) = run(&["inspect", text(&folder)]);
        assert_eq!(value(&inspected, "probes"), count.to_string());
        assert_eq!(value(&inspected, "dtype"), manifest.probes()[0].dtype.name());
    }
}

#[test]
fn own_probes_are_recorded_and_what_cannot_be_scored_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("probes.jsonl");
    let publish = |lines: &str, more: &[&str]| {
        std::fs::write(&file, lines).unwrap();
        let source = fixture("llama-pm");
        run(&[&["publish", text(&source), text(root.path()), "--name", "pm"], more].concat())
    };
    let own = &["--probes", text(&file)];
    let long = format!("{{\"text\": \"{}\"}}\n", "ab ".repeat(160));
    let lines = format!("{{\"text\": \"ab\"}}\n\n{{\"prompt\": \"q\", \"response\": \"a\"}}\n{long}");
    let (code, out, err) = publish(&lines, own);
    assert_eq!((code, value(&out, "probes")), (0, "3"), "{err}");
    let manifest = Manifest::read(&root.path().join("pm/1")).unwrap().unwrap();
    assert_eq!(manifest.probes()[0].input, ProbeInput::Text("ab".to_owned()));
    // The published version gives its own scores again, and other weights do not.
    let options = LoadOptions {
        dtype: DTypeChoice::F32,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 24,
        device: Default::default(),
        background: Default::default(),
    };
    let load = |folder: &Path| {
        LoadedModel::load(&Source { model: text(folder).to_owned(), ..Source::default() }, &options).unwrap()
    };
    let agree = |model: &LoadedModel| {
        let probes = manifest.probes().iter();
        probes.filter(|probe| probe.agrees(reward(model, probe), model.decoder.dtype())).count()
    };
    let published = load(&root.path().join("pm/1"));
    assert_eq!(published.probes, manifest.probes());
    assert_eq!(agree(&published), 3);
    assert!(agree(&load(&fixture("qwen2-pm"))) < 3);

    let (code, out, _) = publish("", &["--no-probes"]);
    assert_eq!((code, value(&out, "probes")), (0, "0"));
    for (lines, words) in [
        ("", "there is no probe in it"),
        ("{\"text\": \"ab\"}\n{\"prompt\": \"q\"}\n", "line 2: a probe needs exactly one of"),
        (&format!("{{\"text\": \"{}\"}}", "ab ".repeat(3000)), "line 1: the input has"),
        (&"{\"text\": \"ab\"}\n".repeat(65), "line 65: a manifest holds 64 probes"),
    ] {
        let (code, out, err) = publish(lines, own);
        assert_eq!((code, out.as_str()), (1, ""), "{words}");
        assert!(err.contains(words), "{words}: {err}");
    }
    let (code, _, err) = publish("", &["--probes", text(&file), "--no-probes"]);
    assert!(code == 64 && err.contains("cannot be used with"), "{err}");
    assert_eq!(names(&root.path().join("pm")), ["1", "2"], "nothing else was published");
}

/// What a preference model gives a probe, in one step.
fn reward(model: &LoadedModel, probe: &Probe) -> f32 {
    let tokens = probe.render(&model.text).unwrap().ids;
    let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE) as u32).collect();
    let sequence = StepSequence { tokens: &tokens, position: 0, pages: &pages, read: Read::LastReward };
    let mut kv = model.decoder.kv_store(pages.len()).unwrap();
    model.decoder.step(&Step { sequences: vec![sequence] }, &mut kv, &mut model.decoder.workspace()).unwrap()[0][0]
}
