//! `plumb.v1.Preference`: Score, ScoreStream and Rank.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use futures::{Stream, StreamExt as _, stream};
use plumb_proto::v1;
use plumb_proto::v1::preference_server::Preference;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::input::{self, Objective};
use super::scoring::{ScoreCall, Scored};
use super::{Call, Context, Patience, limits, rank, split_hash};
use crate::error::{Error, Result};
use crate::layers::inflow::{Received, Room};
use crate::layers::trace::record_request_id;
use crate::record::Origin;
use crate::registry::Need;

/// The service.
pub(crate) struct PreferenceService {
    context: Arc<Context>,
}

impl PreferenceService {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl Preference for PreferenceService {
    type ScoreStreamStream = Pin<Box<dyn Stream<Item = Result<v1::ScoreResponse, Status>> + Send>>;

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let (call, origin) = (Call::of(&request), Origin::of(&request, "Score"));
        Ok(Response::new(score(&self.context, request.into_inner(), call, origin).await?))
    }

    async fn score_stream(
        &self,
        request: Request<Streaming<v1::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let (call, origin) = (Call::of(&request), Origin::of(&request, "ScoreStream"));
        let received = request.extensions().get::<Received>().cloned().unwrap_or_default();
        let in_flight = self.context.limits.max_stream_in_flight;
        let context = Arc::clone(&self.context);
        let (draining, aborted) = (self.context.draining.clone(), self.context.aborted.clone());
        let mut abort = aborted.clone();
        let finished = Arc::new(AtomicBool::new(false));
        // A request is read when an earlier one is answered: a client that sends faster than the server works is held
        // up by flow control, and so is one that does not read its answers.
        // Each is answered by a task of its own: while a client does not read, nobody polls its stream, and what was let
        // in has to be done and gone all the same.
        let answers = said_all(request.into_inner(), Arc::clone(&finished))
            .take_until(draining.clone().cancelled_owned())
            .map(move |message| {
                let room = received.next();
                let answer = answer(Arc::clone(&context), message, call.clone(), origin.clone(), room);
                let task = AbortOnDropHandle::new(tokio::spawn(answer.in_current_span()));
                async move { task.await.unwrap_or_else(|_| Err(Error::internal("an answer was given up").into())) }
            })
            .buffer_unordered(in_flight)
            .take_until(async move { abort.cause().await });
        // A client that still had something to say learns that it was not heard.
        let unheard = async move {
            let cut_short = draining.is_cancelled() && !finished.load(Ordering::Relaxed);
            let cause = aborted.known().or_else(|| cut_short.then_some(Error::Draining));
            cause.map(|cause| Err(cause.into()))
        };
        let end = stream::once(unheard);
        Ok(Response::new(Box::pin(answers.chain(end.filter_map(std::future::ready)))))
    }

    async fn rank(&self, request: Request<v1::RankRequest>) -> Result<Response<v1::RankResponse>, Status> {
        let (call, origin) = (Call::of(&request), Origin::of(&request, "Rank"));
        let request = request.into_inner();
        record_request_id(&request.request_id);
        let answer = rank_candidates(&self.context, &request, call).await;
        self.context.recorder.rank(origin, request, &answer);
        Ok(Response::new(answer?))
    }
}

/// A stream, and whether it has come to its end.
fn said_all<T>(stream: Streaming<T>, finished: Arc<AtomicBool>) -> impl Stream<Item = Result<T, Status>> {
    stream.chain(stream::poll_fn(move |_| {
        finished.store(true, Ordering::Relaxed);
        Poll::Ready(None)
    }))
}

/// One request of a stream; what is wrong with it does not end the stream. `_room` is held until it is answered.
async fn answer(
    context: Arc<Context>,
    message: Result<v1::ScoreRequest, Status>,
    stream: Call,
    origin: Origin,
    _room: Option<Room>,
) -> Result<v1::ScoreResponse, Status> {
    let request = message?;
    let call = Call { arrived: std::time::Instant::now(), patience: Patience::ENDLESS, ..stream };
    let request_id = request.request_id.clone();
    let response = score(&context, request, call, origin).await;
    Ok(response.unwrap_or_else(|error| v1::ScoreResponse {
        request_id,
        error: Some(v1::ItemError::from(&error)),
        ..v1::ScoreResponse::default()
    }))
}

async fn score(context: &Context, request: v1::ScoreRequest, call: Call, origin: Origin) -> Result<v1::ScoreResponse> {
    record_request_id(&request.request_id);
    let answer = score_items(context, &request, call).await;
    context.recorder.score(origin, request, &answer);
    answer
}

async fn score_items(context: &Context, request: &v1::ScoreRequest, call: Call) -> Result<v1::ScoreResponse> {
    let v1::ScoreRequest { model, items, text, objective, per_token, request_id, priority } = request;
    limits::request_id(request_id)?;
    limits::spec("model", model.as_ref())?;
    context.check_count("items", items.len())?;
    let model = context.registry.resolve(model.as_ref(), Need::Any, || split_hash(request_id, request))?;
    let work = ScoreCall {
        text: input::render_options(text.as_ref(), model.info.max_input_tokens, context.limits.auto_truncate)?,
        objective: Objective::parse(*objective)?,
        priority: input::priority(*priority)?,
        model,
        inputs: items.iter().map(input::text_input).collect(),
        field: "items",
        per_token: *per_token,
        call,
        permit: None,
    };
    let identity = work.model.identity();
    let Scored { results, timings } = context.score(work).await?;
    let results = results.into_iter().map(|result| v1::ScoreResult {
        outcome: Some(match result {
            Ok(score) => v1::score_result::Outcome::Score(score),
            Err(error) => v1::score_result::Outcome::Error(v1::ItemError::from(&error)),
        }),
    });
    Ok(v1::ScoreResponse {
        model: Some(identity),
        results: results.collect(),
        timings: Some(timings),
        request_id: request_id.clone(),
        error: None,
    })
}

async fn rank_candidates(context: &Context, request: &v1::RankRequest, call: Call) -> Result<v1::RankResponse> {
    let v1::RankRequest { model, prompt, candidates, text, objective, request_id, priority } = request;
    limits::request_id(request_id)?;
    limits::spec("model", model.as_ref())?;
    context.check_count("candidates", candidates.len())?;
    let prompt =
        input::text_input(prompt.as_ref().unwrap_or(&v1::Input::default())).map_err(|error| error.within("prompt"))?;
    limits::candidates(&prompt, candidates, context.limits.max_message_bytes)?;
    let prompt = Arc::new(prompt);
    let model = context.registry.resolve(model.as_ref(), Need::Any, || split_hash(request_id, request))?;
    let work = ScoreCall {
        text: input::render_options(text.as_ref(), model.info.max_input_tokens, context.limits.auto_truncate)?,
        objective: Objective::parse(*objective)?,
        priority: input::priority(*priority)?,
        model,
        // Every candidate is rendered as a whole, as Score would: equal tokens give equal bits, and the engine finds
        // what they share.
        inputs: candidates.iter().map(|candidate| input::candidate_input(&prompt, candidate)).collect(),
        field: "candidates",
        per_token: false,
        call,
        permit: None,
    };
    let identity = work.model.identity();
    let Scored { results, timings } = context.score(work).await?;
    Ok(v1::RankResponse {
        model: Some(identity),
        ranked: rank::order(results),
        timings: Some(timings),
        request_id: request_id.clone(),
    })
}
