//! How a step's attention is cut.
//!
//! A block of a kernel attends from at most 64 or 128 rows, positions times the heads that share a key head, to a range of
//! keys. What sees few rows or is to be the same in every step has its keys cut into chunks, each the work of a block,
//! whose results are merged: see [`CutRule::chunk`]. Chunks are aligned to the position in the sequence, so those of
//! sequences with a common beginning are the same, and rows of all of them may stand in one block: a prompt's keys are
//! then read once for all its candidates or samples. A row's result has the same bits whether they do or not.

use bytemuck::{Pod, Zeroable};

use super::attention::{Kernel, padded};
use super::{Buffer, Gpu, GpuError, Result};
use crate::Element;
use crate::attention::{PAGE, Run, Span};

/// Most rows that a block of any kernel takes.
const MOST_ROWS: usize = 128;
/// Keys of a chunk for few rows: with 8 key heads, a stream of 4,096 tokens is the work of 128 blocks.
const SHORT: usize = 256;
/// Keys of a chunk for more rows, and for all if invariant: so many that the partial results of full blocks, eight bytes
/// written and read for 4 * 1,024 operations, take a quarter of the time of those.
const LONG: usize = 1024;
/// Partial results of a row, one for each lane of the warp that merges them; longer sequences have longer chunks.
const MOST_CHUNKS: usize = 32;
/// The slot of a row that needs none; `WHOLE` in `cuda/attention.cu`.
const WHOLE: u32 = u32::MAX;
/// Page of rows that are of no sequence; `NONE` in `cuda/prepare.cu`.
const NO_PAGE: u32 = u32::MAX;

/// Whose attention is cut, and how.
#[derive(Clone, Copy, Debug)]
pub struct CutRule {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a row's keys are cut by its own position alone, so that its bits are the same however its sequence is cut
    /// into steps. Otherwise they depend on the span that it comes in as well, but on no other.
    pub invariant: bool,
    /// Bytes of partial results at a time, or as many as a block's rows may need. What needs more comes in rounds.
    pub partial_bytes: usize,
}

/// [`CutRule::partial_bytes`] for the work of 2,000 blocks with heads of 128 elements, several times what a large GPU does
/// at once.
pub const PARTIAL_BYTES: usize = 64 << 20;

/// Partial results, which are used again from layer to layer.
#[derive(Debug)]
pub struct Partials {
    /// `[slots, heads, padded_dim]`.
    pub(super) results: Buffer<f32>,
    /// `[slots, heads]`.
    pub(super) log_sums: Buffer<f32>,
}

/// Where a step's rows are, and how its attention is cut, the same for all layers.
#[derive(Debug)]
pub struct Pieces {
    gpu: Gpu,
    step_rows: usize,
    /// Rows that a block takes of the kernel that it was cut for.
    pub(super) block_rows: usize,
    /// Query and key heads that it was cut for.
    pub(super) heads: [usize; 2],
    /// Position and page of each row.
    pub(super) positions: Buffer<u32>,
    pub(super) row_pages: Buffer<u32>,
    /// What rounds are parts of. The lists may be longer than what is in them.
    pub(super) pieces: Buffer<Piece>,
    pub(super) rows: Buffer<Row>,
    pub(super) merges: Buffer<Merge>,
    pub(super) rounds: Vec<Round>,
    /// Slots of the largest round.
    pub(super) slots: usize,
    /// Pages of all spans, one after the other.
    pub(super) pages: Buffer<u32>,
    /// The largest page and position among them.
    pub(super) last_page: u32,
    pub(super) last_position: usize,
}

/// As in `cuda/attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Piece {
    first: u32,
    rows: u32,
    position: u32,
    from: u32,
    to: u32,
    pages: u32,
}

/// As in `cuda/attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Row {
    row: u32,
    slot: u32,
}

/// As in `cuda/attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Merge {
    row: u32,
    slot: u32,
    count: u32,
}

/// So many of the pieces and then of the merges, after those of the rounds before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Round {
    pub(super) pieces: usize,
    pub(super) merges: usize,
}

