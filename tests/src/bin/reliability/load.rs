//! Load of all kinds at once, each answer of which is checked.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::StreamExt;
use plumb_client::{Answers, Client, Code, Error, RetryPolicy, code_name, score, v1};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::dialogues::RESPONSES;
use crate::expected::{Judge, LM, PM, generate};
use crate::server::client_of;

/// Items of a batch.
pub(crate) const BATCH: usize = 8;
/// Requests of a ScoreStream that are under way at a time.
const IN_FLIGHT: usize = 4;
/// After a call that failed: a server that is gone is not asked in a tight loop.
const PAUSE: Duration = Duration::from_millis(20);

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Score with one item.
    Single,
    /// Score with [`BATCH`] items.
    Batch,
    /// Rank with all responses of a dialogue.
    Rank,
    /// A request of one item in a ScoreStream.
    Stream,
    /// Generate, the likeliest tokens.
    Generate,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 5] = [Self::Single, Self::Batch, Self::Rank, Self::Stream, Self::Generate];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Single => "Score of one",
            Self::Batch => "Score of eight",
            Self::Rank => "Rank of four",
            Self::Stream => "ScoreStream",
            Self::Generate => "Generate",
        })
    }
}

/// A call that has ended.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// What it asked for.
    pub(crate) kind: Kind,
    /// When it was sent.
    pub(crate) began: Instant,
    /// When its answer was complete.
    pub(crate) ended: Instant,
    /// How.
    pub(crate) end: End,
}

impl Call {
    /// How long it took.
    pub(crate) fn took(&self) -> Duration {
        self.ended - self.began
    }
}

/// How a call has ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// With the right answer.
    Right,
    /// With an answer that is not what that version answers, or not that version's to give.
    Wrong(String),
    /// With an error.
    Failed {
        /// Its code.
        code: Code,
        /// When the server would like to be asked again.
        retry_after: Option<Duration>,
        /// The server's words.
        message: String,
    },
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        let retry_after = if let Error::Call(call) = &error { call.retry_after } else { None };
        // An answer that contradicts the contract is no failure to answer.
        if let Error::Contract(what) = error {
            return Self::Wrong(what);
        }
        Self::Failed { code: error.code(), retry_after, message: error.to_string() }
    }
}

/// Takes calls as they end.
pub(crate) trait Sink: Send + Sync + 'static {
    /// One has ended.
    fn take(&self, call: Call);
}

/// Keeps all calls.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<Call>>);

impl Sink for Log {
    fn take(&self, call: Call) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }
}

impl Log {
    /// All calls so far, which it then forgets.
    pub(crate) fn drain(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How many calls ended how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// With the right answer.
    pub(crate) right: usize,
    /// With a wrong one.
    pub(crate) wrong: usize,
    /// With an error, by code.
    pub(crate) failed: HashMap<&'static str, usize>,
    /// Of those refused with RESOURCE_EXHAUSTED: without a time to come back.
    pub(crate) without_retry_info: usize,
    /// The first of every sort, for people.
    pub(crate) examples: Vec<String>,
}

impl Tally {
    /// Of calls.
    pub(crate) fn of<'a>(calls: impl IntoIterator<Item = &'a Call>) -> Self {
        let mut tally = Self::default();
        calls.into_iter().for_each(|call| tally.count(call));
        tally
    }

    /// Counts a call.
    pub(crate) fn count(&mut self, call: &Call) {
        match &call.end {
            End::Right => self.right += 1,
            End::Wrong(what) => {
                self.wrong += 1;
                if self.wrong <= 3 {
                    self.examples.push(format!("{}: {what}", call.kind));
                }
            }
            End::Failed { code, retry_after, message } => {
                let count = self.failed.entry(code_name(*code)).or_default();
                *count += 1;
                if *count <= 2 {
                    self.examples.push(format!("{}: {message}", call.kind));
                }
                self.without_retry_info += usize::from(*code == Code::ResourceExhausted && retry_after.is_none());
            }
        }
    }

