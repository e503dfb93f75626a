//! Gradients are those that Transformers computes, whatever the type, the threads and the way there.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where it fails")]

mod common;

use common::{devices, fixtures};
use plumb_kernels::gradient::AdamW;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::{Activation, Config, Head, RewardHead};
use plumb_model::decoder::gradient::{
    Group, Language, Numbers, Outcome, Parameter, Parameters, Sequence, TrainOptions, Trainable,
};
use plumb_model::decoder::{DType, Device};
use serde_json::Value;

const PLAIN: TrainOptions = TrainOptions { language_head: false, checkpointing: false };

fn read(name: &str) -> (Config, Parameters, Vec<f32>) {
    let model = fixtures().join(name).to_str().unwrap().to_owned();
    let Checkpoint { config, mut weights, .. } = Checkpoint::open(&Source { model, ..Source::default() }).unwrap();
    let parameters = Parameters::new(&config, false);
    let values = parameters.read(&mut weights).unwrap();
    weights.finish().unwrap();
    (config, parameters, values)
}

fn softplus(x: f32) -> f32 {
    x.exp().ln_1p()
}

/// Chosen and rejected.
struct Pair([Vec<u32>; 2]);

impl Pair {
    fn sequence(&self, side: usize, reward: bool) -> Sequence<'_> {
        let tokens = &self.0[side][..];
        let rows = 0..tokens.len() - 1;
        let language = match reward {
            true => Language::Nothing,
            false => Language::Next { weight: 1.0 / rows.len() as f32, rows },
        };
        Sequence { tokens, reward, language }
    }

    fn groups(&self, reward: bool, shared: bool) -> Vec<Group<'_>> {
        let sequences = [0, 1].map(|side| self.sequence(side, reward));
        match shared {
            true => vec![Group { sequences: sequences.to_vec() }],
            false => sequences.map(|sequence| Group { sequences: vec![sequence] }).to_vec(),
        }
    }

    fn loss(outcomes: &[Outcome], reward: bool) -> f32 {
        match reward {
            true => softplus(outcomes[1].reward - outcomes[0].reward),
            false => outcomes.iter().map(|o| (o.loss / o.rows as f64) as f32).sum(),
        }
    }
}

