//! A step as it is handed to the threads that compute, or to a device beside them: everything that it needs goes along, so
//! that the engine's thread can plan on meanwhile.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use plumb_model::decoder::{Asked, Draw, Drawn, KvStore, Progress, Read, Step, StepSequence, Undrawn, Workspace};
use plumb_model::faults::{self, Fault};
use plumb_model::loaded::LoadedModel;
use plumb_model::parallel::for_each_piece;
use tokio::sync::watch;

use super::GenerateJob;
use super::sampling::{Sampler, undrawn};
use super::scheduler::{Entry, Slice, Want as Wanted, log_prob_rows};
use crate::error::{Error, Result};
use crate::telemetry::events::ModelMemory;

/// A model and its state on the device.
pub(super) struct Device {
    kv: KvStore,
    workspace: Workspace,
    /// Name and version.
    pub(super) name: (String, u64),
    /// Bytes of the workspace when they were last told.
    workspace_bytes: usize,
    /// Whether it computes beside the process, so that a step may be asked for while another one runs.
    pub(super) is_beside: bool,
    pub(super) model: Arc<LoadedModel>,
    /// Dropped last, when the memory is back.
    _held: watch::Sender<()>,
}

impl Device {
    /// `held` is closed when the memory is given back.
    pub(super) fn new(
        model: Arc<LoadedModel>,
        kv: KvStore,
        held: watch::Sender<()>,
        name: (String, u64),
        progress: Progress,
    ) -> Self {
        let (workspace, is_beside) = (model.decoder.workspace().counted(progress), model.decoder.computes_beside());
        Self { workspace, model, kv, name, workspace_bytes: 0, is_beside, _held: held }
    }

    /// Runs a token, over the first page: a model that cannot compute must not be offered.
    pub(super) fn try_out(&mut self) -> Result<()> {
        let tokens = [0u32];
        let read = match self.model.info.reward_head {
            Some(_) => Read::LastReward,
            None => Read::LogProbs { rows: 0..1, targets: &tokens },
        };
        let trial = Step { sequences: vec![StepSequence { tokens: &tokens, position: 0, pages: &[0], read }] };
        let asked = ask_guarded(self, &trial);
        let values = asked.and_then(collect_guarded).map_err(Error::internal)?;
        match values.iter().flatten().all(|v| v.is_finite()) {
            true => Ok(()),
            false => Err(Error::NonFinite { what: format!("the trial score of {}", self.name.0) }),
        }
    }

    /// Tells what the model takes, if that has changed.
    pub(super) fn report_memory(&mut self) {
        let workspace = self.workspace.bytes();
        if workspace != self.workspace_bytes {
            self.workspace_bytes = workspace;
            let cache = self.model.kv_pages * self.model.page_bytes;
            let resident = self.model.info.weight_bytes as usize + cache + workspace;
            self.memory(cache, resident).emit();
        }
    }

    /// Tells that the model takes nothing any more.
    pub(super) fn report_gone(&self) {
        self.memory(0, 0).emit();
    }

    fn memory(&self, cache: usize, resident: usize) -> ModelMemory<'_> {
        let device = if self.is_beside { "gpu" } else { "cpu" };
        ModelMemory { model: &self.name.0, version: self.name.1, device, cache, resident }
    }
}

/// What became of a step.
pub(super) struct Outcome {
    pub(super) device: Device,
    pub(super) inputs: Vec<Input>,
    /// Or what has failed, for the log and the caller whose input it is.
    pub(super) values: Result<Vec<Values>, String>,
    /// When the device was asked for it, and when it was done.
    pub(super) asked_at: Instant,
    pub(super) done_at: Instant,
}

/// What a slice has brought.
pub(super) enum Values {
    /// The values that were wanted of its tokens.
    Read(Vec<f32>),
    /// A token and its log-probability.
    Drawn(Result<(u32, f32)>),
}

