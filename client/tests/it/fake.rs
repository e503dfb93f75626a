//! A server of the contract with made-up models, which fails and waits as a test tells it to.
//!
//! A text's reward is the number of its last turn's characters, negative behind the full HHH prompt. A text with
//! `refuse` in it is refused, one with `infinite` has no finite reward, and a call of more than [`ROOM`] characters is
//! too large. The model `lm` is a language model.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt, stream};
use plumb_client::v1::generation_server::{Generation, GenerationServer};
use plumb_client::v1::models_server::{Models, ModelsServer};
use plumb_client::v1::preference_server::{Preference, PreferenceServer};
use plumb_client::v1::tokens_server::{Tokens, TokensServer};
use plumb_client::{SERVICES, v1};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt};

/// Most characters of a call's texts.
pub(crate) const ROOM: usize = 10_000;

/// What the next Score or Generate call meets; calls without a step are answered.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Answer,
    Fail(Status),
    /// Answered once so many calls have arrived.
    HoldUntilCalls(usize),
    Hang,
    /// Answers one result too few.
    Forget,
    /// Answers as if other weights were served.
    OtherWeights,
}

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) url: String,
    steps: Arc<Mutex<VecDeque<Step>>>,
    calls: watch::Sender<usize>,
    seen: Arc<Mutex<Vec<MetadataMap>>>,
    health: tonic_health::server::HealthReporter,
}

impl Fake {
    pub(crate) async fn start(steps: impl IntoIterator<Item = Step>) -> Self {
        Self::start_on(Server::builder(), "http://127.0.0.1", steps).await
    }

    /// With TLS, for `https://localhost`; also answers the certificate.
    pub(crate) async fn start_tls() -> (Self, String) {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let identity = Identity::from_pem(own.cert.pem(), own.signing_key.serialize_pem());
        let server = Server::builder().tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
        (Self::start_on(server, "https://localhost", []).await, own.cert.pem())
    }

