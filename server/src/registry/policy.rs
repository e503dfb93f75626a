//! Which versions of a watched folder are served, and in which order they come and go: data in, data out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use crate::config::{SwapPolicy, VersionPolicy};
use crate::error::Error;

/// A load that failed for a reason that may pass is tried again after this time, then after twice the time, and so on.
const RETRY: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3600));
/// So often a checkpoint is read whose files are missing or not what they should be: whoever copies it, the manifest
/// first, has about an hour.
const MAX_TRIES_DAMAGED: u32 = 8;

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
        /// Its answers are no numbers: another one is wanted.
        bad: bool,
    },
    /// Draining.
    Leaving,
}

impl Standing {
    fn is_here(&self) -> bool {
        matches!(self, Self::Coming | Self::Serving { .. })
    }

    fn is_bad(&self) -> bool {
        matches!(self, Self::Serving { bad: true, .. })
    }
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
    /// It is to be taken out here, and may come again.
    Going,
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
    /// Versions that would be wanted, had not somebody else's their numbers.
    collided: BTreeSet<u64>,
}

impl Watched {
    pub(super) fn new(policy: VersionPolicy, swap: SwapPolicy, rollback_window: Duration) -> Self {
        let (known, tries) = (BTreeMap::new(), BTreeMap::new());
        Self { policy, swap, rollback_window, known, tries, collided: BTreeSet::new() }
    }

    /// What has to be done now, and when to look again if nothing else happens.
    pub(super) fn reconcile(
        &mut self,
        disk: &OnDisk,
        standing: &BTreeMap<u64, Standing>,
        now: Instant,
    ) -> (Vec<Action>, Option<Instant>) {
        self.tries.retain(|version, _| disk.contains_key(version));
        self.known.retain(|version, known| match known {
            Known::Ours => true,
            Known::Going => standing.contains_key(version),
            Known::Failed { .. } | Known::Out => disk.contains_key(version),
        });
        for (version, known) in &mut self.known {
            if *known == Known::Ours && !standing.get(version).is_some_and(Standing::is_here) {
                *known = Known::Out;
            }
        }
        let bad = |version: &u64| standing.get(version).is_some_and(Standing::is_bad);
        let mut unwanted = self.taken(standing);
        unwanted.extend(standing.keys().filter(|version| bad(version)));
        let wanted = self.wanted(disk, &unwanted, now);
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
        // They come again once they have gone: until then they do not serve.
        let leaving = wanted.iter().filter(|version| standing.get(version) == Some(&Standing::Leaving)).count();
        let extra = self.extra(&wanted, standing);
        let (actions, settled) = match self.swap {
            _ if standing.values().any(|standing| *standing == Standing::Coming) => (Vec::new(), None),
            SwapPolicy::Resource => (make_room(&missing, leaving, &extra), None),
            SwapPolicy::Availability => {
                let proved = newest(&wanted, standing).map(|since| since + self.rollback_window);
                keep_serving(&missing, leaving, &extra, proved, now)
            }
        };
        for action in &actions {
            let (come, gone) = match action {
                Action::Load { version, make_room } => (Some(version), make_room.as_slice()),
                Action::Unload(version) => (None, std::slice::from_ref(version)),
            };
            let gone = gone.iter().map(|version| (*version, if bad(version) { Known::Out } else { Known::Going }));
            self.known.extend(gone);
            self.known.extend(come.map(|version| (*version, Known::Ours)));
        }
        (actions, retry.into_iter().chain(settled).min())
    }

    /// Versions that would be wanted, but somebody else has brought in other ones with their numbers; each is told once.
    pub(super) fn collisions(&mut self, disk: &OnDisk, standing: &BTreeMap<u64, Standing>, now: Instant) -> Vec<u64> {
        let mut collided = self.taken(standing);
        let wanted = self.wanted(disk, &BTreeSet::new(), now);
        collided.retain(|version| !self.known.contains_key(version) && wanted.contains(version));
        let new = collided.difference(&self.collided).copied().collect();
        self.collided = collided;
        new
    }

