//! What the tests of kernels for GPUs share.

use plumb_kernels::Element;
use plumb_kernels::attention::{PAGE, Run};
use plumb_kernels::gpu::Gpu;

/// Runs a test on each.
pub(crate) fn on_each(test: impl Fn(&Gpu)) {
    #[cfg(feature = "emulated")]
    test(&Gpu::emulated());
    #[cfg(feature = "cuda")]
    match Gpu::cuda(0) {
        Ok(gpu) => test(&gpu),
        Err(error) => {
            assert!(std::env::var_os("PLUMB_REQUIRE_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
        }
    }
}

/// Runs a test on each, and once more with the kernels that all have in common.
pub(crate) fn on_each_way(test: impl Fn(&Gpu)) {
    on_each(|gpu| {
        test(gpu);
        test(&gpu.common());
    });
}

/// Numbers from -1 to 1.
pub(crate) fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

pub(crate) fn rounded<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|value| E::from_f32(*value)).collect()
}

pub(crate) fn widened<E: Element>(values: &[E]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Compares with what the reference makes of inputs that were rounded to `E`, which then rounds once.
#[track_caller]
pub(crate) fn assert_close<E: Element>(found: &[E], expected: &[f32], what: &str) {
    assert_within(found, expected, if size_of::<E>() == 2 { 1.0 / 128.0 } else { 1e-5 }, what);
}

#[track_caller]
pub(crate) fn assert_within<E: Element>(found: &[E], expected: &[f32], relative: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let found = found.to_f32();
        assert!((found - expected).abs() <= relative * (1.0 + expected.abs()), "{what} {i}: {found} {expected}");
    }
}

/// Rows from `row` on, of so many positions from `position` on.
pub(crate) fn runs(row: usize, position: usize, len: usize, pages: &[u32]) -> Vec<Run> {
    let starts = (position..position + len).filter(|p| *p == position || p % PAGE == 0);
    let run = |start: usize| {
        let end = (start / PAGE * PAGE + PAGE).min(position + len);
        Run { row: row + start - position, len: end - start, position: start, page: pages[start / PAGE] }
    };
    starts.map(run).collect()
}
