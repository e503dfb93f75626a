//! Memory for numbers: large arrays for weights, keys and values, and what a thread scribbles on.

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use memmap2::{MmapMut, MmapRaw};

/// Bytes that are mapped at a time. Many huge pages, of which an array that is smaller than one would get none; what is
/// left at the end of a mapping, because the next array does not fit, is little of it.
const MAPPING: usize = 256 << 20;

/// Bytes that are taken from the system at a time: two huge pages.
#[cfg(target_os = "linux")]
const PIECE: usize = 4 << 20;

/// Zeros that the system provides as they are first touched, and takes back when the buffer is dropped, up to a page at
/// either end that it may share with another one.
///
/// Starts at a cache line, so that no vector straddles two of them, and lies in huge pages where the system has them: a
/// decoding step reads every weight once, and would miss the address cache at every small page.
pub struct Buffer<T> {
    map: Arc<MmapRaw>,
    /// In bytes, from the beginning of the mapping.
    offset: usize,
    len: usize,
    numbers: PhantomData<T>,
}

/// The system has no memory for an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes that were asked for.
    pub bytes: usize,
}

impl OutOfMemory {
    /// Ends the process, as a vector does that cannot grow: for what cannot do without.
    pub fn abort(self) -> ! {
        handle_alloc_error(Layout::from_size_align(self.bytes, 1).unwrap_or_else(|_| Layout::new::<u8>()))
    }
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the system has no memory for an array of {} bytes", self.bytes)
    }
}

impl std::error::Error for OutOfMemory {}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// If the system does not map so much: whoever asks may do without, as a server without another model.
    pub fn zeros(len: usize) -> Result<Self, OutOfMemory> {
        // The last mapping, and how much of it is given out.
        static LAST: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(size_of::<Line>()));
        let bytes = bytes.ok_or(OutOfMemory { bytes: usize::MAX })?;
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, offset) = match last.take() {
            Some((map, used)) if bytes <= map.len() - used => (map, used),
            // What is left of the last one may do for the next array.
            other => match map(bytes.max(MAPPING)) {
                Some(map) => (Arc::new(map), 0),
                None => {
                    *last = other;
                    return Err(OutOfMemory { bytes });
                }
            },
        };
        *last = Some((Arc::clone(&map), offset + bytes));
        Ok(Self { map, offset, len, numbers: PhantomData })
    }

    /// Takes all the memory from the system now, where it can be told to: nobody has to wait for a page later.
    #[must_use]
    pub fn populated(self) -> Self {
        // While the system provides memory, it holds the lock that every other thread needs that maps some: a piece at a
        // time, so that none of those waits for gigabytes to be cleared.
        #[cfg(target_os = "linux")]
        for piece in (0..self.len * size_of::<T>()).step_by(PIECE) {
            let bytes = PIECE.min(self.len * size_of::<T>() - piece);
            // Linux before 5.14 refuses, and provides pages as they are touched.
            drop(self.map.advise_range(memmap2::Advice::PopulateWrite, self.offset + piece, bytes));
        }
        self
    }
}

fn map(bytes: usize) -> Option<MmapRaw> {
    let map = MmapMut::map_anon(bytes).ok()?;
    #[cfg(target_os = "linux")]
    // A kernel without huge pages refuses; small ones do as well, only slower.
    drop(map.advise(memmap2::Advice::HugePage));
    Some(map.into())
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping lives as long as the buffer and is longer; no two buffers overlap, so that only a mutable
        // borrow of this one can write; zeros and whatever was written are values of T, and cache lines are aligned
        // for it.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.offset).cast(), self.len) }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(self.offset).cast(), self.len) }
    }
}

#[cfg(target_os = "linux")]
impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // Of the smallest page that any system has; a system with larger ones refuses what does not begin at one, and
        // has the memory back with the rest of the mapping.
        const PAGE: usize = 4096;
        let first = self.offset.next_multiple_of(PAGE);
        let last = (self.offset + self.len * size_of::<T>()) / PAGE * PAGE;
        if first < last {
            // SAFETY: nobody else has these bytes, and this buffer is not read any more. They are not given out again.
            drop(unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, last - first) });
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Makes the allocator map every array of a MiB or more by itself, so that the system has it back as soon as it is freed.
///
/// Left alone, glibc takes the size of what was freed for a sign that as much will be wanted again, up to 32 MiB, and
/// keeps it: after models of 120 MiB had been loaded and dropped, 130 to 180 MiB were still resident, and 13 MiB with
/// this. Buffers that are used again and again are kept by those who use them.
pub fn return_large_arrays() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        const LARGE: libc::c_int = 1 << 20;
        ONCE.call_once(|| {
            // SAFETY: sets two numbers under the allocator's lock, and may be called at any time. What is refused leaves
            // them as they were.
            unsafe {
                libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
                // Otherwise 128 KiB from now on, and small arrays would go back and forth.
                libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * LARGE);
            }
        });
    }
}

