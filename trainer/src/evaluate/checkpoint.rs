//! Scores by a checkpoint, with the decoder that serves it: many sequences in a step, common beginnings computed once.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use plumb_model::cache::{BlockCache, Table};
use plumb_model::checkpoint::Source;
use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel, ModelKind};
use plumb_model::text::{
    ChatFormat, HhhPrompts, Message, RenderMode, RenderOptions, Rendered, Response, TextInput, Truncation,
};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::options::{HhhPrompt, Options};
use super::scorer::{Advance, How, Model, Outcome, Score, Scorer, kind_name, with_separator};
use crate::recipe::ComputeType;
use crate::{Error, Result};

/// Tokens in a step: enough to read every weight seldom, few enough for the activations to stay small.
const STEP_TOKENS: usize = 4096;

/// Sequences in a step: each may ask for a vocabulary of logits.
const STEP_SEQUENCES: usize = 256;

/// A checkpoint that is ready to score.
pub(super) struct Checkpoint {
    loaded: LoadedModel,
    model: Model,
    engine: Engine,
    pool: ThreadPool,
}

/// What a step needs beside the decoder.
struct Engine {
    cache: BlockCache,
    kv: KvStore,
    workspace: Workspace,
    /// Tokens in a step.
    step_tokens: usize,
}

/// A sequence to be computed.
struct Job {
    tokens: Vec<u32>,
    want: Want,
}

#[derive(Clone)]
enum Want {
    /// The reward at the last token.
    Reward,
    /// Log-probabilities of these tokens.
    LogProbs(Range<usize>),
    /// Logits after the last token.
    Next,
}

/// A sequence that has its pages.
struct Running {
    job: usize,
    table: Table,
    /// Tokens that are computed, or in the step.
    done: usize,
}

/// A text as one or two sequences.
struct Prepared {
    job: Job,
    /// The response without its query, for mutual information.
    alone: Option<Job>,
}

impl Checkpoint {
    pub(super) fn open(source: &str, options: &Options) -> Result<Self> {
        let hhh = match &options.hhh_prompt_file {
            Some(path) => HhhPrompts::from_file(path)?,
            None => HhhPrompts::default(),
        };
        let load = LoadOptions {
            dtype: match options.dtype {
                None => DTypeChoice::Auto,
                Some(ComputeType::F32) => DTypeChoice::F32,
                Some(ComputeType::Bf16) => DTypeChoice::Bf16,
            },
            hhh: Arc::new(hhh),
            max_input_tokens: None,
            kv_cache_bytes: options.kv_cache_mib.saturating_mul(1 << 20),
            device: Default::default(),
            background: Background::default(),
        };
        let threads = options.threads.unwrap_or_else(num_cpus::get_physical);
        let pool = ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|error| Error::Recipe(format!("{threads} threads: {error}")))?;
        let source = Source { model: source.to_owned(), adapter: options.adapter.clone(), ..Source::default() };
        let loaded = pool.install(|| LoadedModel::load(&source, &load))?;
        let info = &loaded.info;
        let model = Model {
            source: info.source.clone(),
            name: None,
            version: None,
            adapter: info.adapter.clone(),
            kind: kind_name(info.kind),
            architecture: info.architecture.clone(),
            dtype: info.dtype.to_owned(),
            parameters: info.parameters,
            max_input_tokens: info.max_input_tokens,
            weights_digest: info.weights_digest.clone(),
            chat_template_sha256: loaded.text.chat_template_sha256().map(str::to_owned),
            hhh_prompt: loaded.text.hhh_name().as_str().to_owned(),
        };
        let engine = Engine {
            cache: BlockCache::new(loaded.kv_pages),
            kv: loaded.decoder.kv_store(loaded.kv_pages)?,
            workspace: loaded.decoder.workspace(),
            step_tokens: STEP_TOKENS,
        };
        Ok(Self { loaded, model, engine, pool })
    }

    fn prepare(&self, text: &TextInput, how: &How) -> std::result::Result<Prepared, String> {
        let render = |mode| self.loaded.text.render(text, &how.text, mode).map_err(|error| error.to_string());
        let rendered = render(RenderMode::Score)?;
        if self.loaded.info.kind == ModelKind::Preference {
            return Ok(Prepared { job: Job { tokens: rendered.ids, want: Want::Reward }, alone: None });
        }
        let alone = match how.mutual_information {
            true => Some(response(render(RenderMode::Unconditional)?)?),
            false => None,
        };
        Ok(Prepared { job: response(rendered)?, alone })
    }

    fn run(&mut self, jobs: &[Job], deliver: &mut dyn FnMut(usize, Vec<f32>)) -> Result<()> {
        let Self { loaded, engine, pool, .. } = self;
        engine.run(jobs, deliver, &mut |step, kv, workspace| {
            Ok(pool.install(|| loaded.decoder.step(step, kv, workspace))?)
        })
    }
}

/// The sequence that gives the log-probabilities of a response.
fn response(rendered: Rendered) -> std::result::Result<Job, String> {
    let response = rendered.require_response().map_err(|error| error.to_string())?;
    Ok(Job { tokens: rendered.ids, want: Want::LogProbs(response) })
}

