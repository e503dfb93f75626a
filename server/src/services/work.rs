//! How much work a call is: estimated from its bytes before anything is spent on it, and counted from its tokens then.

use plumb_model::cache::PAGE;
use plumb_model::text::{Response, TextInput};

use crate::admission::{Estimator, Work};
use crate::engine::Want;
use crate::error::Result;

/// Bytes that a form of conversation writes around a turn, at least: one that says nothing is work too.
const AROUND_A_TURN: usize = 8;

/// What is known of an input before it is tokenized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    /// Bytes of text.
    pub(super) bytes: usize,
    /// Tokens, where the caller has tokenized.
    pub(super) ids: usize,
}

impl Size {
    pub(super) fn of(input: &TextInput) -> Self {
        match input {
            TextInput::Text(text) => Self { bytes: text.len(), ids: 0 },
            TextInput::Conversation(messages) => {
                let bytes =
                    messages.iter().map(|message| AROUND_A_TURN + message.role.len() + message.content.len()).sum();
                Self { bytes, ids: 0 }
            }
            TextInput::TokenIds { ids, .. } => Self { bytes: 0, ids: ids.len() },
            TextInput::PromptResponse { prompt, response } => {
                let (prompt, response) = (Self::of(prompt), Self::of_response(response));
                Self { bytes: prompt.bytes + response.bytes, ids: prompt.ids + response.ids }
            }
        }
    }

    fn of_response(response: &Response) -> Self {
        match response {
            Response::Text(text) => Self { bytes: text.len(), ids: 0 },
            Response::TokenIds(ids) => Self { bytes: 0, ids: ids.len() },
        }
    }

    /// Tokens that it is likely to be, of which a model takes no more than `longest`: what is longer is cut or refused.
    pub(super) fn tokens(self, estimator: &Estimator, model: &str, longest: usize) -> usize {
        // Ids are counted and not guessed: too many of them are an error, and are said to be as many as they are.
        if self.bytes == 0 { self.ids } else { (self.ids + estimator.tokens(model, self.bytes)).min(longest) }
    }
}

/// Tokens that inputs are likely to be together, and how many of those are certain. A prompt that one shares with the one
/// before it is counted once.
pub(super) fn estimate(
    inputs: &[Result<TextInput>],
    estimator: &Estimator,
    model: &str,
    longest: usize,
) -> (usize, usize) {
    let mut last = None;
    let tokens = inputs.iter().flatten().map(|input| {
        let size = match input {
            TextInput::PromptResponse { prompt, response } if last == Some(prompt) => Size::of_response(response),
            input => Size::of(input),
        };
        last = if let TextInput::PromptResponse { prompt, .. } = input { Some(prompt) } else { None };
        (size.tokens(estimator, model, longest), size.ids)
    });
    tokens.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// A sequence, as far as its work is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens<'a> {
    pub(super) ids: &'a [u32],
    /// Those whose state is always there.
    pub(super) pinned_prefix: usize,
    /// Those whose state may come from another sequence.
    pub(super) reusable: usize,
}

impl<'a> Tokens<'a> {
    pub(super) fn of(ids: &'a [u32], pinned_prefix: usize, want: &Want) -> Self {
        let reusable = match want {
            Want::Reward => ids.len().saturating_sub(1),
            Want::TokenRewards => 0,
            Want::LogProbs(range) => range.start.saturating_sub(1),
        };
        Self { ids, pinned_prefix, reusable }
    }
}

/// Tokens to compute of each sequence. What one shares with the one before it is computed once, in whole pages.
pub(super) fn count<'a>(sequences: impl Iterator<Item = Tokens<'a>>, prefix_cache: bool) -> Vec<Work> {
    let mut last: &[u32] = &[];
    let work = sequences.map(|Tokens { ids, pinned_prefix, reusable }| {
        let same = ids.iter().zip(last).take_while(|(a, b)| a == b).count();
        let shared = if prefix_cache { same.min(reusable) / PAGE * PAGE } else { 0 };
        last = ids;
        Work::prompt(ids.len() - shared.max(pinned_prefix).min(ids.len()))
    });
    work.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::Error;

    #[test]
    fn bytes_are_estimated_ids_are_counted_and_a_shared_prompt_is_counted_once() {
        let check = |inputs: &[Result<TextInput>], expected: usize| {
            assert_eq!(estimate(inputs, &Estimator::default(), "pm", 100).0, expected, "{inputs:?}");
        };
        let text = |bytes: usize| Ok(TextInput::Text("x".repeat(bytes)));
        let ids = |n: usize| Ok(TextInput::TokenIds { ids: vec![1; n], response_start: None });
        let candidate = |prompt: &Result<TextInput>, bytes: usize| {
            let prompt = Arc::new(prompt.clone().unwrap());
            Ok(TextInput::PromptResponse { prompt, response: Response::Text("y".repeat(bytes)) })
        };
        check(&[], 0);
        check(&[text(40), ids(7), Err(Error::invalid("", "no input"))], 10 + 7);
        check(&[text(4000)], 100);
        check(&[ids(4000)], 4000);
        check(&[candidate(&text(200), 40), candidate(&text(200), 40), candidate(&text(200), 40)], 60 + 10 + 10);
        check(&[candidate(&text(200), 40), candidate(&text(204), 40)], 60 + 61);
        let conversation = [("user", "12345678"), ("assistant", "1234567")];
        let messages = conversation.map(|(role, content)| plumb_model::text::Message::new(role, content));
        check(&[Ok(TextInput::Conversation(messages.into()))], 11);
        assert_eq!(estimate(&[text(40), ids(7)], &Estimator::default(), "pm", 100), (17, 7));
    }

    #[test]
    fn what_sequences_share_is_counted_once() {
        let ids: Vec<u32> = (0..100).collect();
        let (other, longer) = ([&ids[..70], &[999; 30]].concat(), [&ids[..], &[5; 20]].concat());
        let check = |sequences: &[(&[u32], usize, Want)], cache: bool, expected: &[usize]| {
            let sequences = sequences.iter().map(|(ids, pinned, want)| Tokens::of(ids, *pinned, want));
            assert_eq!(count(sequences, cache), expected.iter().map(|n| Work::prompt(*n)).collect::<Vec<_>>());
        };
        let reward = || Want::Reward;
        check(&[(&ids, 0, reward()), (&other, 0, reward()), (&longer, 0, reward())], true, &[100, 36, 56]);
        check(&[(&ids, 0, reward()), (&longer, 0, reward()), (&ids, 0, reward())], true, &[100, 24, 4]);
        check(&[(&ids, 0, reward()), (&ids, 0, reward())], false, &[100, 100]);
        check(&[(&ids, 80, reward()), (&ids, 80, reward())], true, &[20, 4]);
        check(&[(&ids, 0, Want::LogProbs(40..100)), (&ids, 0, Want::LogProbs(40..100))], true, &[100, 68]);
        check(&[(&ids, 0, reward()), (&ids, 0, Want::TokenRewards)], true, &[100, 100]);
    }
}
