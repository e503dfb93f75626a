//! Names, versions, labels and states, as data: nothing here waits, loads or computes.
//!
//! A version goes START, LOADING, WARMING, AVAILABLE, DRAINING, ENDED, or to FAILED before it is available. Only an
//! available one has a handle, so that nothing else can be handed out.

use std::collections::BTreeMap;

use plumb_proto::v1;
use v1::{ModelKind, ModelState};

use crate::config::Defaults;
use crate::error::{Error, Result};
use crate::telemetry::events::kind_name;

/// Most versions that may be in memory, or on the way there. The rest of the memory belongs to the caches.
const MAX_LIVE_VERSIONS: usize = 16;
/// Ended and failed versions that are still listed.
const MAX_PAST_VERSIONS: usize = 32;
/// Most labels of a model.
const MAX_LABELS: usize = 16;
/// The label that an empty choice means where it is set.
const STABLE: &str = "stable";

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

/// What is known of a version once its weights are read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub(crate) weights_digest: String,
    pub(crate) details: v1::ModelDetails,
}

#[derive(Debug)]
enum State<H> {
    Start,
    Loading,
    Warming,
    Available(H),
    Draining,
    /// With the place in the order of endings.
    Ended(u64),
    Failed(u64, String),
}

#[derive(Debug)]
struct Version<H> {
    state: State<H>,
    facts: Option<Facts>,
}

impl<H> Version<H> {
    fn handle(&self) -> Option<&H> {
        if let State::Available(handle) = &self.state { Some(handle) } else { None }
    }

    fn kind(&self) -> ModelKind {
        self.facts.as_ref().map_or(ModelKind::Unspecified, |facts| facts.details.kind())
    }

    /// On its way to be available.
    fn is_coming(&self) -> bool {
        matches!(self.state, State::Start | State::Loading | State::Warming)
    }

    fn past(&self) -> Option<u64> {
        if let State::Ended(order) | State::Failed(order, _) = self.state { Some(order) } else { None }
    }

    fn state(&self) -> ModelState {
        match self.state {
            State::Start => ModelState::Start,
            State::Loading => ModelState::Loading,
            State::Warming => ModelState::Warming,
            State::Available(_) => ModelState::Available,
            State::Draining => ModelState::Draining,
            State::Ended(_) => ModelState::Ended,
            State::Failed(..) => ModelState::Failed,
        }
    }
}

#[derive(Debug)]
struct Model<H> {
    name: String,
    versions: BTreeMap<u64, Version<H>>,
    labels: BTreeMap<String, u64>,
}

impl<H> Model<H> {
    /// The version that an empty choice means: the one labelled `stable`, else the newest available.
    fn active(&self) -> Option<u64> {
        let newest = || self.versions.iter().rev().find(|(_, version)| version.handle().is_some()).map(|(&n, _)| n);
        self.labels.get(STABLE).copied().or_else(newest)
    }

    fn active_kind(&self) -> Option<ModelKind> {
        self.versions.get(&self.active()?).map(Version::kind)
    }

    fn no_version(&self, number: u64) -> Error {
        let known: Vec<_> = self.versions.keys().map(u64::to_string).collect();
        Error::not_found(format!("model `{}` has no version {number}; there is {}", self.name, known.join(", ")))
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
    endings: u64,
}

impl<H: Clone> Catalog<H> {
    pub(crate) fn new(defaults: Defaults) -> Self {
        Self { models: Vec::new(), defaults, started: false, endings: 0 }
    }

    /// From now on, "no such kind of model" is not "not yet".
    pub(crate) fn finish_start(&mut self) {
        self.started = true;
    }

