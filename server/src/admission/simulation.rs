//! The gate, the real scheduler, a server that computes so many tokens a second, and clients of several kinds, without
//! any clock: what callers get in sum.

use std::collections::{BinaryHeap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::policy::Policy;
use super::{AdmissionLimits, Ask, SPREAD, Work};
use crate::engine::Priority;
use crate::engine::scheduler::cost::Cost;
use crate::engine::scheduler::{Limits, NewSequence, Plan, Scheduler, SequenceId, Want};

const BATCH: usize = 4096;

/// How a client behaves.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Sends so many calls a second, at random, whatever comes of them.
    Deaf(f64),
    /// Has so many calls at a time; one that is refused comes again when it was told to.
    Patient(usize),
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    manner: Manner,
    tokens: usize,
    /// Sequences that the tokens are of.
    items: usize,
    priority: Priority,
    /// Seconds.
    timeout: Option<f64>,
}

const PATIENT: Kind =
    Kind { manner: Manner::Patient(1), tokens: 300, items: 1, priority: Priority::Normal, timeout: None };

/// What a client got, after the start.
#[derive(Clone, Debug, Default)]
struct Got {
    tokens: usize,
    calls: usize,
    refused: usize,
    late: usize,
    /// Calls by how often they were refused before.
    tries: HashMap<usize, usize>,
    /// Seconds from being let in to the answer.
    waits: Vec<f64>,
}

enum Event {
    Call { client: usize, refusals: usize },
    StepEnds,
}

/// Orders events by time.
struct At(u64, u64, Event);

impl PartialEq for At {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for At {}
impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.0, other.1).cmp(&(self.0, self.1))
    }
}

/// A call that was let in.
struct Running {
    client: usize,
    key: Arc<str>,
    refusals: usize,
    since: f64,
    until: f64,
}

struct World {
    kinds: Vec<Kind>,
    got: Vec<Got>,
    /// Tokens a second, from when on.
    speed: fn(f64) -> f64,
    /// Seconds that are not counted.
    warm_up: f64,
    /// From when on all clients are patient, with a call each.
    patient_from: f64,
    policy: Policy,
    scheduler: Scheduler,
    /// Sequences, with their tokens.
    running: HashMap<SequenceId, (Rc<Running>, usize)>,
    step: Option<Plan>,
    events: BinaryHeap<At>,
    sent: u64,
    epoch: Instant,
    now: f64,
    random: StdRng,
    most_waiting: usize,
    /// Part of its limit that the gate held, summed up over time.
    held: f64,
    idle: f64,
    idle_since: Option<f64>,
}

impl World {
    fn new(kinds: Vec<Kind>, speed: fn(f64) -> f64) -> Self {
        let limits = Limits {
            max_batch_tokens: BATCH,
            max_batch_sequences: 256,
            max_prefill_beside_decode: 512,
            decode_share: 0.5,
            prefix_cache: false,
        };
        let mut scheduler = Scheduler::new(limits);
        scheduler.add_model(1, 100_000, Cost { keys_per_unit: usize::MAX, window: Some(1) });
        let mut world = Self {
            got: vec![Got::default(); kinds.len()],
            kinds,
            speed,
            warm_up: 0.0,
            patient_from: f64::INFINITY,
            policy: Policy::new(AdmissionLimits { max_queue_tokens: None, max_batch_tokens: BATCH }),
            scheduler,
            running: HashMap::new(),
            step: None,
            events: BinaryHeap::new(),
            sent: 0,
            epoch: Instant::now(),
            now: 0.0,
            random: StdRng::seed_from_u64(7),
            most_waiting: 0,
            held: 0.0,
            idle: 0.0,
            idle_since: None,
        };
        for client in 0..world.kinds.len() {
            match world.kinds[client].manner {
                Manner::Deaf(_) => world.send_next(client),
                Manner::Patient(calls) => (0..calls).for_each(|_| world.call(0.0, client, 0)),
            }
        }
        world
    }

    /// From a time on all clients are patient, with a call each.
    fn then_patient(mut self, from: f64) -> Self {
        self.patient_from = from;
        (0..self.kinds.len()).for_each(|client| self.call(from, client, 0));
        self
    }

