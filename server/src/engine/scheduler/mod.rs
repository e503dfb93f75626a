//! What runs next: pure bookkeeping, no device, no clock of its own, no async.
//!
//! The scheduler holds sequences, gives them pages and cuts them into steps. A step belongs to one model and stays under
//! a budget, in which a token counts for more the more keys it attends to ([`cost`]), and one whose state is cached for
//! nothing. Waiting sequences come by priority, and within one the clients take turns, by tokens (`turns`); while more
//! urgent ones wait, the less urgent get a sixteenth, so that they get on. One that does not fit now does not stop smaller
//! ones behind it, until it has been passed over sixteen times: then it comes before all others.
//!
//! Sequences that are being generated run one token in a step. While others want the engine too, the two share its time
//! (`share`): in some steps streams run alone, in others a limited stretch of prompts runs beside them.
//!
//! When a step fails, its sequences begin again in ever smaller groups, until the one at fault is found (`suspects`).

pub mod cost;
mod entry;
mod share;
mod step;
mod suspects;
mod turns;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::time::{Duration, Instant};

use plumb_model::cache::{BlockCache, PAGE, Table};

use cost::Cost;
pub use entry::{Client, Entry, NewSequence, Priority, Want, log_prob_rows};
use share::Share;
use step::Kinds;
use suspects::Suspects;
use turns::Turns;

/// Names a loaded model inside the engine.
pub type ModelKey = u64;
/// Names a sequence inside the engine.
pub type SequenceId = u64;

/// Bounds of a step, and how the engine is shared.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Cost of a step, in tokens without context.
    pub max_batch_tokens: usize,
    /// Sequences in a step.
    pub max_batch_sequences: usize,
    /// Cost of prompts in a step while sequences are being generated: what the reader of a stream may have to wait for.
    pub max_prefill_beside_decode: usize,
    /// Part of the engine's time that streams get while others wait, 0 to below 1.
    pub decode_share: f64,
    /// Sequences may use what others have computed.
    pub prefix_cache: bool,
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
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The model that runs it.
    pub model: ModelKey,
    /// What runs.
    pub slices: Vec<Slice>,
    /// What came of looking for cached beginnings.
    pub prefixes: Prefixes,
    /// It is one of those that find out why another has failed.
    pub rerun: bool,
    /// Part of the cost that is sequences being generated.
    decode_part: f64,
    /// Sequences of both kinds wanted it.
    contended: bool,
}

/// What the sequences that begin in a step found in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Sequences that looked.
    pub lookups: usize,
    /// Sequences that found something.
    pub hits: usize,
    /// Tokens that they need not compute.
    pub tokens: usize,
}

impl Plan {
    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.slices.iter().map(|s| s.positions.len()).sum()
    }
}

/// Orders waiting sequences.
type WaitingKey = (Reverse<Priority>, u64, SequenceId);

/// A model's share of the scheduler.
#[derive(Debug)]
struct Queue {
    cost: Cost,
    cache: BlockCache,
    /// Sequences with pages, in the order in which they began.
    running: Vec<SequenceId>,
    /// Sequences without, by urgency and turn.
    waiting: BTreeSet<WaitingKey>,
    /// Sequences of steps that failed, which neither wait nor run with others.
    suspects: Suspects,
    turns: Turns,
    /// Prefixes that are kept, with the tables that keep them.
    pinned: Vec<(Vec<u32>, Table)>,
}

