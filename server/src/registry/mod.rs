//! The models that are served: which versions there are, and how they come and go.
//!
//! [`catalog`] is the state, and pure; this file puts a lock around it, tells everybody who watches what has changed,
//! and holds what a caller gets; [`load`] brings versions in, [`warm`] before anybody sees them, and sees them out;
//! [`watch`] does both as a folder and a [`policy`] say; [`bundled`] is what comes with the program.

pub(crate) mod bundled;
mod catalog;
mod load;
mod local;
mod memory;
mod policy;
mod served;
mod warm;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use plumb_model::decoder::StepSize;
use plumb_model::loaded::LoadOptions;
use plumb_proto::v1;
use tokio::sync::{Semaphore, broadcast, watch as watching};

use self::catalog::Catalog;
pub(crate) use self::catalog::{MAX_LABELS, Need, Share, check_shares};
use self::policy::Standing;
pub(crate) use self::served::Served;
use self::warm::Usage;
pub(crate) use self::watch::Root;
use crate::config::{Defaults, Versions};
use crate::device::Places;
use crate::error::Result;
use crate::telemetry::events::{
    ActiveVersionChanged, LabelChanged, ModelStateChanged, RolledBack, TrafficChanged, VersionForgotten,
};

/// Changes that a watcher may be behind before its stream ends with an error: hundreds of loads.
const MAX_CHANGES_BEHIND: usize = 1024;

/// What the available models are good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds {
    pub(crate) language: bool,
    pub(crate) preference: bool,
}

/// All models of a server.
pub(crate) struct Registry {
    catalog: Mutex<Catalog<Arc<Served>>>,
    changes: broadcast::Sender<v1::ModelStatus>,
    kinds: watching::Sender<Kinds>,
    places: Places,
    /// But for the device.
    options: LoadOptions,
    /// What a model has to have memory for beside itself.
    largest_step: StepSize,
    /// Models whose caches are to leave room for one another's on their devices, each in two versions, as while one
    /// replaces the other; `None` if the size of caches is given.
    planned: Option<Vec<String>>,
    /// For so long a new version may be taken back.
    rollback_window: Duration,
    /// Usage of inputs, by model: a new version is warmed with those of the ones before.
    usage: Mutex<HashMap<String, Arc<Usage>>>,
    /// One load at a time: it has the disk and the memory for its copies to itself.
    loads: Semaphore,
}

impl Registry {
    pub(crate) fn new(
        places: Places,
        options: LoadOptions,
        largest_step: StepSize,
        planned: Option<Vec<String>>,
        defaults: Defaults,
        versions: &Versions,
    ) -> Arc<Self> {
        Arc::new(Self {
            catalog: Mutex::new(Catalog::new(defaults, versions.labels.clone(), versions.traffic.clone())),
            changes: broadcast::Sender::new(MAX_CHANGES_BEHIND),
            kinds: watching::Sender::default(),
            places,
            options,
            largest_step,
            planned,
            rollback_window: versions.rollback_window,
            usage: Mutex::default(),
            loads: Semaphore::new(1),
        })
    }

    /// The model that a caller means; no message at all means the default too. `hash` is of the request: where calls are
    /// split between versions, equal hashes get equal versions.
    pub(crate) fn resolve(
        &self,
        spec: Option<&v1::ModelSpec>,
        need: Need,
        hash: impl FnOnce() -> u64,
    ) -> Result<Arc<Served>> {
        let default = v1::ModelSpec::default();
        self.read(|catalog| catalog.resolve(spec.unwrap_or(&default), need, hash))
    }

    /// A version, in whatever state.
    pub(crate) fn status(&self, spec: Option<&v1::ModelSpec>) -> Result<v1::ModelStatus> {
        let default = v1::ModelSpec::default();
        self.read(|catalog| catalog.status(spec.unwrap_or(&default)))
    }

    /// All versions, by name, then version.
    pub(crate) fn statuses(&self) -> Vec<v1::ModelStatus> {
        self.read(Catalog::statuses)
    }

