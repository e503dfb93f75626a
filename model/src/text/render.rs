//! An input's way to tokens: join prompt and response, write the text, tokenize it, mark the response, cut to the
//! limit.

use std::borrow::Cow;
use std::ops::Range;

use super::locate::locate;
use super::pipeline::{Form, Prepared, TextPipeline, check_size};
use super::template::{ChatTemplate, Failure};
use super::tokens::{Encoded, Lead};
use super::truncate::Tokens;
use super::{HhhPrompt, Message, RenderMode, RenderOptions, Response, TextInput, dialogue};
use crate::{Error, Result};

/// Most turns in a conversation.
pub const MAX_MESSAGES: usize = 4096;

/// What a model is fed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text before truncation, HHH prompt included; empty for token ids.
    pub text: String,
    /// The tokens, special tokens included.
    pub ids: Vec<u32>,
    /// Which of the tokens are the response; empty at the end if there is none. It never begins at the first token,
    /// whose probability has no condition.
    pub response: Range<usize>,
    /// sha256 in hexadecimal of the chat template, or of the `Human:`/`Assistant:` form and its prompt; empty for token
    /// ids and for a text without HHH prompt.
    pub template_sha256: String,
    /// True if tokens were dropped.
    pub truncated: bool,
    /// How many of the tokens, from the first, are [`TextPipeline::hhh_prefix_ids`].
    pub prefix_len: usize,
}

impl Rendered {
    /// The response of an input that is to be scored by its log-probability.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidInput`] if it has none.
    pub fn require_response(&self) -> Result<Range<usize>> {
        if self.response.is_empty() {
            let reason = if self.truncated {
                "no token of the response is left after truncation"
            } else {
                "there is no response to score: a conversation must end with an assistant turn that the chat template \
                 keeps, other inputs must have more than one token"
            };
            return Err(Error::InvalidInput(reason.into()));
        }
        Ok(self.response.clone())
    }
}

