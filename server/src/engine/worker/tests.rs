//! The order in which steps are asked for and collected. The CPU stands in for a device beside the process: it has
//! computed a step when it was asked for it, but the worker collects what came of it only in its turn.

use std::path::Path;
use std::sync::mpsc::{Sender, channel};

use plumb_model::checkpoint::Source;
use plumb_model::decoder;
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions};
use tokio::sync::oneshot::Receiver as Answer;

use super::*;
use crate::engine::sampling::{Sampler, SamplingParams};
use crate::engine::{Attached, JobMeta, ModelHandle, Priority};

/// Tokens of every sequence. Each fills a step.
const LENGTH: usize = 64;
/// In no vocabulary: a step that holds it fails.
const UNKNOWN: u32 = 1_000_000;

/// A worker that a test takes through its turns.
struct Bench {
    worker: Worker,
    commands: Sender<Command>,
    model: ModelHandle,
    /// Open as long as the worker has the model.
    held: watch::Receiver<()>,
}

impl Bench {
    /// With one model, on a device that is beside the process or not.
    fn new(name: &str, is_beside: bool) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
        let source = Source { model: folder.to_str().unwrap().to_owned(), ..Source::default() };
        let options = LoadOptions {
            dtype: DTypeChoice::F32,
            hhh: Arc::default(),
            max_input_tokens: None,
            kv_cache_bytes: 8 << 20,
            device: decoder::Device::Cpu,
            background: Background::default(),
        };
        let model = Arc::new(LoadedModel::load(&source, &options).unwrap());
        let cost = Cost::of(model.decoder.config()).slice(0..LENGTH);
        let options = EngineOptions {
            max_batch_tokens: cost,
            max_batch_sequences: 4,
            max_prefill_beside_decode: cost,
            decode_share: 0.0,
            prefix_cache: true,
            threads: 1,
            stall_timeout: Duration::from_secs(60),
        };
        let (commands, receiver) = channel();
        let mut worker = Worker::new(options, receiver, Pulse::default(), Compute::start(1).unwrap());
        let (gone, held) = watch::channel(());
        let kv = model.decoder.kv_store(model.kv_pages).unwrap();
        let (reply, _attached) = oneshot::channel();
        let model_and_cache = Box::new((model.clone(), kv, gone));
        worker.take(Command::Attach { key: 1, model_and_cache, name: ("model".into(), 1), reply });
        worker.devices.get_mut(&1).unwrap().is_beside = is_beside;
        let attached = Attached { key: 1, gone: held.clone(), commands: commands.clone() };
        Self { worker, commands, model: ModelHandle { model, attached: Arc::new(attached) }, held }
    }

    fn meta() -> JobMeta {
        JobMeta { priority: Priority::Normal, deadline: None, arrived: Instant::now(), pinned_prefix: 0, permit: None }
    }

    /// Sends sequences of which nobody knows the beginning of another.
    fn score(&self, seeds: impl IntoIterator<Item = u32>) -> Vec<Answer<Result<SequenceOutput>>> {
        let submit = |seed| {
            let sequence =
                Sequence { model: self.model.clone(), tokens: tokens(seed), want: Want::Reward, meta: Self::meta() };
            sequence.submit().unwrap()
        };
        seeds.into_iter().map(submit).collect()
    }

    fn turn(&mut self) {
        assert!(self.worker.take_commands());
        self.worker.turn().unwrap();
    }

    fn finish(&mut self) {
        while !self.worker.scheduler.is_empty() {
            self.turn();
        }
        assert!(self.worker.callers.is_empty() && self.worker.next.is_none());
    }

    fn flight(&self) -> Option<&Flight> {
        self.worker.next.as_ref()?.flight.as_ref()
    }
}

fn tokens(seed: u32) -> Vec<u32> {
    (0..LENGTH as u32).map(|i| if seed == UNKNOWN && i == 9 { UNKNOWN } else { (i * 7 + seed * 31) % 250 }).collect()
}

/// The bits of the reward, if it was handed out without an error.
fn bits(answer: &mut Answer<Result<SequenceOutput>>) -> Option<u32> {
    Some(answer.try_recv().ok()?.ok()?.values[0].to_bits())
}

/// Rewards on a device that is not beside the process.
fn expected(seeds: impl IntoIterator<Item = u32>) -> Vec<Option<u32>> {
    let mut bench = Bench::new("llama-pm", false);
    let mut answers = bench.score(seeds);
    while !bench.worker.scheduler.is_empty() || !answers.iter().all(|answer| !answer.is_empty()) {
        bench.turn();
        assert!(bench.flight().is_none(), "nothing is asked for ahead of its turn");
    }
    answers.iter_mut().map(bits).collect()
}

