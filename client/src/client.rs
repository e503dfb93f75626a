//! The client: one method for each rpc, and the one loop that all calls go through.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{Stream, future};
use plumb_proto::v1;
use plumb_proto::v1::generation_client::GenerationClient;
use plumb_proto::v1::models_client::ModelsClient;
use plumb_proto::v1::preference_client::PreferenceClient;
use plumb_proto::v1::tokens_client::TokensClient;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::error::failure_of;
use crate::{Answers, CallError, ClientOptions, Error, RetryPolicy};

/// The services of the contract, by the names that [`Client::health`] knows.
pub const SERVICES: [&str; 4] = ["plumb.v1.Preference", "plumb.v1.Generation", "plumb.v1.Models", "plumb.v1.Tokens"];

/// A client of one or several equal servers. Clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
    call_timeout: Option<Duration>,
}

#[derive(Debug)]
struct Shared {
    // One connection for each endpoint, used in turn. Plain turns rather than tonic's balancer, which prefers the
    // endpoint with the fewest open calls: that is the dead one, because its calls fail at once.
    channels: Vec<Channel>,
    next: AtomicUsize,
    authorization: Option<MetadataValue<Ascii>>,
    client_id: Option<MetadataValue<Ascii>>,
    max_message_bytes: usize,
    retry: RetryPolicy,
}

impl Client {
    /// Connects to every endpoint and fails if none can be reached. Those that can not be reached now are tried again
    /// when their turn comes.
    pub async fn connect(options: ClientOptions) -> Result<Self, Error> {
        let endpoints = options.transport()?;
        let attempts = future::join_all(endpoints.iter().map(Endpoint::connect)).await;
        if let Some(Err(error)) = attempts.last()
            && attempts.iter().all(Result::is_err)
        {
            return Err(Error::Connect { endpoints: options.endpoints.join(", "), reason: root_cause(error) });
        }
        let channels =
            endpoints.iter().zip(attempts).map(|(e, attempt)| attempt.unwrap_or_else(|_| e.connect_lazy())).collect();
        Self::new(options, channels)
    }

    /// Connects at the first call; for programs that may start before their server. Needs a tokio runtime.
    pub fn connect_lazy(options: ClientOptions) -> Result<Self, Error> {
        let channels = options.transport()?.iter().map(Endpoint::connect_lazy).collect();
        Self::new(options, channels)
    }

    fn new(options: ClientOptions, channels: Vec<Channel>) -> Result<Self, Error> {
        let shared = Shared {
            channels,
            next: AtomicUsize::new(0),
            authorization: options.authorization()?,
            client_id: options.client_id()?,
            max_message_bytes: options.max_message_bytes,
            retry: options.retry,
        };
        Ok(Self { shared: Arc::new(shared), call_timeout: options.call_timeout })
    }

    /// The same client with another deadline for its calls; `None` waits for ever.
    pub fn with_call_timeout(&self, call_timeout: Option<Duration>) -> Self {
        Self { call_timeout, ..self.clone() }
    }

    /// Scores many items in one call. Answers exactly one result for every item, in their order.
    pub async fn score(&self, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Error> {
        let (asked, limit) = (request.items.len(), self.limit());
        let answer = self.call(true, request, move |c, r| async move { preference(c, limit).score(r).await }).await?;
        match answer.results.len() {
            n if n == asked => Ok(answer),
            n => Err(Error::Contract(format!("{n} results for {asked} items"))),
        }
    }

    /// Scores requests as they come; answers carry the `request_id` and may overtake one another. The stream has no
    /// deadline and is not retried: it lives as long as its owner wants.
    pub async fn score_stream(
        &self,
        requests: impl Stream<Item = v1::ScoreRequest> + Send + 'static,
    ) -> Result<Answers<v1::ScoreResponse>, Error> {
        let request = self.request(requests, None);
        let mut stub = preference(self.channel(self.turn()), self.limit());
        let answer = stub.score_stream(request).await.map_err(|status| Box::new(CallError::new(&status, 1)))?;
        Ok(Answers::new(answer.into_inner(), None))
    }

    /// Orders candidate responses to one prompt, best first. Answers exactly one entry for every candidate.
    pub async fn rank(&self, request: v1::RankRequest) -> Result<v1::RankResponse, Error> {
        let (asked, limit) = (request.candidates.len(), self.limit());
        let answer = self.call(true, request, move |c, r| async move { preference(c, limit).rank(r).await }).await?;
        let mut seen = vec![false; asked];
        for ranked in &answer.ranked {
            match seen.get_mut(ranked.index as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::Contract(format!("candidate {} unknown or named twice", ranked.index))),
            }
        }
        if seen.contains(&false) {
            return Err(Error::Contract(format!("{} candidates ranked of {asked}", answer.ranked.len())));
        }
        Ok(answer)
    }

