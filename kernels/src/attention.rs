//! Causal attention over packed sequences whose keys and values lie in pages.
//!
//! A page holds the keys and values of [`PAGE`] consecutive positions of one sequence, for all layers, in the packed
//! form that the matrix kernel reads. Sequences with a common beginning name the same pages. Soft-max runs over blocks
//! of keys that are aligned to the position in the sequence, so the order of summation for a query depends on its
//! position alone: not on what else is in the batch, how a prompt was cut into steps, or who computed the pages.

use std::ops::Range;

use crate::Element;
use crate::gemm::{LANES, Tile};
use crate::math::{exp, lane_sum, tanh};
use crate::norm::Norm;
use crate::parallel::{Rows, Shared, for_each_piece};
use crate::rotary::Rotary;
use crate::simd::vectorised;

/// Positions in a page.
pub const PAGE: usize = 32;
/// Pages whose scores go through soft-max together.
const BLOCK_PAGES: usize = 4;
/// Keys whose scores go through soft-max together.
const BLOCK: usize = BLOCK_PAGES * PAGE;
/// Query rows (positions times heads of a group) that share a pass over the keys.
const ROWS: usize = 48;

/// Keys and values of many sequences, by page.
#[derive(Debug)]
pub struct KvPages<E> {
    kv_heads: usize,
    /// Head width rounded up to whole vectors; the rest is zero.
    padded_dim: usize,
    pages: usize,
    layers: Vec<KvLayer<E>>,
}

#[derive(Debug)]
struct KvLayer<E> {
    /// `[pages, kv_heads, padded_dim / PAIR, PAGE, PAIR]`.
    keys: Vec<E>,
    /// `[pages, kv_heads, PAGE / PAIR, padded_dim, PAIR]`.
    values: Vec<E>,
}

/// Head width rounded up to whole vectors.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

impl<E: Element> KvPages<E> {
    /// Empty pages. Memory is taken from the system as pages are first written.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize, pages: usize) -> Self {
        let padded_dim = padded(head_dim);
        let len = pages * kv_heads * padded_dim * PAGE;
        let layers = (0..layers).map(|_| KvLayer { keys: E::zeros(len), values: E::zeros(len) }).collect();
        Self { kv_heads, padded_dim, pages, layers }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of one page over all layers, for planning.
    pub fn page_bytes(layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        2 * layers * kv_heads * padded(head_dim) * PAGE * size_of::<E>()
    }

    fn head_len(&self) -> usize {
        self.padded_dim * PAGE
    }

    fn range(&self, page: u32, head: usize) -> Range<usize> {
        let start = (page as usize * self.kv_heads + head) * self.head_len();
        start..start + self.head_len()
    }
}

/// Rows of a batch that belong to consecutive positions of one sequence within one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row.
    pub row: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
    /// The page that holds these positions.
    pub page: u32,
}

/// How q, k and v are made ready.
#[derive(Clone, Copy, Debug)]
pub struct Prepare<'a> {
    /// Query heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Over each head of q, before the rotation.
    pub q_norm: Option<&'a Norm>,
    /// Over each head of k, before the rotation.
    pub k_norm: Option<&'a Norm>,
    /// The rotation.
    pub rotary: &'a Rotary,
}

impl Prepare<'_> {
    /// A head of q or k, normed and rotated.
    fn head(&self, norm: Option<&Norm>, x: &[f32], position: usize, out: &mut [f32]) {
        match norm {
            Some(norm) => norm.row(x, out),
            None => out.copy_from_slice(x),
        }
        self.rotary.apply(position, out);
    }
}