    fn manner(&self, client: usize) -> Manner {
        if self.now < self.patient_from { self.kinds[client].manner } else { Manner::Patient(1) }
    }

    fn at(&mut self, seconds: f64, event: Event) {
        self.sent += 1;
        self.events.push(At((seconds * 1e9) as u64, self.sent, event));
    }

    fn call(&mut self, after: f64, client: usize, refusals: usize) {
        self.at(self.now + after, Event::Call { client, refusals });
    }

    fn send_next(&mut self, client: usize) {
        if let Manner::Deaf(rate) = self.manner(client) {
            let pause = -(1.0 - self.random.random::<f64>()).ln() / rate;
            self.call(pause, client, 0);
        }
    }

    fn instant(&self) -> Instant {
        self.epoch + Duration::from_secs_f64(self.now)
    }

    fn run(mut self, warm_up: f64, seconds: f64) -> Self {
        self.warm_up = warm_up;
        while let Some(At(time, _, event)) = self.events.pop() {
            let since = std::mem::replace(&mut self.now, time as f64 / 1e9).max(warm_up);
            self.held += (self.now - since).max(0.0) * self.policy.work().prompt as f64 / self.policy.limit() as f64;
            if self.now > warm_up + seconds {
                break;
            }
            match event {
                Event::Call { client, refusals } => self.arrive(client, refusals),
                Event::StepEnds => self.end_step(),
            }
            self.begin_step();
        }
        self
    }

    fn arrive(&mut self, client: usize, refusals: usize) {
        let Kind { tokens, items, priority, timeout, .. } = self.kinds[client];
        let until = timeout.map_or(f64::INFINITY, |timeout| self.now + timeout);
        let ask = Ask {
            client: client.to_string().into(),
            priority,
            work: Work::prompt(tokens),
            certain: tokens,
            deadline: timeout.map(|timeout| self.instant() + Duration::from_secs_f64(timeout)),
        };
        match self.policy.admit(&ask, self.instant()) {
            Ok((key, _)) => {
                let call = Rc::new(Running { client, key, refusals, since: self.now, until });
                for i in 0..items {
                    let tokens = tokens * (i + 1) / items - tokens * i / items;
                    let id = self.scheduler.add(NewSequence {
                        model: 1,
                        tokens: vec![0; tokens],
                        want: Want::Reward,
                        priority,
                        deadline: None,
                        arrived: self.instant(),
                        pinned_prefix: 0,
                        client: client as u64,
                        work: tokens,
                    });
                    self.running.insert(id.unwrap(), (Rc::clone(&call), tokens));
                }
                self.most_waiting = self.most_waiting.max(self.policy.work().prompt);
            }
            Err(refusal) => {
                if self.now > self.warm_up {
                    self.got[client].refused += 1;
                }
                if let Manner::Patient(_) = self.manner(client) {
                    let pause = refusal.retry_after().unwrap().mul_f64(1.0 + SPREAD * self.random.random::<f64>());
                    // The way there and back, and what a client adds.
                    let lag = self.random.random_range(0.001..0.05);
                    self.call(pause.as_secs_f64() + lag, client, refusals + 1);
                }
            }
        }
        self.send_next(client);
    }

    fn begin_step(&mut self) {
        if self.step.is_some() {
            return;
        }
        match self.scheduler.plan(self.instant()) {
            Some(plan) => {
                if let Some(since) = self.idle_since.take() {
                    self.idle += self.now - since.max(self.warm_up).min(self.now);
                }
                let duration = 0.002 + plan.tokens() as f64 / (self.speed)(self.now);
                self.step = Some(plan);
                self.at(self.now + duration, Event::StepEnds);
            }
            None => {
                self.idle_since.get_or_insert(self.now);
            }
        }
    }