impl Values {
    /// Whether none shows that a number was none.
    pub(super) fn are_finite(&self) -> bool {
        match self {
            Self::Read(values) => values.iter().all(|value| value.is_finite()),
            Self::Drawn(drawn) => !matches!(drawn, Err(Error::NonFinite { .. })),
        }
    }
}

/// A step that a device was asked for.
pub(super) struct Flight {
    pub(super) inputs: Vec<Input>,
    asked: Result<Asked, String>,
    pub(super) asked_at: Instant,
}

impl Flight {
    /// Asks for a step; a device that is not beside the process computes it here, on the current pool.
    pub(super) fn begin(device: &mut Device, inputs: Vec<Input>) -> Self {
        let asked_at = Instant::now();
        let step = Step { sequences: inputs.iter().map(Input::sequence).collect() };
        let asked = ask_guarded(device, &step);
        Self { inputs, asked, asked_at }
    }

    /// Whether tokens are to be drawn after it.
    pub(super) fn draws(&self) -> bool {
        self.inputs.iter().any(Input::draws)
    }

    /// Whether it has landed, so that [`Flight::end`] does not wait for it.
    pub(super) fn is_done(&self) -> bool {
        self.asked.as_ref().map_or(true, Asked::is_done)
    }

    /// Waits for the step, and draws the tokens that follow from it, on the current pool.
    pub(super) fn end(self, mut device: Device) -> Outcome {
        let Self { mut inputs, asked, asked_at } = self;
        let values = asked.and_then(|asked| {
            // Asked for before anything is waited for.
            let mut drawn = draw(&mut device, &mut inputs)?.into_iter();
            let of = |(input, values): (&Input, Vec<f32>)| match input.draws() {
                true => drawn.next().map_or(Values::Read(values), Values::Drawn),
                false => Values::Read(values),
            };
            Ok(inputs.iter().zip(collect_guarded(asked)?).map(of).collect())
        });
        Outcome { device, inputs, values, asked_at, done_at: Instant::now() }
    }
}

/// A token to be drawn.
#[derive(Default)]
struct Slot<'a> {
    /// `None` if nobody waits any more: then the draw tells only whether the logits are numbers.
    sampler: Option<&'a mut Sampler>,
    found: Option<Result<Drawn, Undrawn>>,
    /// What is not to be drawn again.
    drawn: Option<Result<(u32, f32)>>,
}

impl Slot<'_> {
    fn draw(&self, row: usize) -> Draw<'_> {
        match &self.sampler {
            Some(sampler) => sampler.draw(row),
            None => Draw { row, temperature: 0.0, ..Draw::default() },
        }
    }

    fn look(&mut self) {
        let Some(found) = self.found.take() else { return };
        self.drawn = match &mut self.sampler {
            Some(sampler) => {
                let drawn = catch_unwind(AssertUnwindSafe(|| sampler.look_at(found)));
                drawn.unwrap_or_else(|_| Err(Error::internal("the sampler panicked"))).transpose()
            }
            None => Some(found.map(|drawn| (drawn.token, drawn.log_prob)).map_err(undrawn)),
        };
    }
}

/// Draws the tokens that follow a step, again where samplers want it. They take theirs only once all are drawn.
fn draw(device: &mut Device, inputs: &mut [Input]) -> Result<Vec<Result<(u32, f32)>>, String> {
    let Device { model, workspace, .. } = device;
    let drawing = inputs.iter_mut().filter(|input| input.draws());
    let samplers = drawing.map(|input| input.job.as_mut().map(|job| &mut job.sampler));
    let mut slots: Vec<_> = samplers.map(|sampler| Slot { sampler, ..Slot::default() }).collect();
    loop {
        let waiting = slots.iter().enumerate().filter(|(_, slot)| slot.drawn.is_none());
        let draws: Vec<Draw<'_>> = waiting.map(|(row, slot)| slot.draw(row)).collect();
        if draws.is_empty() {
            break;
        }
        let drawn = guarded(|| model.decoder.draw(&draws, workspace).map_err(|error| error.to_string()))?;
        let mut drawn = drawn.into_iter();
        slots.iter_mut().filter(|slot| slot.drawn.is_none()).for_each(|slot| slot.found = drawn.next());
        // On all threads: whether a string is banned takes the text so far.
        let each: Vec<_> = slots.iter_mut().map(Mutex::new).collect();
        for_each_piece(each.len(), 1, |at| each[at.start].lock().unwrap_or_else(PoisonError::into_inner).look());
    }
    for slot in &mut slots {
        if let (Some(sampler), Some(Ok((token, _)))) = (&mut slot.sampler, &slot.drawn) {
            sampler.take(*token);
        }
    }
    Ok(slots.into_iter().filter_map(|slot| slot.drawn).collect())
}

