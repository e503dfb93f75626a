//! `plumb.v1.Generation`: streamed samples.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use plumb_model::text::{HhhPrompt, RenderMode, RenderOptions, Rendered, TextInput, Truncation};
use plumb_proto::v1;
use plumb_proto::v1::generation_server::Generation;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::best_of::{self, Ranking};
use super::sample::{Piece, Sample};
use super::scoring::{count, timings};
use super::stop::StopStrings;
use super::work::{Size, Tokens};
use super::{Call, Context, input, limits, split_hash, work};
use crate::admission::{Permit, Work};
use crate::engine::sampling::{Sampler, SamplingParams};
use crate::engine::{GenerateJob, JobMeta, Priority};
use crate::error::{Error, Result};
use crate::layers::trace::record_request_id;
use crate::record::Origin;
use crate::registry::{Need, Served};
use crate::telemetry::events::{Computed, InputAccepted, Tokenized};

type Sender = mpsc::Sender<Result<v1::GenerateResponse, Status>>;

/// The service.
pub(crate) struct GenerationService {
    context: Arc<Context>,
}

impl GenerationService {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl Generation for GenerationService {
    type GenerateStream = ReceiverStream<Result<v1::GenerateResponse, Status>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (call, origin) = (Call::of(&request), Origin::of(&request, "Generate"));
        let plan = Plan::check(&self.context, request.into_inner(), call, origin)?;
        let run = start(Arc::clone(&self.context), plan).await?;
        Ok(Response::new(super::stream(self.context.aborted.clone(), |sender| run.deliver(sender))))
    }
}

/// A request that makes sense.
struct Plan {
    model: Arc<Served>,
    ranker: Option<Arc<Served>>,
    prompt: TextInput,
    text: RenderOptions,
    sampling: SamplingParams,
    /// Unset: what ends an answer in this form of conversation.
    stop_strings: Vec<String>,
    stop_at_eos: bool,
    max_new_tokens: usize,
    /// Samples to answer.
    n: usize,
    /// Samples to draw.
    samples: usize,
    priority: Priority,
    request_id: String,
    call: Call,
    record: Option<(Origin, v1::RankRequest)>,
}

impl Plan {
    fn check(context: &Context, request: v1::GenerateRequest, call: Call, origin: Origin) -> Result<Self> {
        limits::request_id(&request.request_id)?;
        record_request_id(&request.request_id);
        limits::spec("model", request.model.as_ref())?;
        let hash = || split_hash(&request.request_id, &request);
        let n = request.n.unwrap_or(1) as usize;
        context.check_count("n", n)?;
        let (ranker, samples) = match &request.best_of {
            None => (None, n),
            Some(best_of) => {
                let samples = best_of.samples as usize;
                if samples < n {
                    return Err(Error::invalid("best_of.samples", format!("{samples} are fewer than n, which is {n}")));
                }
                context.check_count("best_of.samples", samples)?;
                limits::spec("best_of.ranker", best_of.ranker.as_ref())?;
                (Some(context.registry.resolve(best_of.ranker.as_ref(), Need::Preference, hash)?), samples)
            }
        };
        let model = context.registry.resolve(request.model.as_ref(), Need::Language, hash)?;
        let record = ranking_record(context, &request).map(|record| (origin, record));
        let prompt = input::text_input(&request.prompt.unwrap_or_default()).map_err(|error| error.within("prompt"))?;
        if ranker.is_some() && matches!(prompt, TextInput::TokenIds { .. }) {
            return Err(Error::invalid("prompt", "best_of needs text: the ranker has a tokenizer of its own"));
        }
        if ranker.is_some() {
            limits::samples(&prompt, samples, context.limits.max_message_bytes)?;
        }
        let stopping = request.stopping.unwrap_or_default();
        limits::strings("stopping.stop_strings", &stopping.stop_strings)?;
        let max_new_tokens =
            stopping.max_new_tokens.map_or(context.limits.default_max_new_tokens, |tokens| tokens as usize);
        if max_new_tokens == 0 || max_new_tokens > context.limits.max_new_tokens_limit {
            let message = format!("{max_new_tokens} is not in 1..={}", context.limits.max_new_tokens_limit);
            return Err(Error::invalid("stopping.max_new_tokens", message));
        }
        let sampling = sampling(request.sampling.unwrap_or_default())?;
        let mut text =
            input::render_options(request.text.as_ref(), model.info.max_input_tokens, context.limits.auto_truncate)?;
        // Truncation makes room for the new tokens. Without it, a long prompt leaves less room than was asked for.
        let reserved = if text.truncation == Truncation::Refuse { 1 } else { max_new_tokens };
        text.max_tokens.get_or_insert(model.info.max_input_tokens.saturating_sub(reserved).max(1));
        Ok(Self {
            model,
            ranker,
            prompt,
            text,
            sampling,
            stop_strings: stopping.stop_strings,
            stop_at_eos: !stopping.ignore_eos,
            max_new_tokens,
            n,
            samples,
            priority: input::priority(request.priority)?,
            request_id: request.request_id,
            call,
            record,
        })
    }