/// An input whose prompt and response have been joined.
enum Joined<'a> {
    Conversation(Cow<'a, [Message]>),
    Text { text: Cow<'a, str>, response_start: Option<usize> },
    TokenIds { ids: Cow<'a, [u32]>, response_start: Option<usize> },
}

/// A text that is ready to be tokenized.
struct Draft {
    /// What stands before it, tokenized already.
    hhh: HhhPrompt,
    text: String,
    /// Whether it gets the tokenizer's special tokens.
    special: bool,
    response: Part,
    template_sha256: String,
}

/// Where a text's response is.
enum Part {
    /// These bytes.
    Bytes(Range<usize>),
    /// All tokens but the first.
    AfterFirstToken,
    Nowhere,
}

impl TextPipeline {
    /// The tokens of an input.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidInput`] for what makes no sense, [`Error::TooLong`] for what does not fit.
    pub fn render(&self, input: &TextInput, options: &RenderOptions, mode: RenderMode) -> Result<Rendered> {
        let limit = self.limit(options)?;
        let (text, template_sha256, prefix_len, mut tokens) = match join(input)? {
            Joined::TokenIds { ids, response_start } => {
                if options.hhh_prompt != HhhPrompt::None {
                    return invalid("the HHH prompt does not go with token ids, which are fed as they are");
                }
                (String::new(), String::new(), 0, self.token_ids(&ids, response_start, mode)?)
            }
            joined => {
                let draft = match joined {
                    Joined::Conversation(messages) => self.conversation(&messages, options, mode)?,
                    Joined::Text { text, response_start } => self.text(&text, response_start, options, mode)?,
                    Joined::TokenIds { .. } => return invalid("token ids are no text"),
                };
                let prefix = self.prepared(draft.hhh);
                let tokens = self.tokens(&draft, mode)?;
                (prefix.text.clone() + &draft.text, draft.template_sha256, prefix.ids.len(), tokens)
            }
        };
        if tokens.ids.is_empty() {
            return invalid("the input has no tokens");
        }
        if mode == RenderMode::Unconditional {
            self.give_context(&mut tokens)?;
        }
        let truncated = tokens.truncate(options.truncation, limit)?;
        let Tokens { ids, response, .. } = tokens;
        let response = response.start.max(1).min(ids.len())..response.end.max(1).min(ids.len());
        Ok(Rendered { text, ids, response, template_sha256, truncated, prefix_len })
    }

    fn limit(&self, options: &RenderOptions) -> Result<usize> {
        match options.max_tokens {
            Some(0) => invalid("max_tokens is 0"),
            Some(limit) if limit > self.max_tokens => {
                invalid(&format!("max_tokens is {limit}, the model takes {} tokens", self.max_tokens))
            }
            Some(limit) => Ok(limit),
            None => Ok(self.max_tokens),
        }
    }

    /// Writes a conversation.
    fn conversation(&self, messages: &[Message], options: &RenderOptions, mode: RenderMode) -> Result<Draft> {
        let kept;
        let messages = if mode == RenderMode::Unconditional {
            kept = without_query(messages)?;
            &kept
        } else {
            messages
        };
        let generate = mode == RenderMode::Generate;
        match self.form(options)? {
            Form::Template(template) => {
                let (text, response) = from_template(template, messages, mode)?;
                let template_sha256 = template.sha256().to_owned();
                Ok(Draft { hhh: HhhPrompt::None, text, special: false, response, template_sha256 })
            }
            Form::HumanAssistant(form) => {
                let dialogue = dialogue::write(messages, &form.separator, generate)?;
                Ok(Draft {
                    hhh: options.hhh_prompt,
                    text: dialogue.text,
                    special: true,
                    response: Part::Bytes(dialogue.response),
                    template_sha256: form.sha256.clone(),
                })
            }
        }
    }

    /// Takes a text as it is.
    fn text(
        &self,
        text: &str,
        response_start: Option<usize>,
        options: &RenderOptions,
        mode: RenderMode,
    ) -> Result<Draft> {
        let hhh = options.hhh_prompt;
        let whole = text.len();
        // Behind a prompt that begins with the special tokens, the text's own would be the second.
        let text = if hhh == HhhPrompt::None { text } else { self.codec.strip_lead(text)? };
        let response_start = response_start.map(|start| start.saturating_sub(whole - text.len()));
        let (text, response) = match (mode, response_start) {
            (RenderMode::Generate, _) => (text, Part::Nowhere),
            (RenderMode::Score, None) if hhh == HhhPrompt::None => (text, Part::AfterFirstToken),
            (RenderMode::Score, None) => (text, Part::Bytes(0..text.len())),
            (RenderMode::Score, Some(start)) => (text, Part::Bytes(start..text.len())),
            (RenderMode::Unconditional, None) => return Err(no_query()),
            (RenderMode::Unconditional, Some(start)) => (&text[start..], Part::Bytes(0..text.len() - start)),
        };
        let template_sha256 = if hhh == HhhPrompt::None { String::new() } else { self.prepared(hhh).sha256.clone() };
        Ok(Draft { hhh, text: text.to_owned(), special: true, response, template_sha256 })
    }

    /// Tokenizes a draft behind its HHH prompt.
    fn tokens(&self, draft: &Draft, mode: RenderMode) -> Result<Tokens> {
        let Prepared { ids: prefix, tail, .. } = self.prepared(draft.hhh);
        let lead = if draft.special && prefix.is_empty() { Lead::Once } else { Lead::AsWritten };
        // A text that is to be continued must not end with the token that ends texts.
        let trail = draft.special && mode != RenderMode::Generate;
        let Encoded { mut ids, spans } = self.codec.encode(&format!("{tail}{}", draft.text), lead, trail)?;
        let response = match &draft.response {
            Part::Bytes(bytes) => covering(&spans, &(bytes.start + tail.len()..bytes.end + tail.len())),
            Part::AfterFirstToken => 1.min(ids.len())..ids.len(),
            Part::Nowhere => ids.len()..ids.len(),
        };
        if prefix.is_empty() {
            return Ok(Tokens { keep: self.leading_special(&ids), ids, response });
        }
        ids.splice(0..0, prefix.iter().copied());
        let response = response.start + prefix.len()..response.end + prefix.len();
        Ok(Tokens { ids, response, keep: prefix.len() })
    }

    /// Takes token ids as they are.
    fn token_ids(&self, ids: &[u32], response_start: Option<usize>, mode: RenderMode) -> Result<Tokens> {
        if let Some((index, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= self.vocab_size) {
            return invalid(&format!("token {index} is {id}, the model has {} tokens", self.vocab_size));
        }
        if let Some(start) = response_start.filter(|start| *start == 0 || *start > ids.len()) {
            return invalid(&format!("the response starts at token {start} of {}; it must be 1 or more", ids.len()));
        }
        let keep = self.leading_special(ids);
        let response = match (mode, response_start) {
            (RenderMode::Score, start) => start.unwrap_or(1).min(ids.len())..ids.len(),
            (RenderMode::Generate, _) => ids.len()..ids.len(),
            (RenderMode::Unconditional, None) => return Err(no_query()),
            (RenderMode::Unconditional, Some(start)) => {
                let lead = self.codec.lead();
                let response = lead.len()..lead.len() + ids.len() - start;
                return Ok(Tokens { ids: [lead, &ids[start..]].concat(), response, keep: lead.len() });
            }
        };
        Ok(Tokens { ids: ids.to_vec(), response, keep })
    }

    /// How many special tokens at the start truncation keeps: those that the tokenizer puts there, or a BOS.
    fn leading_special(&self, ids: &[u32]) -> usize {
        let lead = self.codec.lead();
        match ids.first() {
            Some(_) if !lead.is_empty() && ids.starts_with(lead) => lead.len(),
            Some(&first) if Some(first) == self.bos => 1,
            _ => 0,
        }
    }

    /// Puts a special token before a response that nothing stands before.
    fn give_context(&self, tokens: &mut Tokens) -> Result<()> {
        if tokens.response.start > 0 {
            return Ok(());
        }
        let Some(context) = self.context else {
            let reason = "the model has no BOS or EOS token that a response without its query could stand behind";
            return invalid(reason);
        };
        tokens.ids.insert(0, context);
        tokens.response = tokens.response.start + 1..tokens.response.end + 1;
        tokens.keep += 1;
        Ok(())
    }
}

/// Joins prompt and response, and refuses what is empty or too large.
fn join(input: &TextInput) -> Result<Joined<'_>> {
    let joined = match input {
        TextInput::Conversation(messages) => Joined::Conversation(messages.into()),
        TextInput::Text(text) => Joined::Text { text: text.into(), response_start: None },
        TextInput::TokenIds { ids, response_start } => {
            Joined::TokenIds { ids: ids.into(), response_start: *response_start }
        }
        TextInput::PromptResponse { prompt, response } => append(join(prompt)?, prompt, response)?,
    };
    match &joined {
        Joined::Conversation(messages) if messages.is_empty() => invalid("the conversation is empty"),
        Joined::Conversation(messages) if messages.len() > MAX_MESSAGES => {
            invalid(&format!("the conversation has {} turns, {MAX_MESSAGES} are allowed", messages.len()))
        }
        Joined::Conversation(messages) => {
            check_size(messages.iter().map(|message| message.role.len() + message.content.len()).sum())?;
            Ok(joined)
        }
        Joined::Text { text, .. } if text.is_empty() => invalid("the text is empty"),
        Joined::Text { text, .. } => {
            check_size(text.len())?;
            Ok(joined)
        }
        Joined::TokenIds { ids, .. } if ids.is_empty() => invalid("there are no token ids"),
        Joined::TokenIds { .. } => Ok(joined),
    }
}

fn append<'a>(joined: Joined<'a>, prompt: &TextInput, response: &'a Response) -> Result<Joined<'a>> {
    if matches!(prompt, TextInput::PromptResponse { .. }) {
        return invalid("the prompt has a response already");
    }
    match (joined, response) {
        (Joined::Conversation(messages), Response::Text(text)) => {
            if messages.last().is_some_and(|message| message.role == "assistant") {
                return invalid("the prompt ends with an assistant turn: a response follows a user turn");
            }
            let mut messages = messages.into_owned();
            messages.push(Message::new("assistant", text));
            Ok(Joined::Conversation(messages.into()))
        }
        (Joined::Text { text, .. }, Response::Text(response)) => {
            Ok(Joined::Text { response_start: Some(text.len()), text: text + response.as_str() })
        }
        (Joined::TokenIds { ids, .. }, Response::TokenIds(response)) => {
            let response_start = Some(ids.len());
            let mut ids = ids.into_owned();
            ids.extend(response);
            Ok(Joined::TokenIds { ids: ids.into(), response_start })
        }
        (Joined::TokenIds { .. }, Response::Text(_)) => invalid("the prompt is token ids, the response is text"),
        (_, Response::TokenIds(_)) => invalid("the response is token ids, the prompt is text"),
    }
}

/// System turns and the response: what is left if the query goes.
fn without_query(messages: &[Message]) -> Result<Vec<Message>> {
    match messages.split_last() {
        Some((response, query)) if response.role == "assistant" => {
            let system = query.iter().filter(|message| message.role == "system");
            Ok(system.chain([response]).cloned().collect())
        }
        _ => Err(no_query()),
    }
}

fn from_template(template: &ChatTemplate, messages: &[Message], mode: RenderMode) -> Result<(String, Part)> {
    if mode == RenderMode::Generate {
        return Ok((template.render(messages, true)?, Part::Nowhere));
    }
    if mode == RenderMode::Score {
        let text = template.render(messages, false)?;
        let answered = messages.last().is_some_and(|message| message.role == "assistant");
        let response = if answered { locate(template, messages, &text)? } else { None };
        return Ok((text, response.map_or(Part::Nowhere, Part::Bytes)));
    }
    let advice = "; for mutual information, CHAT_FORMAT_HUMAN_ASSISTANT always works";
    let text = template.render(messages, false).map_err(|failure| match failure {
        Failure::Refused(reason) => Error::InvalidInput(reason + advice),
        failure => failure.into(),
    })?;
    match locate(template, messages, &text)? {
        Some(response) => Ok((text, Part::Bytes(response))),
        None => invalid(&format!("the chat template does not keep the response{advice}")),
    }
}

/// The tokens that stand for at least one of the bytes. A token that begins before them belongs to them.
fn covering(spans: &[Range<usize>], bytes: &Range<usize>) -> Range<usize> {
    let covers = |span: &Range<usize>| !bytes.is_empty() && span.end > bytes.start && span.start < bytes.end;
    match (spans.iter().position(covers), spans.iter().rposition(covers)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => spans.len()..spans.len(),
    }
}

fn no_query() -> Error {
    let reason = "mutual information needs a query and a response: a conversation that ends with an assistant turn, \
                  token ids with response_start, or a prompt and a candidate";
    Error::InvalidInput(reason.into())
}

fn invalid<T>(reason: &str) -> Result<T> {
    Err(Error::InvalidInput(reason.into()))
}
