//! Copies from the device to memory that stays where it is, which go on while the processor does something else.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use super::super::Result;
use super::super::driver::Fetched;
use super::{failed, lock};

/// The smallest place, of as many numbers as most steps are asked for.
const LEAST: usize = 64 << 10;

/// Places that are free. There are as many of them as copies were ever on their way at once.
#[derive(Clone, Debug, Default)]
pub(super) struct Landings(Arc<Mutex<Vec<Landing>>>);

#[derive(Debug)]
struct Landing {
    context: Arc<CudaContext>,
    memory: *mut c_void,
    bytes: usize,
    /// When the last copy to it is done.
    there: sys::CUevent,
}

// SAFETY: nobody else has the memory or the event, which may be used from any thread.
unsafe impl Send for Landing {}
// SAFETY: as above; the memory is only read where it is shared.
unsafe impl Sync for Landing {}

/// What is copied. Its place is free again when it is dropped.
#[derive(Debug)]
pub(super) struct Landed {
    landing: Option<Landing>,
    landings: Landings,
}

impl Landings {
    /// Has the stream copy bytes from an address.
    ///
    /// # Safety
    /// So many bytes are allocated there; the stream is always the same one, and the context is current. So a copy to a
    /// place comes after all earlier ones to it, whether they were waited for or not.
    pub(super) unsafe fn copy(
        &self,
        context: &Arc<CudaContext>,
        stream: sys::CUstream,
        address: u64,
        bytes: usize,
    ) -> Result<Landed, DriverError> {
        // One that is too small gives way.
        let free = lock(&self.0).pop().filter(|landing| landing.bytes >= bytes);
        let landing = free.map_or_else(|| Landing::new(context, bytes.max(LEAST).next_power_of_two()), Ok)?;
        // SAFETY: so many bytes are there, which were set when they were allocated. They stay until the event is over.
        unsafe {
            if bytes > 0 {
                let to = std::slice::from_raw_parts_mut(landing.memory.cast::<u8>(), bytes);
                result::memcpy_dtoh_async(to, address, stream)?;
            }
            result::event::record(landing.there, stream)?;
        }
        Ok(Landed { landing: Some(landing), landings: self.clone() })
    }
}

impl Landing {
    /// The context is current.
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, DriverError> {
        let there = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: all of it is set before it is read.
        let memory = unsafe { result::malloc_host(bytes, 0) }.inspect_err(|_| {
            // SAFETY: it was just made.
            let _ = unsafe { result::event::destroy(there) };
        })?;
        // SAFETY: so many bytes were just allocated.
        unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), memory, bytes, there })
    }
}

impl Fetched for Landed {
    fn is_there(&self) -> bool {
        let Some(landing) = &self.landing else { return true };
        // SAFETY: the event is there.
        let found = landing.context.bind_to_thread().and_then(|()| unsafe { result::event::query(landing.there) });
        // Any other error is told by who waits.
        !matches!(found, Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)))
    }

    fn wait(&self, bytes: &mut [u8]) -> Result<()> {
        let Some(landing) = &self.landing else { return Ok(()) };
        landing.context.bind_to_thread().map_err(failed)?;
        // SAFETY: the event is there.
        unsafe { result::event::synchronize(landing.there) }.map_err(failed)?;
        assert!(bytes.len() <= landing.bytes, "more bytes than were asked for");
        // SAFETY: so many bytes are there, and nothing is copied to them any more.
        unsafe { std::ptr::copy_nonoverlapping(landing.memory.cast(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

impl Drop for Landed {
    fn drop(&mut self) {
        lock(&self.landings.0).extend(self.landing.take());
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // SAFETY: they were made for it, and nobody uses them once the last copy is done. If the device is lost, so are
        // they.
        unsafe {
            let bound = self.context.bind_to_thread();
            if bound.and_then(|()| result::event::synchronize(self.there)).is_ok() {
                let _ = result::event::destroy(self.there);
                let _ = result::free_host(self.memory);
            }
        }
    }
}
