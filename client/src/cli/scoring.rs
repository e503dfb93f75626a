//! Many items through `Score`: packed into calls, a few calls in flight, answers in the order of the items.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use plumb_client::{Client, Code, Error, FieldViolation, ItemFailure, score, v1};
use serde_json::json;
use tokio::sync::Semaphore;

use super::args::{FlowArgs, HhhPrompt, ModelArgs, Objective, Priority, TextArgs};

/// How items are scored.
#[derive(Args, Clone)]
pub(crate) struct ScoringArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) text: TextArgs,
    #[command(flatten)]
    pub(crate) flow: FlowArgs,
}

impl ScoringArgs {
    /// A scorer for one objective and prompt.
    pub(crate) fn scorer(
        &self,
        client: &Client,
        objective: Objective,
        hhh_prompt: HhhPrompt,
        per_token: bool,
        priority: Priority,
    ) -> Scorer {
        let template = v1::ScoreRequest {
            model: Some(self.model.spec()),
            text: Some(self.text.options(hhh_prompt)),
            objective: objective.wire() as i32,
            per_token,
            priority: self.flow.priority(priority),
            ..Default::default()
        };
        let (batch_size, concurrency) = (self.flow.batch_size as usize, self.flow.concurrency as usize);
        let in_flight = Arc::new(Semaphore::new(concurrency));
        Scorer { client: client.clone(), template, batch_size, concurrency, in_flight, is_strict: false }
    }
}

/// Scores items in bounded memory: of a stream, at most `concurrency` calls of `batch_size` items are held.
#[derive(Clone)]
pub(crate) struct Scorer {
    client: Client,
    template: v1::ScoreRequest,
    batch_size: usize,
    concurrency: usize,
    /// Room for as many calls in all streams together.
    in_flight: Arc<Semaphore>,
    is_strict: bool,
}

/// The answer to a call: every item's tag and outcome, in order.
pub(crate) struct Batch<T> {
    pub(crate) model: Option<v1::ModelIdentity>,
    pub(crate) items: Vec<(T, Outcome)>,
}

/// `None` for what came without an input.
pub(crate) type Outcome = Option<Result<v1::Score, ItemFailure>>;

/// A slow source is not kept waiting longer than this for its batch to fill.
const PATIENCE: Duration = Duration::from_millis(100);

impl Scorer {
    /// The very version that would answer now.
    pub(crate) async fn model(&self) -> Result<v1::ModelIdentity, Error> {
        let texts = vec!["?".to_owned()];
        let request = v1::TokenizeRequest { model: self.template.model.clone(), texts, ..Default::default() };
        Ok(self.client.tokenize(request).await?.model.unwrap_or_default())
    }

    /// Asks from now on for this version.
    pub(crate) fn pin(&mut self, model: &v1::ModelIdentity) {
        let choice = Some(v1::model_spec::Choice::Version(model.version));
        self.template.model = Some(v1::ModelSpec { name: model.name.clone(), choice });
    }

    /// A failure that may pass is from now on an error too, rather than the outcome of the call's items.
    pub(crate) fn strict(self) -> Self {
        Self { is_strict: true, ..self }
    }

    /// What scores depend on, the model aside, as JSON.
    pub(crate) fn options(&self) -> serde_json::Result<serde_json::Value> {
        let text = serde_json::to_value(self.template.text)?;
        Ok(json!({"text": text, "objective": self.template.objective().as_str_name()}))
    }

    /// Scores what has an input and passes on what has none, in order. An error ends everything: it would meet the
    /// next call too.
    pub(crate) fn run<T>(
        &self,
        work: impl Stream<Item = (T, Option<v1::Input>)>,
    ) -> impl Stream<Item = Result<Batch<T>, Error>> {
        tokio_stream::StreamExt::chunks_timeout(work, self.batch_size, PATIENCE)
            .map(|batch| self.clone().call(batch))
            .buffered(self.concurrency)
            .map_ok(|parts| stream::iter(parts).map(Ok::<_, Error>))
            .try_flatten()
    }

    /// A call that is refused for what is in it is asked again in halves, down to the items that are the reason.
    async fn call<T>(self, batch: Vec<(T, Option<v1::Input>)>) -> Result<Vec<Batch<T>>, Error> {
        let mut answered = Vec::new();
        let mut due = vec![batch];
        while let Some(mut part) = due.pop() {
            let items: Vec<_> = part.iter().filter_map(|(_, input)| input.clone()).collect();
            let n = items.len();
            let (model, results) = if n == 0 {
                (None, Vec::new())
            } else {
                let _room = self.in_flight.acquire().await;
                match self.client.score(v1::ScoreRequest { items, ..self.template.clone() }).await {
                    Ok(answer) => (answer.model, answer.results.iter().map(|result| score(result).cloned()).collect()),
                    Err(error) if n > 1 && is_by_content(&error) => {
                        let second = part.split_off(part.len() / 2);
                        due.extend([second, part]);
                        continue;
                    }
                    Err(error) if is_by_content(&error) || !self.is_strict && is_passing(error.code()) => {
                        (None, vec![Err((&error).into()); n])
                    }
                    Err(error) => return Err(error),
                }
            };
            let mut results = results.into_iter();
            let outcome = |(tag, input): (T, Option<_>)| (tag, input.and_then(|_| results.next()));
            answered.push(Batch { model, items: part.into_iter().map(outcome).collect() });
        }
        Ok(answered)
    }
}

/// Whether a call may have failed by its items, or by their number, so that some of them alone may be answered. What
/// fails all items alike is the call's own failure, a fault in computing them too.
fn is_by_content(error: &Error) -> bool {
    let Error::Call(call) = error else { return false };
    match call.code {
        Code::InvalidArgument => call.field_violations.iter().all(concerns_items),
        // A message of too many bytes, to the server or to what is before it.
        Code::OutOfRange => true,
        Code::ResourceExhausted => call.retry_after.is_none(),
        Code::Internal => true,
        _ => false,
    }
}

/// An item, their number, or the request as a whole.
fn concerns_items(violation: &FieldViolation) -> bool {
    matches!(violation.field.split('[').next(), Some("" | "items"))
}

/// Whether a call's failure says nothing about the next call.
pub(crate) fn is_passing(code: Code) -> bool {
    matches!(code, Code::ResourceExhausted | Code::DeadlineExceeded | Code::Internal | Code::OutOfRange)
}
