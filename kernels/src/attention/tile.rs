//! A tile of queries that go over the keys together.

use std::ops::Range;

use super::kv::KvLayer;
use super::{BLOCK, BLOCK_PAGES, KvPages, PAGE, Rule, Span};
use crate::element::{Element, scale};
use crate::gemm::{self, LANES};
use crate::math::{exp2, lane_max, lane_sum, tanh};
use crate::memory::{carve, carved, prefetch, with_scratch};
use crate::parallel::{Rows, Shared};
use crate::simd::vectorised;

/// Rows that are so few that a pass over the keys is bound by memory.
const FEW_ROWS: usize = 12;

/// Queries of all heads that share one key and value head.
pub(super) struct Tile<'a, E> {
    pub(super) kv: &'a KvPages<E>,
    pub(super) layer: &'a KvLayer<E>,
    pub(super) kv_head: usize,
    /// Neighbouring queries of a sequence, or of several.
    pub(super) members: &'a [Span<'a>],
    pub(super) rule: Rule,
}

/// What is known of the rows so far; row = (member, position, head of the group).
struct State<'a, E> {
    /// `[rows, padded_dim]`.
    q: &'a mut [E],
    /// `[rows, BLOCK]`.
    scores: &'a mut [f32],
    /// `[rows, BLOCK]`: powers of the scores.
    weights: &'a mut [E],
    /// `[rows, padded_dim]`.
    sums: &'a mut [f32],
    /// Largest score so far and sum of powers, for each row.
    totals: &'a mut [[f32; 2]],
}

impl<E: Element> Tile<'_, E> {
    /// Query heads a key head.
    fn group(&self) -> usize {
        self.rule.heads / self.kv.kv_heads
    }

    pub(super) fn run(&self, q: &[E], out: &Shared<'_, E>) {
        let rows = self.members.iter().map(|m| m.len).sum::<usize>() * self.group();
        let dim = self.kv.padded_dim;
        let bytes = carved::<E>(rows * dim)
            + carved::<f32>(rows * BLOCK)
            + carved::<E>(rows * BLOCK)
            + carved::<f32>(rows * dim)
            + carved::<[f32; 2]>(rows);
        with_scratch(bytes, |scratch| {
            let (q_rows, scratch) = carve::<E>(scratch, rows * dim);
            let (scores, scratch) = carve::<f32>(scratch, rows * BLOCK);
            let (weights, scratch) = carve::<E>(scratch, rows * BLOCK);
            let (sums, scratch) = carve::<f32>(scratch, rows * dim);
            let (totals, _) = carve::<[f32; 2]>(scratch, rows);
            sums.fill(0.0);
            totals.fill([f32::NEG_INFINITY, 0.0]);
            let mut state = State { q: q_rows, scores, weights, sums, totals };
            self.gather(q, &mut state);
            self.attend(&mut state);
            self.store(&state, out);
        });
    }

    fn gather(&self, q: &[E], state: &mut State<'_, E>) {
        let (dim, group) = (self.kv.padded_dim, self.group());
        let rows = self.members.iter().flat_map(|m| m.row..m.row + m.len);
        for (tile, row) in state.q.chunks_exact_mut(group * dim).zip(rows) {
            let start = (row * self.rule.heads + self.kv_head * group) * dim;
            tile.copy_from_slice(&q[start..start + group * dim]);
        }
    }

    fn attend(&self, state: &mut State<'_, E>) {
        let ends = self.members.iter().map(|m| m.position + m.len);
        for block in 0..ends.max().unwrap_or(0).div_ceil(BLOCK) {
            let (mut first, mut row) = (0, 0);
            while first < self.members.len() {
                // Members that see the same keys go together.
                let pages = self.pages(first, block);
                let mut next = first + 1;
                while next < self.members.len() && self.pages(next, block) == pages {
                    next += 1;
                }
                let rows = self.members[first..next].iter().map(|m| m.len).sum::<usize>() * self.group();
                if !pages.is_empty() {
                    if rows <= FEW_ROWS {
                        self.pages(first, block + 1).iter().for_each(|page| self.fetch(*page));
                    }
                    self.score(state, row..row + rows, pages);
                    self.soft_max(state, row, &self.members[first..next], block * BLOCK, pages.len() * PAGE);
                    self.add_values(state, row..row + rows, pages);
                }
                (first, row) = (next, row + rows);
            }
        }
    }

    /// The pages of a block that a member looks at.
    fn pages(&self, member: usize, block: usize) -> &[u32] {
        let Span { len, position, pages, .. } = self.members[member];
        let seen_from = self.rule.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let end = (position + len).div_ceil(PAGE).min((block + 1) * BLOCK_PAGES);
        match seen_from / BLOCK <= block {
            true => pages.get(block * BLOCK_PAGES..end).unwrap_or(&[]),
            false => &[],
        }
    }

    /// Brings a page on its way from memory: few rows are done with a block before the next one has come.
    fn fetch(&self, page: u32) {
        let range = self.kv.range(page, self.kv_head);
        prefetch(&self.layer.keys[range.clone()]);
        prefetch(&self.layer.values[range]);
    }

    /// `scores = q . k` for the pages of a block.
    fn score(&self, state: &mut State<'_, E>, rows: Range<usize>, pages: &[u32]) {
        let dim = self.kv.padded_dim;
        for (i, page) in pages.iter().enumerate() {
            E::gemm_tile(gemm::Tile {
                a: &state.q[rows.start * dim..],
                lda: dim,
                rows: rows.len(),
                b: &[&self.layer.keys[self.kv.range(*page, self.kv_head)]],
                ldb: PAGE * E::PAIR,
                cols: PAGE,
                k: dim,
                c: Rows::new(&mut state.scores[rows.start * BLOCK + i * PAGE..], BLOCK),
                accumulate: false,
                from_memory: false,
            });
        }
    }

    /// Turns a block's scores into weights relative to the largest score so far, and rescales what was summed before.
    fn soft_max(&self, state: &mut State<'_, E>, row: usize, members: &[Span<'_>], start: usize, columns: usize) {
        let (dim, group) = (self.kv.padded_dim, self.group());
        let positions = members.iter().flat_map(|m| m.position..m.position + m.len);
        let rows = positions.flat_map(|position| std::iter::repeat_n(position, group));
        for (row, position) in (row..).zip(rows) {
            let first = self.rule.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let seen = first.saturating_sub(start).min(columns)..(position + 1).saturating_sub(start).min(columns);
            soft_max_row(
                &mut state.scores[row * BLOCK..row * BLOCK + columns],
                seen,
                self.rule,
                &mut state.weights[row * BLOCK..row * BLOCK + columns],
                &mut state.totals[row],
                &mut state.sums[row * dim..(row + 1) * dim],
            );
        }
    }

    /// `sums += weights . v` for the pages of a block.
    fn add_values(&self, state: &mut State<'_, E>, rows: Range<usize>, pages: &[u32]) {
        let dim = self.kv.padded_dim;
        let mut values = [&[][..]; BLOCK_PAGES];
        for (values, page) in values.iter_mut().zip(pages) {
            *values = &self.layer.values[self.kv.range(*page, self.kv_head)];
        }
        E::gemm_tile(gemm::Tile {
            a: &state.weights[rows.start * BLOCK..],
            lda: BLOCK,
            rows: rows.len(),
            b: &values[..pages.len()],
            ldb: dim * E::PAIR,
            cols: dim,
            k: pages.len() * PAGE,
            c: Rows::new(&mut state.sums[rows.start * dim..], dim),
            accumulate: true,
            from_memory: false,
        });
    }

    fn store(&self, state: &State<'_, E>, out: &Shared<'_, E>) {
        let (dim, padded_dim, group) = (self.rule.head_dim, self.kv.padded_dim, self.group());
        let rows = self.members.iter().flat_map(|m| m.row..m.row + m.len);
        let heads =
            rows.flat_map(|row| (0..group).map(move |head| row * self.rule.heads + self.kv_head * group + head));
        for (i, head) in heads.enumerate() {
            // SAFETY: every position and head belongs to one tile.
            let out = unsafe { out.range(head * dim..(head + 1) * dim) };
            scale(&state.sums[i * padded_dim..][..dim], 1.0 / state.totals[i][1], out);
        }
    }
}

