//! Copies to the device by way of memory that stays where it is, which the device takes by itself while the processor
//! goes on.

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// Places for what is on its way, which are used in turn; a stream takes from them.
pub(super) struct Staging {
    slots: Vec<Slot>,
    /// The one that is being filled, and how far.
    current: usize,
    filled: usize,
    slot_bytes: usize,
}

struct Slot {
    memory: *mut c_void,
    /// When everything in it has been taken.
    taken: sys::CUevent,
}

// SAFETY: nobody else has the memory or the events, which may be used from any thread.
unsafe impl Send for Staging {}

impl Staging {
    /// The context is current.
    pub(super) fn new(slots: usize, slot_bytes: usize) -> Result<Self, DriverError> {
        let mut staging = Self { slots: Vec::new(), current: 0, filled: 0, slot_bytes };
        for _ in 0..slots {
            let taken = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: it is written before it is read.
            match unsafe { result::malloc_host(slot_bytes, 0) } {
                Ok(memory) => staging.slots.push(Slot { memory, taken }),
                Err(error) => {
                    // SAFETY: it was just made.
                    let _ = unsafe { result::event::destroy(taken) };
                    return Err(error);
                }
            }
        }
        Ok(staging)
    }

    /// Has the stream copy the bytes to an address, which are taken when it returns.
    ///
    /// # Safety
    /// So many bytes are allocated there; the stream is always the same one, and the context is current.
    pub(super) unsafe fn copy(&mut self, stream: sys::CUstream, address: u64, bytes: &[u8]) -> Result<(), DriverError> {
        let mut at = address;
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.filled == self.slot_bytes {
                let next = (self.current + 1) % self.slots.len();
                // SAFETY: the events are there. One that was never recorded is not waited for.
                unsafe {
                    result::event::record(self.slots[self.current].taken, stream)?;
                    result::event::synchronize(self.slots[next].taken)?;
                }
                (self.current, self.filled) = (next, 0);
            }
            let part;
            (part, rest) = rest.split_at(rest.len().min(self.slot_bytes - self.filled));
            // SAFETY: the part ends inside the slot, of which the device has taken what was there before.
            let staged = unsafe {
                let to = self.slots[self.current].memory.cast::<u8>().add(self.filled);
                std::ptr::copy_nonoverlapping(part.as_ptr(), to, part.len());
                std::slice::from_raw_parts(to, part.len())
            };
            // SAFETY: so many bytes are there; those here stay until the slot's event has been waited for.
            unsafe { result::memcpy_htod_async(at, staged, stream)? };
            at += part.len() as u64;
            // What comes next begins at a multiple of 16, as copies like it.
            self.filled = (self.filled + part.len()).next_multiple_of(16).min(self.slot_bytes);
        }
        Ok(())
    }
}

impl Drop for Staging {
    /// Nothing is on its way any more, and the context is current.
    fn drop(&mut self) {
        for slot in &self.slots {
            // SAFETY: they were made for it, and nobody uses them.
            unsafe {
                let _ = result::event::destroy(slot.taken);
                let _ = result::free_host(slot.memory);
            }
        }
    }
}
