//! From lines of preference data to tokens.
//!
//! A line is a JSON object: `{"text"}`; `{"prompt", "chosen", "rejected"}`; or `{"chosen", "rejected"}`. A prompt and its
//! sides are strings, or lists of `{"role", "content"}` turns.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plumb_model::text::{Message, RenderMode, RenderOptions, Response, TextInput, TextPipeline};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::examples::{Example, Examples, Side};
use crate::input::{BadLines, Lines};
use crate::store::Writer;

/// Lines that are tokenized together, on all threads.
const LINES: usize = 1024;

/// What binarised pairs begin with (Askell et al. 2021, section 4.1): a good one, and a bad one.
pub(crate) const TAGS: [&str; 2] = ["GOOD:", "BAD:"];

/// What was read, and what was not, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Lines that are not empty.
    pub lines: u64,
    /// Examples.
    pub examples: u64,
    /// Those of them that are no pairs.
    #[serde(skip)]
    pub texts: u64,
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

/// What a line came to.
struct Found {
    examples: Vec<Example>,
    /// Sequences that lost their beginning.
    cut: u64,
}

/// Why an example is left out.
pub(crate) enum Problem {
    /// The line makes no sense.
    Bad(String),
    /// It does, and nothing can be learned from it.
    Useless(&'static str),
}

/// The dialogue of a line: a text is what a person says; of a pair, the prompt is, and the chosen side answers it.
pub(crate) fn dialogue(line: &[u8]) -> std::result::Result<Vec<Message>, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    // As Stack Exchange's questions and answers are prepared (Askell et al. 2021, appendices B.5 and C.1).
    let said =
        |role: &str, text: &str, label: &str| Message::new(role, text.strip_prefix(label).unwrap_or(text).trim());
    let user = |text: &str| said("user", text, "Question: ");
    let turns = |turns: Vec<Turn>| turns.into_iter().map(|turn| Message::new(turn.role, turn.content));
    let mut messages = match (line.text, line.prompt) {
        (Some(text), None) if line.chosen.is_none() => vec![user(&text)],
        (None, Some(Turns::Text(text))) => vec![user(&text)],
        (None, Some(Turns::Conversation(list))) => turns(list).collect(),
        (None, None) => Vec::new(),
        _ => return Err("expected text, or chosen with or without a prompt".to_owned()),
    };
    match line.chosen {
        None => {}
        Some(Turns::Text(_)) if messages.is_empty() => {
            return Err("a chosen side that is a text, without a prompt".to_owned());
        }
        Some(Turns::Text(text)) => messages.push(said("assistant", &text, "Answer: ")),
        Some(Turns::Conversation(list)) => messages.extend(turns(list)),
    }
    match messages.iter().any(|message| message.content.is_empty()) || messages.is_empty() {
        true => Err("nothing is said in it".to_owned()),
        false => Ok(messages),
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lines, examples, tokens, cut, dropped, .. } = self;
        write!(f, "{examples} examples of {tokens} tokens in {lines} lines; cut {cut}; left out ")?;
        let dropped: Vec<String> = dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        f.write_str(&if dropped.is_empty() { "nothing".to_owned() } else { dropped.join(", ") })
    }
}

impl Counts {
    pub(crate) fn add(&mut self, example: &Example) {
        self.examples += 1;
        self.tokens += example.sides().map(|side| side.tokens.len() as u64).sum::<u64>();
        self.texts += u64::from(matches!(example, Example::Text(_)));
    }
}