/// Sequences, their pages and their order.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    share: Share,
    queues: BTreeMap<ModelKey, Queue>,
    entries: HashMap<SequenceId, Entry>,
    next_id: SequenceId,
    /// The model of the last step: the next one comes first.
    last_model: ModelKey,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(limits: Limits) -> Self {
        let share = Share::new(limits.decode_share);
        Self { limits, share, queues: BTreeMap::new(), entries: HashMap::new(), next_id: 0, last_model: 0 }
    }

    /// Adds a model with `pages` pages of keys and values.
    pub fn add_model(&mut self, model: ModelKey, pages: usize, cost: Cost) {
        let queue = Queue {
            cost,
            cache: BlockCache::new(pages),
            running: Vec::new(),
            waiting: BTreeSet::new(),
            suspects: Suspects::default(),
            turns: Turns::default(),
            pinned: Vec::new(),
        };
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
        let mut entry = Entry::new(sequence);
        match self.queues.get_mut(&entry.sequence.model) {
            Some(queue) if entry.final_length() <= queue.cache.capacity() && !entry.tokens().is_empty() => {
                let id = self.next_id;
                self.next_id += 1;
                let NewSequence { priority, client, work, .. } = entry.sequence;
                entry.turn = queue.turns.enter(priority, client, work);
                queue.waiting.insert(entry.waiting_key(id));
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
        let ids = self.queues.values().flat_map(|q| q.waiting.iter().map(|(_, _, id)| *id).chain(q.suspects.ids()));
        let waits = ids.filter_map(|id| self.entries.get(&id)).filter(|entry| entry.table.is_none());
        waits.fold((0, 0), |(n, tokens), entry| (n + 1, tokens + entry.tokens().len()))
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
            queue.waiting.remove(&entry.waiting_key(id));
            queue.running.retain(|running| *running != id);
            queue.suspects.clear(id);
            if let Some(table) = entry.table.take() {
                queue.cache.release(table);
            }
        }
        Some(entry)
    }

    /// A value of a sequence is no number: what it has put into the cache is not used again, in case that it is why.
    pub fn distrust(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.get(&id) else { return };
        let (Some(table), Some(queue)) = (&entry.table, self.queues.get_mut(&entry.sequence.model)) else { return };
        let hidden = queue.cache.unpublish(table);
        for (_, table) in queue.pinned.extract_if(.., |(_, table)| table.has_any(&hidden)) {
            queue.cache.release(table);
        }
    }

    /// The next step, if there is anything to do. Its slices count as done from now on: it has to run, or be
    /// reported as [failed](Scheduler::failed).
    pub fn plan(&mut self, now: Instant) -> Option<Plan> {
        let (decode, other) = self.wanted();
        let kinds = match (decode.is_empty(), other.is_empty()) {
            (false, false) if self.share.decode_alone() => Kinds::Decode,
            (false, false) if self.share.others_alone() => Kinds::Others,
            (false, false) => Kinds::Both,
            _ => {
                self.share.uncontended();
                Kinds::All
            }
        };
        let plan = match kinds {
            Kinds::Decode => self.plan_one_of(&decode, kinds, now),
            // None of them may have room to begin.
            Kinds::Others => {
                self.plan_one_of(&other, kinds, now).or_else(|| self.plan_one_of(&decode, Kinds::Both, now))
            }
            Kinds::Both | Kinds::All => self.plan_one_of(&(&decode | &other), kinds, now),
        }?;
        self.last_model = plan.model;
        Some(Plan { contended: kinds != Kinds::All, ..plan })
    }

    /// A step of the first model that has one, behind the one whose turn it was last.
    fn plan_one_of(&mut self, wanted: &BTreeSet<ModelKey>, kinds: Kinds, now: Instant) -> Option<Plan> {
        let after = |model: &&ModelKey| **model > self.last_model;
        let models: Vec<ModelKey> =
            wanted.iter().filter(after).chain(wanted.iter().filter(|model| !after(model))).copied().collect();
        models.into_iter().find_map(|model| self.plan_model(model, kinds, now))
    }

    /// The step after one that is still running, if it is known already: as long as nothing is generated, whose next
    /// token is not drawn yet, nor suspected, and as what waits fills a step, so that whatever comes meanwhile would not
    /// have a place in it. Something urgent waits for this step, too.
    pub fn plan_ahead(&mut self, now: Instant) -> Option<Plan> {
        let generates =
            |id: &SequenceId| self.entries.get(id).is_some_and(|e| matches!(e.sequence.want, Want::Generate { .. }));
        if self.queues.values().any(|queue| !queue.suspects.is_empty() || queue.running.iter().any(generates)) {
            return None;
        }
        let fills = |queue: &Queue| {
            let ids = queue.running.iter().chain(queue.waiting.iter().map(|(_, _, id)| id));
            let costs = ids.filter_map(|id| self.entries.get(id)).map(|e| queue.cost.slice(e.done..e.tokens().len()));
            let mut left = self.limits.max_batch_tokens;
            costs.take(self.limits.max_batch_sequences).any(|cost| {
                left = left.saturating_sub(cost);
                left == 0
            })
        };
        self.queues.values().any(fills).then(|| self.plan(now)).flatten()
    }

    /// Takes the time that a step took to account.
    pub fn ran(&mut self, plan: &Plan, duration: Duration) {
        if plan.contended {
            self.share.ran(duration, plan.decode_part);
        }
    }

    /// Models with sequences that are being generated, and those with anything else to do.
    fn wanted(&self) -> (BTreeSet<ModelKey>, BTreeSet<ModelKey>) {
        let (mut decode, mut other) = (BTreeSet::new(), BTreeSet::new());
        for (model, queue) in &self.queues {
            if !queue.waiting.is_empty() || !queue.suspects.is_empty() {
                other.insert(*model);
            }
            for entry in queue.running.iter().filter_map(|id| self.entries.get(id)) {
                if entry.decodes() {
                    decode.insert(*model);
                } else if entry.remaining() > 0 {
                    other.insert(*model);
                }
            }
        }
        (decode, other)
    }

    /// Takes in what a step answered for a slice: the values that were read. True if the sequence needs no
    /// further step, false if it goes on or waits for [`Scheduler::push_token`].
    pub fn complete(&mut self, slice: &Slice, values: Vec<f32>) -> bool {
        let Some(entry) = self.entries.get_mut(&slice.id) else { return false };
        let generates = matches!(entry.sequence.want, Want::Generate { .. });
        if let Some(queue) = self.queues.get_mut(&entry.sequence.model) {
            if self.limits.prefix_cache {
                queue.pin(entry);
            }
            if generates && slice.positions.end == entry.tokens().len() && queue.suspects.clear(slice.id) {
                queue.running.push(slice.id);
            }
        }
        if generates {
            return false;
        }
        entry.values.extend(values);
        // A later slice may be planned already.
        slice.positions.end == entry.tokens().len()
    }

    /// Appends a generated token, which the next step will run.
    pub fn push_token(&mut self, id: SequenceId, token: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.sequence.tokens.push(token);
        }
    }
}