    /// A load that was asked for has failed.
    pub(super) fn failed(&mut self, version: u64, stamp: Stamp, error: &Error, now: Instant) {
        let tries = match self.tries.get(&version) {
            Some((before, tries)) if *before == stamp => tries.saturating_add(1),
            _ => 1,
        };
        self.tries.insert(version, (stamp, tries));
        let pause = RETRY.0.saturating_mul(1 << (tries - 1).min(16)).min(RETRY.1);
        let may_pass = match error {
            Error::ResourceExhausted { .. }
            | Error::Unavailable { .. }
            | Error::Internal { .. }
            | Error::NoRoom { .. }
            | Error::AlreadyExists { .. } => true,
            Error::Damaged { .. } => tries < MAX_TRIES_DAMAGED,
            // A checkpoint that is refused is the same checkpoint tomorrow.
            _ => false,
        };
        self.known.insert(version, Known::Failed { stamp, again: may_pass.then(|| now + pause) });
    }

    /// A version that was to be taken out has stayed.
    pub(super) fn kept(&mut self, version: u64) {
        self.known.insert(version, Known::Ours);
    }

    /// Numbers of versions that somebody else has brought in: what serves there is not what is on disk.
    fn taken(&self, standing: &BTreeMap<u64, Standing>) -> BTreeSet<u64> {
        let ours = |version: &u64| matches!(self.known.get(version), Some(Known::Ours | Known::Going));
        standing.iter().filter(|(v, s)| s.is_here() && !ours(v)).map(|(version, _)| *version).collect()
    }

    /// Versions that should be served, the most wanted first.
    fn wanted(&self, disk: &OnDisk, unwanted: &BTreeSet<u64>, now: Instant) -> Vec<u64> {
        let may_come = |(version, stamp): &(&u64, &Stamp)| match self.known.get(version) {
            _ if unwanted.contains(version) => false,
            None | Some(Known::Ours | Known::Going) => true,
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
        let ours = |version: &u64| matches!(self.known.get(version), Some(Known::Ours | Known::Going));
        let serves = |standing: &Standing| matches!(standing, Standing::Serving { labelled: false, .. });
        let extra = standing.iter().rev().filter(|(v, s)| !wanted.contains(v) && ours(v) && serves(s));
        extra.map(|(version, _)| *version).collect()
    }
}

/// Since when the newest of them serves.
fn newest(versions: &[u64], standing: &BTreeMap<u64, Standing>) -> Option<Instant> {
    let since = versions.iter().filter_map(|version| match standing.get(version) {
        Some(Standing::Serving { since, .. }) => Some(*since),
        _ => None,
    });
    since.max()
}

/// Out with the old, then in with the new: never more than what is wanted is in memory. While something wanted is still
/// leaving, as many of the old ones stay.
fn make_room(missing: &[u64], leaving: usize, extra: &[u64]) -> Vec<Action> {
    match missing.first() {
        Some(&version) => vec![Action::Load { version, make_room: extra.to_vec() }],
        None => extra.iter().skip(leaving).copied().map(Action::Unload).collect(),
    }
}

/// In with the new, then out with the old. While something is missing or still leaving, as many of the old ones stay;
/// after that, the last one stays until the newest has proved itself.
fn keep_serving(
    missing: &[u64],
    leaving: usize,
    extra: &[u64],
    proved: Option<Instant>,
    now: Instant,
) -> (Vec<Action>, Option<Instant>) {
    let (stay, settled) = match (missing.len() + leaving, proved) {
        (0, Some(proved)) if proved > now && !extra.is_empty() => (1, Some(proved)),
        (n, _) => (n, None),
    };
    let gone = extra.iter().skip(stay).copied();
    let actions = match missing.first() {
        Some(&version) => vec![Action::Load { version, make_room: gone.collect() }],
        None => gone.map(Action::Unload).collect(),
    };
    (actions, settled)
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
                *standing = Standing::Serving { since, labelled: false, bad: false };
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
    fn where_the_only_version_is_bad_the_one_before_comes_again() {
        for swap in [SwapPolicy::Availability, SwapPolicy::Resource] {
            let mut server = Server::new(VersionPolicy::Latest(1), swap);
            assert_eq!(server.publish([1, 2]).settle(), [2]);
            let since = server.now;
            server.standing.insert(2, Standing::Serving { since, labelled: false, bad: true });
            let make_room = if swap == SwapPolicy::Resource { vec![2] } else { vec![] };
            assert_eq!(server.look(), [Action::Load { version: 1, make_room }], "{swap:?}");
            server.finish_loads();
            // The server takes it back now.
            server.standing.remove(&2);
            assert_eq!(server.settle(), [1], "{swap:?}");
            assert_eq!(server.pass(WINDOW).settle(), [1], "it stays out");
            assert_eq!(server.publish([3]).pass(WINDOW).settle().last(), Some(&3));
        }
        // There is nothing else: what it can answer it answers.
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Resource);
        assert_eq!(server.publish([2]).settle(), [2]);
        let since = server.now;
        server.standing.insert(2, Standing::Serving { since, labelled: false, bad: true });
        assert_eq!(server.look(), []);
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
        server.standing.insert(1, Standing::Serving { since: server.now, labelled: true, bad: false });
        assert_eq!(server.publish([2]).pass(WINDOW).settle(), [1, 2]);
        assert_eq!(server.pass(WINDOW).settle(), [1, 2]);
    }

