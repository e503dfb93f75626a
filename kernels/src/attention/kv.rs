//! Keys and values of many sequences, in pages.

use std::ops::Range;

use crate::element::{Element, round};
use crate::gemm::LANES;
use crate::memory::{Buffer, OutOfMemory, carve, carved, with_scratch};
use crate::norm::Norm;
use crate::parallel::{Shared, for_each_piece};
use crate::rotary::Rotary;

/// Positions in a page.
pub const PAGE: usize = 32;

/// Keys and values of many sequences, by page.
#[derive(Debug)]
pub struct KvPages<E> {
    pub(crate) kv_heads: usize,
    /// Head width rounded up to whole vectors; the rest is zero.
    pub(crate) padded_dim: usize,
    pages: usize,
    pub(crate) layers: Vec<KvLayer<E>>,
}

#[derive(Debug)]
pub(crate) struct KvLayer<E> {
    /// `[pages, kv_heads, padded_dim / PAIR, PAGE, PAIR]`.
    pub(crate) keys: Buffer<E>,
    /// `[pages, kv_heads, PAGE / PAIR, padded_dim, PAIR]`.
    pub(crate) values: Buffer<E>,
}

/// Head width rounded up to whole vectors.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

impl<E: Element> KvPages<E> {
    /// Empty pages, whose memory is taken from the system at once.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize, pages: usize) -> Result<Self, OutOfMemory> {
        let padded_dim = padded(head_dim);
        let len = pages * kv_heads * padded_dim * PAGE;
        let zeros = || Ok(Buffer::zeros(len)?.populated());
        let layers = (0..layers).map(|_| Ok(KvLayer { keys: zeros()?, values: zeros()? })).collect::<Result<_, _>>()?;
        Ok(Self { kv_heads, padded_dim, pages, layers })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of one page over all layers, for planning.
    pub fn page_bytes(layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        2 * layers * kv_heads * padded(head_dim) * PAGE * size_of::<E>()
    }

    /// Where a page's keys, or values, of one head lie in a layer.
    pub(crate) fn range(&self, page: u32, head: usize) -> Range<usize> {
        let len = self.padded_dim * PAGE;
        let start = (page as usize * self.kv_heads + head) * len;
        start..start + len
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
/// q to `q[rows, heads * padded_dim]`. `runs` cover the rows in order, the first row of `qkv` being `first_row`, and no
/// two of a step name the same page.
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
    assert!(runs.iter().all(|r| r.position % PAGE + r.len <= PAGE), "a run leaves its page");
    assert!(pages_differ(runs), "two runs write the same page");

    let head_len = padded_dim * PAGE;
    let KvLayer { keys, values } = &mut kv.layers[layer];
    let (q, keys, values) = (Shared::new(q), Shared::new(keys), Shared::new(values));
    for_each_piece(runs.len(), 1, |piece| {
        let run = runs[piece.start];
        let first = run.row - first_row;
        with_scratch(carved::<f32>(padded_dim) + carved::<E>(padded_dim), |scratch| {
            let (head, scratch) = carve::<f32>(scratch, padded_dim);
            let (narrow, _) = carve::<E>(scratch, padded_dim);
            head[dim..].fill(0.0);
            for row in 0..run.len {
                let position = run.position + row;
                let qkv = &qkv[(first + row) * width..(first + row + 1) * width];
                for h in 0..how.heads {
                    how.head(how.q_norm, &qkv[h * dim..(h + 1) * dim], position, &mut head[..dim]);
                    let start = ((first + row) * how.heads + h) * padded_dim;
                    // SAFETY: every row belongs to one run.
                    round(head, unsafe { q.range(start..start + padded_dim) });
                }
                let slot = position % PAGE;
                for h in 0..kv_heads {
                    let start = (run.page as usize * kv_heads + h) * head_len;
                    // SAFETY: every page belongs to one run.
                    let (keys, values) =
                        unsafe { (keys.range(start..start + head_len), values.range(start..start + head_len)) };
                    if slot == 0 {
                        // Slots after the last position are multiplied by a weight of zero, which a leftover NaN survives.
                        values.fill(E::default());
                    }
                    let k = &qkv[(how.heads + h) * dim..(how.heads + h + 1) * dim];
                    how.head(how.k_norm, k, position, &mut head[..dim]);
                    round(head, narrow);
                    let slots = keys.chunks_exact_mut(PAGE * E::PAIR).map(|keys| &mut keys[slot * E::PAIR..]);
                    for (key, x) in slots.zip(narrow.chunks_exact(E::PAIR)) {
                        key[..E::PAIR].copy_from_slice(x);
                    }
                    let v = &qkv[(how.heads + kv_heads + h) * dim..(how.heads + kv_heads + h + 1) * dim];
                    round(v, &mut narrow[..dim]);
                    if !narrow[..dim].iter().fold(true, |finite, x| finite & x.to_f32().is_finite()) {
                        // A weight of zero does not keep it from queries that do not see this position, and whose
                        // results others may share; a NaN in the key is seen by those that do, and masked for others.
                        narrow[..dim].fill(E::default());
                        for keys in keys.chunks_exact_mut(PAGE * E::PAIR) {
                            keys[slot * E::PAIR..][..E::PAIR].fill(E::from_f32(f32::NAN));
                        }
                    }
                    let values = &mut values[slot / E::PAIR * padded_dim * E::PAIR..];
                    for (value, x) in values.chunks_exact_mut(E::PAIR).zip(&narrow[..dim]) {
                        value[slot % E::PAIR] = *x;
                    }
                }
            }
        });
    });
}

/// Whether no two runs name the same page: what the threads that write them rely on.
fn pages_differ(runs: &[Run]) -> bool {
    with_scratch(carved::<u32>(runs.len()), |scratch| {
        let (pages, _) = carve::<u32>(scratch, runs.len());
        pages.iter_mut().zip(runs).for_each(|(page, run)| *page = run.page);
        pages.sort_unstable();
        pages.windows(2).all(|pair| pair[0] != pair[1])
    })
}
