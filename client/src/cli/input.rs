//! Lines of JSONL, read into what they ask for.

use std::path::Path;
use std::sync::Arc;

use plumb_client::{text, v1};
use serde::Deserialize;
use serde_json::Value;

/// A line that asks for something.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) place: Place,
    /// The line's own `id`, carried through to the answer.
    pub(crate) id: Option<Value>,
    pub(crate) body: Body,
}

/// Where a record comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// `None` for the command line.
    pub(crate) file: Option<Arc<Path>>,
    /// From 1; on the command line, the number of the text.
    pub(crate) line: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{}", file.display(), self.line),
            None => write!(f, "{}", self.line),
        }
    }
}

/// What a record asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    /// One text or dialogue to score.
    Single(v1::Input),
    /// Responses to one prompt.
    Candidates { prompt: v1::Input, candidates: Vec<String> },
    /// Two texts or dialogues, of which the first was preferred.
    Pair { chosen: v1::Input, rejected: v1::Input },
}

/// How strings are understood.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    /// `Human:` and `Assistant:` markers in strings separate turns.
    pub(crate) split_turns: bool,
    /// A prompt is plain text that a response continues, not a user's turn.
    pub(crate) raw: bool,
}

/// The keys that say something, also as columns of a table.
pub(crate) const KEYS: &[&str] =
    &["id", "text", "messages", "prompt", "response", "candidates", "chosen", "rejected", "conversation", "token_ids"];

/// The keys a line may have. Others are the data's own and are passed over.
#[derive(Default, PartialEq, Deserialize)]
struct Line {
    id: Option<Value>,
    text: Option<String>,
    messages: Option<Vec<Turn>>,
    prompt: Option<Words>,
    response: Option<String>,
    candidates: Option<Vec<CandidateWords>>,
    chosen: Option<Words>,
    rejected: Option<Words>,
}

#[derive(PartialEq, Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of {\"role\", \"content\"}")]
enum Words {
    Text(String),
    Turns(Vec<Turn>),
    /// As the wire contract and records have it.
    Input(v1::Input),
}

#[derive(PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a string")]
enum CandidateWords {
    Text(String),
    /// As the wire contract and records have it.
    Candidate(v1::Candidate),
}

impl CandidateWords {
    fn text(self) -> Result<String, String> {
        match self {
            Self::Text(text)
            | Self::Candidate(v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(text)) }) => Ok(text),
            Self::Candidate(_) => Err("a candidate must be text".into()),
        }
    }
}

/// Reads a line: its id and what it asks for.
pub(crate) fn parse(line: &[u8], reading: Reading) -> Result<(Option<Value>, Body), String> {
    let mut keys: Line = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    let id = keys.id.take();
    if keys != Line::default() {
        return body(keys, reading).map(|body| (id, body));
    }
    // An item as the wire contract and records have it.
    match serde_json::from_slice(line) {
        Ok(item @ v1::Input { input: Some(_) }) => Ok((id, Body::Single(input(Words::Input(item), reading)?))),
        _ => body(keys, reading).map(|body| (id, body)),
    }
}

fn body(line: Line, reading: Reading) -> Result<Body, String> {
    match (line.chosen, line.rejected) {
        (Some(chosen), Some(rejected)) => {
            let prompt = line.prompt.map(|p| prompt_input(p, reading)).transpose()?;
            let chosen = side(prompt.as_ref(), chosen, reading)?;
            return Ok(Body::Pair { chosen, rejected: side(prompt.as_ref(), rejected, reading)? });
        }
        (None, None) => {}
        _ => return Err("chosen and rejected belong together".into()),
    }
    match (line.text, line.messages, line.prompt, line.response, line.candidates) {
        (Some(words), None, None, None, None) => input(Words::Text(words), reading).map(Body::Single),
        (None, Some(turns), None, None, None) => input(Words::Turns(turns), reading).map(Body::Single),
        (None, None, Some(prompt), Some(response), None) => {
            Ok(Body::Single(with_response(&prompt_input(prompt, reading)?, &response)))
        }
        (None, None, Some(prompt), None, Some(candidates)) => {
            if candidates.is_empty() {
                return Err("candidates is empty".into());
            }
            let candidates = candidates.into_iter().map(CandidateWords::text).collect::<Result<_, _>>()?;
            Ok(Body::Candidates { prompt: prompt_input(prompt, reading)?, candidates })
        }
        _ => Err("needs exactly one of: text; messages; prompt and response; prompt and candidates; \
                  chosen and rejected"
            .into()),
    }
}

/// A prompt string is the user's turn, unless it is raw text or a transcript.
pub(crate) fn prompt_input(words: impl Into<PromptWords>, reading: Reading) -> Result<v1::Input, String> {
    match words.into().0 {
        Words::Text(words) if !reading.split_turns && !reading.raw => Ok(plumb_client::conversation([("user", words)])),
        words => input(words, reading),
    }
}

