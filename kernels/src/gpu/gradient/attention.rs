//! Gradients of attention, see `cuda/attention_backward.cu`.

use std::cmp::Reverse;
use std::mem::size_of;

use bytemuck::{Pod, Zeroable};

use crate::Element;
use crate::attention::{PAGE, Rule};
use crate::gpu::attention::{KernelRule, kernel_width};
use crate::gpu::driver::Argument::{Address, Bytes, U32, U64};
use crate::gpu::pieces::write;
use crate::gpu::{Buffer, Gpu, KvPages, Prepare, Result, View, ViewMut};
use crate::gradient::{Keys, Tree, TreeSpan};

/// Queries, and keys, that an entry of their lists names; `LISTED` in `cuda/attention_backward.cu`.
const LISTED: usize = 2 * PAGE;
/// No page, or no row.
const NONE: u32 = u32::MAX;
/// Bytes of `Query` in `cuda/attention_backward.cu`.
const QUERY: usize = 16;
/// Queries of which a block computes what there is to know, a warp each.
const WARPS: usize = 8;
/// Rows and threads of a block of `cuda/prepare_backward.cu`.
const ROWS: usize = 16;
const THREADS: usize = 256;

/// The way back through attention: [`Keys`] on a GPU, and buffers that are kept from one layer, and step, to the next.
#[derive(Debug)]
pub struct Attention {
    gpu: Gpu,
    rows: usize,
    /// Query heads a key head that queries were counted by.
    group: usize,
    /// Lengths of the lists of queries and of keys, which may be longer than what is in them.
    counts: [usize; 2],
    last_page: u32,
    last_position: usize,
    spans: Buffer<KernelSpan>,
    /// Pages of all spans, one after the other.
    pages: Buffer<u32>,
    /// Position of each row.
    positions: Buffer<u32>,
    queries: Buffer<Queries>,
    keys: Buffer<KernelKeys>,
    /// Spans that see keys.
    viewers: Buffer<u32>,
    /// Of each key in the list the row, `[keys, LISTED]`.
    key_rows: Buffer<u32>,
    /// What is known of each query, `[rows, heads, QUERY]`.
    known: Buffer<u8>,
    /// Gradients of the norms of q and k, `[rows / ROWS, 2, dim]`.
    parts: Buffer<f32>,
}

/// `Span` in `cuda/attention_backward.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct KernelSpan {
    row: u32,
    rows: u32,
    position: u32,
    pages: u32,
}

/// As in `cuda/attention_backward.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Queries {
    span: u32,
    first: u32,
}

/// `Keys` in `cuda/attention_backward.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct KernelKeys {
    position: u32,
    pages: [u32; 2],
    rows: u32,
    first: u32,
    last: u32,
}

