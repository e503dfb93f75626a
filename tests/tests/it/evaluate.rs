//! `plumb-train evaluate` of a checkpoint, and of a server that serves it: the same numbers, to the bit.

use std::path::Path;
use std::process::Command;

use plumb_tests::fixture::fixture;
use plumb_tests::{Launch, binary};
use serde_json::{Value, json};

/// Results and items of an evaluation.
async fn evaluate(task: &str, file: &Path, options: &[&str]) -> (Value, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut command = Command::new(binary("plumb-train"));
    command.args(["evaluate", task]).arg(file).args(options).args(["--resamples", "200", "--threads", "1"]);
    command.arg("--output").arg(&output).env_remove("PLUMB_API_KEY");
    let done = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read = |name: &str| std::fs::read_to_string(output.join(name)).unwrap();
    let items = read("items.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (serde_json::from_str(&read("results.json")).unwrap(), items)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_and_its_checkpoint_measure_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let lines = |lines: &[Value]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let turns = |answer: &str| json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]);
    let long = "long ".repeat(3000);
    let pairs = write(
        "pairs.jsonl",
        lines(&[
            json!({"prompt": "Two and two are ", "chosen": "four.", "rejected": "five, I think."}),
            json!({"prompt": "Two and two are ", "chosen": "4", "rejected": "22"}),
            json!({"prompt": [{"role": "user", "content": "q"}], "chosen": "b", "rejected": "c"}),
            json!({"prompt": long, "chosen": "b", "rejected": "c"}),
            json!({"chosen": turns("Good."), "rejected": turns("Bad.")}),
            json!({"chosen": "A text.", "rejected": "Another text."}),
        ]),
    );
    let example = |i: usize| json!({"input": format!("q{i}"), "target_scores": {"good": 1, (format!("bad {i}")): 0}});
    let hhh = write("helpful.json", json!({"examples": (0..3).map(example).collect::<Vec<_>>()}).to_string());
    let passage = |i: usize| json!({"context": format!("It was {i} in the"), "continuation": "morning"});
    let lambada = write("lambada.jsonl", lines(&(0..3).map(passage).collect::<Vec<_>>()));

    // A model with room for an HHH prompt.
    let lm = fixture("../../server/models/lm");
    let server = Launch::of(["llama-pm", "llama-lm"]).model("lm", &lm).start().await;
    for (task, file, model, options) in [
        ("pairs", &pairs, "llama-pm", &[][..]),
        ("pairs", &pairs, "llama-pm", &["--auto-truncate"]),
        ("pairs", &pairs, "llama-lm", &["--objective", "mean", "--objective", "sum"]),
        ("hhh", &hhh, "lm", &["--hhh-prompt", "none", "--hhh-prompt", "short"]),
        ("lambada", &lambada, "lm", &["--hhh-prompt", "none", "--hhh-prompt", "short"]),
    ] {
        let (url, checkpoint) = (server.url(), if model == "lm" { lm.clone() } else { fixture(model) });
        let of_server = [&["--server", &url, "--name", model], options].concat();
        let of_checkpoint = [&["--model", checkpoint.to_str().unwrap()], options].concat();
        let (served, served_items) = evaluate(task, file, &of_server).await;
        let (loaded, loaded_items) = evaluate(task, file, &of_checkpoint).await;
        assert_eq!(served["results"], loaded["results"], "{task} {model} {options:?}");
        assert_eq!(served["model"]["weights_digest"], loaded["model"]["weights_digest"]);
        assert_eq!(served["failed"], loaded["failed"], "{served}");
        for (served, loaded) in served_items.iter().zip(&loaded_items) {
            // Why an item failed is said in other words.
            let failed = |item: &Value| item["scores"].to_string().contains("error");
            assert!(served == loaded || failed(served) && failed(loaded), "{served}\n{loaded}");
        }
    }
}