    /// True if the prompt is written in `Human:` and `Assistant:` turns.
    fn default_stop_strings(&self) -> Vec<String> {
        let turns = matches!(self.prompt, TextInput::Conversation(_)) || self.text.hhh_prompt != HhhPrompt::None;
        if turns { self.model.text.default_stop_strings(&self.text) } else { Vec::new() }
    }
}

/// What a best-of call asks of its ranker, if calls are recorded.
fn ranking_record(context: &Context, request: &v1::GenerateRequest) -> Option<v1::RankRequest> {
    let best_of = request.best_of.as_ref().filter(|_| context.recorder.is_on())?;
    Some(v1::RankRequest {
        model: best_of.ranker.clone(),
        prompt: request.prompt.clone(),
        text: request.text.map(|text| v1::TextOptions { truncation: text.truncation, ..v1::TextOptions::default() }),
        request_id: request.request_id.clone(),
        priority: request.priority,
        ..v1::RankRequest::default()
    })
}

fn sampling(wire: v1::Sampling) -> Result<SamplingParams> {
    limits::strings("sampling.banned_strings", &wire.banned_strings)?;
    let params = SamplingParams {
        repetition_penalty: wire.repetition_penalty.unwrap_or(1.0),
        banned_strings: wire.banned_strings,
        temperature: wire.temperature.unwrap_or(1.0),
        top_k: wire.top_k.unwrap_or(0) as usize,
        top_p: wire.top_p.unwrap_or(1.0),
        min_p: wire.min_p.unwrap_or(0.0),
        seed: wire.seed.unwrap_or_else(rand::random),
    };
    params.check()?;
    Ok(params)
}

