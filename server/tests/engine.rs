//! The engine under mixes of requests: a result never depends on what else there is to do, nor on the cache, nor on what
//! fails beside it.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures::future::join_all;
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::Source;
use plumb_model::decoder::Device;
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions, LoadedModel, ModelKind};
use plumb_server::engine::sampling::{Sampler, SamplingParams};
use plumb_server::engine::{
    Engine, EngineOptions, GenerateEvent, GenerateJob, JobMeta, ModelHandle, Priority, Sequence, Want,
};
use plumb_server::error::Error;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Between them: both kinds of head, windows, soft caps, grouped heads, biases; and how many shards each is split into.
const MODELS: [(&str, DTypeChoice, usize); 4] = [
    ("gemma2-pm", DTypeChoice::Bf16, 2),
    ("llama-pm", DTypeChoice::F32, 1),
    ("llama-lm", DTypeChoice::Bf16, 1),
    ("qwen2-lm", DTypeChoice::F32, 2),
];
/// In no vocabulary: a step that holds it fails as a whole.
const UNKNOWN: u32 = 1_000_000;
/// Longest sequence: a prefix, what follows it, and what is generated.
const LONGEST: usize = 200 + 60 + 8;

fn load((name, dtype, device): (&str, DTypeChoice, Device), kv_cache_bytes: usize) -> Arc<LoadedModel> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    let source = Source { model: folder.to_str().unwrap().to_owned(), ..Source::default() };
    let options = LoadOptions {
        dtype,
        hhh: Arc::default(),
        max_input_tokens: None,
        kv_cache_bytes,
        device,
        background: Background::default(),
    };
    Arc::new(LoadedModel::load(&source, &options).unwrap())
}

/// The models on some device.
struct Models {
    roomy: Vec<Arc<LoadedModel>>,
    /// With room for one and a half of the longest sequences: something is evicted all the time.
    tight: Vec<Arc<LoadedModel>>,
}

impl Models {
    fn on(device: impl Fn() -> Device) -> Self {
        let split = |shards| match shards {
            1 => device(),
            _ => Device::split((0..shards).map(|_| device()).collect()).unwrap(),
        };
        let models = || MODELS.map(|(name, dtype, shards)| (name, dtype, split(shards)));
        let roomy = Vec::from(models().map(|model| load(model, 8 << 20)));
        let pages = LONGEST.div_ceil(PAGE) * 3 / 2;
        let tight = models().into_iter().zip(&roomy).map(|(model, roomy)| load(model, pages * roomy.page_bytes));
        Self { tight: tight.collect(), roomy }
    }
}

static ON_CPU: LazyLock<Models> = LazyLock::new(|| Models::on(|| Device::Cpu));

