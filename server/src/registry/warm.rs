//! What a version goes through between being loaded and being visible: what its callers will ask for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use plumb_model::loaded::ModelKind;
use plumb_model::text::{HhhPrompt, Message, RenderMode, RenderOptions, TextInput};

use crate::engine::{JobMeta, ModelHandle, Priority, Sequence, Want};
use crate::error::{Error, Result};

/// Inputs whose lengths are remembered.
const REMEMBERED: usize = 64;
/// Tokens of the trial at most: it shares the engine with those who wait for an answer.
const MAX_TOKENS: usize = 2048;
/// Lengths that are tried where nothing is known: a sentence and a dialogue.
const USUAL: [u32; 2] = [32, 256];

/// The prompts that may stand before an input.
const PROMPTS: [HhhPrompt; 2] = [HhhPrompt::Short, HhhPrompt::Full];

/// What is asked of a model, over all its versions.
#[derive(Debug)]
pub(crate) struct Usage {
    /// Lengths of recent inputs.
    lengths: [AtomicU32; REMEMBERED],
    next: AtomicUsize,
    /// Which of [`PROMPTS`] have been asked for.
    prompts: [AtomicBool; PROMPTS.len()],
}

impl Default for Usage {
    fn default() -> Self {
        Self {
            lengths: [const { AtomicU32::new(0) }; REMEMBERED],
            next: AtomicUsize::new(0),
            prompts: [const { AtomicBool::new(false) }; PROMPTS.len()],
        }
    }
}

impl Usage {
    /// Remembers an input.
    pub(super) fn record(&self, tokens: usize, prompt: HhhPrompt) {
        let place = self.next.fetch_add(1, Ordering::Relaxed) % REMEMBERED;
        self.lengths[place].store(u32::try_from(tokens).unwrap_or(u32::MAX), Ordering::Relaxed);
        if let Some(place) = PROMPTS.iter().position(|known| *known == prompt) {
            self.prompts[place].store(true, Ordering::Relaxed);
        }
    }

    fn prompts(&self) -> impl Iterator<Item = HhhPrompt> {
        PROMPTS
            .into_iter()
            .zip(&self.prompts)
            .filter(|(_, asked)| asked.load(Ordering::Relaxed))
            .map(|(prompt, _)| prompt)
    }

    /// The longest of each power of two, the shortest first, up to `limit` tokens each and [`MAX_TOKENS`] in all.
    fn shapes(&self, limit: usize) -> Vec<usize> {
        let mut recent: Vec<_> = self.lengths.iter().map(|length| length.load(Ordering::Relaxed)).collect();
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

/// Warms a model, and sees whether it scores what it should.
///
/// # Errors
/// If it does not, or a step fails.
pub(super) async fn try_out(model: &ModelHandle, usage: &Usage) -> Result<()> {
    warm(model, usage).await?;
    probe(model).await
}

/// Computes the prompts in use, which stay, and made-up inputs of the lengths in use, so that the first caller finds the
/// version as fast as the last one found the version before.
async fn warm(model: &ModelHandle, usage: &Usage) -> Result<()> {
    let lengths = usage.shapes(model.info.max_input_tokens).into_iter().filter(|length| *length > 1);
    let made_up = lengths.enumerate().map(|(first, length)| {
        // The first token differs, so that each is computed; the others are those of the trial that it has passed.
        let mut tokens = vec![0; length];
        tokens[0] = (first % model.info.vocab_size) as u32;
        (tokens, 0)
    });
    let prompts = usage.prompts().filter_map(|prompt| behind(model, prompt));
    // One after the other: the steps are short, and those who wait for an answer get theirs in between.
    for (tokens, pinned) in made_up.chain(prompts) {
        let want = match model.info.kind {
            ModelKind::Preference => Want::Reward,
            ModelKind::Language => Want::LogProbs(tokens.len() - 1..tokens.len()),
        };
        score(model, tokens, want, pinned).await?;
    }
    Ok(())
}

/// Scores what the manifest has recorded, and compares.
///
/// # Errors
/// If a score is another one: the files are as they were published, but what they compute here is not.
async fn probe(model: &ModelHandle) -> Result<()> {
    for (i, probe) in model.probes.iter().enumerate() {
        // A template takes as long as it may.
        let (probe, of) = (probe.clone(), model.clone());
        let rendered = tokio::task::spawn_blocking(move || (probe.render(&of.text), probe)).await;
        let (rendered, probe) = rendered.map_err(|error| Error::internal(error.to_string()))?;
        let rendered = match rendered {
            // This server takes shorter inputs than the one that published.
            Err(plumb_model::Error::TooLong { .. }) => continue,
            rendered => rendered?,
        };
        let want = match model.info.kind {
            ModelKind::Preference => Want::Reward,
            ModelKind::Language => Want::LogProbs(rendered.require_response()?),
        };
        let values = score(model, rendered.ids, want, 0).await?;
        // A reward is one value; of log-probabilities the mean counts.
        let mean = values.iter().copied().map(f64::from).sum::<f64>() / values.len().max(1) as f64;
        let dtype = model.decoder.dtype();
        if !probe.agrees(mean as f32, dtype) {
            return Err(Error::failed_precondition(format!(
                "probe {i} of the manifest scores {mean} in {}, and {} in {} where the version was published: do not \
                 serve it before it is known why, or publish it without probes",
                dtype.name(),
                probe.score,
                probe.dtype.name(),
            )));
        }
    }
    Ok(())
}

/// A short dialogue behind a prompt, and the prompt's length; `None` where that does not fit the model.
fn behind(model: &ModelHandle, prompt: HhhPrompt) -> Option<(Vec<u32>, usize)> {
    let dialogue = TextInput::Conversation(vec![Message::new("user", "Hello."), Message::new("assistant", "Hello.")]);
    let options = RenderOptions { hhh_prompt: prompt, ..RenderOptions::default() };
    let rendered = model.text.render(&dialogue, &options, RenderMode::Score).ok()?;
    Some((rendered.ids, rendered.prefix_len))
}

/// The values of a sequence.
async fn score(model: &ModelHandle, tokens: Vec<u32>, want: Want, pinned_prefix: usize) -> Result<Vec<f32>> {
    let priority = Priority::Normal;
    let meta = JobMeta { priority, deadline: None, arrived: Instant::now(), pinned_prefix, permit: None };
    let answer = Sequence { model: model.clone(), tokens, want, meta }.submit()?;
    answer.await.unwrap_or(Err(Error::DeviceLost)).map(|output| output.values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_each_size_is_tried_within_bounds() {
        let check = |lengths: &[usize], limit: usize, expected: &[usize]| {
            let recent = Usage::default();
            lengths.iter().for_each(|length| recent.record(*length, HhhPrompt::None));
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

    #[test]
    fn prompts_are_remembered() {
        let usage = Usage::default();
        usage.record(10, HhhPrompt::None);
        assert_eq!(usage.prompts().count(), 0);
        usage.record(10, HhhPrompt::Full);
        assert_eq!(usage.prompts().collect::<Vec<_>>(), [HhhPrompt::Full]);
    }
}
