//! Finds out which sequence of a failed step is at fault.
//!
//! The sequences of a step that has failed begin again in two halves, each in steps of its own; a half that fails is
//! halved again, down to a sequence that fails alone. For one at fault among n that takes at most 2 log2(n) more steps,
//! of about twice the work of the first in all. Sequences stay with their group until they end, or, if they are
//! generated, until they have drawn a token: so each gets on, however often others fail.
//!
//! Groups come before everything else of their model: the next failure empties its cache, and what others had begun
//! would be for nothing. Sequences that come meanwhile join no group.

use std::time::Instant;

use super::step::{Kinds, StepBuilder};
use super::{ModelKey, Plan, Prefixes, Scheduler, SequenceId};

/// Sequences that were in a step that failed.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    /// The last one runs next. None is empty.
    groups: Vec<Vec<SequenceId>>,
}

impl Suspects {
    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = SequenceId> {
        self.groups.iter().flatten().copied()
    }

    /// Those that run next.
    fn group(&self) -> &[SequenceId] {
        self.groups.last().map_or(&[], Vec::as_slice)
    }

    /// Takes a sequence out. False if it was not suspected.
    pub(super) fn clear(&mut self, id: SequenceId) -> bool {
        let Some(at) = self.groups.iter().position(|group| group.contains(&id)) else { return false };
        self.groups[at].retain(|suspect| *suspect != id);
        if self.groups[at].is_empty() {
            self.groups.remove(at);
        }
        true
    }

    /// Makes two groups of those that have failed together. What is left of the group that they came from stays one.
    fn halve(&mut self, failed: &[SequenceId]) {
        for id in failed {
            self.clear(*id);
        }
        let (first, second) = failed.split_at(failed.len().div_ceil(2));
        self.groups.extend([second, first].into_iter().filter(|half| !half.is_empty()).map(<[_]>::to_vec));
    }
}

impl Scheduler {
    /// A step has failed: drops everything in the model's cache, so that whatever had begun begins again, and suspects
    /// the step's sequences. Answers the one that is at fault if it was alone; the caller takes it out.
    pub fn failed(&mut self, failed: &Plan) -> Option<SequenceId> {
        let queue = self.queues.get_mut(&failed.model)?;
        let begun: Vec<_> = queue.running.drain(..).collect();
        for id in queue.suspects.ids().chain(begun.iter().copied()) {
            if let Some(table) = self.entries.get_mut(&id).and_then(|entry| entry.restart()) {
                queue.cache.release(table);
            }
        }
        queue.unpin_all();
        queue.cache.forget();
        // Whom nobody waits for any more was taken out.
        let suspects: Vec<_> =
            failed.slices.iter().map(|slice| slice.id).filter(|id| self.entries.contains_key(id)).collect();
        for id in begun.into_iter().filter(|id| !suspects.contains(id)) {
            if let Some(entry) = self.entries.get(&id) {
                queue.waiting.insert(entry.waiting_key(id));
            }
        }
        queue.suspects.halve(&suspects);
        match (failed.slices.len(), &suspects[..]) {
            (1, [guilty]) => Some(*guilty),
            _ => None,
        }
    }

    /// The next step of a group, if there is one and it has room in the cache.
    pub(super) fn suspect_step(&mut self, model: ModelKey, kinds: Kinds, now: Instant) -> Option<Plan> {
        let queue = self.queues.get_mut(&model)?;
        let limits = self.limits;
        let budget = match kinds {
            Kinds::Decode => return None,
            Kinds::Both | Kinds::Others => limits.max_prefill_beside_decode.min(limits.max_batch_tokens),
            Kinds::All => limits.max_batch_tokens,
        };
        let mut step =
            StepBuilder { slices: Vec::new(), budget, publishes: limits.prefix_cache, prefixes: Prefixes::default() };
        for id in queue.suspects.group() {
            let Some(entry) = self.entries.get_mut(id) else { continue };
            if step.slices.len() >= limits.max_batch_sequences || step.budget == 0 {
                break;
            }
            if entry.table.is_none() {
                let reusable = if limits.prefix_cache { entry.reusable() } else { 0 };
                let table = queue.cache.acquire(&entry.sequence.tokens, reusable, entry.final_length());
                let Some(table) = table else { break };
                entry.begin(table, now);
                step.prefixes.add(entry.cached);
            }
            if entry.remaining() > 0 {
                step.take_part(*id, entry, queue.cost, &mut queue.cache);
            }
        }
        let StepBuilder { slices, prefixes, .. } = step;
        (!slices.is_empty()).then_some(Plan {
            model,
            slices,
            prefixes,
            rerun: true,
            decode_part: 0.0,
            contended: false,
        })
    }
}

#[cfg(test)]
mod tests;