impl Queue {
    /// The sequence that comes before more urgent ones, because those that are less urgent are owed something: of the
    /// first of each priority the one that came first.
    fn owed(&self, entries: &HashMap<SequenceId, Entry>) -> Option<WaitingKey> {
        let &(Reverse(urgent), ..) = self.waiting.first().filter(|_| self.turns.owes())?;
        let first = |&priority: &Priority| self.waiting.range((Reverse(priority), 0, 0)..).next().copied();
        let others = [Priority::Normal, Priority::Low].into_iter().filter(|priority| *priority < urgent);
        others
            .filter_map(|priority| first(&priority).filter(|key| key.0 == Reverse(priority)))
            .min_by_key(|key| entries.get(&key.2).map(Entry::arrived))
    }

    /// Takes a sequence out of those that wait, which begins.
    fn begin(&mut self, key: WaitingKey, work: usize) {
        let (Reverse(priority), turn, id) = key;
        self.waiting.remove(&key);
        let more = self.waiting.first().is_some_and(|first| first.0.0 > priority);
        let less = self.waiting.last().is_some_and(|last| last.0.0 < priority);
        self.turns.begin(priority, turn, work, (more, less));
        self.running.push(id);
    }

    /// Keeps no prefix any longer.
    fn unpin_all(&mut self) {
        for (_, table) in self.pinned.drain(..) {
            self.cache.release(table);
        }
    }

    /// Keeps the state of a prefix once the first sequence that begins with it has computed it.
    fn pin(&mut self, entry: &Entry) {
        let prefix = &entry.sequence.tokens[..entry.sequence.pinned_prefix.min(entry.done)];
        if prefix.len() < entry.sequence.pinned_prefix
            || prefix.is_empty()
            || self.pinned.iter().any(|(p, _)| p == prefix)
        {
            return;
        }
        let whole = prefix.len() / PAGE * PAGE;
        if let Some(table) = self.cache.acquire(&prefix[..whole], whole, whole) {
            if table.cached() == whole {
                self.pinned.push((prefix.to_vec(), table));
            } else {
                self.cache.release(table);
            }
        }
    }
}

#[cfg(test)]
mod tests;