impl Attention {
    /// Of nothing yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            rows: 0,
            group: 1,
            counts: [0; 2],
            last_page: 0,
            last_position: 0,
            spans: gpu.empty(),
            pages: gpu.empty(),
            positions: gpu.empty(),
            queries: gpu.empty(),
            keys: gpu.empty(),
            viewers: gpu.empty(),
            key_rows: gpu.empty(),
            known: gpu.empty(),
            parts: gpu.empty(),
        }
    }

    /// Takes the keys of a step, for `group` query heads a key head.
    ///
    /// # Errors
    /// If there is no memory for the lists.
    pub fn set(&mut self, keys: &Keys<'_>, group: usize) -> Result<()> {
        let lists = Lists::new(keys, group);
        let positions: Vec<u32> = keys.positions().iter().map(|position| *position as u32).collect();
        (self.rows, self.group, self.counts) = (keys.rows(), group, [lists.queries.len(), lists.keys.len()]);
        self.last_page = lists.pages.iter().copied().max().unwrap_or(0);
        self.last_position = positions.iter().copied().max().unwrap_or(0) as usize;
        write(&mut self.spans, &lists.spans)?;
        write(&mut self.pages, &lists.pages)?;
        write(&mut self.positions, &positions)?;
        write(&mut self.queries, &lists.queries)?;
        write(&mut self.keys, &lists.keys)?;
        write(&mut self.viewers, &lists.viewers)?;
        write(&mut self.key_rows, &lists.key_rows)
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of the GPU's memory that it takes.
    pub fn bytes(&self) -> usize {
        let Self { spans, pages, positions, queries, keys, viewers, key_rows, known, parts, .. } = self;
        let lists = [pages, positions, viewers, key_rows].map(Buffer::bytes).iter().sum::<usize>();
        lists + spans.bytes() + queries.bytes() + keys.bytes() + known.bytes() + parts.bytes()
    }

    /// Gradients of q, k and v in the order of their projection, `dqkv[rows, (heads + 2 * kv_heads) * dim]`, before
    /// they are taken back through rotation and norm, given `q[rows, heads * padded_dim]`, the pages, the attention's
    /// result `out[rows, heads * dim]` and the logarithms of its sums `log_sums[rows, heads]`, see [`Gpu::attention`], and
    /// the gradient `d_out` of the result.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If shapes do not fit, or there is no such page.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass read, what it wrote, and the gradients")]
    pub fn backward<E: Element>(
        &mut self,
        q: View<'_, E>,
        kv: &KvPages<E>,
        layer: usize,
        rule: Rule,
        out: View<'_, E>,
        log_sums: View<'_, f32>,
        d_out: View<'_, E>,
        dqkv: ViewMut<'_, f32>,
    ) -> Result<()> {
        self.check(q, kv, rule);
        let (dim, count) = (kv.dim, self.rows * rule.heads);
        assert!(out.len == count * dim && d_out.len == out.len, "shape of the attention's result");
        assert_eq!(log_sums.len, count, "shape of the logarithms");
        assert_eq!(dqkv.len, self.rows * (rule.heads + 2 * kv.kv_heads) * dim, "shape of q, k and v");
        self.known.grow(count * QUERY)?;
        let known = Address(self.known.all().address);
        let arguments = [
            Address(out.address),
            Address(d_out.address),
            Address(log_sums.address),
            Address(self.positions.all().address),
            U32(rule.heads as u32),
            U32(dim as u32),
            U64(count as u64),
            known,
        ];
        let kernel = format!("attention_queries_{}", E::NAME);
        // SAFETY: as in `cuda/attention_backward.cu`.
        unsafe { self.gpu.launch(&kernel, [count.div_ceil(WARPS), 1, 1], WARPS * 32, 0, &arguments)? };

        let [keys, values] = &kv.layers[layer];
        let (keys, values) = (Address(keys.all().address), Address(values.all().address));
        let (q, d_out, dqkv) = (Address(q.address), Address(d_out.address), Address(dqkv.address));
        let spans = Address(self.spans.all().address);
        let kernel_rule = KernelRule::new(rule, kv.kv_heads);
        let kernel_rule = Bytes(bytemuck::bytes_of(&kernel_rule));
        let shape = Shape::new::<E>(dim);
        let [queries, key_tiles] = self.counts.map(|count| count * shape.parts());

        let (list, viewers) = (Address(self.keys.all().address), Address(self.viewers.all().address));
        let rows = Address(self.key_rows.all().address);
        let arguments = [q, keys, values, d_out, known, list, viewers, spans, rows, kernel_rule, dqkv];
        let (kernel, grid) = (shape.kernel::<E>("to_keys"), [key_tiles, kv.kv_heads, shape.passes()]);
        // SAFETY: as in `cuda/attention_backward.cu`; pages were checked, and what the lists name is in them.
        unsafe { self.gpu.launch(&kernel, grid, shape.threads(), shape.bytes, &arguments)? };

        let (list, pages) = (Address(self.queries.all().address), Address(self.pages.all().address));
        let arguments = [q, keys, values, d_out, known, list, spans, pages, kernel_rule, dqkv];
        let (kernel, grid) = (shape.kernel::<E>("to_queries"), [queries, kv.kv_heads, 1]);
        // SAFETY: as before.
        unsafe { self.gpu.launch(&kernel, grid, shape.threads(), shape.bytes, &arguments) }
    }

    fn check<E: Element>(&self, q: View<'_, E>, kv: &KvPages<E>, rule: Rule) {
        assert!(rule.heads == self.group * kv.kv_heads && rule.head_dim == kv.dim, "heads");
        assert_eq!(q.len, self.rows * kv.q_width(rule.heads), "shape of q");
        assert!((self.last_page as usize) < kv.pages(), "no such page");
    }

    /// Takes the gradients of q, k and v `dqkv[rows, (heads + 2 * kv_heads) * dim]` back through rotation and norm,
    /// into `out` of the same shape. Where q or k has a norm, `qkv` is what the norm was given, and the gradients of its
    /// weights are added to `d_q_norm[dim]` or `d_k_norm[dim]`, which are empty where there is none.
    ///
    /// # Errors
    /// If the GPU refuses, or a norm is of another kind.
    ///
    /// # Panics
    /// If shapes do not fit, or there is no such position.
    #[expect(clippy::too_many_arguments, reason = "what it reads, how, and what it writes")]
    pub fn unprepare<E: Element>(
        &mut self,
        dqkv: View<'_, f32>,
        qkv: View<'_, E>,
        dim: usize,
        how: Prepare<'_>,
        d_q_norm: ViewMut<'_, f32>,
        d_k_norm: ViewMut<'_, f32>,
        out: ViewMut<'_, E>,
    ) -> Result<()> {
        let kv_heads = how.heads / self.group;
        let width = (how.heads + 2 * kv_heads) * dim;
        let normed = how.q_norm.is_some() || how.k_norm.is_some();
        assert!(dqkv.len == self.rows * width && out.len == dqkv.len, "shapes of q, k and v");
        assert!(!normed || qkv.len == dqkv.len, "shapes of q, k and v");
        for (norm, gradient) in [(how.q_norm, &d_q_norm), (how.k_norm, &d_k_norm)] {
            assert_eq!(gradient.len, norm.map_or(0, |_| dim), "shape of a norm's gradient");
        }
        assert!(how.rotated <= dim && how.rotated.is_multiple_of(2), "a rotation of {} elements", how.rotated);
        assert!(how.rotated == 0 || self.last_position < how.table.len / how.rotated, "no such position");
        let [q_norm, k_norm, eps] = how.norms(dim)?;
        let blocks = self.rows.div_ceil(ROWS);
        if normed {
            self.parts.grow(blocks * 2 * dim)?;
        }
        let parts = Address(self.parts.all().address);
        let arguments = [
            Address(dqkv.address),
            Address(qkv.address),
            Address(self.positions.all().address),
            q_norm,
            k_norm,
            eps,
            Address(how.table.address),
            U32(how.rotated as u32),
            U32(how.heads as u32),
            U32(kv_heads as u32),
            U32(dim as u32),
            U64(self.rows as u64),
            Address(out.address),
            parts,
        ];
        let kernel = format!("unprepare_{}", E::NAME);
        // SAFETY: as in `cuda/prepare_backward.cu`; positions were checked.
        unsafe { self.gpu.launch(&kernel, [blocks, 1, 1], THREADS, 0, &arguments)? };
        if !normed {
            return Ok(());
        }
        let to = |norm: Option<_>, gradient: &ViewMut<'_, f32>| Address(norm.map_or(0, |_| gradient.address));
        let (d_q_norm, d_k_norm) = (to(how.q_norm, &d_q_norm), to(how.k_norm, &d_k_norm));
        let arguments = [parts, U64(blocks as u64), U32(dim as u32), d_q_norm, d_k_norm];
        // SAFETY: as before.
        unsafe { self.gpu.launch("unprepare_norms", [dim.div_ceil(32), 2, 1], THREADS, 0, &arguments) }
    }
}

