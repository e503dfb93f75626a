//! From lines of preference data to tokens.
//!
//! A line is a JSON object: `{"text"}`; `{"prompt", "chosen", "rejected"}`; or `{"chosen", "rejected"}`. A prompt and its
//! sides are strings, or lists of `{"role", "content"}` turns.

use std::collections::BTreeMap;
use std::path::PathBuf;

use plumb_model::text::{Message, RenderMode, RenderOptions, Response, TextInput, TextPipeline};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::input::{BadLines, Lines};

/// What binarised pairs begin with (Askell et al. 2021, section 4.1): a good one, and a bad one.
pub(crate) const TAGS: [&str; 2] = ["GOOD:", "BAD:"];

/// Tokens of an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Example {
    /// A text.
    Text(Side),
    /// A better and a worse sequence.
    Pair {
        /// The better one.
        chosen: Side,
        /// The worse one.
        rejected: Side,
    },
}

/// A sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Token ids, the end-of-context token last.
    pub tokens: Vec<u32>,
    /// Where the response begins; 1 in a text.
    pub response: usize,
}

/// What was read, and what was not, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Lines that are not empty.
    pub lines: u64,
    /// Examples.
    pub examples: u64,
    /// Tokens of all their sequences.
    pub tokens: u64,
    /// Sequences that lost their beginning, being too long.
    pub cut: u64,
    /// Examples that were left out, by reason.
    pub dropped: BTreeMap<&'static str, u64>,
}

/// How lines become tokens.
pub struct Reader<'a> {
    /// Templates and tokenizer.
    pub text: &'a TextPipeline,
    /// Token that ends every sequence.
    pub end_of_context: u32,
    /// Special tokens that begin every sequence.
    pub beginning: usize,
    /// Most tokens of a sequence, at least 2.
    pub max_tokens: usize,
    /// Makes several examples of a longer text, rather than cutting its beginning.
    pub split_texts: bool,
    /// Bad lines after which to stop.
    pub max_bad_lines: u64,
}

#[derive(Deserialize)]
struct Line {
    text: Option<String>,
    prompt: Option<Turns>,
    chosen: Option<Turns>,
    rejected: Option<Turns>,
}

/// A string, or turns.
#[derive(Clone, Deserialize, PartialEq)]
#[serde(untagged)]
pub(crate) enum Turns {
    Text(String),
    Conversation(Vec<Turn>),
}

/// Who says what.
#[derive(Clone, Deserialize, PartialEq)]
pub(crate) struct Turn {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// Why an example is left out.
pub(crate) enum Problem {
    /// The line makes no sense.
    Bad(String),
    /// It does, and nothing can be learned from it.
    Useless(&'static str),
}

impl Reader<'_> {
    /// Reads files, packed ones too. A bad line is reported through `warn` with its file and number, and skipped.
    ///
    /// # Errors
    /// If a file cannot be read, or more lines are bad than allowed.
    pub fn read(&self, files: &[PathBuf], warn: &mut dyn FnMut(&str)) -> Result<(Vec<Example>, Counts)> {
        let (mut examples, mut counts) = (Vec::new(), Counts::default());
        let mut bad = BadLines::at_most(self.max_bad_lines);
        for path in files {
            let mut lines = Lines::open(path)?;
            while let Some((number, line)) = lines.next()? {
                counts.lines += 1;
                let reason = match self.example(&line, &mut counts) {
                    Ok(found) => {
                        counts.examples += found.len() as u64;
                        let sides = found.iter().flat_map(Example::sides);
                        counts.tokens += sides.map(|side| side.tokens.len() as u64).sum::<u64>();
                        examples.extend(found);
                        continue;
                    }
                    Err(Problem::Useless(reason)) => {
                        *counts.dropped.entry(reason).or_default() += 1;
                        continue;
                    }
                    Err(Problem::Bad(reason)) => reason,
                };
                *counts.dropped.entry("bad line").or_default() += 1;
                bad.skip(path, number, &reason, warn)?;
            }
        }
        Ok((examples, counts))
    }

