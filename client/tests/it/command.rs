//! The command, as a process: what it prints and how it exits.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Status};
use tonic_health::ServingStatus;

use crate::fake::{Fake, ROOM, Step};

/// What a run left behind.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    pub(crate) fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Exit code 0; answers standard output.
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        &self.out
    }
}

async fn plumb_with(server: &str, stdin: &str, args: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
    command.arg("--server").arg(server).args(args);
    command.env_remove("PLUMB_MODEL").env_remove("PLUMB_API_KEY");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let stdin = stdin.to_owned();
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        // A command that does not read its input may have closed it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    });
    let output = output.await.unwrap();
    Run {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) async fn plumb(fake: &Fake, args: &[&str]) -> Run {
    plumb_with(&fake.url, "", args).await
}

fn file(folder: &TempDir, name: &str, text: &str) -> String {
    let path: PathBuf = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    shown(&path)
}

pub(crate) fn shown(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes() {
    let fake = Fake::start([]).await;
    for (args, code) in [
        ("--help", 0),
        ("score --help", 0),
        ("--version", 0),
        ("score --text a", 0),
        ("score --text refuse", 1),
        ("health --nonsense", 64),
        ("score /no/such/file", 64),
        ("bench unique --end-token-id 5", 64),
    ] {
        let run = plumb(&fake, &args.split(' ').collect::<Vec<_>>()).await;
        assert_eq!(run.code, code, "{args}: {}{}", run.out, run.err);
    }
    assert_eq!(plumb_with("http://127.0.0.1:1", "", &["health"]).await.code, 2);
    assert_eq!(plumb_with("127.0.0.1:1", "", &["health"]).await.code, 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn score_as_a_table() {
    let fake = Fake::start([]).await;
    let run = plumb(&fake, &["score", "--prompt", "q", "--response", "abc", "--response", "refuse"]).await;
    let mut lines = run.out.lines();
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>(),
        ["line", "reward", "tokens", "cached", "text"]
    );
    assert_eq!(lines.next().unwrap().split_whitespace().collect::<Vec<_>>(), ["1", "3.000000", "3", "1", "abc"]);
    assert!(lines.next().unwrap().contains("INVALID_ARGUMENT: too long"));
    assert!(run.out.contains("pm version 3 (0123456789ab)") && run.out.contains("1 items failed"), "{}", run.out);
    assert_eq!(run.code, 1);
    assert!(plumb(&fake, &["score", "--text", "a", "--per-token"]).await.ok().contains("7   0.500000  \\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn score_lines_keep_their_order() {
    // The first call is answered after the third has arrived.
    let fake = Fake::start([Step::HoldUntilCalls(3)]).await;
    let folder = tempfile::tempdir().unwrap();
    let text: String = (1..=6).map(|n| format!("{{\"text\": \"{}\", \"id\": \"i{n}\"}}\n", "x".repeat(n))).collect();
    let path = file(&folder, "a.jsonl", &text);
    let run =
        plumb(&fake, &["score", "--model", "lm", "--json", "--batch-size", "2", "--concurrency", "3", &path]).await;
    run.ok();
    let expect = |n: u32| {
        json!({
            "line": n, "id": format!("i{n}"), "reward": n as f32, "input_tokens": n, "cached_tokens": 1,
            "truncated": false, "log_probs": {"sum": n as f32, "mean": 0.1, "response_tokens": 2, "greedy": false},
            "model": "lm", "version": 3, "weights_digest": "0123456789abcdef",
        })
    };
    assert_eq!(run.json(), (1..=6).map(expect).collect::<Vec<_>>());
    assert_eq!(fake.calls(), 3);
    // f32 values are written as such, not as the nearest double's digits.
    assert!(run.out.contains("\"mean\":0.1,"), "{}", run.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_lines_are_reported_and_the_others_scored() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, "a.jsonl", "{\"text\": \"a\"}\nnonsense\n\n{\"prompt\": \"q\", \"response\": \"bc\"}\n");
    let run = plumb(&fake, &["--json", "score", &path]).await;
    assert_eq!(run.code, 1);
    assert!(run.err.contains(&format!("{path}:2: ")) && run.err.contains("1 broken lines"), "{}", run.err);
    let lines = run.json();
    let rewards: Vec<_> = lines.iter().map(|line| (line["line"].as_u64(), line["reward"].as_f64())).collect();
    assert_eq!(rewards, [(Some(1), Some(1.0)), (Some(2), None), (Some(4), Some(2.0))]);
    assert_eq!(lines[1]["error"]["code"], "INVALID_ARGUMENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_are_counted() {
    let fake = Fake::start([]).await;
    let pairs = "{\"chosen\": \"aaa\", \"rejected\": \"b\"}\n{\"chosen\": \"a\", \"rejected\": \"bb\"}\n\
                 {\"chosen\": \"a\", \"rejected\": \"b\"}\n{\"chosen\": \"refuse\", \"rejected\": \"b\"}\n";
    let run = plumb_with(&fake.url, pairs, &["score", "--batch-size", "3", "-"]).await;
    assert_eq!(run.code, 1, "{}", run.err);
    let line = run.out.lines().find(|line| line.starts_with("pairs: ")).unwrap();
    assert!(line.starts_with("pairs: 3, chosen over rejected in 50.00 %") && line.contains("1 ties"), "{line}");

    // Many rows become numbers.
    let many = "{\"chosen\": \"aaa\", \"rejected\": \"b\"}\n".repeat(40);
    let run = plumb_with(&fake.url, &many, &["score"]).await;
    let out = run.ok();
    assert!(
        out.contains("reward: mean 2.0000") && out.contains("pairs: 40, chosen over rejected in 100.00 %"),
        "{out}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn output_goes_to_a_file() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (file(&folder, "a.jsonl", "{\"text\": \"a\"}\n"), shown(&folder.path().join("out.jsonl")));
    let run = plumb(&fake, &["score", &path, &path, "--limit", "2", "--output", &out]).await;
    assert!(run.ok().contains("2 items"));
    let lines: Vec<Value> =
        std::fs::read_to_string(&out).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["file"], json!(path));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_call_fails_its_items_and_a_refused_one_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, "a.jsonl", &"{\"text\": \"a\"}\n".repeat(3));
    let run = |fake: Fake| {
        let path = path.clone();
        async move { plumb(&fake, &["--json", "score", "--batch-size", "1", "--concurrency", "1", &path]).await }
    };
    let fake = Fake::start([Step::Answer, Step::Fail(Status::new(Code::ResourceExhausted, "too large"))]).await;
    let passing = run(fake).await;
    assert_eq!(passing.code, 1);
    assert_eq!(passing.json()[1]["error"], json!({"code": "RESOURCE_EXHAUSTED", "message": "too large"}));
    assert_eq!(passing.json()[2]["reward"], 1.0);

    let fake = Fake::start([Step::Answer, Step::Fail(Status::not_found("no model named pm"))]).await;
    let ended = run(fake).await;
    assert_eq!((ended.code, ended.json().len()), (2, 1), "{}", ended.err);
    assert!(ended.err.contains("NOT_FOUND: no model named pm"), "{}", ended.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_item_that_cannot_be_scored_does_not_end_the_run() {
    let fake = Fake::start([]).await;
    let lines = |texts: &[&str]| texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect::<String>();
    for (bad, code) in [("refuse", "INVALID_ARGUMENT"), ("infinite", "INTERNAL")] {
        // The last one is a call of its own; then a call of such items only.
        for texts in [[vec!["a"; 32], vec![bad]].concat(), vec![bad; 5]] {
            let run = plumb_with(&fake.url, &lines(&texts), &["--json", "score"]).await;
            assert_eq!((run.code, run.json().len()), (1, texts.len()), "{}", run.err);
            for (text, line) in texts.iter().zip(run.json()) {
                match *text == bad {
                    true => assert_eq!(line["error"]["code"], code),
                    false => assert_eq!(line["reward"], 1.0),
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_too_large_is_split() {
    let fake = Fake::start([]).await;
    let (long, longer) = ("x".repeat(ROOM / 10), "x".repeat(ROOM + 1));
    let lines = |texts: &[&str]| texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect::<String>();
    let run = plumb_with(&fake.url, &lines(&[long.as_str(); 32]), &["--json", "score"]).await;
    run.ok();
    assert_eq!((run.json().len(), run.json()[31]["line"].as_u64(), fake.calls()), (32, Some(32), 7));
    let run = plumb_with(&fake.url, &lines(&["a", &longer, "a"]), &["--json", "score"]).await;
    assert_eq!((run.code, &run.json()[2]["reward"]), (1, &json!(1.0)));
    assert_eq!(run.json()[1]["error"]["message"], "too many tokens of work; split it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ends_does_not_wait_for_its_input() {
    let fake = Fake::start([Step::Fail(Status::not_found("no model named pm"))]).await;
    let url = fake.url.clone();
    let run = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
        command.args(["--server", &url, "score", "-"]).stdin(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        // Kept open until the command has ended; a part of a batch is sent after a moment all the same.
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"{\"text\": \"a\"}\n").unwrap();
        child.wait().unwrap()
    });
    assert_eq!(run.await.unwrap().code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn rank_candidates() {
    let fake = Fake::start([]).await;
    let run = plumb(&fake, &["rank", "--prompt", "q", "a", "ccc", "bb"]).await;
    let rows: Vec<Vec<&str>> = run.ok().lines().skip(2).take(3).map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            ["1", "3.000000", "0.000000", "0.5000", "ccc"],
            ["2", "2.000000", "-1.000000", "0.2689", "bb"],
            ["3", "1.000000", "-2.000000", "0.1192", "a"],
        ]
    );
    let lines = "{\"prompt\": \"q\", \"candidates\": [\"a\", \"refuse\"], \"id\": 5}\n{\"text\": \"x\"}\n";
    let run = plumb_with(&fake.url, lines, &["--json", "rank", "--file", "-"]).await;
    assert_eq!(run.code, 1);
    let json = run.json();
    assert_eq!((&json[0]["id"], &json[0]["ranked"][0]["reward"]), (&json!(5), &json!(1.0)));
    assert_eq!(json[0]["ranked"][1]["error"]["message"], "too long");
    assert_eq!(json[1]["error"]["code"], "INVALID_ARGUMENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_text() {
    let fake = Fake::start([]).await;
    let run = plumb(&fake, &["generate", "hello"]).await;
    assert_eq!(run.ok(), "tick tock\n");
    assert!(run.err.contains("seed 11") && run.err.contains("ended by eos"), "{}", run.err);
    let run =
        plumb_with(&fake.url, "hello\n", &["--json", "generate", "--n", "2", "--best-of", "4", "--ranker", "rm"]).await;
    run.ok();
    let lines = run.json();
    assert_eq!(lines.len(), 2);
    assert_eq!((&lines[1]["text"], &lines[1]["reward"]), (&json!("tick tock"), &json!(0.25)));
    assert_eq!((&lines[1]["ranker"]["model"], &lines[1]["index"]), (&json!("rm"), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_models_and_health() {
    let fake = Fake::start([]).await;
    assert!(plumb(&fake, &["tokenize", "ab"]).await.ok().contains("2 tokens"));
    let render = plumb(&fake, &["render", "--prompt", "q", "--response", "a"]).await;
    assert!(render.ok().contains("token ids: 1 2 3") && render.ok().contains("response at 1..3, template feed"));
    assert_eq!(plumb(&fake, &["--json", "models"]).await.json().len(), 2);
    assert!(plumb(&fake, &["models", "load", "pm", "/x", "--version", "9"]).await.ok().contains("AVAILABLE"));
    assert!(plumb(&fake, &["models", "unload", "pm", "2"]).await.ok().contains("DRAINING"));
    assert!(plumb(&fake, &["models", "label", "pm", "stable", "3"]).await.ok().contains("stable"));
    let split = plumb(&fake, &["models", "traffic", "pm", "stable=95", "canary=5"]).await;
    let split = split.ok();
    assert!(split.contains("stable (weight 95)") && split.contains("canary (weight 5)"), "{split}");
    assert!(plumb(&fake, &["models", "traffic", "pm", "stable"]).await.err.contains("LABEL=WEIGHT"));
    assert_eq!(plumb(&fake, &["models", "watch"]).await.ok(), "pm 2 AVAILABLE\npm 3 AVAILABLE\n");

    assert!(plumb(&fake, &["health"]).await.ok().contains("plumb.v1.Generation  SERVING"));
    fake.set_health("plumb.v1.Generation", ServingStatus::NotServing).await;
    assert!(plumb(&fake, &["health"]).await.ok().contains("plumb.v1.Generation  NOT_SERVING"));
    fake.set_health("", ServingStatus::NotServing).await;
    let run = plumb(&fake, &["health"]).await;
    assert!(run.code == 1 && run.out.contains("(server)             NOT_SERVING"), "{}", run.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn eval_measures_every_setting() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let example =
        |input: &str, better: &str, worse: &str| json!({"input": input, "target_scores": {better: 1, worse: 0}});
    let task = json!({"examples": [example("p", "aaa", "b"), example("p", "aa", "b"), example("q", "a", "bb")]});
    let path = file(&folder, "helpful.task.json", &task.to_string());
    let out = shown(&folder.path().join("details.jsonl"));
    let run = plumb(
        &fake,
        &[
            "eval",
            "hhh",
            &path,
            "--model",
            "lm",
            "--objective",
            "mutual-information",
            "--hhh-prompt",
            "none",
            "--hhh-prompt",
            "full",
            "--output",
            &out,
            "--batch-size",
            "3",
        ],
    )
    .await;
    let lines: Vec<&str> = run.ok().lines().collect();
    assert!(
        lines[0].contains("mutual-information, no HHH prompt | mutual-information, full HHH prompt"),
        "{}",
        run.out
    );
    assert!(
        lines[2].starts_with("| helpful") && lines[2].contains("66.7 (") && lines[2].contains("33.3 ("),
        "{}",
        run.out
    );
    let details = std::fs::read_to_string(out).unwrap();
    let first: Value = serde_json::from_str(details.lines().next().unwrap()).unwrap();
    assert_eq!((details.lines().count(), &first["better"], &first["worse"]), (6, &json!(3.0), &json!(1.0)));

    let pairs = file(
        &folder,
        "p.jsonl",
        "{\"chosen\": \"aa\", \"rejected\": \"b\"}\n{\"chosen\": \"refuse\", \"rejected\": \"b\"}\n",
    );
    let run = plumb(&fake, &["--json", "eval", "pairs", &pairs]).await;
    assert_eq!(run.code, 1);
    assert_eq!((&run.json()[0]["accuracy"], &run.json()[0]["measured"]), (&json!(1.0), &json!(1)));
    assert!(run.err.contains("1 comparisons without scores") && run.err.contains("too long"), "{}", run.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn bench_reports() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, "a.jsonl", "{\"text\": \"abc\"}\n{\"chosen\": \"a\", \"rejected\": \"b\"}\n");
    let report = async |args: &str| {
        let args = format!("--json bench {args} --warmup-secs 0.05 --requests 20");
        let run = plumb(&fake, &args.split(' ').collect::<Vec<_>>()).await;
        run.ok();
        run.json().remove(0)
    };
    let unique = report("unique --items 4 --tokens 16").await;
    assert_eq!(
        (&unique["requests"], &unique["sequences"], &unique["input_tokens"]),
        (&json!(20), &json!(80), &json!(1280))
    );
    let open = report("unique --items 1 --tokens 8 --rate 500").await;
    assert!(open["requests"] == 20 && open["latency_ms"]["p99"].as_f64().unwrap() > 0.0, "{open}");
    let rank = report("rank --candidates 8 --prompt-tokens 32 --tokens 8").await;
    assert_eq!(rank["sequences"], 160);
    let generate = report("generate --streams 4").await;
    assert_eq!(generate["generation"]["new_tokens"], 40);
    assert!(generate["generation"]["first_token_ms"]["p50"].as_f64().unwrap() > 0.0, "{generate}");
    assert_eq!(report(&format!("file {path} --items 3")).await["sequences"], 60);

    let fails = std::iter::repeat_n(Step::Fail(Status::resource_exhausted("full")), 5);
    let full = Fake::start(fails).await;
    let run = plumb(&full, &["bench", "unique", "--requests", "8", "--warmup-secs", "0"]).await;
    assert!(run.code == 1 && run.out.contains("failed: 5 RESOURCE_EXHAUSTED"), "{}{}", run.out, run.err);
}
