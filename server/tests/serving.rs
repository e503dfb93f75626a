//! A server in this process, the generated clients, and the committed fixtures: what the rpcs answer.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::future::Future;

use futures::StreamExt as _;
use plumb_proto::v1;
use plumb_server::{Config, Failure, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_types::StatusExt as _;
use v1::generation_client::GenerationClient;
use v1::models_client::ModelsClient;
use v1::preference_client::PreferenceClient;
use v1::tokens_client::TokensClient;

const PM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/llama-pm");
const LM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/llama-lm");

/// A server that serves a preference model `pm` and a language model `lm`.
struct Running {
    channel: Channel,
    metrics: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), Failure>>,
}

impl Running {
    async fn start(flags: &[&str]) -> Self {
        let (pm, lm) = (format!("pm={PM}"), format!("lm={LM}"));
        let base = ["plumb-server", "--model", &pm, "--model", &lm];
        let ports = ["--port", "0", "--prometheus-port", "0", "--threads", "1", "--kv-cache-mib", "8"];
        let config = Config::parse([&base, &ports[..], flags].concat()).unwrap();
        let server = Server::start(config).await.unwrap();
        let metrics = server.metrics_address();
        let channel =
            Channel::from_shared(format!("http://{}", server.grpc_address())).unwrap().connect().await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let asked = async move {
            // Also when the test is over.
            let _ = stopped.await;
            "the test"
        };
        let ended = tokio::spawn(server.run(futures::stream::once(asked)));
        let mut running = Self { channel, metrics, stop, ended };
        let mut statuses = running.health("").await;
        loop {
            tokio::select! {
                status = status(&mut statuses) => if status == ServingStatus::Serving { return running },
                ended = &mut running.ended => panic!("{ended:?}"),
            }
        }
    }

    fn preference(&self) -> PreferenceClient<Channel> {
        PreferenceClient::new(self.channel.clone())
    }

    fn models(&self) -> ModelsClient<Channel> {
        ModelsClient::new(self.channel.clone())
    }

    fn generation(&self) -> GenerationClient<Channel> {
        GenerationClient::new(self.channel.clone())
    }

    async fn score(&self, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Status> {
        self.preference().score(request).await.map(tonic::Response::into_inner)
    }

    /// All messages of a generated answer.
    async fn generate(&self, request: v1::GenerateRequest) -> Result<Vec<v1::GenerateResponse>, Status> {
        let stream = self.generation().generate(request).await?.into_inner();
        stream.collect::<Vec<_>>().await.into_iter().collect()
    }

    async fn health(&self, service: &str) -> tonic::Streaming<HealthCheckResponse> {
        let request = HealthCheckRequest { service: service.to_owned() };
        HealthClient::new(self.channel.clone()).watch(request).await.unwrap().into_inner()
    }

    /// An HTTP answer of the metrics listener, head included.
    async fn http(&self, path: &str) -> String {
        let mut connection = tokio::net::TcpStream::connect(self.metrics).await.unwrap();
        connection.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

async fn status(statuses: &mut tonic::Streaming<HealthCheckResponse>) -> ServingStatus {
    statuses.message().await.unwrap().unwrap().status()
}

fn text(text: &str) -> v1::Input {
    v1::Input { input: Some(v1::input::Input::Text(text.to_owned())) }
}

fn ids(ids: &[u32]) -> v1::Input {
    let ids = v1::TokenIds { ids: ids.to_vec(), response_start: None };
    v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
}

fn turns(turns: &[(&str, &str)]) -> v1::Input {
    let message = |&(role, content): &(&str, &str)| v1::Message { role: role.to_owned(), content: content.to_owned() };
    let conversation = v1::Conversation { messages: turns.iter().map(message).collect() };
    v1::Input { input: Some(v1::input::Input::Conversation(conversation)) }
}

fn named(name: &str) -> Option<v1::ModelSpec> {
    Some(v1::ModelSpec { name: name.to_owned(), choice: None })
}

fn items(items: &[v1::Input]) -> v1::ScoreRequest {
    v1::ScoreRequest { items: items.to_vec(), ..v1::ScoreRequest::default() }
}

fn prompt(input: v1::Input) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(input),
        sampling: Some(v1::Sampling { seed: Some(7), ..v1::Sampling::default() }),
        stopping: Some(v1::Stopping { max_new_tokens: Some(24), ignore_eos: true, ..v1::Stopping::default() }),
        ..v1::GenerateRequest::default()
    }
}

fn outcome(result: &v1::ScoreResult) -> Result<&v1::Score, Code> {
    match result.outcome.as_ref().unwrap() {
        v1::score_result::Outcome::Score(score) => Ok(score),
        v1::score_result::Outcome::Error(error) => Err(Code::from_i32(error.code)),
    }
}

/// A sample's text and end.
fn sample(answer: &[v1::GenerateResponse], index: u32) -> (String, v1::SampleEnd) {
    let of_sample = || answer.iter().filter(|message| message.index == index);
    let text = of_sample().map(|message| message.text.as_str()).collect();
    (text, of_sample().find_map(|message| message.end).unwrap())
}

async fn check_code<T: std::fmt::Debug>(
    call: impl Future<Output = Result<T, Status>>,
    code: Code,
    message: &str,
) -> Status {
    let status = call.await.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(message), "{status}");
    let details = status.get_error_details();
    assert_eq!(details.bad_request().is_some(), code == Code::InvalidArgument, "{status}");
    let retry = matches!(code, Code::Unavailable | Code::ResourceExhausted);
    assert_eq!(details.retry_info().is_some(), retry, "{status}");
    status
}

