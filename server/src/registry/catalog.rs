//! Names, versions, labels and states, as data: nothing here waits, loads or computes.
//!
//! [`version`] is the life of a version, [`model`] what a model's name can mean; this file finds models and moves
//! versions from state to state.

mod model;
mod version;

use std::collections::BTreeMap;
use std::time::Instant;

use plumb_proto::v1;
use v1::ModelKind;

use self::model::Model;
pub(crate) use self::model::{MAX_LABELS, Share, check_shares};
pub(crate) use self::version::Facts;
use self::version::{State, Version};
use super::policy::Standing;
use crate::config::{Defaults, WantedLabel};
use crate::error::{Error, Result};
use crate::telemetry::events::kind_name;

/// Most versions that may be available, or on the way there. The rest of the memory belongs to the caches. With those
/// that drain there may be twice as many: a slow reader of an old version does not keep a new one out.
const MAX_LIVE_VERSIONS: usize = 16;
/// Ended and failed versions that are still listed.
const MAX_PAST_VERSIONS: usize = 32;

/// What an rpc asks of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A language model.
    Language,
    /// A preference model.
    Preference,
    /// Either; by default a preference model.
    Any,
}

impl Need {
    /// Kinds that will do, the preferred one first.
    fn kinds(self) -> &'static [ModelKind] {
        match self {
            Self::Language => &[ModelKind::Language],
            Self::Preference => &[ModelKind::Preference],
            Self::Any => &[ModelKind::Preference, ModelKind::Language],
        }
    }
}

/// All models. `H` is what a caller gets to use one.
#[derive(Debug)]
pub(crate) struct Catalog<H> {
    /// In the order in which the names came up: the first of a kind is its default.
    models: Vec<Model<H>>,
    defaults: Defaults,
    /// Whether all models of the command line were loaded: before, the first of a kind may still be on its way.
    started: bool,
    /// Labels that are set once their version is available.
    wanted_labels: Vec<WantedLabel>,
    /// Splits of models that are not there yet.
    wanted_traffic: BTreeMap<String, Vec<Share>>,
    endings: u64,
}

impl<H: Clone> Catalog<H> {
    pub(crate) fn new(
        defaults: Defaults,
        wanted_labels: Vec<WantedLabel>,
        wanted_traffic: BTreeMap<String, Vec<Share>>,
    ) -> Self {
        Self { models: Vec::new(), defaults, started: false, wanted_labels, wanted_traffic, endings: 0 }
    }

    /// From now on, "no such kind of model" is not "not yet".
    pub(crate) fn finish_start(&mut self) {
        self.started = true;
    }

    /// A new version in START. Without a number it gets the one after the newest. A past version may come again.
    pub(crate) fn add(&mut self, name: &str, version: Option<u64>) -> Result<u64> {
        let versions = || self.models.iter().flat_map(|model| model.versions.values());
        let present = versions().filter(|version| version.past().is_none()).count();
        let draining = versions().filter(|version| matches!(version.state, State::Draining(_))).count();
        if present - draining >= MAX_LIVE_VERSIONS || present >= 2 * MAX_LIVE_VERSIONS {
            let message = format!("{present} versions are in memory, {draining} of them draining; unload one first");
            return Err(Error::NoRoom { message });
        }
        let index = self.models.iter().position(|model| model.name == name).unwrap_or_else(|| {
            let mut model = Model::new(name);
            model.expect_traffic(self.wanted_traffic.get(name).cloned().unwrap_or_default());
            self.models.push(model);
            self.models.len() - 1
        });
        let versions = &mut self.models[index].versions;
        let newest = versions.keys().next_back().copied().unwrap_or(0);
        let number = version.unwrap_or(newest.saturating_add(1));
        if versions.get(&number).is_some_and(|version| version.past().is_none()) {
            return Err(Error::AlreadyExists { message: format!("version {number} of `{name}` is there already") });
        }
        versions.insert(number, Version::new());
        Ok(number)
    }

