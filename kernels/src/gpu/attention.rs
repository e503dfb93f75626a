//! Keys and values in pages, and attention over them.

use bytemuck::{Pod, Zeroable};

use super::driver::Argument::{self, Address, Bytes, F32, U32};
use super::{Buffer, Gpu, GpuError, Norm, Result, View, ViewMut};
use crate::Element;
use crate::attention::{PAGE, Rule, Run, Span};

/// Rows that a block takes, positions times the heads that share a key head; `ROWS` in `cuda/attention.cu`.
const ROWS: usize = 64;
/// Threads of its blocks.
const THREADS: usize = 128;
/// Heads that a block makes ready, a warp each.
const HEADS: usize = 4;
/// Heads are filled up to a multiple of so many elements with zeros: copies of 16 bytes, and whole matrices.
const ALIGN: usize = 16;
/// Page of rows that are of no sequence; `NONE` in `cuda/prepare.cu`.
const NO_PAGE: u32 = u32::MAX;
/// Widest head.
const MAX_DIM: usize = 256;

/// Keys and values of many sequences, by page.
#[derive(Debug)]
pub struct KvPages<E> {
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pages: usize,
    /// A layer's keys and values, each `[pages, kv_heads, PAGE, padded_dim]`.
    pub(super) layers: Vec<[Buffer<E>; 2]>,
}

/// The width of heads that the kernels for heads of `dim` are made for. What is left out would help nobody.
pub(super) fn kernel_width<E>(dim: usize) -> usize {
    let widths: &[usize] = if size_of::<E>() == 2 { &[64, 96, 128, 256] } else { &[64, 128, 256] };
    widths.iter().copied().find(|width| padded(dim) <= *width).unwrap_or(MAX_DIM)
}

/// Elements of a head in pages and in q.
pub fn padded(dim: usize) -> usize {
    dim.next_multiple_of(ALIGN)
}

impl<E: Element> KvPages<E> {
    /// Empty pages.
    ///
    /// # Errors
    /// If there is no memory for them, or heads are too wide.
    pub fn new(gpu: &Gpu, layers: usize, kv_heads: usize, dim: usize, pages: usize) -> Result<Self> {
        if dim > MAX_DIM {
            return Err(GpuError::Failed(format!("heads of {dim} elements: the kernels take {MAX_DIM}")));
        }
        let zeros = || gpu.zeros(pages * kv_heads * PAGE * padded(dim));
        let layers = (0..layers).map(|_| Ok([zeros()?, zeros()?])).collect::<Result<_>>()?;
        Ok(Self { kv_heads, dim, pages, layers })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Sees to it that a step's pages are there.
    ///
    /// # Panics
    /// If one is not.
    pub fn check(&self, pieces: &Pieces) {
        assert!((pieces.last_page as usize) < self.pages, "no such page");
    }

    /// A number that no other pages of the same GPU have while these are there.
    pub fn number(&self) -> u64 {
        self.layers.first().map_or(0, |[keys, _]| keys.all().address)
    }

    /// Bytes of one page over all layers, for planning.
    pub fn page_bytes(layers: usize, kv_heads: usize, dim: usize) -> usize {
        2 * layers * kv_heads * PAGE * padded(dim) * size_of::<E>()
    }

    /// Elements of q for a row of so many heads.
    pub fn q_width(&self, heads: usize) -> usize {
        heads * padded(self.dim)
    }
}

/// How q, k and v are made ready, as [`crate::attention::Prepare`].
#[derive(Clone, Copy, Debug)]
pub struct Prepare<'a> {
    /// Query heads.
    pub heads: usize,
    /// Over each head of q, before the rotation; an RMS norm.
    pub q_norm: Option<&'a Norm>,
    /// Over each head of k, with q's epsilon.
    pub k_norm: Option<&'a Norm>,
    /// Cosines and sines `[positions, rotated]`, see [`crate::rotary::Rotary::table`].
    pub table: View<'a, f32>,
    /// Elements of a head that are rotated.
    pub rotated: usize,
}

/// Where a step's rows are, and how its attention is cut, the same for all layers.
#[derive(Debug)]
pub struct Pieces {
    rows: usize,
    /// Number of pieces. The lists may be longer than what is in them.
    count: usize,
    /// Position and page of each row.
    positions: Buffer<u32>,
    row_pages: Buffer<u32>,
    pieces: Buffer<Piece>,
    /// Pages of all spans, one after the other.
    pages: Buffer<u32>,
    /// The largest page and position among them.
    last_page: u32,
    last_position: usize,
}

