//! Causal attention over packed sequences whose keys and values lie in pages.
//!
//! A page holds the keys and values of [`PAGE`] consecutive positions of one sequence, for all layers, in the packed
//! form that the matrix kernel reads. Sequences with a common beginning name the same pages. Soft-max runs over blocks
//! of keys that are aligned to the position in the sequence, so the order of summation for a query depends on its
//! position alone: not on what else is in the batch, how a prompt was cut into steps, or who computed the pages.

mod kv;
mod tile;

use std::ops::Range;

pub use kv::{KvPages, PAGE, Prepare, Run, padded, prepare};

use crate::Element;
use crate::parallel::{Shared, for_each_piece};
use tile::Tile;

/// Pages whose scores go through soft-max together.
const BLOCK_PAGES: usize = 4;
/// Keys whose scores go through soft-max together.
const BLOCK: usize = BLOCK_PAGES * PAGE;
/// Query rows (positions times heads of a group) that share a pass over the keys.
const ROWS: usize = 48;

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

/// How a step's attention is cut into pieces, the same for all layers.
///
/// A piece is a tile of neighbouring queries of one sequence, or queries of several short slices whose sequences begin
/// with the same pages: streams that are generated behind one prompt read its keys together.
#[derive(Debug)]
pub struct Work<'a> {
    rows: usize,
    pages: Option<u32>,
    members: Vec<Span<'a>>,
    /// Ranges of members, those with most keys first.
    pieces: Vec<Range<usize>>,
}

impl<'a> Work<'a> {
    /// Cuts the spans for `group` query heads a key head, of which there are `kv_heads`.
    ///
    /// # Panics
    /// If a span lacks pages.
    pub fn new(spans: &[Span<'a>], group: usize, kv_heads: usize) -> Self {
        let positions = (ROWS / group).max(1);
        let mut work = Self { rows: 0, pages: None, members: Vec::new(), pieces: Vec::new() };
        let mut short = Vec::new();
        for span in spans {
            assert!(span.pages.len() * PAGE >= span.position + span.len, "a span lacks pages");
            work.rows += span.len;
            work.pages = work.pages.max(span.pages.iter().copied().max());
            if span.len * 2 <= positions {
                short.push(*span);
                continue;
            }
            for first in (0..span.len).step_by(positions) {
                let len = positions.min(span.len - first);
                let piece = Span { row: span.row + first, len, position: span.position + first, pages: span.pages };
                work.add(&[piece]);
            }
        }
        // Sequences with a common beginning become neighbours.
        short.sort_by(|a, b| a.pages.cmp(b.pages));
        let together = |a: &Span<'_>, b: &Span<'_>| {
            a.pages.len() > BLOCK_PAGES && a.pages.get(..BLOCK_PAGES) == b.pages.get(..BLOCK_PAGES)
        };
        for similar in short.chunk_by(together) {
            // As large as rows allow, as small as it takes to give every thread something.
            let most = similar
                .iter()
                .map(|s| s.len)
                .sum::<usize>()
                .div_ceil(rayon::current_num_threads().div_ceil(kv_heads) * 2);
            let most = most.min(positions);
            let mut start = 0;
            while start < similar.len() {
                let mut end = start + 1;
                let mut len = similar[start].len;
                while end < similar.len() && len + similar[end].len <= most {
                    len += similar[end].len;
                    end += 1;
                }
                work.add(&similar[start..end]);
                start = end;
            }
        }
        let Self { members, pieces, .. } = &mut work;
        let keys = |piece: &Range<usize>| members[piece.clone()].iter().map(|s| s.position + s.len).sum::<usize>();
        pieces.sort_by_key(|piece| std::cmp::Reverse(keys(piece)));
        work
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn add(&mut self, members: &[Span<'a>]) {
        let start = self.members.len();
        self.members.extend_from_slice(members);
        self.pieces.push(start..self.members.len());
    }
}

/// Attention of `q[rows, heads * padded_dim]` over the pages of each span, into `out[rows, heads * head_dim]`.
///
/// # Panics
/// If shapes do not fit.
pub fn attention<E: Element>(q: &[E], kv: &KvPages<E>, layer: usize, work: &Work<'_>, rule: Rule, out: &mut [E]) {
    assert!(rule.heads.is_multiple_of(kv.kv_heads) && padded(rule.head_dim) == kv.padded_dim, "heads");
    assert_eq!(q.len(), work.rows * rule.heads * kv.padded_dim, "shape of q");
    assert_eq!(out.len(), work.rows * rule.heads * rule.head_dim, "shape of the attention's result");
    assert!(work.pages.is_none_or(|page| (page as usize) < kv.pages()), "no such page");
    let out = Shared::new(out);
    for_each_piece(work.pieces.len() * kv.kv_heads, 1, |piece| {
        let (piece, kv_head) = (piece.start / kv.kv_heads, piece.start % kv.kv_heads);
        let members = &work.members[work.pieces[piece].clone()];
        Tile { kv, layer: &kv.layers[layer], kv_head, members, rule }.run(q, &out);
    });
}

#[cfg(test)]
mod tests;