/// Asks for memory that will be read soon.
pub(crate) fn prefetch<T>(numbers: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of_val(numbers).div_ceil(size_of::<Line>()) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: nothing is read, and every x86-64 has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(numbers.as_ptr().cast::<i8>().wrapping_add(line * size_of::<Line>())) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}

/// A cache line.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// What pieces of work have left; as many as were ever nested.
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with memory that the thread keeps from one piece of work to the next; it begins at a cache line and holds
/// whatever was there.
pub(crate) fn with_scratch<R>(bytes: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut lines = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    let needed = bytes.div_ceil(size_of::<Line>());
    if lines.len() < needed {
        lines.resize(needed, Line([0; 64]));
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..bytes]);
    SCRATCH.with_borrow_mut(|left| left.push(lines));
    result
}

/// The first `len` numbers of scratch memory, and the rest of it from a cache line on.
pub(crate) fn carve<T: Pod>(scratch: &mut [u8], len: usize) -> (&mut [T], &mut [u8]) {
    let bytes = carved::<T>(len);
    let (numbers, rest) = scratch.split_at_mut(bytes);
    (&mut bytemuck::cast_slice_mut(numbers)[..len], rest)
}

/// Bytes that [`carve`] takes for `len` numbers.
pub(crate) fn carved<T>(len: usize) -> usize {
    (len * size_of::<T>()).next_multiple_of(size_of::<Line>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn check<T: Pod + PartialEq + fmt::Debug>(len: usize, one: T) {
        let mut buffer = Buffer::<T>::zeros(len).unwrap();
        assert_eq!(buffer.len(), len);
        assert!(buffer.iter().all(|x| *x == T::zeroed()));
        buffer.fill(one);
        assert!(buffer.iter().all(|x| *x == one));
        assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(64));
    }

    #[test]
    fn buffers_do_not_overlap() {
        let mut buffers: Vec<_> = (0..50).map(|i| Buffer::<u32>::zeros(i * 40_000).unwrap().populated()).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.iter().all(|x| *x == 0));
            buffer.fill(i as u32 + 1);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|x| *x == i as u32 + 1), "{i}");
        }
    }

    /// How many of the pages are in memory.
    #[cfg(target_os = "linux")]
    fn present(pages: std::ops::Range<usize>) -> usize {
        use std::os::unix::fs::FileExt;
        let mut entries = vec![0; pages.len() * 8];
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        map.read_exact_at(&mut entries, pages.start as u64 * 8).unwrap();
        entries.chunks(8).filter(|entry| entry[7] >= 0x80).count()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_goes_back_although_a_neighbour_stays() {
        const PAGES: usize = 1000;
        let [mut first, mut large, mut last] = [1000, PAGES * 4096, 1000].map(|len| Buffer::<u8>::zeros(len).unwrap());
        large.fill(1);
        let start = large.as_ptr().addr().div_ceil(4096);
        let pages = start..start + PAGES - 1;
        assert_eq!(present(pages.clone()), PAGES - 1);
        drop(large);
        assert_eq!(present(pages), 0);
        first.fill(1);
        last.fill(2);
        assert!(first.iter().all(|x| *x == 1) && last.iter().all(|x| *x == 2));
    }

    #[test]
    fn what_the_system_does_not_have_is_an_error() {
        for len in [usize::MAX / 4, usize::MAX / 4 + 1, 1 << 60] {
            let error = Buffer::<u32>::zeros(len).unwrap_err();
            assert!(error.bytes >= 1 << 60 && error.to_string().contains("no memory"), "{len}: {error}");
        }
        check::<u32>(1000, 1);
    }

    #[test]
    fn zeros_of_any_length_at_the_start_of_a_cache_line() {
        for len in [0, 1, 63, 5000, 3 << 20] {
            check::<f32>(len, 1.0);
            check::<bf16>(len, bf16::ONE);
        }
    }
}
