//! The thread that owns the device: takes commands, runs steps, hands back a few floats.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::LoadedModel;
use rayon::prelude::*;
use tokio::sync::{mpsc, oneshot};

use super::scheduler::cost::Cost;
use super::scheduler::{
    Entry, ModelKey, NewSequence, Plan, Scheduler, SequenceId, Slice, Want as Wanted, log_prob_rows,
};
use super::{EngineOptions, Finish, GenerateEvent, GenerateJob, Sequence, SequenceOutput, Speed, Want};
use crate::error::{Error, Result};
use crate::telemetry::events::{BatchRun, ModelMemory, PrefixEvictions, QueueChanged};

/// What can be asked of the thread.
pub(super) enum Command {
    /// Make room for a model and try it out.
    Attach {
        key: ModelKey,
        model_and_cache: Box<(Arc<LoadedModel>, KvStore)>,
        name: (String, u64),
        reply: oneshot::Sender<Result<()>>,
    },
    /// Nobody holds the model any more.
    Detach(ModelKey),
    /// Run a sequence.
    Run { sequence: Sequence, reply: oneshot::Sender<Result<SequenceOutput>> },
    /// Generate text.
    Generate { job: Box<GenerateJob>, events: mpsc::Sender<Result<GenerateEvent>> },
}

/// A model and its state on the device.
struct Device {
    model: Arc<LoadedModel>,
    kv: KvStore,
    workspace: Workspace,
    name: (String, u64),
    /// Bytes of the workspace when they were last told.
    workspace_bytes: usize,
}

impl Device {
    /// Tells what the model takes, if that has changed.
    fn report_memory(&mut self) {
        let workspace = self.workspace.bytes();
        if workspace != self.workspace_bytes {
            self.workspace_bytes = workspace;
            let cache = self.model.kv_pages * self.model.page_bytes;
            let resident = self.model.info.weight_bytes as usize + cache + workspace;
            ModelMemory { model: &self.name.0, version: self.name.1, cache, resident }.emit();
        }
    }
}

/// Who waits for a sequence.
enum Caller {
    Score { sequence: Sequence, reply: oneshot::Sender<Result<SequenceOutput>> },
    Generate { job: Box<GenerateJob>, events: mpsc::Sender<Result<GenerateEvent>>, drawn: usize },
}

impl Caller {
    fn gone(&self) -> bool {
        match self {
            Caller::Score { reply, .. } => reply.is_closed(),
            Caller::Generate { events, .. } => events.is_closed(),
        }
    }

    fn fail(self, error: Error) {
        // A caller that has gone does not hear it.
        match self {
            Caller::Score { reply, .. } => drop(reply.send(Err(error))),
            Caller::Generate { events, .. } => drop(events.try_send(Err(error))),
        }
    }
}

pub(super) struct Worker {
    commands: Receiver<Command>,
    speed: Arc<Speed>,
    pool: Arc<rayon::ThreadPool>,
    scheduler: Scheduler,
    devices: HashMap<ModelKey, Device>,
    callers: HashMap<SequenceId, Caller>,
    /// The step that was planned while the last one ran.
    prepared: Option<Plan>,
    /// What came meanwhile and has to wait for the device.
    postponed: VecDeque<Command>,
    evictions: u64,
}

impl Worker {
    pub(super) fn new(
        options: EngineOptions,
        commands: Receiver<Command>,
        speed: Arc<Speed>,
        pool: rayon::ThreadPool,
    ) -> Self {
        Self {
            scheduler: Scheduler::new(options.limits()),
            commands,
            speed,
            pool: Arc::new(pool),
            devices: HashMap::new(),
            callers: HashMap::new(),
            prepared: None,
            postponed: VecDeque::new(),
            evictions: 0,
        }
    }

    /// Runs until every handle of the engine is gone.
    pub(super) fn run(mut self) {
        while self.take_commands() {
            self.drop_unwanted();
            if let Some(plan) = self.prepared.take().or_else(|| self.scheduler.plan(Instant::now())) {
                self.run_plan(&plan);
            }
            self.report_queue();
        }
    }