/// As in `cuda/attention.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Piece {
    row: u32,
    rows: u32,
    position: u32,
    pages: u32,
}

/// As in `cuda/attention.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct KernelRule {
    heads: u32,
    kv_heads: u32,
    dim: u32,
    padded_dim: u32,
    scale: f32,
    softcap: f32,
    window: u32,
}

impl Pieces {
    /// Of nothing yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            rows: 0,
            count: 0,
            positions: gpu.empty(),
            row_pages: gpu.empty(),
            pieces: gpu.empty(),
            pages: gpu.empty(),
            last_page: 0,
            last_position: 0,
        }
    }

    /// Cuts the spans for `group` query heads a key head; `runs` cover the same rows in order. The step has `rows` rows:
    /// those after the runs' are of no sequence, and what comes of them is not said.
    ///
    /// # Errors
    /// If there is no memory for the lists, or a group is too large.
    ///
    /// # Panics
    /// If a span lacks pages, or there are fewer rows than the runs have.
    pub fn set(&mut self, spans: &[Span<'_>], runs: &[Run], group: usize, rows: usize) -> Result<()> {
        if group > ROWS {
            return Err(GpuError::Failed(format!("{group} heads share a key head: the kernels take {ROWS}")));
        }
        let most = ROWS / group;
        let (mut pieces, mut pages) = (Vec::new(), Vec::new());
        for span in spans {
            let end = span.position + span.len;
            assert!(span.pages.len() * PAGE >= end, "a span lacks pages");
            for first in (0..span.len).step_by(most) {
                pieces.push(Piece {
                    row: (span.row + first) as u32,
                    rows: most.min(span.len - first) as u32,
                    position: (span.position + first) as u32,
                    pages: pages.len() as u32,
                });
            }
            pages.extend_from_slice(&span.pages[..end.div_ceil(PAGE)]);
        }
        // Those with most keys first: what is left at the end is short.
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.position + piece.rows));
        let (mut positions, mut row_pages) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for run in runs {
            assert_eq!(run.row, positions.len(), "runs cover the rows in order");
            positions.extend((run.position..run.position + run.len).map(|position| position as u32));
            row_pages.resize(positions.len(), run.page);
        }
        assert!(positions.len() <= rows, "more rows than the step has");
        self.last_page = pages.iter().chain(&row_pages).copied().max().unwrap_or(0);
        self.last_position = positions.iter().copied().max().unwrap_or(0) as usize;
        positions.resize(rows, 0);
        row_pages.resize(rows, NO_PAGE);
        self.rows = rows;
        // Steps that differ by a few pieces only are of one shape.
        pieces.resize(pieces.len().next_multiple_of(pieces.len().next_power_of_two().clamp(1, 64)), Piece::zeroed());
        self.count = pieces.len();
        write(&mut self.positions, &positions)?;
        write(&mut self.row_pages, &row_pages)?;
        write(&mut self.pages, &pages)?;
        write(&mut self.pieces, &pieces)
    }

    /// What the kernels that are launched for a step depend on, but for what is in the lists.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.count]
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Sets a list, which takes new memory seldom.
fn write<T: Pod>(list: &mut Buffer<T>, values: &[T]) -> Result<()> {
    if list.len() < values.len() {
        list.grow(values.len().next_power_of_two())?;
    }
    list.write(0, values)
}