    /// Samples text. Retried until the stream opens, not after its first piece; the deadline holds to its end.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Answers<v1::GenerateResponse>, Error> {
        let limit = self.limit();
        self.stream(self.deadline(), request, move |c, r| async move {
            GenerationClient::new(c).max_decoding_message_size(limit).max_encoding_message_size(limit).generate(r).await
        })
        .await
    }

    /// Token ids of texts.
    pub async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, Error> {
        let limit = self.limit();
        self.call(true, request, move |c, r| async move { tokens(c, limit).tokenize(r).await }).await
    }

    /// The exact text and tokens that a model would be fed.
    pub async fn render(&self, request: v1::RenderRequest) -> Result<v1::RenderResponse, Error> {
        let limit = self.limit();
        self.call(true, request, move |c, r| async move { tokens(c, limit).render(r).await }).await
    }

    /// All versions of all models.
    pub async fn list_models(&self) -> Result<Vec<v1::ModelStatus>, Error> {
        let request = v1::ListModelsRequest {};
        Ok(self.call(true, request, |c, r| async move { models(c).list_models(r).await }).await?.models)
    }

    /// One version; an empty spec means the default model.
    pub async fn get_model(&self, model: v1::ModelSpec) -> Result<v1::ModelStatus, Error> {
        let request = v1::GetModelRequest { model: Some(model) };
        let answer = self.call(true, request, |c, r| async move { models(c).get_model(r).await }).await?;
        answer.model.ok_or_else(|| Error::Contract("no model in the answer".into()))
    }

    /// Loads a version and answers once it is available. Not retried, because a second try would find the first.
    pub async fn load_version(&self, request: v1::LoadVersionRequest) -> Result<v1::ModelStatus, Error> {
        let answer = self.call(false, request, |c, r| async move { models(c).load_version(r).await }).await?;
        answer.model.ok_or_else(|| Error::Contract("no model in the answer".into()))
    }

    /// Takes a version out of service. Not retried.
    pub async fn unload_version(&self, name: impl Into<String>, version: u64) -> Result<v1::ModelStatus, Error> {
        let request = v1::UnloadVersionRequest { name: name.into(), version };
        let answer = self.call(false, request, |c, r| async move { models(c).unload_version(r).await }).await?;
        answer.model.ok_or_else(|| Error::Contract("no model in the answer".into()))
    }

    /// Points a label at a version, or removes it with `None`. Answers where it points now.
    pub async fn set_label(
        &self,
        name: impl Into<String>,
        label: impl Into<String>,
        version: Option<u64>,
    ) -> Result<Option<v1::ModelStatus>, Error> {
        let request = v1::SetLabelRequest { name: name.into(), label: label.into(), version };
        Ok(self.call(true, request, |c, r| async move { models(c).set_label(r).await }).await?.model)
    }

    /// Splits the calls of a model that name neither version nor label between labels, by weight; no shares end the split.
    pub async fn set_traffic(
        &self,
        name: impl Into<String>,
        shares: Vec<v1::TrafficShare>,
    ) -> Result<Vec<v1::ModelStatus>, Error> {
        let request = v1::SetTrafficRequest { name: name.into(), shares };
        Ok(self.call(true, request, |c, r| async move { models(c).set_traffic(r).await }).await?.models)
    }

    /// Streams the present state of every version of a model (empty: of all), then every change, without a deadline.
    pub async fn watch_models(&self, name: impl Into<String>) -> Result<Answers<v1::WatchModelsResponse>, Error> {
        let request = v1::WatchModelsRequest { name: name.into() };
        self.stream(None, request, |c, r| async move { models(c).watch_models(r).await }).await
    }

    /// The health of a service (one of [`SERVICES`], or empty for the whole server). Not retried: not being available
    /// is an answer.
    pub async fn health(&self, service: impl Into<String>) -> Result<ServingStatus, Error> {
        let request = HealthCheckRequest { service: service.into() };
        Ok(self.call(false, request, |c, r| async move { HealthClient::new(c).check(r).await }).await?.status())
    }

    fn limit(&self) -> usize {
        self.shared.max_message_bytes
    }

    fn deadline(&self) -> Option<Instant> {
        self.call_timeout.map(|timeout| Instant::now() + timeout)
    }

    /// Where a call begins: the next endpoint.
    fn turn(&self) -> usize {
        self.shared.next.fetch_add(1, Ordering::Relaxed)
    }

    fn channel(&self, turn: usize) -> Channel {
        self.shared.channels[turn % self.shared.channels.len()].clone()
    }

    fn request<Q>(&self, message: Q, deadline: Option<Instant>) -> Request<Q> {
        let mut request = Request::new(message);
        for (name, value) in [("authorization", &self.shared.authorization), ("x-client-id", &self.shared.client_id)] {
            if let Some(value) = value {
                request.metadata_mut().insert(name, value.clone());
            }
        }
        if let Some(deadline) = deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        request
    }

    async fn call<Q: Clone, A, F: Future<Output = Result<Response<A>, Status>>>(
        &self,
        may_repeat: bool,
        message: Q,
        rpc: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Error> {
        self.attempts(may_repeat, self.deadline(), message, rpc).await
    }

    async fn stream<Q: Clone, A, F: Future<Output = Result<Response<Streaming<A>>, Status>>>(
        &self,
        deadline: Option<Instant>,
        message: Q,
        rpc: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<Answers<A>, Error> {
        let answers = self.attempts(true, deadline, message, rpc).await?;
        Ok(Answers::new(answers, deadline))
    }

    /// Every call goes through here: deadline, tries, pauses.
    async fn attempts<Q: Clone, A, F: Future<Output = Result<Response<A>, Status>>>(
        &self,
        may_repeat: bool,
        deadline: Option<Instant>,
        message: Q,
        rpc: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Error> {
        let (mut tries, mut counted) = (0_u32, 0);
        let first = self.turn();
        loop {
            // The endpoint after the one that failed, whatever turns other calls have taken meanwhile.
            let channel = self.channel(first.wrapping_add(tries as usize));
            let answer = rpc(channel, self.request(message.clone(), deadline));
            let status = match within(deadline, answer).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let remaining = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let (policy, failure) = (&self.shared.retry, failure_of(&status));
            tries += 1;
            counted += u32::from(policy.counts(failure));
            match policy.delay(counted, failure, remaining, rand::random()) {
                Some(delay) if may_repeat => sleep(delay).await,
                _ => return Err(Box::new(CallError::new(&status, tries)).into()),
            }
        }
    }
}

async fn within<T>(deadline: Option<Instant>, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let Some(deadline) = deadline else { return answer.await };
    let late = |_| Status::deadline_exceeded("no answer in time");
    timeout_at(deadline, answer).await.map_err(late)?
}

fn preference(channel: Channel, limit: usize) -> PreferenceClient<Channel> {
    PreferenceClient::new(channel).max_decoding_message_size(limit).max_encoding_message_size(limit)
}

fn tokens(channel: Channel, limit: usize) -> TokensClient<Channel> {
    TokensClient::new(channel).max_decoding_message_size(limit).max_encoding_message_size(limit)
}

fn models(channel: Channel) -> ModelsClient<Channel> {
    ModelsClient::new(channel)
}

/// The innermost reason: tonic's own words are only "transport error".
fn root_cause(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
