//! Scores inputs: admit, render on the CPU pool, queue all sequences together, put the answers together.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plumb_model::loaded::ModelKind;
use plumb_model::text::{RenderMode, RenderOptions, Rendered, TextInput};
use plumb_proto::v1;
use rayon::prelude::*;

use super::input::{Objective, pinned_prefix};
use super::work::{self, Size, Tokens};
use super::{Call, Context};
use crate::admission::{Permit, Work};
use crate::engine::{JobMeta, Priority, Sequence, SequenceOutput, Want};
use crate::error::{Error, Result};
use crate::registry::Served;
use crate::telemetry::events::{Computed, InputAccepted, ItemFailed, Rewarded, Tokenized};

/// What is to be scored, and how.
pub(super) struct ScoreCall {
    pub(super) model: Arc<Served>,
    /// An input that could not be read is an item that fails.
    pub(super) inputs: Vec<Result<TextInput>>,
    /// Name of the list in the request, for messages.
    pub(super) field: &'static str,
    pub(super) text: RenderOptions,
    pub(super) objective: Objective,
    pub(super) per_token: bool,
    pub(super) priority: Priority,
    pub(super) call: Call,
    /// Room that was got before, for what is a part of a larger call.
    pub(super) permit: Option<Permit>,
}

/// An answer for every input, in their order.
pub(super) struct Scored {
    pub(super) results: Vec<Result<v1::Score>>,
    pub(super) timings: v1::Timings,
}

/// An input as one or two sequences.
struct Prepared {
    sequence: Part,
    /// The response alone, for mutual information.
    unconditional: Option<Part>,
    truncated: bool,
}

/// A sequence that is not yet in the queue.
struct Part {
    tokens: Vec<u32>,
    want: Want,
    /// Tokens that the values belong to.
    values: Range<usize>,
    pinned_prefix: usize,
}

impl Part {
    fn tokens(&self) -> Tokens<'_> {
        // The HHH prompt is computed once per model, not once per request.
        Tokens::of(&self.tokens, self.pinned_prefix, &self.want)
    }
}

/// What the engine answered for an input.
struct Outputs {
    sequence: SequenceOutput,
    unconditional: Option<SequenceOutput>,
}

impl Context {
    /// Scores every input by itself: one that fails does not fail its neighbours. If all fail with the same code, that
    /// is the call's error, so that whoever sends a single item gets a plain status.
    pub(super) async fn score(&self, call: ScoreCall) -> Result<Scored> {
        let ScoreCall { model, inputs, field, text, objective, per_token, priority, call, permit } = call;
        // What is too much work in all is the list's fault, so that its sender may halve it, or that of its only item.
        let all = if inputs.len() == 1 { format!("{field}[0]") } else { field.to_owned() };
        let permit = match permit {
            Some(permit) => permit,
            None => {
                let (tokens, certain) = self.estimate(&model, &inputs, objective);
                let admitted = self.admit(&call, priority, Work::prompt(tokens), certain).await;
                admitted.map_err(|error| error.within(&all))?
            }
        };
        let sizes: Vec<Size> = inputs.iter().map(|input| input.as_ref().map_or(Size::default(), Size::of)).collect();
        let began = Instant::now();
        let (served, hhh_prompt) = (Arc::clone(&model), text.hhh_prompt);
        let prepared: Vec<Result<Prepared>> = self
            .pool
            .run(move || {
                let prepare = |input: Result<TextInput>| prepare(&served, &input?, &text, objective, per_token);
                inputs.into_par_iter().map(prepare).collect()
            })
            .await?;
        let tokenize = began.elapsed();
        Tokenized { model: model.name(), duration: tokenize }.emit();
        self.learn(&model, &sizes, &prepared);

        let outputs = self.run_all(&model, &prepared, priority, call.deadline, permit).await;
        let mut outputs = outputs.map_err(|error| error.within(&all))?.into_iter();
        let mut clock = Clock::default();
        let mut results = Vec::with_capacity(prepared.len());
        for (i, prepared) in prepared.into_iter().enumerate() {
            let result = match prepared {
                Ok(prepared) => {
                    InputAccepted {
                        model: model.name(),
                        tokens: prepared.sequence.tokens.len(),
                        truncated: prepared.truncated,
                    }
                    .emit();
                    model.record_input(prepared.sequence.tokens.len(), hhh_prompt);
                    let outputs = outputs.next().unwrap_or_else(|| Err(Error::internal("an answer is missing")));
                    outputs
                        .inspect(|outputs| clock.add(outputs))
                        .and_then(|outputs| assemble(&model, prepared, outputs, objective, per_token))
                }
                Err(error) => Err(error),
            };
            let result = result.map_err(|error| error.within(&format!("{field}[{i}]")));
            model.observe(&result);
            match &result {
                Err(error) => ItemFailed { model: model.name(), version: model.version(), error }.emit(),
                Ok(score) if model.info.kind == ModelKind::Preference => {
                    Rewarded { model: model.name(), version: model.version(), reward: score.reward }.emit();
                }
                Ok(_) => {}
            }
            results.push(result);
        }
        if let Some(error) = common_failure(&results) {
            return Err(error);
        }
        let (queued, inference) = clock.read();
        Computed { model: model.name(), queued, inference }.emit();
        let timings = timings(call.arrived, tokenize, queued, inference);
        Ok(Scored { results, timings })
    }

