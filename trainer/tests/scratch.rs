//! From text alone to a language model, and from that to a preference model.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::Path;
use std::process::Command;

use plumb_model::checkpoint::Source;
use plumb_model::loaded::ModelKind;
use plumb_trainer::{Shape, inspect, scratch};
use serde_json::{Value, json};

const SHAPE: Shape =
    Shape { vocab_size: 300, hidden_size: 32, intermediate_size: 48, layers: 2, heads: 4, kv_heads: 2, context: 64 };

fn train(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_plumb-train")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn last_metrics(run: &Path) -> Value {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn a_language_model_and_then_a_preference_model_come_out_of_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = |i: usize| json!({"text": format!("The cat number {i} sat on the mat. ").repeat(3 + i % 7)}).to_string();
    fs::write(path("text.jsonl"), (0..40).map(text).collect::<Vec<_>>().join("\n")).unwrap();
    let pair = |i: usize| {
        json!({"prompt": format!("{i}: "), "chosen": "The cat sat.", "rejected": "Sat cat the."}).to_string()
    };
    fs::write(path("pairs.jsonl"), (0..32).map(pair).collect::<Vec<_>>().join("\n")).unwrap();

    scratch(&[path("text.jsonl").into()], path("new").as_ref(), SHAPE, 3).unwrap();
    scratch(&[path("text.jsonl").into()], path("again").as_ref(), SHAPE, 3).unwrap();
    for name in ["model.safetensors", "tokenizer.json"] {
        let read = |folder: &str| fs::read(Path::new(&path(folder)).join(name)).unwrap();
        assert!(read("new") == read("again"), "{name}");
    }
    let found = inspect(&Source { model: path("new"), ..Source::default() }).unwrap().info;
    assert_eq!((found.kind, found.vocab_size, found.max_input_tokens), (ModelKind::Language, 300, 64));

    let options = ["--lr", "1e-2", "--batch", "8", "--max-tokens", "64", "--epochs", "6", "--dtype", "f32"];
    let (text, pairs, language, preference) = (path("text.jsonl"), path("pairs.jsonl"), path("lm"), path("pm"));
    let first = [
        "run",
        "--objective",
        "language",
        "--init",
        &path("new"),
        "--train",
        &text,
        "--dev",
        &text,
        "--output",
        &language,
    ];
    train(&[&first[..], &options].concat());
    let learned = last_metrics(language.as_ref());
    // ln 300 = 5.7 nats without having learned anything.
    assert!(learned["loss"].as_f64().unwrap() < 1.5, "{learned}");

    // Trains a preference model out of a run's checkpoint.
    let prefer = |run: &str, output: &str, options: &[&str]| {
        let init = format!("{run}/checkpoint");
        let fixed = ["run", "--objective", "preference", "--init", &init, "--train", &pairs, "--dev", &pairs];
        train(&[&fixed[..], &["--output", output], options].concat());
        assert_eq!(last_metrics(output.as_ref())["accuracy"], 1.0);
    };
    prefer(&language, &preference, &options);
    // What was trained can be trained further: preference pre-training comes first, fine-tuning after it.
    prefer(&preference, &path("pm2"), &options[2..]);
    let published = train(&["publish", &format!("{}/checkpoint", path("pm2")), &path("versions"), "--name", "pm"]);
    assert!(published.contains("versions/pm/1"), "{published}");
}

#[test]
fn sizes_that_make_no_decoder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for shape in [Shape { heads: 3, ..SHAPE }, Shape { kv_heads: 3, ..SHAPE }, Shape { layers: 0, ..SHAPE }] {
        let error = scratch(&[], &folder.path().join("new"), shape, 0).unwrap_err().to_string();
        assert!(error.contains("hidden-size has to be a multiple"), "{error}");
    }
    let error = scratch(&[], folder.path(), SHAPE, 0).unwrap_err().to_string();
    assert!(error.contains("exists"), "{error}");
}
