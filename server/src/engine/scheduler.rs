//! What runs next: pure bookkeeping, no device, no clock of its own, no async.
//!
//! The scheduler holds sequences, gives them pages and cuts them into steps. A step belongs to one model and stays under
//! a token budget. Sequences that are being generated come first, with one token each, so that a long prompt never
//! holds them up for more than [`Limits::max_prefill_beside_decode`] tokens. Waiting sequences follow by priority, then
//! by arrival; one that does not fit now does not stop smaller ones behind it, until it has been passed over sixteen
//! times: then it comes before all others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::time::Instant;

use plumb_model::cache::{BlockCache, Table};

/// Names a loaded model inside the engine.
pub type ModelKey = u64;
/// Names a sequence inside the engine.
pub type SequenceId = u64;

/// How often a sequence may be passed over by smaller ones.
const MAX_PASSED_OVER: usize = 16;

/// How many waiting sequences are looked at for each that a step may hold.
const MAX_CONSIDERED: usize = 4;

/// Bounds of a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens in a step.
    pub max_batch_tokens: usize,
    /// Sequences in a step.
    pub max_batch_sequences: usize,
    /// Prompt tokens in a step that also decodes.
    pub max_prefill_beside_decode: usize,
}

/// How urgent a sequence is; the greater goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Behind everything else.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Before everything else.
    High,
}

/// What is wanted of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// The reward at the last token.
    Reward,
    /// The reward at every token.
    TokenRewards,
    /// Log-probabilities of the tokens in the range, each given everything before it; the range starts at 1 or later.
    LogProbs(Range<usize>),
    /// Logits after the last token, again and again, up to so many new tokens.
    Generate {
        /// Most new tokens.
        max_new_tokens: usize,
    },
}

/// A sequence as it is handed in.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// The model that runs it.
    pub model: ModelKey,
    /// Its token ids; at least one.
    pub tokens: Vec<u32>,
    /// What is wanted.
    pub want: Want,
    /// How urgent it is.
    pub priority: Priority,
    /// When its answer is of no use any more.
    pub deadline: Option<Instant>,
    /// When it came.
    pub arrived: Instant,
    /// Leading tokens whose state is worth keeping for as long as the model lives: the HHH prompt.
    pub pinned_prefix: usize,
}

/// A sequence in the scheduler.
#[derive(Debug)]
pub struct Entry {
    sequence: NewSequence,
    /// Pages, once it has begun.
    table: Option<Table>,
    /// Tokens whose state was there when it began.
    cached: usize,
    /// Tokens whose keys and values are computed or in the step that is running.
    done: usize,
    passed_over: usize,
    started: Option<Instant>,
    values: Vec<f32>,
}

impl Entry {
    /// Token ids, those generated so far included.
    pub fn tokens(&self) -> &[u32] {
        &self.sequence.tokens
    }

    /// Its pages; empty before it has begun.
    pub fn pages(&self) -> &[u32] {
        self.table.as_ref().map_or(&[], Table::pages)
    }

    /// Tokens that were computed before it came.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// When its first step began.
    pub fn started(&self) -> Option<Instant> {
        self.started
    }

    /// When it came.
    pub fn arrived(&self) -> Instant {
        self.sequence.arrived
    }

    /// What is wanted.
    pub fn want(&self) -> &Want {
        &self.sequence.want
    }

    /// Values so far.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    fn remaining(&self) -> usize {
        self.sequence.tokens.len() - self.done
    }

    fn decodes(&self) -> bool {
        matches!(self.sequence.want, Want::Generate { .. }) && self.table.is_some() && self.remaining() == 1
    }

    /// Leading tokens whose state may come from the cache: what is left must produce every wanted value.
    fn reusable(&self) -> usize {
        match &self.sequence.want {
            Want::Reward | Want::Generate { .. } => self.sequence.tokens.len() - 1,
            Want::TokenRewards => 0,
            Want::LogProbs(range) => range.start.saturating_sub(1),
        }
    }

    /// Tokens that it may grow to. Room for all of them is taken at the start, so that a sequence that has begun can
    /// always end.
    fn final_length(&self) -> usize {
        let new = if let Want::Generate { max_new_tokens } = self.sequence.want { max_new_tokens } else { 0 };
        self.sequence.tokens.len() + new
    }
}