    /// Takes what has come, and waits for something if there is nothing to do. False once nobody can ask any more.
    fn take_commands(&mut self) -> bool {
        while let Some(command) = self.postponed.pop_front() {
            self.take(command);
        }
        loop {
            let command = if self.scheduler.is_empty() {
                match self.commands.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return !self.scheduler.is_empty(),
                }
            };
            self.take(command);
        }
    }

    /// Plans the next step while one runs. Sequences are taken in; everything else waits, in its order.
    fn prepare(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Run { .. } | Command::Generate { .. } if self.postponed.is_empty() => self.take(command),
                command => self.postponed.push_back(command),
            }
        }
        self.prepared = self.scheduler.plan_ahead(Instant::now());
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Attach { key, model_and_cache, name, reply } => {
                let (model, kv) = *model_and_cache;
                let result = self.attach(key, model, kv, name);
                if reply.send(result).is_err() {
                    self.detach(key);
                }
            }
            Command::Detach(key) => self.detach(key),
            Command::Run { sequence, reply } => self.add(Caller::Score { sequence, reply }),
            Command::Generate { job, events } => self.add(Caller::Generate { job, events, drawn: 0 }),
        }
    }

    /// Runs a few tokens, so that a model that cannot compute is never offered.
    fn attach(&mut self, key: ModelKey, model: Arc<LoadedModel>, kv: KvStore, name: (String, u64)) -> Result<()> {
        let (pages, cost) = (model.kv_pages, Cost::of(model.decoder.config()));
        let workspace = model.decoder.workspace();
        let mut device = Device { model, kv, workspace, name, workspace_bytes: 0 };
        let tokens = [0u32];
        let read = match device.model.info.reward_head {
            Some(_) => Read::LastReward,
            None => Read::LogProbs { rows: 0..1, targets: &tokens },
        };
        let trial = Step { sequences: vec![StepSequence { tokens: &tokens, position: 0, pages: &[0], read }] };
        let values = self.pool.install(|| run_guarded(&mut device, &trial))?;
        if values.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { what: format!("the trial score of {}", device.name.0) });
        }
        device.report_memory();
        self.scheduler.add_model(key, pages, cost);
        self.devices.insert(key, device);
        Ok(())
    }

    fn detach(&mut self, key: ModelKey) {
        self.prepared.take_if(|plan| plan.model == key);
        for id in self.scheduler.remove_model(key) {
            if let Some(caller) = self.callers.remove(&id) {
                caller.fail(Error::Cancelled);
            }
        }
        self.devices.remove(&key);
    }

    fn add(&mut self, mut caller: Caller) {
        let new = match &mut caller {
            Caller::Score { sequence, .. } => NewSequence {
                model: sequence.model.key(),
                want: match &sequence.want {
                    Want::Reward => Wanted::Reward,
                    Want::TokenRewards => Wanted::TokenRewards,
                    Want::LogProbs(range) if range.start == 0 || range.end > sequence.tokens.len() => {
                        return caller.fail(Error::internal("log-probabilities of tokens that have no context"));
                    }
                    Want::LogProbs(range) => Wanted::LogProbs(range.clone()),
                },
                tokens: std::mem::take(&mut sequence.tokens),
                priority: sequence.meta.priority,
                deadline: sequence.meta.deadline,
                arrived: sequence.meta.arrived,
                pinned_prefix: sequence.meta.pinned_prefix,
            },
            Caller::Generate { job, .. } => NewSequence {
                model: job.model.key(),
                want: Wanted::Generate { max_new_tokens: job.max_new_tokens },
                tokens: std::mem::take(&mut job.tokens),
                priority: job.meta.priority,
                deadline: job.meta.deadline,
                arrived: job.meta.arrived,
                pinned_prefix: job.meta.pinned_prefix,
            },
        };
        match self.scheduler.add(new) {
            Ok(id) => drop(self.callers.insert(id, caller)),
            Err(new) => {
                let message = format!("{} tokens do not fit the model's cache", new.tokens.len());
                caller.fail(Error::invalid("", message));
            }
        }
    }

    /// Forgets sequences that nobody waits for, and answers those whose deadline has passed.
    fn drop_unwanted(&mut self) {
        let gone: Vec<_> = self.callers.iter().filter(|(_, caller)| caller.gone()).map(|(id, _)| *id).collect();
        for id in gone {
            self.callers.remove(&id);
            self.forget(id);
        }
        for id in self.scheduler.expired(Instant::now()) {
            self.fail(id, Error::DeadlineExceeded);
        }
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        if let Some(caller) = self.callers.remove(&id) {
            caller.fail(error);
        }
        self.forget(id);
    }

    /// Takes out a sequence that nobody waits for. One that is in the prepared step stays until that has run: others may
    /// count on what it will leave in the cache.
    fn forget(&mut self, id: SequenceId) {
        if self.prepared.iter().flat_map(|plan| &plan.slices).all(|slice| slice.id != id) {
            self.scheduler.remove(id);
        }
    }

    fn run_plan(&mut self, plan: &Plan) {
        let Some(mut device) = self.devices.remove(&plan.model) else { return };
        let input = |slice: &Slice| self.scheduler.entry(slice.id).map(|entry| Input::new(entry, slice));
        // A sequence in a plan stays until the plan has run.
        let inputs: Vec<Input> = plan.slices.iter().filter_map(input).collect();
        let step = Step { sequences: inputs.iter().map(Input::sequence).collect() };
        let pool = Arc::clone(&self.pool);
        let started = Instant::now();
        let mut result = None;
        pool.in_place_scope(|scope| {
            scope.spawn(|_| result = Some((run_guarded(&mut device, &step), started.elapsed())));
            self.prepare();
        });
        let (values, duration) = result.unwrap_or_else(|| (Err(Error::DeviceLost), started.elapsed()));
        BatchRun {
            model: &device.name.0,
            version: device.name.1,
            sequences: plan.slices.len(),
            tokens: plan.tokens(),
            prefixes: plan.prefixes,
            duration,
        }
        .emit();
        self.speed.record(plan.tokens(), duration);
        device.report_memory();
        self.devices.insert(plan.model, device);
        match values {
            Ok(values) => self.deliver_all(plan, values),
            Err(error) => {
                // What the step has left in the cache cannot be trusted, nor what builds on it.
                self.prepared.take_if(|prepared| prepared.model == plan.model);
                for id in self.scheduler.reset(plan) {
                    if let Some(caller) = self.callers.remove(&id) {
                        caller.fail(error.clone());
                    }
                }
            }
        }
        self.scheduler.ran(plan, duration);
    }

    /// Hands out what a step has computed. Tokens are drawn on all threads: each takes a pass over a vocabulary.
    fn deliver_all(&mut self, plan: &Plan, values: Vec<Vec<f32>>) {
        let mut drawing = Vec::new();
        for (slice, values) in plan.slices.iter().zip(values) {
            match self.callers.get_mut(&slice.id) {
                Some(Caller::Generate { .. }) if values.is_empty() => {}
                Some(Caller::Generate { .. }) => {
                    self.scheduler.complete(slice, Vec::new());
                    if let Some(caller) = self.callers.remove(&slice.id) {
                        drawing.push((slice.id, caller, values));
                    }
                }
                Some(Caller::Score { .. }) => self.deliver(slice, values),
                None => self.forget(slice.id),
            }
        }
        let draw = |(id, mut caller, mut logits): (SequenceId, Caller, Vec<f32>)| {
            let drawn = match &mut caller {
                Caller::Generate { job, .. } => job.sampler.draw(&mut logits),
                Caller::Score { .. } => Err(Error::internal("logits that nobody asked for")),
            };
            (id, caller, drawn)
        };
        let drawn: Vec<_> = match drawing.len() {
            0 | 1 => drawing.into_iter().map(draw).collect(),
            _ => self.pool.install(|| drawing.into_par_iter().map(draw).collect()),
        };
        for (id, caller, drawn) in drawn {
            self.callers.insert(id, caller);
            match drawn {
                Ok((token, log_prob)) => self.send_token(id, token, log_prob),
                Err(error) => self.fail(id, error),
            }
        }
    }

    fn deliver(&mut self, slice: &Slice, values: Vec<f32>) {
        if values.iter().any(|v| !v.is_finite()) {
            return self.fail(slice.id, Error::NonFinite { what: "a value that the model computed".into() });
        }
        if !self.scheduler.complete(slice, values) {
            return;
        }
        let (Some(entry), Some(Caller::Score { sequence: _held, reply })) =
            (self.scheduler.remove(slice.id), self.callers.remove(&slice.id))
        else {
            return;
        };
        let started = entry.started().unwrap_or_else(Instant::now);
        let output = SequenceOutput {
            cached_tokens: entry.cached(),
            queued: started.duration_since(entry.arrived()),
            started,
            finished: Instant::now(),
            values: entry.into_values(),
        };
        // The caller may have gone meanwhile.
        drop(reply.send(Ok(output)));
    }

    /// Sends a sequence's next token, and ends it if that was the last one.
    fn send_token(&mut self, id: SequenceId, token: u32, log_prob: f32) {
        let Some(Caller::Generate { job, events, drawn }) = self.callers.get_mut(&id) else { return };
        if *drawn == 0 {
            let (cached_tokens, queued) = self.scheduler.entry(id).map_or((0, Default::default()), |e| {
                (e.cached(), e.started().unwrap_or(e.arrived()).duration_since(e.arrived()))
            });
            drop(events.try_send(Ok(GenerateEvent::Started { cached_tokens, queued })));
        }
        *drawn += 1;
        drop(events.try_send(Ok(GenerateEvent::Token { id: token, log_prob })));
        let finish = if job.stop_at_eos && job.model.text.eos_ids().contains(&token) {
            Some(Finish::Eos)
        } else if *drawn >= job.max_new_tokens {
            Some(Finish::Length)
        } else {
            None
        };
        match finish {
            None => self.scheduler.push_token(id, token),
            Some(finish) => {
                drop(events.try_send(Ok(GenerateEvent::Finished(finish))));
                self.scheduler.remove(id);
                self.callers.remove(&id);
            }
        }
    }

    fn report_queue(&mut self) {
        let (sequences, tokens) = self.scheduler.waiting();
        QueueChanged { sequences, tokens }.emit();
        let evictions = self.scheduler.evictions();
        if evictions > self.evictions {
            PrefixEvictions { pages: evictions - self.evictions }.emit();
        }
        self.evictions = evictions;
    }
}

