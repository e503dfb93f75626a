//! The server over plain HTTP, for programs that speak the protocols of others: OpenRLHF, vLLM, SGLang and Cohere.
//!
//! A protocol is a pure function from a [`Body`] to an [`Ask`] and to what makes an answer of the scores. What lies
//! between is the same as over gRPC: [`edge`] turns headers into those of gRPC and its statuses into JSON, inside of it
//! are the layers of every call, and the work is done by the services.

mod ask;
mod body;
mod edge;
mod embeddings;
mod json;
mod models;
mod openrlhf;
mod rerank;
pub(crate) mod serve;
mod vllm;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::from_fn;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, StatusCode, header};
use plumb_proto::v1;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::Status;

use self::ask::{Ask, Scored};
use self::json::{Body, Encoding};
use crate::error::{Error, Result};
use crate::layers::caller::Caller;
use crate::layers::inflow::{Inflow, SMALL};
use crate::services::{Context, ModelsService, PreferenceService};

/// What is asked, and what makes an answer of it.
type Protocol = fn(Body) -> Result<(Ask, Answer)>;
type Answer = Box<dyn FnOnce(&Scored) -> Value + Send>;

/// Where scores are asked for, and how.
const SCORES: [(&str, Protocol); 9] = [
    ("/get_reward", openrlhf::get_reward),
    ("/score", vllm::score),
    ("/v1/score", vllm::score),
    ("/classify", vllm::classify),
    ("/pooling", vllm::pooling),
    ("/rerank", rerank::rerank),
    ("/v1/rerank", rerank::rerank),
    ("/v2/rerank", rerank::cohere),
    ("/v1/embeddings", embeddings::embeddings),
];
/// Where models are listed.
const MODELS: &str = "/v1/models";

/// How long a call waits for room before it is refused, for its body and again for its work: frameworks try again a few
/// times within seconds and then go on without a reward, but are patient with an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the routes work with.
pub(crate) struct Gateway {
    context: Arc<Context>,
    preference: PreferenceService,
    models: ModelsService,
    inflow: Arc<Inflow>,
    ready: watch::Receiver<bool>,
}

impl Gateway {
    /// `ready` is whether the server as a whole serves.
    pub(crate) fn new(context: &Arc<Context>, inflow: Arc<Inflow>, ready: watch::Receiver<bool>) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            preference: PreferenceService::new(Arc::clone(context)),
            models: ModelsService::new(Arc::clone(context)),
            inflow,
            ready,
        })
    }

    /// All routes. `around` puts the layers of every call around those that are calls.
    pub(crate) fn routes(self: Arc<Self>, around: impl FnOnce(Router) -> Router) -> Router {
        let calls = SCORES.into_iter().fold(Router::new().route(MODELS, get(listed)), |router, (path, protocol)| {
            router.route(
                path,
                post(move |State(gateway): State<Arc<Self>>, request| answered(gateway, protocol, request)),
            )
        });
        // A check of health is no call, and neither is what is not there.
        around(calls.with_state(Arc::clone(&self)))
            .route("/health", get(move || std::future::ready(self.health())))
            .fallback(async || StatusCode::NOT_FOUND)
            .layer(from_fn(edge::edge))
    }

    fn health(&self) -> Response {
        let (code, status) = match *self.ready.borrow() {
            true => (StatusCode::OK, "SERVING"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "NOT_SERVING"),
        };
        let body = json!({ "status": status }).to_string();
        (code, [(header::CONTENT_TYPE, edge::JSON)], body).into_response()
    }

    async fn answer(&self, protocol: Protocol, request: Request) -> Result<Response, Status> {
        let (parts, body) = request.into_parts();
        body::check_type(&parts.headers)?;
        let caller = Caller::of(&parts.extensions);
        // The room is held until the work is done.
        let longest = self.context.limits.max_message_bytes;
        let (bytes, _room) = body::read(&self.inflow, longest, &caller, body, PATIENCE).await?;
        let large = bytes.len() > SMALL as usize;
        let read = move || Body::read(&bytes).and_then(protocol);
        let (ask, answer) = if large { self.context.pool.run(read).await?? } else { read()? };
        let scored = ask.run(&self.preference, &parts.extensions, self.context.limits.max_client_batch_size).await?;
        let model = scored.model.clone();
        let write = move || answer(&scored).to_string();
        let text = if large { self.context.pool.run(write).await? } else { write() };
        Ok(said(text, Some(&model)))
    }

    async fn list(&self) -> Result<Response, Status> {
        use v1::models_server::Models as _;
        let listed = self.models.list_models(tonic::Request::new(v1::ListModelsRequest {})).await?;
        Ok(said(models::list(&listed.into_inner().models, now()).to_string(), None))
    }
}

