//! One thread owns a device, or several that share models; everything else talks to it through [`Engine`].
//!
//! Read [`scheduler`] first: it decides what runs. `worker` is the thread, `step` what it hands to the threads of
//! `compute`, [`sampling`] draws tokens, `watchdog` sees when all that gets no further.

mod compute;
pub mod sampling;
pub mod scheduler;
mod step;
mod watchdog;
mod worker;

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plumb_model::loaded::{Background, LoadedModel};
use tokio::sync::{mpsc, oneshot, watch};

pub use scheduler::Priority;

use crate::admission::Permit;
use crate::error::{Error, Result};
use compute::Compute;
use sampling::Sampler;
use scheduler::{Limits, ModelKey};
use watchdog::Pulse;
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
    /// How long the thread may get no further, not by a layer, before it counts as stuck.
    pub stall_timeout: Duration,
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
    /// With [`Want::LogProbs`], whether greedy decoding takes each of the tokens after everything before it.
    pub greedy: Vec<bool>,
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

/// Why the engine cannot compute any more. Only a new process helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its thread has ended.
    Died,
    /// The device fails whatever it is given.
    Broken,
    /// It got no further for too long.
    Stuck,
}

/// Tells of an engine's loss, whoever sees it first.
#[derive(Clone, Debug)]
struct Losses(Arc<watch::Sender<Option<Loss>>>);

impl Losses {
    fn tell(&self, loss: Loss) {
        self.0.send_if_modified(|told| {
            let is_first = told.is_none();
            told.get_or_insert(loss);
            is_first
        });
    }
}

/// Tells of the end of the engine's thread when dropped, so of a panic too.
struct End {
    losses: Losses,
    loss: Loss,
}

impl Drop for End {
    fn drop(&mut self) {
        self.losses.tell(self.loss);
    }
}

/// The handle to the engine thread, which ends when the last handle is gone.
#[derive(Clone, Debug)]
pub struct Engine {
    commands: std::sync::mpsc::Sender<Command>,
    losses: Losses,
    next_key: Arc<AtomicU64>,
}

/// A model that the engine can run. When the last handle is gone the engine gives its memory back.
#[derive(Clone, Debug)]
pub struct ModelHandle {
    /// Dropped first: when the engine is told that nobody has a handle, nobody but itself has the model.
    model: Arc<LoadedModel>,
    attached: Arc<Attached>,
}

#[derive(Debug)]
struct Attached {
    key: ModelKey,
    gone: watch::Receiver<()>,
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
        &self.model
    }
}

impl ModelHandle {
    fn key(&self) -> ModelKey {
        self.attached.key
    }

    /// Tells when the model's memory is given back, which takes that nobody has a handle.
    pub(crate) fn gone(&self) -> Gone {
        Gone(self.attached.gone.clone())
    }
}

/// Tells when a model's memory is given back, or the engine has ended.
pub(crate) struct Gone(watch::Receiver<()>);

impl Gone {
    pub(crate) async fn wait(mut self) {
        // Nothing is ever sent.
        let _closed = self.0.changed().await;
    }
}

impl Engine {
    /// Starts the thread, its pool and its watchdog.
    pub fn start(options: EngineOptions) -> Result<Engine> {
        Self::start_with(options, Losses(Arc::new(watch::Sender::new(None))))
    }

    /// Starts another one, for another device. The loss of either is that of both.
    pub fn start_beside(&self, options: EngineOptions) -> Result<Engine> {
        Self::start_with(options, self.losses.clone())
    }

    fn start_with(options: EngineOptions, losses: Losses) -> Result<Engine> {
        let compute = Compute::start(options.threads)?;
        let (commands, receiver) = std::sync::mpsc::channel();
        let pulse = Pulse::default();
        let (watched, ended) = std::sync::mpsc::channel();
        let worker = Worker::new(options, receiver, pulse.clone(), compute);
        let (watching, end) = (losses.clone(), End { losses: losses.clone(), loss: Loss::Died });
        spawn("plumb-engine", move || {
            let _watched = watched;
            // The end is told before the memory is given back, which takes its time.
            let (mut worker, mut end) = (worker, end);
            end.loss = worker.run();
        })?;
        spawn("plumb-watchdog", move || {
            watchdog::watch(&pulse, options.stall_timeout, &ended, || watching.tell(Loss::Stuck));
        })?;
        Ok(Engine { commands, losses, next_key: Arc::new(AtomicU64::new(1)) })
    }

    /// Makes room for a model and tries it out. `name` and `version` are for logs and metrics.
    pub async fn attach(&self, model: Arc<LoadedModel>, name: &str, version: u64) -> Result<ModelHandle> {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        // Taking gigabytes from the system would hold up the thread, and whoever it computes for.
        let owner = model.clone();
        let kv = move || Background::ONE.run(|| owner.decoder.kv_store(owner.kv_pages));
        let kv = tokio::task::spawn_blocking(kv);
        let kv =
            kv.await.map_err(|error| Error::internal(format!("cannot make room for keys and values: {error}")))??;
        let (reply, answer) = oneshot::channel();
        let (held, gone) = watch::channel(());
        let model_and_cache = Box::new((model.clone(), kv, held));
        send(&self.commands, Command::Attach { key, model_and_cache, name: (name.into(), version), reply })?;
        answer.await.map_err(|_| Error::DeviceLost)??;
        let attached = Attached { key, gone, commands: self.commands.clone() };
        Ok(ModelHandle { model, attached: Arc::new(attached) })
    }

    /// Tells when the engine is lost.
    pub fn lost(&self) -> watch::Receiver<Option<Loss>> {
        self.losses.0.subscribe()
    }
}

impl Sequence {
    /// Puts it into its model's queue at once; the answer is awaited by itself. Dropping it takes the sequence out.
    pub fn submit(self) -> Result<oneshot::Receiver<Result<SequenceOutput>>> {
        let (reply, answer) = oneshot::channel();
        let commands = self.model.attached.commands.clone();
        send(&commands, Command::Run { sequence: self, reply })?;
        Ok(answer)
    }
}

impl GenerateJob {
    /// Puts it into its model's queue. Dropping the receiver ends it at the next step.
    pub fn start(self) -> Result<mpsc::Receiver<Result<GenerateEvent>>> {
        // Room for every event, so that a slow reader never holds the engine up.
        let (events, receiver) = mpsc::channel(self.max_new_tokens + 3);
        let commands = self.model.attached.commands.clone();
        send(&commands, Command::Generate { job: Box::new(self), events })?;
        Ok(receiver)
    }
}

fn send(commands: &std::sync::mpsc::Sender<Command>, command: Command) -> Result<()> {
    commands.send(command).map_err(|_| Error::DeviceLost)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(run);
    spawned.map(drop).map_err(|error| Error::internal(format!("cannot start the thread {name}: {error}")))
}
