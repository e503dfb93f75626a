//! The thread that owns the device: takes commands, runs steps, hands back a few floats.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use plumb_model::decoder::KvStore;
use plumb_model::loaded::LoadedModel;
use tokio::sync::{mpsc, oneshot, watch};

use super::compute::Compute;
use super::scheduler::cost::Cost;
use super::scheduler::{ModelKey, NewSequence, Plan, Scheduler, SequenceId, Slice, Want as Wanted};
use super::step::{Device, Flight, Input, Outcome, Values};
use super::watchdog::Pulse;
use super::{EngineOptions, Finish, GenerateEvent, GenerateJob, Loss, Sequence, SequenceOutput, Want};
use crate::error::{Error, Result};
use crate::telemetry::events::{BatchFailed, BatchRun, InputIsolated, PrefixEvictions, QueueChanged};

/// What can be asked of the thread.
pub(super) enum Command {
    /// Make room for a model and try it out.
    Attach {
        key: ModelKey,
        model_and_cache: Box<(Arc<LoadedModel>, KvStore, watch::Sender<()>)>,
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

/// Who waits for a sequence.
enum Caller {
    Score {
        sequence: Sequence,
        reply: oneshot::Sender<Result<SequenceOutput>>,
    },
    /// The job is away while its next token is computed.
    Generate {
        job: Option<Box<GenerateJob>>,
        events: mpsc::Sender<Result<GenerateEvent>>,
        drawn: usize,
    },
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

/// A step that is to run.
struct Next {
    plan: Plan,
    /// Where the device was asked for it already.
    flight: Option<Flight>,
}

impl Next {
    fn planned(plan: Plan) -> Self {
        Self { plan, flight: None }
    }
}

pub(super) struct Worker {
    commands: Receiver<Command>,
    pulse: Pulse,
    compute: Arc<Compute>,
    scheduler: Scheduler,
    callers: HashMap<SequenceId, Caller>,
    /// The step after the one that runs, if it is certain.
    next: Option<Next>,
    /// When the last one was done.
    done_at: Instant,
    /// What came meanwhile and has to wait for the device.
    postponed: VecDeque<Command>,
    evictions: u64,
    /// What was last told of the queue: sequences and tokens that wait.
    waiting: (usize, usize),
    /// Dropped last, after all that holds a model too: then it is told that the memory is back.
    devices: HashMap<ModelKey, Device>,
}

impl Worker {
    pub(super) fn new(options: EngineOptions, commands: Receiver<Command>, pulse: Pulse, compute: Compute) -> Self {
        Self {
            scheduler: Scheduler::new(options.limits()),
            commands,
            pulse,
            compute: Arc::new(compute),
            devices: HashMap::new(),
            callers: HashMap::new(),
            next: None,
            done_at: Instant::now(),
            postponed: VecDeque::new(),
            evictions: 0,
            waiting: (0, 0),
        }
    }

    /// Runs until every handle of the engine is gone, or the device is; answers why.
    pub(super) fn run(&mut self) -> Loss {
        while self.take_commands() {
            if let Err(loss) = self.turn() {
                return loss;
            }
        }
        Loss::Died
    }

    /// Runs a step, if there is one.
    fn turn(&mut self) -> Result<(), Loss> {
        self.pulse.beat();
        self.drop_unwanted();
        if let Some(next) = self.next.take().or_else(|| self.scheduler.plan(Instant::now()).map(Next::planned)) {
            self.run_step(next)?;
        }
        self.report_queue();
        Ok(())
    }

    /// Takes what has come, and waits for something if there is nothing to do. False once nobody can ask any more.
    fn take_commands(&mut self) -> bool {
        // Models come and go only while nothing is in flight.
        if self.next.as_ref().is_some_and(|next| next.flight.is_some()) {
            self.take_sequences();
            return true;
        }
        while let Some(command) = self.postponed.pop_front() {
            self.pulse.beat();
            self.take(command);
        }
        loop {
            let command = if self.scheduler.is_empty() {
                self.pulse.rest();
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
            self.pulse.beat();
            self.take(command);
        }
    }

    /// Takes sequences in while a step runs; everything else waits, in its order. Answers whether any came.
    fn take_sequences(&mut self) -> bool {
        let mut came = false;
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Run { .. } | Command::Generate { .. } if self.postponed.is_empty() => {
                    self.take(command);
                    came = true;
                }
                command => self.postponed.push_back(command),
            }
        }
        came
    }

    /// Prepares the next step while one runs.
    fn prepare(&mut self) {
        self.take_sequences();
        self.plan_ahead();
    }

    /// Plans the next step, if it is certain. A device beside the process is asked for it at once, unless a command waits
    /// until that has nothing to do.
    fn plan_ahead(&mut self) {
        let next = self.next.take().or_else(|| self.scheduler.plan_ahead(Instant::now()).map(Next::planned));
        self.next = match self.postponed.is_empty() {
            true => next.map(|next| self.ask(next)),
            false => next,
        };
    }

    /// Asks for a step if the device is one beside the process; any other computes it when its turn has come.
    fn ask(&mut self, Next { plan, flight }: Next) -> Next {
        if flight.is_some() || !self.devices.get(&plan.model).is_some_and(|device| device.is_beside) {
            return Next { plan, flight };
        }
        let inputs = self.inputs(&plan);
        let flight = self.devices.get_mut(&plan.model).map(|device| Flight::begin(device, inputs));
        Next { plan, flight }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Attach { key, model_and_cache, name, reply } => {
                let (model, kv, held) = *model_and_cache;
                let result = self.attach(key, Device::new(model, kv, held, name, self.pulse.progress.clone()));
                if reply.send(result).is_err() {
                    self.detach(key);
                }
            }
            Command::Detach(key) => self.detach(key),
            Command::Run { sequence, reply } => self.add(Caller::Score { sequence, reply }),
            Command::Generate { job, events } => self.add(Caller::Generate { job: Some(job), events, drawn: 0 }),
        }
    }

    /// Takes a model in, once it has been tried out.
    fn attach(&mut self, key: ModelKey, mut device: Device) -> Result<()> {
        let (pages, cost) = (device.model.kv_pages, Cost::of(device.model.decoder.config()));
        let tried = move || (device.try_out(), device);
        let (result, mut device) = self.compute.run(tried, || {})?;
        result?;
        device.report_memory();
        self.scheduler.add_model(key, pages, cost);
        self.devices.insert(key, device);
        Ok(())
    }

    fn detach(&mut self, key: ModelKey) {
        self.next.take_if(|next| next.plan.model == key);
        for id in self.scheduler.remove_model(key) {
            if let Some(caller) = self.callers.remove(&id) {
                caller.fail(Error::Cancelled);
            }
        }
        if let Some(device) = self.devices.remove(&key) {
            device.report_gone();
        }
    }

    fn add(&mut self, mut caller: Caller) {
        let (client, work) = match &caller {
            Caller::Score { sequence, .. } => sequence.meta.turn(sequence.tokens.len()),
            Caller::Generate { job: None, .. } => return,
            Caller::Generate { job: Some(job), .. } => job.meta.turn(job.tokens.len() + job.max_new_tokens),
        };
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
                client,
                work,
            },
            Caller::Generate { job: None, .. } => return,
            Caller::Generate { job: Some(job), .. } => NewSequence {
                model: job.model.key(),
                want: Wanted::Generate { max_new_tokens: job.max_new_tokens },
                tokens: std::mem::take(&mut job.tokens),
                priority: job.meta.priority,
                deadline: job.meta.deadline,
                arrived: job.meta.arrived,
                pinned_prefix: job.meta.pinned_prefix,
                client,
                work,
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
        if matches!(error, Error::NonFinite { .. }) {
            self.scheduler.distrust(id);
        }
        if let Some(caller) = self.callers.remove(&id) {
            caller.fail(error);
        }
        self.forget(id);
    }

    /// Takes out a sequence that nobody waits for. One that is in the next step stays until that has run: others may
    /// count on what it will leave in the cache.
    fn forget(&mut self, id: SequenceId) {
        if self.next.iter().flat_map(|next| &next.plan.slices).all(|slice| slice.id != id) {
            self.scheduler.remove(id);
        }
    }

    /// Runs a step, and prepares the next one meanwhile.
    fn run_step(&mut self, step: Next) -> Result<(), Loss> {
        let Next { plan, flight } = self.ask(step);
        // What is drawn decides what comes next.
        if let Some(flight) = flight.as_ref().filter(|flight| !flight.draws()) {
            self.wait_for(flight);
        }
        let Some(mut device) = self.devices.remove(&plan.model) else { return Ok(()) };
        let flight = flight.ok_or_else(|| self.inputs(&plan));
        let run = move || flight.unwrap_or_else(|inputs| Flight::begin(&mut device, inputs)).end(device);
        let compute = Arc::clone(&self.compute);
        let outcome = compute.run(run, || self.prepare()).map_err(|_| Loss::Died)?;
        self.land(&plan, outcome)
    }

    /// What a step computes with.
    fn inputs(&mut self, plan: &Plan) -> Vec<Input> {
        let mut inputs = Vec::with_capacity(plan.slices.len());
        for slice in &plan.slices {
            // A sequence in a plan stays until the plan has run.
            let Some(entry) = self.scheduler.entry(slice.id) else { continue };
            let mut input = Input::new(entry, slice);
            if let (true, Some(Caller::Generate { job, .. })) = (input.draws(), self.callers.get_mut(&slice.id)) {
                input.job = job.take();
            }
            inputs.push(input);
        }
        inputs
    }

    /// Gives jobs back to whom they were taken from, if somebody waits for them still.
    fn give_back(&mut self, plan: &Plan, inputs: Vec<Input>) {
        for (slice, input) in plan.slices.iter().zip(inputs) {
            if let Some(Caller::Generate { job, .. }) = self.callers.get_mut(&slice.id)
                && input.job.is_some()
            {
                *job = input.job;
            }
        }
    }

    /// Waits for a step that a device computes beside the process, and asks for the next one as soon as it is certain.
    fn wait_for(&mut self, flight: &Flight) {
        self.prepare();
        while !flight.is_done() {
            match self.take_sequences() {
                true => self.plan_ahead(),
                false => std::thread::yield_now(),
            }
        }
    }

    /// Hands out what became of a step.
    fn land(&mut self, plan: &Plan, outcome: Outcome) -> Result<(), Loss> {
        let Outcome { mut device, inputs, values, asked_at, done_at } = outcome;
        // One that was asked for while another ran began when that was done.
        let duration = done_at.duration_since(asked_at.max(self.done_at));
        self.done_at = done_at;
        device.report_memory();
        self.give_back(plan, inputs);
        let ended = match values {
            Ok(values) => {
                self.report_step(plan, &device, duration);
                self.devices.insert(plan.model, device);
                plan.slices.iter().zip(values).for_each(|(slice, values)| self.deliver(slice, values));
                Ok(())
            }
            Err(cause) => self.isolate(plan, device, &cause),
        };
        self.scheduler.ran(plan, duration);
        ended
    }

    /// A step has failed: its sequences begin again in smaller groups, until one fails alone. That one is at fault if
    /// the device still computes something else; if it does not, the device is lost.
    fn isolate(&mut self, plan: &Plan, mut device: Device, cause: &str) -> Result<(), Loss> {
        let (model, version) = device.name.clone();
        BatchFailed { model: &model, version, sequences: plan.slices.len(), rerun: plan.rerun, cause }.emit();
        // What the step has left in the cache cannot be trusted, nor what builds on it. What is in flight behind it lands
        // before anything that is asked for from now on.
        let dropped = self.next.take_if(|next| next.plan.model == plan.model);
        for slice in dropped.iter().map(|dropped| &dropped.plan).chain([plan]).flat_map(|plan| &plan.slices) {
            if !self.callers.contains_key(&slice.id) {
                self.scheduler.remove(slice.id);
            }
        }
        if let Some(Next { plan, flight: Some(flight) }) = dropped {
            self.give_back(&plan, flight.inputs);
        }
        let guilty = self.scheduler.failed(plan);
        if let Some(id) = guilty {
            // Nobody has pages now, so the trial writes over nothing.
            let tried = move || (device.try_out(), device);
            let (works, tried) = self.compute.run(tried, || {}).map_err(|_| Loss::Died)?;
            device = tried;
            if works.is_err() {
                self.devices.insert(plan.model, device);
                return Err(Loss::Broken);
            }
            InputIsolated { model: &model, version }.emit();
            self.fail(id, Error::internal(format!("{cause}; the fault was isolated to this input")));
        }
        self.devices.insert(plan.model, device);
        Ok(())
    }

    fn report_step(&self, plan: &Plan, device: &Device, duration: Duration) {
        BatchRun {
            model: &device.name.0,
            version: device.name.1,
            sequences: plan.slices.len(),
            tokens: plan.tokens(),
            prefixes: plan.prefixes,
            rerun: plan.rerun,
            duration,
        }
        .emit();
    }

    /// Hands out what a step has computed for a slice.
    fn deliver(&mut self, slice: &Slice, values: Values) {
        let finite = values.are_finite();
        match (values, self.callers.get(&slice.id)) {
            (_, None) => {
                if !finite {
                    self.scheduler.distrust(slice.id);
                }
                self.forget(slice.id);
            }
            (Values::Read(_), Some(_)) if !finite => {
                self.fail(slice.id, Error::NonFinite { what: "a value that the model computed".into() });
            }
            (Values::Read(values), Some(Caller::Score { .. })) => self.deliver_values(slice, values),
            (Values::Drawn(drawn), Some(_)) => {
                self.scheduler.complete(slice, Vec::new());
                match drawn {
                    Ok((token, log_prob)) => self.send_token(slice.id, token, log_prob),
                    Err(error) => self.fail(slice.id, error),
                }
            }
            // A part of a prompt.
            (Values::Read(_), Some(Caller::Generate { .. })) => {}
        }
    }

    fn deliver_values(&mut self, slice: &Slice, values: Vec<f32>) {
        if !self.scheduler.complete(slice, values) {
            return;
        }
        let (Some(entry), Some(Caller::Score { sequence, reply })) =
            (self.scheduler.remove(slice.id), self.callers.remove(&slice.id))
        else {
            return;
        };
        let started = entry.started().unwrap_or_else(Instant::now);
        let (cached_tokens, queued) = (entry.cached(), started.duration_since(entry.arrived()));
        let (values, greedy) = match sequence.want {
            // Each with whether it is the likeliest.
            Want::LogProbs(_) => entry.into_values().chunks_exact(2).map(|pair| (pair[0], pair[1] == 1.0)).unzip(),
            Want::Reward | Want::TokenRewards => (entry.into_values(), Vec::new()),
        };
        let output = SequenceOutput { values, greedy, cached_tokens, queued, started, finished: Instant::now() };
        // Before the answer: who calls again because of it finds the room.
        if let Some(permit) = sequence.meta.permit {
            permit.finish();
        }
        // The caller may have gone meanwhile.
        drop(reply.send(Ok(output)));
    }

    /// Sends a sequence's next token, and ends it if that was the last one.
    fn send_token(&mut self, id: SequenceId, token: u32, log_prob: f32) {
        let Some(Caller::Generate { job: Some(job), events, drawn }) = self.callers.get_mut(&id) else { return };
        if let Some(permit) = &mut job.meta.permit {
            permit.prompt_is_done();
            permit.token_is_drawn();
        }
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
        let before = std::mem::replace(&mut self.waiting, self.scheduler.waiting());
        QueueChanged { before, now: self.waiting }.emit();
        let evictions = self.scheduler.evictions();
        if evictions > self.evictions {
            PrefixEvictions { pages: evictions - self.evictions }.emit();
        }
        self.evictions = evictions;
    }
}

#[cfg(test)]
mod tests;
