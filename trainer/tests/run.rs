//! Runs on a tiny checkpoint: they learn, go on where they stopped, and end in what a server loads.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use plumb_model::checkpoint::Source;
use plumb_model::decoder::{Read, Step, StepSequence};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel, ModelKind};
use plumb_model::text::{Message, RenderMode, RenderOptions, TextInput};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    folder.canonicalize().unwrap().to_str().unwrap().to_owned()
}

/// A folder with data: the chosen side says yes, the rejected one says no.
struct Work(TempDir);

impl Work {
    fn new() -> Self {
        let work = Self(tempfile::tempdir().unwrap());
        let words = ["ball", "cup", "tree", "house", "road", "boat", "lamp", "hat"];
        let pair = |i: usize| {
            let prompt = [
                json!({"role": "user", "content": format!("Do you see the {} and the {}?", words[i % 8], words[i / 8 % 8])}),
            ];
            let side = |answer: &str| [json!({"role": "assistant", "content": format!("{answer}, I see {i}.")})];
            json!({"prompt": prompt, "chosen": side("Yes"), "rejected": side("No")}).to_string()
        };
        work.write("train.jsonl", &(0..48).map(pair).collect::<Vec<_>>());
        work.write("dev.jsonl", &(48..64).map(pair).collect::<Vec<_>>());
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, lines: &[String]) {
        fs::write(self.path(name), lines.join("\n")).unwrap();
    }

    fn command(&self, output: &str, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plumb-train"));
        command.arg("run");
        command.arg("--train").arg(self.path("train.jsonl")).arg("--dev").arg(self.path("dev.jsonl"));
        command.arg("--output").arg(self.path(output)).args(options);
        let init = fixture("llama-lm-sharded");
        let defaults = [
            ("--objective", "preference"),
            ("--init", &init[..]),
            ("--batch", "8"),
            ("--lr", "3e-3"),
            ("--dtype", "f32"),
        ];
        for (name, value) in defaults {
            if !options.contains(&name) {
                command.args([name, value]);
            }
        }
        command
    }

