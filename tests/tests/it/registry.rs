//! A folder of versions is followed, calls are split between versions, and a bad version is taken back.

use std::collections::BTreeSet;
use std::path::Path;

use plumb_client::{Client, Code, text, v1};
use plumb_tests::call::{ids, items, named, refused, version};
use plumb_tests::fixture::{Copied, fixture};
use plumb_tests::{Exposition, Launch, publish};
use v1::ModelState::{Available, Ended, Failed};

/// A token whose embedding the fixture's poisoned copy has not.
const POISON: u32 = 51;

async fn answers(client: &Client) -> u64 {
    client.score(items(named("pm"), vec![text("Which version answers?")])).await.unwrap().model.unwrap().version
}

fn active(metrics: &Exposition) -> f64 {
    metrics.value("plumb_model_active_version", &[("model", "pm")])
}

fn state(version: u64, state: v1::ModelState) -> impl Fn(&Exposition) -> bool {
    move |metrics| {
        let version = version.to_string();
        // No sample reads as 0, which is no state.
        metrics.value("plumb_model_state", &[("model", "pm"), ("version", &version)]) == f64::from(state as i32)
    }
}

fn follow(root: &Path) -> Launch {
    Launch::new().flags(&format!("--model-root {} --rollback-window-secs 0", root.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_takes_over_and_what_is_not_whole_is_not_there() {
    let root = tempfile::tempdir().unwrap();
    publish(&fixture("llama-pm"), root.path(), "pm");
    let server = follow(root.path()).start().await;
    let client = server.client().await;
    assert_eq!(answers(&client).await, 1);

    // What cannot be read holds up no other model.
    std::fs::create_dir_all(root.path().join("odd/1")).unwrap();
    std::os::unix::fs::symlink("manifest.json", root.path().join("odd/1/manifest.json")).unwrap();
    std::fs::write(root.path().join("odd/2"), "no folder").unwrap();

    // Files come before the manifest.
    let unfinished = root.path().join("pm/2");
    std::fs::create_dir(&unfinished).unwrap();
    for entry in std::fs::read_dir(fixture("qwen2-pm")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), unfinished.join(entry.file_name())).unwrap();
    }
    publish(&fixture("qwen2-pm"), root.path(), "pm");
    server.until("version 3 is active", |metrics| active(metrics) == 3.0).await;
    server.until("version 1 has ended", state(1, Ended)).await;
    assert_eq!(answers(&client).await, 3);
    let unknown = refused(client.get_model(version("pm", 2).unwrap()).await);
    assert_eq!(unknown.code, Code::NotFound, "{unknown}");

    // A manifest that lies about a file is refused, and the version before serves on.
    publish(&fixture("llama-pm"), root.path(), "other");
    let damaged = root.path().join("other/1/model.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    std::fs::rename(root.path().join("other/1"), root.path().join("pm/4")).unwrap();
    server.until("version 4 is refused", state(4, Failed)).await;
    let status = client.get_model(version("pm", 4).unwrap()).await.unwrap();
    assert!(status.error.contains("sha256"), "{}", status.error);
    assert_eq!(answers(&client).await, 3);

    // So is one whose probes give other scores here than where it was published.
    publish(&fixture("llama-pm"), root.path(), "strange");
    let manifest = root.path().join("strange/1/manifest.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    let score = value["probes"][0]["score"].as_f64().unwrap();
    value["probes"][0]["score"] = (score + 0.5).into();
    std::fs::write(&manifest, value.to_string()).unwrap();
    std::fs::rename(root.path().join("strange/1"), root.path().join("pm/5")).unwrap();
    server.until("version 5 is refused", state(5, Failed)).await;
    let status = client.get_model(version("pm", 5).unwrap()).await.unwrap();
    assert!(status.error.contains("probe 0 of the manifest scores"), "{}", status.error);
    assert_eq!(answers(&client).await, 3);
    std::fs::remove_dir_all(root.path().join("pm/5")).unwrap();

    // Whoever takes a version away means the one before.
    std::fs::remove_dir_all(root.path().join("pm/4")).unwrap();
    std::fs::remove_dir_all(root.path().join("pm/3")).unwrap();
    server.until("version 1 is back", |metrics| active(metrics) == 1.0).await;
    server.until("version 3 has ended", state(3, Ended)).await;
    assert_eq!(answers(&client).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_start_before_the_first_version() {
    let root = tempfile::tempdir().unwrap();
    let server = follow(root.path()).listen().await;
    let client = server.client().await;
    let none = refused(client.score(items(None, vec![text("a")])).await);
    assert!(matches!(none.code, Code::NotFound | Code::Unavailable), "{none}");
    publish(&fixture("llama-pm"), root.path(), "pm");
    server.until_health(tonic_health::pb::health_check_response::ServingStatus::Serving).await;
    assert_eq!(answers(&client).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_memory_is_short_the_old_version_goes_before_the_new_one_comes() {
    let root = tempfile::tempdir().unwrap();
    publish(&fixture("llama-pm"), root.path(), "pm");
    let server = follow(root.path()).flags("--swap-policy resource").start().await;
    let client = server.client().await;
    let mut changes = client.watch_models("pm").await.unwrap();
    publish(&fixture("qwen2-pm"), root.path(), "pm");
    let mut seen = Vec::new();
    while seen.last() != Some(&(2, Available)) {
        let status = futures::StreamExt::next(&mut changes).await.unwrap().unwrap().model.unwrap();
        seen.push((status.model.as_ref().unwrap().version, status.state()));
    }
    let place = |wanted: (u64, v1::ModelState)| seen.iter().position(|change| *change == wanted);
    assert!(place((1, Ended)) < place((2, v1::ModelState::Loading)), "{seen:?}");
    assert!(place((1, Ended)).is_some(), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_that_computes_no_numbers_is_taken_back() {
    let poisoned = Copied::of("llama-pm").poisoned(POISON);
    let server = Launch::of([]).model("pm", fixture("llama-pm")).start().await;
    let client = server.client().await;
    let load = v1::LoadVersionRequest {
        name: "pm".into(),
        source: poisoned.path().display().to_string(),
        ..Default::default()
    };
    client.load_version(load).await.unwrap();
    client.set_label("pm", "stable", Some(1)).await.unwrap();
    client.set_label("pm", "stable", Some(2)).await.unwrap();
    assert_eq!(answers(&client).await, 2);
    let mut failures = 0;
    while client.score(items(named("pm"), vec![ids(&[0, POISON])])).await.is_err() {
        failures += 1;
    }
    assert_eq!(failures, 3);
    let back = client.get_model(version("pm", 1).unwrap()).await.unwrap();
    assert_eq!(back.labels, ["stable"]);
    assert_eq!(answers(&client).await, 1);
    server.until("the bad version has failed", state(2, Failed)).await;
    let bad = client.get_model(version("pm", 2).unwrap()).await.unwrap();
    assert!(bad.error.contains("not finite numbers"), "{}", bad.error);
    let metrics = server.metrics().await;
    assert_eq!(metrics.value("plumb_model_rollbacks_total", &[("model", "pm")]), 1.0);
    for reason in ["non_finite", "rolled_back", "failed"] {
        assert!(metrics.trouble("pm", "2", reason) && !metrics.trouble("pm", "1", reason), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_computes_nan_is_taken_back_where_it_is_the_only_one() {
    let root = tempfile::tempdir().unwrap();
    publish(&fixture("llama-pm"), root.path(), "pm");
    publish(Copied::of("llama-pm").poisoned(POISON).path(), root.path(), "pm");
    for policy in ["availability", "resource"] {
        let flags = format!("--swap-policy {policy} --rollback-window-secs 60");
        let server = Launch::new().flags(&format!("--model-root {} {flags}", root.path().display())).start().await;
        let client = server.client().await;
        assert_eq!(answers(&client).await, 2, "{policy}");
        for _ in 0..3 {
            client.score(items(named("pm"), vec![ids(&[0, POISON])])).await.unwrap_err();
        }
        server.until("the version before is loaded", state(1, Available)).await;
        server.until("the bad version has failed", state(2, Failed)).await;
        assert_eq!(answers(&client).await, 1, "{policy}");
        client.score(items(named("pm"), vec![ids(&[0, POISON])])).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_split_and_equal_calls_get_equal_versions() {
    let root = tempfile::tempdir().unwrap();
    publish(&fixture("llama-pm"), root.path(), "pm");
    publish(&fixture("qwen2-pm"), root.path(), "pm");
    let flags = "--version-policy all --label pm:stable=1,pm:canary=2 --traffic pm:stable=1,pm:canary=1";
    let server = follow(root.path()).flags(flags).start().await;
    let client = server.client().await;
    let ask = async |request_id: String| {
        let request = v1::ScoreRequest { request_id, ..items(named("pm"), vec![text("a")]) };
        client.score(request).await.unwrap().model.unwrap().version
    };
    let mut versions = BTreeSet::new();
    for i in 0..20 {
        let version = ask(format!("call-{i}")).await;
        assert_eq!(ask(format!("call-{i}")).await, version);
        versions.insert(version);
    }
    assert_eq!(versions, [1, 2].into());
    // Without an id, the request itself decides.
    let first = ask(String::new()).await;
    assert_eq!(ask(String::new()).await, first);

    let share = |label: &str, weight| v1::TrafficShare { label: label.into(), weight };
    let statuses = client.set_traffic("pm", vec![share("stable", 0), share("canary", 7)]).await.unwrap();
    assert_eq!(statuses.iter().map(|status| status.traffic_weight).collect::<Vec<_>>(), [0, 7]);
    for i in 0..20 {
        assert_eq!(ask(format!("call-{i}")).await, 2);
    }
}
