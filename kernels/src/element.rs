//! The types in which weights, activations between operations, and key/value caches are held.

use bytemuck::Pod;
use half::bf16;

use crate::gemm::{self, LANES, Tile};
use crate::parallel::{Shared, for_each_piece};
use crate::simd::{Simd, narrow, vectorised};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// `f32` or `bf16`.
pub trait Element: sealed::Sealed + Pod + Default + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// Values along the summed dimension that lie side by side in a packed matrix: the dot-product instruction for
    /// bf16 takes two.
    const PAIR: usize;
    /// Name as in `--dtype`.
    const NAME: &'static str;

    /// Nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;

    /// A vector of [`Element::from_f32`], with what the machine has for it.
    #[doc(hidden)]
    fn from_lanes<S: Simd>(lanes: [f32; LANES]) -> [Self; LANES];

    /// The slice, if this is bf16.
    #[doc(hidden)]
    fn as_bf16_mut(slice: &mut [Self]) -> Option<&mut [bf16]>;

    /// Multiplies rows of this type with a packed matrix of this type; see [`Tile`].
    #[doc(hidden)]
    fn gemm_tile(tile: Tile<'_, Self, Self>);
    /// Multiplies rows of f32 with a packed matrix of this type; see [`Tile`].
    #[doc(hidden)]
    fn gemm_tile_f32(tile: Tile<'_, f32, Self>);
}

impl Element for f32 {
    const PAIR: usize = 1;
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_lanes<S: Simd>(lanes: [f32; LANES]) -> [Self; LANES] {
        lanes
    }

    fn as_bf16_mut(_: &mut [f32]) -> Option<&mut [bf16]> {
        None
    }

    fn gemm_tile(tile: Tile<'_, f32, f32>) {
        gemm::f32_by_f32(tile);
    }

    fn gemm_tile_f32(tile: Tile<'_, f32, f32>) {
        gemm::f32_by_f32(tile);
    }
}

impl Element for bf16 {
    const PAIR: usize = 2;
    const NAME: &'static str = "bf16";

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Round to nearest even without branches, so that loops of it become vector code. A NaN with a low payload
        // would round to infinity, hence the select.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
        bf16::from_bits((bits >> 16) as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_lanes<S: Simd>(lanes: [f32; LANES]) -> [Self; LANES] {
        S::to_bf16(lanes)
    }

    fn as_bf16_mut(slice: &mut [bf16]) -> Option<&mut [bf16]> {
        Some(slice)
    }

    fn gemm_tile(tile: Tile<'_, bf16, bf16>) {
        gemm::bf16_by_bf16(tile);
    }

    fn gemm_tile_f32(tile: Tile<'_, f32, bf16>) {
        gemm::f32_by_bf16(tile);
    }
}

vectorised! {
    /// Nearest values, ties to even.
    pub(crate) fn round<E: Element>(x: &[f32], out: &mut [E]) {
        narrow::<S, E, 1>(out, [x], |[x]| x);
    }
}

vectorised! {
    /// Values times a factor, rounded.
    pub(crate) fn scale<E: Element>(x: &[f32], factor: f32, out: &mut [E]) {
        narrow::<S, E, 1>(out, [x], |[x]| x * factor);
    }
}

/// Nearest values, ties to even, on all threads.
///
/// # Panics
/// If the lengths differ.
pub fn round_all<E: Element>(x: &[f32], out: &mut [E]) {
    /// Values that a thread takes at a time.
    const PIECE: usize = 1 << 14;
    assert_eq!(x.len(), out.len(), "as many rounded values as values");
    let out = Shared::new(out);
    for_each_piece(x.len(), PIECE, |piece| {
        // SAFETY: pieces are disjoint.
        round(&x[piece.clone()], unsafe { out.range(piece) });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::from_f32(value), bf16::from_f32(value));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{value:?}: {ours:?} {theirs:?}");
        }
    }
}