/// Part of a sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub id: SequenceId,
    /// Positions that run.
    pub positions: Range<usize>,
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The model that runs it.
    pub model: ModelKey,
    /// What runs.
    pub slices: Vec<Slice>,
}

impl Plan {
    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.slices.iter().map(|s| s.positions.len()).sum()
    }
}

/// Orders waiting sequences.
type WaitingKey = (Reverse<Priority>, SequenceId);

/// A model's share of the scheduler.
#[derive(Debug)]
struct Queue {
    cache: BlockCache,
    /// Sequences with pages, in the order in which they began.
    running: Vec<SequenceId>,
    /// Sequences without, by urgency and arrival.
    waiting: BTreeSet<WaitingKey>,
    /// Prefixes that are kept, with the tables that keep them.
    pinned: Vec<(Vec<u32>, Table)>,
}

/// Sequences, their pages and their order.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    queues: BTreeMap<ModelKey, Queue>,
    entries: HashMap<SequenceId, Entry>,
    next_id: SequenceId,
    /// The model of the last step: the next one comes first.
    last_model: ModelKey,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(limits: Limits) -> Self {
        Self { limits, queues: BTreeMap::new(), entries: HashMap::new(), next_id: 0, last_model: 0 }
    }

    /// Adds a model with `pages` pages of keys and values.
    pub fn add_model(&mut self, model: ModelKey, pages: usize) {
        let queue =
            Queue { cache: BlockCache::new(pages), running: Vec::new(), waiting: BTreeSet::new(), pinned: Vec::new() };
        self.queues.insert(model, queue);
    }

    /// Removes a model, and answers what was left of its sequences.
    pub fn remove_model(&mut self, model: ModelKey) -> Vec<SequenceId> {
        self.queues.remove(&model);
        let left: Vec<_> = self.entries.iter().filter(|(_, e)| e.sequence.model == model).map(|(id, _)| *id).collect();
        left.iter().for_each(|id| drop(self.entries.remove(id)));
        left
    }

    /// Takes a sequence in, or hands it back if its model is not there or could never hold it.
    pub fn add(&mut self, sequence: NewSequence) -> Result<SequenceId, NewSequence> {
        let entry =
            Entry { sequence, table: None, cached: 0, done: 0, passed_over: 0, started: None, values: Vec::new() };
        match self.queues.get_mut(&entry.sequence.model) {
            Some(queue) if entry.final_length() <= queue.cache.capacity() && !entry.tokens().is_empty() => {
                let id = self.next_id;
                self.next_id += 1;
                queue.waiting.insert((Reverse(entry.sequence.priority), id));
                self.entries.insert(id, entry);
                Ok(id)
            }
            _ => Err(entry.sequence),
        }
    }

    /// The sequence.
    pub fn entry(&self, id: SequenceId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// Sequences and tokens that wait for their first step.
    pub fn waiting(&self) -> (usize, usize) {
        let ids = self.queues.values().flat_map(|q| &q.waiting);
        ids.fold((0, 0), |(n, tokens), (_, id)| (n + 1, tokens + self.entries.get(id).map_or(0, |e| e.tokens().len())))
    }

    /// True if nothing waits and nothing runs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Published pages that were given up so far, over all models.
    pub fn evictions(&self) -> u64 {
        self.queues.values().map(|q| q.cache.evictions()).sum()
    }

    /// Sequences whose deadline has passed.
    pub fn expired(&self, now: Instant) -> Vec<SequenceId> {
        let passed = |e: &Entry| e.sequence.deadline.is_some_and(|deadline| deadline <= now);
        self.entries.iter().filter(|(_, e)| passed(e)).map(|(id, _)| *id).collect()
    }

    /// Takes a sequence out and gives its pages back.
    pub fn remove(&mut self, id: SequenceId) -> Option<Entry> {
        let mut entry = self.entries.remove(&id)?;
        if let Some(queue) = self.queues.get_mut(&entry.sequence.model) {
            queue.waiting.remove(&(Reverse(entry.sequence.priority), id));
            queue.running.retain(|running| *running != id);
            if let Some(table) = entry.table.take() {
                queue.cache.release(table);
            }
        }
        Some(entry)
    }

    /// Drops all sequences of a model and everything in its cache: a step has failed half-way.
    pub fn reset(&mut self, model: ModelKey) -> Vec<SequenceId> {
        let begun = self.queues.get(&model).map(|q| q.running.clone()).unwrap_or_default();
        begun.iter().for_each(|id| drop(self.remove(*id)));
        if let Some(queue) = self.queues.get_mut(&model) {
            for (_, table) in queue.pinned.drain(..) {
                queue.cache.release(table);
            }
            queue.cache.forget();
        }
        begun
    }

    /// The next step, if there is anything to do. Its slices count as done from now on.
    pub fn plan(&mut self, now: Instant) -> Option<Plan> {
        let after = self.queues.range(self.last_model + 1..).map(|(key, _)| *key);
        let models: Vec<ModelKey> = after.chain(self.queues.range(..=self.last_model).map(|(key, _)| *key)).collect();
        let plan = models.into_iter().find_map(|model| self.plan_model(model, now))?;
        self.last_model = plan.model;
        Some(plan)
    }

    fn plan_model(&mut self, model: ModelKey, now: Instant) -> Option<Plan> {
        let plan = self.build_step(model, now);
        let queue = self.queues.get_mut(&model)?;
        if plan.is_none() && queue.running.is_empty() && !queue.waiting.is_empty() && !queue.pinned.is_empty() {
            // Nothing runs and nothing can begin: the kept prefixes take the room.
            for (_, table) in queue.pinned.drain(..) {
                queue.cache.release(table);
            }
            return self.build_step(model, now);
        }
        plan
    }

    fn build_step(&mut self, model: ModelKey, now: Instant) -> Option<Plan> {
        let queue = self.queues.get_mut(&model)?;
        let mut step = StepBuilder { slices: Vec::new(), budget: self.limits.max_batch_tokens };
        let full = |step: &StepBuilder| step.slices.len() >= self.limits.max_batch_sequences || step.budget == 0;

        for id in &queue.running {
            if let Some(entry) = self.entries.get_mut(id)
                && entry.decodes()
                && !full(&step)
            {
                step.take(*id, entry, 1, &mut queue.cache);
            }
        }
        let decoding = !step.slices.is_empty();
        if decoding {
            step.budget = step.budget.min(self.limits.max_prefill_beside_decode);
        }
        // Sequences that are longer than a step and have begun go on.
        for id in &queue.running {
            if let Some(entry) = self.entries.get_mut(id)
                && step.slices.iter().all(|s| s.id != *id)
                && entry.remaining() > 0
                && !full(&step)
            {
                let len = entry.remaining().min(step.budget);
                step.take(*id, entry, len, &mut queue.cache);
            }
        }
        let capacity = if decoding { self.limits.max_prefill_beside_decode } else { self.limits.max_batch_tokens };
        let considered = || queue.waiting.iter().take(MAX_CONSIDERED * self.limits.max_batch_sequences).copied();
        let waits_too_long =
            |key: &WaitingKey| self.entries.get(&key.1).is_some_and(|e| e.passed_over >= MAX_PASSED_OVER);
        let overdue = considered().find(waits_too_long);
        let order: Vec<_> = overdue.into_iter().chain(considered().filter(|key| Some(*key) != overdue)).collect();
        for key in order {
            if full(&step) {
                break;
            }
            let Some(entry) = self.entries.get_mut(&key.1) else { continue };
            let left = entry.sequence.tokens.len() - queue.cache.cached(&entry.sequence.tokens, entry.reusable());
            // Part of a sequence is worth a place only if the whole would never get one.
            let fits = (left <= step.budget || left > capacity)
                .then(|| queue.cache.acquire(&entry.sequence.tokens, entry.reusable(), entry.final_length()))
                .flatten();
            let Some(table) = fits else {
                entry.passed_over += 1;
                if Some(key) == overdue {
                    break;
                }
                continue;
            };
            entry.cached = table.cached();
            entry.done = entry.cached;
            entry.table = Some(table);
            entry.started = Some(now);
            let len = entry.remaining().min(step.budget);
            step.take(key.1, entry, len, &mut queue.cache);
            queue.waiting.remove(&key);
            queue.running.push(key.1);
        }
        (!step.slices.is_empty()).then_some(Plan { model, slices: step.slices })
    }

    /// Takes in what a step answered for a slice: the values that were read. True if the sequence needs no
    /// further step, false if it goes on or waits for [`Scheduler::push_token`].
    pub fn complete(&mut self, slice: &Slice, values: Vec<f32>) -> bool {
        let Some(entry) = self.entries.get_mut(&slice.id) else { return false };
        if let Some(queue) = self.queues.get_mut(&entry.sequence.model) {
            queue.pin(entry);
        }
        if matches!(entry.sequence.want, Want::Generate { .. }) {
            return false;
        }
        entry.values.extend(values);
        entry.remaining() == 0
    }

    /// Appends a generated token, which the next step will run.
    pub fn push_token(&mut self, id: SequenceId, token: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.sequence.tokens.push(token);
        }
    }
}