/// Splits `qkv[rows, (heads + 2 * kv_heads) * head_dim]`, norms and rotates q and k, writes k and v to their pages and
/// q to `q[rows, heads * padded_dim]`. `runs` cover the rows in order, the first row of `qkv` being `first_row`.
///
/// # Panics
/// If shapes do not fit or two runs name the same page.
pub fn prepare<E: Element>(
    qkv: &[f32],
    first_row: usize,
    runs: &[Run],
    how: Prepare<'_>,
    q: &mut [E],
    kv: &mut KvPages<E>,
    layer: usize,
) {
    let (dim, padded_dim, kv_heads) = (how.head_dim, kv.padded_dim, kv.kv_heads);
    let width = (how.heads + 2 * kv_heads) * dim;
    let rows = runs.iter().map(|r| r.len).sum::<usize>();
    assert!(padded_dim == padded(dim) && qkv.len() == rows * width, "shapes of q, k and v");
    assert_eq!(q.len(), rows * how.heads * padded_dim, "shape of q");
    let mut pages: Vec<u32> = runs.iter().map(|r| r.page).collect();
    pages.sort_unstable();
    assert!(pages.windows(2).all(|w| w[0] != w[1]), "two runs write the same page");
    assert!(runs.iter().all(|r| r.position % PAGE + r.len <= PAGE), "a run leaves its page");

    let ranges: Vec<Range<usize>> =
        runs.iter().flat_map(|run| (0..kv_heads).map(|head| kv.range(run.page, head))).collect();
    let KvLayer { keys, values } = &mut kv.layers[layer];
    let (q, keys, values) = (Shared::new(q), Shared::new(keys), Shared::new(values));
    for_each_piece(runs.len(), 1, |piece| {
        let run = runs[piece.start];
        let first = run.row - first_row;
        let mut head = vec![0.0; padded_dim];
        for row in 0..run.len {
            let position = run.position + row;
            let qkv = &qkv[(first + row) * width..(first + row + 1) * width];
            for h in 0..how.heads {
                how.head(how.q_norm, &qkv[h * dim..(h + 1) * dim], position, &mut head[..dim]);
                let start = ((first + row) * how.heads + h) * padded_dim;
                // SAFETY: every row belongs to one run.
                let out = unsafe { q.range(start..start + padded_dim) };
                convert(&head, out);
            }
            let slot = position % PAGE;
            for h in 0..kv_heads {
                let range = ranges[piece.start * kv_heads + h].clone();
                // SAFETY: every page belongs to one run.
                let (keys, values) = unsafe { (keys.range(range.clone()), values.range(range)) };
                if slot == 0 {
                    // Slots after the last position are multiplied by a weight of zero, which a leftover NaN survives.
                    values.fill(E::default());
                }
                let k = &qkv[(how.heads + h) * dim..(how.heads + h + 1) * dim];
                how.head(how.k_norm, k, position, &mut head[..dim]);
                for (d, x) in head.iter().enumerate() {
                    keys[(d / E::PAIR * PAGE + slot) * E::PAIR + d % E::PAIR] = E::from_f32(*x);
                }
                let v = &qkv[(how.heads + kv_heads + h) * dim..(how.heads + kv_heads + h + 1) * dim];
                for (d, x) in v.iter().enumerate() {
                    values[(slot / E::PAIR * padded_dim + d) * E::PAIR + slot % E::PAIR] = E::from_f32(*x);
                }
            }
        }
    });
}

/// Rows of a batch that belong to one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// First row.
    pub row: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row.
    pub position: usize,
    /// Pages of positions 0 up to the last row's.
    pub pages: &'a [u32],
}

/// What a query may see and how its scores are made.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Query heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Keys that a query sees, itself included; `None` means all.
    pub window: Option<usize>,
}