impl Gpu {
    /// Splits rows of `qkv[rows, (heads + 2 * kv_heads) * dim]`, norms and rotates q and k, writes k and v to their pages
    /// and q to `q[rows, heads * padded_dim]`. The rows are those of `pieces` from `first` on.
    ///
    /// # Errors
    /// If the GPU refuses, or a norm is of another kind.
    ///
    /// # Panics
    /// If shapes do not fit, or there is no such page or position.
    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    pub fn prepare<E: Element>(
        &self,
        qkv: View<'_, E>,
        pieces: &Pieces,
        first: usize,
        how: Prepare<'_>,
        q: ViewMut<'_, E>,
        kv: &mut KvPages<E>,
        layer: usize,
    ) -> Result<()> {
        let (dim, kv_heads) = (kv.dim, kv.kv_heads);
        let heads = how.heads + 2 * kv_heads;
        let rows = qkv.len / (heads * dim);
        assert_eq!((qkv.len, q.len), (rows * heads * dim, rows * kv.q_width(how.heads)), "shapes of q, k and v");
        assert!(how.rotated <= dim && how.rotated.is_multiple_of(2), "a rotation of {} elements", how.rotated);
        kv.check(pieces);
        assert!(how.rotated == 0 || pieces.last_position < how.table.len / how.rotated, "no such position");
        let [q_norm, k_norm, eps] = how.norms(dim)?;
        let [keys, values] = &mut kv.layers[layer];
        let arguments = [
            Address(qkv.address),
            Address(pieces.positions.view(first..first + rows).address),
            Address(pieces.row_pages.view(first..first + rows).address),
            q_norm,
            k_norm,
            eps,
            Address(how.table.address),
            U32(how.rotated as u32),
            U32(how.heads as u32),
            U32(kv_heads as u32),
            U32(dim as u32),
            U32(padded(dim) as u32),
            Address(q.address),
            Address(keys.all_mut().address),
            Address(values.all_mut().address),
        ];
        let grid = [rows, heads.div_ceil(HEADS), 1];
        // SAFETY: as in `cuda/prepare.cu`; pages and positions were checked.
        unsafe { self.launch(&format!("prepare_{}", E::NAME), grid, HEADS * 32, 0, &arguments) }
    }

    /// Attention of `q[rows, heads * padded_dim]`, all rows of `pieces`, into `out[rows, heads * dim]`.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit, or there is no such page.
    pub fn attention<E: Element>(
        &self,
        q: View<'_, E>,
        kv: &KvPages<E>,
        layer: usize,
        pieces: &Pieces,
        rule: Rule,
        out: ViewMut<'_, E>,
    ) -> Result<()> {
        let dim = kv.dim;
        assert!(rule.heads.is_multiple_of(kv.kv_heads) && rule.head_dim == dim, "heads");
        assert_eq!(q.len, pieces.rows * kv.q_width(rule.heads), "shape of q");
        assert_eq!(out.len, pieces.rows * rule.heads * dim, "shape of the attention's result");
        kv.check(pieces);
        let width = kernel_width::<E>(dim);
        let (tile, stages) = match (size_of::<E>() == 2, width > 128) {
            (true, false) => (64, 2),
            (true, true) => (32, 2),
            (false, false) => (32, 1),
            (false, true) => (16, 1),
        };
        let shared = (ROWS + 2 * stages * tile) * (width * size_of::<E>() + 16);
        let kernel_rule = KernelRule::new(rule, kv.kv_heads);
        let [keys, values] = &kv.layers[layer];
        let arguments = [
            Address(q.address),
            Address(keys.all().address),
            Address(values.all().address),
            Address(pieces.pieces.all().address),
            Address(pieces.pages.all().address),
            Bytes(bytemuck::bytes_of(&kernel_rule)),
            Address(out.address),
        ];
        let kernel = format!("attention_{}_{width}", E::NAME);
        // SAFETY: as in `cuda/attention.cu`; pages were checked.
        unsafe { self.launch(&kernel, [pieces.count, kv.kv_heads, 1], THREADS, shared, &arguments) }
    }
}

impl Prepare<'_> {
    /// The weights of the norms of q and k over heads of `dim` elements, and their epsilon.
    pub(super) fn norms(&self, dim: usize) -> Result<[Argument<'static>; 3]> {
        let norm = |norm: Option<&Norm>| match norm.map(Norm::rms) {
            None => Ok((0, 0.0)),
            Some(Some((weight, eps))) if weight.len() == dim => Ok((weight.all().address, eps)),
            Some(_) => Err(GpuError::Failed("the kernels take RMS norms over whole heads of q and k only".into())),
        };
        let ((q_norm, q_eps), (k_norm, k_eps)) = (norm(self.q_norm)?, norm(self.k_norm)?);
        Ok([Address(q_norm), Address(k_norm), F32(if q_norm == 0 { k_eps } else { q_eps })])
    }
}

impl KernelRule {
    pub(super) fn new(rule: Rule, kv_heads: usize) -> Self {
        Self {
            heads: rule.heads as u32,
            kv_heads: kv_heads as u32,
            dim: rule.head_dim as u32,
            padded_dim: padded(rule.head_dim) as u32,
            scale: rule.scale,
            softcap: rule.softcap.unwrap_or(0.0),
            window: rule.window.unwrap_or(0) as u32,
        }
    }
}