    /// A new version in START. Without a number it gets the one after the newest. A past version may come again.
    pub(crate) fn add(&mut self, name: &str, version: Option<u64>) -> Result<u64> {
        let live = self.models.iter().flat_map(|model| model.versions.values()).filter(|v| v.past().is_none()).count();
        if live >= MAX_LIVE_VERSIONS {
            return Err(Error::failed_precondition(format!("{live} versions are in memory; unload one first")));
        }
        let index = self.models.iter().position(|model| model.name == name).unwrap_or_else(|| {
            self.models.push(Model { name: name.to_owned(), versions: BTreeMap::new(), labels: BTreeMap::new() });
            self.models.len() - 1
        });
        let versions = &mut self.models[index].versions;
        let newest = versions.keys().next_back().copied().unwrap_or(0);
        let number = version.unwrap_or(newest.saturating_add(1));
        if versions.get(&number).is_some_and(|version| version.past().is_none()) {
            return Err(Error::AlreadyExists { message: format!("version {number} of `{name}` is there already") });
        }
        versions.insert(number, Version { state: State::Start, facts: None });
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
        if let Some(version) = self.version_mut(name, number) {
            version.state = State::Available(handle);
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
        if let Some((label, _)) = model.labels.iter().find(|(_, labelled)| **labelled == number) {
            let message = format!("label `{label}` points at version {number} of `{name}`; move it first");
            return Err(Error::failed_precondition(message));
        }
        let version = model.versions.get(&number).ok_or_else(|| model.no_version(number))?;
        if version.is_coming() {
            return Err(Error::failed_precondition(format!("version {number} of `{name}` is still being loaded")));
        }
        let handle = version.handle().cloned();
        if handle.is_some()
            && let Some(version) = self.version_mut(name, number)
        {
            version.state = State::Draining;
        }
        Ok(handle)
    }

    pub(crate) fn ended(&mut self, name: &str, number: u64) {
        self.endings += 1;
        let order = self.endings;
        if let Some(version) = self.version_mut(name, number) {
            version.state = State::Ended(order);
        }
        self.forget_the_oldest();
    }

    /// Points a label at an available version, or removes it.
    pub(crate) fn set_label(&mut self, name: &str, label: &str, number: Option<u64>) -> Result<()> {
        let model = self.find(name)?;
        match number {
            None if !model.labels.contains_key(label) => {
                return Err(Error::not_found(format!("model `{name}` has no label `{label}`")));
            }
            None => {}
            Some(number) => {
                let version = model.versions.get(&number).ok_or_else(|| model.no_version(number))?;
                if version.handle().is_none() {
                    let state = version.state().as_str_name();
                    let message = format!("version {number} of `{name}` is in {state}; a label needs an available one");
                    return Err(Error::failed_precondition(message));
                }
                if model.labels.len() >= MAX_LABELS && !model.labels.contains_key(label) {
                    let message = format!("model `{name}` has {MAX_LABELS} labels already; remove one first");
                    return Err(Error::failed_precondition(message));
                }
            }
        }
        for model in self.models.iter_mut().filter(|model| model.name == name) {
            match number {
                Some(number) => model.labels.insert(label.to_owned(), number),
                None => model.labels.remove(label),
            };
        }
        Ok(())
    }

    /// The available version that a caller means.
    pub(crate) fn resolve(&self, spec: &v1::ModelSpec, need: Need) -> Result<H> {
        let model = self.named(spec, need)?;
        let coming = |what: String| Error::Starting { message: format!("{what} is still being loaded") };
        let number = match &spec.choice {
            Some(v1::model_spec::Choice::Version(number)) => *number,
            Some(v1::model_spec::Choice::Label(label)) => model.labelled(label)?,
            None => match model.active() {
                Some(number) => number,
                None if model.versions.values().any(Version::is_coming) => {
                    return Err(coming(format!("model `{}`", model.name)));
                }
                None => return Err(Error::not_found(format!("no version of `{}` is available", model.name))),
            },
        };
        let version = model.versions.get(&number).ok_or_else(|| model.no_version(number))?;
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
        let version = model.versions.get(&number).ok_or_else(|| model.no_version(number))?;
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
        self.models.iter().find(|model| model.name == name).ok_or_else(|| {
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
            error: if let State::Failed(_, reason) = &version.state { reason.clone() } else { String::new() },
            labels: model.labels.iter().filter(|(_, n)| **n == number).map(|(label, _)| label.clone()).collect(),
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

impl<H> Model<H> {
    fn labelled(&self, label: &str) -> Result<u64> {
        let number = self.labels.get(label).copied();
        number.ok_or_else(|| Error::not_found(format!("model `{}` has no label `{label}`", self.name)))
    }
}

#[cfg(test)]
mod tests;
