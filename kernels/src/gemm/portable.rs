//! The kernel for machines without AVX-512: plain loops, compiled twice.

use crate::Element;
use crate::gemm::{Isa, LANES, Tile};

/// Runs the tile with AVX2 if `isa` says so; the caller has detected it and checked the bounds.
pub(crate) fn run<A: Element, B: Element>(tile: Tile<'_, A, B>, isa: Isa) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` comes from detection; every better machine has AVX2 too.
        Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => unsafe { with_avx2(tile) },
        _ => body::<A, B, false>(tile),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<A: Element, B: Element>(tile: Tile<'_, A, B>) {
    body::<A, B, true>(tile);
}

#[inline(always)]
fn body<A: Element, B: Element, const FUSED: bool>(mut tile: Tile<'_, A, B>) {
    let mut row = 0;
    while row < tile.rows {
        // Four rows share the work of loading and widening a step of the matrix.
        row += match tile.rows - row {
            4.. => rows::<A, B, FUSED, 4>(&mut tile, row),
            _ => rows::<A, B, FUSED, 1>(&mut tile, row),
        };
    }
}

/// R rows from `first` on; answers R.
#[inline(always)]
fn rows<A: Element, B: Element, const FUSED: bool, const R: usize>(tile: &mut Tile<'_, A, B>, first: usize) -> usize {
    let (lda, ldb, k) = (tile.lda, tile.ldb, tile.k);
    let stretch = k / tile.b.len();
    let a: [&[A]; R] = std::array::from_fn(|r| &tile.a[(first + r) * lda..(first + r) * lda + k]);
    for j in (0..tile.cols).step_by(LANES) {
        let mut sums = [[0.0f32; LANES]; R];
        if tile.accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(tile.c.row(first + r, j..j + LANES));
            }
        }
        for (i, b) in tile.b.iter().enumerate() {
            for step in 0..stretch / B::PAIR {
                let weights = &b[step * ldb + j * B::PAIR..][..LANES * B::PAIR];
                for p in 0..B::PAIR {
                    let weights: [f32; LANES] = std::array::from_fn(|lane| weights[lane * B::PAIR + p].to_f32());
                    for (a, sums) in a.iter().zip(&mut sums) {
                        let value = a[i * stretch + step * B::PAIR + p].to_f32();
                        for (sum, weight) in sums.iter_mut().zip(weights) {
                            // Without the instruction, mul_add is a slow call.
                            *sum = if FUSED { value.mul_add(weight, *sum) } else { value * weight + *sum };
                        }
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            tile.c.row(first + r, j..j + LANES).copy_from_slice(sums);
        }
    }
    R
}