impl Scorer for Checkpoint {
    fn model(&self) -> &Model {
        &self.model
    }

    fn score(&mut self, texts: &[&TextInput], how: &How, advance: Advance<'_>) -> Result<Vec<Outcome>> {
        let prepared: Vec<_> = self.pool.install(|| texts.par_iter().map(|text| self.prepare(text, how)).collect());
        // Which text each sequence belongs to.
        let (mut jobs, mut places) = (Vec::new(), Vec::new());
        let mut outcomes: Vec<Outcome> = Vec::new();
        for (place, prepared) in prepared.into_iter().enumerate() {
            match prepared {
                Ok(Prepared { job, alone }) => {
                    let sequences = [Some(job), alone].into_iter().flatten();
                    sequences.for_each(|job| {
                        jobs.push(job);
                        places.push(place);
                    });
                    outcomes.push(Err("not computed".to_owned()));
                }
                Err(reason) => {
                    advance(1);
                    outcomes.push(Err(reason));
                }
            }
        }
        let mut values: Vec<Vec<f32>> = vec![Vec::new(); jobs.len()];
        let mut told = 0;
        self.run(&jobs, &mut |job, found| {
            values[job].extend(found);
            // Sequences end about in their order; texts that have begun count as done.
            let done = places[job] as u64;
            advance(done.saturating_sub(told));
            told = told.max(done);
        })?;
        let mut sequences = places.into_iter().zip(values).peekable();
        while let Some((place, values)) = sequences.next() {
            let alone = sequences.next_if(|(other, _)| *other == place).map(|(_, values)| values);
            outcomes[place] = assemble(self.loaded.info.kind, &values, alone.as_deref());
        }
        Ok(outcomes)
    }

    fn continues(
        &mut self,
        texts: &[(String, String)],
        how: &How,
        advance: Advance<'_>,
    ) -> Result<Vec<std::result::Result<bool, String>>> {
        let tokens: Vec<std::result::Result<(Vec<u32>, usize), String>> = self.pool.install(|| {
            let parts = |(text, continuation): &(String, String)| {
                let prompt = Arc::new(TextInput::Text(text.clone()));
                let whole = TextInput::PromptResponse { prompt, response: Response::Text(continuation.clone()) };
                let rendered = self.loaded.text.render(&whole, &how.text, RenderMode::Score);
                let mut rendered = rendered.map_err(|error| error.to_string())?;
                let response = rendered.require_response().map_err(|error| error.to_string())?;
                rendered.ids.truncate(response.end);
                Ok((rendered.ids, response.start))
            };
            texts.par_iter().map(parts).collect()
        });
        let mut outcomes: Vec<_> =
            tokens.iter().map(|found| found.as_ref().map(|_| true).map_err(Clone::clone)).collect();
        // A token of each in a round, as long as all before it were the likeliest.
        for round in 0.. {
            let alive = |(place, found): (usize, &std::result::Result<(Vec<u32>, usize), String>)| {
                let (ids, start) = found.as_ref().ok()?;
                (outcomes[place] == Ok(true) && start + round < ids.len()).then(|| (place, start + round))
            };
            let alive: Vec<(usize, usize)> = tokens.iter().enumerate().filter_map(alive).collect();
            if alive.is_empty() {
                break;
            }
            let ids = |place: usize| tokens[place].as_ref().map_or(&[][..], |(ids, _)| ids);
            let jobs: Vec<Job> =
                alive.iter().map(|&(place, at)| Job { tokens: ids(place)[..at].to_vec(), want: Want::Next }).collect();
            self.run(&jobs, &mut |job, logits| {
                let (place, at) = alive[job];
                outcomes[place] = match likeliest(&logits) {
                    Some(token) => Ok(token == ids(place)[at] as usize),
                    None => Err(NOT_FINITE.to_owned()),
                };
            })?;
        }
        advance(texts.len() as u64);
        Ok(outcomes)
    }

    fn opening(&mut self, said: &str, hhh_prompt: HhhPrompt) -> Result<String> {
        let options = RenderOptions {
            chat_format: ChatFormat::HumanAssistant,
            hhh_prompt: hhh_prompt.of_text(),
            // Only the text is wanted.
            truncation: Truncation::Left,
            max_tokens: None,
        };
        let turn = TextInput::Conversation(vec![Message::new("user", said)]);
        Ok(with_separator(self.loaded.text.render(&turn, &options, RenderMode::Generate)?.text, said))
    }
}

const NOT_FINITE: &str = "the model computed a value that is not a number";

