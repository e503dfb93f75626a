//! Which versions of a watched folder are served, and in which order they come and go: data in, data out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use crate::config::{SwapPolicy, VersionPolicy};
use crate::error::Error;

/// A load that failed for a reason that may pass is tried again after this time, then after twice the time, and so on.
const RETRY: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3600));

/// Tells a manifest from another one at the same place.
pub(super) type Stamp = (SystemTime, u64);

/// Versions of a model on disk, those with a manifest.
pub(super) type OnDisk = BTreeMap<u64, Stamp>;

/// Where a version stands in the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// On its way to be available.
    Coming,
    /// Available.
    Serving {
        /// Since when.
        since: Instant,
        /// A label points at it: it stays whatever the policy says.
        labelled: bool,
    },
    /// Draining.
    Leaving,
}

/// What has to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Load a version, once these have gone and given back their memory.
    Load { version: u64, make_room: Vec<u64> },
    /// Take a version out of service.
    Unload(u64),
}

/// What is known of a version beside where it stands.
#[derive(Clone, Debug, PartialEq)]
enum Known {
    /// It was brought in here, so that it may be taken out here.
    Ours,
    /// It failed. It is tried again when its manifest is another one, or at a time if the reason may pass.
    Failed { stamp: Stamp, again: Option<Instant> },
    /// Somebody took it out, or it was rolled back: it stays out.
    Out,
}

/// The versions of one model of a watched folder.
#[derive(Debug)]
pub(super) struct Watched {
    policy: VersionPolicy,
    swap: SwapPolicy,
    /// For so long the version before stays beside a new one.
    rollback_window: Duration,
    known: BTreeMap<u64, Known>,
    /// How often a version has failed with this manifest.
    tries: BTreeMap<u64, (Stamp, u32)>,
}

impl Watched {
    pub(super) fn new(policy: VersionPolicy, swap: SwapPolicy, rollback_window: Duration) -> Self {
        Self { policy, swap, rollback_window, known: BTreeMap::new(), tries: BTreeMap::new() }
    }

    /// What has to be done now, and when to look again if nothing else happens.
    pub(super) fn reconcile(
        &mut self,
        disk: &OnDisk,
        standing: &BTreeMap<u64, Standing>,
        now: Instant,
    ) -> (Vec<Action>, Option<Instant>) {
        self.tries.retain(|version, _| disk.contains_key(version));
        self.known.retain(|version, known| disk.contains_key(version) || *known == Known::Ours);
        for (version, known) in &mut self.known {
            if *known == Known::Ours && !standing.contains_key(version) {
                *known = Known::Out;
            }
        }
        let wanted = self.wanted(disk, now);
        let retry = self.known.values().filter_map(|known| match known {
            Known::Failed { again: Some(again), .. } if *again > now => Some(*again),
            _ => None,
        });
        let retry = retry.min();
        // A folder that is empty, or not mounted, takes nothing out of service.
        if wanted.is_empty() {
            return (Vec::new(), retry);
        }
        let missing: Vec<u64> = wanted.iter().copied().filter(|version| !standing.contains_key(version)).collect();
        let extra = self.extra(&wanted, standing);
        let (actions, settled) = match self.swap {
            _ if standing.values().any(|standing| *standing == Standing::Coming) => (Vec::new(), None),
            SwapPolicy::Resource => self.make_room(&missing, &extra),
            SwapPolicy::Availability => self.keep_serving(&wanted, &missing, &extra, standing, now),
        };
        for action in &actions {
            let (come, gone) = match action {
                Action::Load { version, make_room } => (Some(version), make_room.as_slice()),
                Action::Unload(version) => (None, std::slice::from_ref(version)),
            };
            self.known.retain(|version, _| !gone.contains(version));
            self.known.extend(come.map(|version| (*version, Known::Ours)));
        }
        (actions, retry.into_iter().chain(settled).min())
    }

    /// A load that was asked for has failed.
    pub(super) fn failed(&mut self, version: u64, stamp: Stamp, error: &Error, now: Instant) {
        let tries = match self.tries.get(&version) {
            Some((before, tries)) if *before == stamp => tries.saturating_add(1),
            _ => 1,
        };
        self.tries.insert(version, (stamp, tries));
        let pause = RETRY.0.saturating_mul(1 << (tries - 1).min(16)).min(RETRY.1);
        // A checkpoint that is refused is the same checkpoint tomorrow.
        let may_pass =
            matches!(error, Error::ResourceExhausted { .. } | Error::Unavailable { .. } | Error::Internal { .. });
        self.known.insert(version, Known::Failed { stamp, again: may_pass.then(|| now + pause) });
    }

    /// A version that was to be taken out has stayed.
    pub(super) fn kept(&mut self, version: u64) {
        self.known.insert(version, Known::Ours);
    }

