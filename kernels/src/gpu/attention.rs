//! Keys and values in pages, and attention over them.

use bytemuck::{Pod, Zeroable};

use super::driver::Argument::{self, Address, Bytes, F32, U32};
use super::pieces::{Partials, Pieces};
use super::{Buffer, Gpu, GpuError, Kernels, Norm, Result, View, ViewMut};
use crate::Element;
use crate::attention::{PAGE, Rule};

/// Heads that a block makes ready, or merges, a warp each.
const HEADS: usize = 4;
/// Heads are filled up to a multiple of so many elements with zeros: copies of 16 bytes, and whole matrices.
const ALIGN: usize = 16;
/// Widest head.
const MAX_DIM: usize = 256;

/// Keys and values of many sequences, by page.
#[derive(Debug)]
pub struct KvPages<E> {
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pages: usize,
    /// A layer's keys and values, each `[pages, kv_heads, PAGE * padded_dim]`, see `cuda/pages.cuh`.
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

/// A kernel of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// That of `cuda/attention.cu`.
    Common,
    /// That of `cuda/attention_hopper.cu`.
    WarpGroups,
}

impl Kernel {
    /// The one for heads of so many elements.
    pub(super) fn of<E: Element>(gpu: &Gpu, dim: usize) -> Self {
        let fits = size_of::<E>() == 2 && dim.is_multiple_of(2) && [64, 128, 256].contains(&padded(dim));
        match gpu.choice.kernels {
            Kernels::WarpGroups if fits => Self::WarpGroups,
            _ => Self::Common,
        }
    }

    /// Rows that a block takes, positions times the heads that share a key head; `ROWS` there.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Common => 64,
            Self::WarpGroups => 2 * 64,
        }
    }

    /// Threads of a block.
    fn threads(self) -> usize {
        match self {
            Self::Common => 128,
            Self::WarpGroups => 3 * 128,
        }
    }

    /// Width of the kernel that heads of so many elements take, and the bytes of shared memory of its blocks.
    fn shape<E: Element>(self, dim: usize) -> (usize, usize) {
        match self {
            Self::Common => {
                let width = kernel_width::<E>(dim);
                let (tile, stages) = match (size_of::<E>() == 2, width > 128) {
                    (true, false) => (64, 2),
                    (true, true) => (32, 2),
                    (false, false) => (32, 1),
                    (false, true) => (16, 1),
                };
                (width, (self.rows() + 2 * stages * tile) * (width * size_of::<E>() + 16))
            }
            Self::WarpGroups => {
                let width = padded(dim);
                let tile = if width > 128 { 64 } else { 128 };
                let stages = if width > 64 { 2 } else { 4 };
                let barriers = 4 * stages * size_of::<u64>();
                (width, (self.rows() + 2 * stages * tile) * width * size_of::<E>() + barriers)
            }
        }
    }
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

/// As in `cuda/attention.cuh`: addresses.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Results {
    out: u64,
    log_sums: u64,
    partial: u64,
    partial_log_sums: u64,
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

    /// Attention of `q[rows, heads * padded_dim]`, all rows of `pieces`, into `out[rows, heads * dim]`. `log_sums[rows,
    /// heads]` are set where they are asked for: the natural logarithm of the sum of `exp(score)` over the keys that a row
    /// sees, of scores as they go into soft-max, scaled and capped.
    ///
    /// # Errors
    /// If the GPU refuses, or has no memory for partial results.
    ///
    /// # Panics
    /// If shapes do not fit, or there is no such page.
    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    pub fn attention<E: Element>(
        &self,
        q: View<'_, E>,
        kv: &KvPages<E>,
        layer: usize,
        pieces: &Pieces,
        rule: Rule,
        partials: &mut Partials,
        out: ViewMut<'_, E>,
        log_sums: Option<ViewMut<'_, f32>>,
    ) -> Result<()> {
        let dim = kv.dim;
        assert!(rule.heads.is_multiple_of(kv.kv_heads) && rule.head_dim == dim, "heads");
        assert_eq!(pieces.heads, [rule.heads, kv.kv_heads], "pieces are cut for other heads");
        assert_eq!(q.len, pieces.rows() * kv.q_width(rule.heads), "shape of q");
        assert_eq!(out.len, pieces.rows() * rule.heads * dim, "shape of the attention's result");
        assert!(log_sums.as_ref().is_none_or(|sums| sums.len == pieces.rows() * rule.heads), "shape of the sums");
        kv.check(pieces);
        let kernel = Kernel::of::<E>(self, dim);
        assert_eq!(pieces.block_rows, kernel.rows(), "pieces are cut for another kernel");
        // It scales the largest of the scores, not each of them.
        let factor = rule.softcap.unwrap_or(rule.scale).min(rule.scale);
        if kernel == Kernel::WarpGroups && factor <= 0.0 {
            return Err(GpuError::Failed(format!("scores times {factor}: the kernel takes a positive factor")));
        }
        let (width, shared) = kernel.shape::<E>(dim);
        partials.results.grow(pieces.slots * rule.heads * padded(dim))?;
        partials.log_sums.grow(pieces.slots * rule.heads)?;
        let kernel_rule = KernelRule::new(rule, kv.kv_heads);
        let results = Results {
            out: out.address,
            log_sums: log_sums.map_or(0, |sums| sums.address),
            partial: partials.results.all_mut().address,
            partial_log_sums: partials.log_sums.all_mut().address,
        };
        let [keys, values] = &kv.layers[layer];
        let attend = match kernel {
            Kernel::Common => format!("attention_{}_{width}", E::NAME),
            Kernel::WarpGroups => format!("attention_hopper_{}_{width}", E::NAME),
        };
        let merge = format!("merge_attention_{}", E::NAME);
        let (mut first_piece, mut first_merge) = (0, 0);
        for round in &pieces.rounds {
            let (end_piece, end_merge) = (first_piece + round.pieces, first_merge + round.merges);
            let arguments = [
                Address(q.address),
                Address(keys.all().address),
                Address(values.all().address),
                Address(pieces.pieces.view(first_piece..end_piece).address),
                Address(pieces.rows.all().address),
                Address(pieces.positions.all().address),
                Address(pieces.pages.all().address),
                Bytes(bytemuck::bytes_of(&kernel_rule)),
                Bytes(bytemuck::bytes_of(&results)),
            ];
            let grid = [round.pieces, kv.kv_heads, 1];
            // SAFETY: as in the kernel's file; pages were checked, and there are as many slots as a round has.
            unsafe { self.launch(&attend, grid, kernel.threads(), shared, &arguments) }?;
            let arguments = [
                Address(pieces.merges.view(first_merge..end_merge).address),
                Bytes(bytemuck::bytes_of(&kernel_rule)),
                Bytes(bytemuck::bytes_of(&results)),
            ];
            // SAFETY: as before.
            unsafe { self.launch(&merge, [round.merges, rule.heads.div_ceil(HEADS), 1], HEADS * 32, 0, &arguments) }?;
            (first_piece, first_merge) = (end_piece, end_merge);
        }
        Ok(())
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
