//! Versions come and go while the server serves.

use futures::StreamExt;
use plumb_client::{Client, Code, text, v1};
use plumb_tests::call::{self, items, labelled, named, occupy, refused, version};
use plumb_tests::fixture::{Copied, Stored, fixture};
use plumb_tests::{Exposition, Launch};
use v1::ModelState::{Available, Draining, Ended, Failed, Loading, Start, Warming};

fn load(name: &str, version: Option<u64>, source: &std::path::Path) -> v1::LoadVersionRequest {
    let source = source.display().to_string();
    v1::LoadVersionRequest { name: name.into(), version, source, ..Default::default() }
}

/// Scores a text; answers the version and the reward's bits.
async fn ask(client: &Client, model: Option<v1::ModelSpec>) -> (u64, u32) {
    let answer = client.score(items(model, vec![text("The reward is the last token.")])).await.unwrap();
    let identity = answer.model.unwrap();
    assert_eq!(identity.weights_digest.len(), 64);
    (identity.version, plumb_client::reward(&answer.results[0]).unwrap().to_bits())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_comes_in_beside_another_and_goes_when_its_calls_have_ended() {
    let server = Launch::new().model("pm", fixture("llama-pm")).start().await;
    let client = server.client().await;
    let mut watched = client.watch_models("pm").await.unwrap();
    let mut next = async || {
        let status = watched.next().await.unwrap().unwrap().model.unwrap();
        (status.model.as_ref().unwrap().version, status.state(), status.labels)
    };
    let state = |version: u64, state: v1::ModelState| (version, state, Vec::<String>::new());
    assert_eq!(next().await, state(1, Available));
    let first = ask(&client, None).await;
    assert_eq!(first.0, 1);

    // It comes in, warm, and takes over what names no version.
    let loaded = client.load_version(load("pm", None, &fixture("qwen2-pm"))).await.unwrap();
    assert_eq!((loaded.state(), loaded.is_default), (Available, true));
    assert_eq!(loaded.details.unwrap().architecture, "Qwen2ForSequenceClassification");
    for expected in [Start, Loading, Warming, Available] {
        // The version that was the default is told to have changed too.
        let change = loop {
            let change = next().await;
            if change.0 == 2 {
                break change;
            }
        };
        assert_eq!(change, state(2, expected));
    }
    let second = ask(&client, None).await;
    assert_eq!(second.0, 2);
    assert_ne!(first.1, second.1);
    assert_eq!(ask(&client, version("pm", 1)).await, first);
    let again = refused(client.load_version(load("pm", Some(2), &fixture("llama-pm"))).await);
    assert_eq!(again.code, Code::AlreadyExists, "{again}");

    // Labels name versions, and `stable` decides what is meant by none.
    client.set_label("pm", "stable", Some(1)).await.unwrap().unwrap();
    client.set_label("pm", "canary", Some(2)).await.unwrap().unwrap();
    assert_eq!(ask(&client, None).await, first);
    assert_eq!(ask(&client, labelled("pm", "canary")).await, second);
    let kept = refused(client.unload_version("pm", 1).await);
    assert_eq!(kept.code, Code::FailedPrecondition);
    assert!(kept.message.contains("label `stable` points at version 1"), "{kept}");
    let moved = client.set_label("pm", "stable", Some(2)).await.unwrap().unwrap();
    assert_eq!(moved.labels, ["canary", "stable"]);
    assert_eq!(ask(&client, None).await, second);
    assert!(client.set_label("pm", "canary", None).await.unwrap().is_none());

    let unloaded = client.unload_version("pm", 1).await.unwrap();
    assert!(matches!(unloaded.state(), Draining | Ended), "{unloaded:?}");
    let mut ends = Vec::new();
    while ends.last() != Some(&Ended) {
        let (version, state, _) = next().await;
        if version == 1 && ends.last() != Some(&state) {
            ends.push(state);
        }
    }
    assert_eq!(ends[ends.len() - 2..], [Draining, Ended]);
    let gone = refused(client.score(items(version("pm", 1), vec![text("a")])).await);
    assert_eq!(gone.code, Code::NotFound, "{gone}");
    assert_eq!(ask(&client, None).await, second);
    let metrics = server.metrics().await;
    assert_eq!(metrics.value("plumb_model_active_version", &[("model", "pm")]), 2.0);
    assert_eq!(metrics.value("plumb_model_info", &[("model", "pm")]), 1.0);
    assert!(metrics.value("plumb_model_swaps_total", &[("model", "pm")]) >= 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_reads_no_faster_than_it_may() {
    let server = Launch::of(["llama-pm"]).flags("--load-rate-mib-per-sec 6").start().await;
    let client = server.client().await;
    let large = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/models/pm");
    let mib = std::fs::metadata(large.join("model.safetensors")).unwrap().len() as f64 / f64::from(1 << 20);
    let began = std::time::Instant::now();
    client.load_version(load("pm", None, &large)).await.unwrap();
    // It can only be slower.
    assert!(began.elapsed().as_secs_f64() > 0.9 * mib / 6.0, "{mib} MiB in {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_runs_keeps_its_version() {
    let lm = Copied::long_lm();
    let server = Launch::new().model("lm", lm.path()).start().await;
    let client = server.client().await;
    let mut running = occupy(&client, "lm").await;
    client.load_version(load("lm", Some(5), &fixture("qwen2-lm"))).await.unwrap();
    let unloaded = client.unload_version("lm", 1).await.unwrap();
    assert_eq!(unloaded.state(), Draining);
    let get = async || client.get_model(version("lm", 1).unwrap()).await.unwrap().state();
    for _ in 0..10 {
        assert!(running.next().await.unwrap().unwrap().end.is_none());
        assert_eq!(get().await, Draining);
    }
    assert_eq!(ask(&client, named("lm")).await.0, 5);
    let one = [("model", "lm"), ("version", "1")];
    let taken =
        |m: &Exposition| ["weight", "cache", "resident"].map(|p| m.value(&format!("plumb_model_{p}_bytes"), &one));
    assert!(taken(&server.metrics().await).iter().all(|bytes| *bytes > 0.0));
    drop(running);
    let state = |m: &Exposition| m.value("plumb_model_state", &one);
    let metrics = server.until("the version has ended", |m| state(m) == f64::from(Ended as i32)).await;
    assert_eq!(taken(&metrics), [0.0; 3]);
    assert_eq!(get().await, Ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_may_come_into_a_server_that_has_none_of_its_kind() {
    let server = Launch::of(["llama-pm"]).start().await;
    let client = server.client().await;
    let adapter = fixture("lora-lm").display().to_string();
    let merged = v1::LoadVersionRequest { adapter: adapter.clone(), ..load("lm", Some(3), &fixture("qwen2-lm")) };
    let status = client.load_version(merged).await.unwrap();
    assert_eq!((status.details.unwrap().adapter, status.is_default), (adapter, true));
    let request = v1::GenerateRequest { prompt: Some(text("a")), ..Default::default() };
    assert_eq!(call::generate(&client, request).await.unwrap().model.version, 3);
    assert_eq!(client.health("plumb.v1.Generation").await.unwrap().as_str_name(), "SERVING");
}

/// What is wrong with a checkpoint, and the words that have to name it.
fn broken() -> Vec<(Copied, [&'static str; 2])> {
    let copy = || Copied::of("llama-pm");
    let up = "model.layers.1.mlp.up_proj.weight";
    let config = |change: fn(&mut serde_json::Value)| copy().json("config.json", change);
    let truncated = copy();
    let weights = truncated.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(weights, &bytes[..bytes.len() - 100]).unwrap();
    let headless = copy();
    std::fs::remove_file(headless.path().join("model.safetensors")).unwrap();
    let untokenized = copy();
    std::fs::remove_file(untokenized.path().join("tokenizer.json")).unwrap();
    vec![
        (copy().tensors(|tensors| drop(tensors.remove(up))), [up, "[48, 32]"]),
        (copy().tensors(|tensors| drop(tensors.remove("score.weight"))), ["score.weight", "missing"]),
        (
            copy().tensors(|tensors| {
                let extra: Stored = tensors[up].clone();
                tensors.insert("model.layers.7.mystery.weight".into(), extra);
            }),
            ["model.layers.7.mystery.weight", "no use for"],
        ),
        (
            copy().tensors(|tensors| tensors.get_mut(up).unwrap().shape.reverse()),
            ["`model.layers.1.mlp.up_proj.weight` has shape [32, 48]", "expected [48, 32]"],
        ),
        (config(|c| c["id2label"] = serde_json::json!({"0": "a", "1": "b"})), ["`num_labels` is 2", "has 1"]),
        (config(|c| c["architectures"][0] = "MambaForCausalLM".into()), ["`MambaForCausalLM`", "served are"]),
        (
            config(|c| c["quantization_config"] = serde_json::json!({"quant_method": "awq"})),
            ["quantization_config", "awq"],
        ),
        (
            copy().json("tokenizer.json", |tokenizer| {
                let mut extra = tokenizer["added_tokens"][0].clone();
                (extra["id"], extra["content"]) = (280.into(), "<|extra|>".into());
                tokenizer["added_tokens"].as_array_mut().unwrap().push(extra);
            }),
            ["`<|extra|>` has id 280", "280 rows"],
        ),
        (truncated, ["model.safetensors", ""]),
        (headless, ["model.safetensors", "missing"]),
        (untokenized, ["tokenizer.json", "missing"]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_checkpoint_is_refused_by_name_and_the_old_version_serves_on() {
    let server = Launch::new().model("pm", fixture("llama-pm")).start().await;
    let client = server.client().await;
    let before = ask(&client, None).await;
    for (i, (checkpoint, words)) in broken().into_iter().enumerate() {
        let number = 2 + i as u64;
        let error = refused(client.load_version(load("pm", None, checkpoint.path())).await);
        assert_eq!(error.code, Code::FailedPrecondition, "{error}");
        assert!(words.iter().all(|word| error.message.contains(word)), "{words:?} are not in: {error}");
        let status = client.get_model(version("pm", number).unwrap()).await.unwrap();
        assert_eq!((status.state(), &status.error), (Failed, &error.message));
        assert_eq!(ask(&client, None).await, before);
    }
    assert_eq!(client.health("").await.unwrap().as_str_name(), "SERVING");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_start_with_a_broken_checkpoint() {
    let (checkpoint, words) = broken().remove(0);
    let (code, log) = Launch::new().model("pm", checkpoint.path()).fail().await;
    assert_eq!(code, 1, "{log}");
    assert!(words.iter().all(|word| log.contains(word)), "{log}");
}