    /// Versions that should be served, the most wanted first.
    fn wanted(&self, disk: &OnDisk, now: Instant) -> Vec<u64> {
        let may_come = |(version, stamp): &(&u64, &Stamp)| match self.known.get(version) {
            None | Some(Known::Ours) => true,
            Some(Known::Out) => false,
            Some(Known::Failed { stamp: failed, again }) => failed != *stamp || again.is_some_and(|again| again <= now),
        };
        let versions = disk.iter().rev().filter(may_come).map(|(version, _)| *version);
        match &self.policy {
            VersionPolicy::Latest(n) => versions.take(*n).collect(),
            VersionPolicy::All => versions.collect(),
            VersionPolicy::Specific(these) => versions.filter(|version| these.contains(version)).collect(),
        }
    }

    /// Versions that serve although they need not, the newest first.
    fn extra(&self, wanted: &[u64], standing: &BTreeMap<u64, Standing>) -> Vec<u64> {
        let wanted: BTreeSet<_> = wanted.iter().collect();
        let ours = |version: &u64| self.known.get(version) == Some(&Known::Ours) && !wanted.contains(version);
        let serves = |standing: &Standing| matches!(standing, Standing::Serving { labelled: false, .. });
        standing.iter().rev().filter(|(v, s)| ours(v) && serves(s)).map(|(version, _)| *version).collect()
    }

    /// Out with the old, then in with the new: never more than what is wanted is in memory.
    fn make_room(&self, missing: &[u64], extra: &[u64]) -> (Vec<Action>, Option<Instant>) {
        match missing.first() {
            Some(&version) => (vec![Action::Load { version, make_room: extra.to_vec() }], None),
            None => (extra.iter().map(|version| Action::Unload(*version)).collect(), None),
        }
    }