fn gradient(model: &mut Trainable, groups: &[Group<'_>], device: &Device) -> (Vec<Outcome>, Vec<f32>) {
    let mut gradient = Numbers::new(vec![0.0; model.parameters().len()], device).unwrap();
    model.gradient(groups, 1.0, &mut gradient).unwrap();
    (model.outcomes().unwrap(), gradient.to_host().unwrap().into_owned())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
}

fn pair_of(expected: &Value) -> Pair {
    Pair(["chosen", "rejected"].map(|side| serde_json::from_value(expected[side].clone()).unwrap()))
}

fn check(name: &str, device: &Device) {
    let json = std::fs::read_to_string(fixtures().join(name).join("gradients.json")).unwrap();
    let expected: Value = serde_json::from_str(&json).unwrap();
    let pair = pair_of(&expected);
    let (config, parameters, values) = read(name);
    let reward = config.head != Head::Language;
    let name = format!("{name} on {}", device.name());
    let train = |dtype, options| Trainable::new(&config, &values, dtype, 128, options, device).unwrap();
    let gradient = |model: &mut Trainable, groups: &[Group<'_>]| gradient(model, groups, device);

    let mut model = train(DType::F32, PLAIN);
    let (outcomes, shared) = gradient(&mut model, &pair.groups(reward, true));
    let loss = expected["loss"].as_f64().unwrap();
    assert!((f64::from(Pair::loss(&outcomes, reward)) - loss).abs() < 1e-5 * loss.max(1.0), "{name}: loss {loss}");
    assert_eq!(model.evaluate(&pair.groups(reward, true)).unwrap(), outcomes, "{name}");
    let expected = expected["gradients"].as_object().unwrap();
    assert_eq!(expected.len(), parameters.list().len(), "{name}: {:?}", expected.keys());
    for parameter in parameters.list() {
        let found = &shared[parameter.range.clone()];
        let expected = expected.get(&parameter.name).unwrap_or_else(|| panic!("{name}: no {}", parameter.name));
        let size = expected["norm"].as_f64().unwrap();
        // What cancels out, such as the last norm's bias in a pair, is zero but for rounding.
        let size_or_rounding = size.max(1e-3 * norm(&shared));
        assert!(
            (norm(found) - size).abs() < 1e-4 * size_or_rounding,
            "{name} {}: {} {size}",
            parameter.name,
            norm(found)
        );
        for (i, value) in expected["values"].as_array().unwrap().iter().enumerate() {
            let (found, value) = (f64::from(found[i * found.len() / 8]), value.as_f64().unwrap());
            assert!(
                (found - value).abs() < 1e-4 * size_or_rounding,
                "{name} {} at {i}: {found} {value}",
                parameter.name
            );
        }
    }

    // Computed twice, the common beginning gives the same.
    let (_, apart) = gradient(&mut model, &pair.groups(reward, false));
    assert!(distance(&shared, &apart) < 1e-5 * norm(&apart), "{name}: {}", distance(&shared, &apart) / norm(&apart));
    // Layers computed again have the same bits.
    let mut checkpointing = train(DType::F32, TrainOptions { checkpointing: true, ..PLAIN });
    assert!(gradient(&mut checkpointing, &pair.groups(reward, true)).1 == shared, "{name}: checkpointing");
    // So do more threads, and a second step in the same buffers.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert!(pool.install(|| gradient(&mut model, &pair.groups(reward, true))).1 == shared, "{name}: three threads");
    // Rounded to bf16 between operations it is near.
    let (_, rounded) = gradient(&mut train(DType::Bf16, PLAIN), &pair.groups(reward, true));
    let error = distance(&rounded, &shared) / norm(&shared);
    assert!(error < 0.05, "{name}: bf16 is off by {error}");
}

#[test]
fn gradients_are_those_of_transformers() {
    for name in [
        "llama-lm",
        "llama-pm",
        "llama-lm-sharded",
        "qwen2-lm",
        "qwen2-pm",
        "qwen3-lm",
        "qwen3-pm",
        "mistral-lm",
        "mistral-pm",
        "gemma2-lm",
        "gemma2-pm",
        "neox-lm",
        "neox-pm",
        "neox-lm-sequential",
    ] {
        devices().iter().for_each(|device| check(name, device));
    }
}

/// The gradient of rewards, next tokens and a teacher together is the slope of their sum.
fn check_sum(name: &str, device: &Device) {
    let ids: Vec<u32> = (0..75).map(|i| 4 + i * 37 % 270).collect();
    let pair = Pair([ids[..70].to_vec(), [&ids[..40], &ids[50..60]].concat()]);
    let (top_ids, top_log_probs) = ([7u32, 90, 3], [-0.5f32, -1.5, -3.0]);
    let (top_ids, top_log_probs) = (top_ids.repeat(20), top_log_probs.repeat(20));
    let (mut config, _, _) = read(name);
    config.head = Head::Reward(RewardHead { weight: "score.weight".into(), bias: None, normalization: None });
    let parameters = Parameters::new(&config, true);
    let values: Vec<f32> = (0..parameters.len()).map(|i| ((i * 7919 % 1009) as f32 / 504.0 - 1.0) * 0.15).collect();
    let options = TrainOptions { language_head: true, ..PLAIN };
    let mut model = Trainable::new(&config, &values, DType::F32, 128, options, device).unwrap();
    let mut sequences = [0, 1].map(|side| pair.sequence(side, false));
    sequences.iter_mut().for_each(|s| s.reward = true);
    sequences[1].language =
        Language::Teacher { first: 30, top: 3, ids: &top_ids, log_probs: &top_log_probs, weight: 0.05 };
    let groups = [Group { sequences: sequences.to_vec() }];
    let (_, slope) = gradient(&mut model, &groups, device);
    let mut loss = |step: f32, place: &Device| {
        let moved = values.iter().zip(&slope).map(|(value, d)| value + step * d).collect();
        model.set(&Numbers::new(moved, place).unwrap()).unwrap();
        let outcomes = model.evaluate(&groups).unwrap();
        let language = outcomes[0].loss / outcomes[0].rows as f64 + 0.05 * outcomes[1].loss;
        f64::from(softplus(outcomes[1].reward - outcomes[0].reward)) + language
    };
    let expected = norm(&slope).powi(2);
    let step = (0.02 / expected) as f32;
    // Weights may come from the process, too.
    let found = (loss(step, device) - loss(-step, &Device::Cpu)) / f64::from(2.0 * step);
    let name = format!("{name} on {}", device.name());
    assert!((found - expected).abs() < 5e-3 * expected, "{name}: {found} {expected}");
}

#[test]
fn losses_add_up() {
    for name in ["llama-lm", "gemma2-lm"] {
        devices().iter().for_each(|device| check_sum(name, device));
    }
}

/// A non-linearity that a GPU would make a part of the product leaves what its gradient needs.
#[test]
fn a_gelu_by_tanh_without_a_gate_has_a_gradient() {
    let (mut config, _, values) = read("neox-lm");
    config.activation = Activation::GeluTanh;
    let pair = Pair([3, 5].map(|step| (0..40).map(|i| 4 + i * step % 200).collect()));
    let groups = pair.groups(false, true);
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 0.05)] {
        let of = |device: &Device, checkpointing| {
            let options = TrainOptions { checkpointing, ..PLAIN };
            let mut model = Trainable::new(&config, &values, dtype, 64, options, device).unwrap();
            let (outcomes, found) = gradient(&mut model, &groups, device);
            assert_eq!(model.evaluate(&groups).unwrap(), outcomes, "{dtype:?} on {}", device.name());
            found
        };
        let expected = of(&Device::Cpu, false);
        for device in devices() {
            let found = of(&device, false);
            let error = distance(&found, &expected) / norm(&expected);
            assert!(error < tolerance, "{dtype:?} on {}: {error}", device.name());
            assert!(of(&device, true) == found, "{dtype:?} on {}: checkpointing", device.name());
        }
    }
}