#[tokio::test]
async fn an_item_that_fails_does_not_fail_its_neighbours() {
    let server = Running::start(&[]).await;
    let good = text("The reward is the last token.");
    let response = server.score(items(&[good.clone(), ids(&[999_999]), good.clone()])).await.unwrap();
    let [first, second, third] = &response.results[..] else { panic!("three results") };
    assert_eq!(outcome(second), Err(Code::InvalidArgument));
    assert_eq!(outcome(first), outcome(third));
    assert_eq!(response.model.unwrap().name, "pm", "the default for scores");
    let alone = server.score(items(&[good])).await.unwrap();
    assert_eq!(outcome(&alone.results[0]).unwrap().reward.to_bits(), outcome(first).unwrap().reward.to_bits());
    assert!(alone.timings.unwrap().total_ns > 0);
}

#[tokio::test]
async fn rank_gives_the_bits_of_score() {
    let server = Running::start(&[]).await;
    let question = "Which of these is the best? ".repeat(8);
    let answers = ["This one.", "", "That one, by far.", "This one."];
    for model in ["pm", "lm"] {
        let candidate =
            |text: &&str| v1::Candidate { candidate: Some(v1::candidate::Candidate::Text((*text).to_owned())) };
        let request = v1::RankRequest {
            model: named(model),
            prompt: Some(turns(&[("user", &question)])),
            candidates: answers.iter().map(candidate).collect(),
            ..v1::RankRequest::default()
        };
        let ranked = server.preference().rank(request).await.unwrap().into_inner().ranked;
        let conversations: Vec<_> = answers.iter().map(|a| turns(&[("user", &question), ("assistant", a)])).collect();
        let scored = server.score(v1::ScoreRequest { model: named(model), ..items(&conversations) }).await.unwrap();
        let mut best = f32::INFINITY;
        for place in &ranked {
            let by_score = outcome(&scored.results[place.index as usize]);
            match &place.score {
                Some(score) => {
                    assert_eq!(score.reward.to_bits(), by_score.unwrap().reward.to_bits(), "{model} {place:?}");
                    assert!(score.reward <= best);
                    best = score.reward;
                }
                None => assert_eq!(by_score.map(drop), Err(Code::from_i32(place.error.as_ref().unwrap().code))),
            }
        }
        let ties: Vec<_> = ranked.iter().map(|place| place.index).filter(|index| [0, 3].contains(index)).collect();
        assert_eq!(ties, [0, 3], "equal candidates keep their order");
    }
}

