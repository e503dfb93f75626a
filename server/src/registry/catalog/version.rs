//! A version of a model, and where it is in its life.

use plumb_proto::v1;
use v1::{ModelKind, ModelState};

/// What is known of a version once its weights are read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub(crate) weights_digest: String,
    pub(crate) details: v1::ModelDetails,
}

/// START, LOADING, WARMING, AVAILABLE, DRAINING, ENDED; or FAILED, from anywhere before AVAILABLE, or from DRAINING if it
/// was taken out because it turned out to be bad.
#[derive(Debug)]
pub(super) enum State<H> {
    Start,
    Loading,
    Warming,
    Available(H),
    /// With the reason, if it is a bad one.
    Draining(Option<String>),
    /// With the place in the order of endings.
    Ended(u64),
    Failed(u64, String),
}

#[derive(Debug)]
pub(super) struct Version<H> {
    pub(super) state: State<H>,
    pub(super) facts: Option<Facts>,
    /// Why an available version should be out, for which there is no other to take its place.
    pub(super) bad: Option<String>,
}

impl<H> Version<H> {
    pub(super) fn new() -> Self {
        Self { state: State::Start, facts: None, bad: None }
    }

    /// Only an available version has one, so that nothing else can be handed out.
    pub(super) fn handle(&self) -> Option<&H> {
        if let State::Available(handle) = &self.state { Some(handle) } else { None }
    }

    pub(super) fn kind(&self) -> ModelKind {
        self.facts.as_ref().map_or(ModelKind::Unspecified, |facts| facts.details.kind())
    }

    /// On its way to be available.
    pub(super) fn is_coming(&self) -> bool {
        matches!(self.state, State::Start | State::Loading | State::Warming)
    }

    /// Its place in the order of endings.
    pub(super) fn past(&self) -> Option<u64> {
        if let State::Ended(order) | State::Failed(order, _) = self.state { Some(order) } else { None }
    }

    pub(super) fn state(&self) -> ModelState {
        match self.state {
            State::Start => ModelState::Start,
            State::Loading => ModelState::Loading,
            State::Warming => ModelState::Warming,
            State::Available(_) => ModelState::Available,
            State::Draining(_) => ModelState::Draining,
            State::Ended(_) => ModelState::Ended,
            State::Failed(..) => ModelState::Failed,
        }
    }

    /// What is wrong with it; empty if nothing is.
    pub(super) fn error(&self) -> &str {
        match &self.state {
            State::Failed(_, reason) | State::Draining(Some(reason)) => reason,
            State::Available(_) => self.bad.as_deref().unwrap_or_default(),
            _ => "",
        }
    }
}
