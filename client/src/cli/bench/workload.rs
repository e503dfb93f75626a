//! What a request is: its contents, drawn from a seed, and what is measured of its answer.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use futures::StreamExt;
use plumb_client::{Client, Code, Error, ItemFailure, score, v1};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cli::Usage;
use crate::cli::input::{Body, Reading, with_response};
use crate::cli::source;

/// Number of the first request while warming up; far from the measured ones, because a number makes the contents.
pub(super) const WARMUP: u64 = 1 << 40;
/// Number of the first measured request.
pub(super) const MEASURED: u64 = 0;

/// The shape of the requests.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Unique { items: u32, tokens: u32 },
    Rank { candidates: u32, prompt_tokens: u32, tokens: u32, repeated: Option<u32> },
    Generate { prompt_tokens: u32, shared_tokens: u32, new_tokens: u32, temperature: f32 },
    File { files: Vec<PathBuf>, items: u32, max_items: u32 },
}

/// What all requests have in common.
pub(super) struct Common {
    pub(super) client: Client,
    pub(super) model: v1::ModelSpec,
    pub(super) ids: Range<u32>,
    pub(super) seed: u64,
}

/// Requests, ready to be sent.
pub(super) struct Workload {
    kind: Kind,
    common: Common,
    texts: Vec<v1::Input>,
}

/// What an answer brought.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) sequences: u64,
    pub(super) input_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) new_tokens: u64,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Option<Instant>,
    pub(super) failures: Vec<Code>,
}

impl Kind {
    pub(super) fn needs_ids(&self) -> bool {
        !matches!(self, Self::File { .. })
    }

    pub(super) fn prepare(self, common: Common) -> Result<Workload, Usage> {
        let texts = match &self {
            Self::File { files, max_items, .. } => texts(files, *max_items as usize)?,
            _ => Vec::new(),
        };
        Ok(Workload { kind: self, common, texts })
    }
}

impl Workload {
    pub(super) fn describe(&self) -> String {
        match &self.kind {
            Kind::Unique { items, tokens } => format!("unique: {items} sequences of {tokens} tokens a request"),
            Kind::Rank { candidates, prompt_tokens, tokens, repeated } => {
                let repeated = repeated.map(|n| format!(", {n} prompts repeated")).unwrap_or_default();
                format!("rank: {candidates} candidates of {tokens} tokens, prompts of {prompt_tokens}{repeated}")
            }
            Kind::Generate { prompt_tokens, shared_tokens, new_tokens, .. } => {
                format!("generate: {new_tokens} tokens after {shared_tokens} shared and {prompt_tokens} own ones")
            }
            Kind::File { items, .. } => format!("file: {items} of {} sequences a request", self.texts.len()),
        }
    }

    /// Sends request number `n` and waits for the end of its answer.
    pub(super) async fn send(&self, n: u64) -> Result<Answer, Error> {
        match &self.kind {
            Kind::Unique { items, tokens } => {
                let mut rng = self.rng(n);
                let items = (0..*items).map(|_| ids_input(self.draw(&mut rng, *tokens))).collect();
                self.score(items).await
            }
            Kind::File { items, .. } => {
                let first = (n % WARMUP) as usize * *items as usize;
                let item = |i: usize| self.texts[(first + i) % self.texts.len()].clone();
                self.score((0..*items as usize).map(item).collect()).await
            }
            Kind::Rank { candidates, prompt_tokens, tokens, repeated } => {
                let prompt_number = repeated.map_or(n, |count| n % u64::from(count));
                let prompt = self.draw(&mut self.rng(prompt_number), *prompt_tokens);
                // Candidates are new even where the prompt is not.
                let mut rng = self.rng(n ^ (1 << 62));
                let candidates = (0..*candidates).map(|_| self.draw(&mut rng, *tokens)).collect();
                self.rank(prompt, candidates).await
            }
            Kind::Generate { prompt_tokens, shared_tokens, new_tokens, temperature } => {
                // All prompts begin alike.
                let mut prompt = self.draw(&mut self.rng(u64::MAX), *shared_tokens);
                prompt.extend(self.draw(&mut self.rng(n), *prompt_tokens));
                self.generate(prompt, *new_tokens, *temperature).await
            }
        }
    }

