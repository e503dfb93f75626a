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
fn body<A: Element, B: Element, const FUSED: bool>(tile: Tile<'_, A, B>) {
    let Tile { a, lda, rows, b, ldb, cols, k, mut c, accumulate, .. } = tile;
    for r in 0..rows {
        let row = &a[r * lda..r * lda + k];
        for j in (0..cols).step_by(LANES) {
            let out = c.row(r, j..j + LANES);
            let mut sums = [0.0f32; LANES];
            if accumulate {
                sums.copy_from_slice(out);
            }
            for (step, values) in row.chunks_exact(B::PAIR).enumerate() {
                let start = step * ldb + j * B::PAIR;
                let weights = &b[start..start + LANES * B::PAIR];
                for (p, value) in values.iter().enumerate() {
                    let value = value.to_f32();
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let weight = weights[lane * B::PAIR + p].to_f32();
                        // Without the instruction, mul_add is a slow call.
                        *sum = if FUSED { value.mul_add(weight, *sum) } else { value * weight + *sum };
                    }
                }
            }
            out.copy_from_slice(&sums);
        }
    }
}
