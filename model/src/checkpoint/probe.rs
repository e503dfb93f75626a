//! Probes: inputs whose scores were written down when a version was published, so that whoever loads it can see whether
//! the same numbers come out.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::decoder::DType;
use crate::text::{Message, RenderMode, RenderOptions, Rendered, TextInput, TextPipeline};

/// An input with the score that it had where the version was published: a preference model's reward, or a language
/// model's mean log-probability of the response in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Probe {
    /// A conversation or a text.
    pub input: ProbeInput,
    /// Its score, with the default options of a request.
    pub score: f32,
    /// Type of the weights by which it was computed.
    pub dtype: DType,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeInput {
    /// Turns, oldest first.
    Messages(Vec<Message>),
    /// A text, used as it is.
    Text(String),
}

impl Probe {
    /// Whether a score, computed with weights of a type on whatever machine, is this probe's.
    ///
    /// In f32, an absolute difference of 1e-4 or a relative one of 1e-4: what separates implementations and instruction
    /// sets. If bf16 has a part in either score, 4e-2 or 1e-2 of the score: the first is what other servers' tests allow
    /// a reward in 16 bits, the second what they allow relatively, since at a reward of 18 a single step of bf16 is 0.07.
    /// A wrong tensor, head or template changes scores by far more. What is not finite agrees with nothing.
    pub fn agrees(&self, score: f32, dtype: DType) -> bool {
        let (absolute, relative) = match (self.dtype, dtype) {
            (DType::F32, DType::F32) => (1e-4, 1e-4),
            _ => (4e-2, 1e-2),
        };
        let allowed = f32::max(absolute, relative * self.score.abs());
        score.is_finite() && (score - self.score).abs() <= allowed
    }

    /// The tokens to score, as a request without options would have them.
    ///
    /// # Errors
    /// If the model's text pipeline refuses the input, as it does with one over its limit of tokens.
    pub fn render(&self, text: &TextPipeline) -> Result<Rendered> {
        self.input.render(text)
    }
}

impl ProbeInput {
    /// As [`Probe::render`].
    ///
    /// # Errors
    /// Those of [`Probe::render`].
    pub fn render(&self, text: &TextPipeline) -> Result<Rendered> {
        let input = match self {
            Self::Messages(messages) => TextInput::Conversation(messages.clone()),
            Self::Text(text) => TextInput::Text(text.clone()),
        };
        text.render(&input, &RenderOptions::default(), RenderMode::Score)
    }
}

/// A probe as the manifest has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    messages: Option<Vec<Turn>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    score: f32,
    dtype: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    role: String,
    content: String,
}

impl From<Probe> for Written {
    fn from(Probe { input, score, dtype }: Probe) -> Self {
        let turn = |Message { role, content }: Message| Turn { role, content };
        let (messages, text) = match input {
            ProbeInput::Messages(messages) => (Some(messages.into_iter().map(turn).collect()), None),
            ProbeInput::Text(text) => (None, Some(text)),
        };
        Self { messages, text, score, dtype: dtype.name().to_owned() }
    }
}

impl TryFrom<Written> for Probe {
    type Error = String;

    fn try_from(Written { messages, text, score, dtype }: Written) -> Result<Self, String> {
        let input = match (messages, text) {
            (Some(turns), None) => {
                ProbeInput::Messages(turns.into_iter().map(|turn| Message::new(turn.role, turn.content)).collect())
            }
            (None, Some(text)) => ProbeInput::Text(text),
            _ => return Err("a probe has either `messages` or `text`".to_owned()),
        };
        if !score.is_finite() {
            return Err("the score of a probe is not a finite number".to_owned());
        }
        let dtype = [DType::F32, DType::Bf16].into_iter().find(|known| known.name() == dtype);
        let dtype = dtype.ok_or_else(|| "the dtype of a probe is neither f32 nor bf16".to_owned())?;
        Ok(Self { input, score, dtype })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(score: f32, dtype: DType) -> Probe {
        Probe { input: ProbeInput::Text("a b".to_owned()), score, dtype }
    }

    #[test]
    fn scores_agree_within_what_types_and_machines_allow() {
        let check = |recorded: f32, by: DType, found: f32, with: DType, agrees: bool| {
            assert_eq!(probe(recorded, by).agrees(found, with), agrees, "{recorded} {by:?}, {found} {with:?}");
        };
        use DType::{Bf16, F32};
        check(1.0, F32, 1.0, F32, true);
        check(1.0, F32, 1.00009, F32, true);
        check(1.0, F32, 1.0002, F32, false);
        check(0.0, F32, 9e-5, F32, true);
        check(30.0, F32, 30.002, F32, true);
        check(30.0, F32, 30.004, F32, false);
        for (by, with) in [(Bf16, Bf16), (Bf16, F32), (F32, Bf16)] {
            check(1.0, by, 1.039, with, true);
            check(1.0, by, 0.95, with, false);
            check(-18.0, by, -18.17, with, true);
            check(-18.0, by, -18.2, with, false);
            check(1.0, by, f32::NAN, with, false);
            check(1.0, by, f32::INFINITY, with, false);
        }
    }

    #[test]
    fn probes_are_written_for_people_and_read_back() {
        let messages = vec![Message::new("user", "Hello?"), Message::new("assistant", "Hello!")];
        let probe = Probe { input: ProbeInput::Messages(messages), score: -0.1, dtype: DType::Bf16 };
        let text = serde_json::to_string(&probe).unwrap();
        let expected = r#"{"messages":[{"role":"user","content":"Hello?"},{"role":"assistant","content":"Hello!"}],"score":-0.1,"dtype":"bf16"}"#;
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<Probe>(&text).unwrap(), probe);
        for (text, word) in [
            (r#"{"score": 1, "dtype": "f32"}"#, "either"),
            (r#"{"text": "a", "messages": [], "score": 1, "dtype": "f32"}"#, "either"),
            (r#"{"text": "a", "score": 1e60, "dtype": "f32"}"#, "finite"),
            (r#"{"text": "a", "score": 1, "dtype": "f16"}"#, "neither f32 nor bf16"),
            (r#"{"text": "a", "score": 1, "dtype": "f32", "reward": 1}"#, "unknown field"),
        ] {
            let error = serde_json::from_str::<Probe>(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