#[tokio::test]
async fn every_kind_of_mistake_has_its_code() {
    let server = Running::start(&["--max-client-batch-size", "4", "--max-queue-tokens", "600"]).await;
    let good = || items(&[text("some text")]);
    let invalid = Code::InvalidArgument;
    check_code(server.score(items(&[])), invalid, "items: at least one").await;
    check_code(server.score(items(&vec![text("x"); 5])), invalid, "items: 5 are given, 4 are allowed").await;
    check_code(server.score(items(&[v1::Input::default()])), invalid, "items[0]: one of").await;
    check_code(server.score(v1::ScoreRequest { objective: 9, ..good() }), invalid, "objective: 9").await;
    check_code(server.score(items(&[text(&"long ".repeat(2000))])), invalid, "ask for truncation").await;
    check_code(server.score(items(&[text(&"words ".repeat(150))])), invalid, "tokens of work").await;
    check_code(server.score(v1::ScoreRequest { model: named("no"), ..good() }), Code::NotFound, "`no`").await;
    let version = v1::ModelSpec { name: "pm".to_owned(), choice: Some(v1::model_spec::Choice::Version(9)) };
    check_code(server.score(v1::ScoreRequest { model: Some(version), ..good() }), Code::NotFound, "no version 9").await;
    let hello = || prompt(turns(&[("user", "Hello?")]));
    let wrong_kind = v1::GenerateRequest { model: named("pm"), ..hello() };
    check_code(server.generate(wrong_kind), Code::FailedPrecondition, "`pm` is a preference model").await;
    let sampling = Some(v1::Sampling { temperature: Some(-1.0), ..v1::Sampling::default() });
    check_code(server.generate(v1::GenerateRequest { sampling, ..hello() }), invalid, "sampling.temperature").await;
    let best_of = Some(v1::BestOf { samples: 2, ranker: named("lm") });
    let wrong_ranker = v1::GenerateRequest { best_of, ..hello() };
    check_code(server.generate(wrong_ranker), Code::FailedPrecondition, "`lm` is a language model").await;
    let load = v1::LoadVersionRequest { name: "pm".to_owned(), source: "/no/such".to_owned(), ..Default::default() };
    check_code(server.models().load_version(load), Code::FailedPrecondition, "/no/such").await;
    let mut late = Request::new(good());
    late.set_timeout(std::time::Duration::from_nanos(1));
    // The client's own timer answers too.
    let code = server.preference().score(late).await.unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
}

#[tokio::test]
async fn what_is_over_the_limit_may_come_again() {
    let server = Running::start(&["--max-queue-tokens", "600", "--max-concurrent-requests", "2"]).await;
    let long = v1::GenerateRequest {
        stopping: Some(v1::Stopping { max_new_tokens: Some(400), ignore_eos: true, ..v1::Stopping::default() }),
        ..prompt(text("Go on"))
    };
    // Its first message has come: it holds its tokens until it is dropped.
    let mut running = server.generation().generate(long.clone()).await.unwrap().into_inner();
    running.message().await.unwrap();
    check_code(server.generate(long.clone()), Code::ResourceExhausted, "of 600 tokens are queued").await;
    let short = server.generation().generate(prompt(text("Go on"))).await.unwrap().into_inner();
    check_code(server.score(items(&[text("x")])), Code::ResourceExhausted, "2 calls are in flight").await;
    drop((short, running));
    // The server learns of it in its own time.
    while server.score(items(&[text("x")])).await.is_err_and(|status| status.code() == Code::ResourceExhausted) {
        tokio::task::yield_now().await;
    }
    server.generate(long).await.unwrap();
}