/// The seed of a sample: samples of a call differ, and the first ones stay the same if more are asked for (SplitMix64,
/// Steele et al. 2014).
fn seed_of(seed: u64, sample: usize) -> u64 {
    let mut z = seed.wrapping_add((sample as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Gets room for the call, renders the prompt and puts all samples into the queue.
async fn start(context: Arc<Context>, plan: Plan) -> Result<Run> {
    let size = Size::of(&plan.prompt);
    let (mut permit, ranking) = admit(&context, &plan, size).await?;
    let ranking = permit.take(ranking);
    let began = Instant::now();
    let (plan, rendered) = context
        .pool
        .run(move || {
            let rendered = plan.model.text.render(&plan.prompt, &plan.text, RenderMode::Generate);
            (plan, rendered)
        })
        .await?;
    let rendered = rendered.map_err(|error| Error::from(error).within("prompt"))?;
    let tokenize = began.elapsed();
    Tokenized { model: plan.model.name(), duration: tokenize }.emit();

    let prompt_tokens = rendered.ids.len();
    let room = plan.model.info.max_input_tokens.saturating_sub(prompt_tokens);
    if room == 0 {
        let message = format!("the prompt has {prompt_tokens} tokens, which leaves no room for an answer");
        return Err(Error::invalid("prompt", message));
    }
    InputAccepted { model: plan.model.name(), tokens: prompt_tokens, truncated: rendered.truncated }.emit();
    plan.model.record_input(prompt_tokens, plan.text.hhh_prompt);
    let max_new_tokens = plan.max_new_tokens.min(room);
    let truncated = rendered.truncated;
    if !truncated {
        context.estimator.learn(plan.model.name(), size.bytes, prompt_tokens - rendered.prefix_len.min(prompt_tokens));
    }
    let samples = start_samples(&context, &plan, rendered, max_new_tokens, permit)?;
    Ok(Run { context, plan, ranking, samples, prompt_tokens, truncated, tokenize })
}

/// Room for a call, the prompt once and all tokens that may be drawn, and how much of it is for ranking the samples.
///
/// All, and not as many as are likely: a sequence takes pages for all of them when it begins, and those that are not drawn
/// are given back.
async fn admit(context: &Context, plan: &Plan, prompt: Size) -> Result<(Permit, Work)> {
    let tokens = |model: &Served| prompt.tokens(&context.estimator, model.name(), model.info.max_input_tokens);
    let new = plan.samples * plan.max_new_tokens.min(plan.model.info.max_input_tokens);
    let samples = Work { prompt: tokens(&plan.model), new };
    let ranking = plan.ranker.as_ref().map_or(0, |ranker| tokens(ranker) + new);
    // Nobody waits for the ranking before it begins: until then it only takes memory.
    let (ranking, certain) = (Work { prompt: 0, new: ranking }, prompt.ids + new);
    Ok((context.admit(&plan.call, plan.priority, samples + ranking, certain).await?, ranking))
}

fn start_samples(
    context: &Context,
    plan: &Plan,
    prompt: Rendered,
    max_new_tokens: usize,
    permit: Permit,
) -> Result<Vec<Sample>> {
    let model = &plan.model;
    let pinned_prefix = input::pinned_prefix(&prompt, &plan.text);
    let tokens = Tokens { ids: &prompt.ids, pinned_prefix, reusable: prompt.ids.len() - 1 };
    let mut works = work::count(std::iter::repeat_n(tokens, plan.samples), context.prefix_cache);
    works.iter_mut().for_each(|work| work.new = max_new_tokens);
    let permits = permit.split(&works)?;
    let default_stops = plan.default_stop_strings();
    let decoder = match default_stops.is_empty() {
        // In this form an answer begins after a space or a new line.
        false => model.text.stream_decoder().trim_start(),
        true => model.text.stream_decoder_after(&prompt.ids)?,
    };
    let stops = if plan.stop_strings.is_empty() { default_stops } else { plan.stop_strings.clone() };
    let eos = if plan.stop_at_eos { model.text.eos_ids().to_vec() } else { Vec::new() };
    let mut samples = Vec::with_capacity(plan.samples);
    for (i, permit) in permits.into_iter().enumerate() {
        let params = SamplingParams { seed: seed_of(plan.sampling.seed, i), ..plan.sampling.clone() };
        let job = GenerateJob {
            model: model.handle(),
            tokens: prompt.ids.clone(),
            sampler: Sampler::new(params, &prompt.ids, model.handle())?,
            max_new_tokens,
            stop_at_eos: plan.stop_at_eos,
            meta: JobMeta {
                priority: plan.priority,
                deadline: plan.call.deadline,
                arrived: Instant::now(),
                pinned_prefix,
                permit: Some(permit),
            },
        };
        let events = job.start()?;
        let stops = StopStrings::new(stops.clone());
        samples.push(Sample::new(Arc::clone(model), events, decoder.clone(), stops, eos.clone()));
    }
    Ok(samples)
}

/// Samples on their way to the client.
struct Run {
    context: Arc<Context>,
    plan: Plan,
    /// Room for ranking them.
    ranking: Permit,
    samples: Vec<Sample>,
    prompt_tokens: usize,
    truncated: bool,
    tokenize: Duration,
}

impl Run {
    /// Sends all there is to say, until the deadline.
    async fn deliver(self, sender: Sender) -> Result<()> {
        match self.plan.call.deadline {
            None => self.deliver_all(&sender).await,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), self.deliver_all(&sender)).await {
                Ok(delivered) => delivered,
                Err(_) => Err(Error::DeadlineExceeded),
            },
        }
    }

    async fn deliver_all(mut self, sender: &Sender) -> Result<()> {
        let began = Instant::now();
        let ranking = self.ranking.rest();
        let Plan { model, ranker, .. } = &self.plan;
        let first = v1::GenerateResponse {
            model: Some(model.identity()),
            ranker: ranker.as_ref().map(|ranker| ranker.identity()),
            ..v1::GenerateResponse::default()
        };
        send(sender, first).await?;
        match ranker {
            None => {
                try_join_all((0..).zip(&mut self.samples).map(|(i, sample)| forward(sample, i, sender))).await?;
            }
            Some(ranker) => {
                let ranking = Ranking {
                    ranker: Arc::clone(ranker),
                    prompt: Arc::new(self.plan.prompt.clone()),
                    // The ranker's own form and limit; what to do with what does not fit is the caller's choice.
                    text: RenderOptions { truncation: self.plan.text.truncation, ..RenderOptions::default() },
                    priority: self.plan.priority,
                    call: self.plan.call.clone(),
                    permit: ranking,
                    record: self.plan.record.clone(),
                };
                let best = best_of::draw(&self.context, ranking, &mut self.samples).await?;
                for (i, piece) in (0..).zip(best).take(self.plan.n) {
                    send(sender, response(piece, i)).await?;
                }
            }
        }
        let summary = self.summary(began.elapsed());
        send(sender, v1::GenerateResponse { summary: Some(summary), ..v1::GenerateResponse::default() }).await
    }

    fn summary(&self, since_start: Duration) -> v1::GenerateSummary {
        let queued = self.samples.iter().map(Sample::queued).max().unwrap_or_default();
        let inference = since_start.saturating_sub(queued);
        Computed { model: self.plan.model.name(), queued, inference }.emit();
        v1::GenerateSummary {
            prompt_tokens: count(self.prompt_tokens),
            cached_tokens: self.samples.first().map_or(0, |sample| count(sample.cached_tokens())),
            truncated: self.truncated,
            seed: self.plan.sampling.seed,
            timings: Some(timings(self.plan.call.arrived, self.tokenize, queued, inference)),
            request_id: self.plan.request_id.clone(),
        }
    }
}

/// Sends a sample piece by piece.
async fn forward(sample: &mut Sample, index: u32, sender: &Sender) -> Result<()> {
    loop {
        let piece = sample.next().await?;
        let is_last = piece.end.is_some();
        if is_last || !piece.token_ids.is_empty() {
            send(sender, response(piece, index)).await?;
        }
        if is_last {
            return Ok(());
        }
    }
}

fn response(piece: Piece, index: u32) -> v1::GenerateResponse {
    let Piece { text, token_ids, end } = piece;
    v1::GenerateResponse { index, text, token_ids, end, ..v1::GenerateResponse::default() }
}

async fn send(sender: &Sender, response: v1::GenerateResponse) -> Result<()> {
    sender.send(Ok(response)).await.map_err(|_| Error::Cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_samples_differ_and_stay() {
        let seeds: Vec<_> = (0..100).map(|i| seed_of(7, i)).collect();
        let distinct: std::collections::BTreeSet<_> = seeds.iter().collect();
        assert_eq!(distinct.len(), 100);
        assert_ne!(seed_of(7, 1), seed_of(8, 0), "neighbouring seeds share no samples");
        assert_eq!(seed_of(0, 1), 0xe220_a839_7b1d_cdaf, "the reference's first number");
    }
}
