//! Spreading independent pieces of one result over the threads of the current rayon pool.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

/// Calls `f` for every piece of `0..len` of at most `grain` items, in parallel. How the range is cut must not change
/// what a piece computes.
pub fn for_each_piece(len: usize, grain: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    let grain = grain.max(1);
    let pieces = len.div_ceil(grain);
    if pieces <= 1 {
        if len > 0 {
            f(0..len);
        }
        return;
    }
    (0..pieces).into_par_iter().with_max_len(1).for_each(|i| f(i * grain..((i + 1) * grain).min(len)));
}

/// A mutable slice that several threads write, each its own elements.
#[derive(Debug)]
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are handed out only by the unsafe `range`, whose callers promise disjointness; T may move between
// threads.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the slice for as long as threads write it.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two ranges that are alive at the same time may overlap.
    ///
    /// # Panics
    /// If the range does not lie in the slice.
    #[expect(clippy::mut_from_ref, reason = "the caller promises disjoint ranges")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} in {}", self.len);
        // SAFETY: in bounds by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start) }
    }
}
