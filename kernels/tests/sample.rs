//! Drawing tokens, on the CPU and every GPU that there is, the emulated one among them: against the reference, and to
//! the bit against one another.

#![cfg_attr(
    feature = "gpu",
    expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")
)]

#[cfg(feature = "gpu")]
use plumb_kernels::gpu::{Gpu, Sampler};
use plumb_kernels::reference::{self, Sampling, log_prob};
use plumb_kernels::sample::{Draw, Drawn, TokenSet, Undrawn, draw, philox};
use proptest::prelude::*;

type Result = std::result::Result<Drawn, Undrawn>;
type Draws<'a> = &'a dyn Fn(&[f32], usize, &[Draw<'_>]) -> Vec<Result>;

/// Runs a test with what draws from `logits[_, vocabulary]`, on each device.
fn on_each(test: impl Fn(Draws<'_>)) {
    test(&on_cpu);
    #[cfg(feature = "emulated")]
    test(&|logits, vocabulary, draws| on_gpu(&Gpu::emulated(), logits, vocabulary, draws));
    #[cfg(feature = "cuda")]
    match Gpu::cuda(0) {
        Ok(gpu) => test(&|logits, vocabulary, draws| on_gpu(&gpu, logits, vocabulary, draws)),
        Err(error) => {
            assert!(std::env::var_os("PLUMB_REQUIRE_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
        }
    }
}

fn on_cpu(logits: &[f32], vocabulary: usize, draws: &[Draw<'_>]) -> Vec<Result> {
    draw(logits, vocabulary, draws, &mut vec![f32::NAN; draws.len() * vocabulary])
}

#[cfg(feature = "gpu")]
fn on_gpu(gpu: &Gpu, logits: &[f32], vocabulary: usize, draws: &[Draw<'_>]) -> Vec<Result> {
    Sampler::new(gpu).draw(gpu.upload(logits).unwrap().all(), vocabulary, draws).unwrap()
}

/// Logits about as a model has them: bell-shaped, of this width.
fn bell(tokens: usize, width: f32, seed: u32) -> Vec<f32> {
    let uniform = |x: u32| (f64::from(x) + 0.5) / f64::from(1 << 16) / f64::from(1 << 16);
    let logit = |token: usize| {
        let [a, b, ..] = philox([token as u32, seed, 0, 1], [0, 0]);
        width * ((-2.0 * uniform(a).ln()).sqrt() * (std::f64::consts::TAU * uniform(b)).cos()) as f32
    };
    (0..tokens).map(logit).collect()
}

fn set(vocabulary: usize, tokens: &[u32]) -> TokenSet {
    let mut set = TokenSet::new(vocabulary);
    set.extend(tokens.iter().copied());
    set
}

/// Compares draws with what the reference makes of the same random numbers, or of some next to them: the sums differ in
/// their last bits.
fn check(draws: Draws<'_>, what: &str, logits: &[f32], how: &Sampling, seeds: std::ops::Range<u64>) {
    let tokens = logits.len();
    let (penalised, excluded) = (set(tokens, &how.penalised), set(tokens, &how.excluded));
    let of_seed = |seed| Draw {
        penalty: how.penalty as f32,
        penalised: (!how.penalised.is_empty()).then_some(&penalised),
        excluded: (!how.excluded.is_empty()).then_some(&excluded),
        temperature: how.temperature as f32,
        top_k: how.top_k,
        top_p: how.top_p as f32,
        min_p: how.min_p as f32,
        seed,
        index: 5,
        attempt: 1,
        row: 0,
    };
    let asked: Vec<Draw<'_>> = seeds.map(of_seed).collect();
    let found = draws(logits, tokens, &asked);
    assert_eq!(found, on_cpu(logits, tokens, &asked), "{what}: other bits than on the CPU");
    for (found, asked) in found.into_iter().zip(&asked) {
        let [low, high, ..] = philox([5, 1, 0, 0], [asked.seed as u32, 0]);
        let uniform = (f64::from(high) + f64::from(low) / 2f64.powi(32)) / 2f64.powi(32);
        let near = [-1e-6, 1e-6].map(|by| reference::draw(logits, how, (uniform + by).clamp(0.0, 1.0 - 1e-12)));
        match found {
            Ok(found) => {
                let fits = near[0].zip(near[1]).is_some_and(|(least, most)| (least..=most).contains(&found.token));
                assert!(fits, "{what}, {how:?}: {found:?}, not {near:?}");
                let expected = log_prob(logits, found.token as usize);
                let error = (found.log_prob - expected).abs();
                assert!(error <= 2e-6 * (1.0 + expected.abs()), "{what}: {found:?} {expected}");
            }
            Err(why) => assert!(why == Undrawn::AllExcluded && near == [None, None], "{what}, {how:?}: {why:?}"),
        }
    }
}

const PLAIN: Sampling = Sampling {
    penalty: 1.0,
    penalised: Vec::new(),
    excluded: Vec::new(),
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
};

/// Numbers that f32 holds, so that all see the same.
fn ways(tokens: usize) -> Vec<Sampling> {
    let some = |every: usize| (0..tokens as u32).step_by(every).collect::<Vec<_>>();
    vec![
        PLAIN,
        Sampling { temperature: 0.0, ..PLAIN },
        Sampling { temperature: 0.25, ..PLAIN },
        Sampling { temperature: 4.0, top_k: 1, ..PLAIN },
        Sampling { top_k: 1, top_p: 0.5, min_p: 0.5, ..PLAIN },
        Sampling { top_k: 5, ..PLAIN },
        Sampling { top_k: 5, top_p: 0.75, ..PLAIN },
        Sampling { top_k: tokens, top_p: 1.0, ..PLAIN },
        Sampling { top_k: tokens - 1, top_p: 0.99609375, ..PLAIN },
        Sampling { top_p: 2f64.powi(-80), ..PLAIN },
        Sampling { top_p: 0.90625, ..PLAIN },
        Sampling { top_p: 0.5, min_p: 0.125, temperature: 2.0, ..PLAIN },
        Sampling { min_p: 1.0, ..PLAIN },
        Sampling { min_p: 0.0625, ..PLAIN },
        Sampling { penalty: 1.5, penalised: some(3), ..PLAIN },
        Sampling { penalty: 0.5, penalised: some(2), temperature: 0.0, ..PLAIN },
        Sampling { penalty: 4.0, penalised: some(1), excluded: some(2), top_k: 40, ..PLAIN },
        Sampling { excluded: some(2), temperature: 0.0, ..PLAIN },
        Sampling { excluded: some(1), ..PLAIN },
    ]
}

#[test]
fn draws_are_those_of_the_reference() {
    let small = [1, 7, 33, 1025];
    on_each(|draws| {
        for tokens in small {
            for how in ways(tokens) {
                check(draws, &format!("{tokens} tokens"), &bell(tokens, 3.0, 1), &how, 0..4);
            }
        }
    });
}

#[test]
fn large_vocabularies_are_drawn_from_as_small_ones() {
    on_each(|draws| {
        for (tokens, width) in [(50_257, 2.0), (151_936, 0.25)] {
            let logits = bell(tokens, width, 2);
            for how in [
                PLAIN,
                Sampling { temperature: 0.0, ..PLAIN },
                Sampling { top_k: 1000, top_p: 0.90625, ..PLAIN },
                Sampling { top_p: 0.984375, min_p: 2f64.powi(-12), temperature: 1.5, ..PLAIN },
            ] {
                check(draws, &format!("{tokens} tokens"), &logits, &how, 0..3);
            }
        }
    });
}

#[test]
fn ties_and_extremes_are_drawn_from_as_the_reference_does() {
    let lowest = f32::NEG_INFINITY;
    let with = |logits: &[f32], changes: &[(usize, f32)]| {
        let mut logits = logits.to_vec();
        changes.iter().for_each(|(at, logit)| logits[*at] = *logit);
        logits
    };
    let equal = vec![0.5f32; 1300];
    let cases = [
        ("all equal", equal.clone()),
        ("two of a kind", (0..1300).map(|i| (i * 7 % 2) as f32).collect()),
        ("steps", (0..1300).map(|i| (i * 37 % 11) as f32 / 4.0).collect()),
        ("one is impossible", with(&equal, &[(0, lowest)])),
        ("one is possible", with(&[lowest; 1300], &[(1033, -7.0)])),
        ("zeros", with(&[-0.0; 70], &[(30, 0.0)])),
        ("huge", with(&[-3e38; 70], &[(3, 3e38), (5, 3e38), (6, -3.4e38)])),
        ("hugely below zero", with(&[-3e38; 70], &[(3, -3.1e38), (4, lowest)])),
        ("tiny", (0..70).map(|i| (i as f32 - 30.0) * 1e-41).collect()),
        ("far apart", (0..70).map(|i| i as f32 * 2.0).collect()),
    ];
    on_each(|draws| {
        for (what, logits) in &cases {
            ways(logits.len()).iter().for_each(|how| check(draws, what, logits, how, 0..3));
        }
    });
}

#[test]
fn filters_keep_the_likeliest_tokens() {
    let p = [0.1f32, 0.4, 0.3, 0.2];
    let base = Draw::default;
    let cases = [
        (&p[..], base(), &[0, 1, 2, 3][..]),
        (&p, Draw { top_k: 2, ..base() }, &[1, 2]),
        (&p, Draw { top_p: 0.65, ..base() }, &[1, 2]),
        (&p, Draw { top_p: 0.01, ..base() }, &[1]),
        (&p, Draw { min_p: 0.49, ..base() }, &[1, 2, 3]),
        (&p, Draw { top_k: 3, top_p: 0.5, min_p: 0.9, ..base() }, &[1]),
        // Of equals the lower ids.
        (&[0.1; 10], Draw { top_k: 3, ..base() }, &[0, 1, 2]),
        (&[0.1; 10], Draw { top_k: 8, top_p: 0.5, ..base() }, &[0, 1, 2, 3]),
        (&[0.1; 10], Draw { min_p: 1.0, top_k: 5, ..base() }, &[0, 1, 2, 3, 4]),
    ];
    on_each(|draws| {
        for (p, how, kept) in &cases {
            let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
            let asked: Vec<_> = (0..100).map(|seed| Draw { seed, ..*how }).collect();
            let found = draws(&logits, p.len(), &asked);
            let mut tokens: Vec<u32> = found.into_iter().map(|drawn| drawn.unwrap().token).collect();
            tokens.sort_unstable();
            tokens.dedup();
            assert_eq!(tokens, *kept, "{how:?}");
        }
    });
}

#[test]
fn what_is_no_distribution_is_said_to_be_none() {
    on_each(|draws| {
        let good = bell(300, 2.0, 1);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for at in [0, 170, 299] {
                // The row beside it has nothing of it.
                let logits = [&good[..], &good[..at], &[bad], &good[at + 1..]].concat();
                let excluded = set(300, &[at as u32]);
                for how in [
                    Draw::default(),
                    Draw { temperature: 0.0, ..Draw::default() },
                    Draw { top_k: 3, top_p: 0.5, excluded: Some(&excluded), ..Draw::default() },
                ] {
                    let found = draws(&logits, 300, &[how, Draw { row: 1, ..how }]);
                    assert!(found[0].is_ok() && found[1] == Err(Undrawn::NotFinite), "{bad} {at}: {found:?}");
                }
            }
        }
        assert_eq!(draws(&[f32::NEG_INFINITY; 70], 70, &[Draw::default()]), [Err(Undrawn::NotFinite)]);
    });
}

#[test]
fn tokens_are_drawn_as_often_as_they_are_likely() {
    let (logits, draws, tokens) = (bell(40, 1.5, 3), 20_000, 40);
    let excluded = set(40, &[7, 8]);
    let how = Draw { temperature: 1.25, excluded: Some(&excluded), seed: 11, ..Draw::default() };
    let asked: Vec<_> = (0..draws).map(|index| Draw { index, ..how }).collect();
    let found = on_cpu(&logits, tokens, &asked);
    let weight = |token: usize| if [7, 8].contains(&token) { 0.0 } else { f64::from(logits[token] / 1.25).exp() };
    let total: f64 = (0..tokens).map(weight).sum();
    let mut square = 0.0;
    for token in 0..tokens {
        let expected = f64::from(draws) * weight(token) / total;
        let count = found.iter().filter(|drawn| drawn.unwrap().token as usize == token).count() as f64;
        square += if expected == 0.0 { count * f64::INFINITY.min(1e9) } else { (count - expected).powi(2) / expected };
    }
    // Of 37 degrees of freedom, all but one in a thousand are below.
    assert!(square < 69.3, "chi-square: {square}");
    // Attempts and seeds are other random numbers.
    let other = |how: Draw<'static>| (0..64).map(|index| Draw { index, ..how }).collect::<Vec<_>>();
    let [first, again, seed] = [(0, 1), (1, 1), (0, 1 << 40)]
        .map(|(attempt, seed)| on_cpu(&logits, tokens, &other(Draw { attempt, seed, ..Draw::default() })));
    assert!(first != again && first != seed && again != seed);
}

#[test]
fn a_draw_does_not_depend_on_those_beside_it() {
    let tokens = 1500;
    let logits: Vec<f32> = (0..5).flat_map(|row| bell(tokens, 2.5, row)).collect();
    let (penalised, excluded) = (set(tokens, &[1, 5, 900]), set(tokens, &[3]));
    let draw = |row: usize| Draw {
        row,
        penalty: 1.25,
        penalised: (row != 1).then_some(&penalised),
        excluded: row.is_multiple_of(2).then_some(&excluded),
        top_p: if row == 2 { 1.0 } else { 0.75 },
        top_k: row * 100,
        seed: 3 * row as u64,
        index: row as u32,
        ..Draw::default()
    };
    on_each(|draws| {
        let together = draws(&logits, tokens, &[3, 0, 4, 1, 2, 1, 3].map(draw));
        assert_eq!(together[0], together[6]);
        for (found, row) in together.into_iter().zip([3, 0, 4, 1, 2, 1, 3]) {
            let alone = draws(&logits[row * tokens..][..tokens], tokens, &[Draw { row: 0, ..draw(row) }]);
            assert_eq!(alone, [found], "row {row}");
        }
        assert!(draws(&logits, tokens, &[]).is_empty());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_logits_are_drawn_from_alike(
        logits in prop::collection::vec(
            prop_oneof![-8f32..8.0, Just(1.5), Just(f32::NEG_INFINITY), any::<f32>()],
            1..90,
        ),
        (temperature, penalty) in (prop_oneof![Just(0.0f32), 0.01f32..100.0], 0.01f32..100.0),
        (top_k, top_p, min_p) in (0usize..100, 0.001f32..=1.0, 0f32..=1.0),
        (seed, index) in any::<(u64, u32)>(),
    ) {
        let (penalised, excluded) = (set(logits.len(), &[0, 3, 40]), set(logits.len(), &[1, 3]));
        let how = Draw {
            penalty,
            penalised: Some(&penalised),
            excluded: Some(&excluded),
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            index,
            ..Draw::default()
        };
        let sound = logits.iter().all(|logit| *logit < f32::INFINITY) && logits.iter().any(|logit| logit.is_finite());
        on_each(|draws| {
            let found = draws(&logits, logits.len(), &[how])[0];
            assert_eq!(found, on_cpu(&logits, logits.len(), &[how])[0]);
            match found {
                Ok(drawn) => assert!(sound && ![1, 3].contains(&drawn.token) && drawn.log_prob <= 1e-6, "{drawn:?}"),
                Err(why) => assert!(sound == (why == Undrawn::AllExcluded), "{why:?}"),
            }
        });
    }
}
