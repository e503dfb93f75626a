//! What `/metrics` says, read by a strict parser, and whether it follows what happens.

use std::time::UNIX_EPOCH;

use plumb_client::{text, v1};
use plumb_tests::call::{self, candidate, ids, items, named};
use plumb_tests::{Exposition, Kind, Launch};

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_help_and_type_and_follow_the_calls() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let client = server.client().await;
    let before = server.metrics().await;

    let scored = v1::ScoreRequest { model: named("llama-pm"), ..items(None, vec![ids(&[5; 100]), ids(&[280])]) };
    client.score(scored).await.unwrap();
    client.score(v1::ScoreRequest::default()).await.unwrap_err();
    let prefix = v1::TokenIds { ids: vec![7; 64], response_start: None };
    let ranked = v1::RankRequest {
        prompt: Some(v1::Input { input: Some(v1::input::Input::TokenIds(prefix)) }),
        candidates: vec![call::candidate_ids(&[8; 20]), call::candidate_ids(&[9; 20])],
        ..Default::default()
    };
    client.rank(ranked.clone()).await.unwrap();
    client.rank(ranked).await.unwrap();
    let words = v1::RankRequest { prompt: Some(text("q")), candidates: vec![candidate("a")], ..Default::default() };
    client.rank(words).await.unwrap();
    let generate = v1::GenerateRequest {
        prompt: Some(text("a")),
        stopping: Some(v1::Stopping { max_new_tokens: Some(10), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    call::generate(&client, generate).await.unwrap();

    // The last answer is a moment ahead of what is counted and given back after it.
    let generated = [("rpc", "Generation/Generate"), ("code", "OK")];
    let is_done = |m: &Exposition| {
        m.value("plumb_requests_total", &generated) == 1.0 && m.value("plumb_admitted_tokens", &[]) == 0.0
    };
    let after = server.until("all is done", is_done).await;
    let grew = |name: &str, labels: &[(&str, &str)], expected: f64| {
        let growth = after.value(name, labels) - before.value(name, labels);
        assert_eq!(growth, expected, "{name} {labels:?}");
    };
    let pm = ("model", "llama-pm");
    grew("plumb_requests_total", &[("rpc", "Preference/Score"), ("code", "OK")], 1.0);
    grew("plumb_requests_total", &[("rpc", "Preference/Score"), ("code", "INVALID_ARGUMENT")], 1.0);
    grew("plumb_requests_total", &[("rpc", "Preference/Rank"), ("code", "OK")], 3.0);
    grew("plumb_request_duration_seconds_count", &[("rpc", "Preference/Score")], 2.0);
    grew("plumb_tokenize_duration_seconds_count", &[pm], 4.0);
    grew("plumb_queue_duration_seconds_count", &[pm], 4.0);
    grew("plumb_inference_duration_seconds_count", &[pm], 4.0);
    // A hundred, four times 84, and a few words.
    grew("plumb_input_tokens_count", &[pm], 6.0);
    grew("plumb_input_tokens_bucket", &[pm, ("le", "64")], 1.0);
    grew("plumb_item_failures_total", &[pm, ("code", "INVALID_ARGUMENT")], 1.0);
    grew("plumb_reward_count", &[pm, ("version", "1")], 6.0);
    grew("plumb_generated_tokens_total", &[("model", "llama-lm"), ("version", "1")], 10.0);
    // The second ranking finds all whole pages of the first, the first one's second candidate those of the prompt.
    let cached = after.value("plumb_prefix_cached_tokens_total", &[pm]);
    assert!(cached >= 2.0 * 64.0, "{cached} tokens were cached");
    grew("plumb_prefix_lookups_total", &[pm], 6.0);
    grew("plumb_prefix_hits_total", &[pm], 3.0);
    assert!(after.value("plumb_batches_total", &[]) >= 13.0);
    assert_eq!(after.value("plumb_batch_sequences_count", &[]), after.value("plumb_batches_total", &[]));
    for (name, labels, value) in [
        ("plumb_ready", &[][..], 1.0),
        ("plumb_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0),
        ("plumb_model_info", &[pm, ("kind", "preference")], 1.0),
        ("plumb_model_state", &[pm], f64::from(v1::ModelState::Available as i32)),
        ("plumb_model_active_version", &[pm], 1.0),
        ("plumb_model_loads_total", &[pm, ("code", "OK")], 1.0),
        ("plumb_requests_in_flight", &[], 0.0),
        ("plumb_admitted_tokens", &[], 0.0),
        ("plumb_admitted_prompt_tokens", &[], 0.0),
        ("plumb_queue_sequences", &[], 0.0),
        ("plumb_queue_tokens", &[], 0.0),
    ] {
        assert_eq!(after.value(name, labels), value, "{name} {labels:?}");
    }
    assert!(after.value("plumb_resident_memory_bytes", &[]) > 1e6);
    let since_start = UNIX_EPOCH.elapsed().unwrap().as_secs_f64() - after.value("plumb_start_time_seconds", &[]);
    assert!((0.0..3600.0).contains(&since_start), "{since_start}");
    let [weights, cache, resident] =
        ["weight", "cache", "resident"].map(|part| after.value(&format!("plumb_model_{part}_bytes"), &[pm]));
    assert_eq!(after.value("plumb_model_resident_bytes", &[pm, ("device", "cpu")]), resident);
    assert!(weights > 1e4 && cache > 1e5 && resident > weights + cache, "{weights} {cache} {resident}");
    for family in &after.families {
        assert!(family.name.starts_with("plumb_"), "{}", family.name);
        assert!(family.help.ends_with('.'), "the help of {} is a sentence", family.name);
        assert!(!family.samples.is_empty(), "{} has no samples", family.name);
        // A duration that is counted is a histogram; one that is, is a gauge.
        assert!(!family.name.ends_with("_seconds") || family.kind != Kind::Counter, "{}", family.name);
    }
    assert!(after.families.iter().any(|family| family.kind == Kind::Histogram && family.name == "plumb_batch_tokens"));
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_are_no_longer_listed_are_let_go() {
    let server = Launch::of(["llama-pm"]).flags("--log info,plumb::models=debug").start().await;
    let client = server.client().await;
    let load = v1::LoadVersionRequest { name: "past".into(), source: "/nowhere".into(), ..Default::default() };
    for _ in 0..34 {
        client.load_version(load.clone()).await.unwrap_err();
    }
    // Of those that are over 32 are listed. What tells of the others goes when it has stood still for a day.
    assert_eq!(client.list_models().await.unwrap().len(), 1 + 32);
    let log = server.log();
    let gone: Vec<_> = log.lines().filter(|line| line.contains("no longer listed")).collect();
    assert!(gone.len() == 2 && gone[0].contains("version=1") && gone[1].contains("version=2"), "{gone:?}");
    let failed = [("model", "past"), ("version", "34")];
    assert_eq!(server.metrics().await.value("plumb_model_state", &failed), f64::from(v1::ModelState::Failed as i32));
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_unknown_pages() {
    let server = Launch::of(["llama-pm"]).start().await;
    assert_eq!(server.page("/healthz").await, (200, "ok\n".into()));
    assert_eq!(server.page("/readyz").await, (200, "ok\n".into()));
    assert_eq!(server.page("/nothing").await.0, 404);
}