/// A prompt in any form.
pub(crate) struct PromptWords(Words);

impl From<Words> for PromptWords {
    fn from(words: Words) -> Self {
        Self(words)
    }
}

impl From<String> for PromptWords {
    fn from(words: String) -> Self {
        Self(Words::Text(words))
    }
}

/// One side of a pair. A string, or a list that starts with an assistant's turn, continues the prompt; any other list
/// is the whole conversation, which may repeat the prompt.
fn side(prompt: Option<&v1::Input>, words: Words, reading: Reading) -> Result<v1::Input, String> {
    let Some(prompt) = prompt else { return input(words, reading) };
    match words {
        Words::Text(response) => Ok(with_response(prompt, &response)),
        Words::Turns(turns) if turns.first().is_some_and(|t| t.role == "assistant") => {
            let v1::Input { input: Some(v1::input::Input::Conversation(mut conversation)) } = prompt.clone() else {
                return Err("turns can not continue a raw prompt".into());
            };
            conversation.messages.extend(turns.into_iter().map(message));
            Ok(v1::Input { input: Some(v1::input::Input::Conversation(conversation)) })
        }
        words => input(words, reading),
    }
}

fn input(words: Words, reading: Reading) -> Result<v1::Input, String> {
    let messages = match words {
        Words::Text(words) if reading.split_turns => plumb_client::transcript::turns(&words),
        Words::Text(words) => return Ok(text(words)),
        Words::Turns(turns) => turns.into_iter().map(message).collect(),
        Words::Input(v1::Input { input: Some(v1::input::Input::Conversation(c)) }) => c.messages,
        Words::Input(input) if input.input.is_some() => return Ok(input),
        Words::Input(_) => return Err("needs one of conversation, text and token_ids".into()),
    };
    if messages.is_empty() {
        return Err("has no turns".into());
    }
    Ok(v1::Input { input: Some(v1::input::Input::Conversation(v1::Conversation { messages })) })
}

fn message(turn: Turn) -> v1::Message {
    v1::Message { role: turn.role, content: turn.content }
}

/// The prompt continued by a response: an assistant's turn, or more text.
pub(crate) fn with_response(prompt: &v1::Input, response: &str) -> v1::Input {
    let mut whole = prompt.clone();
    match &mut whole.input {
        Some(v1::input::Input::Conversation(conversation)) => {
            conversation.messages.push(v1::Message { role: "assistant".into(), content: response.into() })
        }
        Some(v1::input::Input::Text(text)) => text.push_str(response),
        Some(v1::input::Input::TokenIds(_)) | None => {}
    }
    whole
}

/// For tables: the first words of the last thing said, or the last words of a text, where its answer is.
pub(crate) fn preview(input: &v1::Input) -> String {
    let words = match &input.input {
        Some(v1::input::Input::Conversation(c)) => c.messages.last().map_or("", |m| m.content.as_str()),
        Some(v1::input::Input::Text(text)) => return ending(text),
        Some(v1::input::Input::TokenIds(_)) | None => "",
    };
    shorten(words)
}

/// The last 60 characters, on one line.
fn ending(text: &str) -> String {
    let mut last: Vec<char> = text.trim_end().chars().rev().take(WIDTH + 1).collect();
    let cut = last.len() > WIDTH;
    last.truncate(if cut { WIDTH - 1 } else { WIDTH });
    let words: String = last.into_iter().rev().collect();
    (if cut { "…" } else { "" }).to_owned() + &shorten(&words)
}

/// Characters of a text in a table.
const WIDTH: usize = 60;