    fn end_step(&mut self) {
        let plan = self.step.take().unwrap();
        for slice in &plan.slices {
            if !self.scheduler.complete(slice, vec![0.0]) {
                continue;
            }
            self.scheduler.remove(slice.id);
            let (call, tokens) = self.running.remove(&slice.id).unwrap();
            let (client, counts) = (call.client, self.now > self.warm_up);
            let priority = self.kinds[client].priority;
            self.policy.leave(&call.key, priority, Work::prompt(tokens), true, self.instant());
            if counts {
                self.got[client].tokens += tokens;
            }
            let Ok(call) = Rc::try_unwrap(call) else { continue };
            if counts {
                let got = &mut self.got[client];
                got.late += usize::from(self.now > call.until);
                got.calls += 1;
                *got.tries.entry(call.refusals).or_default() += 1;
                got.waits.push(self.now - call.since);
            }
            if let Manner::Patient(_) = self.manner(client) {
                let lag = self.random.random_range(0.001..0.01);
                self.call(lag, client, 0);
            }
        }
    }

    /// Jain's index (Jain, Chiu and Hawe 1984) of what these clients got.
    fn fairness(&self, clients: std::ops::Range<usize>) -> f64 {
        let got: Vec<f64> = self.got[clients].iter().map(|got| got.tokens as f64).collect();
        let (sum, squares): (f64, f64) = (got.iter().sum(), got.iter().map(|x| x * x).sum());
        sum * sum / (got.len() as f64 * squares)
    }

    fn tokens(&self, clients: std::ops::Range<usize>) -> f64 {
        self.got[clients].iter().map(|got| got.tokens as f64).sum()
    }

    /// Part of the calls that were let in at the first, second or third time.
    fn soon(&self) -> f64 {
        let count = |wanted: fn(usize) -> bool| -> usize {
            let tries = self.got.iter().flat_map(|got| &got.tries);
            tries.filter(|(refusals, _)| wanted(**refusals)).map(|(_, calls)| calls).sum()
        };
        count(|refusals| refusals <= 2) as f64 / count(|_| true) as f64
    }

    /// A quantile of the time from being let in to the answer.
    fn wait(&self, clients: std::ops::Range<usize>, quantile: f64) -> f64 {
        let mut waits: Vec<f64> = self.got[clients].iter().flat_map(|got| got.waits.iter().copied()).collect();
        waits.sort_by(f64::total_cmp);
        waits[((waits.len() - 1) as f64 * quantile) as usize]
    }

    fn report(&self, seconds: f64) -> String {
        format!(
            "goodput {:.0}/s, fairness {:.3}, soon {:.3}, idle {:.3}, wait p50 {:.2} p99 {:.2}, most waiting {}, refused {}",
            self.tokens(0..self.got.len()) / seconds,
            self.fairness(0..self.got.len()),
            self.soon(),
            self.idle / seconds,
            self.wait(0..self.got.len(), 0.5),
            self.wait(0..self.got.len(), 0.99),
            self.most_waiting,
            self.got.iter().map(|got| got.refused).sum::<usize>(),
        )
    }
}

/// A server that takes a second for a full batch, and one that takes 40 ms.
/// Speed as a function of time, in tokens a second.
type Speed = fn(f64) -> f64;

const SPEEDS: [(f64, Speed); 2] = [(4000.0, |_| 4000.0), (100_000.0, |_| 100_000.0)];

/// Clients that together send ten times what the server does, each so many times as much as its neighbour.
fn deaf(speed: f64, greed: impl Fn(usize) -> f64) -> Vec<Kind> {
    let greeds: Vec<f64> = (0..200).map(greed).collect();
    let unit = 10.0 * speed / 300.0 / greeds.iter().sum::<f64>();
    greeds.into_iter().map(|greed| Kind { manner: Manner::Deaf(unit * greed), ..PATIENT }).collect()
}

fn check(name: &str, world: &World, capacity: f64, seconds: f64) {
    let report = format!("{name} at {capacity}/s: {}", world.report(seconds));
    assert!(world.tokens(0..world.got.len()) >= 0.9 * capacity * seconds, "{report}");
    assert!(world.fairness(0..world.got.len()) >= 0.95, "{report}");
    assert!(world.got.iter().all(|got| got.calls > 0), "starved: {report}");
    // The target, and the call that passes it.
    let bound = (2.0 * BATCH as f64).max(1.2 * capacity) + 3000.0;
    assert!((world.most_waiting as f64) < bound, "{report}");
}