vectorised! {
    /// One row of [`Tile::soft_max`], a multiple of the lanes; keys outside `seen` get the weight 0, which changes no bit
    /// of any sum. Scores are taken to base 2, whose powers are cheaper.
    fn soft_max_row<E: Element>(
        scores: &mut [f32],
        seen: Range<usize>,
        rule: Rule,
        weights: &mut [E],
        totals: &mut [f32; 2],
        sums: &mut [f32],
    ) {
        let [max, total] = totals;
        // Whole vectors, so that every score has its lane.
        let vectors = seen.start.min(seen.end) / LANES * LANES..seen.end.next_multiple_of(LANES);
        weights[..vectors.start].fill(E::default());
        weights[vectors.end..].fill(E::default());
        let (scores, weights) = (&mut scores[vectors.clone()], &mut weights[vectors.clone()]);
        let mut scale = rule.scale;
        if let Some(cap) = rule.softcap {
            scores.iter_mut().for_each(|score| *score = cap * tanh(*score * scale / cap));
            scale = 1.0;
        }
        scale *= std::f32::consts::LOG2_E;
        let end = seen.end - vectors.start;
        scores[..seen.start.clamp(vectors.start, seen.end) - vectors.start].fill(f32::NEG_INFINITY);
        scores[end..].fill(f32::NEG_INFINITY);
        let mut largest = [f32::NEG_INFINITY; LANES];
        let (scores, _) = scores.as_chunks_mut::<LANES>();
        for chunk in scores.iter_mut() {
            for (largest, score) in largest.iter_mut().zip(chunk) {
                *score *= scale;
                // A NaN stays a NaN in the score and becomes one in the sum; here it must not hide the others.
                *largest = if *score > *largest { *score } else { *largest };
            }
        }
        let new_max = lane_max(largest).max(*max);
        // A row that has seen no key yet: 2^(-inf - 0) is 0, 2^(-inf - -inf) would be NaN.
        let base = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
        let mut lanes = [0.0f32; LANES];
        for (scores, weights) in scores.iter().zip(weights.as_chunks_mut::<LANES>().0) {
            let mut powers = [0.0f32; LANES];
            for lane in 0..LANES {
                powers[lane] = exp2(scores[lane] - base);
                lanes[lane] += powers[lane];
            }
            *weights = E::from_lanes::<S>(powers);
        }
        let rescale = exp2(*max - base);
        *total = *total * rescale + lane_sum(lanes);
        *max = new_max;
        for sum in sums {
            *sum *= rescale;
        }
    }
}