const STEP: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 1, scale: 0.5 };

/// A step changes weights as on the CPU, and the decoder has those that are left by it, in its type.
fn check_step(name: &str, language_head: bool, dtype: DType, device: &Device) {
    let (mut config, _, _) = read(name);
    if language_head {
        config.head = Head::Reward(RewardHead { weight: "score.weight".into(), bias: None, normalization: None });
    }
    let parameters = Parameters::new(&config, language_head);
    let len = parameters.len();
    let list = |seed: usize| -> Vec<f32> { (0..len).map(|i| ((i * 7919 + seed) % 1009) as f32 / 5e3 - 0.1).collect() };
    let how = |parameter: &Parameter| AdamW {
        weight_decay: if parameter.shape.len() > 1 { STEP.weight_decay } else { 0.0 },
        ..STEP
    };
    let (mut expected, slopes) = (list(1), list(2));
    for parameter in parameters.list() {
        let [mut mean, mut square] = [(); 2].map(|()| vec![0.0; parameter.range.len()]);
        let range = || parameter.range.clone();
        how(parameter).update(&mut expected[range()], &slopes[range()], &mut mean, &mut square);
    }
    let name = format!("{name} in {dtype:?} on {}", device.name());
    let options = TrainOptions { language_head, ..PLAIN };
    let mut model = Trainable::new(&config, &list(1), dtype, 64, options, device).unwrap();
    let mut weights = Numbers::new(list(1), device).unwrap();
    let gradient = Numbers::new(slopes, device).unwrap();
    let [mut mean, mut square] = [(); 2].map(|()| weights.zeros().unwrap());
    model.step(&mut weights, &gradient, [&mut mean, &mut square], &how).unwrap();
    let found = weights.to_host().unwrap();
    assert!(found.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() < 1e-5), "{name}");
    let (sum, expected) = (weights.sum_of_squares().unwrap(), norm(&found).powi(2));
    assert!((sum - expected).abs() < 1e-5 * expected, "{name}: {sum} {expected}");

    let tokens: Vec<u32> = (0..40).map(|i| 4 + i * 3 % 200).collect();
    let reward = config.head != Head::Language;
    let language = match reward && !language_head {
        true => Language::Nothing,
        false => Language::Next { rows: 0..39, weight: 1.0 },
    };
    let groups = [Group { sequences: vec![Sequence { tokens: &tokens, reward, language }] }];
    let mut fresh = Trainable::new(&config, &found, dtype, 64, options, device).unwrap();
    assert_eq!(model.evaluate(&groups).unwrap(), fresh.evaluate(&groups).unwrap(), "{name}");
}