    #[test]
    fn a_version_that_is_loaded_by_hand_is_left_alone() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Resource);
        server.standing.insert(7, Standing::Serving { since: server.now, labelled: false, bad: false });
        assert_eq!(server.publish([1, 2]).settle(), [2, 7]);
        assert_eq!(server.pass(WINDOW).settle(), [2, 7]);
    }

    #[test]
    fn a_version_that_leaves_does_not_serve() {
        for swap in [SwapPolicy::Availability, SwapPolicy::Resource] {
            let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
            server.publish([1]).settle();
            server.publish([2]).settle();
            server.watched.swap = swap;
            // Rolled back, or unloaded by hand, while a call still holds it.
            server.standing.insert(2, Standing::Leaving);
            for _ in 0..2 {
                assert_eq!(server.look(), [], "{swap:?}");
                server.pass(WINDOW);
            }
            server.standing.remove(&2);
            assert_eq!(server.settle(), [1], "{swap:?}: 2 stays out");
        }
    }

    #[test]
    fn what_is_published_again_while_it_leaves_comes_once_it_has_gone() {
        for swap in [SwapPolicy::Availability, SwapPolicy::Resource] {
            let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
            server.publish([1]).settle();
            server.publish([2]).settle();
            server.watched.swap = swap;
            server.disk.remove(&2);
            server.pass(WINDOW);
            assert_eq!(server.look(), [Action::Unload(2)], "{swap:?}");
            server.standing.insert(2, Standing::Leaving);
            server.publish([2]);
            assert_eq!(server.look(), [], "{swap:?}: 1 serves, and 2 is not loaded beside itself");
            server.standing.remove(&2);
            assert_eq!(server.pass(WINDOW).settle().last(), Some(&2), "{swap:?}");
            assert_eq!(server.pass(WINDOW).settle(), [2], "{swap:?}");
        }
    }

    #[test]
    fn what_could_not_go_is_taken_out_later() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Resource);
        server.publish([1]).settle();
        server.publish([2]);
        let before = server.standing.clone();
        assert_eq!(server.look(), [Action::Load { version: 2, make_room: vec![1] }]);
        // There was no room to announce it.
        server.standing = before;
        server.watched.failed(2, server.disk[&2], &Error::NoRoom { message: "full".into() }, server.now);
        server.watched.kept(1);
        assert_eq!(server.look(), []);
        assert_eq!(server.pass(RETRY.0).settle(), [2]);
    }

    #[test]
    fn a_checkpoint_that_may_still_be_on_its_way_gets_a_few_tries() {
        let mut server = Server::new(VersionPolicy::All, SwapPolicy::Availability);
        server.publish([1]);
        let mut tries = 0;
        while !server.look().is_empty() {
            tries += 1;
            server.standing.clear();
            let error = Error::Damaged { message: "`model.safetensors` is missing".into() };
            server.watched.failed(1, server.disk[&1], &error, server.now);
            server.pass(RETRY.1);
        }
        assert_eq!(tries, MAX_TRIES_DAMAGED);
    }

    #[test]
    fn a_number_that_somebody_else_has_taken_hides_no_version() {
        let mut server = Server::new(VersionPolicy::Latest(1), SwapPolicy::Availability);
        server.publish([1]).settle();
        server.standing.insert(2, Standing::Serving { since: server.now, labelled: false, bad: false });
        server.publish([2]);
        let collisions = |server: &mut Server| server.watched.collisions(&server.disk, &server.standing, server.now);
        assert_eq!(collisions(&mut server), [2]);
        assert_eq!(collisions(&mut server), [] as [u64; 0], "it is told once");
        assert_eq!(server.pass(WINDOW).settle(), [1, 2], "1 serves on");
        // Once the other one has gone, the published one comes.
        server.standing.remove(&2);
        assert_eq!(server.settle(), [1, 2]);
        assert_eq!(collisions(&mut server), [] as [u64; 0]);
        assert_eq!(server.pass(WINDOW).settle(), [2]);
    }
}
