//! NCCL: sums over several GPUs, and exchanges between those of several processes.
//!
//! Its library is loaded by the name that its packages give it, which cudarc does not look for.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::Library;

use super::cuda::Cuda;
use super::driver::{Collective, Driver as _, Exchange};
use super::{GpuError, MeetingId, Result};

/// As its packages call it, with and without what it takes to compile against it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclFloat32` and `ncclSum` of nccl.h.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// `ncclComm_t`.
type Handle = *mut c_void;
/// `ncclResult_t`; 0 is success.
type Code = c_int;

/// `ncclUniqueId`, which is given by value.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId(MeetingId);

/// What is used of it.
struct Nccl {
    comm_init_all: unsafe extern "C" fn(*mut Handle, c_int, *const c_int) -> Code,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> Code,
    comm_destroy: unsafe extern "C" fn(Handle) -> Code,
    group_start: unsafe extern "C" fn() -> Code,
    group_end: unsafe extern "C" fn() -> Code,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    _library: Library,
}

/// Loaded once.
fn nccl() -> Result<&'static Nccl> {
    static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
    NCCL.get_or_init(Nccl::load).as_ref().map_err(|reason| GpuError::Missing(reason.clone()))
}

impl Nccl {
    fn load() -> Result<Self, String> {
        // SAFETY: what NCCL does when it is loaded is no more than every use of it would.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok()).ok_or_else(|| {
            format!(
                "several GPUs take NCCL, and {} is not on this machine, or not where libraries are looked for \
                 (LD_LIBRARY_PATH)",
                NAMES[0]
            )
        })?;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that in nccl.h, and the library stays loaded.
                *unsafe { library.get($name) }.map_err(|error| format!("NCCL: {error}"))?
            };
        }
        Ok(Self {
            comm_init_all: function!(c"ncclCommInitAll"),
            get_unique_id: function!(c"ncclGetUniqueId"),
            comm_init_rank: function!(c"ncclCommInitRank"),
            comm_destroy: function!(c"ncclCommDestroy"),
            group_start: function!(c"ncclGroupStart"),
            group_end: function!(c"ncclGroupEnd"),
            all_reduce: function!(c"ncclAllReduce"),
            send: function!(c"ncclSend"),
            recv: function!(c"ncclRecv"),
            error_string: function!(c"ncclGetErrorString"),
            _library: library,
        })
    }

    fn check(&self, code: Code) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL answers a text of its own for every code.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(GpuError::Failed(format!("NCCL: {} (NCCL_DEBUG=WARN says more)", text.to_string_lossy())))
    }
}

/// Sums are asked for one after the other: two groups that share GPUs and are asked by two threads would otherwise wait
/// for one another, if one is first on one GPU and second on the other.
static TURN: Mutex<()> = Mutex::new(());

/// A communicator for each GPU of a group that this process has.
pub(super) struct Communicators {
    nccl: &'static Nccl,
    members: Vec<(Arc<Cuda>, Handle)>,
}

// SAFETY: NCCL may be asked from any thread; it is by one at a time.
unsafe impl Send for Communicators {}
// SAFETY: as above.
unsafe impl Sync for Communicators {}

impl Communicators {
    pub(super) fn new(gpus: Vec<Arc<Cuda>>) -> Result<Self> {
        let nccl = nccl()?;
        let numbers: Vec<c_int> = gpus.iter().map(|gpu| gpu.number() as c_int).collect();
        let mut handles = vec![std::ptr::null_mut(); gpus.len()];
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: there are as many places as numbers.
        nccl.check(unsafe { (nccl.comm_init_all)(handles.as_mut_ptr(), numbers.len() as c_int, numbers.as_ptr()) })?;
        Ok(Self { nccl, members: gpus.into_iter().zip(handles).collect() })
    }
}

/// Whether it is there.
pub(super) fn check() -> Result<()> {
    nccl().map(|_| ())
}

/// By which processes meet.
pub(super) fn meeting_id() -> Result<MeetingId> {
    let (nccl, mut id) = (nccl()?, UniqueId([0; _]));
    // SAFETY: there is a place for it.
    nccl.check(unsafe { (nccl.get_unique_id)(&raw mut id) })?;
    Ok(id.0)
}

/// That of this process's GPU with those of others.
pub(super) struct Communicator(Communicators);

impl Communicator {
    /// Of a GPU whose context is current; waits for the others.
    pub(super) fn new(gpu: Arc<Cuda>, id: &MeetingId, rank: usize, count: usize) -> Result<Self> {
        let (nccl, mut handle) = (nccl()?, std::ptr::null_mut());
        // SAFETY: there is a place for it, and its GPU's context is current.
        let code = unsafe { (nccl.comm_init_rank)(&raw mut handle, count as c_int, UniqueId(*id), rank as c_int) };
        nccl.check(code)?;
        Ok(Self(Communicators { nccl, members: vec![(gpu, handle)] }))
    }
}

impl Exchange for Communicator {
    unsafe fn exchange(&self, send: &[(u64, usize)], receive: &[(u64, usize)]) -> Result<()> {
        let Communicators { nccl, members } = &self.0;
        let (gpu, handle) = &members[0];
        let stream = gpu.running_stream()?;
        let at = |address: u64| std::ptr::without_provenance_mut::<c_void>(address as usize);
        // SAFETY: nothing is asked for between the two but copies of numbers that are there, on the GPU's own stream.
        unsafe {
            nccl.check((nccl.group_start)())?;
            let mut peers = send.iter().zip(receive).enumerate();
            let asked = peers.try_for_each(|(peer, ((from, sent), (to, received)))| {
                let peer = peer as c_int;
                if *sent > 0 {
                    nccl.check((nccl.send)(at(*from), *sent, FLOAT32, peer, *handle, stream))?;
                }
                if *received > 0 {
                    nccl.check((nccl.recv)(at(*to), *received, FLOAT32, peer, *handle, stream))?;
                }
                Ok(())
            });
            let ended = nccl.check((nccl.group_end)());
            asked.and(ended)
        }
    }
}

impl Collective for Communicators {
    fn len(&self) -> usize {
        self.members.len()
    }

    unsafe fn all_reduce(&self, addresses: &[u64], len: usize) -> Result<()> {
        let nccl = self.nccl;
        let streams = self.members.iter().map(|(gpu, _)| gpu.running_stream()).collect::<Result<Vec<_>>>()?;
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing is asked for between the two but sums in place, each of a communicator on its own GPU's stream;
        // so many numbers are there.
        unsafe {
            nccl.check((nccl.group_start)())?;
            let asked =
                self.members.iter().zip(addresses).zip(streams).try_for_each(|(((_, handle), address), stream)| {
                    let at = std::ptr::without_provenance_mut(*address as usize);
                    nccl.check((nccl.all_reduce)(at, at, len, FLOAT32, SUM, *handle, stream))
                });
            let ended = nccl.check((nccl.group_end)());
            asked.and(ended)
        }
    }
}

impl Drop for Communicators {
    fn drop(&mut self) {
        // A lost GPU's will never end.
        if self.members.iter().any(|(gpu, _)| gpu.synchronize().is_err()) {
            return;
        }
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, handle) in &self.members {
            // SAFETY: nothing that it was asked for is still to be done.
            let _ = unsafe { (self.nccl.comm_destroy)(*handle) };
        }
    }
}