    async fn score(&self, items: Vec<v1::Input>) -> Result<Answer, Error> {
        let request = v1::ScoreRequest { model: Some(self.common.model.clone()), items, ..Default::default() };
        let response = self.common.client.score(request).await?;
        let mut answer = Answer::default();
        response.results.iter().for_each(|result| answer.count(score(result)));
        Ok(answer)
    }

    async fn rank(&self, prompt: Vec<u32>, candidates: Vec<Vec<u32>>) -> Result<Answer, Error> {
        let candidate = |ids| v1::Candidate {
            candidate: Some(v1::candidate::Candidate::TokenIds(v1::TokenIds { ids, response_start: None })),
        };
        let request = v1::RankRequest {
            model: Some(self.common.model.clone()),
            prompt: Some(ids_input(prompt)),
            candidates: candidates.into_iter().map(candidate).collect(),
            ..Default::default()
        };
        let response = self.common.client.rank(request).await?;
        let mut answer = Answer::default();
        for ranked in &response.ranked {
            let none = ItemFailure { code: Code::Internal, message: String::new() };
            let failure = || ranked.error.as_ref().map_or(none, ItemFailure::from);
            answer.count(ranked.score.as_ref().ok_or_else(failure));
        }
        Ok(answer)
    }

    async fn generate(&self, prompt: Vec<u32>, new_tokens: u32, temperature: f32) -> Result<Answer, Error> {
        let request = v1::GenerateRequest {
            model: Some(self.common.model.clone()),
            prompt: Some(ids_input(prompt)),
            sampling: Some(v1::Sampling { temperature: Some(temperature), ..Default::default() }),
            stopping: Some(v1::Stopping { max_new_tokens: Some(new_tokens), ignore_eos: true, ..Default::default() }),
            ..Default::default()
        };
        let mut pieces = self.common.client.generate(request).await?;
        let mut answer = Answer { sequences: 1, ..Answer::default() };
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if !piece.token_ids.is_empty() {
                let now = Instant::now();
                answer.first_token.get_or_insert(now);
                answer.last_token = Some(now);
                answer.new_tokens += piece.token_ids.len() as u64;
            }
            if let Some(summary) = piece.summary {
                answer.input_tokens = u64::from(summary.prompt_tokens);
                answer.cached_tokens = u64::from(summary.cached_tokens);
            }
        }
        Ok(answer)
    }

    fn rng(&self, n: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.common.seed);
        rng.set_stream(n);
        rng
    }

    fn draw(&self, rng: &mut ChaCha8Rng, tokens: u32) -> Vec<u32> {
        (0..tokens).map(|_| rng.random_range(self.common.ids.clone())).collect()
    }
}

impl Answer {
    fn count(&mut self, outcome: Result<&v1::Score, ItemFailure>) {
        match outcome {
            Ok(score) => {
                self.sequences += 1;
                self.input_tokens += u64::from(score.input_tokens);
                self.cached_tokens += u64::from(score.cached_tokens);
            }
            Err(failure) => self.failures.push(failure.code),
        }
    }
}

fn ids_input(ids: Vec<u32>) -> v1::Input {
    v1::Input { input: Some(v1::input::Input::TokenIds(v1::TokenIds { ids, response_start: None })) }
}

/// The first texts of files, pairs and candidates as single ones.
fn texts(files: &[PathBuf], max_items: usize) -> Result<Vec<v1::Input>, Usage> {
    let mut texts = Vec::new();
    let mut broken = None;
    for file in files {
        source::read_file(file, Reading::default(), &mut |line| {
            match line.map(|record| record.body) {
                Ok(Body::Single(input)) => texts.push(input),
                Ok(Body::Pair { chosen, rejected }) => texts.extend([chosen, rejected]),
                Ok(Body::Candidates { prompt, candidates }) => {
                    texts.extend(candidates.iter().map(|c| with_response(&prompt, c)));
                }
                Err(reason) => broken = Some(format!("{}: {}", reason.place, reason.reason)),
            }
            broken.is_none() && texts.len() < max_items
        });
    }
    texts.truncate(max_items);
    match broken {
        Some(reason) => Err(Usage(reason)),
        None if texts.is_empty() => Err(Usage("no texts in these files".into())),
        None => Ok(texts),
    }
}
