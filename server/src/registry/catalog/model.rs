//! A model: its versions, the labels that name them, and how calls that name nothing are split between labels.

use std::collections::BTreeMap;

use plumb_proto::v1::ModelKind;

use super::version::Version;
use crate::error::{Error, Result};

/// Most labels of a model.
pub(crate) const MAX_LABELS: usize = 16;
/// The label that an empty choice means where it is set.
const STABLE: &str = "stable";
/// Most that the weight of a label may be: shares of a ten-thousandth are fine enough.
const MAX_WEIGHT: u32 = 10_000;

/// A label's share of the calls that name neither version nor label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) label: String,
    /// In proportion to the sum of all weights.
    pub(crate) weight: u32,
}

/// Where a label points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) version: u64,
    /// Where it pointed before.
    before: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Model<H> {
    pub(super) name: String,
    pub(super) versions: BTreeMap<u64, Version<H>>,
    pub(super) labels: BTreeMap<String, Target>,
    traffic: Vec<Share>,
}

impl<H> Model<H> {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), versions: BTreeMap::new(), labels: BTreeMap::new(), traffic: Vec::new() }
    }

    /// The version that an empty choice means where calls are not split: the one labelled `stable`, else the newest
    /// available.
    pub(super) fn active(&self) -> Option<u64> {
        self.labels.get(STABLE).map(|target| target.version).or_else(|| self.newest_available(u64::MAX))
    }

    pub(super) fn active_kind(&self) -> Option<ModelKind> {
        self.versions.get(&self.active()?).map(Version::kind)
    }

    /// The version that an empty choice means for a call with this hash: equal hashes get equal versions for as long as
    /// the split stays. A label that points nowhere leaves its share to the others.
    pub(super) fn choose(&self, hash: impl FnOnce() -> u64) -> Option<u64> {
        let shares = self.shares();
        let sum: u64 = shares.iter().map(|(_, weight)| u64::from(*weight)).sum();
        if sum == 0 {
            return self.active();
        }
        let mut place = hash() % sum;
        for (version, weight) in shares {
            match place.checked_sub(u64::from(weight)) {
                Some(rest) => place = rest,
                None => return Some(version),
            }
        }
        self.active()
    }

    /// The weight of a version among calls that name nothing; 0 where they are not split.
    pub(super) fn weight(&self, version: u64) -> u32 {
        self.shares().into_iter().filter(|(other, _)| *other == version).map(|(_, weight)| weight).sum()
    }

    fn shares(&self) -> Vec<(u64, u32)> {
        let target = |share: &Share| Some((self.labels.get(&share.label)?.version, share.weight));
        self.traffic.iter().filter_map(target).collect()
    }

    pub(super) fn newest_available(&self, below: u64) -> Option<u64> {
        self.versions.range(..below).rev().find(|(_, version)| version.handle().is_some()).map(|(&number, _)| number)
    }

    pub(super) fn is_available(&self, number: u64) -> bool {
        self.versions.get(&number).is_some_and(|version| version.handle().is_some())
    }

    pub(super) fn version(&self, number: u64) -> Result<&Version<H>> {
        self.versions.get(&number).ok_or_else(|| {
            let known: Vec<_> = self.versions.keys().map(u64::to_string).collect();
            Error::not_found(format!("model `{}` has no version {number}; there is {}", self.name, known.join(", ")))
        })
    }

    pub(super) fn labelled(&self, label: &str) -> Result<u64> {
        self.labels.get(label).map(|target| target.version).ok_or_else(|| self.no_label(label))
    }

    fn no_label(&self, label: &str) -> Error {
        Error::not_found(format!("model `{}` has no label `{label}`", self.name))
    }

    /// Points a label at an available version.
    pub(super) fn set_label(&mut self, label: &str, number: u64) -> Result<()> {
        let (name, version) = (&self.name, self.version(number)?);
        if version.handle().is_none() {
            let state = version.state().as_str_name();
            let message = format!("version {number} of `{name}` is in {state}; a label needs an available one");
            return Err(Error::failed_precondition(message));
        }
        let old = self.labels.get(label).copied();
        if old.is_none() && self.labels.len() >= MAX_LABELS {
            let message = format!("model `{name}` has {MAX_LABELS} labels already; remove one first");
            return Err(Error::failed_precondition(message));
        }
        if old.is_none_or(|old| old.version != number) {
            let before = old.map(|old| old.version);
            self.labels.insert(label.to_owned(), Target { version: number, before });
        }
        Ok(())
    }

    pub(super) fn remove_label(&mut self, label: &str) -> Result<()> {
        if self.traffic.iter().any(|share| share.label == label) {
            let message =
                format!("label `{label}` of `{}` has a share of the calls; change the split first", self.name);
            return Err(Error::failed_precondition(message));
        }
        self.labels.remove(label).map(drop).ok_or_else(|| self.no_label(label))
    }

    /// Splits the calls that name nothing; no share at all ends the split.
    pub(super) fn set_traffic(&mut self, shares: Vec<Share>) -> Result<()> {
        for share in &shares {
            self.labelled(&share.label)?;
        }
        check_shares(&shares)?;
        self.traffic = shares;
        Ok(())
    }

    /// As [`Self::set_traffic`], before there are labels.
    pub(super) fn expect_traffic(&mut self, shares: Vec<Share>) {
        self.traffic = shares;
    }

    /// Where a version's callers should go once it has turned out to be bad: where `stable` pointed before it, else the
    /// newest available version before it.
    pub(super) fn refuge(&self, bad: u64) -> Option<u64> {
        let stable = self.labels.get(STABLE).filter(|target| target.version == bad).and_then(|target| target.before);
        let available = |number: &u64| *number != bad && self.is_available(*number);
        stable.filter(available).or_else(|| self.newest_available(bad))
    }

    /// Moves all labels of a version to another.
    pub(super) fn move_labels(&mut self, from: u64, to: u64) {
        for target in self.labels.values_mut().filter(|target| target.version == from) {
            *target = Target { version: to, before: None };
        }
    }
}

/// Whether the shares make sense.
pub(crate) fn check_shares(shares: &[Share]) -> Result<()> {
    for (i, share) in shares.iter().enumerate() {
        if shares[..i].iter().any(|other| other.label == share.label) {
            return Err(Error::invalid(format!("shares[{i}].label"), format!("`{}` is there twice", share.label)));
        }
        if share.weight > MAX_WEIGHT {
            let message = format!("{} is above {MAX_WEIGHT}", share.weight);
            return Err(Error::invalid(format!("shares[{i}].weight"), message));
        }
    }
    if !shares.is_empty() && shares.iter().all(|share| share.weight == 0) {
        return Err(Error::invalid("shares", "all weights are 0; leave the shares out to end the split"));
    }
    Ok(())
}