#[test]
fn at_ten_times_the_load_the_server_does_its_work_and_everybody_gets_the_same() {
    for (speed, of_time) in SPEEDS {
        let seconds = 6e5 / speed * 2.0;
        let run = |kinds| World::new(kinds, of_time).run(seconds / 5.0, seconds);
        check("equal", &run(deaf(speed, |_| 1.0)), speed, seconds);
        check("greedy", &run(deaf(speed, |i| if i % 10 == 0 { 10.0 } else { 1.0 })), speed, seconds);
    }
}

/// What the alert PlumbQueueSaturated of `deploy/prometheus/rules.yml` goes by. At one moment the gate may hold more or
/// less: batches end, and clients that are ahead of their share get in while it is short.
#[test]
fn on_average_the_gate_is_full_only_if_there_is_more_work_than_is_done() {
    for (speed, of_time) in SPEEDS {
        let seconds = 6e5 / speed * 2.0;
        let held = |kinds| World::new(kinds, of_time).run(seconds / 5.0, seconds).held / seconds;
        for clients in [1, 8, 200] {
            for (load, is_full) in [(0.5, false), (0.9, false), (1.5, true), (3.0, true), (10.0, true)] {
                let manner = Manner::Deaf(load * speed / PATIENT.tokens as f64 / clients as f64);
                let held = held(vec![Kind { manner, ..PATIENT }; clients]);
                let expected = if is_full { 0.4..1.0 } else { 0.0..0.3 };
                assert!(expected.contains(&held), "{clients} clients, {load} of {speed}/s: {held}");
            }
        }
        for priority in [Priority::Low, Priority::Normal] {
            for clients in [1, 8] {
                let held = held(vec![Kind { manner: Manner::Patient(1000), priority, ..PATIENT }; clients]);
                assert!((0.4..1.0).contains(&held), "{clients} in bulk, {priority:?}, {speed}/s: {held}");
            }
        }
    }
}

#[test]
fn who_comes_back_when_told_gets_in() {
    for (speed, of_time) in SPEEDS {
        let seconds = 6e5 / speed * 2.0;
        let world = World::new(vec![PATIENT; 200], of_time).run(seconds / 5.0, seconds);
        check("patient", &world, speed, seconds);
        assert!(world.soon() >= 0.9, "{}", world.report(seconds));
    }
}

#[test]
fn shares_are_of_tokens_and_not_of_calls() {
    // Half of them send ten times as much in a call.
    let kind = |i: usize| Kind { tokens: if i < 20 { 100 } else { 1000 }, ..PATIENT };
    let (speed, of_time) = SPEEDS[0];
    let world = World::new((0..40).map(kind).collect(), of_time).run(60.0, 300.0);
    let report = world.report(300.0);
    assert!(world.tokens(0..40) >= 0.9 * speed * 300.0, "{report}");
    assert!(world.fairness(0..40) >= 0.9, "{report}");
}

#[test]
fn what_one_leaves_the_others_use() {
    // Two that want all there is, and ten that together want a third of it.
    let (speed, of_time) = SPEEDS[1];
    let bulk = Kind { manner: Manner::Patient(1000), ..PATIENT };
    let modest = Kind { manner: Manner::Deaf(speed / 300.0 / 30.0), ..PATIENT };
    let kinds = [vec![bulk; 2], vec![modest; 10]].concat();
    let world = World::new(kinds, of_time).run(10.0, 60.0);
    let report = world.report(60.0);
    assert!(world.tokens(0..12) >= 0.9 * speed * 60.0, "{report}");
    assert!(world.tokens(2..12) >= 0.95 * speed / 3.0 * 60.0, "{report}");
    assert!(world.fairness(0..2) >= 0.99, "{report}");
}

#[test]
fn a_client_with_little_does_not_wait_behind_one_with_much() {
    let (speed, of_time) = SPEEDS[1];
    let bulk = Kind { manner: Manner::Patient(10_000), ..PATIENT };
    let one = Kind { manner: Manner::Deaf(2.0), ..PATIENT };
    let world = World::new(vec![bulk, one], of_time).run(10.0, 60.0);
    let report = world.report(60.0);
    assert!(world.tokens(0..2) >= 0.9 * speed * 60.0, "{report}");
    assert!(world.got[1].refused * 20 <= world.got[1].calls, "{:?}", world.got[1]);
    // The step that runs, and the one that is next.
    let two_steps = 2.0 * (0.002 + BATCH as f64 / speed);
    assert!(world.wait(1..2, 1.0) < 1.5 * two_steps, "{}", world.wait(1..2, 1.0));
}

