//! The `plumb` command against the real server: what it prints is what the server answers.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use plumb_client::{dialogue, text};
use plumb_tests::call::{self, items, named};
use plumb_tests::fixture::fixture;
use plumb_tests::{Launch, Server, binary};
use serde_json::Value;

/// What a run left behind.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    /// The JSON lines of a run with this exit code.
    #[track_caller]
    pub(crate) fn lines(&self, code: i32) -> Vec<Value> {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(crate) async fn plumb(server: &Server, stdin: &str, arguments: &[&str]) -> Run {
    run(&server.url(), stdin, arguments).await
}

pub(crate) async fn run(url: &str, stdin: &str, arguments: &[&str]) -> Run {
    let mut command = Command::new(binary("plumb"));
    command.args(["--server", url]).args(arguments).env_remove("PLUMB_MODEL").env_remove("PLUMB_API_KEY");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let stdin = stdin.to_owned();
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        // A command that does not read its input may have closed it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    });
    let output = output.await.unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Run { code: output.status.code().unwrap(), out, err }
}

fn bits(line: &Value) -> u32 {
    (line["reward"].as_f64().unwrap() as f32).to_bits()
}

#[tokio::test(flavor = "multi_thread")]
async fn score_answers_a_line_for_every_item() {
    let server = Launch::of(["llama-pm"]).start().await;
    let client = server.client().await;
    let stdin = r#"{"text": "A text.", "id": 7}
{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
{"prompt": "q", "response": "b"}
{"prompt": "q", "candidates": ["c", "d"]}
{"chosen": "Good.", "rejected": "Bad.", "id": "pair"}
"#;
    let inputs = vec![
        text("A text."),
        dialogue("q", "a"),
        dialogue("q", "b"),
        dialogue("q", "c"),
        dialogue("q", "d"),
        text("Good."),
        text("Bad."),
    ];
    let lines = plumb(&server, stdin, &["score", "--model", "llama-pm", "--json", "-"]).await.lines(0);
    let answer = client.score(items(None, inputs)).await.unwrap();
    let model = answer.model.unwrap();
    let expected: Vec<u32> = answer.results.iter().map(|r| plumb_client::reward(r).unwrap().to_bits()).collect();
    assert_eq!(lines.iter().map(bits).collect::<Vec<_>>(), expected);
    for line in &lines {
        assert_eq!((&line["model"], &line["version"]), (&"llama-pm".into(), &1.into()));
        assert_eq!(line["weights_digest"], model.weights_digest.as_str());
    }
    let places: Vec<_> = lines.iter().map(|line| line["line"].as_u64().unwrap()).collect();
    assert_eq!(places, [1, 2, 3, 4, 4, 5, 5]);
    assert_eq!((&lines[0]["id"], &lines[6]["id"], &lines[6]["side"]), (&7.into(), &"pair".into(), &"rejected".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn score_answers_what_it_can_and_ends_with_1_if_that_is_not_all() {
    let server = Launch::of(["llama-pm"]).start().await;
    let stdin = format!(
        "{{\"text\": \"good\"}}\n{{\"text\": \"{}\"}}\nno json\n{{\"text\": \"good\"}}\n",
        "long ".repeat(1000)
    );
    let lines = plumb(&server, &stdin, &["score", "--json"]).await.lines(1);
    assert_eq!(lines.len(), 4);
    assert_eq!(bits(&lines[0]), bits(&lines[3]));
    for line in &lines[1..3] {
        assert_eq!(line["error"]["code"], "INVALID_ARGUMENT", "{line}");
    }
    let cut = plumb(&server, &stdin, &["score", "--json", "--truncate", "left"]).await.lines(1);
    assert_eq!((&cut[1]["truncated"], &cut[1]["input_tokens"]), (&true.into(), &1024.into()));
    let table = plumb(&server, "", &["score", "--text", "good"]).await;
    assert!(table.code == 0 && table.out.contains("llama-pm version 1"), "{}", table.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn rank_and_generate_answer_what_the_server_does() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let client = server.client().await;
    let candidates = ["It is 4.", "Five.", "I am not sure."];
    let run = plumb(
        &server,
        "",
        &["rank", "--json", "--prompt", "What is 2 + 2?", candidates[0], candidates[1], candidates[2]],
    )
    .await;
    let ranked = run.lines(0).remove(0)["ranked"].as_array().unwrap().clone();
    let dialogues = candidates.map(|response| dialogue("What is 2 + 2?", response));
    let expected = call::rewards(&client, items(named("llama-pm"), dialogues.into())).await;
    assert_eq!(ranked.len(), 3);
    for (place, line) in ranked.iter().enumerate() {
        assert_eq!(line["rank"], place + 1);
        assert_eq!(bits(line), expected[line["index"].as_u64().unwrap() as usize]);
    }
    let arguments =
        ["generate", "--json", "--seed", "3", "--n", "2", "--max-new-tokens", "20", "--ignore-eos", "Hello"];
    let [first, second] =
        [plumb(&server, "", &arguments).await.lines(0), plumb(&server, "", &arguments).await.lines(0)];
    assert_eq!((first.len(), &first), (2, &second), "a seed gives the same text");
    let models = plumb(&server, "", &["models", "--json"]).await.lines(0);
    assert_eq!(models.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_by_its_exit_code() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let healthy = plumb(&server, "", &["health", "--json"]).await.lines(0);
    assert!(healthy.len() == 5 && healthy.iter().all(|line| line["status"] == "SERVING"), "{healthy:?}");
    // A server without a language model does not generate, and is well.
    let half = Launch::of(["llama-pm"]).start().await;
    let services = plumb(&half, "", &["health", "--json"]).await.lines(0);
    assert_eq!(services[2], serde_json::json!({"service": "plumb.v1.Generation", "status": "NOT_SERVING"}));
    let starting = Launch::of(["llama-pm"]).model_that_never_loads("slow").listen().await;
    assert_eq!(plumb(&starting, "", &["health"]).await.code, 1);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(run(&format!("http://{nobody}"), "", &["health"]).await.code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_model_those_of_the_program_answer() {
    let server = Launch::new().start().await;
    let ranked = plumb(&server, "", &["rank", "--prompt", "What is 2 + 2?", "It is 4.", "Five."]).await;
    assert!(ranked.code == 0 && ranked.out.contains("pm version 1"), "{}{}", ranked.out, ranked.err);
    let text = plumb(&server, "", &["generate", "--max-new-tokens", "8", "Hello"]).await;
    assert!(text.code == 0 && text.err.contains("lm version 1"), "{}{}", text.out, text.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_trained_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let pair = |i: usize| format!(r#"{{"prompt": "{i}: ", "chosen": "yes", "rejected": "no"}}"#);
    let data = folder.path().join("pairs.jsonl");
    std::fs::write(&data, (0..40).map(pair).collect::<Vec<_>>().join("\n")).unwrap();
    let run = folder.path().join("run");
    let mut command = Command::new(binary("plumb-train"));
    command.args(["run", "--objective", "preference", "--lr", "3e-3", "--batch", "8", "--epochs", "4"]);
    command.arg("--init").arg(fixture("llama-lm-sharded")).arg("--train").arg(&data).arg("--output").arg(&run);
    let trained = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));

    let server = Launch::new().model("pm", run.join("checkpoint")).start().await;
    let stdin = r#"{"prompt": "50: ", "candidates": ["no", "yes"]}"#;
    let lines = plumb(&server, stdin, &["score", "--json"]).await.lines(0);
    let reward = |i: usize| lines[i]["reward"].as_f64().unwrap();
    assert!(reward(1) > reward(0) + 1.0, "{lines:?}");
}