    /// Calls that ended with an error.
    pub(crate) fn failures(&self) -> usize {
        self.failed.values().sum()
    }

    /// Calls that ended with an error other than these.
    pub(crate) fn failures_other_than(&self, codes: &[Code]) -> usize {
        let expected: Vec<&str> = codes.iter().map(|code| code_name(*code)).collect();
        self.failed.iter().filter(|(code, _)| !expected.contains(*code)).map(|(_, count)| count).sum()
    }

    /// Calls with a code.
    pub(crate) fn with(&self, code: Code) -> usize {
        self.failed.get(code_name(code)).copied().unwrap_or_default()
    }

    /// All calls.
    pub(crate) fn all(&self) -> usize {
        self.right + self.wrong + self.failures()
    }
}

impl Sink for Mutex<Tally> {
    fn take(&self, call: Call) {
        self.lock().unwrap_or_else(PoisonError::into_inner).count(&call);
    }
}

/// Workers of each kind; each sends its next call when its last one has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    pub(crate) single: usize,
    pub(crate) batch: usize,
    pub(crate) rank: usize,
    pub(crate) stream: usize,
    pub(crate) generate: usize,
}

impl Mix {
    /// Keeps every queue of a server on a few cores filled.
    pub(crate) const SATURATING: Self = Self { single: 8, batch: 3, rank: 3, stream: 2, generate: 4 };
    /// The same for a debug build.
    pub(crate) const LIGHT: Self = Self { single: 2, batch: 1, rank: 1, stream: 1, generate: 1 };

    fn kinds(self) -> impl Iterator<Item = Kind> {
        let counts = [self.single, self.batch, self.rank, self.stream, self.generate];
        Kind::ALL.into_iter().zip(counts).flat_map(|(kind, count)| std::iter::repeat_n(kind, count))
    }

    /// In words.
    pub(crate) fn in_words(self) -> String {
        let Self { single, batch, rank, stream, generate } = self;
        format!(
            "{single} callers of Score with one item, {batch} of Score with {BATCH}, {rank} of Rank with {RESPONSES} \
             candidates, {stream} of ScoreStream with {IN_FLIGHT} requests in flight, {generate} of Generate"
        )
    }
}

/// Load for a server.
#[derive(Clone)]
pub(crate) struct Load {
    /// Where the server is.
    pub(crate) url: String,
    /// What clients try again.
    pub(crate) retry: RetryPolicy,
    /// Who knows what is right.
    pub(crate) judge: Arc<Judge>,
    /// Who wants to know.
    pub(crate) sink: Arc<dyn Sink>,
    /// A worker connects anew after so many calls.
    pub(crate) reconnect_after: Option<usize>,
    /// Of all that is drawn.
    pub(crate) seed: u64,
}

/// Load that runs.
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Result<()>>,
}

impl Load {
    /// Of workers that try nothing again, each on one connection.
    pub(crate) fn of(url: String, judge: &Arc<Judge>, sink: Arc<dyn Sink>, seed: u64) -> Self {
        Self { url, retry: RetryPolicy::none(), judge: Arc::clone(judge), sink, reconnect_after: None, seed }
    }

    /// Starts the workers.
    pub(crate) fn start(&self, mix: Mix) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        for (i, kind) in mix.kinds().enumerate() {
            let rng = ChaCha8Rng::seed_from_u64(self.seed << 16 | i as u64);
            let worker = Worker { kind, load: self.clone(), stop: Arc::clone(&stop), rng };
            workers.spawn(worker.run());
        }
        Running { stop, workers }
    }
}

impl Running {
    /// Begins no more calls, and waits for those under way.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(worker) = self.workers.join_next().await {
            worker??;
        }
        Ok(())
    }
}

struct Worker {
    kind: Kind,
    load: Load,
    stop: Arc<AtomicBool>,
    rng: ChaCha8Rng,
}