#[tokio::test]
async fn seeds_decide_on_samples() {
    let server = Running::start(&[]).await;
    let request = prompt(turns(&[("user", "Tell me something.")]));
    let one = server.generate(request.clone()).await.unwrap();
    let three = server.generate(v1::GenerateRequest { n: Some(3), ..request.clone() }).await.unwrap();
    assert_eq!(sample(&one, 0), sample(&three, 0));
    assert_ne!(sample(&three, 0).0, sample(&three, 1).0);
    assert_eq!(one[0].model.as_ref().unwrap().name, "lm");
    let summary = three.last().unwrap().summary.clone().unwrap();
    assert_eq!(summary.seed, 7);
    let (whole, end) = sample(&one, 0);
    assert_eq!((end.finish_reason(), end.new_tokens), (v1::FinishReason::Length, 24));
    // Cut off at a character that is certain to come.
    let stop = whole.chars().nth(5).unwrap().to_string();
    let stopping = v1::Stopping { stop_strings: vec![stop.clone()], ..request.stopping.clone().unwrap() };
    let stopped = server.generate(v1::GenerateRequest { stopping: Some(stopping), ..request }).await.unwrap();
    let (text, end) = sample(&stopped, 0);
    assert_eq!(text, whole.split(&stop).next().unwrap());
    assert_eq!(end.finish_reason(), v1::FinishReason::StopString);
}

#[tokio::test]
async fn the_best_of_many_is_the_one_that_score_likes_best() {
    let server = Running::start(&[]).await;
    let question = [("user", "Tell me something.")];
    let request = prompt(turns(&question));
    let all = server.generate(v1::GenerateRequest { n: Some(4), ..request.clone() }).await.unwrap();
    let texts: Vec<_> = (0..4).map(|i| sample(&all, i).0).collect();
    let conversations: Vec<_> = texts.iter().map(|text| turns(&[question[0], ("assistant", text)])).collect();
    let scored = server.score(items(&conversations)).await.unwrap();
    let mut rewards: Vec<_> = scored.results.iter().map(|result| outcome(result).unwrap().reward).collect();
    rewards.sort_by(|a, b| b.total_cmp(a));
    let best_of = Some(v1::BestOf { samples: 4, ranker: None });
    let best = server.generate(v1::GenerateRequest { n: Some(2), best_of, ..request }).await.unwrap();
    let answered: Vec<_> = (0..2).map(|i| sample(&best, i).1.reward.unwrap()).collect();
    assert_eq!(answered, rewards[..2]);
    assert_eq!(best[0].ranker.as_ref().unwrap().name, "pm");
}

#[tokio::test]
async fn a_stream_outlives_bad_requests_and_ends_with_the_server() {
    let server = Running::start(&[]).await;
    let (sender, requests) = tokio::sync::mpsc::channel(8);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = server.preference().score_stream(requests).await.unwrap().into_inner();
    for (id, request) in [("a", items(&[text("x")])), ("bad", items(&[])), ("b", items(&[text("x")]))] {
        sender.send(v1::ScoreRequest { request_id: id.to_owned(), ..request }).await.unwrap();
    }
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..3 {
        let answer = answers.message().await.unwrap().unwrap();
        seen.insert(answer.request_id, answer.error.map(|error| Code::from_i32(error.code)));
    }
    let expected = [("a", None), ("b", None), ("bad", Some(Code::InvalidArgument))];
    assert_eq!(seen, expected.map(|(id, error)| (id.to_owned(), error)).into());
    let mut health = server.health("plumb.v1.Preference").await;
    assert_eq!(status(&mut health).await, ServingStatus::Serving);
    server.stop.send(()).unwrap();
    assert_eq!(status(&mut health).await, ServingStatus::NotServing);
    let end = answers.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert_eq!(server.ended.await.unwrap(), Ok(()));
}

