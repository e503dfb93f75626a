//! Spreading independent pieces of one result over the threads of the current rayon pool.
//!
//! A forward pass is hundreds of short parallel stretches, one after the other. Inside [`with_team`] the other threads
//! of the pool stay awake between them and take pieces as soon as there are any; handing every stretch to rayon would
//! cost a decoding step about a third of its time.

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

/// Looks at shared memory that a waiting thread takes before it offers its core to others.
const SPINS: usize = 4096;

/// Calls `f` for every piece of `0..len` of at most `grain` items, in parallel. How the range is cut must not change
/// what a piece computes.
pub fn for_each_piece(len: usize, grain: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    let grain = grain.max(1);
    let pieces = len.div_ceil(grain);
    let piece = |i: usize| f(i * grain..((i + 1) * grain).min(len));
    let team = TEAM.get();
    if pieces <= 1 {
        (0..pieces).for_each(piece);
    } else if team.is_null() {
        (0..pieces).into_par_iter().with_max_len(1).for_each(piece);
    } else {
        // SAFETY: `with_team` takes the pointer back before the team goes.
        unsafe { &*team }.run(pieces, &piece);
    }
}

/// Calls `f` with all threads of the current rayon pool standing by for its [`for_each_piece`].
pub fn with_team<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 || !TEAM.get().is_null() {
        return f();
    }
    let team = Team::default();
    rayon::scope(|scope| {
        scope.spawn_broadcast(|_, _| team.stand_by());
        let _end = OnDrop(|| {
            TEAM.set(ptr::null());
            team.over.store(true, Ordering::Relaxed);
        });
        TEAM.set(&team);
        f()
    })
}

thread_local! {
    /// The team that this thread leads.
    static TEAM: Cell<*const Team> = const { Cell::new(ptr::null()) };
}

/// Threads that wait for the next stretch of their leader's work.
#[derive(Default)]
struct Team {
    /// Number of the stretch that was opened last.
    opened: AtomicUsize,
    /// The open stretch, or null.
    stretch: AtomicPtr<Stretch<'static>>,
    /// Threads that may be looking at it.
    inside: AtomicUsize,
    over: AtomicBool,
}

/// Pieces that threads take one after the other.
struct Stretch<'a> {
    piece: &'a (dyn Fn(usize) + Sync),
    pieces: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Team {
    /// Calls `piece` for all of `0..pieces`; the calling thread works too.
    fn run(&self, pieces: usize, piece: &(dyn Fn(usize) + Sync)) {
        let stretch = Stretch { piece, pieces, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        {
            // Even if a piece panics here, nobody may be left inside when the stretch goes.
            let _close = OnDrop(|| {
                stretch.next.fetch_max(pieces, Ordering::Relaxed);
                self.stretch.store(ptr::null_mut(), Ordering::SeqCst);
                wait_until(|| self.inside.load(Ordering::SeqCst) == 0);
            });
            self.stretch.store(ptr::from_ref(&stretch).cast_mut().cast(), Ordering::SeqCst);
            self.opened.fetch_add(1, Ordering::Release);
            stretch.work();
        }
        if let Some(panic) = stretch.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }

    /// Works on stretch after stretch until the team's work is over.
    fn stand_by(&self) {
        let leads = !TEAM.get().is_null();
        let mut last = 0;
        while !leads && !self.over.load(Ordering::Relaxed) {
            wait_until(|| self.opened.load(Ordering::Acquire) != last || self.over.load(Ordering::Relaxed));
            last = self.opened.load(Ordering::Acquire);
            self.inside.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the leader takes the pointer away and then waits until nobody is inside. Whoever went in before it
            // looked is waited for; whoever goes in later finds null.
            if let Some(stretch) = unsafe { self.stretch.load(Ordering::SeqCst).as_ref() }
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| stretch.work()))
            {
                *stretch.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Stretch<'_> {
    fn work(&self) {
        loop {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            if next >= self.pieces {
                return;
            }
            (self.piece)(next);
        }
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let mut spins = 0;
    while !condition() {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Calls a function when it goes, on the way of a panic too.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap()
    }

    fn count(len: usize, grain: usize) {
        let mut seen = vec![0u32; len];
        let shared = Shared::new(&mut seen);
        // SAFETY: pieces are disjoint.
        for_each_piece(len, grain, |piece| unsafe { shared.range(piece) }.iter_mut().for_each(|n| *n += 1));
        assert_eq!(seen, vec![1; len]);
    }

    #[test]
    fn every_item_is_in_one_piece() {
        for (len, grain) in [(0, 1), (1, 1), (1000, 1), (1000, 7), (10, 100)] {
            pool().install(|| count(len, grain));
            pool().install(|| with_team(|| (0..50).for_each(|_| count(len, grain))));
        }
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_the_team_works_on() {
        pool().install(|| {
            with_team(|| {
                for bad in 0..20 {
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        for_each_piece(20, 1, |piece| assert_ne!(piece.start, bad, "a bad piece"));
                    }));
                    assert!(result.is_err());
                    count(100, 3);
                }
            });
            let result = catch_unwind(AssertUnwindSafe(|| with_team(|| panic!("outside of pieces"))));
            assert!(result.is_err());
            with_team(|| count(100, 1));
        });
    }
}
