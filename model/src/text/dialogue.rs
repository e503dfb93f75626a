//! Conversations as `Human:` and `Assistant:` turns separated by a blank line (Askell et al. 2021, section 2).
//!
//! Contents stand as they are. What looks like a turn inside a content cannot be told from one.

use std::ops::Range;

use super::Message;
use super::hhh::RULE;
use crate::{Error, Result};

pub(super) const HUMAN: &str = "Human:";
pub(super) const ASSISTANT: &str = "Assistant:";

const BLANK_LINE: &str = "\n\n";

/// A conversation's text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dialogue {
    pub text: String,
    /// Bytes after the last turn's `Assistant:`, the separator included, because the model writes it too; empty at the
    /// end if the last turn is not the assistant's.
    pub response: Range<usize>,
}

/// Writes the turns. `separator` stands between a label and what is said; with `add_generation_prompt` the text ends
/// with an `Assistant:` that nothing follows.
pub(super) fn write(messages: &[Message], separator: &str, add_generation_prompt: bool) -> Result<Dialogue> {
    let mut text = String::new();
    let mut response = None;
    for (index, Message { role, content }) in messages.iter().enumerate() {
        if index > 0 {
            text.push_str(BLANK_LINE);
        }
        response = None;
        match role.as_str() {
            "system" if index == 0 => text.push_str(content),
            "user" => text.extend([HUMAN, separator, content]),
            "assistant" => {
                text.push_str(ASSISTANT);
                response = Some(text.len());
                text.extend([separator, content]);
            }
            _ => return Err(unknown_role(index, role)),
        }
    }
    if add_generation_prompt {
        text.extend([BLANK_LINE, ASSISTANT]);
        response = None;
    }
    let end = text.len();
    Ok(Dialogue { text, response: response.unwrap_or(end)..end })
}

/// What ends an answer: the next turn or the next conversation.
pub(super) fn stop_strings() -> Vec<String> {
    vec![format!("{BLANK_LINE}{HUMAN}"), format!("{BLANK_LINE}{RULE}")]
}

/// The form itself, as text to be hashed.
pub(super) fn form(separator: &str) -> String {
    format!("{{system}}{BLANK_LINE}{HUMAN}{separator}{{user}}{BLANK_LINE}{ASSISTANT}{separator}{{assistant}}")
}

fn unknown_role(index: usize, role: &str) -> Error {
    let problem = if role == "system" { "a system turn stands first" } else { "a role is user, assistant or system" };
    Error::InvalidInput(format!("turn {index} has the role `{role}`: in Human/Assistant form, {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(turns: &[(&str, &str)], separator: &str, generate: bool, text: &str, response: &str) {
        let messages: Vec<_> = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        let dialogue = write(&messages, separator, generate).unwrap();
        assert_eq!(dialogue.text, text);
        assert_eq!(&dialogue.text[dialogue.response.clone()], response);
        assert_eq!(dialogue.response.end, dialogue.text.len());
    }

    #[test]
    fn turns_become_paragraphs() {
        let user = ("user", "q");
        let answer = ("assistant", "a\n\nb ");
        check(&[user], " ", false, "Human: q", "");
        check(&[user], "  ", true, "Human:  q\n\nAssistant:", "");
        check(&[user, answer], "  ", false, "Human:  q\n\nAssistant:  a\n\nb ", "  a\n\nb ");
        check(&[answer], " ", false, "Assistant: a\n\nb ", " a\n\nb ");
        check(&[("system", "Be kind."), user], " ", true, "Be kind.\n\nHuman: q\n\nAssistant:", "");
        check(&[user, ("assistant", ""), user], " ", false, "Human: q\n\nAssistant: \n\nHuman: q", "");
    }

    #[test]
    fn other_roles_are_refused() {
        for (index, role) in [(0, "tool"), (0, ""), (1, "system"), (1, "User")] {
            let mut messages = vec![Message::new("user", "q"); 2];
            messages[index].role = role.to_owned();
            let error = write(&messages, " ", false).unwrap_err().to_string();
            assert!(error.starts_with(&format!("turn {index} has the role `{role}`")), "{error}");
        }
    }
}
