//! How the server ends: in good order if it is asked to, at once and with the right code if it cannot begin.

use std::time::Duration;

use futures::StreamExt;
use plumb_client::{Code, text, v1};
use plumb_tests::call::{items, named, occupy, refused};
use plumb_tests::fixture::{Copied, fixture};
use plumb_tests::{Launch, binary};
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};

/// A text that is being generated takes the only place in every step.
const ONE_PLACE: &str = "--max-batch-sequences 1 --decode-share 0";

#[tokio::test(flavor = "multi_thread")]
async fn not_serving_comes_first_then_a_lame_duck_then_the_end_of_what_runs() {
    let lm = Copied::long_lm();
    let launch = Launch::of(["llama-pm"]).model("lm", lm.path()).flags("--lame-duck-secs 2");
    let mut server = launch.start().await;
    let client = server.client().await;
    let mut health = server.health().await;
    assert_eq!(health.message().await.unwrap().unwrap().status(), Serving);
    let request = v1::GenerateRequest {
        model: named("lm"),
        prompt: Some(text("a")),
        stopping: Some(v1::Stopping { max_new_tokens: Some(8000), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let mut running = client.generate(request).await.unwrap();
    assert!(running.next().await.unwrap().unwrap().model.is_some());

    server.terminate();
    assert_eq!(health.message().await.unwrap().unwrap().status(), NotServing);
    assert_eq!(server.page("/readyz").await.0, 503);
    client.score(items(None, vec![text("as before")])).await.unwrap();
    drop(health);
    // Nobody reads the answer, so it cannot end; meanwhile the server stops to listen.
    while TcpStream::connect(server.address()).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let late = refused(client.score(items(None, vec![text("too late")])).await);
    assert_eq!(late.code, Code::Unavailable, "{late}");
    let mut drawn = 0;
    let mut summary = None;
    while let Some(answer) = running.next().await {
        let answer = answer.unwrap();
        drawn += answer.token_ids.len();
        summary = answer.summary.or(summary);
    }
    assert_eq!((drawn, summary.is_some()), (8000, true), "what ran ended in its own way");
    assert_eq!(server.exit_code().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_done_in_time_is_unavailable_with_a_time_to_come_back() {
    let lm = Copied::long_lm();
    let launch = Launch::new().model("lm", lm.path()).flags("--drain-timeout-secs 0.3").flags(ONE_PLACE);
    let mut server = launch.start().await;
    let client = server.client().await;
    // Takes the only place in every step.
    let mut running = occupy(&client, "lm").await;
    let (requests, receiver) = tokio::sync::mpsc::channel(1);
    let mut streamed = client.score_stream(ReceiverStream::new(receiver)).await.unwrap();
    requests.send(v1::ScoreRequest::default()).await.unwrap();
    assert!(streamed.next().await.unwrap().unwrap().error.is_some());
    let mut watched = client.watch_models("").await.unwrap();
    watched.next().await.unwrap().unwrap();
    let queued = tokio::spawn({
        let client = client.clone();
        async move { client.score(items(None, vec![text("in the queue")])).await }
    });
    server.until("a call is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;

    server.terminate();
    let running = loop {
        if let Err(error) = running.next().await.unwrap() {
            break error;
        }
    };
    for result in [
        queued.await.unwrap().map(drop),
        Err(running),
        streamed.next().await.unwrap().map(drop),
        watched.next().await.unwrap().map(drop),
    ] {
        let error = refused(result);
        assert_eq!(error.code, Code::Unavailable, "{error}");
        assert!(error.retry_after.is_some_and(|after| !after.is_zero()), "{error:?}");
    }
    assert_eq!(server.exit_code().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_has_said_all_ends_well() {
    let lm = Copied::long_lm();
    let mut server = Launch::new().model("lm", lm.path()).flags(ONE_PLACE).start().await;
    let client = server.client().await;
    let running = occupy(&client, "lm").await;
    let request = items(None, vec![text("in the queue")]);
    let mut streamed = client.score_stream(futures::stream::iter([request])).await.unwrap();
    server.until("it is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;
    server.terminate();
    drop(running);
    assert_eq!(streamed.next().await.unwrap().unwrap().error, None);
    assert!(streamed.next().await.is_none(), "there was nothing left to hear");
    assert_eq!(server.exit_code().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_ends_at_once() {
    let mut server = Launch::of(["llama-pm"]).start().await;
    let _idle = server.client().await;
    server.terminate();
    assert_eq!(server.exit_code().await, 0, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_is_exit_code_64_and_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plumb.toml");
    std::fs::write(&file, "max-batch-tokens = 8192\nmax-batch-tokenz = 1\n").unwrap();
    let pm = fixture("llama-pm");
    let check = async |launch: Launch, words: &str| {
        let (code, log) = launch.fail().await;
        assert_eq!(code, 64, "{log}");
        assert!(log.contains(words), "`{words}` is not in: {log}");
    };
    let served = || Launch::of(["llama-pm"]);
    check(served().flags("--nonsense"), "--nonsense").await;
    check(served().flags("--max-batch-tokens 0"), "--max-batch-tokens").await;
    check(served().flags("--port 65536"), "--port").await;
    check(served().env("PLUMB_PORT", "tcp://10.0.0.1:50051"), "enableServiceLinks").await;
    check(served().flags("--dtype f16"), "f16").await;
    check(served().model("llama-pm", &pm), "two models are named `llama-pm`").await;
    check(served().flags("--default-language-model lm"), "no model has this name").await;
    check(served().flags("--api-key-file /no/such/file"), "/no/such/file").await;
    check(served().flags(&format!("--config {}", file.display())), "max-batch-tokenz").await;
    check(served().flags("--hhh-prompt-file /no/such/file"), "/no/such/file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_exit_code_1() {
    let (code, log) = Launch::new().model("pm", "/no/such/folder").fail().await;
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("/no/such/folder"), "{log}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, log) = Launch::of(["llama-pm"]).flags(&format!("--port {port}")).fail().await;
    assert_eq!(code, 1, "{log}");
    assert!(log.contains(&format!("127.0.0.1:{port}")), "{log}");
}

#[test]
fn help_and_version_are_no_errors() {
    for (program, flag, words) in [
        ("plumb-server", "--help", "--max-batch-tokens"),
        ("plumb-server", "--version", env!("CARGO_PKG_VERSION")),
        ("plumb", "--help", "score"),
    ] {
        let output = std::process::Command::new(binary(program)).arg(flag).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains(words), "{program} {flag}: {text}");
    }
}