/// Lists as they are made.
#[derive(Default)]
struct Lists {
    spans: Vec<KernelSpan>,
    pages: Vec<u32>,
    queries: Vec<Queries>,
    keys: Vec<KernelKeys>,
    viewers: Vec<u32>,
    key_rows: Vec<u32>,
}

impl Lists {
    fn new(keys: &Keys<'_>, group: usize) -> Self {
        let mut lists = Self::default();
        for tree in &keys.trees {
            let seen_by = lists.add_spans(tree, group);
            let mut listed = vec![false; tree.pages.len()];
            for span in &tree.spans {
                let mut rest = &span.pages[..];
                while let Some(first) = rest.first() {
                    let position = (span.pages.len() - rest.len()) * PAGE;
                    // Neighbours that the same spans see.
                    let alike = rest.iter().take_while(|page| seen_by[**page] == seen_by[*first]).count();
                    let (alike, others) = rest.split_at(alike);
                    if !listed[*first] {
                        lists.add_keys(tree, position, alike, &seen_by[*first]);
                        alike.iter().for_each(|page| listed[*page] = true);
                    }
                    rest = others;
                }
            }
        }
        // What takes longest first: what is left at the end is short.
        let Self { spans, queries, keys, viewers, .. } = &mut lists;
        queries.sort_by_key(|queries| {
            let span = spans[queries.span as usize];
            Reverse(span.position + queries.first / group as u32)
        });
        keys.sort_by_key(|keys| {
            let rows = |viewer: &u32| {
                let span = spans[*viewer as usize];
                (span.position + span.rows).saturating_sub(keys.position.max(span.position))
            };
            Reverse(viewers[keys.first as usize..keys.last as usize].iter().map(rows).sum::<u32>())
        });
        lists
    }