    fn example(&self, line: &[u8], counts: &mut Counts) -> std::result::Result<Vec<Example>, Problem> {
        let line: Line = serde_json::from_slice(line).map_err(|error| Problem::Bad(error.to_string()))?;
        match line {
            Line { text: Some(text), prompt: None, chosen: None, rejected: None } => {
                if text.is_empty() {
                    return Err(Problem::Useless("empty text"));
                }
                let input = TextInput::Text(text);
                if !self.split_texts {
                    return Ok(vec![Example::Text(self.side(&input, counts)?)]);
                }
                // Whatever its length, all of a text is learned.
                let rendered = self.text.render(&input, &RenderOptions::default(), RenderMode::Score);
                let ids = rendered.map_err(|error| Problem::Bad(error.to_string()))?.ids;
                let parts = ids.chunks(self.max_tokens).filter(|part| part.len() > 1);
                Ok(parts.map(|part| Example::Text(Side { tokens: part.to_vec(), response: 1 })).collect())
            }
            Line { text: None, prompt, chosen: Some(chosen), rejected: Some(rejected) } => {
                if chosen == rejected {
                    return Err(Problem::Useless("equal sides"));
                }
                let [chosen, rejected] = [chosen, rejected].map(|side| {
                    let input = input(prompt.clone(), side)?;
                    self.side(&input, counts)
                });
                let (chosen, rejected) = (chosen?, rejected?);
                if chosen.tokens == rejected.tokens {
                    return Err(Problem::Useless("equal sides after cutting"));
                }
                Ok(vec![Example::Pair { chosen, rejected }])
            }
            _ => Err(Problem::Bad("expected text, or chosen and rejected with or without a prompt".to_owned())),
        }
    }

    fn side(&self, input: &TextInput, counts: &mut Counts) -> std::result::Result<Side, Problem> {
        let bad = |error: plumb_model::Error| Problem::Bad(error.to_string());
        let rendered = self.text.render(input, &RenderOptions::default(), RenderMode::Score).map_err(bad)?;
        let (mut tokens, mut response) = (rendered.ids, rendered.response.start);
        if tokens.last() != Some(&self.end_of_context) {
            return Err(Problem::Bad("the text does not end with the end-of-context token".to_owned()));
        }
        if tokens.len() < 2 || rendered.response.is_empty() {
            return Err(Problem::Useless("no response"));
        }
        if tokens.len() > self.max_tokens {
            counts.cut += 1;
            // What begins every text stays, and so does the tag of a binarised pair: without it both sides are the same.
            let kept = self.beginning + self.tag(&rendered.text, &tokens).map_err(bad)?;
            let kept = kept.min(self.max_tokens - 1);
            let dropped = tokens.len() - self.max_tokens;
            tokens.drain(kept..kept + dropped);
            response = response.saturating_sub(dropped).max(kept).max(1);
        }
        Ok(Side { tokens, response })
    }

    /// Tokens of the tag at the beginning of a binarised text.
    fn tag(&self, text: &str, tokens: &[u32]) -> plumb_model::Result<usize> {
        let Some(tag) = TAGS.into_iter().find(|tag| text.starts_with(tag)) else { return Ok(0) };
        let ids: Vec<u32> = self.text.tokenize(tag, false)?.into_iter().map(|token| token.id).collect();
        Ok(if tokens[self.beginning.min(tokens.len())..].starts_with(&ids) { ids.len() } else { 0 })
    }
}

impl Example {
    /// Its sequences.
    pub fn sides(&self) -> impl Iterator<Item = &Side> {
        let (first, second) = match self {
            Self::Text(side) => (side, None),
            Self::Pair { chosen, rejected } => (chosen, Some(rejected)),
        };
        [first].into_iter().chain(second)
    }
}

/// A side with what stands before it.
pub(crate) fn input(prompt: Option<Turns>, side: Turns) -> std::result::Result<TextInput, Problem> {
    let empty = || Problem::Useless("empty response");
    let turns = |turns: Vec<Turn>| turns.into_iter().map(|turn| Message::new(turn.role, turn.content));
    match (prompt, side) {
        (_, Turns::Text(text)) if text.is_empty() => Err(empty()),
        (_, Turns::Conversation(list)) if list.last().is_none_or(|turn| turn.content.is_empty()) => Err(empty()),
        (None, Turns::Text(text)) => Ok(TextInput::Text(text)),
        (None, Turns::Conversation(list)) => Ok(TextInput::Conversation(turns(list).collect())),
        (Some(Turns::Text(prompt)), Turns::Text(text)) => {
            Ok(TextInput::PromptResponse { prompt: Box::new(TextInput::Text(prompt)), response: Response::Text(text) })
        }
        (Some(Turns::Conversation(prompt)), Turns::Text(text)) => Ok(TextInput::PromptResponse {
            prompt: Box::new(TextInput::Conversation(turns(prompt).collect())),
            response: Response::Text(text),
        }),
        (Some(Turns::Conversation(prompt)), Turns::Conversation(list)) => {
            Ok(TextInput::Conversation(turns(prompt).chain(turns(list)).collect()))
        }
        (Some(Turns::Text(_)), Turns::Conversation(_)) => {
            Err(Problem::Bad("a prompt that is a string with a side that is a list of turns".to_owned()))
        }
    }
}
