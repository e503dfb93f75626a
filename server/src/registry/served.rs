//! What a caller gets of a model.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use plumb_model::loaded::LoadedModel;
use plumb_model::text::HhhPrompt;
use plumb_proto::v1;

use super::Registry;
use super::warm::Usage;
use crate::engine::ModelHandle;
use crate::error::{Error, Result};

/// So many answers that are no numbers, and such a part of all, take a new version back: fewer may be what a single
/// strange input does to a sound one.
const BAD: (u64, u64) = (3, 10);

/// A model that answers, under the name and version that it answers for. It stays in memory while somebody holds it.
pub(crate) struct Served {
    identity: v1::ModelIdentity,
    handle: ModelHandle,
    since: Instant,
    usage: Arc<Usage>,
    finite: AtomicU64,
    non_finite: AtomicU64,
    registry: Weak<Registry>,
}

impl Served {
    pub(super) fn new(
        identity: v1::ModelIdentity,
        handle: ModelHandle,
        usage: Arc<Usage>,
        registry: Weak<Registry>,
    ) -> Self {
        let (finite, non_finite) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { identity, handle, since: Instant::now(), usage, finite, non_finite, registry }
    }

    pub(crate) fn name(&self) -> &str {
        &self.identity.name
    }

    pub(crate) fn version(&self) -> u64 {
        self.identity.version
    }

    pub(crate) fn identity(&self) -> v1::ModelIdentity {
        self.identity.clone()
    }

    pub(crate) fn handle(&self) -> ModelHandle {
        self.handle.clone()
    }

    /// Since when it is available.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Remembers an input: the next version is warmed with its like.
    pub(crate) fn record_input(&self, tokens: usize, prompt: HhhPrompt) {
        self.usage.record(tokens, prompt);
    }

    /// Takes notice of an answer. A new version that computes no numbers is taken back.
    pub(crate) fn observe<T>(&self, answer: &Result<T>) {
        match answer {
            Ok(_) => drop(self.finite.fetch_add(1, Ordering::Relaxed)),
            Err(Error::NonFinite { .. }) => {
                let bad = self.non_finite.fetch_add(1, Ordering::Relaxed) + 1;
                let all = bad + self.finite.load(Ordering::Relaxed);
                if let Some(registry) = self.registry.upgrade()
                    && self.since.elapsed() < registry.rollback_window
                    && is_bad(bad, all)
                {
                    let reason = format!("taken back: {bad} of its first {all} answers were not finite numbers");
                    registry.roll_back(self.name(), self.version(), &reason);
                }
            }
            Err(_) => {}
        }
    }
}

fn is_bad(bad: u64, all: u64) -> bool {
    bad >= BAD.0 && bad * BAD.1 >= all
}

impl Deref for Served {
    type Target = LoadedModel;

    fn deref(&self) -> &LoadedModel {
        &self.handle
    }
}

#[cfg(test)]
mod tests {
    use super::is_bad;

    #[test]
    fn a_few_strange_inputs_do_not_make_a_version_bad() {
        let check = |bad, all, expected| assert_eq!(is_bad(bad, all), expected, "{bad} of {all}");
        check(2, 2, false);
        check(3, 3, true);
        check(3, 30, true);
        check(3, 31, false);
        check(100, 10_000, false);
    }
}
