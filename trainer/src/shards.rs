//! A batch in shards: each has a gradient of its own, and these are added up in the order of the shards.
//!
//! Shards are cut by the order of the batch, and processes take them in turn, as cards are dealt. So the sums have one
//! order, whether one process computes all shards or several their share, and the sum of those before is all that has
//! to be kept of them.

use plumb_model::decoder::gradient::{Numbers, Peers};

use crate::examples::Example;
use crate::objective::Sums;
use crate::processes::{Processes, part};
use crate::record::Pair;
use crate::{Error, Result};

/// How the examples of a run are shared out.
pub(crate) struct Shards<'a> {
    processes: &'a Processes,
    count: usize,
    /// This process's share of the gradients' sum, where there is more than one.
    sum: Vec<f32>,
    /// The GPUs of all processes, if it is they who keep it.
    peers: Option<Peers>,
}

impl<'a> Shards<'a> {
    /// Whether each process gets as many of them.
    pub(crate) fn check(processes: &Processes, count: usize) -> Result<()> {
        let workers = processes.count();
        if count.is_multiple_of(workers) {
            return Ok(());
        }
        let message = format!(
            "{workers} processes cannot share {count} shards: set shards to a multiple of {workers}, or start as many \
             processes as divide it"
        );
        Err(Error::Recipe(message))
    }

    /// For gradients of so many weights.
    pub(crate) fn new(processes: &'a Processes, count: usize, weights: usize) -> Self {
        let sum = if count > 1 { vec![0.0; processes.share(weights)] } else { Vec::new() };
        Self { processes, count, sum, peers: None }
    }

    /// Lets the GPUs of all processes add the gradients up, where they can: those of these weights, which lie where they
    /// do. All processes have to call it.
    pub(crate) fn meet(&mut self, weights: &Numbers) {
        if self.count > 1 {
            self.peers = self.processes.peers(weights);
        }
        if self.peers.is_some() {
            self.sum = Vec::new();
        }
    }

