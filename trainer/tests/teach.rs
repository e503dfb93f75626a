//! Context distillation: what a teacher writes down, and a student that learns it.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use plumb_model::checkpoint::Source;
use plumb_model::decoder::{Read, Step, StepSequence, log_sum_exp};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel};
use plumb_model::text::{ChatFormat, HhhPrompt, Message, RenderMode, RenderOptions, TextInput};
use serde_json::{Value, json};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path).canonicalize().unwrap()
}

fn train(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plumb-train")).args(arguments).output().unwrap()
}

/// The numbers of every record.
fn records(path: &Path) -> Vec<Vec<u32>> {
    let bytes = fs::read(path).unwrap();
    let numbers: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let (mut records, mut rest) = (Vec::new(), &numbers[..]);
    while let [len, after @ ..] = rest {
        let (record, after) = after.split_at(*len as usize);
        records.push(record.to_vec());
        rest = after;
    }
    records
}

#[test]
fn a_student_learns_what_its_teacher_expects_behind_a_prompt() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let lm = repository("server/models/lm").to_str().unwrap().to_owned();
    let words = ["ball", "cup", "tree", "house", "road", "boat", "lamp", "hat"];
    let line = |i: usize| match i % 2 {
        0 => json!({"text": format!("The {} stood beside the {}.", words[i % 8], words[i / 8 % 8])}),
        _ => json!({
            "prompt": format!("Question: Where is the {}?\n", words[i % 8]),
            "chosen": format!("Answer: Beside the {}.", words[i / 8 % 8]),
            "rejected": "Answer: No.",
        }),
    };
    let lines: Vec<String> = (0..40).map(|i| line(i).to_string()).chain(["{}".to_owned()]).collect();
    fs::write(path("texts.jsonl"), lines.join("\n")).unwrap();

    let taught = path("taught");
    let teach = ["teach", &path("texts.jsonl"), "--model", &lm, "--output", &taught, "--hhh-prompt", "short"];
    let output = train(&[&teach[..], &["--top", "5", "--max-tokens", "12"]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("40 examples") && text.contains("41 lines; cut 40; left out 1 bad line"), "{output:?}");

    // The second lesson is what a server would compute behind the prompt.
    let options = LoadOptions {
        dtype: DTypeChoice::Auto,
        hhh: Default::default(),
        max_input_tokens: None,
        kv_cache_bytes: 1 << 26,
        device: Default::default(),
        background: Default::default(),
    };
    let model = LoadedModel::load(&Source { model: lm.clone(), ..Source::default() }, &options).unwrap();
    let turns = [Message::new("user", "Where is the cup?"), Message::new("assistant", "Beside the ball.")];
    let render = |hhh_prompt| {
        let options = RenderOptions { chat_format: ChatFormat::HumanAssistant, hhh_prompt, ..Default::default() };
        model.text.render(&TextInput::Conversation(turns.to_vec()), &options, RenderMode::Score).unwrap().ids
    };
    let (own, behind) = (render(HhhPrompt::None), render(HhhPrompt::Short));
    let human = behind.windows(2).rposition(|two| *two == own[..2]).unwrap();
    let records = records(Path::new(&taught));
    let record = &records[2];
    assert_eq!((&record[..3], &record[3..15]), (&[2, 1, 12][..], &own[..12]));
    let (first, top, ids) = (record[15], record[16], record[17]);
    assert_eq!((first, top, ids), (0, 5, 5 * 11));
    let mut kv = model.decoder.kv_store(model.kv_pages).unwrap();
    for row in first as usize..11 {
        let tokens = &[&behind[..human], &own[..row + 1]].concat()[..];
        let pages: Vec<u32> = (0..tokens.len().div_ceil(32) as u32).collect();
        let step =
            Step { sequences: vec![StepSequence { tokens, position: 0, pages: &pages, read: Read::LastLogits }] };
        let logits = &model.decoder.step(&step, &mut kv, &mut model.decoder.workspace()).unwrap()[0];
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        let at = 18 + 5 * (row - first as usize);
        let found = f32::from_bits(record[at + ids as usize]);
        let expected = logits[best] - log_sum_exp(logits);
        assert!(record[at] == best as u32 && (found - expected).abs() < 1e-5, "{row}: {found} {expected}");
    }

    // Its divergence falls; the teacher's prompt is not among its tokens.
    let run = |name: &str, options: &[&str]| {
        let output = path(name);
        let fixed = ["run", "--objective", "distillation", "--output", &output, "--batch", "8", "--lr", "1e-3"];
        train(&[&fixed[..], options].concat())
    };
    let data = ["--train", &taught, "--dev", &taught, "--max-tokens", "16"];
    let output = run("run", &[&data[..], &["--init", &lm, "--epochs", "8", "--evaluate-every", "1"]].concat());
    assert!(output.status.success(), "{output:?}");
    let metrics = fs::read_to_string(Path::new(&path("run")).join("metrics.jsonl")).unwrap();
    let dev: Vec<f64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["split"] == "dev")
        .map(|line| line["loss"].as_f64().unwrap())
        .collect();
    assert!(dev[0] > 0.0 && dev[dev.len() - 1] < 0.5 * dev[0], "{dev:?}");

    let refused = |name: &str, options: &[&str], reason: &str| {
        let output = run(name, options);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(reason), "{error}");
    };
    let other = repository("tests/fixtures/llama-lm").to_str().unwrap().to_owned();
    refused("other", &[&data[..], &["--init", &other]].concat(), "another vocabulary");
    refused("jsonl", &["--train", &path("texts.jsonl"), "--init", &lm], "texts.jsonl");
    refused("short", &["--train", &taught, "--max-tokens", "8", "--init", &lm], "raise max-tokens");
    let output = train(&["teach", &path("texts.jsonl"), "--model", &lm, "--output", &path("full")]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not fit into the teacher's context"), "{output:?}");
    assert!(!Path::new(&path("full")).exists());
}