/// Attention of `q[rows, heads * padded_dim]` over the pages of each span, into `out[rows, heads * head_dim]`.
///
/// # Panics
/// If shapes do not fit or a span lacks pages.
pub fn attention<E: Element>(q: &[E], kv: &KvPages<E>, layer: usize, spans: &[Span<'_>], rule: Rule, out: &mut [E]) {
    let rows = spans.iter().map(|s| s.len).sum::<usize>();
    assert!(rule.heads.is_multiple_of(kv.kv_heads) && padded(rule.head_dim) == kv.padded_dim, "heads");
    assert_eq!(q.len(), rows * rule.heads * kv.padded_dim, "shape of q");
    assert_eq!(out.len(), rows * rule.heads * rule.head_dim, "shape of the attention's result");
    let positions = (ROWS / (rule.heads / kv.kv_heads)).max(1);
    let mut pieces = Vec::new();
    for span in spans {
        assert!(span.pages.len() * PAGE >= span.position + span.len, "a span lacks pages");
        assert!(span.pages.iter().all(|p| (*p as usize) < kv.pages), "no such page");
        for first in (0..span.len).step_by(positions) {
            let len = positions.min(span.len - first);
            pieces.extend((0..kv.kv_heads).map(|head| {
                (head, Span { row: span.row + first, len, position: span.position + first, pages: span.pages })
            }));
        }
    }
    let out = Shared::new(out);
    for_each_piece(pieces.len(), 1, |piece| {
        let (head, span) = pieces[piece.start];
        GroupTile::new(q, kv, layer, head, span, rule).run(&out);
    });
}

/// Neighbouring queries of all heads that share one key and value head.
struct GroupTile<'a, E> {
    kv: &'a KvPages<E>,
    layer: &'a KvLayer<E>,
    kv_head: usize,
    span: Span<'a>,
    rule: Rule,
    /// Query heads a key head.
    group: usize,
    /// `[rows, padded_dim]`, row = position * group + head.
    q: Vec<E>,
    /// `[rows, BLOCK]`.
    scores: Vec<f32>,
    /// `[rows, BLOCK]`: exponentials of the scores.
    weights: Vec<E>,
    /// `[rows, padded_dim]`.
    sums: Vec<f32>,
    /// Largest score so far and sum of exponentials, for each row.
    state: Vec<(f32, f32)>,
}

impl<'a, E: Element> GroupTile<'a, E> {
    fn new(q: &[E], kv: &'a KvPages<E>, layer: usize, kv_head: usize, span: Span<'a>, rule: Rule) -> Self {
        let group = rule.heads / kv.kv_heads;
        let rows = span.len * group;
        let dim = kv.padded_dim;
        let mut tile = Vec::with_capacity(rows * dim);
        for position in 0..span.len {
            let start = ((span.row + position) * rule.heads + kv_head * group) * dim;
            tile.extend_from_slice(&q[start..start + group * dim]);
        }
        Self {
            kv,
            layer: &kv.layers[layer],
            kv_head,
            span,
            rule,
            group,
            q: tile,
            scores: vec![0.0; rows * BLOCK],
            weights: vec![E::default(); rows * BLOCK],
            sums: vec![0.0; rows * dim],
            state: vec![(f32::NEG_INFINITY, 0.0); rows],
        }
    }

    fn run(mut self, out: &Shared<'_, E>) {
        let last = self.span.position + self.span.len - 1;
        let first = self.rule.window.map_or(0, |w| (self.span.position + 1).saturating_sub(w));
        for block in first / BLOCK..=last / BLOCK {
            let pages = block * BLOCK_PAGES..((block + 1) * BLOCK_PAGES).min(last / PAGE + 1);
            self.score(pages.clone());
            self.soft_max(block * BLOCK, pages.len() * PAGE);
            self.add_values(pages);
        }
        self.store(out);
    }

    /// `scores = q . k` for the pages of a block.
    fn score(&mut self, pages: Range<usize>) {
        let dim = self.kv.padded_dim;
        for (i, page) in self.span.pages[pages].iter().enumerate() {
            E::gemm_tile(Tile {
                a: &self.q,
                lda: dim,
                rows: self.state.len(),
                b: &self.layer.keys[self.kv.range(*page, self.kv_head)],
                ldb: PAGE * E::PAIR,
                cols: PAGE,
                k: dim,
                c: Rows::new(&mut self.scores[i * PAGE..], BLOCK),
                accumulate: false,
            });
        }
    }