/// What is wanted of a request, whatever the kind of its model.
#[derive(Clone, Copy, Debug)]
enum Goal {
    Last,
    All,
    Generate { temperature: f32 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cancelled {
    No,
    AtOnce,
    Later,
}

#[derive(Clone, Debug)]
struct Request {
    model: usize,
    goal: Goal,
    tokens: Vec<u32>,
    pinned_prefix: usize,
    priority: Priority,
    cancelled: Cancelled,
}

fn requests() -> impl Strategy<Value = Request> {
    let goals = vec![
        Goal::Last,
        Goal::Last,
        Goal::All,
        Goal::Generate { temperature: 0.0 },
        Goal::Generate { temperature: 1.0 },
    ];
    let cancelled = vec![Cancelled::No, Cancelled::No, Cancelled::No, Cancelled::AtOnce, Cancelled::Later];
    let priorities = vec![Priority::Low, Priority::Normal, Priority::High];
    (
        (
            0..MODELS.len(),
            prop::sample::select(goals),
            prop::sample::select(priorities),
            prop::sample::select(cancelled),
        ),
        // One of three texts that many begin with, and what is a request's own.
        (0u32..3, 0usize..200, prop::collection::vec(0u32..250, 1..60), any::<bool>()),
        prop_oneof![6 => Just(None), 1 => (0usize..1000).prop_map(Some)],
    )
        .prop_map(|((model, goal, priority, cancelled), (text, shared, own, pinned), poison)| {
            let mut tokens: Vec<_> = (0..shared as u32).map(|i| (i * 7 + text * 31) % 250).chain(own).collect();
            if let Some(at) = poison {
                let at = at % tokens.len();
                tokens[at] = UNKNOWN;
            }
            let pinned_prefix = if pinned && shared > 150 { shared } else { 0 };
            Request { model, goal, tokens, pinned_prefix, priority, cancelled }
        })
}

fn options() -> impl Strategy<Value = (EngineOptions, bool)> {
    (prop::sample::select(vec![48, 300, 4096]), 1usize..9, 0usize..2, 1usize..3, any::<bool>(), any::<bool>()).prop_map(
        |(max_batch_tokens, max_batch_sequences, share, threads, prefix_cache, tight)| {
            let decode_share = share as f64 * 0.5;
            let options = EngineOptions {
                max_batch_tokens,
                max_batch_sequences,
                max_prefill_beside_decode: 40,
                decode_share,
                prefix_cache,
                threads,
                stall_timeout: Duration::from_secs(60),
            };
            (options, tight)
        },
    )
}

/// The bits of everything that is answered, or `None` for a request that was cancelled.
async fn answer(model: ModelHandle, request: &Request) -> Option<Result<Vec<u32>, Error>> {
    let Request { goal, tokens, priority, pinned_prefix, .. } = request.clone();
    let meta = JobMeta { priority, deadline: None, arrived: Instant::now(), pinned_prefix, permit: None };
    let language = model.info.kind == ModelKind::Language;
    let want = match goal {
        Goal::Generate { temperature } if language => {
            let params = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
            let sampler = Sampler::new(params, &tokens, model.clone()).unwrap();
            let job = GenerateJob { model, tokens, sampler, max_new_tokens: 8, stop_at_eos: false, meta };
            let mut events = job.start().unwrap();
            let mut bits = Vec::new();
            loop {
                if request.cancelled == Cancelled::AtOnce || (request.cancelled == Cancelled::Later && bits.len() > 4) {
                    return None;
                }
                match events.recv().await.unwrap() {
                    Ok(GenerateEvent::Started { .. }) => {}
                    Ok(GenerateEvent::Token { id, log_prob }) => bits.extend([id, log_prob.to_bits()]),
                    Ok(GenerateEvent::Finished(_)) => return Some(Ok(bits)),
                    Err(error) => return Some(Err(error)),
                }
            }
        }
        Goal::Last | Goal::Generate { .. } if language => Want::LogProbs(tokens.len() - 1..tokens.len()),
        Goal::Last | Goal::Generate { .. } => Want::Reward,
        Goal::All if language => Want::LogProbs(1..tokens.len()),
        Goal::All => Want::TokenRewards,
    };
    // A language model says nothing about a first token.
    if matches!(&want, Want::LogProbs(range) if range.is_empty() || range.start == 0) {
        return None;
    }
    let pending = Sequence { model, tokens, want, meta }.submit().unwrap();
    match request.cancelled {
        Cancelled::No => {
            let output = pending.await.unwrap();
            Some(output.map(|output| output.values.iter().map(|value| value.to_bits()).collect()))
        }
        Cancelled::AtOnce => None,
        Cancelled::Later => {
            tokio::task::yield_now().await;
            drop(pending);
            None
        }
    }
}

async fn attach(engine: &Engine, models: &[Arc<LoadedModel>]) -> Vec<ModelHandle> {
    join_all(models.iter().map(async |model| engine.attach(model.clone(), "model", 1).await.unwrap())).await
}

/// On an engine that has seen nothing and does nothing else.
async fn alone(models: &Models, request: &Request) -> Option<Result<Vec<u32>, Error>> {
    let options = EngineOptions {
        max_batch_tokens: 4096,
        max_batch_sequences: 1,
        max_prefill_beside_decode: 4096,
        decode_share: 0.0,
        prefix_cache: false,
        threads: 1,
        stall_timeout: Duration::from_secs(60),
    };
    let engine = Engine::start(options).unwrap();
    let model = attach(&engine, &models.roomy[request.model..=request.model]).await.remove(0);
    answer(model, request).await
}

#[test]
fn every_result_has_the_bits_of_the_request_alone_on_a_fresh_engine() {
    check_mixes(&ON_CPU, 48, 24);
}

/// Where the next step is asked for while one runs.
#[test]
#[cfg(feature = "emulated")]
fn every_result_on_a_gpu_has_the_bits_of_the_request_alone_on_a_fresh_engine() {
    // An emulated one takes long.
    check_mixes(&Models::on(|| Device::emulated().invariant()), 4, 8);
}

fn check_mixes(models: &Models, cases: u32, most_requests: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() };
    let mixes = (options(), prop::collection::vec(requests(), 1..most_requests));
    let checked = TestRunner::new(config).run(&mixes, |((options, tight), requests)| {
        runtime.block_on(async {
            let engine = Engine::start(options).unwrap();
            let attached = attach(&engine, if tight { &models.tight } else { &models.roomy }).await;
            // Twice: at first nothing is cached, then whatever is left.
            for round in 0..2 {
                let answers = requests.iter().map(|request| answer(attached[request.model].clone(), request));
                for (request, found) in requests.iter().zip(join_all(answers).await) {
                    if let Some(found) = &found {
                        let is_poisoned = request.tokens.contains(&UNKNOWN);
                        prop_assert!(found.is_err() == is_poisoned, "round {}, {:?}: {:?}", round, request, found);
                        prop_assert!(
                            Some(found) == alone(models, request).await.as_ref(),
                            "round {}, {:?}",
                            round,
                            request
                        );
                    }
                }
            }
            Ok(())
        })
    });
    checked.unwrap();
}

#[tokio::test]
async fn models_of_two_engines_are_asked_in_their_own_and_one_loss_is_that_of_both() {
    let options = EngineOptions {
        max_batch_tokens: 4096,
        max_batch_sequences: 4,
        max_prefill_beside_decode: 4096,
        decode_share: 0.0,
        prefix_cache: true,
        threads: 1,
        stall_timeout: Duration::from_secs(60),
    };
    let first = Engine::start(options).unwrap();
    let second = first.start_beside(options).unwrap();
    let request = Request {
        model: 1,
        goal: Goal::All,
        tokens: (0..70).collect(),
        pinned_prefix: 0,
        priority: Priority::Normal,
        cancelled: Cancelled::No,
    };
    let expected = alone(&ON_CPU, &request).await;
    let mut models = Vec::new();
    for engine in [&first, &second] {
        models.extend(attach(engine, &ON_CPU.roomy[1..2]).await);
    }
    let answers = join_all(models.iter().map(|model| answer(model.clone(), &request))).await;
    assert_eq!(answers, [expected.clone(), expected]);
    let mut lost = first.lost();
    assert_eq!(*lost.borrow(), None);
    models.truncate(1);
    drop(second);
    lost.wait_for(Option::is_some).await.unwrap();
}
