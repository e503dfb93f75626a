//! Rows times a packed matrix: the inner loop of every linear layer and of attention.
//!
//! A packed matrix of `k` by `cols` is `[k / PAIR][cols][PAIR]`: one step of the sum for all columns lies together, and
//! for bf16 the two values that the dot-product instruction multiplies lie side by side. Every element of the result
//! is one accumulator that walks `k` upwards, so its bits do not depend on which rows and columns are computed beside
//! it, nor on where a long sum is interrupted and taken up again.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::sync::OnceLock;

use half::bf16;

use crate::Element;
use crate::parallel::Rows;

/// Columns are computed in vectors of this many.
pub(crate) const LANES: usize = 16;

/// `c[rows, cols] (+)= a[rows, k] . b[k, cols]`.
#[derive(Debug)]
pub struct Tile<'a, A, B> {
    /// Rows, `lda` apart; `k` values of each are used.
    pub a: &'a [A],
    /// Distance between rows of `a`.
    pub lda: usize,
    /// Number of rows.
    pub rows: usize,
    /// Packed matrix, from its first column on: stretches of equally many steps, one below the other.
    pub b: &'a [&'a [B]],
    /// Distance between steps of `b`, in elements.
    pub ldb: usize,
    /// Columns to compute; a multiple of [`LANES`].
    pub cols: usize,
    /// Length of the sum; a multiple of `B::PAIR`.
    pub k: usize,
    /// Result rows.
    pub c: Rows<'a, f32>,
    /// Adds to `c` instead of overwriting it.
    pub accumulate: bool,
    /// The matrix and what follows it in memory are read once and lie in no cache: fetch them ahead.
    pub from_memory: bool,
}

impl<A, B: Element> Tile<'_, A, B> {
    /// Steps of the sum in a stretch of `b`.
    fn steps(&self) -> usize {
        self.k / B::PAIR / self.b.len().max(1)
    }

    /// The bounds that the unsafe kernels rely on.
    fn check(&self) {
        assert!(
            !self.b.is_empty() && self.cols.is_multiple_of(LANES) && self.k.is_multiple_of(B::PAIR),
            "{} {}",
            self.cols,
            self.k
        );
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        assert!(self.lda >= self.k || self.rows == 1, "rows of a overlap");
        assert!((self.rows - 1) * self.lda + self.k <= self.a.len(), "a is too short");
        assert!(self.c.holds(self.rows, self.cols), "c is too short");
        assert!(self.k.is_multiple_of(B::PAIR * self.b.len()), "uneven stretches of b");
        if let Some(last) = self.steps().checked_sub(1) {
            assert!(self.b.iter().all(|b| last * self.ldb + self.cols * B::PAIR <= b.len()), "b is too short");
        }
    }
}

/// What the machine can do, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with the bf16 dot product.
    Avx512Bf16,
    /// AVX-512 without it.
    Avx512,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// Whatever the compiler targets.
    Portable,
}

/// The instruction set in use.
#[inline]
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(detect)
}

fn detect() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("fma");
        if avx512 && is_x86_feature_detected!("avx512bf16") {
            return Isa::Avx512Bf16;
        }
        if avx512 {
            return Isa::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

/// f32 rows, f32 matrix.
pub(crate) fn f32_by_f32(tile: Tile<'_, f32, f32>) {
    tile.check();
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were detected and the bounds checked.
        Isa::Avx512Bf16 | Isa::Avx512 => unsafe { avx512::f32_by_f32(tile) },
        isa => portable::run(tile, isa),
    }
}

/// f32 rows, bf16 matrix: nothing is rounded to bf16 on the way.
pub(crate) fn f32_by_bf16(tile: Tile<'_, f32, bf16>) {
    tile.check();
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were detected and the bounds checked.
        Isa::Avx512Bf16 | Isa::Avx512 => unsafe { avx512::f32_by_bf16(tile) },
        isa => portable::run(tile, isa),
    }
}