/// A slice of a sequence, independent of the scheduler, which plans on while the slice runs.
pub(super) struct Input {
    /// From the slice's first token on; one more where its probability is wanted.
    tokens: Vec<u32>,
    len: usize,
    position: usize,
    pages: Vec<u32>,
    read: InputRead,
    /// Draws the next token, if one follows.
    pub(super) job: Option<Box<GenerateJob>>,
}

/// As [`Read`].
enum InputRead {
    Nothing,
    LastReward,
    Rewards,
    Draw,
    LogProbs(Range<usize>),
}

impl Input {
    pub(super) fn new(entry: &Entry, slice: &Slice) -> Self {
        let Range { start, end } = slice.positions;
        let last = end == entry.tokens().len();
        let read = match entry.want() {
            Wanted::Reward if last => InputRead::LastReward,
            Wanted::Generate { .. } if last => InputRead::Draw,
            Wanted::TokenRewards => InputRead::Rewards,
            Wanted::LogProbs(range) => InputRead::LogProbs(log_prob_rows(range, &slice.positions)),
            _ => InputRead::Nothing,
        };
        let tokens = entry.tokens()[start..(end + 1).min(entry.tokens().len())].to_vec();
        Self { tokens, len: end - start, position: start, pages: entry.pages().to_vec(), read, job: None }
    }

    /// Whether a token is to be drawn after the slice.
    pub(super) fn draws(&self) -> bool {
        matches!(self.read, InputRead::Draw)
    }

    fn sequence(&self) -> StepSequence<'_> {
        let read = match &self.read {
            InputRead::Nothing => Read::Nothing,
            InputRead::LastReward => Read::LastReward,
            InputRead::Rewards => Read::Rewards,
            InputRead::Draw => Read::Draw,
            // The token after each row.
            InputRead::LogProbs(rows) => {
                Read::GreedyLogProbs { rows: rows.clone(), targets: &self.tokens[rows.start + 1..rows.end + 1] }
            }
        };
        StepSequence { tokens: &self.tokens[..self.len], position: self.position, pages: &self.pages, read }
    }
}

fn ask_guarded(device: &mut Device, step: &Step<'_>) -> Result<Asked, String> {
    let Device { model, kv, workspace, .. } = device;
    guarded(|| {
        inject_faults(step)?;
        model.decoder.ask(step, kv, workspace).map_err(|error| error.to_string())
    })
}

fn collect_guarded(asked: Asked) -> Result<Vec<Vec<f32>>, String> {
    guarded(|| asked.collect().map_err(|error| error.to_string()))
}

/// A panic is an error, not the end of the thread.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("a kernel panicked".into()))
}

/// Fails as a device would, where a test asks for it.
#[expect(clippy::panic, reason = "a panic is what is asked for")]
fn inject_faults(step: &Step<'_>) -> Result<(), String> {
    let computes = |fault| {
        faults::asked(fault)
            .is_some_and(|id| step.sequences.iter().any(|s| s.tokens.iter().any(|t| u64::from(*t) == id)))
    };
    if let Some(millis) = faults::asked(Fault::StuckEngine) {
        std::thread::sleep(Duration::from_millis(millis));
    }
    if computes(Fault::KernelError) {
        return Err("a kernel failed on demand".into());
    }
    if computes(Fault::KernelPanic) {
        panic!("a kernel panics on demand");
    }
    Ok(())
}
