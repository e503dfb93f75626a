//! The HTTP gateway: whether it says what gRPC says, and whether it is as well guarded.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use plumb_client::{Client, conversation, text, v1};
use plumb_tests::call::{candidate_ids, ids, items, named, occupy, rewards, version};
use plumb_tests::fixture::{Copied, fixture};
use plumb_tests::{Launch, Server};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use crate::errors::invalid;
use crate::security::{Authority, Files};

const GATEWAY: &str = "--http-port 0";
/// A text that is being generated takes the only place in every step.
const ONE_PLACE: &str = "--http-port 0 --max-batch-sequences 1 --decode-share 0";

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Value,
}

impl Answer {
    /// Reads a whole answer to the only request of a connection.
    async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_ascii_lowercase(), value.to_owned())
        };
        let headers: HashMap<_, _> = lines.map(header).collect();
        assert_eq!(headers["content-length"], body.len().to_string(), "{text}");
        assert!(!headers.keys().any(|name| name.starts_with("grpc")), "{headers:?}");
        Self { status, headers, body: serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}")) }
    }

    #[track_caller]
    fn failed(&self, status: u16, kind: &str, words: &str) {
        let error = &self.body["error"];
        assert_eq!((self.status, error["code"].as_u64()), (status, Some(status.into())), "{self:?}");
        assert_eq!(error["type"], kind, "{self:?}");
        assert!(error["message"].as_str().unwrap().contains(words), "`{words}` is not in {self:?}");
        let comes_back = self.headers.get("retry-after").is_some_and(|after| after.parse::<u64>().unwrap() > 0);
        assert_eq!(comes_back, status == 503, "{self:?}");
    }

    fn bits(&self, pointer: &str) -> u32 {
        bits(self.body.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {self:?}")))
    }
}

/// Of a double that equals an f32, as far as serde_json reads doubles exactly.
fn bits(number: &Value) -> u32 {
    (number.as_f64().unwrap() as f32).to_bits()
}

fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: plumb\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.http_address().unwrap()).await.unwrap()
}

async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> Answer {
    stream.write_all(request.as_bytes()).await.unwrap();
    Answer::read(stream).await
}

const JSON: (&str, &str) = ("content-type", "application/json");

async fn post_with(server: &Server, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    let request = request("POST", path, &[&[JSON], headers].concat(), &body.to_string());
    ask(&mut connect(server).await, &request).await
}

async fn post(server: &Server, path: &str, body: Value) -> Answer {
    post_with(server, path, &[], &body).await
}

async fn get(server: &Server, path: &str) -> Answer {
    ask(&mut connect(server).await, &request("GET", path, &[], "")).await
}