#[test]
fn steps_are_taken_where_the_weights_are() {
    // Separate and tied heads, one gate and none, biases, q, k and v among one another, and all of a reward model's heads.
    for (name, language_head) in
        [("llama-lm", false), ("qwen2-pm", false), ("gemma2-lm", true), ("neox-lm", false), ("neox-pm", true)]
    {
        for device in devices() {
            check_step(name, language_head, DType::F32, &device);
            check_step(name, language_head, DType::Bf16, &device);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (config, _, values) = read("llama-pm");
    let mut model = Trainable::new(&config, &values, DType::F32, 64, PLAIN, &Device::Cpu).unwrap();
    let mut check = |tokens: &[u32], language: Language<'_>, expected: &str| {
        let group = Group { sequences: vec![Sequence { tokens, reward: true, language }] };
        let error = model.evaluate(&[group]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&[], Language::Nothing, "without tokens");
    check(&[5; 65], Language::Nothing, "65");
    check(&[280], Language::Nothing, "vocabulary");
    check(&[5; 4], Language::Next { rows: 0..2, weight: 1.0 }, "vocabulary head");
    let lonely = Group { sequences: vec![Sequence { tokens: &[5; 4], reward: true, language: Language::Nothing }] };
    let mut gradient = Numbers::new(vec![0.0; values.len()], &Device::Cpu).unwrap();
    let error = model.gradient(&[lonely], 1.0, &mut gradient).unwrap_err();
    assert!(error.to_string().contains("1 rewards are not of pairs"), "{error}");
    assert!(Trainable::new(&config, &values[1..], DType::F32, 64, PLAIN, &Device::Cpu).is_err());
}

#[cfg(feature = "emulated")]
#[test]
fn a_gradient_elsewhere_is_refused() {
    let (config, _, values) = read("llama-pm");
    let pair = Pair([vec![5; 4], vec![6; 4]]);
    let [cpu, gpu] = [Device::Cpu, Device::Gpu(plumb_kernels::gpu::Gpu::emulated())];
    for (device, other) in [(&cpu, &gpu), (&gpu, &cpu)] {
        let mut model = Trainable::new(&config, &values, DType::F32, 64, PLAIN, device).unwrap();
        let mut gradient = Numbers::new(vec![0.0; values.len()], other).unwrap();
        let refused = model.gradient(&pair.groups(true, true), 1.0, &mut gradient).unwrap_err();
        assert!(refused.to_string().contains("not on the device"), "{refused}");
        let mut weights = Numbers::new(values.clone(), device).unwrap();
        let [mut mean, mut square] = [(); 2].map(|()| weights.zeros().unwrap());
        assert!(model.step(&mut weights, &gradient, [&mut mean, &mut square], &|_| STEP).is_err());
    }
}