impl Queue {
    /// Keeps the state of a prefix once the first sequence that begins with it has computed it.
    fn pin(&mut self, entry: &Entry) {
        let prefix = &entry.sequence.tokens[..entry.sequence.pinned_prefix.min(entry.done)];
        if prefix.len() < entry.sequence.pinned_prefix
            || prefix.is_empty()
            || self.pinned.iter().any(|(p, _)| p == prefix)
        {
            return;
        }
        let whole = prefix.len() / plumb_model::cache::PAGE * plumb_model::cache::PAGE;
        if let Some(table) = self.cache.acquire(&prefix[..whole], whole, whole) {
            if table.cached() == whole {
                self.pinned.push((prefix.to_vec(), table));
            } else {
                self.cache.release(table);
            }
        }
    }
}

struct StepBuilder {
    slices: Vec<Slice>,
    budget: usize,
}

impl StepBuilder {
    fn take(&mut self, id: SequenceId, entry: &mut Entry, len: usize, cache: &mut BlockCache) {
        let positions = entry.done..entry.done + len;
        entry.done = positions.end;
        self.budget -= len;
        if let Some(table) = &mut entry.table {
            // Other sequences of this very step may share these pages: a layer writes all keys before it reads any.
            cache.publish(table, &entry.sequence.tokens[..entry.done]);
        }
        self.slices.push(Slice { id, positions });
    }
}