#[test]
fn the_next_step_is_asked_for_before_the_last_one_is_collected() {
    let mut bench = Bench::new("llama-pm", true);
    let mut answers = bench.score(0..4);
    let expected = expected(0..4);
    for (turn, in_flight) in [true, true, true, false].into_iter().enumerate() {
        bench.turn();
        let asked_before = bench.flight().map(|next| next.asked_at < bench.worker.done_at);
        assert_eq!(asked_before, in_flight.then_some(true), "turn {turn}");
        let there: Vec<bool> = answers.iter().map(|answer| !answer.is_empty()).collect();
        assert_eq!(there, [0, 1, 2, 3].map(|i| i <= turn), "turn {turn}");
    }
    assert_eq!(answers.iter_mut().map(bits).collect::<Vec<_>>(), expected);
    bench.finish();
}

#[test]
fn a_step_behind_one_that_fails_is_dropped_and_its_sequences_begin_again() {
    let generate = |bench: &Bench| {
        let (model, tokens) = (bench.model.clone(), tokens(5));
        let params = SamplingParams { seed: 3, ..SamplingParams::default() };
        let sampler = Sampler::new(params, &tokens, model.clone()).unwrap();
        let meta = Bench::meta();
        GenerateJob { model, tokens, sampler, max_new_tokens: 6, stop_at_eos: false, meta }.start().unwrap()
    };
    let tokens = |events: &mut mpsc::Receiver<Result<GenerateEvent>>| {
        let events = std::iter::from_fn(|| events.try_recv().ok());
        let token = |event| if let GenerateEvent::Token { id, .. } = event { Some(id) } else { None };
        events.filter_map(|event| token(event.unwrap())).collect::<Vec<_>>()
    };
    let mut alone = Bench::new("llama-lm", false);
    let mut undisturbed = generate(&alone);
    alone.turn();
    alone.finish();
    let expected = tokens(&mut undisturbed);
    assert_eq!(expected.len(), 6);

    let mut bench = Bench::new("llama-lm", true);
    let ids = self::tokens(UNKNOWN);
    let want = Want::LogProbs(1..ids.len());
    let poisoned = Sequence { model: bench.model.clone(), tokens: ids, want, meta: Bench::meta() };
    let mut poisoned = poisoned.submit().unwrap();
    // Its job is away when the step is dropped that would have drawn its first token.
    let mut events = generate(&bench);
    bench.worker.take_commands();
    let plan = bench.worker.scheduler.plan(Instant::now()).unwrap();
    let first = bench.worker.ask(Next::planned(plan));
    bench.worker.plan_ahead();
    assert!(bench.flight().is_some_and(Flight::draws));
    bench.worker.run_step(first).unwrap();
    assert!(bench.worker.next.is_none());
    bench.finish();
    assert!(poisoned.try_recv().unwrap().unwrap_err().to_string().contains("isolated to this input"));
    assert_eq!(tokens(&mut events), expected);
}

#[test]
fn who_goes_while_a_step_is_in_flight_changes_nothing_for_others() {
    let mut bench = Bench::new("llama-pm", true);
    let mut answers = bench.score(0..4);
    let expected = expected(0..4);
    bench.turn();
    assert!(bench.flight().is_some());
    drop(answers.remove(1));
    bench.turn();
    bench.finish();
    let found: Vec<_> = answers.iter_mut().map(bits).collect();
    assert_eq!(found, [expected[0], expected[2], expected[3]]);
}

#[test]
fn a_model_goes_only_when_nothing_of_it_is_in_flight() {
    let mut bench = Bench::new("llama-pm", true);
    let mut answers = bench.score(0..4);
    bench.turn();
    bench.commands.send(Command::Detach(1)).unwrap();
    bench.turn();
    assert!(bits(&mut answers[1]).is_some() && bench.flight().is_none(), "what was in flight has landed");
    let Bench { mut worker, commands, model, held } = bench;
    assert!(held.has_changed().is_ok());
    drop((commands, model));
    assert!(!worker.take_commands(), "nobody is left who could ask");
    assert!(worker.devices.is_empty() && held.has_changed().is_err());
    assert_eq!(answers[2].try_recv().unwrap().unwrap_err(), Error::Cancelled);
}
