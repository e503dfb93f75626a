//! Failing steps, played through at random: who fails, who is served, and how many steps it takes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use plumb_model::cache::PAGE;
use proptest::prelude::*;

use super::super::cost::Cost;
use super::super::{Limits, NewSequence, Priority, Slice, Want};
use super::*;

/// Steps that compute it fail.
const POISON: u32 = u32::MAX;
/// New tokens of a stream.
const DRAWN: usize = 4;
const LIMITS: Limits = Limits {
    max_batch_tokens: 256,
    max_batch_sequences: 16,
    max_prefill_beside_decode: 64,
    decode_share: 0.5,
    prefix_cache: true,
};

#[derive(Clone, Debug)]
struct Request {
    /// One of few beginnings.
    text: u32,
    shared: usize,
    own: usize,
    /// Where the poison stands, beyond the length from the beginning again.
    poison: Option<usize>,
    generates: bool,
    /// Steps after which it comes, and after which its caller goes away.
    comes: usize,
    goes: Option<usize>,
}

impl Request {
    fn tokens(&self, number: usize) -> Vec<u32> {
        let shared = (0..self.shared as u32).map(|i| self.text * 1000 + i);
        let mut tokens: Vec<_> =
            shared.chain((0..self.own as u32).map(|i| 100_000 + number as u32 * 1000 + i)).collect();
        if let Some(at) = self.poison {
            let at = at % tokens.len();
            tokens[at] = POISON;
        }
        tokens
    }

    fn want(&self, len: usize) -> Want {
        match (self.generates, self.own % 3) {
            (true, _) => Want::Generate { max_new_tokens: DRAWN },
            (false, 0) => Want::TokenRewards,
            (false, 1) if len > 1 => Want::LogProbs(len / 2..len),
            _ => Want::Reward,
        }
    }
}

fn requests(longest: usize, most: usize) -> impl Strategy<Value = Vec<Request>> {
    let poison = prop_oneof![4 => Just(None), 1 => (0usize..1000).prop_map(Some)];
    let goes = prop_oneof![6 => Just(None), 1 => (0usize..20).prop_map(Some)];
    let request = (0u32..3, 0..longest, 1usize..40, poison, any::<bool>(), 0usize..8, goes).prop_map(
        |(text, shared, own, poison, generates, comes, goes)| Request {
            text,
            shared,
            own,
            poison,
            generates,
            comes,
            goes,
        },
    );
    prop::collection::vec(request, 1..most)
}

/// A device whose every step with the poison in it fails and leaves rubbish.
#[derive(Default)]
struct Device {
    /// What every position of a page was computed from: all tokens up to it.
    pages: BTreeMap<(u32, usize), Vec<u32>>,
    failures: usize,
    reruns: usize,
}

impl Device {
    /// Runs a step. False if it fails.
    fn run(&mut self, scheduler: &Scheduler, plan: &Plan) -> bool {
        let fails = plan.slices.iter().any(|slice| slice_tokens(scheduler, slice).contains(&POISON));
        self.reruns += usize::from(plan.rerun);
        self.failures += usize::from(fails);
        for Slice { id, positions } in &plan.slices {
            let entry = scheduler.entry(*id).unwrap();
            for position in positions.clone() {
                let content = if fails { vec![POISON] } else { entry.tokens()[..=position].to_vec() };
                self.pages.insert((entry.pages()[position / PAGE], position % PAGE), content);
            }
        }
        for Slice { id, positions } in plan.slices.iter().filter(|_| !fails) {
            let entry = scheduler.entry(*id).unwrap();
            for position in 0..positions.end {
                let found = &self.pages[&(entry.pages()[position / PAGE], position % PAGE)];
                assert_eq!(
                    found,
                    &entry.tokens()[..=position],
                    "sequence {id} reads what is not its own at {position}"
                );
            }
        }
        !fails
    }
}

fn slice_tokens<'a>(scheduler: &'a Scheduler, slice: &Slice) -> &'a [u32] {
    &scheduler.entry(slice.id).unwrap().tokens()[slice.positions.clone()]
}

/// What became of the requests.
#[derive(Default)]
struct Ends {
    failed: BTreeSet<usize>,
    served: BTreeSet<usize>,
    gone: BTreeSet<usize>,
}

