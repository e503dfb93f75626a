//! Every limit of SECURITY.md that is not in the table of errors: what is one too many, and what it gets.

use std::time::Duration;

use futures::StreamExt as _;
use h2::client::SendRequest;
use http::{Method, Request};
use plumb_client::{Code, conversation, text, v1};
use plumb_tests::call::{self, candidate, items, refused};
use plumb_tests::{Launch, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::errors::invalid;

/// A connection below gRPC, and how it ends.
async fn http2(server: &Server) -> (SendRequest<&'static [u8]>, JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(server.address()).await.unwrap();
    let (requests, connection) = h2::client::Builder::new().handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    (requests.ready().await.unwrap(), connection)
}

fn score_request(server: &Server) -> http::request::Builder {
    let uri = format!("http://{}/plumb.v1.Preference/Score", server.address());
    Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc").header("te", "trailers")
}

/// Whether the other side has closed a connection.
async fn is_closed(stream: &mut TcpStream) -> bool {
    loop {
        match stream.read(&mut [0; 1024]).await {
            Ok(0) | Err(_) => return true,
            // What a server says before.
            Ok(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_ids_roles_and_strings_have_a_length() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let client = server.client().await;
    let long = |bytes: usize| "x".repeat(bytes);
    let one = || items(None, vec![text("a")]);
    let score = |change: &dyn Fn(&mut v1::ScoreRequest)| {
        let mut request = one();
        change(&mut request);
        client.score(request)
    };
    invalid(score(&|r| r.request_id = long(129)).await, "request_id", "129 bytes, 128 are allowed");
    invalid(score(&|r| r.model = call::named(&long(129))).await, "model.name", "128 are allowed");
    invalid(score(&|r| r.model = call::labelled("llama-pm", &long(129))).await, "model.label", "128 are allowed");
    let role = long(65);
    let field = "items[0].conversation.messages[0].role";
    invalid(score(&|r| r.items = vec![conversation([(&*role, "a")])]).await, field, "65 bytes, 64 are allowed");
    let turns = vec![("user", "a"); 4097];
    let field = "items[0].conversation.messages";
    invalid(score(&|r| r.items = vec![conversation(turns.clone())]).await, field, "4097 messages, 4096 are allowed");
    invalid(score(&|r| r.items = vec![text(long((4 << 20) + 1))]).await, "items[0]", "4194304 are allowed");
    let ids = call::ids(&vec![5; (1 << 20) + 1]);
    invalid(score(&|r| r.items = vec![ids.clone()]).await, "items[0].token_ids", "1048576 are allowed");
    let generate = async |stop_strings: Vec<String>| {
        let stopping = Some(v1::Stopping { stop_strings, ..Default::default() });
        call::generate(&client, v1::GenerateRequest { prompt: Some(text("a")), stopping, ..Default::default() }).await
    };
    invalid(generate(vec!["x".into(); 65]).await, "stopping.stop_strings", "65 are given, 64 are allowed");
    invalid(generate(vec![long(1025)]).await, "stopping.stop_strings[0]", "1024 are allowed");
    let best_of = Some(v1::BestOf { samples: 1, ranker: call::named(&long(129)) });
    let generation = v1::GenerateRequest { prompt: Some(text("a")), best_of, ..Default::default() };
    invalid(call::generate(&client, generation).await, "best_of.ranker.name", "128 are allowed");
    let load = |change: &dyn Fn(&mut v1::LoadVersionRequest)| {
        let mut request = v1::LoadVersionRequest { name: "a".into(), source: "b".into(), ..Default::default() };
        change(&mut request);
        client.load_version(request)
    };
    invalid(load(&|r| r.source = long(4097)).await, "source", "4096 are allowed");
    invalid(load(&|r| r.adapter = long(4097)).await, "adapter", "4096 are allowed");
    invalid(load(&|r| r.revision = long(4097)).await, "revision", "4096 are allowed");
    invalid(load(&|r| r.name = long(129)).await, "name", "128 are allowed");
    invalid(client.unload_version(long(129), 1).await, "name", "128 are allowed");
    invalid(client.set_label("llama-pm", long(129), Some(1)).await, "label", "128 are allowed");
    invalid(
        client.tokenize(v1::TokenizeRequest { model: call::named(&long(129)), ..Default::default() }).await,
        "texts",
        "at least one",
    );
    let texts = vec![long(3 << 20), long(2 << 20)];
    let tokenize = v1::TokenizeRequest { model: call::named("llama-pm"), texts, ..Default::default() };
    invalid(client.tokenize(tokenize).await, "texts", "4194304 are allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_not_multiplied_by_its_candidates_without_end() {
    let server = Launch::of(["llama-pm"]).flags("--max-message-bytes 100000").start().await;
    let client = server.client().await;
    let rank = |n: usize| {
        let candidates = vec![candidate("a"); n];
        client.rank(v1::RankRequest { prompt: Some(text("q ".repeat(400))), candidates, ..Default::default() })
    };
    rank(100).await.unwrap();
    invalid(rank(200).await, "candidates", "160200 bytes, 100000 are allowed");
    // Turns that say nothing take memory too.
    let prompt = Some(conversation(vec![("user", ""); 1000]));
    let request = v1::RankRequest { prompt, candidates: vec![candidate("a"); 100], ..Default::default() };
    invalid(client.rank(request).await, "candidates", "100000 are allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_a_size() {
    let server = Launch::of(["llama-pm"]).flags("--max-message-bytes 1000").start().await;
    let error = refused(server.client().await.score(items(None, vec![text("x".repeat(1000))])).await);
    assert_eq!(error.code, Code::OutOfRange, "{error}");
    assert!(error.message.contains("1000 bytes"), "{error}");
    let server = Launch::of(["llama-pm"]).start().await;
    let error = refused(server.client().await.health(&"x".repeat(65 << 10)).await);
    assert_eq!(error.code, Code::OutOfRange, "strangers send little: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_so_many_parts() {
    let server = Launch::of(["llama-pm"]).start().await;
    let client = server.client().await;
    // Two bytes each, and a hundred when they are decoded.
    let empty = vec![v1::Input::default(); 1 << 17];
    let error = refused(client.score(items(None, empty)).await);
    assert_eq!(error.code, Code::InvalidArgument, "{error}");
    assert!(error.message.contains("items"), "what can be decoded is refused for what it is: {error}");
    let turns = vec![conversation(vec![("", ""); 4096]); 40];
    let error = refused(client.score(items(None, turns)).await);
    assert_eq!(error.code, Code::InvalidArgument, "{error}");
    assert!(error.message.contains("more than 131072 items, turns and texts"), "{error}");
    client.score(items(None, vec![text("a")])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_have_a_size() {
    let server = Launch::of(["llama-pm"]).start().await;
    let (mut requests, _connection) = http2(&server).await;
    for (bytes, expected) in [(1 << 10, 200), (16 << 10, 431)] {
        let request = score_request(&server).header("x-long", "x".repeat(bytes)).body(()).unwrap();
        let (response, _) = requests.send_request(request, true).unwrap();
        assert_eq!(response.await.unwrap().status(), expected, "{bytes} bytes");
        requests = requests.ready().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_carries_so_many_calls_at_a_time() {
    let server = Launch::of(["llama-pm"]).flags("--max-concurrent-streams 7").start().await;
    let (mut requests, _connection) = http2(&server).await;
    // The settings have come with the first answer.
    let (response, _) = requests.send_request(score_request(&server).body(()).unwrap(), true).unwrap();
    response.await.unwrap();
    assert_eq!(requests.current_max_send_streams(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_taken_back_at_once_end_the_connection() {
    let server = Launch::of(["llama-pm"]).start().await;
    let stream = TcpStream::connect(server.address()).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    for _ in 0..90 {
        let (_, mut body) = requests.send_request(score_request(&server).body(()).unwrap(), false).unwrap();
        body.send_reset(h2::Reason::CANCEL);
    }
    // All of it leaves together.
    let error = connection.await.unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM), "{error}");
    server.client().await.score(items(None, vec![text("a")])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_to_arrive_in_time() {
    let server = Launch::of(["llama-pm"]).flags("--receive-timeout-secs 0.1").start().await;
    let (mut requests, _connection) = http2(&server).await;
    let (response, mut body) = requests.send_request(score_request(&server).body(()).unwrap(), false).unwrap();
    // Five bytes say how long the message is, and it never comes.
    body.send_data(&[0, 0, 0, 0, 9, 1], false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4", "{response:?}");
    assert!(response.headers()["grpc-message"].to_str().unwrap().contains("did%20not%20arrive"), "{response:?}");
    // So have those of a stream, of which it answers with its trailers.
    let uri = format!("http://{}/plumb.v1.Preference/ScoreStream", server.address());
    let request = score_request(&server).uri(uri).body(()).unwrap();
    let (response, mut body) = requests.ready().await.unwrap().send_request(request, false).unwrap();
    body.send_data(&[0, 0, 0, 0, 9, 1], false).unwrap();
    let mut answers = response.await.unwrap().into_body();
    assert!(answers.data().await.is_none());
    let end = answers.trailers().await.unwrap().unwrap();
    assert_eq!(end["grpc-status"], "4", "{end:?}");
    // A stream may pause between them.
    let client = server.client().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut answers = client.score_stream(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap();
    let (mut requests, _connection) = http2(&server).await;
    let (response, _body) = requests.send_request(score_request(&server).body(()).unwrap(), false).unwrap();
    response.await.unwrap();
    sender.send(items(None, vec![text("a")])).await.unwrap();
    answers.next().await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded_in_number() {
    let server = Launch::of(["llama-pm"]).flags("--max-connections 2").start().await;
    server.until("nobody is connected", |m| m.value("plumb_connections", &[]) == 0.0).await;
    let _first = http2(&server).await;
    let _second = http2(&server).await;
    let mut third = TcpStream::connect(server.address()).await.unwrap();
    assert!(is_closed(&mut third).await);
    let metrics = server.metrics().await;
    assert_eq!(metrics.value("plumb_connections_refused_total", &[("reason", "full")]), 1.0);
    assert_eq!(metrics.value("plumb_connections", &[]), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_never_begins_is_closed() {
    let server = Launch::of(["llama-pm"]).flags("--handshake-timeout-secs 0.1").start().await;
    let mut silent = TcpStream::connect(server.address()).await.unwrap();
    assert!(is_closed(&mut silent).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_is_asked_to_go_and_then_cut() {
    let age = "--max-connection-age-secs 0.1 --max-connection-age-grace-secs";
    let graceful = Launch::of(["llama-pm"]).flags(&format!("{age} 600")).start().await;
    let (_requests, connection) = http2(&graceful).await;
    connection.await.unwrap().unwrap();
    let cut = Launch::of(["llama-pm"]).flags(&format!("{age} 0.1")).start().await;
    let mut watched = cut.client().await.watch_models("").await.unwrap();
    // A stream without an end ends with an error.
    while let Ok(_state) = watched.next().await.unwrap() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_port_takes_small_questions_only() {
    let server = Launch::of(["llama-pm"]).start().await;
    let ask = async |request: String| {
        let mut stream = TcpStream::connect(server.metrics_address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    let post = ask("POST /metrics HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n".into()).await;
    assert!(post.starts_with("HTTP/1.1 405"), "{post}");
    let long = ask(format!("GET /metrics HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(64 << 10))).await;
    assert!(long.is_empty() || long.starts_with("HTTP/1.1 431"), "{long}");
    let mut silent = TcpStream::connect(server.metrics_address()).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_secs(60), is_closed(&mut silent)).await;
    assert!(closed.unwrap());
}
