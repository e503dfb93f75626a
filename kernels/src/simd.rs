//! Functions that are compiled once for every kind of machine.

/// Defines a function whose body is compiled for AVX-512, for AVX2 and for the compiler's own target; a call takes the
/// best that the machine can run. The body is plain code: loops that the compiler turns into vector code, whose bits
/// are the same in all versions. What it calls must be `#[inline(always)]` to be compiled along.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)?
        $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$generic: $bound>)? ($($arg: $type),*) $(-> $result)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $crate::isa() {
                $crate::Isa::Avx512Bf16 | $crate::Isa::Avx512 => {
                    // SAFETY: the features were detected.
                    return unsafe { avx512($($arg),*) };
                }
                // SAFETY: the features were detected.
                $crate::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::Isa::Portable => {}
            }
            body($($arg),*)
        }
    };
}

pub(crate) use vectorised;
