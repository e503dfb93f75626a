//! Evaluations of tiny checkpoints through the command: what is read, what is left, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    folder.canonicalize().unwrap().to_str().unwrap().to_owned()
}

/// A folder with data and results.
struct Work(TempDir);

impl Work {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<str>) -> &Self {
        fs::write(self.path(name), text.as_ref()).unwrap();
        self
    }

    fn lines(&self, name: &str, lines: &[Value]) -> &Self {
        self.write(name, lines.iter().map(|line| format!("{line}\n")).collect::<String>())
    }

    fn command(&self, task: &str, files: &[&str], options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plumb-train"));
        command.args(["evaluate", task]).args(files.iter().map(|name| self.path(name))).args(options);
        command.args(["--resamples", "500", "--threads", "1"]).env_remove("PLUMB_API_KEY");
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// What an evaluation of a fixture says, and a line for each of its items.
    fn evaluate(&self, task: &str, files: &[&str], model: &str, options: &[&str]) -> (Value, Vec<Value>) {
        let folder = tempfile::tempdir_in(self.0.path()).unwrap();
        let model = fixture(model);
        let own = ["--json", "--model", &model, "--output", folder.path().to_str().unwrap()];
        let output = self.command(task, files, &[&own[..], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        let written = fs::read_to_string(folder.path().join("results.json")).unwrap();
        assert_eq!(printed, serde_json::from_str::<Value>(&written).unwrap());
        let items = fs::read_to_string(folder.path().join("items.jsonl")).unwrap();
        (printed, items.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn refused(&self, task: &str, files: &[&str], options: &[&str]) -> String {
        let output = self.command(task, files, options);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// The one result of a name, metric and score.
#[track_caller]
fn result<'a>(results: &'a Value, name: &str, metric: &str, score: Option<&str>) -> &'a Value {
    let all = results["results"].as_array().unwrap();
    let is = |found: &&Value| {
        found["name"] == name && found["metric"] == metric && found.get("score").and_then(Value::as_str) == score
    };
    let found: Vec<_> = all.iter().filter(is).collect();
    assert_eq!(found.len(), 1, "{name} {metric} {score:?}: {all:#?}");
    found[0]
}

fn value(result: &Value) -> f64 {
    result["value"].as_f64().unwrap()
}

fn reward(line: &Value, side: usize) -> f64 {
    line["scores"][side]["reward"].as_f64().unwrap()
}

fn pair(i: usize) -> Value {
    let (chosen, rejected) = if i.is_multiple_of(2) { ("Yes.", "No.") } else { ("No.", "Yes.") };
    json!({"prompt": format!("Is {i} even? "), "chosen": chosen, "rejected": rejected})
}

#[test]
fn pairs_by_file_and_over_all() {
    let work = Work::new();
    let turns = |answer: &str| json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]);
    work.lines("a.jsonl", &(0..12).map(pair).collect::<Vec<_>>());
    work.lines("b.jsonl", &[json!({"chosen": turns("Hello."), "rejected": turns("No.")}), pair(3), pair(4)]);
    let (found, items) = work.evaluate("pairs", &["a.jsonl", "b.jsonl"], "llama-pm", &["--dtype", "f32"]);
    assert_eq!((items.len(), &found["items"], &found["failed"]), (15, &json!(15), &json!(0)));
    assert_eq!((&found["model"]["kind"], &found["model"]["dtype"]), (&json!("preference"), &json!("f32")));
    assert_eq!(found["options"]["files"], json!(["a.jsonl", "b.jsonl"]), "names without folders");
    let right = |of: &[Value]| {
        let credit = |line: &Value| if reward(line, 0) > reward(line, 1) { 1.0 } else { 0.0 };
        of.iter().map(credit).sum::<f64>() / of.len() as f64
    };
    let margin = |of: &[Value]| of.iter().map(|l| reward(l, 0) - reward(l, 1)).sum::<f64>() / of.len() as f64;
    for (name, own) in [("a", &items[..12]), ("b", &items[12..]), ("all", &items[..])] {
        let accuracy = result(&found, name, "accuracy", Some("reward"));
        assert!((value(accuracy) - right(own)).abs() < 1e-12 && accuracy["n"] == own.len(), "{accuracy}");
        let [low, high] = ["low", "high"].map(|end| accuracy[end].as_f64().unwrap());
        assert!(low <= value(accuracy) && value(accuracy) <= high && low < high, "{accuracy}");
        assert!((value(result(&found, name, "margin", Some("reward"))) - margin(own)).abs() < 1e-9);
    }
    let bins = found["calibration"][0]["bins"].as_array().unwrap();
    assert_eq!(bins.iter().map(|bin| bin["n"].as_u64().unwrap()).sum::<u64>(), 15);
    assert_eq!((&items[12]["file"], &items[12]["line"]), (&json!("b"), &json!(1)));
    let (again, _) = work.evaluate("pairs", &["a.jsonl", "b.jsonl"], "llama-pm", &["--dtype", "f32"]);
    assert_eq!(again, found, "the same command gives the same numbers");
    let (less, _) = work.evaluate("pairs", &["a.jsonl", "b.jsonl"], "llama-pm", &["--limit", "2"]);
    assert_eq!(less["items"], 4);
}

#[test]
fn a_table_and_plots_for_people() {
    let work = Work::new();
    work.lines("a.jsonl", &(0..12).map(pair).collect::<Vec<_>>()).lines("b.jsonl", &[pair(3), pair(4)]);
    let (model, output) = (fixture("llama-pm"), work.path("out"));
    let options = ["--model", &model, "--output", output.to_str().unwrap()];
    let done = work.command("pairs", &["a.jsonl", "b.jsonl"], &options);
    let table = String::from_utf8(done.stdout).unwrap();
    assert!(table.starts_with("name") && table.contains("calibration error") && table.contains("llama-pm"), "{table}");
    let mut names: Vec<_> =
        fs::read_dir(&output).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["accuracy.svg", "calibration.svg", "items.jsonl", "results.json"]);
    let error = work.refused("pairs", &["a.jsonl"], &options);
    assert!(error.contains("name another folder"), "{error}");
}

#[test]
fn what_is_too_long_is_counted_named_and_never_cut_by_itself() {
    let work = Work::new();
    let long = json!({"prompt": "long ".repeat(3000), "chosen": "Yes.", "rejected": "No."});
    work.write("pairs.jsonl", format!("{}\n{long}\nno json\n{}\n", pair(1), pair(2)));
    let (found, items) = work.evaluate("pairs", &["pairs.jsonl"], "llama-pm", &[]);
    assert_eq!((&found["items"], &found["failed"], &found["bad_lines"]), (&json!(3), &json!(1), &json!(1)));
    assert_eq!(result(&found, "pairs", "accuracy", Some("reward"))["n"], 2);
    assert_eq!((&found["failures"][0]["file"], &found["failures"][0]["line"]), (&json!("pairs"), &json!(2)));
    assert!(items[1]["scores"][0]["error"].as_str().unwrap().contains("1024"), "{}", items[1]);
    let (cut, _) = work.evaluate("pairs", &["pairs.jsonl"], "llama-pm", &["--auto-truncate"]);
    assert_eq!((&cut["failed"], &result(&cut, "pairs", "accuracy", Some("reward"))["n"]), (&json!(0), &json!(3)));
    let error = work.refused("pairs", &["pairs.jsonl"], &["--model", &fixture("llama-pm"), "--max-bad-lines", "0"]);
    assert!(error.contains("line 3") && error.contains("more than 0 lines are bad"), "{error}");
}

#[test]
fn choices_by_every_objective() {
    let work = Work::new();
    let question =
        |i: usize| json!({"prompt": format!("Count: {i}, "), "choices": ["one", "two", "three."], "label": i % 3});
    work.lines("choices.jsonl", &(0..9).map(question).collect::<Vec<_>>());
    let objectives = ["--objective", "mean", "--objective", "sum", "--objective", "mutual-information"];
    let (found, items) = work.evaluate("choices", &["choices.jsonl"], "llama-lm", &objectives);
    for (score, key) in [("mean", "mean"), ("sum", "sum"), ("mutual information", "mutual_information")] {
        let right = items.iter().filter(|line| {
            let scores: Vec<f64> =
                line["scores"].as_array().unwrap().iter().map(|s| s["log_prob"][key].as_f64().unwrap()).collect();
            let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let label = line["right"].as_array().unwrap().iter().position(|right| right == true).unwrap();
            scores[label] == best
        });
        let expected = right.count() as f64 / 9.0;
        assert!((value(result(&found, "choices", "accuracy", Some(score))) - expected).abs() < 1e-12, "{score}");
    }
    let hellaswag = |i: usize| json!({"ctx": format!("He takes {i}"), "endings": ["a.", "b.", "c.", "d."], "label": 3});
    work.lines("hellaswag.jsonl", &(0..4).map(hellaswag).collect::<Vec<_>>());
    let (found, items) = work.evaluate("hellaswag", &["hellaswag.jsonl"], "llama-pm", &[]);
    assert_eq!(items[0]["right"], json!([false, false, false, true]));
    assert_eq!(result(&found, "hellaswag", "accuracy", Some("reward"))["n"], 4);
    // The text is the one that a run learns: the rewards are those of the whole strings.
    let whole = |ending: &str| json!({"chosen": format!("He takes 0 {ending}"), "rejected": "x"});
    work.lines("whole.jsonl", &["a.", "b.", "c.", "d."].map(whole));
    let (_, whole) = work.evaluate("pairs", &["whole.jsonl"], "llama-pm", &[]);
    for (i, whole) in whole.iter().enumerate() {
        assert_eq!(reward(&items[0], i), reward(whole, 0));
    }
}

#[test]
fn all_of_a_group_have_to_be_right() {
    let work = Work::new();
    let rows: String = (0..22).map(|i| format!("{},\"I walk, because of {i}.\"\n", i % 2)).collect();
    work.write("justice.csv", format!("label,scenario\n{rows}"));
    let (found, items) = work.evaluate("ethics-justice", &["justice.csv"], "llama-pm", &["--dtype", "f32"]);
    // Five groups of four; the last two rows are none.
    let groups: Vec<bool> =
        items.chunks_exact(4).map(|group| group.iter().all(|line| reward(line, 0) > reward(line, 1))).collect();
    assert_eq!((items.len(), groups.len()), (22, 5));
    let grouped = result(&found, "justice", "group accuracy", Some("reward"));
    assert_eq!(grouped["n"], 5);
    assert!((value(grouped) - groups.iter().filter(|right| **right).count() as f64 / 5.0).abs() < 1e-12);
    assert_eq!(result(&found, "justice", "accuracy", Some("reward"))["n"], 22);
    let (less, _) = work.evaluate("ethics-justice", &["justice.csv"], "llama-pm", &["--limit", "2"]);
    assert_eq!(
        (&less["items"], &result(&less, "justice", "group accuracy", Some("reward"))["n"]),
        (&8.into(), &2.into())
    );
    // The generic form, its lines in any order; one that fails takes its group out.
    let mut lines: Vec<Value> = (0..9).map(pair).collect();
    lines.iter_mut().enumerate().for_each(|(i, line)| line["group"] = json!(i % 3));
    lines[4]["prompt"] = json!("long ".repeat(3000));
    work.lines("groups.jsonl", &lines);
    let (found, _) = work.evaluate("groups", &["groups.jsonl"], "llama-pm", &[]);
    assert_eq!(result(&found, "groups", "group accuracy", Some("reward"))["n"], 2);
    assert_eq!(result(&found, "groups", "accuracy", Some("reward"))["n"], 8);
}

#[test]
fn hhh_by_category_objective_and_prompt() {
    let work = Work::new();
    let example =
        |i: usize| json!({"input": format!("q{}", i / 2), "target_scores": {"good": 1, (format!("bad {i}")): 0}});
    for name in ["helpful", "honest"] {
        let examples: Vec<_> = (0..4).map(example).collect();
        work.write(&format!("{name}.task.json"), json!({"examples": examples}).to_string());
    }
    let files = ["helpful.task.json", "honest.task.json"];
    let prompts = ["--hhh-prompt", "none", "--hhh-prompt", "short"];
    let (found, items) = work.evaluate("hhh", &files, "../../server/models/lm", &prompts);
    assert_eq!((items.len(), &found["failed"], found["results"].as_array().unwrap().len()), (16, &json!(0), 2 * 3 * 6));
    for score in ["mutual information", "mean", "sum"] {
        for score in [score.to_owned(), format!("{score}, short HHH prompt")] {
            for (name, n) in [("helpful", 4), ("honest", 4), ("all", 8)] {
                assert_eq!(result(&found, name, "accuracy", Some(&score))["n"], n);
            }
        }
    }
    // The full prompt does not fit: its items fail, the others are measured.
    let (found, _) = work.evaluate("hhh", &files, "llama-lm", &["--hhh-prompt", "none", "--hhh-prompt", "full"]);
    assert_eq!((&found["failed"], found["results"].as_array().unwrap().len()), (&json!(8), 3 * 6));
    let (found, _) = work.evaluate("hhh", &files, "llama-pm", &[]);
    assert_eq!(result(&found, "all", "accuracy", Some("reward"))["n"], 8);
}

#[test]
fn truthfulqa_in_the_form_that_fits_the_model() {
    let work = Work::new();
    let question = json!({"question": "What is it?", "mc1_targets": {"It is.": 1, "It is not.": 0, "Both.": 0}});
    let broken = json!({"question": "What?", "mc1_targets": {"a": 1, "b": 1}});
    work.write("mc_task.json", json!([question, broken]).to_string());
    let (found, items) = work.evaluate("truthfulqa", &["mc_task.json"], "llama-pm", &[]);
    assert_eq!((&found["items"], &found["bad_lines"]), (&json!(1), &json!(1)));
    let turns =
        |answer: &str| json!([{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]);
    work.lines("dialogue.jsonl", &[json!({"chosen": turns("It is."), "rejected": turns("It is not.")})]);
    let (_, dialogue) = work.evaluate("pairs", &["dialogue.jsonl"], "llama-pm", &[]);
    assert_eq!((reward(&items[0], 0), reward(&items[0], 1)), (reward(&dialogue[0], 0), reward(&dialogue[0], 1)));
    let (found, items) = work.evaluate("truthfulqa", &["mc_task.json"], "llama-lm", &[]);
    assert_eq!(found["results"].as_array().unwrap().len(), 3);
    work.lines("plain.jsonl", &[json!({"prompt": "What is it?", "chosen": " It is.", "rejected": " It is not."})]);
    let (_, plain) = work.evaluate("pairs", &["plain.jsonl"], "llama-lm", &[]);
    assert_eq!(items[0]["scores"][1]["log_prob"]["mean"], plain[0]["scores"][1]["log_prob"]["mean"]);
}

#[test]
fn samples_are_ranked_by_problem() {
    let work = Work::new();
    let sample = |i: usize| json!({"id": i % 2, "prompt": format!("{}: ", i % 2), "response": format!("sample {i}"), "correct": i.is_multiple_of(3)});
    work.lines("samples.jsonl", &(0..10).map(sample).collect::<Vec<_>>());
    let (found, items) = work.evaluate("rerank", &["samples.jsonl"], "llama-pm", &["--dtype", "f32"]);
    assert_eq!((items.len(), &items[0]["id"], items[1]["scores"].as_array().unwrap().len()), (2, &json!("0"), 5));
    let score = Some("reward");
    // Two of five are correct for each: one sample is right as often, two of two are wrong three times of ten.
    assert!((value(result(&found, "samples", "acc@1", score)) - 0.4).abs() < 1e-12);
    assert!((value(result(&found, "samples", "pass@1", score)) - 0.4).abs() < 1e-12);
    assert!((value(result(&found, "samples", "pass@2", score)) - 0.7).abs() < 1e-12);
    let best = |line: &Value| {
        let first = (0..5).max_by(|a, b| reward(line, *a).total_cmp(&reward(line, *b))).unwrap();
        f64::from(u8::from(line["right"][first] == true))
    };
    let expected = (best(&items[0]) + best(&items[1])) / 2.0;
    assert!((value(result(&found, "samples", "acc@5", score)) - expected).abs() < 1e-12);
}

#[test]
fn the_best_of_more_samples_scores_more() {
    let work = Work::new();
    let sample =
        |i: usize| json!({"id": i % 2, "prompt": format!("{}: ", i % 2), "response": format!("sample {}", i * i)});
    work.lines("samples.jsonl", &(0..8).map(sample).collect::<Vec<_>>());
    let (found, items) = work.evaluate("best-of-n", &["samples.jsonl"], "llama-pm", &["--dtype", "f32"]);
    let rewards = items.iter().map(|line| {
        let mut rewards: Vec<f64> = (0..4).map(|i| reward(line, i)).collect();
        rewards.sort_by(f64::total_cmp);
        rewards
    });
    let rewards: Vec<Vec<f64>> = rewards.collect();
    // Of four, worst first: how often each is the best of one, of two, of three and of all.
    let weights = [[0.25; 4], [0.0, 1.0 / 6.0, 2.0 / 6.0, 3.0 / 6.0], [0.0, 0.0, 0.25, 0.75], [0.0, 0.0, 0.0, 1.0]];
    for (k, weights) in (1..).zip(weights) {
        let best =
            |rewards: &Vec<f64>| rewards.iter().zip(weights).map(|(reward, weight)| reward * weight).sum::<f64>();
        let expected = rewards.iter().map(best).sum::<f64>() / 2.0;
        let measured = result(&found, "samples", &format!("best@{k}"), Some("reward"));
        assert!((value(measured) - expected).abs() < 1e-9, "{measured} {expected}");
        let kl_bound = f64::from(k).ln() - f64::from(k - 1) / f64::from(k);
        assert!((measured["kl_bound"].as_f64().unwrap() - kl_bound).abs() < 1e-12, "{measured}");
        assert!(measured["low"].as_f64() <= Some(expected) && measured["high"].as_f64() >= Some(expected - 1e-9));
    }
}

#[test]
fn rewardbench_sums_up_as_its_own_package() {
    let python = std::env::var("PLUMB_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import rewardbench.utils"]).output();
    if !found.is_ok_and(|output| output.status.success()) {
        println!("skipped: {python} has no rewardbench; PLUMB_PYTHON names another");
        return;
    }
    let script = fixture("").replace("fixtures", "python/check_rewardbench.py");
    let output = Command::new(python)
        .args([&script, env!("CARGO_BIN_EXE_plumb-train"), &fixture("llama-pm")])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success() && said[0].ends_with("the same\n"), "{}{}", said[0], said[1]);
}