    /// Tokens that a call's inputs are likely to be, and how many of those are certain.
    fn estimate(&self, model: &Served, inputs: &[Result<TextInput>], objective: Objective) -> (usize, usize) {
        let (tokens, certain) = work::estimate(inputs, &self.estimator, model.name(), model.info.max_input_tokens);
        // The response alone is no longer than the whole.
        let twice = model.info.kind == ModelKind::Language && objective == Objective::MutualInformation;
        (if twice { 2 * tokens } else { tokens }, certain)
    }

    /// Takes in what texts have become. One that was cut says nothing.
    fn learn(&self, model: &Served, sizes: &[Size], prepared: &[Result<Prepared>]) {
        let whole = sizes.iter().zip(prepared).filter_map(|(size, prepared)| {
            let sequence = &prepared.as_ref().ok().filter(|prepared| !prepared.truncated)?.sequence;
            (size.bytes > 0).then_some((size.bytes, sequence.tokens.len() - sequence.pinned_prefix))
        });
        let (bytes, tokens) = whole.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.estimator.learn(model.name(), bytes, tokens);
    }

    /// Runs the sequences of all inputs that could be prepared; the answers are in their order.
    async fn run_all(
        &self,
        model: &Served,
        prepared: &[Result<Prepared>],
        priority: Priority,
        deadline: Option<Instant>,
        permit: Permit,
    ) -> Result<Vec<Result<Outputs>>> {
        let parts = || prepared.iter().flatten().flat_map(Prepared::parts);
        let work = work::count(parts().map(Part::tokens), self.prefix_cache);
        let mut permits = permit.split(&work)?.into_iter();
        // All are in the queue before the first is awaited: what they share is computed once, and batches are full.
        let mut answers = Vec::with_capacity(work.len());
        for part in parts() {
            let meta = JobMeta {
                priority,
                deadline,
                arrived: Instant::now(),
                pinned_prefix: part.pinned_prefix,
                permit: permits.next(),
            };
            let sequence =
                Sequence { model: model.handle(), tokens: part.tokens.clone(), want: part.want.clone(), meta };
            answers.push(sequence.submit()?);
        }
        let mut answers = answers.into_iter();
        let mut outputs = Vec::with_capacity(prepared.len());
        for prepared in prepared.iter().flatten() {
            let mut parts = Vec::with_capacity(2);
            for answer in answers.by_ref().take(prepared.parts().count()) {
                parts.push(answer.await.unwrap_or(Err(Error::DeviceLost)));
            }
            let mut parts = parts.into_iter();
            let sequence = parts.next().unwrap_or(Err(Error::DeviceLost));
            let unconditional = parts.next().transpose();
            outputs.push(sequence.and_then(|sequence| Ok(Outputs { sequence, unconditional: unconditional? })));
        }
        Ok(outputs)
    }
}

impl Prepared {
    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.sequence).chain(&self.unconditional)
    }
}

fn prepare(
    model: &Served,
    input: &TextInput,
    text: &RenderOptions,
    objective: Objective,
    per_token: bool,
) -> Result<Prepared> {
    let rendered = model.text.render(input, text, RenderMode::Score)?;
    let truncated = rendered.truncated;
    if model.info.kind == ModelKind::Preference {
        let want = if per_token { Want::TokenRewards } else { Want::Reward };
        let sequence = Part {
            want,
            values: 0..rendered.ids.len(),
            pinned_prefix: pinned_prefix(&rendered, text),
            tokens: rendered.ids,
        };
        return Ok(Prepared { sequence, unconditional: None, truncated });
    }
    let unconditional = match objective {
        Objective::MutualInformation => {
            let alone = model.text.render(input, text, RenderMode::Unconditional)?;
            Some(response_part(alone, text)?)
        }
        Objective::MeanLogProb | Objective::SumLogProb => None,
    };
    Ok(Prepared { sequence: response_part(rendered, text)?, unconditional, truncated })
}

/// The sequence that gives the log-probabilities of a response.
fn response_part(rendered: Rendered, text: &RenderOptions) -> Result<Part> {
    let response = rendered.require_response()?;
    Ok(Part {
        want: Want::LogProbs(response.clone()),
        values: response,
        pinned_prefix: pinned_prefix(&rendered, text),
        tokens: rendered.ids,
    })
}