    async fn start_on(mut server: Server, host: &str, steps: impl IntoIterator<Item = Step>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (health, health_service) = tonic_health::server::health_reporter();
        for service in SERVICES {
            health.set_service_status(service, ServingStatus::Serving).await;
        }
        let fake = Self {
            url: format!("{host}:{}", listener.local_addr().unwrap().port()),
            steps: Arc::new(Mutex::new(steps.into_iter().collect())),
            calls: watch::Sender::new(0),
            seen: Arc::default(),
            health,
        };
        let server = server
            .add_service(PreferenceServer::new(fake.clone()))
            .add_service(GenerationServer::new(fake.clone()))
            .add_service(ModelsServer::new(fake.clone()))
            .add_service(TokensServer::new(fake.clone()))
            .add_service(health_service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    /// Score and Generate calls that arrived.
    pub(crate) fn calls(&self) -> usize {
        *self.calls.borrow()
    }

    /// A header of the last call.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        seen.last()?.get(name).map(|value| value.to_str().unwrap().to_owned())
    }

    pub(crate) async fn set_health(&self, service: &str, status: ServingStatus) {
        self.health.set_service_status(service, status).await;
    }

    async fn step(&self, metadata: &MetadataMap) -> Result<bool, Status> {
        Ok(self.next_step(metadata).await?.0)
    }

    /// Whether all is answered, and by the usual weights.
    async fn next_step(&self, metadata: &MetadataMap) -> Result<(bool, bool), Status> {
        self.seen.lock().unwrap().push(metadata.clone());
        let step = self.steps.lock().unwrap().pop_front().unwrap_or(Step::Answer);
        self.calls.send_modify(|calls| *calls += 1);
        match step {
            Step::Answer => Ok((true, true)),
            Step::OtherWeights => Ok((true, false)),
            Step::Forget => Ok((false, true)),
            Step::Fail(status) => Err(status),
            Step::Hang => std::future::pending().await,
            Step::HoldUntilCalls(n) => {
                self.calls.subscribe().wait_for(|calls| *calls >= n).await.unwrap();
                Ok((true, true))
            }
        }
    }
}

fn identity(spec: Option<&v1::ModelSpec>) -> v1::ModelIdentity {
    let name = spec.map(|s| s.name.clone()).filter(|name| !name.is_empty()).unwrap_or_else(|| "pm".into());
    v1::ModelIdentity { name, version: 3, weights_digest: "0123456789abcdef".into() }
}

fn words(input: &v1::Input) -> String {
    match input.input.as_ref().unwrap() {
        v1::input::Input::Conversation(c) => c.messages.last().unwrap().content.clone(),
        v1::input::Input::Text(text) => text.clone(),
        v1::input::Input::TokenIds(ids) => "x".repeat(ids.ids.len()),
    }
}

fn scored(words: &str, request: &v1::ScoreRequest) -> Result<v1::Score, v1::ItemError> {
    if words.contains("refuse") {
        return Err(v1::ItemError { code: Code::InvalidArgument as i32, message: "too long".into() });
    }
    if words.contains("infinite") {
        return Err(v1::ItemError { code: Code::Internal as i32, message: "the reward is not finite".into() });
    }
    let length = words.chars().count();
    let full = request.text.is_some_and(|t| t.hhh_prompt() == v1::HhhPrompt::Full);
    let language = request.model.as_ref().is_some_and(|m| m.name == "lm");
    let reward = if full { -(length as f32) } else { length as f32 };
    let log_probs = v1::LogProbs { sum: reward, mean: 0.1, response_tokens: 2, unconditional_sum: None, greedy: false };
    let token = v1::TokenValue { id: 7, text: "\n".into(), value: 0.5 };
    Ok(v1::Score {
        reward,
        input_tokens: length as u32,
        cached_tokens: 1,
        truncated: false,
        log_probs: language.then_some(log_probs),
        tokens: if request.per_token { vec![token] } else { Vec::new() },
    })
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn score_response(request: &v1::ScoreRequest) -> v1::ScoreResponse {
    let result = |input: &v1::Input| {
        let outcome = match scored(&words(input), request) {
            Ok(score) => v1::score_result::Outcome::Score(score),
            Err(error) => v1::score_result::Outcome::Error(error),
        };
        v1::ScoreResult { outcome: Some(outcome) }
    };
    v1::ScoreResponse {
        model: Some(identity(request.model.as_ref())),
        results: request.items.iter().map(result).collect(),
        request_id: request.request_id.clone(),
        ..Default::default()
    }
}

/// The call's own failure, if all items failed with the same code or are too many.
fn refused(request: &v1::ScoreRequest, response: &v1::ScoreResponse) -> Result<(), Status> {
    let invalid = |said: String, field: &str, reason: &str| {
        Status::with_error_details(Code::InvalidArgument, said, ErrorDetails::with_bad_request_violation(field, reason))
    };
    if request.items.iter().map(|item| words(item).len()).sum::<usize>() > ROOM {
        let reason = "too many tokens of work; split it";
        return Err(invalid(reason.to_owned(), "", reason));
    }
    let failure = |result: &v1::ScoreResult| plumb_client::score(result).err();
    let Some(first) = response.results.first().and_then(failure) else { return Ok(()) };
    match response.results.iter().all(|result| failure(result).is_some_and(|other| other.code == first.code)) {
        true if first.code == Code::InvalidArgument => {
            Err(invalid(format!("items[0]: {}", first.message), "items[0]", &first.message))
        }
        true => Err(Status::new(first.code, first.message)),
        false => Ok(()),
    }
}

#[tonic::async_trait]
impl Preference for Fake {
    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let (complete, usual) = self.next_step(request.metadata()).await?;
        let mut response = score_response(request.get_ref());
        refused(request.get_ref(), &response)?;
        if let Some(model) = response.model.as_mut().filter(|_| !usual) {
            model.weights_digest = "fedcba9876543210".into();
        }
        if !complete {
            response.results.pop();
        }
        Ok(Response::new(response))
    }

    type ScoreStreamStream = Out<v1::ScoreResponse>;

    async fn score_stream(
        &self,
        request: Request<tonic::Streaming<v1::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let answers = request.into_inner().map(|request| Ok(score_response(&request?)));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn rank(&self, request: Request<v1::RankRequest>) -> Result<Response<v1::RankResponse>, Status> {
        let complete = self.step(request.metadata()).await?;
        let request = request.into_inner();
        let like = v1::ScoreRequest { model: request.model.clone(), text: request.text, ..Default::default() };
        let candidate = |(index, candidate): (usize, &v1::Candidate)| {
            let words = match candidate.candidate.as_ref().unwrap() {
                v1::candidate::Candidate::Text(text) => text.clone(),
                v1::candidate::Candidate::TokenIds(ids) => "x".repeat(ids.ids.len()),
            };
            let (score, error) = match scored(&words, &like) {
                Ok(score) => (Some(score), None),
                Err(error) => (None, Some(error)),
            };
            v1::Ranked { index: index as u32, score, error, ..Default::default() }
        };
        let mut ranked: Vec<_> = request.candidates.iter().enumerate().map(candidate).collect();
        let reward = |r: &v1::Ranked| r.score.as_ref().map_or(f32::NEG_INFINITY, |s| s.reward);
        ranked.sort_by(|a, b| reward(b).total_cmp(&reward(a)));
        let best = reward(&ranked[0]);
        for (i, r) in ranked.iter_mut().enumerate().filter(|(_, r)| r.score.is_some()) {
            r.rank = i as u32 + 1;
            r.margin = reward(r) - best;
            r.probability = 1.0 / (1.0 + (-r.margin).exp());
        }
        if !complete {
            ranked.pop();
        }
        let model = Some(identity(request.model.as_ref()));
        Ok(Response::new(v1::RankResponse { model, ranked, ..Default::default() }))
    }
}

#[tonic::async_trait]
impl Generation for Fake {
    type GenerateStream = Out<v1::GenerateResponse>;

    /// Says `tick tock ` word by word; a temperature of 9 never ends.
    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        self.step(request.metadata()).await?;
        let request = request.into_inner();
        let reward = request.best_of.as_ref().map(|_| 0.25);
        let ranker = request.best_of.as_ref().map(|b| identity(b.ranker.as_ref()));
        let mut pieces = vec![v1::GenerateResponse { model: Some(identity(None)), ranker, ..Default::default() }];
        for index in 0..request.n.unwrap_or(1) {
            for (i, text) in ["tick ", "tock"].into_iter().enumerate() {
                let token_ids = vec![i as u32];
                pieces.push(v1::GenerateResponse { index, text: text.into(), token_ids, ..Default::default() });
            }
            let finish_reason = v1::FinishReason::Eos as i32;
            let end = v1::SampleEnd { finish_reason, new_tokens: 2, sum_log_prob: -1.5, reward };
            pieces.push(v1::GenerateResponse { index, end: Some(end), ..Default::default() });
        }
        let summary = v1::GenerateSummary { prompt_tokens: 5, cached_tokens: 4, seed: 11, ..Default::default() };
        pieces.push(v1::GenerateResponse { summary: Some(summary), ..Default::default() });
        let pieces = stream::iter(pieces).map(Ok);
        let endless = request.sampling.is_some_and(|s| s.temperature == Some(9.0));
        if endless {
            return Ok(Response::new(Box::pin(pieces.take(2).chain(stream::pending()))));
        }
        Ok(Response::new(Box::pin(pieces)))
    }
}

fn status(name: &str, version: u64) -> v1::ModelStatus {
    v1::ModelStatus {
        model: Some(v1::ModelIdentity { name: name.into(), version, weights_digest: "0123456789abcdef".into() }),
        state: v1::ModelState::Available as i32,
        labels: vec!["stable".into()],
        is_default: true,
        details: Some(v1::ModelDetails {
            kind: v1::ModelKind::Preference as i32,
            architecture: "LlamaForSequenceClassification".into(),
            vocab_size: 100,
            parameters: 134_515_008,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl Models for Fake {
    async fn list_models(&self, _: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse { models: vec![status("pm", 2), status("pm", 3)] }))
    }

    async fn get_model(&self, request: Request<v1::GetModelRequest>) -> Result<Response<v1::GetModelResponse>, Status> {
        let name = identity(request.into_inner().model.as_ref()).name;
        if name == "nobody" {
            return Err(Status::not_found("no model named nobody"));
        }
        Ok(Response::new(v1::GetModelResponse { model: Some(status(&name, 3)) }))
    }

    async fn load_version(
        &self,
        request: Request<v1::LoadVersionRequest>,
    ) -> Result<Response<v1::LoadVersionResponse>, Status> {
        self.step(request.metadata()).await?;
        let request = request.into_inner();
        let model = status(&request.name, request.version.unwrap_or(4));
        Ok(Response::new(v1::LoadVersionResponse { model: Some(model) }))
    }

    async fn unload_version(
        &self,
        request: Request<v1::UnloadVersionRequest>,
    ) -> Result<Response<v1::UnloadVersionResponse>, Status> {
        let request = request.into_inner();
        let state = v1::ModelState::Draining as i32;
        let model = v1::ModelStatus { state, ..status(&request.name, request.version) };
        Ok(Response::new(v1::UnloadVersionResponse { model: Some(model) }))
    }

    async fn set_label(&self, request: Request<v1::SetLabelRequest>) -> Result<Response<v1::SetLabelResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(v1::SetLabelResponse { model: request.version.map(|v| status(&request.name, v)) }))
    }

    async fn set_traffic(
        &self,
        request: Request<v1::SetTrafficRequest>,
    ) -> Result<Response<v1::SetTrafficResponse>, Status> {
        let v1::SetTrafficRequest { name, shares } = request.into_inner();
        let status = |(version, share): (u64, v1::TrafficShare)| v1::ModelStatus {
            labels: vec![share.label],
            traffic_weight: share.weight,
            ..status(&name, version)
        };
        Ok(Response::new(v1::SetTrafficResponse { models: (1..).zip(shares).map(status).collect() }))
    }

    type WatchModelsStream = Out<v1::WatchModelsResponse>;

    async fn watch_models(
        &self,
        _: Request<v1::WatchModelsRequest>,
    ) -> Result<Response<Self::WatchModelsStream>, Status> {
        let changes = [2, 3].map(|version| Ok(v1::WatchModelsResponse { model: Some(status("pm", version)) }));
        Ok(Response::new(Box::pin(stream::iter(changes))))
    }
}

#[tonic::async_trait]
impl Tokens for Fake {
    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let token = |(start, byte): (usize, u8)| v1::Token {
            id: u32::from(byte),
            text: char::from(byte).into(),
            special: false,
            start: start as u32,
            stop: start as u32 + 1,
        };
        let tokenized = |text: &String| v1::Tokenized { tokens: text.bytes().enumerate().map(token).collect() };
        Ok(Response::new(v1::TokenizeResponse {
            model: Some(identity(request.model.as_ref())),
            tokenized: request.texts.iter().map(tokenized).collect(),
        }))
    }

    async fn render(&self, request: Request<v1::RenderRequest>) -> Result<Response<v1::RenderResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(v1::RenderResponse {
            model: Some(identity(request.model.as_ref())),
            text: words(request.input.as_ref().unwrap()),
            token_ids: vec![1, 2, 3],
            response_start: 1,
            response_end: 3,
            template_sha256: "feed".into(),
            truncated: false,
        }))
    }
}