#[tokio::test]
async fn versions_come_beside_others_and_go_when_nobody_holds_them() {
    let server = Running::start(&[]).await;
    let mut models = server.models();
    let mut changes = models.watch_models(v1::WatchModelsRequest { name: "pm".to_owned() }).await.unwrap().into_inner();
    let load = v1::LoadVersionRequest { name: "pm".to_owned(), source: PM.to_owned(), ..Default::default() };
    let loaded = models.load_version(load).await.unwrap().into_inner().model.unwrap();
    assert_eq!((loaded.model.clone().unwrap().version, loaded.state()), (2, v1::ModelState::Available));
    let request = items(&[text("x")]);
    assert_eq!(server.score(request.clone()).await.unwrap().model.unwrap().version, 2);
    let label = |version| v1::SetLabelRequest { name: "pm".to_owned(), label: "stable".to_owned(), version };
    models.set_label(label(Some(1))).await.unwrap();
    assert_eq!(server.score(request.clone()).await.unwrap().model.unwrap().version, 1);
    let unload = v1::UnloadVersionRequest { name: "pm".to_owned(), version: 1 };
    check_code(models.unload_version(unload.clone()), Code::FailedPrecondition, "move it first").await;
    models.set_label(label(None)).await.unwrap();
    models.unload_version(unload).await.unwrap();
    let mut seen = Vec::new();
    while !seen.contains(&(1, v1::ModelState::Ended)) {
        let status = changes.message().await.unwrap().unwrap().model.unwrap();
        seen.push((status.model.as_ref().unwrap().version, status.state()));
    }
    use v1::ModelState::{Available, Draining, Ended, Loading, Start, Warming};
    let of = |version| seen.iter().filter(move |(v, _)| *v == version).map(|(_, state)| *state);
    let mut first: Vec<_> = of(1).collect();
    first.dedup();
    assert_eq!(first, [Available, Draining, Ended]);
    let mut second: Vec<_> = of(2).collect();
    second.dedup();
    assert_eq!(second, [Start, Loading, Warming, Available]);
}

#[tokio::test]
async fn keys_are_asked_for() {
    let server = Running::start(&["--api-key", "client", "--admin-api-key", "admin"]).await;
    let with = |key: &str| {
        let mut request = Request::new(v1::UnloadVersionRequest { name: "pm".to_owned(), version: 9 });
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        request
    };
    check_code(server.score(items(&[text("x")])), Code::Unauthenticated, "needs a key").await;
    check_code(server.models().unload_version(with("wrong")), Code::Unauthenticated, "not known").await;
    check_code(server.models().unload_version(with("client")), Code::PermissionDenied, "the role `admin`").await;
    check_code(server.models().unload_version(with("admin")), Code::NotFound, "no version 9").await;
}

#[tokio::test]
async fn render_and_tokenize_show_what_the_model_is_fed() {
    let server = Running::start(&[]).await;
    let mut tokens = TokensClient::new(server.channel.clone());
    let input = Some(turns(&[("user", "hi"), ("assistant", "hello")]));
    let request = v1::RenderRequest { input, ..v1::RenderRequest::default() };
    let rendered = tokens.render(request).await.unwrap().into_inner();
    assert_eq!(rendered.text, "<|bos|><|user|>hi\n<|assistant|>hello");
    assert!(rendered.response_start < rendered.response_end);
    assert_eq!(rendered.response_end as usize, rendered.token_ids.len());
    assert_eq!(rendered.template_sha256.len(), 64);
    let request = v1::TokenizeRequest { texts: vec!["hello".to_owned()], ..v1::TokenizeRequest::default() };
    let tokenized = tokens.tokenize(request).await.unwrap().into_inner().tokenized;
    assert!(tokenized[0].tokens[0].special);
    assert_eq!(tokenized[0].tokens.last().unwrap().stop, 5);
}

#[tokio::test]
async fn metrics_and_probes_are_served() {
    let server = Running::start(&[]).await;
    server.score(items(&[text("x")])).await.unwrap();
    let metrics = server.http("/metrics").await;
    for line in [
        "# HELP plumb_requests_total ",
        "# TYPE plumb_request_duration_seconds histogram",
        "plumb_requests_total{rpc=\"Preference/Score\",code=\"OK\"}",
        "plumb_reward_count{model=\"pm\",version=\"1\"}",
        "plumb_reward_bucket{model=\"pm\",version=\"1\",le=\"0.5\"}",
        "plumb_model_state{model=\"lm\",version=\"1\"} 4",
        "plumb_build_info{version=",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    for path in ["/healthz", "/readyz"] {
        assert!(server.http(path).await.starts_with("HTTP/1.0 200"), "{path}");
    }
}