/// Rows of a slice, relative to its first, after which a log-probability is wanted.
pub fn log_prob_rows(range: &Range<usize>, positions: &Range<usize>) -> Range<usize> {
    // The probability of token i is read after position i - 1.
    let start = (range.start - 1).max(positions.start).min(positions.end);
    let end = range.end.saturating_sub(1).min(positions.end).max(start);
    start - positions.start..end - positions.start
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use plumb_model::cache::PAGE;

    const LIMITS: Limits = Limits { max_batch_tokens: 256, max_batch_sequences: 8, max_prefill_beside_decode: 64 };

    fn scheduler(pages: usize) -> Scheduler {
        let mut scheduler = Scheduler::new(LIMITS);
        scheduler.add_model(1, pages);
        scheduler
    }

    fn sequence(seed: u32, len: usize, want: Want) -> NewSequence {
        NewSequence {
            model: 1,
            tokens: (0..len as u32).map(|i| seed * 10_000 + i).collect(),
            want,
            priority: Priority::Normal,
            deadline: None,
            arrived: Instant::now(),
            pinned_prefix: 0,
        }
    }

    fn slices(scheduler: &mut Scheduler) -> Vec<(SequenceId, Range<usize>)> {
        let plan = scheduler.plan(Instant::now());
        plan.map(|p| p.slices.into_iter().map(|s| (s.id, s.positions)).collect()).unwrap_or_default()
    }

    #[test]
    fn a_sequence_that_does_not_fit_lets_smaller_ones_pass() {
        let mut s = scheduler(100);
        for len in [200, 100, 50] {
            s.add(sequence(len, len as usize, Want::Reward)).unwrap();
        }
        assert_eq!(slices(&mut s), [(0, 0..200), (2, 0..50)]);
        assert_eq!(slices(&mut s), [(1, 0..100)]);
        assert_eq!(slices(&mut s), []);
    }

    #[test]
    fn a_sequence_is_not_passed_over_for_ever() {
        let mut s = scheduler(1000);
        s.add(sequence(0, 40, Want::Reward)).unwrap();
        s.add(sequence(1, 250, Want::Reward)).unwrap();
        let mut steps = 0;
        loop {
            // Always something small and urgent in front.
            s.add(NewSequence { priority: Priority::High, ..sequence(2 + steps, 40, Want::Reward) }).unwrap();
            let step = slices(&mut s);
            steps += 1;
            if step.iter().any(|(id, _)| *id == 1) {
                break;
            }
            assert!(steps < 40, "starved");
        }
    }

    #[test]
    fn priority_goes_before_arrival() {
        let mut s = scheduler(100);
        for (seed, priority) in [(1, Priority::Low), (2, Priority::Normal), (3, Priority::High)] {
            s.add(NewSequence { priority, ..sequence(seed, 100, Want::Reward) }).unwrap();
        }
        assert_eq!(slices(&mut s), [(2, 0..100), (1, 0..100)]);
        assert_eq!(slices(&mut s), [(0, 0..100)]);
    }

    #[test]
    fn a_sequence_longer_than_a_step_is_cut_and_ends() {
        let mut s = scheduler(100);
        s.add(sequence(1, 600, Want::LogProbs(300..600))).unwrap();
        let mut rows = Vec::new();
        for expected in [0..256, 256..512, 512..600] {
            let plan = s.plan(Instant::now()).unwrap();
            assert_eq!(plan.slices[0].positions, expected);
            let read = log_prob_rows(&(300..600), &expected);
            rows.extend(read.clone().map(|r| r + expected.start));
            let done = s.complete(&plan.slices[0], vec![0.0; read.len()]);
            assert_eq!(done, expected.end == 600);
        }
        assert_eq!(rows, (299..599).collect::<Vec<_>>());
    }

    #[test]
    fn a_shared_beginning_runs_once_in_the_same_step() {
        let mut s = scheduler(100);
        for candidate in 0..3u32 {
            let mut new = sequence(1, 64, Want::Reward);
            new.tokens.extend([90_000 + candidate; 10]);
            s.add(new).unwrap();
        }
        assert_eq!(slices(&mut s), [(0, 0..74), (1, 64..74), (2, 64..74)]);
        assert_eq!(s.entry(2).unwrap().cached(), 64);
    }

    #[test]
    fn values_that_need_a_token_make_it_run() {
        let mut s = scheduler(100);
        s.add(sequence(1, 96, Want::Reward)).unwrap();
        s.add(sequence(1, 96, Want::Reward)).unwrap();
        s.add(sequence(1, 96, Want::LogProbs(33..96))).unwrap();
        s.add(sequence(1, 96, Want::LogProbs(32..96))).unwrap();
        s.add(sequence(1, 96, Want::TokenRewards)).unwrap();
        let starts: Vec<_> = [slices(&mut s), slices(&mut s)].concat().into_iter().map(|(_, p)| p.start).collect();
        assert_eq!(starts, [0, 64, 32, 0, 0]);
    }

    #[test]
    fn decoding_goes_on_beside_a_long_prompt() {
        let mut s = scheduler(100);
        let id = s.add(sequence(1, 10, Want::Generate { max_new_tokens: 50 })).unwrap();
        let plan = s.plan(Instant::now()).unwrap();
        assert!(!s.complete(&plan.slices[0], vec![]));
        s.push_token(id, 7);
        s.add(sequence(2, 300, Want::Reward)).unwrap();
        assert_eq!(slices(&mut s), [(id, 10..11), (1, 0..64)]);
        s.push_token(id, 8);
        assert_eq!(slices(&mut s), [(id, 11..12), (1, 64..128)]);
        // A drawn token that has not come yet leaves the step to the others.
        assert_eq!(slices(&mut s), [(1, 128..300)]);
    }

    #[test]
    fn room_for_everything_that_may_be_drawn_is_taken_at_the_start() {
        let mut s = scheduler(4);
        assert!(s.add(sequence(1, 100, Want::Generate { max_new_tokens: 40 })).is_err(), "never fits");
        let first = s.add(sequence(1, 40, Want::Generate { max_new_tokens: 30 })).unwrap();
        let second = s.add(sequence(2, 40, Want::Generate { max_new_tokens: 30 })).unwrap();
        assert_eq!(slices(&mut s), [(first, 0..40)]);
        s.remove(first);
        assert_eq!(slices(&mut s), [(second, 0..40)]);
    }

    #[test]
    fn a_pinned_prefix_stays_and_gives_way_only_to_a_standstill() {
        let mut s = scheduler(8);
        let mut pinned = sequence(1, 70, Want::Reward);
        pinned.pinned_prefix = 64;
        let id = s.add(pinned).unwrap();
        let plan = s.plan(Instant::now()).unwrap();
        assert!(s.complete(&plan.slices[0], vec![0.0]));
        s.remove(id);
        // Five other sequences would push it out if it were not kept.
        for seed in 2..7 {
            let id = s.add(sequence(seed, 6 * PAGE, Want::Reward)).unwrap();
            slices(&mut s);
            s.remove(id);
        }
        let again = s.add(sequence(1, 70, Want::Reward)).unwrap();
        assert_eq!(slices(&mut s), [(again, 64..70)]);
        s.remove(again);
        let whole = s.add(sequence(9, 8 * PAGE, Want::Reward)).unwrap();
        assert_eq!(slices(&mut s), [(whole, 0..8 * PAGE)]);
    }

    #[test]
    fn models_take_turns() {
        let mut s = scheduler(100);
        s.add_model(2, 100);
        for model in [1, 1, 2, 2] {
            s.add(NewSequence { model, ..sequence(model as u32, 200, Want::TokenRewards) }).unwrap();
        }
        let order: Vec<_> = (0..4).map(|_| s.plan(Instant::now()).unwrap().model).collect();
        assert_eq!(order, [1, 2, 1, 2]);
    }

    #[test]
    fn a_passed_deadline_is_found() {
        let mut s = scheduler(10);
        let now = Instant::now();
        let soon = NewSequence { deadline: Some(now + Duration::from_secs(1)), ..sequence(1, 5, Want::Reward) };
        let id = s.add(soon).unwrap();
        s.add(sequence(2, 5, Want::Reward)).unwrap();
        assert!(s.expired(now).is_empty());
        assert_eq!(s.expired(now + Duration::from_secs(2)), [id]);
    }

    #[test]
    fn a_reset_drops_what_has_begun_and_keeps_what_waits() {
        let mut s = scheduler(100);
        s.add(sequence(1, 200, Want::Reward)).unwrap();
        s.add(sequence(2, 200, Want::Reward)).unwrap();
        slices(&mut s);
        assert_eq!(s.reset(1), [0]);
        assert_eq!(slices(&mut s), [(1, 0..200)]);
    }
}