    /// Turns a block's scores into weights relative to the largest score so far, and rescales what was summed before.
    fn soft_max(&mut self, block_start: usize, columns: usize) {
        let dim = self.kv.padded_dim;
        for row in 0..self.state.len() {
            let position = self.span.position + row / self.group;
            let first = self.rule.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let seen =
                first.saturating_sub(block_start).min(columns)..(position + 1).saturating_sub(block_start).min(columns);
            soft_max_row(
                &mut self.scores[row * BLOCK..row * BLOCK + columns],
                seen,
                self.rule,
                &mut self.weights[row * BLOCK..row * BLOCK + columns],
                &mut self.state[row],
                &mut self.sums[row * dim..(row + 1) * dim],
            );
        }
    }

    /// `sums += weights . v` for the pages of a block.
    fn add_values(&mut self, pages: Range<usize>) {
        let dim = self.kv.padded_dim;
        for (i, page) in self.span.pages[pages].iter().enumerate() {
            E::gemm_tile(Tile {
                a: &self.weights[i * PAGE..],
                lda: BLOCK,
                rows: self.state.len(),
                b: &self.layer.values[self.kv.range(*page, self.kv_head)],
                ldb: dim * E::PAIR,
                cols: dim,
                k: PAGE,
                c: Rows::new(&mut self.sums, dim),
                accumulate: true,
            });
        }
    }

    fn store(&self, out: &Shared<'_, E>) {
        let (dim, padded_dim) = (self.rule.head_dim, self.kv.padded_dim);
        for (row, (_, total)) in self.state.iter().enumerate() {
            let head = self.kv_head * self.group + row % self.group;
            let start = ((self.span.row + row / self.group) * self.rule.heads + head) * dim;
            // SAFETY: every position and head belongs to one tile.
            let out = unsafe { out.range(start..start + dim) };
            divide(&self.sums[row * padded_dim..][..dim], *total, out);
        }
    }
}

vectorised! {
    fn convert<E: Element>(x: &[f32], out: &mut [E]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = E::from_f32(*x));
    }
}

vectorised! {
    fn divide<E: Element>(x: &[f32], divisor: f32, out: &mut [E]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = E::from_f32(x / divisor));
    }
}

vectorised! {
    /// One row of [`GroupTile::soft_max`], a multiple of the lanes; keys outside `seen` get the weight 0, which changes no
    /// bit of any sum.
    fn soft_max_row<E: Element>(
        scores: &mut [f32],
        seen: Range<usize>,
        rule: Rule,
        weights: &mut [E],
        state: &mut (f32, f32),
        sums: &mut [f32],
    ) {
        let (max, total) = state;
        // Whole vectors, so that every score has its lane.
        let (used, unseen) = weights.split_at_mut(seen.end.next_multiple_of(LANES));
        unseen.fill(E::default());
        let scores = &mut scores[..used.len()];
        for score in scores.iter_mut() {
            *score *= rule.scale;
            if let Some(cap) = rule.softcap {
                *score = cap * tanh(*score / cap);
            }
        }
        scores[..seen.start.min(seen.end)].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let mut largest = [f32::NEG_INFINITY; LANES];
        for chunk in scores.chunks_exact(LANES) {
            for (largest, score) in largest.iter_mut().zip(chunk) {
                // A NaN stays a NaN in the score and becomes one in the sum; here it must not hide the others.
                *largest = if score > largest { *score } else { *largest };
            }
        }
        let new_max = largest.iter().copied().fold(*max, |a, b| if b > a { b } else { a });
        // A row that has seen no key yet: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN.
        let base = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
        let mut lanes = [0.0f32; LANES];
        for (scores, weights) in scores.chunks_exact(LANES).zip(used.chunks_exact_mut(LANES)) {
            for lane in 0..LANES {
                let weight = exp(scores[lane] - base);
                lanes[lane] += weight;
                weights[lane] = E::from_f32(weight);
            }
        }
        let rescale = exp(*max - base);
        *total = *total * rescale + lane_sum(lanes);
        *max = new_max;
        for sum in sums {
            *sum *= rescale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
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
        let mut kv = KvPages::<E>::new(1, case.kv_heads, case.dim, pages + neighbour.div_ceil(PAGE));
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
            attention(&q, &kv, 0, &spans, rule(case), &mut out);
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
}
