//! Many items through `Score`: packed into calls, a few calls in flight, answers in the order of the items.

use std::time::Duration;

use clap::Args;
use futures::{Stream, StreamExt};
use plumb_client::{Client, Code, Error, ItemFailure, score, v1};
use serde_json::json;

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
        Scorer { client: client.clone(), template, batch_size, concurrency }
    }
}

/// Scores items in bounded memory: at most `concurrency` calls of `batch_size` items are held.
#[derive(Clone)]
pub(crate) struct Scorer {
    client: Client,
    template: v1::ScoreRequest,
    batch_size: usize,
    concurrency: usize,
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
    /// Asks from now on for the very version that would answer now.
    pub(crate) async fn pin(&mut self) -> Result<v1::ModelIdentity, Error> {
        let texts = vec!["?".to_owned()];
        let request = v1::TokenizeRequest { model: self.template.model.clone(), texts, ..Default::default() };
        let model = self.client.tokenize(request).await?.model.unwrap_or_default();
        let choice = Some(v1::model_spec::Choice::Version(model.version));
        self.template.model = Some(v1::ModelSpec { name: model.name.clone(), choice });
        Ok(model)
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
    }

    async fn call<T>(self, batch: Vec<(T, Option<v1::Input>)>) -> Result<Batch<T>, Error> {
        let (tags, inputs): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let present: Vec<bool> = inputs.iter().map(Option::is_some).collect();
        let items: Vec<_> = inputs.into_iter().flatten().collect();
        let n = items.len();
        let (model, results) = if n == 0 {
            (None, Vec::new())
        } else {
            match self.client.score(v1::ScoreRequest { items, ..self.template }).await {
                Ok(answer) => (answer.model, answer.results.iter().map(|result| score(result).cloned()).collect()),
                Err(error) if is_passing(error.code()) => (None, vec![Err((&error).into()); n]),
                Err(error) => return Err(error),
            }
        };
        let mut results = results.into_iter();
        let outcome = |present: bool| if present { results.next() } else { None };
        Ok(Batch { model, items: tags.into_iter().zip(present.into_iter().map(outcome)).collect() })
    }
}

/// Whether a call's failure says nothing about the next call.
pub(crate) fn is_passing(code: Code) -> bool {
    matches!(code, Code::ResourceExhausted | Code::DeadlineExceeded | Code::Internal | Code::OutOfRange)
}