/// The first 60 characters, on one line.
pub(crate) fn shorten(words: &str) -> String {
    let mut short: String =
        words.split_whitespace().flat_map(|w| [" ", w]).flat_map(str::chars).skip(1).take(WIDTH + 1).collect();
    if short.chars().count() > WIDTH {
        short.pop();
        short.pop();
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use plumb_client::{conversation, dialogue};

    use super::*;

    const PLAIN: Reading = Reading { split_turns: false, raw: false };
    const SPLIT: Reading = Reading { split_turns: true, raw: false };
    const RAW: Reading = Reading { split_turns: false, raw: true };

    fn check(line: &str, reading: Reading, expect: Result<Body, &str>) {
        match (parse(line.as_bytes(), reading), expect) {
            (Ok((_, body)), Ok(expect)) => assert_eq!(body, expect, "{line}"),
            (Err(message), Err(part)) => assert!(message.contains(part), "{line}: {message}"),
            (got, expect) => panic!("{line}: {got:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn lines() {
        use Body::{Candidates, Single};
        check(r#"{"text": "a"}"#, PLAIN, Ok(Single(text("a"))));
        check(r#"{"text": "a", "source": "x", "prompt": null}"#, PLAIN, Ok(Single(text("a"))));
        check(
            r#"{"messages": [{"role": "user", "content": "q", "tree": 1}, {"role": "assistant", "content": "a"}]}"#,
            PLAIN,
            Ok(Single(dialogue("q", "a"))),
        );
        check(r#"{"prompt": "q", "response": "a"}"#, PLAIN, Ok(Single(dialogue("q", "a"))));
        check(r#"{"prompt": "q ", "response": "a"}"#, RAW, Ok(Single(text("q a"))));
        check(
            r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "response": "a"}"#,
            PLAIN,
            Ok(Single(conversation([("system", "s"), ("user", "q"), ("assistant", "a")]))),
        );
        check(
            r#"{"prompt": "q", "candidates": ["a", "b"]}"#,
            PLAIN,
            Ok(Candidates { prompt: conversation([("user", "q")]), candidates: vec!["a".into(), "b".into()] }),
        );
    }

    #[test]
    fn items_and_prompts_of_the_wire_contract() {
        let turns = r#"{"conversation": {"messages": [{"role": "user", "content": "q"}]}}"#;
        check(turns, PLAIN, Ok(Body::Single(conversation([("user", "q")]))));
        let ids = v1::TokenIds { ids: vec![1, 2], response_start: Some(1) };
        let ids = v1::Input { input: Some(v1::input::Input::TokenIds(ids)) };
        check(r#"{"token_ids": {"ids": [1, 2], "response_start": 1}}"#, PLAIN, Ok(Body::Single(ids)));
        check(
            &format!(r#"{{"prompt": {turns}, "candidates": [{{"text": "a"}}, "b"]}}"#),
            PLAIN,
            Ok(Body::Candidates { prompt: conversation([("user", "q")]), candidates: vec!["a".into(), "b".into()] }),
        );
        check(r#"{"prompt": {"text": "q "}, "response": "a"}"#, PLAIN, Ok(Body::Single(text("q a"))));
        check(r#"{"prompt": {}, "response": "a"}"#, PLAIN, Err("one of conversation"));
        check(r#"{"prompt": "q", "candidates": [{"token_ids": {"ids": [1]}}]}"#, PLAIN, Err("must be text"));
        check(r#"{"conversation": {"messages": []}}"#, PLAIN, Err("no turns"));
        // Elsewhere the key is the data's own.
        check(r#"{"text": "a", "conversation": ["x"]}"#, PLAIN, Ok(Body::Single(text("a"))));
    }

    #[test]
    fn pairs() {
        let pair = |chosen, rejected| Ok(Body::Pair { chosen, rejected });
        let hh = r#"{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}"#;
        check(hh, PLAIN, pair(text("\n\nHuman: q\n\nAssistant: a"), text("\n\nHuman: q\n\nAssistant: b")));
        check(hh, SPLIT, pair(dialogue("q", "a"), dialogue("q", "b")));
        let with_prompt = pair(dialogue("q", "a"), dialogue("q", "b"));
        check(r#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#, PLAIN, with_prompt.clone());
        let turns =
            r#""chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]"#;
        check(&format!(r#"{{"prompt": [{{"role": "user", "content": "q"}}], {turns}}}"#), PLAIN, with_prompt.clone());
        check(&format!(r#"{{"prompt": "q", {turns}}}"#), PLAIN, with_prompt.clone());
        // A list with all turns repeats the prompt; it is not said twice. Other keys do not matter.
        let whole = r#""chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                       "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]"#;
        check(&format!(r#"{{"prompt": "q", "messages": [], {whole}}}"#), PLAIN, with_prompt);
    }

    #[test]
    fn broken_lines() {
        check("", PLAIN, Err("EOF"));
        check("[1]", PLAIN, Err("expected"));
        check(r#"{"text": 1}"#, PLAIN, Err("expected a string"));
        check(r#"{"prompt": 1, "response": "a"}"#, PLAIN, Err("a string or a list"));
        check(r#"{"chosen": "a"}"#, PLAIN, Err("belong together"));
        check(r#"{"prompt": "q"}"#, PLAIN, Err("exactly one of"));
        check(r#"{"text": "a", "messages": []}"#, PLAIN, Err("exactly one of"));
        check(r#"{"messages": []}"#, PLAIN, Err("no turns"));
        check(r#"{"prompt": "q", "candidates": []}"#, PLAIN, Err("empty"));
        check("{\"text\": \"\u{1}\"}", PLAIN, Err("control character"));
    }

    #[test]
    fn previews_fit_a_line() {
        assert_eq!(shorten("a\n  b\tc "), "a b c");
        assert_eq!(shorten(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shorten(&"é".repeat(61)), "é".repeat(59) + "…");
        assert_eq!(preview(&text("a\n  b ")), "a b");
        assert_eq!(preview(&text("a".to_owned() + &"é".repeat(60))), "…".to_owned() + &"é".repeat(59));
        assert_eq!(preview(&dialogue("q", "a")), "a");
    }
}
