//! From the wire's messages to the model crate's types. An enum value that the server does not know is refused, never
//! taken for the default.

use std::sync::Arc;

use plumb_model::text::{self, ChatFormat, HhhPrompt, Message, RenderOptions, Response, TextInput, Truncation};
use plumb_proto::v1;

use super::limits;
use crate::engine::Priority;
use crate::error::{Error, Result};

/// An input, in whichever form it came.
pub(super) fn text_input(input: &v1::Input) -> Result<TextInput> {
    limits::input(input)?;
    match &input.input {
        None => Err(Error::invalid("", "one of `conversation`, `text` and `token_ids` is needed")),
        Some(v1::input::Input::Text(text)) => Ok(TextInput::Text(text.clone())),
        Some(v1::input::Input::Conversation(conversation)) => {
            let messages = conversation.messages.iter();
            Ok(TextInput::Conversation(messages.map(|m| Message::new(m.role.as_str(), m.content.as_str())).collect()))
        }
        Some(v1::input::Input::TokenIds(ids)) => Ok(TextInput::TokenIds {
            ids: ids.ids.clone(),
            response_start: ids.response_start.map(|start| start as usize),
        }),
    }
}

/// A candidate's response, joined to the prompt that it answers.
pub(super) fn candidate_input(prompt: &Arc<TextInput>, candidate: &v1::Candidate) -> Result<TextInput> {
    let response = match (&candidate.candidate, &**prompt) {
        (Some(v1::candidate::Candidate::Text(text)), TextInput::Conversation(_) | TextInput::Text(_)) => {
            Response::Text(text.clone())
        }
        (Some(v1::candidate::Candidate::TokenIds(ids)), TextInput::TokenIds { .. }) => {
            if ids.response_start.is_some() {
                return Err(Error::invalid("token_ids.response_start", "a candidate is a response as a whole"));
            }
            limits::token_ids(ids)?;
            Response::TokenIds(ids.ids.clone())
        }
        (None, _) => return Err(Error::invalid("", "one of `text` and `token_ids` is needed")),
        _ => return Err(Error::invalid("", "a prompt of token ids takes token ids, any other prompt takes text")),
    };
    Ok(TextInput::PromptResponse { prompt: Arc::clone(prompt), response })
}

/// How inputs become tokens. `longest` is what the model takes.
pub(super) fn render_options(
    options: Option<&v1::TextOptions>,
    longest: usize,
    auto_truncate: bool,
) -> Result<RenderOptions> {
    let default = v1::TextOptions::default();
    let options = options.unwrap_or(&default);
    let max_tokens = options.max_tokens.map(|tokens| tokens as usize);
    if let Some(tokens) = max_tokens
        && !(1..=longest).contains(&tokens)
    {
        return Err(Error::invalid("text.max_tokens", format!("{tokens} is not in 1..={longest}")));
    }
    Ok(RenderOptions {
        chat_format: match known("text.chat_format", options.chat_format)? {
            v1::ChatFormat::Unspecified => ChatFormat::Auto,
            v1::ChatFormat::Template => ChatFormat::Template,
            v1::ChatFormat::HumanAssistant => ChatFormat::HumanAssistant,
        },
        hhh_prompt: match known("text.hhh_prompt", options.hhh_prompt)? {
            v1::HhhPrompt::Unspecified | v1::HhhPrompt::None => HhhPrompt::None,
            v1::HhhPrompt::Full => HhhPrompt::Full,
            v1::HhhPrompt::Short => HhhPrompt::Short,
        },
        truncation: match known("text.truncation", options.truncation)? {
            v1::Truncation::Unspecified if auto_truncate => Truncation::Left,
            v1::Truncation::Unspecified | v1::Truncation::Refuse => Truncation::Refuse,
            v1::Truncation::Left => Truncation::Left,
            v1::Truncation::Right => Truncation::Right,
        },
        max_tokens,
    })
}

/// How a language model's score is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Objective {
    MeanLogProb,
    SumLogProb,
    MutualInformation,
}

impl Objective {
    pub(super) fn parse(value: i32) -> Result<Self> {
        Ok(match known("objective", value)? {
            v1::Objective::Unspecified | v1::Objective::MeanLogProb => Self::MeanLogProb,
            v1::Objective::SumLogProb => Self::SumLogProb,
            v1::Objective::MutualInformation => Self::MutualInformation,
        })
    }
}

pub(super) fn priority(value: i32) -> Result<Priority> {
    Ok(match known("priority", value)? {
        v1::Priority::Unspecified | v1::Priority::Normal => Priority::Normal,
        v1::Priority::Low => Priority::Low,
        v1::Priority::High => Priority::High,
    })
}

/// Tokens of the HHH prompt that is asked for, all of which stand first in an input.
pub(super) fn pinned_prefix(rendered: &text::Rendered, options: &RenderOptions) -> usize {
    if options.hhh_prompt == HhhPrompt::None { 0 } else { rendered.prefix_len }
}

fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Result<E> {
    E::try_from(value).map_err(|_| Error::invalid(field, format!("{value} is not a value of this enum")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let check = |result: Result<()>, field: &str| {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::InvalidArgument { field: f, .. } if f == field), "{error:?}");
        };
        let options = |change: fn(&mut v1::TextOptions)| {
            let mut options = v1::TextOptions::default();
            change(&mut options);
            render_options(Some(&options), 8, false).map(drop)
        };
        check(options(|options| options.chat_format = 99), "text.chat_format");
        check(options(|options| options.hhh_prompt = -1), "text.hhh_prompt");
        check(options(|options| options.truncation = 4), "text.truncation");
        check(options(|options| options.max_tokens = Some(0)), "text.max_tokens");
        check(options(|options| options.max_tokens = Some(9)), "text.max_tokens");
        check(Objective::parse(4).map(drop), "objective");
        check(priority(4).map(drop), "priority");
    }

    #[test]
    fn truncation_is_refused_unless_somebody_asks_for_it() {
        let check = |asked: v1::Truncation, auto: bool, expected: Truncation| {
            let options = v1::TextOptions { truncation: asked.into(), ..v1::TextOptions::default() };
            assert_eq!(render_options(Some(&options), 8, auto).unwrap().truncation, expected, "{asked:?}, auto {auto}");
        };
        check(v1::Truncation::Unspecified, false, Truncation::Refuse);
        check(v1::Truncation::Unspecified, true, Truncation::Left);
        check(v1::Truncation::Refuse, true, Truncation::Refuse);
        check(v1::Truncation::Right, false, Truncation::Right);
        assert_eq!(render_options(None, 8, false).unwrap(), RenderOptions::default());
    }

    #[test]
    fn candidates_have_the_form_of_their_prompt() {
        let text = v1::Candidate { candidate: Some(v1::candidate::Candidate::Text("a".to_owned())) };
        let ids = |response_start| {
            let ids = v1::TokenIds { ids: vec![1], response_start };
            v1::Candidate { candidate: Some(v1::candidate::Candidate::TokenIds(ids)) }
        };
        let of_text = Arc::new(TextInput::Text("q".to_owned()));
        let of_ids = Arc::new(TextInput::TokenIds { ids: vec![5], response_start: None });
        assert!(candidate_input(&of_text, &text).is_ok());
        assert!(candidate_input(&of_ids, &ids(None)).is_ok());
        assert!(candidate_input(&of_text, &ids(None)).is_err());
        assert!(candidate_input(&of_ids, &text).is_err());
        assert!(candidate_input(&of_ids, &ids(Some(0))).is_err());
        assert!(candidate_input(&of_text, &v1::Candidate::default()).is_err());
    }
}
