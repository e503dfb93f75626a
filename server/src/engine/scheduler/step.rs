//! Builds a step of one model.

use std::time::Instant;

use plumb_model::cache::BlockCache;

use super::{Cost, Entry, ModelKey, Plan, Prefixes, Scheduler, SequenceId, Slice, WaitingKey};

/// How often a sequence may be passed over by smaller ones.
const MAX_PASSED_OVER: usize = 16;

/// How many waiting sequences are looked at for each that a step may hold.
const MAX_CONSIDERED: usize = 4;

/// What a step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kinds {
    /// Sequences that are being generated, and nothing else.
    Decode,
    /// A limited stretch of others, and nothing else.
    Others,
    /// Both of these.
    Both,
    /// Whatever there is, up to the whole budget.
    All,
}

impl Scheduler {
    pub(super) fn plan_model(&mut self, model: ModelKey, kinds: Kinds, now: Instant) -> Option<Plan> {
        let build = |s: &mut Self| s.suspect_step(model, kinds, now).or_else(|| s.build_step(model, kinds, now));
        let plan = build(self);
        let queue = self.queues.get_mut(&model)?;
        let waits = !queue.waiting.is_empty() || !queue.suspects.is_empty();
        if plan.is_none() && queue.running.is_empty() && waits && !queue.pinned.is_empty() {
            // Nothing runs and nothing can begin: the kept prefixes take the room.
            queue.unpin_all();
            return build(self);
        }
        plan
    }

    fn build_step(&mut self, model: ModelKey, kinds: Kinds, now: Instant) -> Option<Plan> {
        let queue = self.queues.get_mut(&model)?;
        let (cost, limits) = (queue.cost, self.limits);
        let mut step = StepBuilder {
            slices: Vec::new(),
            budget: limits.max_batch_tokens,
            publishes: limits.prefix_cache,
            prefixes: Prefixes::default(),
        };
        let full = |step: &StepBuilder| step.slices.len() >= limits.max_batch_sequences || step.budget == 0;

        let mut left_out = None;
        for (at, id) in queue.running.iter().enumerate().filter(|_| kinds != Kinds::Others) {
            if let Some(entry) = self.entries.get_mut(id)
                && entry.decodes()
            {
                if full(&step) {
                    left_out = Some(at);
                    break;
                }
                step.take(*id, entry, 1, cost, &mut queue.cache);
            }
        }
        // Those for which there was no place come first the next time.
        queue.running.rotate_left(left_out.unwrap_or_default());
        let decode_cost = limits.max_batch_tokens - step.budget;
        let plan = |step: StepBuilder| {
            let total = limits.max_batch_tokens - step.budget;
            let StepBuilder { slices, prefixes, .. } = step;
            let decode_part = decode_cost as f64 / total.max(1) as f64;
            (!slices.is_empty()).then_some(Plan {
                model,
                slices,
                prefixes,
                rerun: false,
                decode_part,
                contended: false,
            })
        };
        if kinds == Kinds::Decode {
            return plan(step);
        }
        let capacity = match kinds {
            Kinds::Both | Kinds::Others => limits.max_prefill_beside_decode.min(limits.max_batch_tokens),
            _ => limits.max_batch_tokens,
        };
        let unused = step.budget.saturating_sub(capacity);
        step.budget -= unused;
        // Sequences that are longer than a step and have begun go on.
        for id in &queue.running {
            if let Some(entry) = self.entries.get_mut(id)
                && step.slices.iter().all(|s| s.id != *id)
                && entry.remaining() > 0
                && !(kinds == Kinds::Others && entry.decodes())
                && !full(&step)
            {
                step.take_part(*id, entry, cost, &mut queue.cache);
            }
        }
        // Nothing begins before suspects that wait for room.
        let most = if queue.suspects.is_empty() { MAX_CONSIDERED * limits.max_batch_sequences } else { 0 };
        let considered = || queue.waiting.iter().take(most).copied();
        // The less urgent have a share of their own.
        let urgent = queue.waiting.first().map(|key| key.0);
        let passed_over = |key: &WaitingKey| self.entries.get(&key.2).map_or(0, |entry| entry.passed_over);
        let waits_too_long = |key: &WaitingKey| Some(key.0) == urgent && passed_over(key) >= MAX_PASSED_OVER;
        let overdue = considered().find(waits_too_long);
        let owed = queue.owed(&self.entries).filter(|key| Some(*key) != overdue);
        let first = overdue.into_iter().chain(owed);
        let order: Vec<_> = first.chain(considered().filter(|key| ![overdue, owed].contains(&Some(*key)))).collect();
        let mut passed = Vec::new();
        for key in order {
            if full(&step) {
                break;
            }
            let Some(entry) = self.entries.get_mut(&key.2) else { continue };
            let reusable = if limits.prefix_cache { entry.reusable() } else { 0 };
            let tokens = &entry.sequence.tokens;
            let left = cost.slice(queue.cache.cached(tokens, reusable)..tokens.len());
            // Part of a sequence is worth a place only if the whole would never get one.
            let fits = (left <= step.budget || left > capacity)
                .then(|| queue.cache.acquire(tokens, reusable, entry.final_length()))
                .flatten();
            let Some(table) = fits else {
                passed.push(key.2);
                if Some(key) == overdue {
                    break;
                }
                continue;
            };
            entry.begin(table, now);
            step.prefixes.add(entry.cached);
            step.take_part(key.2, entry, cost, &mut queue.cache);
            queue.begin(key, entry.sequence.work);
        }
        step.budget += unused;
        let plan = plan(step)?;
        // To look for a step in vain passes nobody over.
        for id in passed {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.passed_over += 1;
            }
        }
        Some(plan)
    }
}

impl Prefixes {
    pub(super) fn add(&mut self, cached: usize) {
        self.lookups += 1;
        self.hits += usize::from(cached > 0);
        self.tokens += cached;
    }
}

pub(super) struct StepBuilder {
    pub(super) slices: Vec<Slice>,
    /// Cost that is left.
    pub(super) budget: usize,
    pub(super) publishes: bool,
    pub(super) prefixes: Prefixes,
}

impl StepBuilder {
    /// As much of a sequence as can be afforded, and at least a token, so that the step gets on.
    pub(super) fn take_part(&mut self, id: SequenceId, entry: &mut Entry, cost: Cost, cache: &mut BlockCache) {
        let len = cost.affordable(entry.done..entry.tokens().len(), self.budget).max(1);
        self.take(id, entry, len, cost, cache);
    }

    fn take(&mut self, id: SequenceId, entry: &mut Entry, len: usize, cost: Cost, cache: &mut BlockCache) {
        let positions = entry.done..entry.done + len;
        entry.done = positions.end;
        self.budget = self.budget.saturating_sub(cost.slice(positions.clone()));
        if self.publishes
            && let Some(table) = &mut entry.table
        {
            // Other sequences of this very step may share these pages: a layer writes all keys before it reads any.
            cache.publish(table, &entry.sequence.tokens[..entry.done]);
        }
        self.slices.push(Slice { id, positions });
    }
}
