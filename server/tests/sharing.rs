//! A server in this process and clients that want more of it than their part: flow control, ids, turns.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt as _;
use futures::future::join_all;
use plumb_proto::v1;
use plumb_proto::v1::preference_client::PreferenceClient;
use plumb_server::{Config, Server};
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

const PM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/llama-pm");

/// A server that ends with the test.
struct Running {
    endpoint: Endpoint,
    _stop: oneshot::Sender<()>,
}

impl Running {
    async fn start(flags: &[&str]) -> Self {
        let pm = format!("pm={PM}");
        let base = ["plumb-server", "--model", &pm, "--threads", "1", "--kv-cache-mib", "8"];
        let ports = ["--port", "0", "--prometheus-port", "0"];
        let server = Server::start(Config::parse([&base[..], &ports, flags].concat()).unwrap()).await.unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc_address())).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.run(futures::stream::once(async move {
            let _ = stopped.await;
            "the test"
        })));
        let running = Self { endpoint, _stop: stop };
        let mut client = running.client().await;
        while client.score(items(1, 10)).await.is_err_and(|status| status.code() == Code::Unavailable) {
            tokio::task::yield_now().await;
        }
        running
    }

    /// A client with a connection of its own.
    async fn client(&self) -> PreferenceClient<Channel> {
        PreferenceClient::new(self.endpoint.connect().await.unwrap())
    }
}

/// So many items of so many bytes, cut to what the model takes.
fn items(count: usize, bytes: usize) -> v1::ScoreRequest {
    let item = v1::Input { input: Some(v1::input::Input::Text("word ".repeat(bytes / 5))) };
    let text = v1::TextOptions { truncation: v1::Truncation::Left.into(), max_tokens: Some(64), ..Default::default() };
    v1::ScoreRequest { items: vec![item; count], text: Some(text), per_token: true, ..Default::default() }
}

fn of_client<T>(message: T, id: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-client-id", id.parse().unwrap());
    request
}

/// Calls until it is let in, as it is told to, and answers how often it was refused.
async fn patiently(client: &mut PreferenceClient<Channel>, request: v1::ScoreRequest, id: &str) -> usize {
    let mut refusals = 0;
    loop {
        match client.score(of_client(request.clone(), id)).await {
            Ok(_) => return refusals,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                let delay = status.get_error_details().retry_info().unwrap().retry_delay.unwrap();
                tokio::time::sleep(delay).await;
                refusals += 1;
            }
        }
    }
}

#[tokio::test]
async fn an_id_that_is_none_is_refused() {
    let server = Running::start(&[]).await;
    let mut client = server.client().await;
    client.score(of_client(items(1, 10), "worker-7")).await.unwrap();
    let status = client.score(of_client(items(1, 10), &"x".repeat(65))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("x-client-id: 1 to 64"), "{status}");
}

#[tokio::test]
async fn messages_that_do_not_fit_together_are_read_one_after_the_other() {
    let flags = ["--max-request-memory-mib", "1", "--max-message-bytes", "524288"];
    let server = Running::start(&flags).await;
    let large = items(10, 40_000);
    let calls = (0..12).map(async |i| {
        let mut client = server.client().await;
        let id = format!("client-{}", i % 3);
        if i % 2 == 0 {
            return patiently(&mut client, large.clone(), &id).await;
        }
        let requests = futures::stream::iter(vec![large.clone(); 4]);
        let answers = client.score_stream(of_client(requests, &id)).await.unwrap().into_inner();
        answers.map(Result::unwrap).count().await
    });
    let ended = join_all(calls).await;
    assert!(ended.iter().skip(1).step_by(2).all(|answers| *answers == 4), "{ended:?}");
    // Over the limit of a message, and waits for nothing.
    let status = server.client().await.score(items(14, 40_000)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

#[tokio::test]
async fn a_client_that_never_reads_its_answers_is_not_read_any_more() {
    let server = Running::start(&[]).await;
    let endpoint = server.endpoint.clone().initial_stream_window_size(64 << 10);
    let mut deaf = PreferenceClient::new(endpoint.connect().await.unwrap());
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    let requests = futures::stream::repeat_with(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        items(100, 300)
    });
    let answers = deaf.score_stream(requests).await.unwrap();
    // Others go on, and at some time nothing more of it is read.
    let mut other = server.client().await;
    let (mut read, mut rounds) = (0, 0);
    while read < 32 || sent.load(Ordering::Relaxed) != read {
        read = sent.load(Ordering::Relaxed);
        for _ in 0..20 {
            patiently(&mut other, items(100, 300), "other").await;
        }
        rounds += 1;
        assert!(rounds < 50, "{read} requests were read");
    }
    assert!(read < 200, "{read} requests were read");
    drop(answers);
}

#[tokio::test]
async fn many_greedy_clients_do_not_keep_a_modest_one_out() {
    let server = Running::start(&["--max-batch-tokens", "1024", "--max-queue-tokens", "16384"]).await;
    let greedy = (0..4).map(|i| {
        let endpoint = server.endpoint.clone();
        tokio::spawn(async move {
            let client = PreferenceClient::new(endpoint.connect().await.unwrap());
            let id = format!("greedy-{i}");
            // What it is told does not matter to it.
            let calls = (0..8).map(async |_| {
                let mut client = client.clone();
                loop {
                    let result: Result<_, Status> = client.score(of_client(items(32, 300), &id)).await;
                    if result.is_err() {
                        tokio::task::yield_now().await;
                    }
                }
            });
            join_all(calls).await
        })
    });
    let greedy: Vec<_> = greedy.map(tokio_util::task::AbortOnDropHandle::new).collect();
    let mut modest = server.client().await;
    let mut refusals = Vec::new();
    for _ in 0..20 {
        refusals.push(patiently(&mut modest, items(4, 300), "modest").await);
    }
    assert!(refusals.iter().filter(|refusals| **refusals <= 2).count() >= 18, "{refusals:?}");
    drop(greedy);
}