/// Values become a score as on a server, to the bit.
fn assemble(kind: ModelKind, values: &[f32], alone: Option<&[f32]>) -> Outcome {
    // In f64, so that the order of magnitude of a long response does not cost digits.
    let sum = |values: &[f32]| values.iter().copied().map(f64::from).sum::<f64>();
    if values.is_empty() || values.iter().chain(alone.unwrap_or_default()).any(|value| !value.is_finite()) {
        return Err(NOT_FINITE.to_owned());
    }
    Ok(match kind {
        ModelKind::Preference => Score::Reward(values[values.len() - 1]),
        ModelKind::Language => Score::LogProb {
            mean: (sum(values) / values.len() as f64) as f32,
            sum: sum(values) as f32,
            mutual_information: alone.map(|alone| (sum(values) - sum(alone)) as f32),
            tokens: values.len() as u64,
        },
    })
}

/// Index of the largest logit, the first where several are equal; `None` if one is not a number.
fn likeliest(logits: &[f32]) -> Option<usize> {
    let mut best = (None, f32::NEG_INFINITY);
    for (i, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if *logit > best.1 {
            best = (Some(i), *logit);
        }
    }
    best.0
}

impl Job {
    /// Tokens whose keys and values are enough: nothing is read at them.
    fn reusable(&self) -> usize {
        match &self.want {
            Want::Reward | Want::Next => self.tokens.len() - 1,
            Want::LogProbs(range) => range.start - 1,
        }
    }

    /// What a slice of the tokens is to answer.
    fn read(&self, positions: &Range<usize>) -> Read<'_> {
        let last = positions.end == self.tokens.len();
        match &self.want {
            Want::Reward if last => Read::LastReward,
            Want::Next if last => Read::LastLogits,
            Want::Reward | Want::Next => Read::Nothing,
            Want::LogProbs(range) => {
                // The row before a token tells its probability.
                let rows = (range.start - 1).max(positions.start)..(range.end - 1).min(positions.end);
                if rows.is_empty() {
                    return Read::Nothing;
                }
                let targets = &self.tokens[rows.start + 1..rows.end + 1];
                Read::LogProbs { rows: rows.start - positions.start..rows.end - positions.start, targets }
            }
        }
    }
}

type RunStep<'a> = &'a mut dyn FnMut(&Step<'_>, &mut KvStore, &mut Workspace) -> Result<Vec<Vec<f32>>>;

impl Engine {
    /// Runs all jobs in their order, and hands over what each has asked for, in one piece or several.
    fn run(&mut self, jobs: &[Job], deliver: &mut dyn FnMut(usize, Vec<f32>), step: RunStep<'_>) -> Result<()> {
        let mut waiting: VecDeque<usize> = (0..jobs.len()).collect();
        let mut running: Vec<Running> = Vec::new();
        loop {
            let slices = self.plan(jobs, &mut waiting, &mut running);
            if slices.is_empty() {
                return match waiting.front() {
                    None => Ok(()),
                    Some(&job) => Err(Error::Recipe(format!(
                        "{} tokens have no room in the cache: raise --kv-cache-mib",
                        jobs[job].tokens.len()
                    ))),
                };
            }
            let sequences = running.iter().zip(&slices).map(|(running, positions)| StepSequence {
                tokens: &jobs[running.job].tokens[positions.clone()],
                position: positions.start,
                pages: running.table.pages(),
                read: jobs[running.job].read(positions),
            });
            let values = step(&Step { sequences: sequences.collect() }, &mut self.kv, &mut self.workspace)?;
            running.iter().zip(values).for_each(|(running, values)| deliver(running.job, values));
            let (ended, left): (Vec<_>, _) =
                running.into_iter().partition(|running| running.done == jobs[running.job].tokens.len());
            running = left;
            ended.into_iter().for_each(|ended| self.cache.release(ended.table));
        }
    }

    /// A slice of each running sequence, as many as fit, new ones among them. Only the last may end before its sequence.
    fn plan(&mut self, jobs: &[Job], waiting: &mut VecDeque<usize>, running: &mut Vec<Running>) -> Vec<Range<usize>> {
        let mut budget = self.step_tokens;
        let mut slices = Vec::new();
        for going in running.iter_mut() {
            slices.push(self.take(&jobs[going.job], going, &mut budget));
        }
        while budget > 0 && slices.len() < STEP_SEQUENCES {
            let Some(&place) = waiting.front() else { break };
            let job = &jobs[place];
            let left = job.tokens.len() - self.cache.cached(&job.tokens, job.reusable());
            // A sequence is cut only if it is longer than a step.
            if left > budget && (left <= self.step_tokens || budget < self.step_tokens) {
                break;
            }
            let Some(table) = self.cache.acquire(&job.tokens, job.reusable(), job.tokens.len()) else { break };
            waiting.pop_front();
            let mut new = Running { job: place, done: table.cached(), table };
            slices.push(self.take(job, &mut new, &mut budget));
            running.push(new);
        }
        slices
    }

    /// The next positions of a sequence.
    fn take(&mut self, job: &Job, running: &mut Running, budget: &mut usize) -> Range<usize> {
        let positions = running.done..job.tokens.len().min(running.done + *budget);
        *budget -= positions.len();
        running.done = positions.end;
        // Others of this very step may share these pages: a layer writes all keys before it reads any.
        self.cache.publish(&mut running.table, &job.tokens[..running.done]);
        positions
    }
}

#[cfg(test)]
mod tests;
