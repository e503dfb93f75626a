//! Which examples a step takes, and what goes through the decoder at once.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::examples::Example;

/// The order of examples: a new one for every epoch, the same for a seed.
pub(crate) struct Order {
    seed: u64,
    examples: usize,
    batch: usize,
    /// The epoch whose order is known, and that order.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    pub(crate) fn new(seed: u64, examples: usize, batch: usize) -> Self {
        Self { seed, examples, batch, epoch: None }
    }

    /// Steps that go once through the data; the last of them may be smaller.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.examples.div_ceil(self.batch) as u64
    }

    /// The examples of a step, from 1 on.
    pub(crate) fn batch(&mut self, step: u64) -> Vec<usize> {
        let (epoch, batch) = ((step - 1) / self.steps_per_epoch(), (step - 1) % self.steps_per_epoch());
        let order = match self.epoch.take() {
            Some((known, order)) if known == epoch => order,
            _ => {
                let mut order: Vec<usize> = (0..self.examples).collect();
                let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
                rng.set_stream(epoch + 1);
                order.shuffle(&mut rng);
                order
            }
        };
        let start = batch as usize * self.batch;
        let indices = order[start..(start + self.batch).min(self.examples)].to_vec();
        self.epoch = Some((epoch, order));
        indices
    }
}

/// Cuts examples into parts of at most `tokens` tokens, but of one example at least, by their numbers; those of similar
/// length go together.
pub(crate) fn micro_batches(examples: &[&Example], tokens: usize) -> Vec<Vec<usize>> {
    let length = |i: &usize| examples[*i].sides().map(|side| side.tokens.len()).sum::<usize>();
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(length(i)));
    let mut parts: Vec<Vec<usize>> = Vec::new();
    let mut left = 0;
    for i in order {
        let length = length(&i);
        if length > left || parts.is_empty() {
            parts.push(Vec::new());
            left = tokens;
        }
        left = left.saturating_sub(length);
        if let Some(part) = parts.last_mut() {
            part.push(i);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::Side;

    #[test]
    fn every_epoch_has_every_example_once_in_an_order_of_its_own() {
        let mut order = Order::new(7, 10, 4);
        assert_eq!(order.steps_per_epoch(), 3);
        let mut epochs: Vec<Vec<usize>> = Vec::new();
        for epoch in 0..3 {
            let mut all: Vec<usize> = (1..=3).flat_map(|step| order.batch(epoch * 3 + step)).collect();
            epochs.push(all.clone());
            all.sort();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        // Taken up in the middle it goes on as before; another seed is another order.
        assert_eq!(Order::new(7, 10, 4).batch(5), epochs[1][4..8]);
        assert_ne!(Order::new(8, 10, 4).batch(1), epochs[0][..4]);
    }

    #[test]
    fn parts_hold_so_many_tokens_at_most() {
        let example = |len| Example::Text(Side { tokens: vec![1; len], response: 1 });
        let examples: Vec<Example> = [3, 9, 5, 20, 4, 1].into_iter().map(example).collect();
        let parts = micro_batches(&examples.iter().collect::<Vec<_>>(), 10);
        assert_eq!(parts, [vec![3], vec![1], vec![2, 4], vec![0, 5]]);
    }
}