async fn reward(client: &Client, input: v1::Input) -> u32 {
    rewards(client, items(None, vec![input])).await[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_what_grpc_answers() {
    let server = Launch::of(["llama-pm", "openrlhf-pm", "llama-lm"]).flags(GATEWAY).start().await;
    let client = server.client().await;
    let pair = |query: &str, document: &str| conversation([("user", query), ("assistant", document)]);
    let (a, b) = (reward(&client, text("a good answer")).await, reward(&client, text("another")).await);
    assert_ne!(a, b);

    let answer = post(&server, "/get_reward", json!({ "query": ["a good answer", "another"], "labels": [null] })).await;
    for (pointer, expected) in [("/rewards/0", a), ("/rewards/1", b), ("/scores/0", a), ("/scores/1", b)] {
        assert_eq!(answer.bits(pointer), expected, "{answer:?}");
    }
    assert_eq!(answer.headers["x-plumb-model"], "llama-pm@1");
    assert_eq!(answer.headers["x-plumb-weights-digest"].len(), 64);

    let token_ids = reward(&client, ids(&[5, 6, 7])).await;
    let turns = json!([{ "role": "user", "content": "q" }, { "role": "assistant", "content": "d" }]);
    let dialogue = reward(&client, pair("q", "d")).await;
    for (path, place) in [("/classify", "probs"), ("/pooling", "data"), ("/v1/embeddings", "embedding")] {
        for (body, expected) in [
            (json!({ "model": "llama-pm", "input": "another", "use_activation": false }), &[b][..]),
            (json!({ "input": ["a good answer", "another"] }), &[a, b]),
            (json!({ "input": [[5, 6, 7]] }), &[token_ids]),
            (json!({ "messages": turns }), &[dialogue]),
        ] {
            let answer = post(&server, path, body).await;
            let found: Vec<_> = (0..expected.len()).map(|i| answer.bits(&format!("/data/{i}/{place}/0"))).collect();
            assert_eq!(found, expected, "{path}: {answer:?}");
            assert!(answer.body["usage"]["total_tokens"].as_u64().unwrap() > 0, "{answer:?}");
        }
    }

    let documents = ["4.", "Five, I think.", "I am not sure."];
    let scores: Vec<u32> =
        rewards(&client, items(None, documents.map(|document| pair("What is 2 + 2?", document)).into())).await;
    for body in [
        json!({ "text_1": "What is 2 + 2?", "text_2": documents }),
        json!({ "queries": "What is 2 + 2?", "documents": documents }),
        json!({ "text_1": vec!["What is 2 + 2?"; 3], "text_2": documents }),
    ] {
        let answer = post(&server, "/score", body).await;
        let found: Vec<_> = (0..3).map(|i| answer.bits(&format!("/data/{i}/score"))).collect();
        assert_eq!(found, scores, "{answer:?}");
    }

    let mut order = [0, 1, 2];
    order.sort_by(|&a, &b| f32::from_bits(scores[b]).total_cmp(&f32::from_bits(scores[a])));
    for (path, brings) in [("/rerank", true), ("/v1/rerank", true), ("/v2/rerank", false)] {
        let answer = post(&server, path, json!({ "query": "What is 2 + 2?", "documents": documents })).await;
        for (place, &index) in order.iter().enumerate() {
            let result = &answer.body["results"][place];
            assert_eq!((result["index"].as_u64(), bits(&result["reward"])), (Some(index as u64), scores[index]));
            assert_eq!(result["document"], if brings { json!({ "text": documents[index] }) } else { Value::Null });
            let relevance = result["relevance_score"].as_f64().unwrap();
            assert!((relevance - 1.0 / (1.0 + (-f64::from(f32::from_bits(scores[index]))).exp())).abs() < 1e-12);
        }
    }

    // A version by name and number, and a path that a model is named after.
    let other = rewards(&client, items(version("openrlhf-pm", 1), vec![text("another")])).await[0];
    for model in ["openrlhf-pm", "openrlhf-pm@1", "/checkpoints/openrlhf-pm/1", "org/openrlhf-pm"] {
        let answer = post(&server, "/classify", json!({ "model": model, "input": "another" })).await;
        assert_eq!((answer.bits("/data/0/probs/0"), &answer.body["model"]), (other, &json!("openrlhf-pm")));
    }
    let lm = rewards(&client, items(named("llama-lm"), vec![text("another")])).await[0];
    let answer = post(&server, "/get_reward", json!({ "model": "llama-lm", "query": ["another"] })).await;
    assert_eq!(answer.bits("/rewards/0"), lm);

    let health = get(&server, "/health").await;
    assert_eq!((health.status, &health.body["status"]), (200, &json!("SERVING")));
    let models = get(&server, "/v1/models").await;
    let names: Vec<_> = models.body["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(names, ["llama-lm", "llama-pm", "openrlhf-pm"]);
    assert!(models.body["data"][0]["created"].as_u64().unwrap() > 1_700_000_000, "{models:?}");

    let is_counted = |m: &plumb_tests::Exposition| {
        m.value("plumb_requests_total", &[("rpc", "http/score"), ("code", "OK")]) == 3.0
            && m.value("plumb_requests_total", &[("rpc", "http/rerank"), ("code", "OK")]) == 3.0
    };
    server.until("calls are counted by their route", is_counted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_in_the_callers_words() {
    let server = Launch::of(["llama-pm"]).flags("--http-port 0 --max-message-bytes 100000").start().await;
    let bad = "INVALID_ARGUMENT";
    post(&server, "/get_reward", json!({ "query": [] })).await.failed(400, bad, "query: at least one");
    post(&server, "/get_reward", json!({ "query": ["a", ""] })).await.failed(400, bad, "query[1]: ");
    post(&server, "/get_reward", json!([])).await.failed(400, bad, "the body is not what is expected");
    post(&server, "/classify", json!({ "input": [280] })).await.failed(400, bad, "input[0]: token 0 is 280");
    post(&server, "/score", json!({ "text_1": "q", "text_2": [] })).await.failed(400, bad, "text_2: at least one");
    post(&server, "/classify", json!({ "input": "a", "request_id": "x".repeat(129) })).await.failed(400, bad, "128");
    post(&server, "/classify", json!({ "input": "a", "model": "nobody" })).await.failed(404, "NOT_FOUND", "nobody");
    post(&server, "/v1/completions", json!({})).await.failed(404, "NOT_FOUND", "Not Found");
    post_with(&server, "/classify", &[("x-request-timeout", "soon")], &json!({})).await.failed(
        400,
        bad,
        "x-request-timeout",
    );
    let answer = get(&server, "/get_reward").await;
    answer.failed(405, bad, "Method Not Allowed");
    assert_eq!(answer.headers["allow"], "POST");
    // As from a page in a browser, which may send these without asking.
    for plain in ["text/plain", "text/plain;x=json"] {
        let plain = request("POST", "/get_reward", &[("content-type", plain)], r#"{"query": ["a"]}"#);
        ask(&mut connect(&server).await, &plain).await.failed(400, bad, "`application/json` is expected");
    }

    // Nothing is cut unless somebody asks for it.
    let long = "word ".repeat(2000);
    post(&server, "/get_reward", json!({ "query": ["a", long] })).await.failed(400, bad, "query[1]: the input has");
    let documents = json!({ "query": "q", "documents": ["a", long] });
    post(&server, "/rerank", documents).await.failed(400, bad, "documents[1]: the input has");
    let cut = async |options: Value| {
        let mut body = json!({ "input": vec![5; 2000] });
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        post(&server, "/classify", body).await
    };
    cut(json!({ "truncate_prompt_tokens": 1025 })).await.failed(
        400,
        bad,
        "truncate_prompt_tokens: 1025 is not in 1..=1024",
    );
    let client = server.client().await;
    assert_eq!(
        cut(json!({ "truncate_prompt_tokens": 7 })).await.bits("/data/0/probs/0"),
        reward(&client, ids(&[5; 7])).await
    );
    let whole = reward(&client, ids(&[5; 1024])).await;
    assert_eq!(cut(json!({ "truncate_prompt_tokens": -1 })).await.bits("/data/0/probs/0"), whole);

    let answer = post_with(&server, "/classify", &[("x-request-id", "mine")], &json!({ "input": "" })).await;
    assert_eq!((answer.status, &*answer.headers["x-request-id"]), (400, "mine"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_has_a_size_a_time_and_a_connection_its_bounds() {
    let flags = "--http-port 0 --max-message-bytes 1000 --receive-timeout-secs 0.2 --max-connections 4";
    let server = Launch::of(["llama-pm"]).flags(flags).start().await;
    let large = json!({ "query": ["x".repeat(1000)] });
    post(&server, "/get_reward", large.clone()).await.failed(413, "OUT_OF_RANGE", "more than 1000 bytes");
    let mut stream = connect(&server).await;
    let head = "POST /get_reward HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n";
    let piece = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.to_string().len());
    ask(&mut stream, &format!("{head}transfer-encoding: chunked\r\n\r\n{piece}")).await.failed(
        413,
        "OUT_OF_RANGE",
        "1000 bytes",
    );
    let mut stream = connect(&server).await;
    let late = ask(&mut stream, &format!("{head}content-length: 100\r\n\r\n{{")).await;
    late.failed(504, "DEADLINE_EXCEEDED", "did not arrive within 0.2 s");
    // Headers have a size, and a connection says something in time.
    let mut stream = connect(&server).await;
    stream.write_all(request("GET", "/health", &[("x-long", &"x".repeat(20 << 10))], "").as_bytes()).await.unwrap();
    let mut said = String::new();
    let _ = stream.read_to_string(&mut said).await;
    assert!(said.starts_with("HTTP/1.1 431") || said.is_empty(), "{said}");
    let mut stream = connect(&server).await;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: somebody who says no more").await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut Vec::new())).await;
    assert!(ended.is_ok(), "a connection without an end");
    drop(stream);
    server.until("all are gone", |m| m.value("plumb_connections", &[]) == 0.0).await;
    let _held = [connect(&server).await, connect(&server).await, connect(&server).await, connect(&server).await];
    server.until("four are there", |m| m.value("plumb_connections", &[]) == 4.0).await;
    assert!(matches!(connect(&server).await.read(&mut [0]).await, Ok(0) | Err(_)), "a fifth one is let in");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_roles_count_here_too() {
    let files = Files::new();
    let token =
        |name: &str, role: &str| format!("[[token]]\nname = \"{name}\"\ntoken = \"{name}\"\nroles = [\"{role}\"]\n");
    let tokens = files.write("tokens", &[token("scores", "score"), token("writes", "generate")].concat());
    let server = Launch::of(["llama-pm"]).flags(&format!("{GATEWAY} --auth-tokens-file {tokens}")).start().await;
    let body = json!({ "query": ["a"] });
    // printf :scores | base64, as in http://:scores@host.
    for authorization in ["Bearer scores", "bearer scores", "Basic OnNjb3Jlcw=="] {
        let answer = post_with(&server, "/get_reward", &[("authorization", authorization)], &body).await;
        assert_eq!(answer.status, 200, "{authorization}: {answer:?}");
    }
    let answer = post(&server, "/get_reward", body.clone()).await;
    answer.failed(401, "UNAUTHENTICATED", "Bearer KEY");
    assert_eq!(answer.headers["www-authenticate"], "Bearer");
    let wrong = post_with(&server, "/get_reward", &[("authorization", "Bearer wrong")], &body).await;
    wrong.failed(401, "UNAUTHENTICATED", "not known");
    let denied = post_with(&server, "/get_reward", &[("authorization", "Bearer writes")], &body).await;
    denied.failed(403, "PERMISSION_DENIED", "`score`");
    get(&server, "/v1/models").await.failed(401, "UNAUTHENTICATED", "");
    assert_eq!(get(&server, "/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_items_than_a_call_may_have_are_cut_and_answered_in_order() {
    let server = Launch::of(["llama-pm"]).flags("--http-port 0 --max-client-batch-size 4").start().await;
    let client = server.client().await;
    let texts: Vec<String> = (0..23).map(|i| format!("answer number {i}")).collect();
    let mut expected = Vec::new();
    for text in &texts {
        expected.push(reward(&client, plumb_client::text(text.as_str())).await);
    }
    let answer = post(&server, "/get_reward", json!({ "query": texts })).await;
    assert_eq!(answer.body["rewards"].as_array().unwrap().iter().map(bits).collect::<Vec<_>>(), expected);
    let mut wrong = texts.clone();
    wrong[13].clear();
    let bad = "INVALID_ARGUMENT";
    post(&server, "/get_reward", json!({ "query": wrong })).await.failed(400, bad, "query[13]: ");
    let ranked = post(&server, "/rerank", json!({ "query": "q", "documents": texts, "top_n": 5 })).await;
    let results = ranked.body["results"].as_array().unwrap();
    let found: Vec<f64> = results.iter().map(|result| result["reward"].as_f64().unwrap()).collect();
    assert!(found.len() == 5 && found.is_sorted_by(|a, b| a >= b), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_is_told_to_come_back_with_a_status_that_all_frameworks_follow() {
    let server = Launch::of(["llama-pm"]).flags("--http-port 0 --max-concurrent-requests 1").start().await;
    let client = server.client().await;
    let mut watched = client.watch_models("").await.unwrap();
    futures::StreamExt::next(&mut watched).await.unwrap().unwrap();
    let refused = post(&server, "/get_reward", json!({ "query": ["a"] })).await;
    refused.failed(503, "RESOURCE_EXHAUSTED", "1 calls are in flight");
    assert!(refused.headers["retry-after-ms"].parse::<u64>().unwrap() > 0);
    assert_eq!(get(&server, "/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_waits_for_room_as_long_as_it_says() {
    let lm = Copied::long_lm();
    let launch = Launch::of(["llama-pm"]).model("lm", lm.path()).flags("--http-port 0 --max-queue-tokens 60000");
    let server = launch.start().await;
    let client = server.client().await;
    let running = occupy(&client, "lm").await;
    let large = json!({ "input": vec![vec![5; 1000]; 20] });
    let late = post_with(&server, "/classify", &[("x-request-timeout", "0.2")], &large).await;
    // Whatever is first: the last look for room, or the end of its time.
    assert!([503, 504].contains(&late.status), "{late:?}");
    let refused = server.metrics().await.value("plumb_admission_refusals_total", &[]);
    assert_eq!(refused, if late.status == 503 { 1.0 } else { 0.0 });
    let mut stream = connect(&server).await;
    stream.write_all(request("POST", "/classify", &[JSON], &large.to_string()).as_bytes()).await.unwrap();
    let waits = |m: &plumb_tests::Exposition| m.value("plumb_requests_in_flight", &[("rpc", "http/classify")]) == 1.0;
    server.until("it waits", waits).await;
    drop(running);
    assert_eq!(Answer::read(&mut stream).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_waits_for_memory_is_not_late() {
    let lm = Copied::long_lm();
    let flags = "--receive-timeout-secs 0.2 --max-message-bytes 500000 --max-request-memory-mib 1";
    let server = Launch::new().model("lm", lm.path()).flags(ONE_PLACE).flags(flags).start().await;
    let client = server.client().await;
    let running = occupy(&client, "lm").await;
    // One takes most of what a client may have; what nobody reads takes room too.
    let body = json!({ "query": ["in the queue"], "labels": ["x".repeat(400_000)] });
    let begin = async || {
        let mut stream = connect(&server).await;
        stream.write_all(request("POST", "/get_reward", &[JSON], &body.to_string()).as_bytes()).await.unwrap();
        stream
    };
    let mut first = begin().await;
    server.until("it is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;
    let mut second = begin().await;
    let waits = |m: &plumb_tests::Exposition| m.value("plumb_requests_in_flight", &[("rpc", "http/get_reward")]) == 2.0;
    server.until("another waits", waits).await;
    // Longer than a body may take to arrive.
    let third = post_with(&server, "/get_reward", &[("x-request-timeout", "0.5")], &body).await;
    third.failed(504, "DEADLINE_EXCEEDED", "the deadline passed");
    drop(running);
    assert_eq!(Answer::read(&mut first).await.status, 200);
    let second = Answer::read(&mut second).await;
    assert_eq!(second.status, 200, "{second:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_much_work_at_a_time_is_the_lists_fault() {
    let server = Launch::of(["llama-pm"]).flags("--http-port 0 --max-queue-tokens 1000").start().await;
    let client = server.client().await;
    let words = "tokens of work, 1000 are allowed at a time; split it";
    invalid(client.score(items(None, vec![ids(&[5; 600]); 2])).await, "items", words);
    let texts = (0..10).map(|i| text(format!("{i} {}", "word ".repeat(200))));
    invalid(client.score(items(None, texts.collect())).await, "items", words);
    // Who has only one cannot halve it.
    invalid(client.score(items(None, vec![ids(&[5; 1001])])).await, "items[0]", words);
    let candidates = vec![candidate_ids(&[5; 500]); 2];
    let ranked = client.rank(v1::RankRequest { prompt: Some(ids(&[5; 100])), candidates, ..Default::default() }).await;
    invalid(ranked, "candidates", words);
    let refused = async || server.metrics().await.value("plumb_admission_refusals_total", &[("reason", "too_large")]);
    let before = refused().await;
    let answer = post(&server, "/classify", json!({ "input": vec![vec![5; 600]; 2] })).await;
    answer.failed(400, "INVALID_ARGUMENT", "input: the call is 1200 tokens of work");
    assert_eq!(refused().await, before + 1.0, "who would wait is counted too");
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_and_callers_that_go_away_take_their_work_with_them() {
    let lm = Copied::long_lm();
    let server = Launch::new().model("lm", lm.path()).flags(ONE_PLACE).start().await;
    let client = server.client().await;
    let _running = occupy(&client, "lm").await;
    let body = json!({ "query": ["in the queue"] });
    let late = post_with(&server, "/get_reward", &[("x-request-timeout", "0.3")], &body).await;
    late.failed(504, "DEADLINE_EXCEEDED", "the deadline passed");
    let mut stream = connect(&server).await;
    stream.write_all(request("POST", "/get_reward", &[JSON], &body.to_string()).as_bytes()).await.unwrap();
    server.until("it is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;
    drop(stream);
    let gone = |m: &plumb_tests::Exposition| {
        let cancelled = m.value("plumb_requests_total", &[("rpc", "http/get_reward"), ("code", "CANCELLED")]);
        cancelled == 1.0 && m.value("plumb_queue_sequences", &[]) == 0.0
    };
    server.until("its work is gone", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_when_a_shutdown_begins_is_answered() {
    let lm = Copied::long_lm();
    let mut server = Launch::new().model("lm", lm.path()).flags(ONE_PLACE).start().await;
    let client = server.client().await;
    let running = occupy(&client, "lm").await;
    // Ready for another request.
    let mut idle = connect(&server).await;
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    idle.read_exact(&mut [0; 12]).await.unwrap();
    let mut stream = connect(&server).await;
    let body = json!({ "query": ["in the queue"] }).to_string();
    stream.write_all(request("POST", "/get_reward", &[JSON], &body).as_bytes()).await.unwrap();
    server.until("it is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;
    server.terminate();
    while TcpStream::connect(server.http_address().unwrap()).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(running);
    assert_eq!(Answer::read(&mut stream).await.status, 200);
    assert_eq!(server.exit_code().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_done_in_time_is_unavailable() {
    let lm = Copied::long_lm();
    let launch = Launch::new().model("lm", lm.path()).flags(ONE_PLACE).flags("--drain-timeout-secs 0.3");
    let mut server = launch.start().await;
    let client = server.client().await;
    let _running = occupy(&client, "lm").await;
    let mut stream = connect(&server).await;
    let body = json!({ "query": ["in the queue"] }).to_string();
    stream.write_all(request("POST", "/get_reward", &[JSON], &body).as_bytes()).await.unwrap();
    server.until("it is queued", |m| m.value("plumb_queue_sequences", &[]) == 1.0).await;
    server.terminate();
    Answer::read(&mut stream).await.failed(503, "UNAVAILABLE", "shutting down");
    assert_eq!(server.exit_code().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_what_is_true() {
    let server = Launch::of(["llama-pm"]).model_that_never_loads("late").flags(GATEWAY).listen().await;
    let health = get(&server, "/health").await;
    assert_eq!((health.status, &health.body["status"]), (503, &json!("NOT_SERVING")));
    post(&server, "/get_reward", json!({ "model": "late", "query": ["a"] })).await.failed(503, "UNAVAILABLE", "");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_that_of_the_rpcs() {
    let (authority, files) = (Authority::new(), Files::new());
    let server = Launch::of(["llama-pm"]).flags(&format!("{GATEWAY} {}", files.server(&authority))).listen().await;
    server.until_ready().await;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, connect(&server).await).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let body = json!({ "query": ["a"] }).to_string();
    let answer = ask(&mut stream, &request("POST", "/get_reward", &[JSON], &body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    // Who does not speak it is not answered.
    let mut plain = connect(&server).await;
    plain.write_all(request("GET", "/health", &[], "").as_bytes()).await.unwrap();
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said).await;
    assert!(!said.starts_with(b"HTTP"), "{said:?}");
}

/// The clients of other projects, as far as a Python has them.
#[tokio::test(flavor = "multi_thread")]
async fn other_projects_clients_get_on_with_it() {
    let python = std::env::var("PLUMB_PYTHON").unwrap_or_else(|_| "python3".into());
    let server = Launch::of(["llama-pm"]).flags("--http-port 0 --dtype f32").start().await;
    let script: PathBuf = fixture("").parent().unwrap().join("python/check_gateway.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).arg(server.http_address().unwrap().to_string()).arg(fixture("llama-pm"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    let Ok(output) = output else { return println!("skipped: there is no Python") };
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    println!("{}", said[0]);
    assert!(output.status.success(), "{}\n{}", said[0], said[1]);
}