#[test]
fn rewardbench_and_rm_bench_sum_up_their_rows() {
    let work = Work::new();
    let row = |subset: &str, i: usize| json!({"prompt": format!("p{i}"), "chosen": "yes", "rejected": "no", "subset": subset, "id": i});
    work.lines("v1.jsonl", &[row("alpacaeval-easy", 1), row("hep-rust", 2), row("math-prm", 3)]);
    let (found, _) = work.evaluate("rewardbench", &["v1.jsonl"], "llama-pm", &[]);
    let section = |name: &str| value(result(&found, name, "section score", Some("reward")));
    assert!((section("all") - (section("Chat") + section("Reasoning")) / 2.0).abs() < 1e-12);
    let row = json!({"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "id": "7"});
    let ties = |id: &str| json!({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "id": id});
    work.lines("v2.jsonl", &[row, ties("ref:0"), ties("tied:0")]);
    let (found, items) = work.evaluate("rewardbench", &["v2.jsonl"], "llama-pm", &[]);
    assert_eq!((&items[0]["right"], &items[0]["category"]), (&json!([true, false, false, false]), &json!("Math")));
    assert_eq!(result(&found, "Ties", "section score", Some("reward"))["n"], 2);
    let styles = json!([{"id": 1, "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}]);
    work.write("chat.json", styles.to_string());
    let (found, _) = work.evaluate("rm-bench", &["chat.json"], "llama-pm", &[]);
    let of = |metric: &str| value(result(&found, "chat", metric, Some("reward")));
    let mean = (of("easy accuracy") + of("normal accuracy") + of("hard accuracy")) / 3.0;
    assert!((of("accuracy") - mean).abs() < 1e-12);
}

#[test]
fn lambada_counts_last_words() {
    let work = Work::new();
    let lines =
        [json!({"context": "It was a dark and", "continuation": "stormy"}), json!({"text": "The end of the day"})];
    work.lines("lambada.jsonl", &lines);
    let (found, items) = work.evaluate("lambada", &["lambada.jsonl"], "llama-lm", &[]);
    assert_eq!((&items[0]["word"], &items[1]["word"]), (&json!("stormy"), &json!("day")));
    let right = items.iter().filter(|line| line["right"] == true).count() as f64;
    assert!((value(result(&found, "lambada", "accuracy", Some("greedy"))) - right / 2.0).abs() < 1e-12);
    let (prompted, _) = work.evaluate("lambada", &["lambada.jsonl"], "llama-lm", &["--form", "dialogue"]);
    assert_eq!(result(&prompted, "lambada", "accuracy", Some("greedy"))["n"], 2);
    let error = work.refused("lambada", &["lambada.jsonl"], &["--model", &fixture("llama-pm")]);
    assert!(error.contains("needs a language model"), "{error}");
}

#[test]
fn elo_needs_no_model() {
    let work = Work::new();
    work.lines(
        "games.jsonl",
        &[
            json!({"a": "old", "b": "new", "wins_a": 100, "games": 400}),
            json!({"a": "new", "b": "other", "win_rate": 0.5, "games": 100}),
        ],
    );
    let output = work.command("elo", &["games.jsonl"], &["--json", "--anchor", "new"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let points = 400.0 * 3f64.log10();
    assert!((value(result(&found, "old", "elo", None)) + points).abs() < 1e-6);
    let other = result(&found, "other", "elo", None);
    assert!(value(other).abs() < 1e-6 && other["low"].as_f64().unwrap() < 0.0 && other["n"] == 100, "{other}");
    let error = work.refused("elo", &["games.jsonl"], &["--model", "x"]);
    assert!(error.contains("elo needs no model"), "{error}");
}

#[test]
fn options_that_make_no_sense() {
    let work = Work::new();
    work.lines("pairs.jsonl", &[pair(1)]).write("empty.jsonl", "");
    let check = |options: &[&str], reason: &str| {
        let error = work.refused("pairs", &["pairs.jsonl"], options);
        assert!(error.contains(reason), "{options:?}: {error}");
    };
    check(&[], "--model, or a server by --server");
    check(&["--model", &fixture("llama-pm"), "--limit", "0"], "at least 1");
    check(&["--model", &fixture("llama-pm"), "--anchor", "a"], "goes with elo");
    check(&["--server", "http://127.0.0.1:1"], "cannot reach");
    let error = work.refused("pairs", &["empty.jsonl"], &["--model", &fixture("llama-pm")]);
    assert!(error.contains("the files hold no items"), "{error}");
}
