//! The thread that owns the device: takes commands, runs steps, hands back a few floats.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::LoadedModel;
use tokio::sync::{mpsc, oneshot};

use super::scheduler::{ModelKey, NewSequence, Plan, Scheduler, SequenceId, Slice, Want as Wanted, log_prob_rows};
use super::{EngineOptions, Finish, GenerateEvent, GenerateJob, Sequence, SequenceOutput, Speed, Want};
use crate::error::{Error, Result};
use crate::telemetry::events::{BatchRun, PrefixEvictions, QueueChanged};

/// What can be asked of the thread.
pub(super) enum Command {
    /// Make room for a model and try it out.
    Attach { key: ModelKey, model: Arc<LoadedModel>, name: (String, u64), reply: oneshot::Sender<Result<()>> },
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
    pool: rayon::ThreadPool,
    scheduler: Scheduler,
    devices: HashMap<ModelKey, Device>,
    callers: HashMap<SequenceId, Caller>,
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
            pool,
            devices: HashMap::new(),
            callers: HashMap::new(),
            evictions: 0,
        }
    }

    /// Runs until every handle of the engine is gone.
    pub(super) fn run(mut self) {
        while self.take_commands() {
            self.drop_unwanted();
            if let Some(plan) = self.scheduler.plan(Instant::now()) {
                self.run_plan(&plan);
            }
            self.report_queue();
        }
    }

    /// Takes what has come, and waits for something if there is nothing to do. False once nobody can ask any more.
    fn take_commands(&mut self) -> bool {
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

    fn take(&mut self, command: Command) {
        match command {
            Command::Attach { key, model, name, reply } => {
                let result = self.attach(key, model, name);
                if reply.send(result).is_err() {
                    self.detach(key);
                }
            }
            Command::Detach(key) => self.detach(key),
            Command::Run { sequence, reply } => self.add(Caller::Score { sequence, reply }),
            Command::Generate { job, events } => self.add(Caller::Generate { job, events, drawn: 0 }),
        }
    }

    /// Makes room and runs a few tokens, so that a model that cannot compute is never offered.
    fn attach(&mut self, key: ModelKey, model: Arc<LoadedModel>, name: (String, u64)) -> Result<()> {
        let pages = model.kv_pages;
        let mut device =
            Device { kv: model.decoder.kv_store(pages), workspace: model.decoder.workspace(), model, name };
        let tokens = [0u32];
        let read = match device.model.info.reward_head {
            Some(_) => Read::LastReward,
            None => Read::LogProbs { rows: 0..1, targets: &tokens },
        };
        let trial = Step { sequences: vec![StepSequence { tokens: &tokens, position: 0, pages: &[0], read }] };
        let values = run_guarded(&self.pool, &mut device, &trial)?;
        if values.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { what: format!("the trial score of {}", device.name.0) });
        }
        self.scheduler.add_model(key, pages);
        self.devices.insert(key, device);
        Ok(())
    }

    fn detach(&mut self, key: ModelKey) {
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
            self.scheduler.remove(id);
            self.callers.remove(&id);
        }
        for id in self.scheduler.expired(Instant::now()) {
            self.fail(id, Error::DeadlineExceeded);
        }
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        self.scheduler.remove(id);
        if let Some(caller) = self.callers.remove(&id) {
            caller.fail(error);
        }
    }

    fn run_plan(&mut self, plan: &Plan) {
        let started = Instant::now();
        let Some(device) = self.devices.get_mut(&plan.model) else { return };
        let mut step = Step::default();
        for slice in &plan.slices {
            let Some(entry) = self.scheduler.entry(slice.id) else { continue };
            let last = slice.positions.end == entry.tokens().len();
            step.sequences.push(StepSequence {
                tokens: &entry.tokens()[slice.positions.clone()],
                position: slice.positions.start,
                pages: entry.pages(),
                read: match entry.want() {
                    Wanted::Reward if last => Read::LastReward,
                    Wanted::Generate { .. } if last => Read::LastLogits,
                    Wanted::TokenRewards => Read::Rewards,
                    Wanted::LogProbs(range) => {
                        let rows = log_prob_rows(range, &slice.positions);
                        // The token after each row.
                        let first = slice.positions.start + 1;
                        Read::LogProbs { targets: &entry.tokens()[first + rows.start..first + rows.end], rows }
                    }
                    _ => Read::Nothing,
                },
            });
        }
        let values = run_guarded(&self.pool, device, &step);
        let duration = started.elapsed();
        let cached: usize = plan
            .slices
            .iter()
            .filter_map(|s| self.scheduler.entry(s.id).filter(|e| e.cached() == s.positions.start))
            .map(|e| e.cached())
            .sum();
        BatchRun {
            model: &device.name.0,
            version: device.name.1,
            sequences: plan.slices.len(),
            tokens: plan.tokens(),
            cached_tokens: cached,
            duration,
        }
        .emit();
        self.speed.record(plan.tokens(), duration);
        match values {
            Ok(values) => {
                for (slice, values) in plan.slices.iter().zip(values) {
                    self.deliver(slice, values);
                }
            }
            Err(error) => {
                // What the step has left in the cache cannot be trusted.
                for id in self.scheduler.reset(plan.model) {
                    if let Some(caller) = self.callers.remove(&id) {
                        caller.fail(error.clone());
                    }
                }
            }
        }
    }

    fn deliver(&mut self, slice: &Slice, values: Vec<f32>) {
        if values.iter().any(|v| v.is_nan()) {
            return self.fail(slice.id, Error::NonFinite { what: "a value that the model computed".into() });
        }
        let logits = matches!(self.scheduler.entry(slice.id).map(|e| e.want()), Some(Wanted::Generate { .. }));
        if logits {
            if !values.is_empty() {
                self.scheduler.complete(slice, Vec::new());
                self.draw(slice.id, values);
            }
            return;
        }
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

    /// Draws a token from a sequence's logits and sends it.
    fn draw(&mut self, id: SequenceId, mut logits: Vec<f32>) {
        let Some(Caller::Generate { job, events, drawn }) = self.callers.get_mut(&id) else { return };
        let token = match job.sampler.draw(&mut logits) {
            Ok((token, log_prob)) => {
                if *drawn == 0 {
                    let (cached_tokens, queued) = self.scheduler.entry(id).map_or((0, Default::default()), |e| {
                        (e.cached(), e.started().unwrap_or(e.arrived()).duration_since(e.arrived()))
                    });
                    drop(events.try_send(Ok(GenerateEvent::Started { cached_tokens, queued })));
                }
                *drawn += 1;
                drop(events.try_send(Ok(GenerateEvent::Token { id: token, log_prob })));
                token
            }
            Err(error) => return self.fail(id, error),
        };
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

/// Runs a step; a panic in it is an error, not the end of the thread.
fn run_guarded(pool: &rayon::ThreadPool, device: &mut Device, step: &Step<'_>) -> Result<Vec<Vec<f32>>> {
    let Device { model, kv, workspace, .. } = device;
    let result = catch_unwind(AssertUnwindSafe(|| pool.install(|| model.decoder.step(step, kv, workspace))));
    match result {
        Ok(result) => result.map_err(|error| Error::internal(error.to_string())),
        Err(_) => Err(Error::internal("a kernel panicked; the log has the details")),
    }
}