/// The lists of a step.
#[derive(Debug, Default)]
struct Cut {
    pieces: Vec<Piece>,
    rows: Vec<Row>,
    merges: Vec<Merge>,
    rounds: Vec<Round>,
    slots: usize,
    pages: Vec<u32>,
}

/// Neighbouring rows of a span that a block can take, whose keys are cut alike.
#[derive(Clone, Copy, Debug)]
struct Slice<'a> {
    span: Span<'a>,
    /// Where the span's pages begin in the list of pages.
    pages: usize,
    /// Keys of a chunk. All rows are in the same one.
    chunk: usize,
    /// Of its first row's first chunk.
    slot: usize,
}

impl Slice<'_> {
    /// All but the last are before every row.
    fn chunks(&self) -> usize {
        self.span.position / self.chunk + 1
    }

    /// Whether both see all of a chunk, and it is the same.
    fn shares(&self, other: &Self, chunk: usize) -> bool {
        let pages = chunk * self.chunk / PAGE..(chunk + 1) * self.chunk / PAGE;
        self.chunk == other.chunk
            && chunk + 1 < self.chunks().min(other.chunks())
            && self.span.pages[pages.clone()] == other.span.pages[pages]
    }
}

impl Pieces {
    /// Of nothing yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            step_rows: 0,
            block_rows: 0,
            heads: [0, 0],
            positions: gpu.empty(),
            row_pages: gpu.empty(),
            pieces: gpu.empty(),
            rows: gpu.empty(),
            merges: gpu.empty(),
            rounds: Vec::new(),
            slots: 0,
            pages: gpu.empty(),
            last_page: 0,
            last_position: 0,
        }
    }

    /// Cuts the spans; `runs` cover the same rows in order. The step has `step_rows` rows: those after the runs' are of no
    /// sequence, and what comes of them is not said.
    ///
    /// # Errors
    /// If there is no memory for the lists, or too many heads share a key head.
    ///
    /// # Panics
    /// If a span lacks pages, or there are fewer rows than the runs have.
    pub fn set<E: Element>(&mut self, spans: &[Span<'_>], runs: &[Run], rule: CutRule, step_rows: usize) -> Result<()> {
        let (group, block_rows) = (rule.heads / rule.kv_heads, Kernel::of::<E>(&self.gpu, rule.head_dim).rows());
        if group > block_rows {
            return Err(GpuError::Failed(format!("{group} heads share a key head: the kernels take {block_rows}")));
        }
        for span in spans {
            assert!(span.pages.len() * PAGE >= span.position + span.len, "a span lacks pages");
        }
        let (mut positions, mut row_pages) = (Vec::with_capacity(step_rows), Vec::with_capacity(step_rows));
        for run in runs {
            assert_eq!(run.row, positions.len(), "runs cover the rows in order");
            positions.extend((run.position..run.position + run.len).map(|position| position as u32));
            row_pages.resize(positions.len(), run.page);
        }
        assert!(positions.len() <= step_rows, "more rows than the step has");
        let mut cut = rule.cut(block_rows / group, spans, &positions);
        cut.fill_up(rule.slots(block_rows / group));
        self.block_rows = block_rows;
        // If a list cannot be written, nothing is attended to.
        self.rounds.clear();
        self.heads = [rule.heads, rule.kv_heads];
        self.last_page = cut.pages.iter().chain(&row_pages).copied().max().unwrap_or(0);
        self.last_position = positions.iter().copied().max().unwrap_or(0) as usize;
        positions.resize(step_rows, 0);
        row_pages.resize(step_rows, NO_PAGE);
        self.step_rows = step_rows;
        write(&mut self.positions, &positions)?;
        write(&mut self.row_pages, &row_pages)?;
        write(&mut self.pages, &cut.pages)?;
        write(&mut self.pieces, &cut.pieces)?;
        write(&mut self.rows, &cut.rows)?;
        write(&mut self.merges, &cut.merges)?;
        (self.rounds, self.slots) = (cut.rounds, cut.slots);
        Ok(())
    }

    /// What the kernels that are launched for a step depend on, but for what is in the lists; `None` if that is too much to
    /// be said.
    pub fn shape(&self) -> Option<[usize; 4]> {
        match self.rounds[..] {
            [Round { pieces, merges }] => Some([self.step_rows, pieces, merges, self.slots]),
            _ => None,
        }
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.step_rows
    }
}

