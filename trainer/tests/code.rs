//! Programs become pairs by passing or failing their tests, and samples are marked.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};

use plumb_trainer::grade;
use plumb_trainer::prepare::{Counts, Dataset, Options, prepare};
use plumb_trainer::sandbox::{Limits, Sandbox};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder, and where programs run; without Python or a kernel that confines it, nothing.
struct Work(TempDir, Sandbox);

impl Work {
    fn new() -> Option<Self> {
        let limits = Limits { cpu_seconds: 1, memory_mib: 256 };
        match Sandbox::new(env!("CARGO_BIN_EXE_plumb-train").into(), Path::new("python3"), limits, false) {
            Ok(sandbox) => Some(Self(tempfile::tempdir().unwrap(), sandbox)),
            Err(error) => {
                eprintln!("skipped: {error}");
                None
            }
        }
    }

    fn write(&self, name: &str, lines: &[Value]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        path
    }

    /// The pairs of files, and what was counted.
    fn pairs(&self, files: &[PathBuf]) -> (Vec<Value>, Counts) {
        let output = tempfile::tempdir().unwrap();
        let sandbox = Some(self.1.clone());
        let options = Options { dev_share: 0.0, seed: 1, binarise: false, max_bad_lines: 1, sandbox };
        let counts = prepare(Dataset::Code, files, output.path(), &options, &mut |_| ()).unwrap();
        (lines(&output.path().join("train.jsonl")), counts)
    }
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn human_eval(id: &str, name: &str, solution: &str) -> Value {
    json!({
        "task_id": id,
        "prompt": format!("def {name}(a, b):\n    \"\"\"The sum.\"\"\"\n"),
        "entry_point": name,
        "canonical_solution": solution,
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    })
}

#[test]
fn samples_are_paired_by_what_their_tests_say() {
    let Some(work) = Work::new() else { return };
    let problems = [
        human_eval("T/0", "add", "    return a + b\n"),
        human_eval("T/1", "plus", "    return b + a\n"),
        human_eval("T/2", "wrong", "    return a\n"),
    ];
    let sample = |key: &str, id: &str, text: &str| json!({"task_id": id, key: text});
    let samples = [
        sample("completion", "T/0", "    return sum([a, b])\n"),
        sample("generation", "T/0", "    return a\n"),
        sample("response", "T/0", "    while True: pass\n"),
        sample("completion", "T/0", "    exit(0)\n"),
        sample("completion", "T/9", "    return 1\n"),
        json!({"id": 5, "prompt": problems[1]["prompt"], "response": "    return b\n"}),
    ];
    let [problems, samples] = [work.write("p.jsonl", &problems), work.write("s.jsonl", &samples)];
    let (mut pairs, counts) = work.pairs(&[samples, problems]);
    pairs.sort_by_key(Value::to_string);
    assert_eq!((pairs.len(), counts.read), (2, 3), "{pairs:?}");
    let sides = |pair: &Value| ["chosen", "rejected"].map(|side| pair[side].as_str().unwrap().to_owned());
    let [right, wrong] = sides(&pairs[0]);
    assert_eq!(right, "    return sum([a, b])\n");
    assert!(["    return a\n", "    while True: pass\n", "    exit(0)\n"].contains(&&wrong[..]), "{wrong}");
    assert_eq!(sides(&pairs[1]), ["    return b + a\n", "    return b\n"]);
    assert_eq!(json!(counts.dropped), json!({"a sample of no problem": 1, "its own solution fails": 1}));
}

#[test]
fn a_program_is_paired_with_one_that_differs_a_little() {
    let Some(work) = Work::new() else { return };
    let mbpp = json!({
        "text": "Write a function that adds.",
        "code": "def add(a, b):\r\n  return a + b",
        "task_id": 11,
        "test_setup_code": "",
        "test_list": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"],
        "challenge_test_list": [],
    });
    let same =
        json!({"text": "Nothing.", "code": "def f():\n  pass", "task_id": 12, "test_list": ["assert f() is None"]});
    let quix = json!({
        "name": "count",
        "buggy": "def count(n):\n    yield n  # bug\n\n\"\"\"\nCount up\n\"\"\"\n",
        "correct": "def count(n):\n    yield n\n    yield n + 0.5\n\n\"\"\"\nThe best\n\"\"\"\n",
        "json_testcases": "[[1], [1, 1.5]]\n[2, [2, 2.5000001]]\n",
    });
    let graph = json!({"name": "g", "buggy": "", "correct": "", "json_testcases": null});
    let file = work.write("a.jsonl", &[mbpp, same, quix, graph]);
    let (mut pairs, counts) = work.pairs(&[file]);
    pairs.sort_by_key(Value::to_string);
    let expected = [
        json!({
            "prompt": "\"\"\"\nCount up\n\"\"\"\n\n",
            "chosen": "def count(n):\n    yield n\n    yield n + 0.5\n",
            "rejected": "def count(n):\n    yield n\n",
        }),
        json!({
            "prompt": "\"\"\"\nWrite a function that adds.\nassert add(2, 3) == 5\n\"\"\"\n",
            "chosen": "def add(a, b):\n  return a + b",
            "rejected": "def add(a, b):\n  return a - b",
        }),
    ];
    assert_eq!(pairs, expected);
    assert_eq!(json!(counts.dropped), json!({"no test cases": 1, "no wrong program": 1}));
}

#[test]
fn samples_are_marked() {
    let Some(work) = Work::new() else { return };
    let problems = work.write("p.jsonl", &[human_eval("T/0", "add", "    return a + b\n")]);
    let samples = [
        json!({"id": "T/0", "prompt": "another form", "response": "    return b + a\n", "extra": [1]}),
        json!({"id": "T/0", "response": "    return a\n"}),
        json!({"id": "T/7", "response": "    return a\n"}),
    ];
    let samples = work.write("s.jsonl", &samples);
    let output = work.0.path().join("graded.jsonl");
    let mut warnings = Vec::new();
    let mut run = |bad| {
        let mut warn = |line: &str| warnings.push(line.to_owned());
        grade(std::slice::from_ref(&problems), std::slice::from_ref(&samples), &output, &work.1, bad, &mut warn)
    };
    assert!(run(0).unwrap_err().to_string().contains("s.jsonl: line 3"));
    assert!(!output.exists());
    let graded = run(1).unwrap();
    assert_eq!((graded.samples, graded.correct), (2, 1));
    let expected = [
        json!({"id": "T/0", "prompt": "another form", "response": "    return b + a\n", "extra": [1], "correct": true, "outcome": "passed"}),
        json!({"id": "T/0", "response": "    return a\n", "correct": false, "outcome": "failed: AssertionError"}),
    ];
    assert_eq!(lines(&output), expected);
    assert!(run(1).unwrap_err().to_string().contains("exists"));
    assert_eq!(warnings.len(), 1);
}

#[test]
fn programs_do_not_run_without_a_sandbox() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { dev_share: 0.0, seed: 1, binarise: false, max_bad_lines: 1, sandbox: None };
    let error = prepare(Dataset::Code, &[], folder.path(), &options, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("no sandbox"), "{error}");
}