    /// All versions as they are now, and every change from then on.
    pub(crate) fn watch(&self) -> (Vec<v1::ModelStatus>, broadcast::Receiver<v1::ModelStatus>) {
        // Under the lock, under which changes are sent too: nothing falls between the two.
        self.read(|catalog| (catalog.statuses(), self.changes.subscribe()))
    }

    /// What the available models are good for, now and whenever that changes.
    pub(crate) fn kinds(&self) -> watching::Receiver<Kinds> {
        self.kinds.subscribe()
    }

    /// All models of the command line are available.
    pub(crate) fn finish_start(&self) {
        self.change(Catalog::finish_start);
    }

    /// Points a label at an available version, or removes it.
    pub(crate) fn set_label(&self, name: &str, label: &str, version: Option<u64>) -> Result<()> {
        self.change(|catalog| {
            let set = catalog.set_label(name, label, version);
            set.inspect(|()| LabelChanged { model: name, label, version }.emit())
        })
    }

    /// Splits the calls of a model that name neither version nor label.
    pub(crate) fn set_traffic(&self, name: &str, shares: Vec<Share>) -> Result<()> {
        let split = shares.clone();
        self.change(|catalog| {
            let set = catalog.set_traffic(name, shares);
            set.inspect(|()| {
                let shares = split.iter().map(|share| (share.label.as_str(), share.weight)).collect();
                TrafficChanged { model: name, shares }.emit();
            })
        })
    }

    /// Takes a version out of service because it is bad, if there is another one to take its place.
    fn roll_back(self: &Arc<Self>, name: &str, version: u64, reason: &str) {
        let Some((served, to)) = self.change(|catalog| catalog.roll_back(name, version, reason.to_owned())) else {
            return;
        };
        RolledBack { model: name, from: version, to, reason }.emit();
        drop(self.see_out(served));
    }

    /// Takes the bad versions of a model out of service that had no other to take their place.
    fn take_back(self: &Arc<Self>, name: &str) {
        for (version, reason) in self.read(|catalog| catalog.bad(name)) {
            self.roll_back(name, version, &reason);
        }
    }

    /// Where the versions of a model stand.
    fn standing(&self, name: &str) -> BTreeMap<u64, Standing> {
        self.read(|catalog| catalog.standing(name, |served| served.since()))
    }

    /// Usage of a model's inputs.
    fn usage(&self, name: &str) -> Arc<Usage> {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(usage.entry(name.to_owned()).or_default())
    }

    fn read<T>(&self, read: impl FnOnce(&Catalog<Arc<Served>>) -> T) -> T {
        read(&self.catalog.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the catalog and tells everybody what is different: whoever changes something cannot forget to.
    fn change<T>(&self, change: impl FnOnce(&mut Catalog<Arc<Served>>) -> T) -> T {
        let mut catalog = self.catalog.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, active_before) = (catalog.statuses(), catalog.active_versions());
        let result = change(&mut catalog);
        let after = catalog.statuses();
        let key = |status: &v1::ModelStatus| status.model.as_ref().map(|model| (model.name.clone(), model.version));
        for old in before.iter().filter(|old| after.iter().all(|status| key(status) != key(old))) {
            VersionForgotten { status: old }.emit();
        }
        for status in after {
            let old = before.iter().find(|old| key(old) == key(&status));
            if old == Some(&status) {
                continue;
            }
            if old.is_none_or(|old| old.state != status.state) {
                ModelStateChanged { status: &status }.emit();
            }
            // Fails if nobody watches.
            let _ = self.changes.send(status);
        }
        let active_after = catalog.active_versions();
        let names: std::collections::BTreeSet<_> = active_before.keys().chain(active_after.keys()).collect();
        for model in names {
            let (from, to) = (active_before.get(model).copied(), active_after.get(model).copied());
            if from != to {
                ActiveVersionChanged { model, from, to }.emit();
            }
        }
        self.kinds.send_replace(Kinds {
            language: catalog.has(v1::ModelKind::Language),
            preference: catalog.has(v1::ModelKind::Preference),
        });
        result
    }
}
