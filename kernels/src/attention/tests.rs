use super::*;
use crate::reference;
use crate::rotary::Rotary;
use half::bf16;
use proptest::prelude::*;

struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    softcap: Option<f32>,
    window: Option<usize>,
    tokens: usize,
}

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn rule(case: &Case) -> Rule {
    Rule {
        heads: case.heads,
        head_dim: case.dim,
        scale: 1.0 / (case.dim as f32).sqrt(),
        softcap: case.softcap,
        window: case.window,
    }
}

/// Runs the sequence in the given steps over shuffled pages, with another sequence's rows beside it.
fn run<E: Element>(case: &Case, qkv: &[f32], steps: &[usize], neighbour: usize) -> Vec<f32> {
    let width = (case.heads + 2 * case.kv_heads) * case.dim;
    let pages = case.tokens.div_ceil(PAGE);
    let mut kv = KvPages::<E>::new(1, case.kv_heads, case.dim, pages + neighbour.div_ceil(PAGE)).unwrap();
    kv.layers[0].keys.fill(E::from_f32(f32::NAN));
    kv.layers[0].values.fill(E::from_f32(f32::NAN));
    let table: Vec<u32> = (0..pages as u32).rev().collect();
    let other: Vec<u32> = (pages as u32..).take(neighbour.div_ceil(PAGE)).collect();
    let rotary = Rotary::new(&vec![0.1; case.dim / 4], case.tokens.max(neighbour));
    let how = Prepare { heads: case.heads, head_dim: case.dim, q_norm: None, k_norm: None, rotary: &rotary };
    let mut result = Vec::new();
    let mut position = 0;
    for (i, step) in steps.iter().enumerate() {
        let beside = if i == 0 { neighbour } else { 0 };
        // A NaN beside must stay there.
        let mut rows = vec![f32::NAN; beside * width];
        rows.extend_from_slice(&qkv[position * width..(position + step) * width]);
        let mut runs = Vec::new();
        let mut cut = |row: usize, start: usize, len: usize, table: &[u32]| {
            let mut p = start;
            while p < start + len {
                let n = (PAGE - p % PAGE).min(start + len - p);
                runs.push(Run { row: row + p - start, len: n, position: p, page: table[p / PAGE] });
                p += n;
            }
        };
        cut(0, 0, beside, &other);
        cut(beside, position, *step, &table);
        let count = beside + step;
        let mut q = vec![E::default(); count * case.heads * padded(case.dim)];
        prepare(&rows, 0, &runs, how, &mut q, &mut kv, 0);
        let mut spans = vec![Span { row: beside, len: *step, position, pages: &table }];
        if beside > 0 {
            spans.insert(0, Span { row: 0, len: beside, position: 0, pages: &other });
        }
        let mut out = vec![E::default(); count * case.heads * case.dim];
        let work = Work::new(&spans, case.heads / case.kv_heads, case.kv_heads);
        attention(&q, &kv, 0, &work, rule(case), &mut out);
        result.extend(out[beside * case.heads * case.dim..].iter().map(|x| x.to_f32()));
        position += step;
    }
    result
}

fn check<E: Element>(case: &Case, cut: usize, tolerance: f32) {
    let width = (case.heads + 2 * case.kv_heads) * case.dim;
    let qkv: Vec<f32> = numbers(case.tokens * width, 1).into_iter().map(|x| E::from_f32(x).to_f32()).collect();
    let whole = run::<E>(case, &qkv, &[case.tokens], 0);
    let rotary = Rotary::new(&vec![0.1; case.dim / 4], case.tokens);
    for h in 0..case.heads {
        let head = |offset: usize, rotate: bool| -> Vec<f32> {
            (0..case.tokens)
                .flat_map(|t| {
                    let mut x = qkv[t * width + offset * case.dim..][..case.dim].to_vec();
                    if rotate {
                        rotary.apply(t, &mut x);
                    }
                    x.into_iter().map(|x| E::from_f32(x).to_f32())
                })
                .collect()
        };
        let kv_head = h / (case.heads / case.kv_heads);
        let expected = reference::attention(
            &head(h, true),
            &head(case.heads + kv_head, true),
            &head(case.heads + case.kv_heads + kv_head, false),
            case.dim,
            reference::AttentionRule { scale: rule(case).scale, softcap: case.softcap, window: case.window },
        );
        for t in 0..case.tokens {
            for d in 0..case.dim {
                let (a, b) = (whole[(t * case.heads + h) * case.dim + d], expected[t * case.dim + d]);
                assert!((a - b).abs() < tolerance, "token {t} head {h}: {a} {b}");
            }
        }
    }
    let cut = 1 + cut % case.tokens;
    let steps: Vec<usize> = [cut, case.tokens - cut].into_iter().filter(|n| *n > 0).collect();
    assert_eq!(run::<E>(case, &qkv, &steps, 45), whole, "in steps {steps:?} beside another sequence");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn matches_the_reference_and_keeps_its_bits(
        groups in 1usize..4, kv_heads in 1usize..3, dim in (1usize..10).prop_map(|d| 4 * d),
        softcap in proptest::option::of(0.5f32..5.0), window in proptest::option::of(1usize..50),
        tokens in 1usize..300, cut in 0usize..300,
    ) {
        let case = Case { heads: groups * kv_heads, kv_heads, dim, softcap, window, tokens };
        check::<f32>(&case, cut, 1e-5);
        check::<bf16>(&case, cut, 1e-2);
    }
}

/// A value that is no number at a position: queries that do not see it keep their bits, in the same step too, whose pages
/// others may share; those that do see it have no number either.
fn check_masked<E: Element>(case: &Case, bad: usize, value: f32) {
    let width = (case.heads + 2 * case.kv_heads) * case.dim;
    let mut qkv = numbers(case.tokens * width, 1);
    let sound = run::<E>(case, &qkv, &[case.tokens], 0);
    // The first value of every head.
    for head in 0..case.kv_heads {
        qkv[bad * width + (case.heads + case.kv_heads + head) * case.dim] = value;
    }
    for steps in [vec![case.tokens], vec![bad + 1, case.tokens - bad - 1]] {
        let found = run::<E>(case, &qkv, &steps, 0);
        let rows = case.heads * case.dim;
        for (position, (found, sound)) in found.chunks(rows).zip(sound.chunks(rows)).enumerate() {
            let sees = position >= bad && case.window.is_none_or(|window| position < bad + window);
            match sees {
                true => assert!(found.iter().any(|x| !x.is_finite()), "{value} is lost at {position}"),
                false => assert_eq!(found, sound, "{value} of {bad} is seen at {position}"),
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_with_those_who_see_it() {
    for (window, bad) in [(None, 41), (None, 0), (None, 127), (Some(20), 41), (Some(40), 130)] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let case = Case { heads: 4, kv_heads: 2, dim: 16, softcap: None, window, tokens: 200 };
            check_masked::<f32>(&case, bad, value);
            check_masked::<bf16>(&case, bad, value);
            check_masked::<bf16>(&Case { softcap: Some(2.0), ..case }, bad, value);
        }
    }
}