    pub(crate) fn loading(&mut self, name: &str, number: u64) {
        if let Some(version) = self.version_mut(name, number) {
            version.state = State::Loading;
        }
    }

    pub(crate) fn warming(&mut self, name: &str, number: u64, facts: Facts) {
        if let Some(version) = self.version_mut(name, number) {
            version.facts = Some(facts);
            version.state = State::Warming;
        }
    }

    pub(crate) fn available(&mut self, name: &str, number: u64, handle: H) {
        let Ok(index) = self.index_of(name) else { return };
        let model = &mut self.models[index];
        let Some(version) = model.versions.get_mut(&number) else { return };
        version.state = State::Available(handle);
        // Once: who moves a label later means it.
        let wanted = |label: &mut WantedLabel| label.model == name && label.version == number;
        for label in self.wanted_labels.extract_if(.., wanted) {
            // It is available, and the number of labels was bounded with the configuration.
            let _ = model.set_label(&label.label, number);
        }
    }

    pub(crate) fn failed(&mut self, name: &str, number: u64, reason: String) {
        self.endings += 1;
        let order = self.endings;
        if let Some(version) = self.version_mut(name, number) {
            version.state = State::Failed(order, reason);
        }
        self.forget_the_oldest();
    }

    /// Takes an available version out of service and gives back its handle; `None` if it is out already.
    pub(crate) fn drain(&mut self, name: &str, number: u64) -> Result<Option<H>> {
        let model = self.find(name)?;
        if let Some((label, _)) = model.labels.iter().find(|(_, target)| target.version == number) {
            let message = format!("label `{label}` points at version {number} of `{name}`; move it first");
            return Err(Error::failed_precondition(message));
        }
        let version = model.version(number)?;
        if version.is_coming() {
            return Err(Error::failed_precondition(format!("version {number} of `{name}` is still being loaded")));
        }
        let handle = version.handle().cloned();
        if handle.is_some()
            && let Some(version) = self.version_mut(name, number)
        {
            version.state = State::Draining(version.bad.take());
        }
        Ok(handle)
    }

    /// Takes an available version out of service because it is bad, and sends its callers to another one. `None` if it is
    /// out already, or is the only one: it then says so call by call, until there is another. Answers its handle and the
    /// version that takes its place.
    pub(crate) fn roll_back(&mut self, name: &str, number: u64, reason: String) -> Option<(H, u64)> {
        let model = self.find_mut(name).ok()?;
        let handle = model.versions.get(&number)?.handle()?.clone();
        let refuge = model.refuge(number);
        let version = model.versions.get_mut(&number)?;
        let Some(refuge) = refuge else {
            version.bad = Some(reason);
            return None;
        };
        version.state = State::Draining(Some(reason));
        model.move_labels(number, refuge);
        Some((handle, refuge))
    }

    /// Versions of a model that are available although they are bad, with the reasons.
    pub(crate) fn bad(&self, name: &str) -> Vec<(u64, String)> {
        let Ok(model) = self.find(name) else { return Vec::new() };
        let versions = model.versions.iter().filter(|(_, version)| version.handle().is_some());
        versions.filter_map(|(number, version)| Some((*number, version.bad.clone()?))).collect()
    }

    /// The memory of a draining version is given back.
    pub(crate) fn ended(&mut self, name: &str, number: u64) {
        self.endings += 1;
        let order = self.endings;
        if let Some(version) = self.version_mut(name, number) {
            version.state = match version.error() {
                "" => State::Ended(order),
                reason => State::Failed(order, reason.to_owned()),
            };
        }
        self.forget_the_oldest();
    }

    /// Points a label at an available version, or removes it.
    pub(crate) fn set_label(&mut self, name: &str, label: &str, number: Option<u64>) -> Result<()> {
        let model = self.find_mut(name)?;
        match number {
            Some(number) => model.set_label(label, number),
            None => model.remove_label(label),
        }
    }