    /// Adds the spans of a tree and their queries. Answers which spans see which of the tree's pages.
    fn add_spans(&mut self, tree: &Tree<'_>, group: usize) -> Vec<Vec<u32>> {
        let mut seen_by = vec![Vec::new(); tree.pages.len()];
        for TreeSpan { span, pages } in &tree.spans {
            let index = self.spans.len() as u32;
            self.queries.extend(
                (0..span.len * group).step_by(LISTED).map(|first| Queries { span: index, first: first as u32 }),
            );
            self.spans.push(KernelSpan {
                row: span.row as u32,
                rows: span.len as u32,
                position: span.position as u32,
                pages: self.pages.len() as u32,
            });
            for page in pages {
                self.pages.push(tree.pages[*page]);
                seen_by[*page].push(index);
            }
        }
        seen_by
    }

    /// Adds pages of a tree, the first of this position, that the same spans see.
    fn add_keys(&mut self, tree: &Tree<'_>, position: usize, pages: &[usize], seen_by: &[u32]) {
        let first = self.viewers.len();
        self.viewers.extend_from_slice(seen_by);
        for (i, pages) in pages.chunks(LISTED / PAGE).enumerate() {
            let rows = self.key_rows.len();
            for page in pages {
                let of_page = &tree.rows[page * PAGE..(page + 1) * PAGE];
                self.key_rows.extend(of_page.iter().map(|row| row.map_or(NONE, |row| row as u32)));
            }
            self.key_rows.resize(rows + LISTED, NONE);
            let number = |i: usize| pages.get(i).map_or(NONE, |page| tree.pages[*page]);
            self.keys.push(KernelKeys {
                position: (position + i * LISTED) as u32,
                pages: [number(0), number(1)],
                rows: rows as u32,
                first: first as u32,
                last: self.viewers.len() as u32,
            });
        }
    }
}

/// `Shape` in `cuda/attention_backward.cu`: how heads of a width are cut.
struct Shape {
    width: usize,
    /// Rows that a block keeps.
    own: usize,
    /// Of shared memory.
    bytes: usize,
}

impl Shape {
    fn new<E>(dim: usize) -> Self {
        let (width, narrow) = (kernel_width::<E>(dim), size_of::<E>() == 2);
        let own = if narrow || width <= 128 { 64 } else { 32 };
        let (tile, stages) = match (narrow, width) {
            (true, ..=96) => (64, 2),
            (true, ..=128) => (32, 2),
            (true, _) => (16, 2),
            (false, ..=64) => (32, 1),
            (false, _) => (16, 1),
        };
        Self { width, own, bytes: 2 * (own + stages * tile) * (width * size_of::<E>() + 16) }
    }

    fn kernel<E: Element>(&self, name: &str) -> String {
        format!("attention_{name}_{}_{}", E::NAME, self.width)
    }

    /// Blocks that share an entry of a list.
    fn parts(&self) -> usize {
        LISTED / self.own
    }

    fn threads(&self) -> usize {
        self.own / 16 * 32
    }

    /// Gradients of keys and of values, together or one after the other.
    fn passes(&self) -> usize {
        if self.width > 128 { 2 } else { 1 }
    }
}
