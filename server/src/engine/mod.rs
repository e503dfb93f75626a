//! One thread owns the device; everything else talks to it through [`Engine`].
//!
//! Read [`scheduler`] first: it decides what runs. `worker` is the thread, `step` what it hands to the threads of
//! `compute`, [`sampling`] draws tokens.

mod compute;
pub mod sampling;
pub mod scheduler;
mod step;
mod worker;

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plumb_model::loaded::LoadedModel;
use tokio::sync::{mpsc, oneshot, watch};

pub use scheduler::Priority;

use crate::admission::Permit;
use crate::error::{Error, Result};
use compute::Compute;
use sampling::Sampler;
use scheduler::{Limits, ModelKey};
use worker::{Command, Worker};

/// How the engine runs.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Tokens in a step.
    pub max_batch_tokens: usize,
    /// Sequences in a step.
    pub max_batch_sequences: usize,
    /// Prompt tokens in a step that also decodes: what a decoding stream may have to wait for.
    pub max_prefill_beside_decode: usize,
    /// Part of the engine's time for sequences that are being generated while others wait, 0 to below 1.
    pub decode_share: f64,
    /// Sequences may use what others have computed.
    pub prefix_cache: bool,
    /// Threads that compute.
    pub threads: usize,
}

impl EngineOptions {
    fn limits(self) -> Limits {
        Limits {
            max_batch_tokens: self.max_batch_tokens.max(1),
            max_batch_sequences: self.max_batch_sequences.max(1),
            max_prefill_beside_decode: self.max_prefill_beside_decode.max(1),
            decode_share: self.decode_share,
            prefix_cache: self.prefix_cache,
        }
    }
}

/// What goes with every piece of work.
#[derive(Debug)]
pub struct JobMeta {
    /// How urgent it is.
    pub priority: Priority,
    /// When its answer is of no use any more.
    pub deadline: Option<Instant>,
    /// When it came.
    pub arrived: Instant,
    /// Leading tokens whose state is kept for as long as the model lives: the HHH prompt; 0 for none.
    pub pinned_prefix: usize,
    /// Held until the work is done; says whose it is, too.
    pub permit: Option<Permit>,
}

impl JobMeta {
    /// Whose it is, and what it counts for among the clients: `tokens`, unless admission has found out more.
    fn turn(&self, tokens: usize) -> (scheduler::Client, usize) {
        self.permit.as_ref().map_or((0, tokens), |permit| (permit.client_id(), permit.tokens()))
    }
}

/// What is wanted of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// The reward at the last token.
    Reward,
    /// The reward at every token.
    TokenRewards,
    /// Log-probabilities of the tokens in the range, each given everything before it; the range starts at 1 or later.
    LogProbs(Range<usize>),
}

/// A sequence to score.
#[derive(Debug)]
pub struct Sequence {
    /// The model.
    pub model: ModelHandle,
    /// Token ids; at least one.
    pub tokens: Vec<u32>,
    /// What is wanted.
    pub want: Want,
    /// The rest.
    pub meta: JobMeta,
}

/// A sequence's answer.
#[derive(Clone, Debug)]
pub struct SequenceOutput {
    /// What was wanted, in the order of the tokens.
    pub values: Vec<f32>,
    /// Tokens whose state was already there.
    pub cached_tokens: usize,
    /// From arrival to the first step.
    pub queued: Duration,
    /// When the first step began.
    pub started: Instant,
    /// When the last one ended.
    pub finished: Instant,
}

/// A sequence to continue.
#[derive(Debug)]
pub struct GenerateJob {
    /// The model.
    pub model: ModelHandle,
    /// Token ids; at least one.
    pub tokens: Vec<u32>,
    /// Draws the tokens.
    pub sampler: Sampler,
    /// Most tokens to draw; at least one.
    pub max_new_tokens: usize,
    /// End at an end-of-text token.
    pub stop_at_eos: bool,
    /// The rest.
    pub meta: JobMeta,
}

