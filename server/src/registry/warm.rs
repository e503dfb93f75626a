//! What a version goes through between being loaded and being visible: the shapes in use.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use plumb_model::loaded::ModelKind;

use crate::engine::{Engine, JobMeta, ModelHandle, Priority, Sequence, Want};
use crate::error::{Error, Result};

/// Inputs whose lengths are remembered.
const REMEMBERED: usize = 64;
/// Tokens of the trial at most: it shares the engine with those who wait for an answer.
const MAX_TOKENS: usize = 2048;
/// Lengths that are tried where nothing is known: a sentence and a dialogue.
const USUAL: [u32; 2] = [32, 256];

/// Lengths of a model's recent inputs, over all its versions.
#[derive(Debug)]
pub(crate) struct Lengths {
    recent: [AtomicU32; REMEMBERED],
    next: AtomicUsize,
}

impl Default for Lengths {
    fn default() -> Self {
        Self { recent: [const { AtomicU32::new(0) }; REMEMBERED], next: AtomicUsize::new(0) }
    }
}

impl Lengths {
    /// Remembers an input.
    pub(super) fn record(&self, tokens: usize) {
        let place = self.next.fetch_add(1, Ordering::Relaxed) % REMEMBERED;
        self.recent[place].store(u32::try_from(tokens).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// The longest of each power of two, the shortest first, up to `limit` tokens each and [`MAX_TOKENS`] in all.
    fn shapes(&self, limit: usize) -> Vec<usize> {
        let mut recent: Vec<_> = self.recent.iter().map(|length| length.load(Ordering::Relaxed)).collect();
        if recent.iter().all(|length| *length == 0) {
            recent.splice(.., USUAL);
        }
        let mut longest = BTreeMap::new();
        for length in recent.into_iter().filter(|length| *length > 0) {
            let length = (length as usize).min(limit);
            longest
                .entry(length.ilog2())
                .and_modify(|longest: &mut usize| *longest = length.max(*longest))
                .or_insert(length);
        }
        let mut left = MAX_TOKENS;
        longest
            .into_values()
            .map_while(|length| left.checked_sub(length).inspect(|rest| left = *rest).map(|_| length))
            .collect()
    }
}

/// Runs made-up inputs of the lengths in use, so that the first caller finds the version as fast as the last one of the
/// version before.
pub(super) async fn warm(engine: &Engine, model: &ModelHandle, lengths: &Lengths) -> Result<()> {
    let run = |(first, length): (usize, usize)| {
        // The first token differs, so that each is computed; the next ones are those of the trial that it has passed.
        let mut tokens = vec![0; length];
        tokens[0] = (first % model.info.vocab_size) as u32;
        let want = match model.info.kind {
            ModelKind::Preference => Want::Reward,
            ModelKind::Language => Want::LogProbs(1..length),
        };
        score(engine, model, tokens, want)
    };
    let shapes = lengths.shapes(model.info.max_input_tokens);
    // All are queued before the first is awaited: the step is as large as usual.
    let answers = shapes.into_iter().filter(|length| *length > 1).enumerate().map(run).collect::<Result<Vec<_>>>()?;
    for answer in answers {
        answer.await?;
    }
    Ok(())
}

/// Queues a sequence, and answers its values when it is awaited.
fn score(
    engine: &Engine,
    model: &ModelHandle,
    tokens: Vec<u32>,
    want: Want,
) -> Result<impl Future<Output = Result<Vec<f32>>> + use<>> {
    let meta =
        JobMeta { priority: Priority::Normal, deadline: None, arrived: Instant::now(), pinned_prefix: 0, permit: None };
    let answer = engine.submit(Sequence { model: model.clone(), tokens, want, meta })?;
    Ok(async move { answer.await.unwrap_or(Err(Error::DeviceLost)).map(|output| output.values) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_each_size_is_tried_within_bounds() {
        let check = |lengths: &[usize], limit: usize, expected: &[usize]| {
            let recent = Lengths::default();
            lengths.iter().for_each(|length| recent.record(*length));
            assert_eq!(recent.shapes(limit), expected, "{lengths:?}");
        };
        check(&[], 1000, &[32, 256]);
        check(&[], 100, &[32, 100]);
        check(&[17, 31, 20, 300, 260], 1000, &[31, 300]);
        check(&[10, 5000], 8192, &[10]);
        check(&[10, 5000], 600, &[10, 600]);
        check(&[1000, 1900, 500, 300], 8192, &[500, 1000]);
        check(&[7; 2 * REMEMBERED], 1000, &[7]);
    }
}