    /// Splits the calls of a model that name neither version nor label.
    pub(crate) fn set_traffic(&mut self, name: &str, shares: Vec<Share>) -> Result<()> {
        self.find_mut(name)?.set_traffic(shares)
    }

    /// The available version that a caller means. `hash` is asked for where calls are split.
    pub(crate) fn resolve(&self, spec: &v1::ModelSpec, need: Need, hash: impl FnOnce() -> u64) -> Result<H> {
        match self.resolve_now(spec, need, hash) {
            // It may be among those whose turn has not come: who calls a server that comes back tries again.
            Err(Error::NotFound { message }) if !self.started => {
                Err(Error::Starting { message: format!("{message}; models are still being loaded") })
            }
            resolved => resolved,
        }
    }

    fn resolve_now(&self, spec: &v1::ModelSpec, need: Need, hash: impl FnOnce() -> u64) -> Result<H> {
        let model = self.named(spec, need)?;
        let coming = |what: String| Error::Starting { message: format!("{what} is still being loaded") };
        let number = match &spec.choice {
            Some(v1::model_spec::Choice::Version(number)) => *number,
            Some(v1::model_spec::Choice::Label(label)) => model.labelled(label)?,
            None => match model.choose(hash) {
                Some(number) => number,
                None if model.versions.values().any(Version::is_coming) => {
                    return Err(coming(format!("model `{}`", model.name)));
                }
                None => return Err(Error::not_found(format!("no version of `{}` is available", model.name))),
            },
        };
        let version = model.version(number)?;
        let Some(handle) = version.handle() else {
            return Err(match version.is_coming() {
                true => coming(format!("version {number} of `{}`", model.name)),
                false => Error::not_found(format!("version {number} of `{}` is no longer available", model.name)),
            });
        };
        if !need.kinds().contains(&version.kind()) {
            let has = kind_name(version.kind());
            let needs = kind_name(need.kinds()[0]);
            let message = format!("`{}` is a {has} model; a {needs} model is needed here", model.name);
            return Err(Error::failed_precondition(message));
        }
        Ok(handle.clone())
    }

    /// A version in whatever state.
    pub(crate) fn status(&self, spec: &v1::ModelSpec) -> Result<v1::ModelStatus> {
        let model = self.named(spec, Need::Any)?;
        let number = match &spec.choice {
            Some(v1::model_spec::Choice::Version(number)) => *number,
            Some(v1::model_spec::Choice::Label(label)) => model.labelled(label)?,
            None => model.active().or(model.versions.keys().next_back().copied()).unwrap_or(0),
        };
        let version = model.version(number)?;
        Ok(self.describe(model, number, version))
    }

    /// All versions, by name, then version.
    pub(crate) fn statuses(&self) -> Vec<v1::ModelStatus> {
        let mut models: Vec<_> = self.models.iter().collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        let versions =
            models.iter().flat_map(|model| model.versions.iter().map(move |(n, version)| (model, n, version)));
        versions.map(|(model, number, version)| self.describe(model, *number, version)).collect()
    }

    /// Where the versions of a model stand, past ones left out; `since` tells when a handle became available.
    pub(crate) fn standing(&self, name: &str, since: impl Fn(&H) -> Instant) -> BTreeMap<u64, Standing> {
        let Ok(model) = self.find(name) else { return BTreeMap::new() };
        let stands = |(&number, version): (&u64, &Version<H>)| {
            let standing = match &version.state {
                State::Start | State::Loading | State::Warming => Standing::Coming,
                State::Available(handle) => {
                    let labelled = model.labels.values().any(|target| target.version == number);
                    Standing::Serving { since: since(handle), labelled, bad: version.bad.is_some() }
                }
                State::Draining(_) => Standing::Leaving,
                State::Ended(_) | State::Failed(..) => return None,
            };
            Some((number, standing))
        };
        model.versions.iter().filter_map(stands).collect()
    }