async fn answered(gateway: Arc<Gateway>, protocol: Protocol, request: Request) -> Response {
    gateway.answer(protocol, request).await.unwrap_or_else(Status::into_http)
}

async fn listed(State(gateway): State<Arc<Gateway>>) -> Response {
    gateway.list().await.unwrap_or_else(Status::into_http)
}

/// An answer, with a status as the layers read it and the model that gave it.
fn said(text: String, model: Option<&v1::ModelIdentity>) -> Response {
    let mut response = ([(header::CONTENT_TYPE, edge::JSON)], text).into_response();
    let headers = response.headers_mut();
    headers.insert(edge::GRPC_STATUS, HeaderValue::from_static("0"));
    if let Some(v1::ModelIdentity { name, version, weights_digest }) = model {
        for (header, value) in
            [("x-plumb-model", format!("{name}@{version}")), ("x-plumb-weights-digest", weights_digest.clone())]
        {
            // A model's name is made of characters that may stand here.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(header, value);
            }
        }
    }
    response
}

/// Neither JSON nor what a protocol takes.
fn malformed(error: &serde_json::Error) -> Error {
    Error::invalid("", format!("the body is not what is expected here: {error}"))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The reward as the double that equals it, so that whoever reads doubles has its exact value.
fn reward(score: &v1::Score) -> f64 {
    f64::from(score.reward)
}

/// The reward, or its sigmoid.
fn number(score: &v1::Score, squashed: bool) -> f64 {
    let reward = reward(score);
    if squashed { 1.0 / (1.0 + (-reward).exp()) } else { reward }
}

/// A vector of one number.
fn vector(number: f64, encoding: Encoding) -> Value {
    match encoding {
        Encoding::Float => json!([number]),
        // What OpenAI's client asks for: f32, little-endian.
        Encoding::Base64 => json!(STANDARD.encode((number as f32).to_le_bytes())),
    }
}

/// Tokens of a request.
fn usage(scored: &Scored) -> Value {
    let tokens: u64 = scored.scores.iter().map(|score| u64::from(score.input_tokens)).sum();
    json!({ "prompt_tokens": tokens, "total_tokens": tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::rpc::{Class, HTTP};

    /// What is not in both is answered 404, or asks everybody for an admin's key.
    #[test]
    fn every_route_has_a_name_and_a_class() {
        let mut answered: Vec<_> = SCORES.iter().map(|(path, _)| (*path, Class::Score)).collect();
        answered.push((MODELS, Class::Read));
        let mut known: Vec<_> = HTTP.iter().map(|(path, rpc)| (*path, rpc.class)).collect();
        answered.sort_by_key(|(path, _)| *path);
        known.sort_by_key(|(path, _)| *path);
        assert_eq!(answered, known);
    }

    /// What a body asks for, and what is answered for so many rewards.
    pub(super) fn asked(protocol: Protocol, body: Value) -> (Ask, impl FnOnce(&[f32]) -> Value) {
        let (ask, answer) = Body::read(body.to_string().as_bytes()).and_then(protocol).unwrap();
        let answer = move |rewards: &[f32]| {
            let score = |&reward| v1::Score { reward, input_tokens: 10, ..Default::default() };
            let model = v1::ModelIdentity { name: "pm".into(), version: 3, ..Default::default() };
            answer(&Scored { model, scores: rewards.iter().map(score).collect(), id: "id".into(), created: 7 })
        };
        (ask, answer)
    }

    #[track_caller]
    pub(super) fn refused(protocol: Protocol, body: Value, words: &str) {
        let error = Body::read(body.to_string().as_bytes()).and_then(protocol).map(|(ask, _)| ask).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(words), "{body}: {error}");
    }
}