impl Worker {
    async fn run(mut self) -> Result<()> {
        while !self.is_over() {
            // A worker has a connection of its own.
            let client = client_of(&self.load.url, self.load.retry.clone())?;
            let mut calls = 0;
            while !self.is_over() && self.load.reconnect_after.is_none_or(|most| calls < most) {
                calls += 1;
                let failed = match self.kind {
                    Kind::Stream => self.stream(&client).await,
                    _ => self.call(&client).await,
                };
                if failed {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn dialogue(&mut self) -> usize {
        self.rng.random_range(0..self.load.judge.expected().dialogues.len())
    }

    /// One call; answers whether it failed.
    async fn call(&mut self, client: &Client) -> bool {
        let judge = Arc::clone(&self.load.judge);
        let began = Instant::now();
        let end = match self.kind {
            Kind::Rank => rank(client, &judge, self.dialogue()).await,
            Kind::Generate => {
                let dialogue = self.rng.random_range(0..judge.expected().prompts());
                draw(client, &judge, dialogue).await
            }
            kind => {
                let items = if kind == Kind::Batch { BATCH } else { 1 };
                let items = (0..items).map(|_| (self.dialogue(), self.rng.random_range(0..RESPONSES))).collect();
                score_items(client, &judge, items).await
            }
        };
        let failed = !matches!(end, End::Right);
        self.load.sink.take(Call { kind: self.kind, began, ended: Instant::now(), end });
        failed
    }

    /// A ScoreStream with some requests; answers whether it failed.
    async fn stream(&mut self, client: &Client) -> bool {
        /// After so many requests a stream ends and another begins.
        const REQUESTS: usize = 100;
        let (sender, receiver) = mpsc::channel(IN_FLIGHT);
        let mut open: HashMap<String, (Instant, usize, usize)> = HashMap::new();
        let (mut sent, mut sender) = (0, Some(sender));
        let mut answers = match client.score_stream(ReceiverStream::new(receiver)).await {
            Ok(answers) => answers,
            Err(error) => return self.fail(&[Instant::now()], error.into()),
        };
        loop {
            while let Some(requests) = sender.as_ref().filter(|_| open.len() < IN_FLIGHT) {
                if sent == REQUESTS || self.is_over() {
                    // Half closed: what is under way is still answered.
                    sender = None;
                    break;
                }
                let (dialogue, response) = (self.dialogue(), self.rng.random_range(0..RESPONSES));
                let items = vec![self.load.judge.expected().dialogues[dialogue].with(response)];
                let request_id = sent.to_string();
                open.insert(request_id.clone(), (Instant::now(), dialogue, response));
                sent += 1;
                // A closed stream says why where answers are read.
                let _ =
                    requests.send(v1::ScoreRequest { model: named(PM), items, request_id, ..Default::default() }).await;
            }
            if open.is_empty() && sender.is_none() {
                return false;
            }
            match next(&mut answers).await {
                Ok(answer) => {
                    let Some((began, dialogue, response)) = open.remove(&answer.request_id) else {
                        let what = format!("an answer to `{}`, which was not asked", answer.request_id);
                        return self.fail(&[Instant::now()], End::Wrong(what));
                    };
                    let end = check_score(&answer, &self.load.judge, began, &[(dialogue, response)]);
                    self.load.sink.take(Call { kind: Kind::Stream, began, ended: Instant::now(), end });
                }
                Err(error) => {
                    let began: Vec<Instant> = open.values().map(|(began, ..)| *began).collect();
                    return self.fail(&began, error.into());
                }
            }
        }
    }

    /// All of these have failed.
    fn fail(&self, began: &[Instant], end: End) -> bool {
        for &began in began {
            self.load.sink.take(Call { kind: self.kind, began, ended: Instant::now(), end: end.clone() });
        }
        true
    }
}

/// The next answer of a stream that must not end yet.
async fn next(answers: &mut Answers<v1::ScoreResponse>) -> Result<v1::ScoreResponse, Error> {
    let ended = || Error::Contract("the stream ended while requests were under way".to_owned());
    answers.next().await.unwrap_or_else(|| Err(ended()))
}

fn named(name: &str) -> Option<v1::ModelSpec> {
    Some(v1::ModelSpec { name: name.to_owned(), choice: None })
}

/// Scores responses to dialogues in one call.
pub(crate) async fn score_items(client: &Client, judge: &Judge, items: Vec<(usize, usize)>) -> End {
    let inputs = items.iter().map(|&(dialogue, response)| judge.expected().dialogues[dialogue].with(response));
    let request = v1::ScoreRequest { model: named(PM), items: inputs.collect(), ..Default::default() };
    let began = Instant::now();
    match client.score(request).await {
        Ok(answer) => check_score(&answer, judge, began, &items),
        Err(error) => error.into(),
    }
}

/// Checks an answer to the scoring of responses to dialogues.
pub(crate) fn check_score(answer: &v1::ScoreResponse, judge: &Judge, began: Instant, items: &[(usize, usize)]) -> End {
    if let Some(error) = &answer.error {
        let failure = plumb_client::ItemFailure::from(error);
        return End::Failed { code: failure.code, retry_after: None, message: failure.to_string() };
    }
    let mut found = Vec::with_capacity(items.len());
    for (&(dialogue, response), result) in items.iter().zip(&answer.results) {
        match score(result) {
            Ok(score) => found.push((dialogue, response, score.reward.to_bits())),
            Err(failure) => {
                return End::Failed { code: failure.code, retry_after: None, message: failure.to_string() };
            }
        }
    }
    if found.len() != items.len() {
        return End::Wrong(format!("{} results for {} items", found.len(), items.len()));
    }
    judge.rewards(answer.model.as_ref(), began, found.into_iter()).map_or_else(End::Wrong, |()| End::Right)
}

/// Ranks the responses to a dialogue.
async fn rank(client: &Client, judge: &Judge, dialogue: usize) -> End {
    let asked = &judge.expected().dialogues[dialogue];
    let candidate = |text: &String| v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(text.clone())) };
    let request = v1::RankRequest {
        model: named(PM),
        prompt: Some(asked.prompt()),
        candidates: asked.responses.iter().map(candidate).collect(),
        ..Default::default()
    };
    let began = Instant::now();
    let answer = match client.rank(request).await {
        Ok(answer) => answer,
        Err(error) => return error.into(),
    };
    let mut found = Vec::new();
    for ranked in &answer.ranked {
        let Some(score) = &ranked.score else {
            let failure = ranked.error.as_ref().map(plumb_client::ItemFailure::from);
            return failure.map_or_else(
                || End::Wrong("a candidate with neither a score nor an error".to_owned()),
                |failure| End::Failed { code: failure.code, retry_after: None, message: failure.to_string() },
            );
        };
        found.push((ranked.index as usize, score.reward));
    }
    if !found.is_sorted_by(|a, b| a.1 >= b.1) {
        return End::Wrong(format!("candidates are not in the order of their rewards: {found:?}"));
    }
    let found = found.into_iter().map(|(index, reward)| (dialogue, index, reward.to_bits()));
    judge.rewards(answer.model.as_ref(), began, found).map_or_else(End::Wrong, |()| End::Right)
}

/// Goes on behind the prompt of a dialogue.
async fn draw(client: &Client, judge: &Judge, dialogue: usize) -> End {
    let began = Instant::now();
    match generate(client, LM, &judge.expected().dialogues[dialogue]).await {
        Ok((identity, drawn)) => {
            judge.text(&identity, began, dialogue, &drawn).map_or_else(End::Wrong, |()| End::Right)
        }
        Err(error) => error.into(),
    }
}