    /// For each model: the version that an empty choice means.
    pub(crate) fn active_versions(&self) -> BTreeMap<String, u64> {
        self.models.iter().filter_map(|model| Some((model.name.clone(), model.active()?))).collect()
    }

    /// Whether an available version is of this kind.
    pub(crate) fn has(&self, kind: ModelKind) -> bool {
        let mut versions = self.models.iter().flat_map(|model| model.versions.values());
        versions.any(|version| version.handle().is_some() && version.kind() == kind)
    }

    fn find(&self, name: &str) -> Result<&Model<H>> {
        self.index_of(name).map(|index| &self.models[index])
    }

    fn find_mut(&mut self, name: &str) -> Result<&mut Model<H>> {
        self.index_of(name).map(|index| &mut self.models[index])
    }

    fn index_of(&self, name: &str) -> Result<usize> {
        self.models.iter().position(|model| model.name == name).ok_or_else(|| {
            let names: Vec<_> = self.models.iter().map(|model| model.name.as_str()).collect();
            Error::not_found(format!("there is no model `{name}`; there is {}", names.join(", ")))
        })
    }

    fn version_mut(&mut self, name: &str, number: u64) -> Option<&mut Version<H>> {
        self.models.iter_mut().find(|model| model.name == name)?.versions.get_mut(&number)
    }

    fn named(&self, spec: &v1::ModelSpec, need: Need) -> Result<&Model<H>> {
        if !spec.name.is_empty() {
            return self.find(&spec.name);
        }
        for &kind in need.kinds() {
            if let Some(model) = self.default_of(kind) {
                return Ok(model);
            }
            if !self.started {
                return Err(Error::Starting { message: "models are still being loaded".to_owned() });
            }
        }
        let needed = kind_name(need.kinds()[0]);
        match self.models.iter().find_map(|model| Some((&model.name, model.active_kind()?))) {
            Some((name, kind)) => Err(Error::failed_precondition(format!(
                "this rpc needs a {needed} model, and none is served; `{name}` is a {} model",
                kind_name(kind)
            ))),
            None => Err(Error::not_found("no model is served")),
        }
    }

    fn default_of(&self, kind: ModelKind) -> Option<&Model<H>> {
        let chosen = match kind {
            ModelKind::Language => self.defaults.language.as_ref(),
            _ => self.defaults.preference.as_ref(),
        };
        match chosen {
            Some(name) => self.models.iter().find(|model| model.name == *name),
            None => self.models.iter().find(|model| model.active_kind() == Some(kind)),
        }
    }

    fn describe(&self, model: &Model<H>, number: u64, version: &Version<H>) -> v1::ModelStatus {
        let facts = version.facts.as_ref();
        let is_default = version.handle().is_some()
            && model.active() == Some(number)
            && self.default_of(version.kind()).is_some_and(|default| default.name == model.name);
        v1::ModelStatus {
            model: Some(v1::ModelIdentity {
                name: model.name.clone(),
                version: number,
                weights_digest: facts.map(|facts| facts.weights_digest.clone()).unwrap_or_default(),
            }),
            state: version.state().into(),
            error: version.error().to_owned(),
            labels: model
                .labels
                .iter()
                .filter(|(_, to)| to.version == number)
                .map(|(label, _)| label.clone())
                .collect(),
            traffic_weight: model.weight(number),
            is_default,
            details: facts.map(|facts| facts.details.clone()),
        }
    }

    /// Keeps the list of what once was from growing for ever.
    fn forget_the_oldest(&mut self) {
        let mut past: Vec<u64> =
            self.models.iter().flat_map(|model| model.versions.values().filter_map(Version::past)).collect();
        past.sort_unstable();
        let Some(excess) = past.len().checked_sub(MAX_PAST_VERSIONS) else { return };
        let forgotten = &past[..excess];
        for model in &mut self.models {
            model.versions.retain(|_, version| version.past().is_none_or(|order| !forgotten.contains(&order)));
        }
        self.models.retain(|model| !model.versions.is_empty());
    }
}

#[cfg(test)]
mod tests;
