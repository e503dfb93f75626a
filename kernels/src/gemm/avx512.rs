//! Register-blocked AVX-512 kernels: R rows by V vectors of 16 columns stay in registers over the whole sum.

use std::arch::x86_64::*;

use half::bf16;

use crate::gemm::{LANES, Tile};

/// Splits a tile into blocks of at most 4 vectors and as many rows as keep the sums in 24 registers, and calls
/// `$micro::<R, V>` for each.
macro_rules! blocked {
    ($tile:ident, $pair:expr, $micro:ident) => {{
        let mut tile = $tile;
        let Tile { a, lda, rows, b, ldb, cols, accumulate, .. } = tile;
        let (ldc, steps) = (tile.c.stride(), tile.steps());
        let mut j = 0;
        while j < cols {
            let vectors = ((cols - j) / LANES).min(4);
            let mut r = 0;
            while r < rows {
                // SAFETY: Tile::check has made sure that rows, columns and steps lie in the slices.
                let (a, c) = unsafe { (a.as_ptr().add(r * lda), tile.c.as_mut_ptr().add(r * ldc + j)) };
                let left = rows - r;
                let (ahead, lines) = fetch(&tile, b[0][j * $pair..].as_ptr(), steps, r);
                macro_rules! call {
                    ($r:literal, $v:literal) => {{
                        // SAFETY: as above; the caller has detected the features.
                        unsafe {
                            match lines {
                                4 => $micro::<$r, $v, 4>(a, lda, b, j * $pair, ldb, steps, c, ldc, accumulate, ahead),
                                2 => $micro::<$r, $v, 2>(a, lda, b, j * $pair, ldb, steps, c, ldc, accumulate, ahead),
                                _ => $micro::<$r, $v, 0>(a, lda, b, j * $pair, ldb, steps, c, ldc, accumulate, ahead),
                            }
                        };
                        $r
                    }};
                }
                r += match (vectors, left) {
                    (4, 6..) => call!(6, 4),
                    (4, 4..) => call!(4, 4),
                    (4, 2..) => call!(2, 4),
                    (4, _) => call!(1, 4),
                    (3, 8..) => call!(8, 3),
                    (3, 4..) => call!(4, 3),
                    (3, 2..) => call!(2, 3),
                    (3, _) => call!(1, 3),
                    (2, 12..) => call!(12, 2),
                    (2, 6..) => call!(6, 2),
                    (2, 3..) => call!(3, 2),
                    (2, _) => call!(1, 2),
                    (_, 12..) => call!(12, 1),
                    (_, 4..) => call!(4, 1),
                    (_, _) => call!(1, 1),
                };
            }
            j += vectors * LANES;
        }
    }};
}

/// See [`Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn f32_by_f32(tile: Tile<'_, f32, f32>) {
    blocked!(tile, 1, f32_f32_block)
}

/// See [`Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) fn f32_by_bf16(tile: Tile<'_, f32, bf16>) {
    blocked!(tile, 2, f32_bf16_block)
}

/// See [`Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(crate) fn bf16_by_bf16(tile: Tile<'_, bf16, bf16>) {
    blocked!(tile, 2, bf16_bf16_block)
}

/// How far ahead of a matrix that comes from memory it is fetched, in bytes.
const AHEAD: usize = 8192;

/// Where to fetch from while a block of rows passes over a matrix that comes from memory, and how many cache lines at
/// each step. A single block runs as fast as memory and fetches just ahead of itself; the first of several have time to
/// fetch the columns that come next, half of them each.
fn fetch<B>(tile: &Tile<'_, impl Copy, B>, b: *const B, steps: usize, first_row: usize) -> (*const u8, usize) {
    const LINE: usize = 64;
    let b = b.cast::<u8>();
    let next = b.wrapping_add(steps * tile.ldb * size_of::<B>());
    match (tile.from_memory, tile.rows, first_row) {
        (false, ..) => (b, 0),
        (_, ..=6, _) => (b.wrapping_add(AHEAD), 4),
        (_, _, 0) => (next, 2),
        (_, _, 6) => (next.wrapping_add(steps * 2 * LINE), 2),
        _ => (b, 0),
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const LINES: usize>(ahead: *const u8, step: usize) {
    for line in 0..LINES {
        // Nothing is read: any address will do.
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add((step * LINES + line) * 64).cast());
    }
}

/// The sums before the first step.
///
/// # Safety
/// If `accumulate`, R rows of V vectors must be readable at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn start<const R: usize, const V: usize>(c: *const f32, ldc: usize, accumulate: bool) -> [[__m512; V]; R] {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    if accumulate {
        for (r, row) in sums.iter_mut().enumerate() {
            for (v, sum) in row.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *sum = unsafe { _mm512_loadu_ps(c.add(r * ldc + v * LANES)) };
            }
        }
    }
    sums
}

