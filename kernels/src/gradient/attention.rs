//! Gradients of attention.
//!
//! A step's sequences that begin with the same page are a tree: a common beginning and what follows it. Their keys and
//! values get gradients from every query that saw them. One thread takes one key head of one tree, goes over tiles of
//! queries as the forward pass does, and sums in their order.

use std::collections::HashMap;
use std::ops::Range;

use crate::attention::{KvPages, PAGE, Prepare, Rule, Span};
use crate::element::{Element, round};
use crate::gemm::{LANES, Tile};
use crate::math::{exp2, lane_max, lane_sum, tanh};
use crate::memory::{carve, carved, with_scratch};
use crate::norm::Norm;
use crate::parallel::{Rows, Shared, for_each_piece};
use crate::simd::vectorised;

/// Query rows (positions times heads of a group) that go over the keys together.
const ROWS: usize = 48;

/// Which rows of a step hold the keys of which pages, for all layers.
#[derive(Debug)]
pub struct Keys<'a> {
    rows: usize,
    pub(crate) trees: Vec<Tree<'a>>,
}

/// Spans that begin with the same page.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    pub(crate) spans: Vec<TreeSpan<'a>>,
    /// Of the tree, in the order in which spans name them.
    pub(crate) pages: Vec<u32>,
    /// The row whose key lies in a slot, `[pages, PAGE]`.
    pub(crate) rows: Vec<Option<usize>>,
}

#[derive(Debug)]
pub(crate) struct TreeSpan<'a> {
    pub(crate) span: Span<'a>,
    /// Where its pages are in the tree.
    pub(crate) pages: Vec<usize>,
}

impl<'a> Keys<'a> {
    /// Sorts out spans that see nothing but one another: no key comes from an earlier step.
    ///
    /// # Panics
    /// If a span lacks pages or sees a key of none of the spans.
    pub fn new(spans: &[Span<'a>]) -> Self {
        let mut trees: Vec<Tree<'a>> = Vec::new();
        let mut by_page: HashMap<u32, usize> = HashMap::new();
        let mut found: HashMap<u32, usize> = HashMap::new();
        for span in spans {
            let end = span.position + span.len;
            assert!(!span.pages.is_empty() && span.pages.len() * PAGE >= end, "a span lacks pages");
            let tree = *by_page.entry(span.pages[0]).or_insert_with(|| {
                trees.push(Tree { spans: Vec::new(), pages: Vec::new(), rows: Vec::new() });
                trees.len() - 1
            });
            let tree = &mut trees[tree];
            let pages = span.pages[..end.div_ceil(PAGE)].iter().map(|page| {
                *found.entry(*page).or_insert_with(|| {
                    tree.pages.push(*page);
                    tree.rows.resize(tree.pages.len() * PAGE, None);
                    tree.pages.len() - 1
                })
            });
            let pages: Vec<usize> = pages.collect();
            for (i, position) in (span.position..end).enumerate() {
                tree.rows[pages[position / PAGE] * PAGE + position % PAGE] = Some(span.row + i);
            }
            tree.spans.push(TreeSpan { span: *span, pages });
        }
        for tree in &trees {
            for TreeSpan { span, pages } in &tree.spans {
                let seen = |position: usize| tree.rows[pages[position / PAGE] * PAGE + position % PAGE].is_some();
                assert!((0..span.position).all(seen), "a span sees keys of another step");
            }
        }
        // The longest work first.
        trees.sort_by_key(|tree| std::cmp::Reverse(tree.pages.len()));
        Self { rows: spans.iter().map(|span| span.len).sum(), trees }
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The position of every row.
    pub(crate) fn positions(&self) -> Vec<usize> {
        let mut positions = vec![0; self.rows];
        for TreeSpan { span, .. } in self.trees.iter().flat_map(|tree| &tree.spans) {
            for (i, position) in positions[span.row..span.row + span.len].iter_mut().enumerate() {
                *position = span.position + i;
            }
        }
        positions
    }
}

/// Gradients of q, k and v in the order of their projection, `dqkv[rows, (heads + 2 * kv_heads) * head_dim]`, before they
/// are taken back through rotation and norm, given `q[rows, heads * padded_dim]`, the pages, and the gradient
/// `d_out[rows, heads * head_dim]` of the attention's result.
///
/// # Panics
/// If shapes do not fit.
pub fn attention<E: Element>(
    q: &[E],
    kv: &KvPages<E>,
    layer: usize,
    keys: &Keys<'_>,
    rule: Rule,
    d_out: &[E],
    dqkv: &mut [f32],
) {
    let kv_heads = kv.kv_heads;
    assert!(rule.heads.is_multiple_of(kv_heads), "heads");
    assert_eq!(q.len(), keys.rows * rule.heads * kv.padded_dim, "shape of q");
    assert_eq!(d_out.len(), keys.rows * rule.heads * rule.head_dim, "shape of the attention's result");
    assert_eq!(dqkv.len(), keys.rows * (rule.heads + 2 * kv_heads) * rule.head_dim, "shape of q, k and v");
    let dqkv = Shared::new(dqkv);
    for_each_piece(keys.trees.len() * kv_heads, 1, |piece| {
        let (tree, kv_head) = (&keys.trees[piece.start / kv_heads], piece.start % kv_heads);
        Head { kv, layer, tree, kv_head, rule }.run(q, d_out, &dqkv);
    });
}

/// One key head of one tree.
struct Head<'a, E> {
    kv: &'a KvPages<E>,
    layer: usize,
    tree: &'a Tree<'a>,
    kv_head: usize,
    rule: Rule,
}

/// What is known of all keys.
struct AllKeys<'a, E> {
    /// As values lie in a page, `[pages, PAGE / PAIR, padded_dim, PAIR]`.
    keys: &'a mut [E],
    /// As keys lie in a page, `[pages, padded_dim / PAIR, PAGE, PAIR]`.
    values: &'a mut [E],
    /// `[pages * PAGE, padded_dim]`.
    d_keys: &'a mut [f32],
    d_values: &'a mut [f32],
}