    /// Sums over all examples, and what pairs got, in their order. All processes have to call it.
    pub(crate) fn measure<'e>(
        &self,
        examples: &[&'e Example],
        mut compute: impl FnMut(Vec<&'e Example>) -> Result<(Sums, Vec<Pair>)>,
    ) -> Result<(Sums, Vec<Pair>)> {
        let (mut sums, mut pairs) = (Sums::default(), Vec::new());
        for shard in self.own() {
            let (own, scores) = self.processes.agree(compute(cut(examples, shard, self.count)))?;
            sums.add_all(&self.processes.gather(own.to_numbers()));
            let scores: Vec<f64> = scores.iter().flat_map(|pair| [pair.chosen, pair.rejected]).collect();
            let all = self.processes.gather_list(scores);
            pairs.extend(
                all.as_chunks::<2>().0.iter().map(|[chosen, rejected]| Pair { chosen: *chosen, rejected: *rejected }),
            );
        }
        Ok((sums, pairs))
    }

    /// Sums over all examples, and in `gradient` the sum of the shards' gradients; `compute` adds one of them to the
    /// zeros that it is given. All processes have to call it.
    pub(crate) fn gradient<'e>(
        &mut self,
        batch: &[&'e Example],
        gradient: &mut Numbers,
        mut compute: impl FnMut(Vec<&'e Example>, &mut Numbers) -> Result<Sums>,
    ) -> Result<Sums> {
        let mut sums = Sums::default();
        for (round, shard) in self.own().enumerate() {
            gradient.clear()?;
            let own = self.processes.agree(compute(cut(batch, shard, self.count), gradient))?;
            sums.add_all(&self.processes.gather(own.to_numbers()));
            if let Some(peers) = &mut self.peers {
                peers.add(gradient, round == 0)?;
            } else if self.count > 1 {
                let own = self.processes.agree(gradient.to_host().map_err(Error::from))?;
                self.processes.add(&own, &mut self.sum, round == 0);
            }
        }
        if let Some(peers) = &self.peers {
            peers.collect(gradient)?;
        } else if self.count > 1 {
            gradient.replace(|whole| self.processes.collect(&self.sum, whole))?;
        }
        Ok(sums)
    }

    /// The shards that this process computes.
    fn own(&self) -> impl Iterator<Item = usize> + use<> {
        (self.processes.rank()..self.count).step_by(self.processes.count())
    }
}

/// A shard of so many; one of a batch that is smaller than their count may be empty.
fn cut<'e>(examples: &[&'e Example], shard: usize, count: usize) -> Vec<&'e Example> {
    examples[part(examples.len(), count, shard)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::Side;
    use plumb_model::decoder::Device;

    fn texts(count: usize) -> Vec<Example> {
        (1..=count).map(|len| Example::Text(Side { tokens: vec![1; len], response: 1 })).collect()
    }

    fn lengths(examples: &[&Example]) -> Vec<usize> {
        examples.iter().flat_map(|example| example.sides()).map(|side| side.tokens.len()).collect()
    }

    /// Sums that count all tokens.
    fn measured(shard: &[&Example]) -> Sums {
        let mut sums = Sums::default();
        sums.add_all(&[[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, lengths(shard).iter().sum::<usize>() as f64]]);
        sums
    }

    #[test]
    fn gradients_of_shards_begin_at_zero_and_are_added_in_order() {
        // In f32, 2^24 + 1 is 2^24: any other order, or one sum for all, ends elsewhere.
        let big = 16_777_216.0f32;
        let check = |shards: usize, parts: &[f32], expected: f32| {
            let texts = texts(parts.len());
            let batch: Vec<&Example> = texts.iter().collect();
            let mut gradient = Numbers::new(vec![7.0; 3], &Device::Cpu).unwrap();
            let mut sharded = Shards::new(&Processes::Alone, shards, 3);
            // A second step forgets the first.
            for _ in 0..2 {
                let mut seen = Vec::new();
                let compute = |shard: Vec<&Example>, gradient: &mut Numbers| {
                    let gradient = gradient.host_mut().unwrap();
                    assert_eq!(gradient, [0.0; 3]);
                    for length in lengths(&shard) {
                        gradient.iter_mut().for_each(|x| *x += parts[length - 1]);
                    }
                    seen.push(lengths(&shard));
                    Ok(measured(&shard))
                };
                let sums = sharded.gradient(&batch, &mut gradient, compute).unwrap();
                assert_eq!(*gradient.to_host().unwrap(), [expected; 3], "{shards} shards of {parts:?}");
                assert_eq!((seen.len(), seen.concat()), (shards, lengths(&batch)));
                assert_eq!(sums, measured(&batch));
            }
        };
        check(1, &[big, 1.0, 1.0, -big], 0.0);
        check(2, &[big, 1.0, 1.0, -big], 1.0);
        check(4, &[1.0, 1.0, big, -big], 2.0);
        check(4, &[big, 1.0, 1.0, -big], 0.0);
        check(3, &[5.0], 5.0);
    }

    #[test]
    fn measures_are_added_up_over_all_shards() {
        let texts = texts(7);
        let examples: Vec<&Example> = texts.iter().collect();
        for count in [1, 3, 9] {
            let shards = Shards::new(&Processes::Alone, count, 0);
            let compute = |shard: Vec<&Example>| {
                let pair = |tokens: usize| Pair { chosen: tokens as f64, rejected: 0.0 };
                Ok((measured(&shard), lengths(&shard).into_iter().map(pair).collect()))
            };
            let (sums, pairs) = shards.measure(&examples, compute).unwrap();
            assert_eq!(sums.tokens, 28);
            assert_eq!(pairs.iter().map(|pair| pair.chosen as usize).collect::<Vec<_>>(), lengths(&examples));
        }
    }
}
