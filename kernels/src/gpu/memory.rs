//! Arrays in a GPU's memory.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;

use super::driver::Fetched;
use super::{Gpu, Result};

/// An array in a GPU's memory.
pub struct Buffer<T> {
    gpu: Gpu,
    address: u64,
    len: usize,
    numbers: PhantomData<T>,
}

/// Part of a [`Buffer`], to be read.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    numbers: PhantomData<&'a T>,
}

/// Part of a [`Buffer`], to be written.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    numbers: PhantomData<&'a mut T>,
}

/// Part of a [`Buffer`] as it is when all that was asked for before is done.
#[derive(Debug)]
pub struct Fetch<T> {
    /// Dropped first: the device must be there.
    fetched: Box<dyn Fetched>,
    len: usize,
    _gpu: Gpu,
    numbers: PhantomData<T>,
}

impl<T: Pod> Fetch<T> {
    /// Whether [`Fetch::wait`] would not wait.
    pub fn is_done(&self) -> bool {
        self.fetched.is_there()
    }

    /// Waits for the elements.
    ///
    /// # Errors
    /// If the GPU failed, now or before.
    pub fn wait(self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.fetched.wait(bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

impl Gpu {
    /// An array of zeros.
    ///
    /// # Errors
    /// [`OutOfMemory`](super::GpuError::OutOfMemory) if there is no room for it.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = self.some(len)?;
        // SAFETY: so many bytes were just allocated.
        unsafe { self.driver.clear(buffer.address, buffer.bytes())? };
        Ok(buffer)
    }

    /// An array of anything.
    fn some<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let address = self.driver.allocate((len * size_of::<T>()).max(1))?;
        Ok(Buffer { gpu: self.clone(), address, len, numbers: PhantomData })
    }

    /// An array without elements, which takes no memory.
    pub fn empty<T: Pod>(&self) -> Buffer<T> {
        Buffer { gpu: self.clone(), address: 0, len: 0, numbers: PhantomData }
    }

    /// An array with these values, which are copied beside what was asked for, and there when it returns.
    ///
    /// # Errors
    /// [`OutOfMemory`](super::GpuError::OutOfMemory) if there is no room for it.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let buffer = self.some(values.len())?;
        // SAFETY: so many bytes were just allocated; nobody has seen them.
        unsafe { self.driver.load(buffer.address, bytemuck::cast_slice(values))? };
        Ok(buffer)
    }
}

impl Gpu {
    /// `to = from`, in order.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If one is longer.
    pub fn copy<T: Pod>(&self, from: View<'_, T>, to: ViewMut<'_, T>) -> Result<()> {
        assert_eq!(from.len, to.len, "lengths of a copy");
        // SAFETY: views are inside of their arrays, and what is borrowed to be written is nobody else's.
        unsafe { self.driver.copy(from.address, to.address, from.len * size_of::<T>()) }
    }

    /// The elements of a view, once everything that was asked for is done.
    ///
    /// # Errors
    /// If the GPU failed, now or before.
    pub fn read<T: Pod>(&self, from: View<'_, T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); from.len];
        // SAFETY: a view is inside of its array.
        unsafe { self.driver.read(from.address, bytemuck::cast_slice_mut(&mut values))? };
        Ok(values)
    }
}

impl<'a, T> View<'a, T> {
    /// Part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of an array of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        View { address, len: range.len(), numbers: PhantomData::<&'a T> }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T> ViewMut<'_, T> {
    /// The same, for a while.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, numbers: PhantomData }
    }

    /// Part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn part(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        let View { address, len, .. } = self.as_view().part(range);
        ViewMut { address, len, numbers: PhantomData }
    }

    /// What is before, and what is from there on.
    ///
    /// # Panics
    /// If it is not so long.
    pub fn split_at(mut self, at: usize) -> (Self, Self) {
        let (len, before) = (self.len, self.part(0..at));
        let before = ViewMut { address: before.address, len: at, numbers: PhantomData };
        let after = self.part(at..len);
        let after = ViewMut { address: after.address, len: len - at, numbers: PhantomData };
        (before, after)
    }

    /// The same, to be read.
    pub fn as_view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, numbers: PhantomData }
    }
}

impl<T: Pod> Buffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Makes it at least so long. If it was shorter, its values are anything then.
    ///
    /// # Errors
    /// [`OutOfMemory`](super::GpuError::OutOfMemory) if there is no room for it; then it is empty.
    pub fn grow(&mut self, len: usize) -> Result<()> {
        if self.len < len {
            let gpu = self.gpu.clone();
            // First the old one goes.
            *self = gpu.empty();
            *self = gpu.some(len)?;
        }
        Ok(())
    }

    /// Part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn view(&self, range: Range<usize>) -> View<'_, T> {
        View { address: self.at(&range), len: range.len(), numbers: PhantomData }
    }

    /// All of it.
    pub fn all(&self) -> View<'_, T> {
        self.view(0..self.len)
    }

    /// Part of it, to be written.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        ViewMut { address: self.at(&range), len: range.len(), numbers: PhantomData }
    }

    /// All of it, to be written.
    pub fn all_mut(&mut self) -> ViewMut<'_, T> {
        self.view_mut(0..self.len)
    }

    /// Sets the elements from `first` on, after what was asked for before; the values are taken when it returns.
    ///
    /// # Errors
    /// If the GPU failed.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn write(&mut self, first: usize, values: &[T]) -> Result<()> {
        let address = self.at(&(first..first + values.len()));
        // SAFETY: `at` has found them inside.
        unsafe { self.gpu.driver.write(address, bytemuck::cast_slice(values)) }
    }

    /// The elements from `first` on, once everything that was asked for is done.
    ///
    /// # Errors
    /// If the GPU failed, now or before.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn read(&self, first: usize, values: &mut [T]) -> Result<()> {
        let address = self.at(&(first..first + values.len()));
        // SAFETY: `at` has found them inside.
        unsafe { self.gpu.driver.read(address, bytemuck::cast_slice_mut(values)) }
    }

    /// Asks for elements as they are once everything before is done, whatever is asked for afterwards.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn fetch(&self, range: Range<usize>) -> Result<Fetch<T>> {
        // SAFETY: `at` has found them inside.
        let fetched = unsafe { self.gpu.driver.fetch(self.at(&range), range.len() * size_of::<T>())? };
        Ok(Fetch { fetched, len: range.len(), _gpu: self.gpu.clone(), numbers: PhantomData })
    }

    /// All elements.
    ///
    /// # Errors
    /// If the GPU failed, now or before.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.read(0, &mut values)?;
        Ok(values)
    }

    fn at(&self, range: &Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of an array of {}", self.len);
        self.address + (range.start * size_of::<T>()) as u64
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: it was allocated, and nobody has freed it before.
            unsafe { self.gpu.driver.free(self.address) }
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Buffer of {} x {} on {}", self.len, std::any::type_name::<T>(), self.gpu.name())
    }
}
