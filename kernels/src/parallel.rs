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

    /// The rows of a matrix from element `start` on, `stride` apart.
    ///
    /// # Safety
    /// No element that is written through the result may be reached in another way as long as it lives.
    ///
    /// # Panics
    /// If the start does not lie in the slice.
    pub unsafe fn rows(&self, start: usize, stride: usize) -> Rows<'_, T> {
        assert!(start <= self.len, "{start} in {}", self.len);
        // SAFETY: in bounds by the assertion.
        Rows { start: unsafe { self.start.add(start) }, len: self.len - start, stride, slice: PhantomData }
    }
}

/// Rows of a matrix of which a part is written, while other threads may write the rest.
#[derive(Debug)]
pub struct Rows<'a, T> {
    start: *mut T,
    len: usize,
    stride: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<'a, T> Rows<'a, T> {
    /// Rows of `stride` elements that nobody else sees.
    pub fn new(slice: &'a mut [T], stride: usize) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), stride, slice: PhantomData }
    }

    /// Whether `rows` rows of `columns` columns lie in the memory that this was made of.
    pub fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (columns <= self.stride || rows == 1) && (rows - 1) * self.stride + columns <= self.len
    }

    /// The same rows, for as long as they are not used otherwise.
    pub fn reborrow(&mut self) -> Rows<'_, T> {
        Rows { slice: PhantomData, ..*self }
    }

    /// Where the first row begins.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.start
    }

    /// Distance between the beginnings of two rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Columns of a row.
    ///
    /// # Panics
    /// If they do not lie in the memory that this was made of.
    pub fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(columns.start <= columns.end && row * self.stride + columns.end <= self.len, "{row}, {columns:?}");
        // SAFETY: in bounds by the assertion; whoever made this promised that it is the only way to these elements.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.add(row * self.stride + columns.start),
                columns.end - columns.start,
            )
        }
    }
}