#[test]
fn the_less_urgent_neither_get_in_the_way_nor_starve() {
    let (speed, of_time) = SPEEDS[1];
    let bulk = Kind { manner: Manner::Patient(1000), priority: Priority::Low, ..PATIENT };
    let half = Kind { manner: Manner::Deaf(speed / 300.0 / 20.0), ..PATIENT };
    let all = Kind { manner: Manner::Deaf(speed / 300.0 / 5.0), ..half };
    let low = |urgent: Kind| {
        let world = World::new([vec![bulk; 2], vec![urgent; 10]].concat(), of_time).run(10.0, 60.0);
        let (low, urgent) = (world.tokens(0..2) / 60.0 / speed, world.tokens(2..12) / 60.0 / speed);
        let refused: usize = world.got[2..].iter().map(|got| got.refused).sum();
        assert!(low + urgent > 0.9, "{}", world.report(60.0));
        (low, urgent, refused)
    };
    let (rest, urgent, refused) = low(half);
    assert!((0.4..0.55).contains(&urgent) && rest > 0.4 && refused == 0, "{rest} {urgent} {refused}");
    let (rest, urgent, _) = low(all);
    assert!((0.04..0.12).contains(&rest) && urgent > 0.8, "{rest} {urgent}");
}

#[test]
fn what_is_let_in_is_done_in_time() {
    for (speed, of_time) in SPEEDS {
        // Less than a full queue takes.
        let timeout = 1.2 * (BATCH as f64 / speed).max(0.5);
        let kinds = deaf(speed, |_| 1.0).into_iter().map(|kind| Kind { timeout: Some(timeout), ..kind });
        let seconds = 6e5 / speed;
        let world = World::new(kinds.collect(), of_time).run(seconds / 5.0, seconds);
        let (late, calls) = world.got.iter().fold((0, 0), |(late, calls), got| (late + got.late, calls + got.calls));
        let report = format!("{late} of {calls} late: {}", world.report(seconds));
        assert!(late * 10 <= calls, "{report}");
        assert!(calls as f64 * 300.0 >= 0.8 * speed * seconds, "{report}");
    }
}

#[test]
fn the_limit_follows_the_pace() {
    // A model that is four times as large is loaded.
    let slower = |time: f64| if time < 20.0 { 100_000.0 } else { 25_000.0 };
    let fast = World::new(deaf(1e5, |_| 1.0), slower).run(10.0, 9.0);
    assert!((80_000..120_000).contains(&fast.policy.limit()), "{}", fast.policy.limit());
    let slow = World::new(deaf(1e5, |_| 1.0), slower).run(40.0, 20.0);
    assert!((20_000..30_000).contains(&slow.policy.limit()), "{}", slow.policy.limit());
    assert!(slow.wait(0..200, 0.99) < 2.5, "{}", slow.wait(0..200, 0.99));
}

#[test]
fn a_server_that_turns_out_slower_is_not_asked_again_and_again() {
    let slower = |time: f64| if time < 20.0 { 300_000.0 } else { 75_000.0 };
    let world = World::new(vec![Kind { tokens: 4000, ..PATIENT }; 200], slower).run(20.0, 60.0);
    let (calls, refused) =
        world.got.iter().fold((0, 0), |(calls, refused), got| (calls + got.calls, refused + got.refused));
    assert!(refused < 3 * calls, "{refused} of {calls}: {}", world.report(60.0));
    assert!(world.fairness(0..200) > 0.95, "{}", world.report(60.0));
}

#[test]
fn calls_that_are_over_are_not_waited_for() {
    let (speed, of_time) = SPEEDS[1];
    let kind = |i: usize| Kind {
        manner: Manner::Deaf(10.0 * speed / 3200.0 / 200.0 * if i.is_multiple_of(20) { 10.0 } else { 0.5 }),
        tokens: 2400 + i * 8,
        items: 16,
        timeout: Some(10.0),
        ..PATIENT
    };
    let world = World::new((0..200).map(kind).collect(), of_time).then_patient(60.0).run(60.0, 60.0);
    check("calmed", &world, speed, 60.0);
}