impl Reader<'_> {
    /// Reads files, packed ones too, into a file of the folder that goes with the examples. A bad line is reported through
    /// `warn` with its file and number, and skipped.
    ///
    /// # Errors
    /// If a file cannot be read, the folder cannot be written, or more lines are bad than allowed.
    pub fn read(&self, files: &[PathBuf], folder: &Path, warn: &mut dyn FnMut(&str)) -> Result<(Examples, Counts)> {
        let (mut writer, mut counts) = (Writer::nameless(folder)?, Counts::default());
        let mut bad = BadLines::at_most(self.max_bad_lines);
        for path in files {
            let mut lines = Lines::open(path)?;
            loop {
                let mut some = Vec::new();
                while some.len() < LINES
                    && let Some(line) = lines.next()?
                {
                    some.push(line);
                }
                if some.is_empty() {
                    break;
                }
                let found: Vec<_> = some.par_iter().map(|(number, line)| (*number, self.example(line))).collect();
                for (number, found) in found {
                    counts.lines += 1;
                    let reason = match found {
                        Ok(found) => {
                            found.examples.iter().try_for_each(|example| {
                                counts.add(example);
                                writer.push(&example.encode())
                            })?;
                            counts.cut += found.cut;
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
        }
        Ok((Examples::new(writer.finish()?), counts))
    }

    fn example(&self, line: &[u8]) -> std::result::Result<Found, Problem> {
        let line: Line = serde_json::from_slice(line).map_err(|error| Problem::Bad(error.to_string()))?;
        match line {
            Line { text: Some(text), prompt: None, chosen: None, rejected: None } => {
                if text.is_empty() {
                    return Err(Problem::Useless("empty text"));
                }
                let input = TextInput::Text(text);
                if !self.split_texts {
                    let (side, cut) = self.side(&input)?;
                    return Ok(Found { examples: vec![Example::Text(side)], cut: cut.into() });
                }
                // Whatever its length, all of a text is learned.
                let rendered = self.text.render(&input, &RenderOptions::default(), RenderMode::Score);
                let ids = rendered.map_err(|error| Problem::Bad(error.to_string()))?.ids;
                let parts = ids.chunks(self.max_tokens).filter(|part| part.len() > 1);
                let text = |part: &[u32]| Example::Text(Side { tokens: part.to_vec(), response: 1 });
                Ok(Found { examples: parts.map(text).collect(), cut: 0 })
            }
            Line { text: None, prompt, chosen: Some(chosen), rejected: Some(rejected) } => {
                if chosen == rejected {
                    return Err(Problem::Useless("equal sides"));
                }
                let [chosen, rejected] = [chosen, rejected].map(|side| {
                    let input = input(prompt.clone(), side)?;
                    self.side(&input)
                });
                let ((chosen, first), (rejected, second)) = (chosen?, rejected?);
                if chosen.tokens == rejected.tokens {
                    return Err(Problem::Useless("equal sides after cutting"));
                }
                let cut = u64::from(first) + u64::from(second);
                Ok(Found { examples: vec![Example::Pair { chosen, rejected }], cut })
            }
            _ => Err(Problem::Bad("expected text, or chosen and rejected with or without a prompt".to_owned())),
        }
    }

    /// A sequence, and whether it lost its beginning.
    fn side(&self, input: &TextInput) -> std::result::Result<(Side, bool), Problem> {
        let bad = |error: plumb_model::Error| Problem::Bad(error.to_string());
        let rendered = self.text.render(input, &RenderOptions::default(), RenderMode::Score).map_err(bad)?;
        let (mut tokens, mut response) = (rendered.ids, rendered.response.start);
        if tokens.last() != Some(&self.end_of_context) {
            return Err(Problem::Bad("the text does not end with the end-of-context token".to_owned()));
        }
        if tokens.len() < 2 || rendered.response.is_empty() {
            return Err(Problem::Useless("no response"));
        }
        let cut = tokens.len() > self.max_tokens;
        if cut {
            // What begins every text stays, and so does the tag of a binarised pair: without it both sides are the same.
            let kept = self.beginning + self.tag(&rendered.text, &tokens).map_err(bad)?;
            let kept = kept.min(self.max_tokens - 1);
            let dropped = tokens.len() - self.max_tokens;
            tokens.drain(kept..kept + dropped);
            response = response.saturating_sub(dropped).max(kept).max(1);
        }
        Ok((Side { tokens, response }, cut))
    }

    /// Tokens of the tag at the beginning of a binarised text.
    fn tag(&self, text: &str, tokens: &[u32]) -> plumb_model::Result<usize> {
        let Some(tag) = TAGS.into_iter().find(|tag| text.starts_with(tag)) else { return Ok(0) };
        let ids: Vec<u32> = self.text.tokenize(tag, false)?.into_iter().map(|token| token.id).collect();
        Ok(if tokens[self.beginning.min(tokens.len())..].starts_with(&ids) { ids.len() } else { 0 })
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
            Ok(TextInput::PromptResponse { prompt: Arc::new(TextInput::Text(prompt)), response: Response::Text(text) })
        }
        (Some(Turns::Conversation(prompt)), Turns::Text(text)) => Ok(TextInput::PromptResponse {
            prompt: Arc::new(TextInput::Conversation(turns(prompt).collect())),
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