    fn run(&self, output: &str, options: &[&str]) -> Output {
        let output = self.command(output, options).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("checkpoint/model.safetensors")).unwrap()
    }

    fn metrics(&self, output: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn options_of(dtype: DTypeChoice) -> LoadOptions {
    LoadOptions {
        dtype,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 24,
        device: Default::default(),
        background: Default::default(),
    }
}

/// The reward that a server would give.
fn reward(model: &LoadedModel, answer: &str) -> f32 {
    let messages = vec![Message::new("user", "Do you see the hat and the hat?"), Message::new("assistant", answer)];
    let input = TextInput::Conversation(messages);
    let tokens = model.text.render(&input, &RenderOptions::default(), RenderMode::Score).unwrap().ids;
    let mut kv = model.decoder.kv_store(model.kv_pages).unwrap();
    let pages: Vec<u32> = (0..tokens.len().div_ceil(32) as u32).collect();
    let sequence = StepSequence { tokens: &tokens, position: 0, pages: &pages, read: Read::LastReward };
    let step = Step { sequences: vec![sequence] };
    model.decoder.step(&step, &mut kv, &mut model.decoder.workspace()).unwrap()[0][0]
}

#[test]
fn a_preference_model_learns_and_is_what_a_server_loads() {
    let work = Work::new();
    let output = work.run("run", &["--epochs", "8", "--evaluate-every", "12"]);
    let metrics = work.metrics("run");
    let dev: Vec<&Value> = metrics.iter().filter(|line| line["split"] == "dev").collect();
    assert_eq!(dev.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [12, 24, 36, 48]);
    let last = dev.last().unwrap();
    assert_eq!(last["accuracy"], 1.0, "{last}");
    assert!(last["language_loss"].as_f64() < dev[0]["language_loss"].as_f64(), "{last}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("accuracy   1.0000"));

    // What each pair got, for who wants to look closer.
    let pairs = fs::read_to_string(work.path("run").join("dev.jsonl")).unwrap();
    let pairs: Vec<Value> = pairs.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let margin = |pair: &Value| pair["chosen"].as_f64().unwrap() - pair["rejected"].as_f64().unwrap();
    let mean = pairs.iter().map(margin).sum::<f64>() / 16.0;
    assert!(pairs.len() == 16 && (mean - last["margin"].as_f64().unwrap()).abs() < 1e-9, "{mean} {last}");

    // A page for people, and a card that goes with the checkpoint.
    let page = fs::read_to_string(work.path("run").join("report.html")).unwrap();
    for part in
        ["100.0 % (80.6 to 100.0 %) of 16 pairs", "Calibration of sigmoid(margin)", "Gradient norm", "epochs = 8"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="), "it needs nothing else");
    let card = fs::read_to_string(work.path("run").join("checkpoint/README.md")).unwrap();
    assert!(card.contains("| accuracy | 100.0 % (80.6 to 100.0 %) of 16 pairs |"), "{card}");
    assert!(!card.contains(work.0.path().to_str().unwrap()), "a card tells no places of the machine: {card}");

    let model = work.path("run").join("checkpoint").to_str().unwrap().to_owned();
    let model = LoadedModel::load(&Source { model, ..Source::default() }, &options_of(DTypeChoice::Auto)).unwrap();
    assert_eq!(model.info.kind, ModelKind::Preference);
    assert!(reward(&model, "Yes, I see 63.") > reward(&model, "No, I see 63.") + 1.0);
}

#[test]
fn the_same_recipe_gives_the_same_bits_on_any_number_of_threads_and_after_an_interruption() {
    let work = Work::new();
    let options = ["--epochs", "2", "--save-every", "1", "--micro-batch-tokens", "200"];
    work.run("unbroken", &[&options[..], &["--threads", "1"]].concat());
    work.run("again", &[&options[..], &["--threads", "2"]].concat());
    assert!(work.weights("unbroken") == work.weights("again"), "two threads");
    work.run("recomputed", &[&options[..], &["--checkpointing"]].concat());
    assert!(work.weights("unbroken") == work.weights("recomputed"), "layers computed again");

    // What each dev pair got has the order of the data, however they go through the decoder.
    let still = |output: &str, tokens: &str| {
        work.run(output, &["--lr", "0", "--max-steps", "1", "--micro-batch-tokens", tokens]);
        fs::read(work.path(output).join("dev.jsonl")).unwrap()
    };
    assert!(still("small", "60") == still("large", "8192"), "parts of other sizes");

    // Killed in the middle of an epoch.
    let mut child = work.command("broken", &options).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let states = work.path("broken").join("states");
    let saved = || {
        let whole = |entry: fs::DirEntry| entry.path().extension().is_some_and(|extension| extension == "safetensors");
        fs::read_dir(&states).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(whole)))
    };
    while !saved() {
        std::thread::sleep(Duration::from_millis(1));
        assert!(child.try_wait().unwrap().is_none() || saved());
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = work.run("broken", &options);
    assert!(String::from_utf8_lossy(&output.stderr).contains("goes on after step"));
    assert!(work.weights("unbroken") == work.weights("broken"), "an interruption");
    let steps = |output: &str| work.metrics(output).iter().map(|line| line["step"].clone()).collect::<Vec<_>>();
    assert_eq!(steps("broken"), steps("unbroken"));
}

/// The CPU, and a GPU that it plays where the program was built with one.
const DEVICES: &[&str] = if cfg!(feature = "emulated") { &["cpu", "emulated"] } else { &["cpu"] };

/// Warm-up, cosine, clipping, decay and AdamW are those of PyTorch, step by step.
#[test]
fn ten_steps_are_those_of_pytorch() {
    let expected: Value = serde_json::from_str(&fs::read_to_string(fixture("training.json")).unwrap()).unwrap();
    let work = Work::new();
    work.write("train.jsonl", &expected["pairs"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>());
    let init = fixture("llama-pm");
    let options = [
        &["--init", &init, "--language-weight", "0", "--epochs", "10", "--lr", "1e-3"][..],
        &["--schedule", "cosine", "--warmup-steps", "3", "--weight-decay", "0.1"],
    ];
    for device in DEVICES {
        work.run(device, &[&options.concat()[..], &["--device", device]].concat());
        let metrics = work.metrics(device);
        for step in 0..10 {
            for (name, theirs) in [("loss", "losses"), ("gradient_norm", "gradient_norms")] {
                let found = metrics[step][name].as_f64().unwrap();
                let expected = expected[theirs][step].as_f64().unwrap();
                let off = (found - expected).abs();
                assert!(off < 2e-5 * expected, "{device}: {name} before step {step}: {found} {expected}");
            }
        }
    }
}

/// On a GPU, runs of all kinds learn what they learn on the CPU, and go on where they stopped.
#[cfg(feature = "emulated")]
#[test]
fn a_gpu_learns_what_the_cpu_learns() {
    let work = Work::new();
    let kinds: [&[&str]; 3] = [
        &["--objective", "preference", "--save-every", "2"],
        &["--objective", "imitation", "--shards", "3", "--checkpointing", "--micro-batch-tokens", "200"],
        &["--objective", "preference", "--lora-rank", "4"],
    ];
    for (kind, options) in kinds.into_iter().enumerate() {
        let run = |device: &str| {
            let output = format!("{device}-{kind}");
            work.run(&output, &[options, &["--max-steps", "4", "--device", device]].concat());
            let values = |line: &Value| ["loss", "gradient_norm"].map(|name| line[name].as_f64());
            work.metrics(&output).iter().map(values).collect::<Vec<_>>()
        };
        let (expected, found) = (run("cpu"), run("emulated"));
        assert!(expected.len() == 5 && found.len() == 5, "four steps and the dev data");
        for (found, expected) in found.concat().into_iter().zip(expected.concat()) {
            let off = (found.unwrap_or(0.0) - expected.unwrap_or(0.0)).abs();
            assert!(off <= 1e-3 * expected.unwrap_or(0.0), "{options:?}: {found:?} {expected:?}");
        }
    }

    let run = work.path("emulated-0");
    let before = work.weights("emulated-0");
    fs::remove_file(run.join("states/step-00000004.safetensors")).unwrap();
    fs::remove_dir_all(run.join("checkpoint")).unwrap();
    let output = work.run("emulated-0", &[kinds[0], &["--max-steps", "4", "--device", "emulated"]].concat());
    assert!(String::from_utf8_lossy(&output.stderr).contains("goes on after step 2"));
    assert!(work.weights("emulated-0") == before, "an interruption");
}

#[test]
fn imitation_and_language_models_learn_too() {
    let work = Work::new();
    for objective in ["imitation", "language"] {
        work.run(objective, &["--objective", objective, "--epochs", "8"]);
        let metrics = work.metrics(objective);
        let last = metrics.last().unwrap();
        let first = &metrics[0];
        assert!(last["loss"].as_f64().unwrap() < 0.6 * first["loss"].as_f64().unwrap(), "{first} {last}");
        assert_eq!(last["accuracy"], 1.0, "{last}");
        let page = fs::read_to_string(work.path(objective).join("report.html")).unwrap();
        assert!(page.contains("Log-likelihoods") && !page.contains("Calibration"));
        let card = fs::read_to_string(work.path(objective).join("checkpoint/README.md")).unwrap();
        assert!(card.contains("pipeline_tag: text-generation") && card.contains("AutoModelForCausalLM"), "{card}");
    }
}

#[test]
fn a_report_is_made_of_what_is_there() {
    let work = Work::new();
    let report =
        |folder: &Path| Command::new(env!("CARGO_BIN_EXE_plumb-train")).arg("report").arg(folder).output().unwrap();
    let folder = work.path("run <1>");
    fs::create_dir(&folder).unwrap();
    let output = report(&folder);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && error.contains("recipe.toml: not there: name the folder of a run"),
        "{error}"
    );

    // Of a run that is going on, or was killed: the last line is half a line.
    fs::write(folder.join("recipe.toml"), "objective = \"preference\"\ninit = \"<script>\"\n").unwrap();
    let page = || fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(report(&folder).status.success() && page().contains("0 steps"), "before the first step");
    let lines = (1..=3).map(|step| format!("{{\"split\":\"train\",\"step\":{step},\"loss\":0.5,\"novel <b>\":1}}\n"));
    fs::write(folder.join("metrics.jsonl"), lines.collect::<String>() + "{\"split\":\"tr").unwrap();
    assert!(report(&folder).status.success());
    for part in ["<title>run &lt;1&gt;</title>", "&lt;script&gt;", "3 steps", "could not be read: 1", "novel &lt;b&gt;"]
    {
        assert!(page().contains(part), "{part} is not in {}", page());
    }
    assert!(!page().contains("<script") && !page().contains("<b>") && !page().contains("On the dev data"));
}

#[test]
fn what_cannot_be_learned_from_is_counted() {
    let work = Work::new();
    let side = |text: &str| json!({"chosen": text, "rejected": "Nothing."}).to_string();
    let mut lines =
        vec![side("Nothing."), side(""), "{".to_owned(), json!({"chosen": "Half"}).to_string(), String::new()];
    lines.extend([side("Good."), side(&"Long. ".repeat(300))]);
    work.write("train.jsonl", &lines);
    let output = work.run("run", &["--max-tokens", "64"]);
    let counts: Value = serde_json::from_str(&fs::read_to_string(work.path("run").join("data.json")).unwrap()).unwrap();
    let dropped = json!({"bad line": 2, "empty response": 1, "equal sides": 1});
    assert_eq!((&counts["train"]["lines"], &counts["train"]["examples"]), (&json!(6), &json!(2)));
    assert_eq!((&counts["train"]["dropped"], &counts["train"]["cut"]), (&dropped, &json!(1)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("train.jsonl: line 3: EOF"));

    // The tag of a binarised pair stays: without it, both sides would be the same.
    let long = "Long. ".repeat(300);
    work.write(
        "train.jsonl",
        &[json!({"chosen": format!("GOOD:{long}"), "rejected": format!("BAD:{long}")}).to_string()],
    );
    work.run("tags", &["--max-tokens", "64"]);
    let counts: Value =
        serde_json::from_str(&fs::read_to_string(work.path("tags").join("data.json")).unwrap()).unwrap();
    assert_eq!((&counts["train"]["examples"], &counts["train"]["cut"]), (&json!(1), &json!(2)));
    assert_eq!(counts["train"]["tokens"], 128);

    work.write("train.jsonl", &lines);
    let output = work.command("strict", &["--max-bad-lines", "1"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && error.contains("line 4") && error.contains("more than 1 lines are bad"),
        "{error}"
    );
}

#[test]
fn numbers_that_are_none_stop_the_run_with_their_batch() {
    let work = Work::new();
    let output = work.command("run", &["--lr", "1e30", "--clip", "0"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("step 2: gradient norm is NaN"), "{error}");
    let batch = fs::read_to_string(work.path("run").join("bad-batch-2.jsonl")).unwrap();
    assert!(batch.lines().count() == 8 && batch.contains("Do you see"), "{batch}");
    assert!(!work.path("run").join("checkpoint").exists());
}

#[test]
fn recipes_are_files_too() {
    let work = Work::new();
    fs::write(work.path("recipe.toml"), "epochs = 3\nmax_steps = 5\nlr = 1e-4\n").unwrap();
    let config = work.path("recipe.toml");
    work.run("run", &["--config", config.to_str().unwrap(), "--max-steps", "2"]);
    let kept = fs::read_to_string(work.path("run").join("recipe.toml")).unwrap();
    assert!(kept.contains("epochs = 3") && kept.contains("max-steps = 2") && kept.contains("lr = 0.003"), "{kept}");
    assert_eq!(work.metrics("run").iter().filter(|line| line["split"] == "train").count(), 2);

    let check = |output: &str, options: &[&str], code: i32, message: &str| {
        let output = work.command(output, options).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && error.contains(message), "{error}");
    };
    check("run", &["--seed", "9"], 1, "another recipe");
    check("bad", &["--beta1", "1"], 1, "beta1");
    for (init, objective, message) in [
        ("llama-pm", "language", "can only be trained as a preference model"),
        ("llama-pm", "preference", "set language-weight to 0"),
        ("openrlhf-pm", "preference", "the layout of RewardModel is read, but not written"),
    ] {
        check("bad", &["--init", &fixture(init), "--objective", objective], 1, message);
    }
    check("bad", &["--batch", "0"], 1, "batch");
    fs::write(&config, "learning_rate = 1").unwrap();
    check("bad", &["--config", config.to_str().unwrap()], 64, "--learning-rate");
}

#[test]
fn an_adapter_learns_and_is_what_a_server_merges() {
    let work = Work::new();
    let options =
        ["--lora-rank", "4", "--lora-targets", "q_proj", "up_proj", "down_proj", "--epochs", "8", "--lr", "2e-2"];
    work.run("run", &options);
    let metrics = work.metrics("run");
    let last = metrics.last().unwrap();
    assert_eq!(last["accuracy"], 1.0, "{last}");

    let adapter = work.path("run").join("checkpoint");
    let config: Value = serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], json!(["q_proj", "up_proj", "down_proj"]));
    assert!(!adapter.join("config.json").exists() && !adapter.join("model.safetensors").exists());
    let source = Source {
        model: fixture("llama-lm-sharded"),
        adapter: Some(adapter.to_str().unwrap().to_owned()),
        ..Source::default()
    };
    let model = LoadedModel::load(&source, &options_of(DTypeChoice::F32)).unwrap();
    assert_eq!(model.info.kind, ModelKind::Preference);
    let margin = reward(&model, "Yes, I see 63.") - reward(&model, "No, I see 63.");
    assert!(margin > 1.0, "{margin}");
    // What was measured in training is what is served: the whole dev set has such margins.
    let measured = last["margin"].as_f64().unwrap() as f32;
    assert!((margin - measured).abs() < 0.5 * measured, "{margin} {measured}");

    // It goes on from there, and what the other run ended with is what this one begins with.
    let adapter = adapter.to_str().unwrap().to_owned();
    work.run("more", &[&options[..6], &["--init-adapter", &adapter, "--lr", "1e-6", "--max-steps", "1"]].concat());
    let loss = work.metrics("more").last().unwrap()["loss"].as_f64().unwrap();
    assert!((loss - last["loss"].as_f64().unwrap()).abs() < 0.01, "{loss} {last}");
    for rank in ["0", "8"] {
        let output = work.command("none", &["--lora-rank", rank, "--init-adapter", &adapter]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stderr).contains("lora-rank"), "{output:?}");
    }

    let output = work.command("none", &["--lora-rank", "4", "--lora-targets", "qproj"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("lora-targets"), "{output:?}");
}

#[test]
fn a_vocabulary_head_of_its_own_outlives_preference_pretraining() {
    let work = Work::new();
    let untied = fixture("llama-lm");
    work.run("pmp", &["--init", &untied, "--lr", "1e-3"]);
    let first = work.path("pmp").join("checkpoint");
    assert!(first.join("language_head.safetensors").exists());
    let init = first.to_str().unwrap().to_owned();
    work.run("pm", &["--init", &init, "--lr", "1e-4", "--evaluate-every", "1"]);
    let loss = |run: &str, first: bool| {
        let lines: Vec<Value> = work.metrics(run).into_iter().filter(|line| line["split"] == "dev").collect();
        lines[if first { 0 } else { lines.len() - 1 }]["language_loss"].as_f64().unwrap()
    };
    // It goes on from what was learned.
    assert!((loss("pm", true) - loss("pmp", false)).abs() < 0.1, "{} {}", loss("pm", true), loss("pmp", false));

    fs::remove_file(first.join("language_head.safetensors")).unwrap();
    let output = work.command("again", &["--init", &init]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("language-weight"), "{output:?}");
    work.run("without", &["--init", &init, "--language-weight", "0"]);
}