/// What happens to a sequence that is continued.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// The prompt is computed.
    Started {
        /// Tokens whose state was already there.
        cached_tokens: usize,
        /// From arrival to the first step.
        queued: Duration,
    },
    /// A token was drawn.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability under the model's own distribution, in nats.
        log_prob: f32,
    },
    /// No more tokens follow.
    Finished(Finish),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-text token.
    Eos,
    /// The most tokens that were asked for.
    Length,
}

/// The handle to the engine thread, which ends when the last handle is gone.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: std::sync::mpsc::Sender<Command>,
    alive: watch::Receiver<bool>,
    next_key: Arc<AtomicU64>,
}

/// A model that the engine can run. When the last handle is gone the engine gives its memory back.
#[derive(Clone, Debug)]
pub struct ModelHandle(Arc<Attached>);

#[derive(Debug)]
struct Attached {
    key: ModelKey,
    model: Arc<LoadedModel>,
    commands: std::sync::mpsc::Sender<Command>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        // The thread may have ended before.
        drop(self.commands.send(Command::Detach(self.key)));
    }
}

impl Deref for ModelHandle {
    type Target = LoadedModel;

    fn deref(&self) -> &LoadedModel {
        &self.0.model
    }
}

impl ModelHandle {
    fn key(&self) -> ModelKey {
        self.0.key
    }
}

impl Engine {
    /// Starts the thread and its pool.
    pub fn start(options: EngineOptions) -> Result<Engine> {
        let compute = Compute::start(options.threads)?;
        let (commands, receiver) = std::sync::mpsc::channel();
        let (alive_sender, alive) = watch::channel(true);
        let worker = Worker::new(options, receiver, compute);
        std::thread::Builder::new()
            .name("plumb-engine".into())
            .spawn(move || {
                // Dropping the sender tells of the thread's end, whatever ended it.
                let _alive = alive_sender;
                worker.run();
            })
            .map_err(|error| Error::internal(format!("cannot start the engine thread: {error}")))?;
        Ok(Engine { commands, alive, next_key: Arc::new(AtomicU64::new(1)) })
    }

    /// Makes room for a model and tries it out. `name` and `version` are for logs and metrics.
    pub async fn attach(&self, model: Arc<LoadedModel>, name: &str, version: u64) -> Result<ModelHandle> {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        // Taking gigabytes from the system would hold up the thread, and whoever it computes for.
        let owner = model.clone();
        let kv = tokio::task::spawn_blocking(move || owner.decoder.kv_store(owner.kv_pages));
        let kv = kv.await.map_err(|error| Error::internal(format!("cannot make room for keys and values: {error}")))?;
        let (reply, answer) = oneshot::channel();
        let model_and_cache = Box::new((model.clone(), kv));
        self.send(Command::Attach { key, model_and_cache, name: (name.into(), version), reply })?;
        answer.await.map_err(|_| Error::DeviceLost)??;
        Ok(ModelHandle(Arc::new(Attached { key, model, commands: self.commands.clone() })))
    }

    /// Puts a sequence into the queue at once; the answer is awaited by itself. Dropping it takes the sequence out.
    pub fn submit(&self, sequence: Sequence) -> Result<oneshot::Receiver<Result<SequenceOutput>>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Run { sequence, reply })?;
        Ok(answer)
    }

    /// Continues a sequence. Dropping the receiver ends it at the next step.
    pub fn generate(&self, job: GenerateJob) -> Result<mpsc::Receiver<Result<GenerateEvent>>> {
        // Room for every event, so that a slow reader never holds the engine up.
        let (events, receiver) = mpsc::channel(job.max_new_tokens + 3);
        self.send(Command::Generate { job: Box::new(job), events })?;
        Ok(receiver)
    }

    /// Turns to an error once the thread has ended.
    pub fn alive(&self) -> watch::Receiver<bool> {
        self.alive.clone()
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| Error::DeviceLost)
    }
}