/// Serves all requests to their end.
fn serve(requests: &[Request], limits: Limits, pages: usize) -> (Ends, Device) {
    let mut scheduler = Scheduler::new(limits);
    scheduler.add_model(1, pages, Cost { keys_per_unit: usize::MAX, window: Some(1) });
    let (mut device, mut ends) = (Device::default(), Ends::default());
    // Sequences by id: the request, and tokens that were drawn.
    let mut live: BTreeMap<SequenceId, (usize, usize)> = BTreeMap::new();
    let mut suspected = BTreeSet::new();
    let now = Instant::now();
    for step in 0.. {
        assert!(step < 5000, "never ends");
        for (number, request) in requests.iter().enumerate().filter(|(_, request)| request.comes == step) {
            let tokens = request.tokens(number);
            let new = NewSequence {
                model: 1,
                want: request.want(tokens.len()),
                tokens,
                priority: [Priority::Low, Priority::Normal, Priority::High][number % 3],
                deadline: None,
                arrived: now,
                pinned_prefix: 0,
                // Some share a client.
                client: number as u64 / 2,
                work: request.tokens(number).len(),
            };
            live.insert(scheduler.add(new).unwrap(), (number, 0));
        }
        let gone: Vec<_> =
            live.iter().filter(|(_, (n, _))| requests[*n].goes == Some(step)).map(|(id, _)| *id).collect();
        for id in gone {
            scheduler.remove(id);
            ends.gone.insert(live.remove(&id).unwrap().0);
        }
        let Some(plan) = scheduler.plan(now) else {
            assert!(live.is_empty(), "a standstill with {live:?}");
            if requests.iter().all(|request| request.comes < step) {
                return (ends, device);
            }
            continue;
        };
        let ids = || plan.slices.iter().map(|slice| slice.id);
        assert!(!plan.rerun || ids().all(|id| suspected.contains(&id)), "a newcomer is drawn in");
        if !device.run(&scheduler, &plan) {
            suspected.extend(ids());
            if let Some(guilty) = scheduler.failed(&plan) {
                scheduler.remove(guilty);
                ends.failed.insert(live.remove(&guilty).unwrap().0);
            }
            continue;
        }
        for slice in &plan.slices {
            let entry = scheduler.entry(slice.id).unwrap();
            let (len, generates) = (entry.tokens().len(), matches!(entry.want(), Want::Generate { .. }));
            let values = rows(entry.want(), &slice.positions);
            let mut done = scheduler.complete(slice, vec![0.0; values]);
            if generates && slice.positions.end == len {
                let (_, drawn) = live.get_mut(&slice.id).unwrap();
                *drawn += 1;
                done = *drawn == DRAWN;
                scheduler.push_token(slice.id, 50_000 + *drawn as u32);
            }
            if done {
                let entry = scheduler.remove(slice.id).unwrap();
                let (tokens, want) = (entry.tokens().len(), entry.want().clone());
                if !generates {
                    assert_eq!(
                        entry.into_values().len(),
                        rows(&want, &(0..tokens)),
                        "a value is missing or there twice"
                    );
                }
                ends.served.insert(live.remove(&slice.id).unwrap().0);
            }
        }
        scheduler.ran(&plan, std::time::Duration::from_millis(plan.tokens() as u64));
    }
    unreachable!("the loop has no other end")
}

/// Values that a slice is asked for.
fn rows(want: &Want, positions: &Range<usize>) -> usize {
    match want {
        Want::TokenRewards => positions.len(),
        Want::LogProbs(range) => super::super::log_prob_rows(range, positions).len(),
        _ => 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn exactly_those_at_fault_fail(requests in requests(600, 24), tight in any::<bool>(), prefix_cache in any::<bool>()) {
        let pages = if tight { 660usize.div_ceil(PAGE) * 3 / 2 } else { 1000 };
        let (ends, _) = serve(&requests, Limits { prefix_cache, ..LIMITS }, pages);
        for (number, request) in requests.iter().enumerate() {
            // Whoever goes away may have been served or found at fault before.
            let expected = if request.poison.is_some() { &ends.failed } else { &ends.served };
            prop_assert!(expected.contains(&number) || ends.gone.contains(&number), "{number}: {request:?}");
        }
        prop_assert_eq!(ends.failed.len() + ends.served.len() + ends.gone.len(), requests.len());
    }

    #[test]
    fn few_steps_run_again(poisoned in prop::collection::btree_set(0usize..64, 0..4), n in 1usize..65) {
        let request = |i: usize| Request {
            text: 0, shared: 0, own: 4, poison: poisoned.contains(&i).then_some(2), generates: false, comes: 0, goes: None,
        };
        let requests: Vec<_> = (0..n).map(request).collect();
        let (ends, device) = serve(&requests, Limits { max_batch_sequences: 64, ..LIMITS }, 1000);
        let log = n.next_power_of_two().ilog2() as usize;
        prop_assert!(device.reruns <= 2 * ends.failed.len() * log, "{} steps for {} of {n}", device.reruns, ends.failed.len());
        prop_assert!(device.failures <= ends.failed.len() * (log + 1));
    }
}