/// A tile of queries; row = (position, head of the group), filled up to an even number.
struct Queries<'a, E> {
    /// `[rows, padded_dim]`.
    q: &'a mut [E],
    d_out: &'a mut [E],
    /// `[rows / PAIR, padded_dim, PAIR]`.
    packed_q: &'a mut [E],
    packed_d_out: &'a mut [E],
    /// `[rows, keys]`: scores, then probabilities.
    probs: &'a mut [f32],
    /// `[rows, keys]`: gradients of the probabilities, then of the scores.
    slopes: &'a mut [f32],
    /// What a soft cap's slope is, for one row.
    caps: &'a mut [f32],
    /// `[rows, keys]` slopes for the inner loop.
    narrow: &'a mut [E],
    /// `[keys, rows]`.
    transposed: &'a mut [E],
    /// `[rows, padded_dim]`.
    dq: &'a mut [f32],
}

impl<E: Element> Head<'_, E> {
    /// Query heads a key head.
    fn group(&self) -> usize {
        self.rule.heads / self.kv.kv_heads
    }

    /// Positions in a tile.
    fn positions(&self) -> usize {
        (ROWS / self.group()).max(1)
    }

    fn run(&self, q: &[E], d_out: &[E], dqkv: &Shared<'_, f32>) {
        let dim = self.kv.padded_dim;
        let all = self.tree.pages.len() * PAGE;
        let rows = (self.positions() * self.group()).next_multiple_of(2);
        let most = self.tree.spans.iter().map(|s| s.pages.len()).max().unwrap_or(0) * PAGE;
        let bytes = 2 * (carved::<E>(all * dim) + carved::<f32>(all * dim))
            + 4 * carved::<E>(rows * dim)
            + 2 * carved::<f32>(rows * most)
            + carved::<f32>(most)
            + 2 * carved::<E>(rows * most)
            + carved::<f32>(rows * dim);
        with_scratch(bytes, |scratch| {
            let (keys, scratch) = carve::<E>(scratch, all * dim);
            let (values, scratch) = carve::<E>(scratch, all * dim);
            let (d_keys, scratch) = carve::<f32>(scratch, all * dim);
            let (d_values, scratch) = carve::<f32>(scratch, all * dim);
            let (q_rows, scratch) = carve::<E>(scratch, rows * dim);
            let (d_out_rows, scratch) = carve::<E>(scratch, rows * dim);
            let (packed_q, scratch) = carve::<E>(scratch, rows * dim);
            let (packed_d_out, scratch) = carve::<E>(scratch, rows * dim);
            let (probs, scratch) = carve::<f32>(scratch, rows * most);
            let (slopes, scratch) = carve::<f32>(scratch, rows * most);
            let (caps, scratch) = carve::<f32>(scratch, most);
            let (narrow, scratch) = carve::<E>(scratch, rows * most);
            let (transposed, scratch) = carve::<E>(scratch, rows * most);
            let (dq, _) = carve::<f32>(scratch, rows * dim);
            d_keys.fill(0.0);
            d_values.fill(0.0);
            let mut all_keys = AllKeys { keys, values, d_keys, d_values };
            self.gather_keys(&mut all_keys);
            let mut tile = Queries {
                q: q_rows,
                d_out: d_out_rows,
                packed_q,
                packed_d_out,
                probs,
                slopes,
                caps,
                narrow,
                transposed,
                dq,
            };
            for span in &self.tree.spans {
                for first in (0..span.span.len).step_by(self.positions()) {
                    let len = self.positions().min(span.span.len - first);
                    self.queries(span, first..first + len, q, d_out, &mut all_keys, &mut tile, dqkv);
                }
            }
            self.scatter_keys(&all_keys, dqkv);
        });
    }

    /// Where a page's keys, or values, lie in the layer.
    fn page(&self, page: usize) -> Range<usize> {
        self.kv.range(self.tree.pages[page], self.kv_head)
    }

    fn gather_keys(&self, all: &mut AllKeys<'_, E>) {
        let (dim, layer) = (self.kv.padded_dim, &self.kv.layers[self.layer]);
        for page in 0..self.tree.pages.len() {
            let range = page * PAGE * dim..(page + 1) * PAGE * dim;
            let written = &self.tree.rows[page * PAGE..(page + 1) * PAGE];
            swap_packing(&layer.keys[self.page(page)], PAGE, &mut all.keys[range.clone()]);
            swap_packing(&layer.values[self.page(page)], dim, &mut all.values[range.clone()]);
            // Slots that were never written are multiplied by zero, which a leftover NaN survives.
            for slot in written.iter().enumerate().filter(|(_, row)| row.is_none()).map(|(slot, _)| slot) {
                for d in 0..dim {
                    all.keys[range.start + (slot / E::PAIR * dim + d) * E::PAIR + slot % E::PAIR] = E::default();
                    all.values[range.start + (d / E::PAIR * PAGE + slot) * E::PAIR + d % E::PAIR] = E::default();
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a step of `run`")]
    fn queries(
        &self,
        span: &TreeSpan<'_>,
        positions: Range<usize>,
        q: &[E],
        d_out: &[E],
        all: &mut AllKeys<'_, E>,
        tile: &mut Queries<'_, E>,
        dqkv: &Shared<'_, f32>,
    ) {
        let (dim, head_dim, group) = (self.kv.padded_dim, self.rule.head_dim, self.group());
        let first_row = span.span.row + positions.start;
        let rows = positions.len() * group;
        let even = rows.next_multiple_of(2);
        let position = span.span.position + positions.start;
        let pages = &span.pages[..(position + positions.len()).div_ceil(PAGE)];
        let keys = pages.len() * PAGE;

        tile.q[rows * dim..even * dim].fill(E::default());
        tile.d_out[..even * dim].fill(E::default());
        for (i, row) in (first_row..first_row + positions.len()).enumerate() {
            let head = row * self.rule.heads + self.kv_head * group;
            tile.q[i * group * dim..(i + 1) * group * dim].copy_from_slice(&q[head * dim..(head + group) * dim]);
            for g in 0..group {
                tile.d_out[(i * group + g) * dim..][..head_dim]
                    .copy_from_slice(&d_out[(head + g) * head_dim..(head + g + 1) * head_dim]);
            }
        }
        pack(&tile.q[..even * dim], dim, tile.packed_q);
        pack(&tile.d_out[..even * dim], dim, tile.packed_d_out);

        let layer = &self.kv.layers[self.layer];
        for (i, page) in pages.iter().enumerate() {
            let whole = page * PAGE * dim..(page + 1) * PAGE * dim;
            let score = |a: &[E], b: &[E], c: &mut [f32]| {
                E::gemm_tile(Tile {
                    a,
                    lda: dim,
                    rows,
                    b: &[b],
                    ldb: PAGE * E::PAIR,
                    cols: PAGE,
                    k: dim,
                    c: Rows::new(&mut c[i * PAGE..], keys),
                    accumulate: false,
                    from_memory: false,
                });
            };
            score(tile.q, &layer.keys[self.page(*page)], tile.probs);
            score(tile.d_out, &all.values[whole], tile.slopes);
        }
        for row in 0..rows {
            let position = position + row / group;
            let seen = self.rule.window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1;
            let range = row * keys..(row + 1) * keys;
            soft_max_row(&mut tile.probs[range.clone()], &mut tile.slopes[range], tile.caps, seen, self.rule);
        }

        narrow_and_transpose(&tile.probs[..rows * keys], keys, even, tile.narrow, tile.transposed);
        self.outer(tile.transposed, even, tile.packed_d_out, pages, all.d_values);
        narrow_and_transpose(&tile.slopes[..rows * keys], keys, even, tile.narrow, tile.transposed);
        self.outer(tile.transposed, even, tile.packed_q, pages, all.d_keys);
        let stretches: Vec<&[E]> =
            pages.iter().map(|page| &all.keys[page * PAGE * dim..(page + 1) * PAGE * dim]).collect();
        E::gemm_tile(Tile {
            a: tile.narrow,
            lda: keys,
            rows,
            b: &stretches,
            ldb: dim * E::PAIR,
            cols: dim,
            k: keys,
            c: Rows::new(tile.dq, dim),
            accumulate: false,
            from_memory: false,
        });
        let width = (self.rule.heads + 2 * self.kv.kv_heads) * head_dim;
        for (i, dq) in tile.dq.chunks_exact(dim).take(rows).enumerate() {
            let start = (first_row + i / group) * width + (self.kv_head * group + i % group) * head_dim;
            // SAFETY: every row and head belongs to one piece.
            unsafe { dqkv.range(start..start + head_dim) }.copy_from_slice(&dq[..head_dim]);
        }
    }

    /// `sums[keys, padded_dim] += transposed[keys, rows] . packed[rows, padded_dim]` for the keys of the pages.
    fn outer(&self, transposed: &[E], rows: usize, packed: &[E], pages: &[usize], sums: &mut [f32]) {
        let dim = self.kv.padded_dim;
        for (i, page) in pages.iter().enumerate() {
            E::gemm_tile(Tile {
                a: &transposed[i * PAGE * rows..],
                lda: rows,
                rows: PAGE,
                b: &[packed],
                ldb: dim * E::PAIR,
                cols: dim,
                k: rows,
                c: Rows::new(&mut sums[page * PAGE * dim..(page + 1) * PAGE * dim], dim),
                accumulate: true,
                from_memory: false,
            });
        }
    }

    fn scatter_keys(&self, all: &AllKeys<'_, E>, dqkv: &Shared<'_, f32>) {
        let (dim, head_dim, kv_heads) = (self.kv.padded_dim, self.rule.head_dim, self.kv.kv_heads);
        let width = (self.rule.heads + 2 * kv_heads) * head_dim;
        for (slot, row) in self.tree.rows.iter().enumerate().filter_map(|(slot, row)| Some((slot, (*row)?))) {
            for (part, sums) in [(0, &*all.d_keys), (1, &*all.d_values)] {
                let start = row * width + (self.rule.heads + part * kv_heads + self.kv_head) * head_dim;
                // SAFETY: every row and head belongs to one piece.
                unsafe { dqkv.range(start..start + head_dim) }.copy_from_slice(&sums[slot * dim..][..head_dim]);
            }
        }
    }
}

/// From `[depth / PAIR, columns, PAIR]` to `[columns / PAIR, depth, PAIR]`.
fn swap_packing<E: Element>(x: &[E], columns: usize, out: &mut [E]) {
    let depth = x.len() / columns;
    for (pair, x) in x.chunks_exact(columns * E::PAIR).enumerate() {
        for (column, x) in x.chunks_exact(E::PAIR).enumerate() {
            for (i, x) in x.iter().enumerate() {
                let d = pair * E::PAIR + i;
                out[(column / E::PAIR * depth + d) * E::PAIR + column % E::PAIR] = *x;
            }
        }
    }
}

/// From `[rows, columns]` to `[rows / PAIR, columns, PAIR]`.
fn pack<E: Element>(x: &[E], columns: usize, out: &mut [E]) {
    for (rows, out) in x.chunks_exact(columns * E::PAIR).zip(out.chunks_exact_mut(columns * E::PAIR)) {
        for (i, row) in rows.chunks_exact(columns).enumerate() {
            for (out, x) in out.iter_mut().skip(i).step_by(E::PAIR).zip(row) {
                *out = *x;
            }
        }
    }
}

/// `x[rows, columns]` to `narrow[rows, columns]` and `transposed[columns, padded]`, filled up with zeros.
fn narrow_and_transpose<E: Element>(x: &[f32], columns: usize, padded: usize, narrow: &mut [E], transposed: &mut [E]) {
    round(x, &mut narrow[..x.len()]);
    let rows = x.len() / columns;
    for (column, out) in transposed.chunks_exact_mut(padded).take(columns).enumerate() {
        for (row, out) in out[..rows].iter_mut().enumerate() {
            *out = narrow[row * columns + column];
        }
        out[rows..].fill(E::default());
    }
}

vectorised! {
    /// Scores become probabilities, and gradients of probabilities become gradients of scores before they were scaled;
    /// keys outside `seen` get zeros. A multiple of the lanes.
    fn soft_max_row(scores: &mut [f32], slopes: &mut [f32], caps: &mut [f32], seen: Range<usize>, rule: Rule) {
        let len = scores.len();
        let (slopes, caps) = (&mut slopes[..len], &mut caps[..len]);
        let mut scale = rule.scale;
        if let Some(cap) = rule.softcap {
            for (score, slope) in scores.iter_mut().zip(caps.iter_mut()) {
                let t = tanh(*score * scale / cap);
                *score = cap * t;
                *slope = (1.0 - t * t) * rule.scale;
            }
            scale = 1.0;
        } else {
            caps.fill(rule.scale);
        }
        scale *= std::f32::consts::LOG2_E;
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        for unseen in [0..seen.start, seen.end..len] {
            slopes[unseen.clone()].fill(0.0);
            caps[unseen].fill(0.0);
        }
        let (scores, _) = scores.as_chunks_mut::<LANES>();
        let (slopes, _) = slopes.as_chunks_mut::<LANES>();
        let (caps, _) = caps.as_chunks::<LANES>();
        let mut largest = [f32::NEG_INFINITY; LANES];
        for chunk in scores.iter_mut() {
            for (largest, score) in largest.iter_mut().zip(chunk) {
                *score *= scale;
                *largest = if *score > *largest { *score } else { *largest };
            }
        }
        let max = lane_max(largest);
        let (mut totals, mut along) = ([0.0f32; LANES], [0.0f32; LANES]);
        for (scores, slopes) in scores.iter_mut().zip(slopes.iter()) {
            for lane in 0..LANES {
                scores[lane] = exp2(scores[lane] - max);
                totals[lane] += scores[lane];
                along[lane] += scores[lane] * slopes[lane];
            }
        }
        let share = 1.0 / lane_sum(totals);
        let along = lane_sum(along) * share;
        for ((scores, slopes), caps) in scores.iter_mut().zip(slopes.iter_mut()).zip(caps) {
            for lane in 0..LANES {
                scores[lane] *= share;
                slopes[lane] = scores[lane] * (slopes[lane] - along) * caps[lane];
            }
        }
    }
}

/// Takes the gradients of q, k and v `dqkv[rows, (heads + 2 * kv_heads) * head_dim]` back through rotation and norm, into
/// `out` of the same shape. Where q and k have norms, `qkv` is what the norms were given, and the gradients of their
/// weights are added to `d_q_norm` and `d_k_norm`.
///
/// # Panics
/// If shapes do not fit.
pub fn unprepare<E: Element>(
    dqkv: &[f32],
    qkv: &[E],
    keys: &Keys<'_>,
    how: Prepare<'_>,
    d_q_norm: &mut [f32],
    d_k_norm: &mut [f32],
    out: &mut [E],
) {
    /// Rows whose part of the norms' gradient is summed by one thread: a fixed cut.
    const PIECE: usize = 64;
    let (dim, rows) = (how.head_dim, keys.rows);
    let width = dqkv.len() / rows.max(1);
    let kv_heads = (width / dim - how.heads) / 2;
    let normed = how.q_norm.is_some() || how.k_norm.is_some();
    assert_eq!((dqkv.len(), width), (rows * width, (how.heads + 2 * kv_heads) * dim), "shapes of q, k and v");
    assert!(out.len() == dqkv.len() && (!normed || qkv.len() == dqkv.len()), "shapes of q, k and v");
    let positions = keys.positions();
    let norms = d_q_norm.len() + d_k_norm.len();
    let mut partial = vec![0.0; rows.div_ceil(PIECE) * norms];
    let (out, sums) = (Shared::new(out), Shared::new(&mut partial));
    for_each_piece(rows, PIECE, |piece| {
        let block = piece.start / PIECE;
        // SAFETY: pieces are disjoint, and each is one block.
        let sums = unsafe { sums.range(block * norms..(block + 1) * norms) };
        let (q_sums, k_sums) = sums.split_at_mut(d_q_norm.len());
        with_scratch(3 * carved::<f32>(dim), |scratch| {
            let (d, scratch) = carve::<f32>(scratch, dim);
            let (x, scratch) = carve::<f32>(scratch, dim);
            let (dx, _) = carve::<f32>(scratch, dim);
            for row in piece {
                for head in 0..how.heads + 2 * kv_heads {
                    let range = row * width + head * dim..row * width + (head + 1) * dim;
                    d.copy_from_slice(&dqkv[range.clone()]);
                    let (norm, sums): (Option<&Norm>, &mut [f32]) = match head {
                        head if head < how.heads => (how.q_norm, q_sums),
                        head if head < how.heads + kv_heads => (how.k_norm, k_sums),
                        _ => (None, &mut []),
                    };
                    if head < how.heads + kv_heads {
                        how.rotary.undo(positions[row], d);
                    }
                    // SAFETY: every row belongs to one piece.
                    let out = unsafe { out.range(range.clone()) };
                    match norm {
                        Some(norm) => {
                            x.iter_mut().zip(&qkv[range]).for_each(|(x, y)| *x = y.to_f32());
                            dx.fill(0.0);
                            norm.backward_row(x, d, dx, sums);
                            round(dx, out);
                        }
                        None => round(d, out),
                    }
                }
            }
        });
    });
    for block in partial.chunks_exact(norms.max(1)) {
        let (q_sums, k_sums) = block.split_at(d_q_norm.len().min(block.len()));
        d_q_norm.iter_mut().zip(q_sums).for_each(|(sum, part)| *sum += part);
        d_k_norm.iter_mut().zip(k_sums).for_each(|(sum, part)| *sum += part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Run, Work, prepare};
    use crate::rotary::Rotary;
    use half::bf16;

    /// Rows of a step: the position, and the rows that it sees, itself the last.
    fn seen(spans: &[Span<'_>]) -> Vec<Vec<usize>> {
        let mut rows: Vec<Vec<usize>> = Vec::new();
        for span in spans {
            let before: Vec<usize> = match span.position {
                0 => Vec::new(),
                _ => {
                    let parent = spans.iter().find(|s| s.position == 0 && s.pages[0] == span.pages[0]).unwrap();
                    (parent.row..parent.row + span.position).collect()
                }
            };
            rows.extend((0..span.len).map(|i| before.iter().copied().chain(span.row..=span.row + i).collect()));
        }
        rows
    }

    /// `sum(d_out * attention(qkv))` in f64.
    fn loss(qkv: &[f64], d_out: &[f64], seen: &[Vec<usize>], kv_heads: usize, rule: Rule) -> f64 {
        let (dim, heads) = (rule.head_dim, rule.heads);
        let width = (heads + 2 * kv_heads) * dim;
        let at = |row: usize, head: usize| &qkv[row * width + head * dim..row * width + (head + 1) * dim];
        let mut sum = 0.0;
        for (row, seen) in seen.iter().enumerate() {
            let seen = &seen[rule.window.map_or(0, |w| seen.len().saturating_sub(w))..];
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let powers: Vec<f64> = seen
                    .iter()
                    .map(|key| {
                        let dot: f64 = at(row, head).iter().zip(at(*key, heads + kv)).map(|(q, k)| q * k).sum();
                        let score = dot * f64::from(rule.scale);
                        rule.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
                    })
                    .collect();
                let total: f64 = powers.iter().sum();
                for (key, power) in seen.iter().zip(powers) {
                    let d = &d_out[(row * heads + head) * dim..];
                    let dot: f64 = at(*key, heads + kv_heads + kv).iter().zip(d).map(|(v, d)| v * d).sum();
                    sum += dot * power / total;
                }
            }
        }
        sum
    }

    fn check<E: Element>(kv_heads: usize, rule: Rule, tolerance: f64) {
        let (dim, heads) = (rule.head_dim, rule.heads);
        let width = (heads + 2 * kv_heads) * dim;
        let pages: [&[u32]; 4] = [&[3], &[3, 0], &[3, 5], &[1, 2]];
        let (mut row, mut spans) = (0, Vec::new());
        for (pages, (position, len)) in pages.into_iter().zip([(0, 32), (32, 5), (32, 21), (0, 37)]) {
            spans.push(Span { row, len, position, pages });
            row += len;
        }
        let rows = row;
        let number = |i: usize, seed: usize| E::from_f32((((i + seed) * 7919) % 1009) as f32 / 504.0 - 1.0).to_f32();
        let qkv: Vec<f32> = (0..rows * width).map(|i| number(i, 1)).collect();
        let d_out: Vec<f32> = (0..rows * heads * dim).map(|i| number(i, 7)).collect();

        let mut kv = KvPages::<E>::new(1, kv_heads, dim, 6).unwrap();
        // What nobody writes must not be seen.
        kv.layers[0].keys.fill(E::from_f32(f32::NAN));
        kv.layers[0].values.fill(E::from_f32(f32::NAN));
        let mut runs = Vec::new();
        for span in &spans {
            for first in (0..span.len).step_by(PAGE) {
                let position = span.position + first;
                let len = PAGE.min(span.len - first);
                runs.push(Run { row: span.row + first, len, position, page: span.pages[position / PAGE] });
            }
        }
        let rotary = Rotary::new(&[], 100);
        let how = Prepare { heads, head_dim: dim, q_norm: None, k_norm: None, rotary: &rotary };
        let mut q = vec![E::default(); rows * heads * kv.padded_dim];
        prepare(&qkv, 0, &runs, how, &mut q, &mut kv, 0);

        let keys = Keys::new(&spans);
        assert_eq!(keys.rows(), Work::new(&spans, heads / kv_heads, kv_heads).rows());
        let narrow: Vec<E> = d_out.iter().map(|x| E::from_f32(*x)).collect();
        let mut found = vec![f32::NAN; qkv.len()];
        attention(&q, &kv, 0, &keys, rule, &narrow, &mut found);
        let mut back = vec![E::default(); qkv.len()];
        unprepare(&found, &[], &keys, how, &mut [], &mut [], &mut back);
        assert!(found.iter().zip(&back).all(|(a, b)| E::from_f32(*a) == *b));

        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (qkv, d_out, seen) = (wide(&qkv), wide(&d_out), seen(&spans));
        for i in (0..qkv.len()).step_by(13) {
            let at = |step: f64| {
                let mut qkv = qkv.clone();
                qkv[i] += step;
                loss(&qkv, &d_out, &seen, kv_heads, rule)
            };
            let expected = (at(1e-4) - at(-1e-4)) / 2e-4;
            let error = (f64::from(found[i]) - expected).abs();
            assert!(error < tolerance * expected.abs().max(1.0), "{i} of {width}: {} {expected}", found[i]);
        }
    }

    #[test]
    fn slopes_are_those_of_the_sum_in_f64() {
        let rule = Rule { heads: 4, head_dim: 6, scale: 0.5, softcap: None, window: None };
        check::<f32>(2, rule, 1e-5);
        check::<f32>(4, Rule { softcap: Some(2.0), ..rule }, 1e-5);
        check::<f32>(1, Rule { window: Some(9), head_dim: 20, ..rule }, 1e-5);
        check::<bf16>(2, rule, 2e-2);
        check::<bf16>(4, Rule { heads: 4, head_dim: 16, scale: 0.25, softcap: Some(3.0), window: Some(34) }, 2e-2);
    }
}