fn assemble(
    model: &Served,
    prepared: Prepared,
    outputs: Outputs,
    objective: Objective,
    per_token: bool,
) -> Result<v1::Score> {
    let Prepared { sequence, unconditional, truncated } = prepared;
    let values = &outputs.sequence.values;
    let (reward, log_probs) = match model.info.kind {
        ModelKind::Preference => (last(values)?, None),
        ModelKind::Language => {
            let alone = outputs.unconditional.as_ref().map(|output| sum(&output.values));
            let log_probs = v1::LogProbs {
                sum: sum(values) as f32,
                mean: (sum(values) / values.len() as f64) as f32,
                response_tokens: count(values.len()),
                unconditional_sum: alone.map(|alone| alone as f32),
                greedy: outputs.sequence.greedy.iter().all(|greedy| *greedy),
            };
            let reward = match objective {
                Objective::MeanLogProb => log_probs.mean,
                Objective::SumLogProb => log_probs.sum,
                Objective::MutualInformation => (sum(values) - alone.unwrap_or(f64::NAN)) as f32,
            };
            (reward, Some(log_probs))
        }
    };
    if !reward.is_finite() {
        return Err(Error::NonFinite { what: "the reward".to_owned() });
    }
    let tokens = match per_token {
        true => token_values(model, &sequence.tokens[sequence.values.clone()], values),
        false => Vec::new(),
    };
    let input_tokens = sequence.tokens.len() + unconditional.map_or(0, |part| part.tokens.len());
    let cached_tokens = outputs.sequence.cached_tokens + outputs.unconditional.map_or(0, |output| output.cached_tokens);
    Ok(v1::Score {
        reward,
        input_tokens: count(input_tokens),
        cached_tokens: count(cached_tokens),
        truncated,
        log_probs,
        tokens,
    })
}

fn last(values: &[f32]) -> Result<f32> {
    values.last().copied().ok_or_else(|| Error::internal("the engine answered without a value"))
}

/// In f64, so that the order of magnitude of a long response does not cost digits.
fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

fn token_values(model: &Served, ids: &[u32], values: &[f32]) -> Vec<v1::TokenValue> {
    let token = |(&id, &value)| v1::TokenValue { id, text: model.text.token_text(id), value };
    ids.iter().zip(values).map(token).collect()
}

/// The error of a call all of whose items failed in the same way.
fn common_failure(results: &[Result<v1::Score>]) -> Option<Error> {
    let first = results.first()?.as_ref().err()?;
    let all = results.iter().all(|result| result.as_ref().is_err_and(|error| error.code() == first.code()));
    all.then(|| first.clone())
}

/// When a call's sequences waited and ran.
#[derive(Default)]
struct Clock {
    queued: Duration,
    ran: Option<(Instant, Instant)>,
}

impl Clock {
    fn add(&mut self, outputs: &Outputs) {
        for output in std::iter::once(&outputs.sequence).chain(&outputs.unconditional) {
            self.queued = self.queued.max(output.queued);
            let (started, finished) = self.ran.unwrap_or((output.started, output.finished));
            self.ran = Some((started.min(output.started), finished.max(output.finished)));
        }
    }

    /// The longest wait, and the time from the first start to the last end.
    fn read(&self) -> (Duration, Duration) {
        let inference = self.ran.map_or(Duration::ZERO, |(started, finished)| finished.duration_since(started));
        (self.queued, inference)
    }
}

/// Where a call's time went, until now.
pub(super) fn timings(arrived: Instant, tokenize: Duration, queued: Duration, inference: Duration) -> v1::Timings {
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    v1::Timings {
        total_ns: nanos(arrived.elapsed()),
        tokenize_ns: nanos(tokenize),
        queue_ns: nanos(queued),
        inference_ns: nanos(inference),
    }
}

/// A number of tokens on the wire.
pub(super) fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_of_all_in_the_same_way_is_the_calls_own() {
        let good = || Ok(v1::Score::default());
        let bad = |field: &str| Err(Error::invalid(field, "why"));
        let gone = || Err(Error::DeadlineExceeded);
        let check = |results: &[Result<v1::Score>], expected: Option<Error>| {
            assert_eq!(common_failure(results), expected, "{results:?}");
        };
        check(&[good()], None);
        check(&[bad("items[0]"), good()], None);
        check(&[bad("items[0]"), gone()], None);
        check(&[bad("items[0]")], Some(Error::invalid("items[0]", "why")));
        check(&[bad("items[0]"), bad("items[1]")], Some(Error::invalid("items[0]", "why")));
        check(&[gone(), gone()], Some(Error::DeadlineExceeded));
    }
}