    /// In with the new, then out with the old. While something is missing, as many of the old ones stay; after that, the
    /// last one stays until the newest has proved itself.
    fn keep_serving(
        &self,
        wanted: &[u64],
        missing: &[u64],
        extra: &[u64],
        standing: &BTreeMap<u64, Standing>,
        now: Instant,
    ) -> (Vec<Action>, Option<Instant>) {
        let since = wanted.iter().filter_map(|version| match standing.get(version) {
            Some(Standing::Serving { since, .. }) => Some(*since),
            _ => None,
        });
        let proved = since.max().map(|since| since + self.rollback_window);
        let (stay, settled) = match (missing.len(), proved) {
            (0, Some(proved)) if proved > now && !extra.is_empty() => (1, Some(proved)),
            (0, _) => (0, None),
            (n, _) => (n, None),
        };
        let gone = extra.iter().skip(stay).copied();
        let actions = match missing.first() {
            Some(&version) => vec![Action::Load { version, make_room: gone.collect() }],
            None => gone.map(Action::Unload).collect(),
        };
        (actions, settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(60);

    /// A server that does what it is told, one load at a time.
    struct Server {
        watched: Watched,
        disk: OnDisk,
        standing: BTreeMap<u64, Standing>,
        now: Instant,
    }

    impl Server {
        fn new(policy: VersionPolicy, swap: SwapPolicy) -> Self {
            let watched = Watched::new(policy, swap, WINDOW);
            Self { watched, disk: OnDisk::new(), standing: BTreeMap::new(), now: Instant::now() }
        }

        fn publish(&mut self, versions: impl IntoIterator<Item = u64>) -> &mut Self {
            self.disk.extend(versions.into_iter().map(|version| (version, (SystemTime::UNIX_EPOCH, version))));
            self
        }

        /// Looks once; loads stay on their way.
        fn look(&mut self) -> Vec<Action> {
            let (actions, _) = self.watched.reconcile(&self.disk, &self.standing, self.now);
            for action in &actions {
                match action {
                    Action::Load { version, make_room } => {
                        self.standing.retain(|version, _| !make_room.contains(version));
                        self.standing.insert(*version, Standing::Coming);
                    }
                    Action::Unload(version) => self.standing.retain(|other, _| other != version),
                }
            }
            actions
        }

        fn finish_loads(&mut self) {
            let since = self.now;
            for standing in self.standing.values_mut().filter(|standing| **standing == Standing::Coming) {
                *standing = Standing::Serving { since, labelled: false };
            }
        }

        /// Looks until there is nothing to do; all loads succeed.
        fn settle(&mut self) -> Vec<u64> {
            while !self.look().is_empty() {
                self.finish_loads();
            }
            self.serving()
        }

        fn serving(&self) -> Vec<u64> {
            self.standing.keys().copied().collect()
        }

        fn pass(&mut self, time: Duration) -> &mut Self {
            self.now += time;
            self
        }
    }

    #[test]
    fn each_policy_chooses_its_versions() {
        let check = |policy: VersionPolicy, expected: &[u64]| {
            let served = Server::new(policy.clone(), SwapPolicy::Availability).publish([1, 2, 5, 9]).settle();
            assert_eq!(served, expected, "{policy:?}");
        };
        check(VersionPolicy::Latest(1), &[9]);
        check(VersionPolicy::Latest(3), &[2, 5, 9]);
        check(VersionPolicy::All, &[1, 2, 5, 9]);
        check(VersionPolicy::Specific([2, 9, 77].into()), &[2, 9]);
    }

    #[test]
    fn the_old_version_serves_until_the_new_one_has_proved_itself() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
        assert_eq!(server.publish([1]).settle(), [1]);
        server.publish([2]);
        assert_eq!(server.look(), [Action::Load { version: 2, make_room: vec![] }]);
        assert_eq!(server.look(), [], "one load at a time");
        server.finish_loads();
        assert_eq!(server.settle(), [1, 2]);
        let (_, again) = server.watched.reconcile(&server.disk, &server.standing, server.now);
        assert_eq!(again, Some(server.now + WINDOW));
        assert_eq!(server.pass(WINDOW).settle(), [2]);
        // The last but one does not wait for a third.
        assert_eq!(server.publish([3]).settle(), [2, 3]);
        server.publish([4]);
        assert_eq!(server.look(), [Action::Load { version: 4, make_room: vec![2] }]);
        server.finish_loads();
        assert_eq!(server.settle(), [3, 4]);
    }

    #[test]
    fn where_memory_is_short_the_old_version_goes_first() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Resource);
        assert_eq!(server.publish([1]).settle(), [1]);
        server.publish([2]);
        assert_eq!(server.look(), [Action::Load { version: 2, make_room: vec![1] }]);
        // It does not load: the old one comes again.
        server.standing.clear();
        server.watched.failed(2, server.disk[&2], &Error::failed_precondition("no head"), server.now);
        assert_eq!(server.settle(), [1]);
    }

    #[test]
    fn what_fails_is_tried_again_only_if_that_may_help() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
        server.publish([1]).settle();
        let fail = |server: &mut Server, error: &Error| {
            assert_eq!(server.look(), [Action::Load { version: 2, make_room: vec![] }]);
            server.standing.remove(&2);
            server.watched.failed(2, server.disk[&2], error, server.now);
            assert_eq!(server.settle(), [1]);
        };
        let refused = Error::failed_precondition("no head");
        fail(server.publish([2]), &refused);
        assert_eq!(server.pass(10 * RETRY.1).settle(), [1], "the same checkpoint is not read again");
        // Another manifest is another checkpoint.
        server.disk.insert(2, (SystemTime::UNIX_EPOCH, 99));
        fail(&mut server, &Error::internal("a disk error"));
        let (_, again) = server.watched.reconcile(&server.disk, &server.standing, server.now);
        assert_eq!(again, Some(server.now + RETRY.0));
        assert_eq!(server.pass(RETRY.0).settle(), [1, 2]);
    }

    #[test]
    fn pauses_grow_between_tries() {
        let mut watched = Watched::new(VersionPolicy::All, SwapPolicy::Availability, WINDOW);
        let (now, stamp) = (Instant::now(), (SystemTime::UNIX_EPOCH, 1));
        let pause = |watched: &mut Watched| {
            watched.failed(1, stamp, &Error::internal("a disk error"), now);
            let disk = [(1, stamp)].into();
            watched.reconcile(&disk, &BTreeMap::new(), now).1.unwrap() - now
        };
        assert_eq!(
            [pause(&mut watched), pause(&mut watched), pause(&mut watched)],
            [30, 60, 120].map(Duration::from_secs)
        );
        for _ in 0..100 {
            pause(&mut watched);
        }
        assert_eq!(pause(&mut watched), RETRY.1);
    }

    #[test]
    fn what_somebody_takes_out_stays_out_and_what_vanishes_makes_room_for_the_one_before() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
        server.publish([1, 2]).settle();
        assert_eq!(server.serving(), [2]);
        // Unloaded by hand, or rolled back.
        server.standing.remove(&2);
        assert_eq!(server.settle(), [1]);
        assert_eq!(server.publish([3]).pass(WINDOW).settle(), [1, 3]);
        assert_eq!(server.pass(WINDOW).settle(), [3]);
        server.disk.remove(&3);
        assert_eq!(server.settle(), [1, 3]);
        assert_eq!(server.pass(WINDOW).settle(), [1], "2 stays out");
    }

    #[test]
    fn an_empty_folder_and_labels_keep_what_serves() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
        server.publish([1]).settle();
        let disk = std::mem::take(&mut server.disk);
        assert_eq!(server.settle(), [1]);
        server.disk = disk;
        server.standing.insert(1, Standing::Serving { since: server.now, labelled: true });
        assert_eq!(server.publish([2]).pass(WINDOW).settle(), [1, 2]);
        assert_eq!(server.pass(WINDOW).settle(), [1, 2]);
    }

    #[test]
    fn a_version_that_is_loaded_by_hand_is_left_alone() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Resource);
        server.standing.insert(7, Standing::Serving { since: server.now, labelled: false });
        assert_eq!(server.publish([1, 2]).settle(), [2, 7]);
        assert_eq!(server.pass(WINDOW).settle(), [2, 7]);
    }
}