/// A slice of a sequence, independent of the scheduler, which plans on while the slice runs.
struct Input {
    /// From the slice's first token on; one more where its probability is wanted.
    tokens: Vec<u32>,
    len: usize,
    position: usize,
    pages: Vec<u32>,
    read: InputRead,
}

/// As [`Read`].
enum InputRead {
    Nothing,
    LastReward,
    Rewards,
    LastLogits,
    LogProbs(Range<usize>),
}

impl Input {
    fn new(entry: &Entry, slice: &Slice) -> Self {
        let Range { start, end } = slice.positions;
        let last = end == entry.tokens().len();
        let read = match entry.want() {
            Wanted::Reward if last => InputRead::LastReward,
            Wanted::Generate { .. } if last => InputRead::LastLogits,
            Wanted::TokenRewards => InputRead::Rewards,
            Wanted::LogProbs(range) => InputRead::LogProbs(log_prob_rows(range, &slice.positions)),
            _ => InputRead::Nothing,
        };
        let tokens = entry.tokens()[start..(end + 1).min(entry.tokens().len())].to_vec();
        Self { tokens, len: end - start, position: start, pages: entry.pages().to_vec(), read }
    }

    fn sequence(&self) -> StepSequence<'_> {
        let read = match &self.read {
            InputRead::Nothing => Read::Nothing,
            InputRead::LastReward => Read::LastReward,
            InputRead::Rewards => Read::Rewards,
            InputRead::LastLogits => Read::LastLogits,
            // The token after each row.
            InputRead::LogProbs(rows) => {
                Read::LogProbs { rows: rows.clone(), targets: &self.tokens[rows.start + 1..rows.end + 1] }
            }
        };
        StepSequence { tokens: &self.tokens[..self.len], position: self.position, pages: &self.pages, read }
    }
}

/// Runs a step on the current pool; a panic in it is an error, not the end of the thread.
fn run_guarded(device: &mut Device, step: &Step<'_>) -> Result<Vec<Vec<f32>>> {
    let Device { model, kv, workspace, .. } = device;
    match catch_unwind(AssertUnwindSafe(|| model.decoder.step(step, kv, workspace))) {
        Ok(result) => result.map_err(|error| Error::internal(error.to_string())),
        Err(_) => Err(Error::internal("a kernel panicked; the log has the details")),
    }
}
