//! Models too large to commit: those in the folder that `PLUMB_MODELS` names, `smollm2/`, SmolLM2-135M, and
//! `pm/`, the same with a score head.

use std::path::PathBuf;

use plumb_client::{dialogue, text, v1};
use plumb_tests::Launch;
use plumb_tests::call::{self, generate, items, named};

/// The folder, or `None` with a line that says so.
fn models() -> Option<PathBuf> {
    let folder = std::env::var_os("PLUMB_MODELS").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: PLUMB_MODELS names no folder with real models");
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn real_models_know_something_and_depend_on_no_neighbour() {
    let Some(models) = models() else { return };
    let launch = Launch::new().model("lm", models.join("smollm2")).model("pm", models.join("pm"));
    let server = launch.flags("--kv-cache-mib 256 --threads 2").start().await;
    let client = server.client_with(|options| options.call_timeout = None).await;

    let request = v1::GenerateRequest {
        prompt: Some(text("The capital of France is")),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping { max_new_tokens: Some(8), ..Default::default() }),
        ..Default::default()
    };
    let generated = generate(&client, request).await.unwrap();
    assert!(generated.samples[0].text.contains("Paris"), "{:?}", generated.samples[0].text);
    let answers = ["The capital of France is Paris.", "The capital of France is purple."];
    let candidates = answers.map(call::candidate);
    let request = v1::RankRequest {
        model: named("lm"),
        prompt: Some(plumb_client::conversation([("user", "What is the capital of France?")])),
        candidates: candidates.into(),
        ..Default::default()
    };
    assert_eq!(client.rank(request).await.unwrap().ranked[0].index, 0);

    let dialogues: Vec<_> = ["It is 4.", "Five, I think.", "I am not sure, why do you ask?", "4"]
        .map(|response| dialogue("What is 2 + 2?", response))
        .into();
    for model in ["pm", "lm"] {
        let together = call::rewards(&client, items(named(model), dialogues.clone())).await;
        for (dialogue, expected) in dialogues.iter().zip(together) {
            assert_eq!(call::rewards(&client, items(named(model), vec![dialogue.clone()])).await, [expected]);
        }
    }
}
