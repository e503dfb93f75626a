//! The library: what is retried, what is answered, what is refused.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use plumb_client::{
    ApiKey, Client, ClientOptions, Code, Error, FieldViolation, RetryPolicy, dialogue, reward, text, v1,
};
use tokio::net::TcpListener;
use tonic::Status;
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt};

use crate::fake::{Fake, Step};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn options(url: &str) -> ClientOptions {
    let retry = RetryPolicy { initial_backoff: ms(1), ..RetryPolicy::default() };
    ClientOptions { retry, ..ClientOptions::new(url) }
}

fn one_item() -> v1::ScoreRequest {
    v1::ScoreRequest { items: vec![text("four")], ..Default::default() }
}

fn fail(code: Code, retry_after: Option<Duration>) -> Step {
    Step::Fail(match retry_after {
        Some(delay) => Status::with_error_details(code, "later", ErrorDetails::with_retry_info(Some(delay))),
        None => Status::new(code, "no"),
    })
}

/// Scores once against a server that goes through `steps`; expects the code and the number of calls.
async fn check(steps: Vec<Step>, timeout: Duration, expect: Code, calls: usize) {
    let fake = Fake::start(steps.clone()).await;
    let options = ClientOptions { call_timeout: Some(timeout), ..options(&fake.url) };
    let client = Client::connect(options).await.unwrap();
    let code = match client.score(one_item()).await {
        Ok(answer) => {
            assert_eq!(reward(&answer.results[0]), Ok(4.0));
            Code::Ok
        }
        Err(error) => error.code(),
    };
    assert_eq!((code, fake.calls()), (expect, calls), "{steps:?}");
}

#[tokio::test]
async fn what_is_retried() {
    let minute = ms(60_000);
    let unavailable = || fail(Code::Unavailable, None);
    check(vec![], minute, Code::Ok, 1).await;
    check(vec![unavailable(), unavailable()], minute, Code::Ok, 3).await;
    check(vec![unavailable(); 9], minute, Code::Unavailable, 5).await;
    check(vec![fail(Code::ResourceExhausted, Some(ms(1)))], minute, Code::Ok, 2).await;
    check(vec![fail(Code::ResourceExhausted, None)], minute, Code::ResourceExhausted, 1).await;
    for code in [Code::InvalidArgument, Code::NotFound, Code::Internal, Code::Unauthenticated, Code::Unknown] {
        check(vec![fail(code, Some(ms(1)))], minute, code, 1).await;
    }
}

#[tokio::test]
async fn the_deadline_ends_all_tries() {
    // The server's wish would end after the deadline: no second try, and no wait for it.
    check(vec![fail(Code::Unavailable, Some(ms(60_000)))], ms(30_000), Code::Unavailable, 1).await;
    check(vec![Step::Hang], ms(50), Code::DeadlineExceeded, 1).await;
    check(vec![fail(Code::Unavailable, None), Step::Hang], ms(200), Code::DeadlineExceeded, 2).await;
}

