//! What a recording uses, so that it is not asked for again when something of it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, ThreadId};

use super::driver::{Argument, Product};
use super::{GpuError, Result};

/// Arrays by their addresses, and who records.
#[derive(Debug, Default)]
pub(super) struct Allocations {
    inner: Mutex<Inner>,
    /// Told when a recording has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Recordings that use the array at an address.
    live: BTreeMap<u64, Vec<Weak<AtomicBool>>>,
    /// The thread that records, and the arrays that it has used so far.
    recording: Option<(ThreadId, BTreeSet<u64>)>,
}

/// Tells whether everything that a recording uses is still there.
#[derive(Clone, Debug)]
pub(super) struct Validity(Arc<AtomicBool>);

impl Allocations {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn allocated(&self, address: u64) {
        self.inner().live.insert(address, Vec::new());
    }

    pub(super) fn freed(&self, address: u64) {
        for recording in self.inner().live.remove(&address).unwrap_or_default() {
            if let Some(valid) = recording.upgrade() {
                valid.store(false, Ordering::Release);
            }
        }
    }

    /// This thread's kernels and products are recorded from now on. Waits while another one records.
    pub(super) fn begin(&self) -> Result<()> {
        self.refuse_recording("a recording")?;
        let others = |inner: &mut Inner| inner.recording.is_some();
        let mut inner = self.ended.wait_while(self.inner(), others).unwrap_or_else(PoisonError::into_inner);
        inner.recording = Some((thread::current().id(), BTreeSet::new()));
        Ok(())
    }

    /// Whether this thread records.
    pub(super) fn records(&self) -> bool {
        self.inner().recording.as_ref().is_some_and(|(owner, _)| *owner == thread::current().id())
    }

    /// Refuses what cannot be recorded.
    pub(super) fn refuse_recording(&self, what: &str) -> Result<()> {
        match self.records() {
            true => Err(GpuError::Failed(format!("{what} cannot be recorded"))),
            false => Ok(()),
        }
    }

    /// Notes the arrays that lie around addresses, if this thread records; answers whether it does.
    fn note(&self, addresses: impl Iterator<Item = u64>) -> bool {
        let mut inner = self.inner();
        let Inner { live, recording } = &mut *inner;
        let Some((owner, used)) = recording else { return false };
        if *owner != thread::current().id() {
            return false;
        }
        used.extend(addresses.filter_map(|address| live.range(..=address).next_back()).map(|(start, _)| *start));
        true
    }

    pub(super) fn note_launch(&self, arguments: &[Argument<'_>]) -> bool {
        self.note(arguments.iter().filter_map(|argument| match argument {
            Argument::Address(address) if *address != 0 => Some(*address),
            _ => None,
        }))
    }

    pub(super) fn note_product(&self, product: &Product) -> bool {
        let Product { w, x, y, bias, scales, .. } = *product;
        let addresses = [w, x, y, bias].into_iter().chain(scales.into_iter().flatten());
        self.note(addresses.filter(|address| *address != 0))
    }

    /// Runs a recording if everything that it uses is there, and sees to it that it stays while it is asked for.
    pub(super) fn replay(&self, valid: &Validity, run: impl FnOnce() -> Result<()>) -> Result<bool> {
        let _inner = self.inner();
        let is_valid = valid.0.load(Ordering::Acquire);
        if is_valid {
            run()?;
        }
        Ok(is_valid)
    }

    /// Ends the recording.
    pub(super) fn end(&self) -> Validity {
        let mut inner = self.inner();
        let used = inner.recording.take().map(|(_, used)| used).unwrap_or_default();
        let valid = Arc::new(AtomicBool::new(true));
        for address in used {
            match inner.live.get_mut(&address) {
                Some(recordings) => {
                    recordings.retain(|recording| recording.strong_count() > 0);
                    recordings.push(Arc::downgrade(&valid));
                }
                None => valid.store(false, Ordering::Release),
            }
        }
        self.ended.notify_one();
        Validity(valid)
    }
}