/// Stores the sums.
///
/// # Safety
/// R rows of V vectors must be writable at `c`, `ldc` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn finish<const R: usize, const V: usize>(sums: [[__m512; V]; R], c: *mut f32, ldc: usize) {
    for (r, row) in sums.iter().enumerate() {
        for (v, sum) in row.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(c.add(r * ldc + v * LANES), *sum) };
        }
    }
}

/// # Safety
/// `a` has R rows of `steps` values for each stretch of `b`, `b` `steps` steps of V vectors from `first` on, `c` R rows of
/// V vectors.
#[expect(clippy::too_many_arguments, reason = "a kernel's registers")]
#[target_feature(enable = "avx512f")]
unsafe fn f32_f32_block<const R: usize, const V: usize, const LINES: usize>(
    a: *const f32,
    lda: usize,
    b: &[&[f32]],
    first: usize,
    ldb: usize,
    steps: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    ahead: *const u8,
) {
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        let mut sums = start::<R, V>(c, ldc, accumulate);
        for (i, b) in b.iter().enumerate() {
            let (a, b) = (a.add(i * steps), b.as_ptr().add(first));
            for step in 0..steps {
                prefetch::<LINES>(ahead, step);
                let b = b.add(step * ldb);
                let mut columns = [_mm512_setzero_ps(); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_ps(b.add(v * LANES));
                }
                for (r, row) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*a.add(r * lda + step));
                    for (sum, column) in row.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(value, column, *sum);
                    }
                }
            }
        }
        finish(sums, c, ldc);
    }
}

/// # Safety
/// `a` has R rows of `2 * steps` values for each stretch of `b`, `b` `steps` steps of V vectors of pairs from `first` on,
/// `c` R rows of V vectors.
#[expect(clippy::too_many_arguments, reason = "a kernel's registers")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn f32_bf16_block<const R: usize, const V: usize, const LINES: usize>(
    a: *const f32,
    lda: usize,
    b: &[&[bf16]],
    first: usize,
    ldb: usize,
    steps: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    ahead: *const u8,
) {
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
        let mut sums = start::<R, V>(c, ldc, accumulate);
        for (i, b) in b.iter().enumerate() {
            let (a, b) = (a.add(2 * i * steps), b.as_ptr().add(first));
            for step in 0..steps {
                prefetch::<LINES>(ahead, step);
                let b = b.add(step * ldb);
                for v in 0..V {
                    // A bf16 is the upper half of an f32.
                    let pair = _mm512_loadu_si512(b.add(v * LANES * 2).cast());
                    let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
                    let second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
                    for (r, row) in sums.iter_mut().enumerate() {
                        let a = a.add(r * lda + 2 * step);
                        row[v] = _mm512_fmadd_ps(_mm512_set1_ps(*a), first, row[v]);
                        row[v] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(1)), second, row[v]);
                    }
                }
            }
        }
        finish(sums, c, ldc);
    }
}

/// # Safety
/// `a` has R rows of `2 * steps` values for each stretch of `b`, `b` `steps` steps of V vectors of pairs from `first` on,
/// `c` R rows of V vectors.
#[expect(clippy::too_many_arguments, reason = "a kernel's registers")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_bf16_block<const R: usize, const V: usize, const LINES: usize>(
    a: *const bf16,
    lda: usize,
    b: &[&[bf16]],
    first: usize,
    ldb: usize,
    steps: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    ahead: *const u8,
) {
    // SAFETY: the caller's promise covers every address below; __m512bh and __m512i are the same 64 bytes.
    unsafe {
        let mut sums = start::<R, V>(c, ldc, accumulate);
        for (i, b) in b.iter().enumerate() {
            let (a, b) = (a.add(2 * i * steps), b.as_ptr().add(first));
            for step in 0..steps {
                prefetch::<LINES>(ahead, step);
                let b = b.add(step * ldb);
                let mut columns = [std::mem::transmute::<__m512i, __m512bh>(_mm512_setzero_si512()); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(v * LANES * 2).cast()));
                }
                for (r, row) in sums.iter_mut().enumerate() {
                    let pair = _mm512_set1_epi32(a.add(r * lda + 2 * step).cast::<i32>().read_unaligned());
                    let pair = std::mem::transmute::<__m512i, __m512bh>(pair);
                    for (sum, column) in row.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, column);
                    }
                }
            }
        }
        finish(sums, c, ldc);
    }
}