/// Sets the beginning of a list, which takes new memory seldom.
pub(super) fn write<T: Pod>(list: &mut Buffer<T>, values: &[T]) -> Result<()> {
    if list.len() < values.len() {
        list.grow(values.len().next_power_of_two())?;
    }
    list.write(0, values)
}

/// A length that lists of about as many elements have too.
fn rounded(len: usize) -> usize {
    len.next_multiple_of(len.next_power_of_two().clamp(1, 64))
}

impl Partials {
    /// Of nothing yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self { results: gpu.empty(), log_sums: gpu.empty() }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.results.bytes() + self.log_sums.bytes()
    }

    /// The most that steps of so many rows can take, with sequences up to so many positions.
    pub fn most_bytes(rule: CutRule, rows: usize, positions: usize) -> usize {
        match positions.div_ceil(SHORT).min(MOST_CHUNKS) {
            0 | 1 => 0,
            chunks => {
                let most = rule.slots(MOST_ROWS / (rule.heads / rule.kv_heads));
                most.min(rows.saturating_mul(chunks).next_power_of_two()) * rule.slot_bytes()
            }
        }
    }
}

impl CutRule {
    /// Keys of a chunk for a row at this position of a span of `len` rows that ends after `end` keys; `None` if its keys
    /// are not cut.
    ///
    /// | rows times heads that share a key head | keys of a chunk |
    /// |---|---|
    /// | up to half a block's | 256 |
    /// | up to four blocks' | 1,024 |
    /// | more | all, for there are blocks enough |
    /// | any, invariant | 1,024 |
    ///
    /// A sequence is cut into 32 chunks at most, so those of longer ones, of more than 8,192 or 32,768 keys, have twice
    /// as many keys, or four times, and so on. The sequence's length is `end`, or the row's own position and one if it is
    /// invariant.
    ///
    /// The price is a write and a read of `padded_dim + 1` floats for each row, head and chunk, but for rows that see one
    /// chunk only.
    fn chunk(&self, len: usize, end: usize, position: usize) -> Option<usize> {
        let rows = len * (self.heads / self.kv_heads);
        let (shortest, keys) = match (self.invariant, rows) {
            (true, _) => (LONG, position + 1),
            (false, ..=32) => (SHORT, end),
            (false, ..=256) => (LONG, end),
            _ => return None,
        };
        Some(shortest * keys.div_ceil(shortest * MOST_CHUNKS).next_power_of_two())
    }

    /// Bytes of partial results for one row and chunk.
    fn slot_bytes(&self) -> usize {
        self.heads * (padded(self.head_dim) + 1) * size_of::<f32>()
    }

    /// Slots of a round, where a block takes so many positions.
    fn slots(&self, block: usize) -> usize {
        (self.partial_bytes / self.slot_bytes()).max(block * MOST_CHUNKS)
    }

