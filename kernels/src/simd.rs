//! Functions that are compiled once for every kind of machine.

use half::bf16;

use crate::Element;
use crate::gemm::LANES;

/// What a [`vectorised!`] body can ask of the machine that it is compiled for.
pub trait Simd {
    /// Nearest values, ties to even.
    fn to_bf16(lanes: [f32; LANES]) -> [bf16; LANES];
}

/// Any machine.
pub(crate) struct Plain;

impl Simd for Plain {
    #[inline(always)]
    fn to_bf16(lanes: [f32; LANES]) -> [bf16; LANES] {
        lanes.map(<bf16 as Element>::from_f32)
    }
}

/// A machine with AVX-512 and its bf16 instructions. Only functions that are compiled for it may name it.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx512Bf16;

#[cfg(target_arch = "x86_64")]
impl Simd for Avx512Bf16 {
    #[inline(always)]
    fn to_bf16(lanes: [f32; LANES]) -> [bf16; LANES] {
        use std::arch::x86_64::{_mm512_cvtneps_pbh, _mm512_loadu_ps};
        // SAFETY: the features were detected, since a function that is compiled for them runs; both results are 32 bytes
        // of 16 bf16.
        unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(lanes.as_ptr()))) }
    }
}

/// Defines a function whose body is compiled for AVX-512 with and without bf16, for AVX2 and for the compiler's own
/// target; a call takes the best that the machine can run. The body is plain code: loops that the compiler turns into
/// vector code, whose bits are the same in all versions, but for denormal bf16, which the bf16 instructions flush to
/// zero. Inside, `S` is the [`Simd`] that it is compiled for. What it
/// calls must be `#[inline(always)]` to be compiled along.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)?
        $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body<S: $crate::simd::Simd $(, $generic: $bound)?>($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
            fn avx512bf16 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                body::<$crate::simd::Avx512Bf16 $(, $generic)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                body::<$crate::simd::Plain $(, $generic)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                body::<$crate::simd::Plain $(, $generic)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $crate::isa() {
                // SAFETY: the features were detected.
                $crate::Isa::Avx512Bf16 => return unsafe { avx512bf16($($arg),*) },
                // SAFETY: the features were detected.
                $crate::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: the features were detected.
                $crate::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::Isa::Portable => {}
            }
            body::<$crate::simd::Plain $(, $generic)?>($($arg),*)
        }
    };
}

pub(crate) use vectorised;

/// `out[i] = f(inputs[0][i], inputs[1][i], ...)` in the element's type, a vector at a time.
///
/// # Panics
/// If an input is shorter than the output.
#[inline(always)]
pub(crate) fn narrow<S: Simd, E: Element, const N: usize>(
    out: &mut [E],
    inputs: [&[f32]; N],
    f: impl Fn([f32; N]) -> f32,
) {
    let inputs = inputs.map(|x| x[..out.len()].as_chunks::<LANES>());
    let (vectors, rest) = out.as_chunks_mut::<LANES>();
    for (v, out) in vectors.iter_mut().enumerate() {
        let inputs = inputs.map(|(x, _)| &x[v]);
        let mut lanes = [0.0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = f(inputs.map(|x| x[i]));
        }
        *out = E::from_lanes::<S>(lanes);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = E::from_f32(f(inputs.map(|(_, x)| x[i])));
    }
}