/// bf16 rows, bf16 matrix, f32 sums.
pub(crate) fn bf16_by_bf16(tile: Tile<'_, bf16, bf16>) {
    tile.check();
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were detected and the bounds checked.
        Isa::Avx512Bf16 => unsafe { avx512::bf16_by_bf16(tile) },
        isa => portable::run(tile, isa),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn pack<B: Element>(b: &[f32], k: usize, cols: usize) -> Vec<B> {
        let mut packed = vec![B::default(); k * cols];
        for i in 0..k {
            for j in 0..cols {
                packed[(i / B::PAIR * cols + j) * B::PAIR + i % B::PAIR] = B::from_f32(b[i * cols + j]);
            }
        }
        packed
    }

    fn check<A: Element, B: Element>(rows: usize, cols: usize, k: usize, kernel: fn(Tile<'_, A, B>), tolerance: f64) {
        let a: Vec<A> = numbers(rows * k, 1).into_iter().map(A::from_f32).collect();
        let plain: Vec<f32> = numbers(k * cols, 2).into_iter().map(|x| B::from_f32(x).to_f32()).collect();
        let b = pack::<B>(&plain, k, cols);
        let start = numbers(rows * cols, 3);
        let mut whole = start.clone();
        let call = |a: &[A], rows, b: &[B], cols, k, ldc, c: &mut [f32], accumulate, lda, ldb| {
            kernel(Tile {
                a,
                lda,
                rows,
                b: &[b],
                ldb,
                cols,
                k,
                c: Rows::new(c, ldc),
                accumulate,
                from_memory: rows % 2 == 1,
            });
        };
        let ldb = cols * B::PAIR;
        call(&a, rows, &b, cols, k, cols, &mut whole, true, k, ldb);
        for r in 0..rows {
            for j in 0..cols {
                let sum: f64 = (0..k).map(|i| f64::from(a[r * k + i].to_f32()) * f64::from(plain[i * cols + j])).sum();
                let expected = sum + f64::from(start[r * cols + j]);
                assert!((f64::from(whole[r * cols + j]) - expected).abs() < tolerance, "{rows}x{cols}x{k} at {r},{j}");
            }
        }
        // The matrix in two stretches: the same bits.
        if k.is_multiple_of(2 * B::PAIR) {
            let (upper, lower) = b.split_at(k / 2 * cols);
            let (mut c, from_memory) = (start.clone(), false);
            let (b, c_rows) = (&[upper, lower][..], Rows::new(&mut c, cols));
            kernel(Tile { a: &a, lda: k, rows, b, ldb, cols, k, c: c_rows, accumulate: true, from_memory });
            assert!(c == whole, "{rows}x{cols}x{k} in two stretches");
        }
        // One row, one vector of columns, and the sum taken in two goes: the same bits.
        let middle = k / 2 / B::PAIR * B::PAIR;
        for r in 0..rows {
            for j in (0..cols).step_by(LANES) {
                let mut c = start[r * cols + j..][..LANES].to_vec();
                let row = &a[r * k..(r + 1) * k];
                call(row, 1, &b[j * B::PAIR..], LANES, middle, LANES, &mut c, true, k, ldb);
                let rest = &b[middle * cols + j * B::PAIR..];
                call(&row[middle..], 1, rest, LANES, k - middle, LANES, &mut c, true, k, ldb);
                assert_eq!(c, whole[r * cols + j..][..LANES], "{rows}x{cols}x{k} at {r},{j}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn all_kernels_match_the_sum_in_f64(rows in 1usize..20, vectors in 1usize..9, pairs in 1usize..70) {
            let (cols, k) = (vectors * LANES, pairs * 2);
            check::<f32, f32>(rows, cols, k, f32_by_f32, 1e-4);
            check::<f32, bf16>(rows, cols, k, f32_by_bf16, 1e-4);
            check::<bf16, bf16>(rows, cols, k, bf16_by_bf16, 1e-4);
            check::<f32, f32>(rows, cols, k, |t| portable::run(t, Isa::Portable), 1e-4);
            check::<f32, bf16>(rows, cols, k, |t| portable::run(t, Isa::Portable), 1e-4);
            check::<bf16, bf16>(rows, cols, k, |t| portable::run(t, Isa::Portable), 1e-4);
            #[cfg(target_arch = "x86_64")]
            if isa() != Isa::Portable {
                check::<f32, f32>(rows, cols, k, |t| portable::run(t, Isa::Avx2), 1e-4);
                check::<f32, bf16>(rows, cols, k, |t| portable::run(t, Isa::Avx2), 1e-4);
                check::<bf16, bf16>(rows, cols, k, |t| portable::run(t, Isa::Avx2), 1e-4);
            }
        }
    }
}