    /// Cuts spans whose rows have these positions, where a block takes `most` positions.
    fn cut(&self, most: usize, spans: &[Span<'_>], positions: &[u32]) -> Cut {
        let mut cut = Cut::default();
        // Sequences with a common beginning become neighbours.
        let mut spans: Vec<Span<'_>> = spans.to_vec();
        spans.sort_by(|a, b| a.pages.cmp(b.pages));
        let mut slices = Vec::new();
        for span in spans {
            let pages = cut.pages.len();
            let end = span.position + span.len;
            cut.pages.extend_from_slice(&span.pages[..end.div_ceil(PAGE)]);
            let mut first = 0;
            while first < span.len {
                let position = span.position + first;
                let len = most.min(span.len - first);
                let chunk = self.chunk(span.len, end, position);
                let len = chunk.map_or(len, |chunk| len.min(chunk - position % chunk));
                let part = Span { row: span.row + first, len, position, pages: span.pages };
                let slice = Slice { span: part, pages, chunk: chunk.unwrap_or(usize::MAX), slot: 0 };
                match slice.chunks() {
                    1 => cut.piece(&[slice], 0, most, positions),
                    _ => slices.push(slice),
                }
                first += len;
            }
        }
        let (mut start, mut taken) = (0, 0);
        for i in 0..slices.len() {
            let slots = slices[i].span.len * slices[i].chunks();
            if taken + slots > self.slots(most) {
                cut.round(&slices[start..i], most, positions);
                (start, taken) = (i, 0);
            }
            slices[i].slot = taken;
            taken += slots;
            cut.slots = cut.slots.max(taken);
        }
        cut.round(&slices[start..], most, positions);
        cut
    }
}

impl Cut {
    /// Makes steps that differ by little the same to launch: with pieces and merges of nothing, and slots that are
    /// not used, `most` at most.
    fn fill_up(&mut self, most: usize) {
        let [round] = &mut self.rounds[..] else { return };
        self.pieces.resize(rounded(self.pieces.len()), Piece::zeroed());
        self.merges.resize(rounded(self.merges.len()), Merge::zeroed());
        *round = Round { pieces: self.pieces.len(), merges: self.merges.len() };
        if self.slots > 0 {
            self.slots = self.slots.next_power_of_two().min(most);
        }
    }

    /// Ends a round, with all that is not in one yet and these slices, whose keys are cut.
    fn round(&mut self, slices: &[Slice<'_>], most: usize, positions: &[u32]) {
        for chunk in 0..slices.iter().map(Slice::chunks).max().unwrap_or(0) {
            for same in slices.chunk_by(|a, b| a.shares(b, chunk)) {
                // Together where they take fewer blocks. Those that fill theirs would gain nothing: blocks that run at the
                // same time read the same pages from the GPU's cache.
                let rows: usize = same.iter().map(|slice| slice.span.len).sum();
                let together = if rows.div_ceil(most) < same.len() { same.len() } else { 1 };
                for slices in same.chunks(together).filter(|slices| chunk < slices[0].chunks()) {
                    self.piece(slices, chunk, most, positions);
                }
            }
        }
        for slice in slices {
            let (slot, count) = (slice.slot, slice.chunks());
            let merge =
                |i| Merge { row: (slice.span.row + i) as u32, slot: (slot + i * count) as u32, count: count as u32 };
            self.merges.extend((0..slice.span.len).map(merge));
        }
        let before = self.rounds.iter().fold(Round::default(), |sum, round| Round {
            pieces: sum.pieces + round.pieces,
            merges: sum.merges + round.merges,
        });
        // Those with most keys first: what is left at the end is short.
        self.pieces[before.pieces..].sort_by_key(|piece| std::cmp::Reverse(piece.to - piece.from));
        self.rounds
            .push(Round { pieces: self.pieces.len() - before.pieces, merges: self.merges.len() - before.merges });
    }

    /// Adds the rows of slices with the same keys in a chunk, as many blocks' as they are.
    fn piece(&mut self, slices: &[Slice<'_>], chunk: usize, most: usize, positions: &[u32]) {
        let start = self.rows.len();
        for slice in slices {
            let (span, chunks) = (slice.span, slice.chunks());
            let slot = |i| if chunks == 1 { WHOLE } else { (slice.slot + i * chunks + chunk) as u32 };
            self.rows.extend((0..span.len).map(|i| Row { row: (span.row + i) as u32, slot: slot(i) }));
        }
        let Slice { span, pages, chunk: keys, .. } = slices[0];
        let from = chunk * keys;
        let to = if chunk + 1 < slices[0].chunks() { from + keys } else { span.position + span.len };
        for first in (start..self.rows.len()).step_by(most) {
            let rows = &self.rows[first..self.rows.len().min(first + most)];
            self.pieces.push(Piece {
                first: first as u32,
                rows: rows.len() as u32,
                position: rows.iter().map(|row| positions[row.row as usize]).min().unwrap_or(0),
                from: from as u32,
                to: to as u32,
                pages: pages as u32,
            });
        }
    }
}

#[cfg(test)]
mod tests;