#[tokio::test]
async fn the_servers_delay_is_waited_for() {
    let fake = Fake::start([fail(Code::ResourceExhausted, Some(ms(120)))]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    let start = Instant::now();
    client.score(one_item()).await.unwrap();
    assert!(start.elapsed() >= ms(120) && fake.calls() == 2, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_load_is_not_repeated() {
    let fake = Fake::start([fail(Code::Unavailable, None)]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    let request = v1::LoadVersionRequest { name: "pm".into(), source: "x".into(), ..Default::default() };
    assert_eq!(client.load_version(request.clone()).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(fake.calls(), 1);
    let loaded = client.load_version(request).await.unwrap();
    assert_eq!(loaded.model.unwrap().version, 4);
}

#[tokio::test]
async fn refusals_name_the_fields() {
    let details = ErrorDetails::with_bad_request_violation("items[0].text", "is empty");
    let status = Status::with_error_details(Code::InvalidArgument, "bad request", details);
    let fake = Fake::start([Step::Fail(status)]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    let error = client.score(one_item()).await.unwrap_err();
    assert_eq!(error.to_string(), "INVALID_ARGUMENT: bad request; items[0].text: is empty");
    let Error::Call(call) = error else { panic!("{error:?}") };
    let violation = FieldViolation { field: "items[0].text".into(), description: "is empty".into() };
    assert_eq!((call.field_violations, call.attempts), (vec![violation], 1));
}

#[tokio::test]
async fn headers_carry_the_key_and_the_deadline() {
    let fake = Fake::start([]).await;
    let options = ClientOptions { api_key: Some(ApiKey::new("secret-1")), ..options(&fake.url) };
    assert!(!format!("{options:?}").contains("secret-1"));
    let client = Client::connect(options).await.unwrap();
    assert!(!format!("{client:?}").contains("secret-1"));
    client.score(one_item()).await.unwrap();
    assert_eq!(fake.header("authorization").as_deref(), Some("Bearer secret-1"));
    assert!(fake.header("grpc-timeout").is_some());
    client.with_call_timeout(None).score(one_item()).await.unwrap();
    assert_eq!(fake.header("grpc-timeout"), None);
}

#[tokio::test]
async fn answers_that_do_not_fit_are_errors() {
    let fake = Fake::start([Step::Forget, Step::Forget]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    assert!(matches!(client.score(one_item()).await, Err(Error::Contract(_))));
    let candidate = v1::Candidate { candidate: Some(v1::candidate::Candidate::Text("a".into())) };
    let request = v1::RankRequest { candidates: vec![candidate; 2], ..Default::default() };
    assert!(matches!(client.rank(request).await, Err(Error::Contract(_))));
    let failure = reward(&v1::ScoreResult { outcome: None }).unwrap_err();
    assert_eq!(failure.code, Code::Internal);
}

#[tokio::test]
async fn items_fail_alone() {
    let fake = Fake::start([]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    let items = vec![dialogue("q", "abc"), text("refuse"), text("de")];
    let answer = client.score(v1::ScoreRequest { items, ..Default::default() }).await.unwrap();
    let rewards: Vec<_> = answer.results.iter().map(|r| reward(r).map_err(|f| f.to_string())).collect();
    assert_eq!(rewards, [Ok(3.0), Err("INVALID_ARGUMENT: too long".into()), Ok(2.0)]);
    // All of them: that is the call's error, which says it once.
    let refused = client.score(v1::ScoreRequest { items: vec![text("refuse")], ..Default::default() }).await;
    assert_eq!(refused.unwrap_err().to_string(), "INVALID_ARGUMENT: items[0]: too long");
}

/// An address at which nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn servers_that_can_not_be_reached() {
    let nobody = nobody().await;
    let error = Client::connect(options(&nobody)).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && error.to_string().contains("refused"), "{error}");
    for bad in ["127.0.0.1:1", "ftp://x", "http://"] {
        assert!(matches!(Client::connect(options(bad)).await, Err(Error::Options(_))), "{bad}");
    }
    // A lazy client meets the same at its first call, and tries again.
    let client = Client::connect_lazy(options(&nobody)).unwrap();
    let Err(Error::Call(call)) = client.score(one_item()).await else { panic!("reached nobody") };
    assert_eq!((call.code, call.attempts), (Code::Unavailable, 5));
}

#[tokio::test]
async fn https_with_a_private_authority() {
    let (fake, certificate) = Fake::start_tls().await;
    assert!(fake.url.starts_with("https://"));
    let trusting = ClientOptions { ca_certificate_pem: Some(certificate.into()), ..options(&fake.url) };
    Client::connect(trusting).await.unwrap().score(one_item()).await.unwrap();
    let stranger = Client::connect(options(&fake.url)).await;
    assert!(matches!(stranger, Err(Error::Connect { .. })), "{stranger:?}");
}

#[tokio::test]
async fn a_client_says_who_it_is() {
    let fake = Fake::start([]).await;
    Client::connect(options(&fake.url)).await.unwrap().score(one_item()).await.unwrap();
    assert_eq!(fake.header("x-client-id"), None);
    let named = ClientOptions { client_id: Some("rl-run-7".into()), ..options(&fake.url) };
    Client::connect(named).await.unwrap().score(one_item()).await.unwrap();
    assert_eq!(fake.header("x-client-id").as_deref(), Some("rl-run-7"));
    let bad = ClientOptions { client_id: Some("two\nlines".into()), ..options(&fake.url) };
    assert!(matches!(Client::connect(bad).await, Err(Error::Options(_))));
}

#[tokio::test]
async fn calls_take_turns_and_pass_a_dead_server_over() {
    let (a, b) = (Fake::start([]).await, Fake::start([]).await);
    let endpoints = vec![a.url.clone(), nobody().await, b.url.clone()];
    let client = Client::connect(ClientOptions { endpoints, ..options("") }).await.unwrap();
    for _ in 0..12 {
        client.score(one_item()).await.unwrap();
    }
    assert_eq!(a.calls() + b.calls(), 12);
    assert!(a.calls() >= 4 && b.calls() >= 4, "{} {}", a.calls(), b.calls());
}

#[tokio::test]
async fn calls_at_the_same_time_pass_a_dead_server_over() {
    let (sick, well) = (Fake::start(vec![fail(Code::Unavailable, None); 100]).await, Fake::start([]).await);
    let endpoints = vec![sick.url.clone(), well.url.clone()];
    // A try at each.
    let retry = RetryPolicy { max_attempts: 2, ..options("").retry };
    let client = Client::connect(ClientOptions { endpoints, retry, ..options("") }).await.unwrap();
    for answer in futures::future::join_all((0..40).map(|_| client.score(one_item()))).await {
        answer.unwrap();
    }
    assert_eq!((sick.calls(), well.calls()), (20, 40));
}

#[tokio::test]
async fn a_broken_connection_is_unavailable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await.unwrap());
        }
    });
    let client = Client::connect_lazy(options(&url)).unwrap();
    let Err(Error::Call(call)) = client.score(one_item()).await else { panic!("answered") };
    assert_eq!((call.code, call.attempts), (Code::Unavailable, 5), "{call}");
}

#[tokio::test]
async fn streams() {
    let fake = Fake::start([fail(Code::Unavailable, None)]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    // Retried until it opens.
    let pieces: Vec<_> = client.generate(v1::GenerateRequest::default()).await.unwrap().collect().await;
    let text: String = pieces.iter().map(|piece| piece.as_ref().unwrap().text.as_str()).collect();
    assert_eq!((text.as_str(), fake.calls()), ("tick tock", 2));
    assert_eq!(pieces.last().unwrap().as_ref().unwrap().summary.as_ref().unwrap().seed, 11);

    let requests = (0..3).map(|i| v1::ScoreRequest { request_id: i.to_string(), ..one_item() });
    let answers = client.score_stream(stream::iter(requests)).await.unwrap();
    let ids: Vec<_> = answers.map(|answer| answer.unwrap().request_id).collect().await;
    assert_eq!(ids, ["0", "1", "2"]);

    let changes: Vec<_> = client.watch_models("").await.unwrap().collect().await;
    assert_eq!(changes.len(), 2);
}

#[tokio::test]
async fn a_stream_ends_at_its_deadline() {
    let fake = Fake::start([]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap().with_call_timeout(Some(ms(300)));
    let sampling = v1::Sampling { temperature: Some(9.0), ..Default::default() };
    let request = v1::GenerateRequest { sampling: Some(sampling), ..Default::default() };
    let pieces: Vec<_> = client.generate(request).await.unwrap().collect().await;
    let codes: Vec<_> = pieces.iter().map(|p| p.as_ref().map_or_else(Error::code, |_| Code::Ok)).collect();
    assert_eq!(codes, [Code::Ok, Code::Ok, Code::DeadlineExceeded]);
}

#[tokio::test]
async fn models_tokens_and_health() {
    let fake = Fake::start([]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    assert_eq!(client.list_models().await.unwrap().len(), 2);
    let spec = v1::ModelSpec { name: "nobody".into(), choice: None };
    assert_eq!(client.get_model(spec).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.unload_version("pm", 2).await.unwrap().state(), v1::ModelState::Draining);
    assert!(client.set_label("pm", "stable", Some(2)).await.unwrap().is_some());
    assert!(client.set_label("pm", "stable", None).await.unwrap().is_none());
    let request = v1::TokenizeRequest { texts: vec!["ab".into()], ..Default::default() };
    assert_eq!(client.tokenize(request).await.unwrap().tokenized[0].tokens.len(), 2);
    let request = v1::RenderRequest { input: Some(text("x")), ..Default::default() };
    assert_eq!(client.render(request).await.unwrap().template_sha256, "feed");

    let serving = tonic_health::pb::health_check_response::ServingStatus::Serving;
    assert_eq!(client.health("plumb.v1.Preference").await.unwrap(), serving);
    fake.set_health("plumb.v1.Preference", ServingStatus::NotServing).await;
    assert_ne!(client.health("plumb.v1.Preference").await.unwrap(), serving);
    assert_eq!(client.health("plumb.v1.Nothing").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn calls_can_be_spawned_and_share_connections() {
    let fake = Fake::start([]).await;
    let client = Client::connect(options(&fake.url)).await.unwrap();
    let calls = (0..20).map(|_| {
        let client = client.clone();
        tokio::spawn(async move { client.score(one_item()).await })
    });
    for call in futures::future::join_all(calls).await {
        call.unwrap().unwrap();
    }
    assert_eq!(fake.calls(), 20);
}
