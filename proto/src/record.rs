//! The format of recorded calls: JSON lines, one [`Record`] for every call, that a server writes and `plumb replay` reads.
//!
//! | field | type | what it is |
//! |---|---|---|
//! | `plumb_record` | integer | the version of this format, [`VERSION`]; first, so that a line tells what it is |
//! | `time` | string | when the answer was ready: RFC 3339, UTC, microseconds |
//! | `rpc` | string | `Score`, `ScoreStream`, `Rank`; `Generate` for the ranking inside a best-of call |
//! | `caller` | string | the name of the caller's key; absent where keys have no names |
//! | `model` | object | `name`, `version` and `weights_digest` of what answered; absent if nothing could |
//! | `score` or `rank` | object | the request: a `plumb.v1.ScoreRequest` or `RankRequest` |
//! | `results` | list | an [`Outcome`] for every item or candidate, in the order of the request; empty if the call failed |
//! | `error` | object | why the call failed as a whole: `code` and `message`; absent if it did not |
//! | `timings` | object | a `plumb.v1.Timings`, in nanoseconds; absent if the call failed |
//!
//! Requests are JSON as Protobuf defines it, with the field names of the `.proto`: enums by name, defaults left out, what is
//! not set absent. `grpcurl -d` takes them as they are, and `plumb score` and `plumb rank` read items and requests.
//! Integers of 64 bits are numbers, though, not strings.
//!
//! A reward is written as the double that equals the f32: whoever reads doubles has its exact value, and casting to f32 gives
//! back its bits.
//!
//! A reader passes over fields that it does not know; a change that it must know of changes [`VERSION`].

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use tonic::Code;

use crate::json::is_default;
use crate::{code_name, v1};

/// The version of the format.
pub const VERSION: u32 = 1;

/// The longest line that is written or read, line break included: a full batch of long texts takes a quarter of it.
pub const MAX_LINE_BYTES: usize = 32 << 20;

/// A call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// [`VERSION`].
    pub plumb_record: u32,
    /// When the answer was ready.
    pub time: String,
    /// The method's name.
    pub rpc: Cow<'static, str>,
    /// The name of the caller's key.
    #[serde(skip_serializing_if = "is_default")]
    pub caller: Option<String>,
    /// What answered.
    #[serde(skip_serializing_if = "is_default")]
    pub model: Option<v1::ModelIdentity>,
    /// The request, if it was to score items.
    #[serde(skip_serializing_if = "is_default")]
    pub score: Option<v1::ScoreRequest>,
    /// The request, if it was to rank candidates.
    #[serde(skip_serializing_if = "is_default")]
    pub rank: Option<v1::RankRequest>,
    /// In the order of the request.
    pub results: Vec<Outcome>,
    /// Why the call failed.
    #[serde(skip_serializing_if = "is_default")]
    pub error: Option<Failure>,
    /// Where the time went.
    #[serde(skip_serializing_if = "is_default")]
    pub timings: Option<v1::Timings>,
}

/// What became of an item: the four fields of a score, or an error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// The reward, exactly.
    #[serde(skip_serializing_if = "is_default")]
    pub reward: Option<f64>,
    /// Tokens fed to the model.
    #[serde(skip_serializing_if = "is_default")]
    pub input_tokens: Option<u32>,
    /// Of those, tokens whose state was already computed.
    #[serde(skip_serializing_if = "is_default")]
    pub cached_tokens: Option<u32>,
    /// Whether tokens were dropped to fit.
    #[serde(skip_serializing_if = "is_default")]
    pub truncated: Option<bool>,
    /// The parts of a language model's score; a preference model has none.
    #[serde(skip_serializing_if = "is_default")]
    pub log_probs: Option<v1::LogProbs>,
    /// Why there is no score.
    #[serde(skip_serializing_if = "is_default")]
    pub error: Option<Failure>,
}

/// A code by its name, and words.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// As gRPC writes it, such as `INVALID_ARGUMENT`.
    pub code: String,
    /// What was wrong.
    pub message: String,
}

impl From<&v1::Score> for Outcome {
    /// Values of single tokens are not recorded: they can be had again, and are many.
    fn from(score: &v1::Score) -> Self {
        Self {
            reward: Some(f64::from(score.reward)),
            input_tokens: Some(score.input_tokens),
            cached_tokens: Some(score.cached_tokens),
            truncated: Some(score.truncated),
            log_probs: score.log_probs,
            error: None,
        }
    }
}

impl From<&v1::ItemError> for Outcome {
    fn from(error: &v1::ItemError) -> Self {
        Self { error: Some(Failure::from(error)), ..Self::default() }
    }
}

impl From<&v1::ItemError> for Failure {
    fn from(error: &v1::ItemError) -> Self {
        Self { code: code_name(Code::from_i32(error.code)).to_owned(), message: error.message.clone() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn conversation(turns: &[(&str, &str)]) -> v1::Input {
        let message = |&(role, content): &(&str, &str)| v1::Message { role: role.into(), content: content.into() };
        let messages = turns.iter().map(message).collect();
        v1::Input { input: Some(v1::input::Input::Conversation(v1::Conversation { messages })) }
    }

    fn token_ids(ids: &[u32], response_start: Option<u32>) -> v1::TokenIds {
        v1::TokenIds { ids: ids.to_vec(), response_start }
    }

    #[test]
    fn a_line_is_what_the_table_says() {
        let record = Record {
            plumb_record: VERSION,
            time: "2026-01-02T03:04:05.000006Z".into(),
            rpc: "Score".into(),
            caller: Some("trainer".into()),
            model: Some(v1::ModelIdentity { name: "pm".into(), version: 3, weights_digest: "ab".into() }),
            score: Some(v1::ScoreRequest {
                model: Some(v1::ModelSpec { name: "pm".into(), choice: Some(v1::model_spec::Choice::Version(3)) }),
                items: vec![
                    conversation(&[("user", "q"), ("assistant", "a")]),
                    v1::Input { input: Some(v1::input::Input::Text("t".into())) },
                    v1::Input { input: Some(v1::input::Input::TokenIds(token_ids(&[1, 2], Some(1)))) },
                    v1::Input::default(),
                ],
                text: Some(v1::TextOptions { truncation: v1::Truncation::Left.into(), ..Default::default() }),
                objective: v1::Objective::SumLogProb.into(),
                priority: 77,
                ..Default::default()
            }),
            results: vec![
                (&v1::Score { reward: 0.1, input_tokens: 7, ..Default::default() }).into(),
                (&v1::ItemError { code: 3, message: "why".into() }).into(),
            ],
            ..Record::default()
        };
        let line = concat!(
            r#"{"plumb_record":1,"time":"2026-01-02T03:04:05.000006Z","rpc":"Score","caller":"trainer","#,
            r#""model":{"name":"pm","version":3,"weights_digest":"ab"},"score":{"model":{"name":"pm","version":3},"#,
            r#""items":[{"conversation":{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}},"#,
            r#"{"text":"t"},{"token_ids":{"ids":[1,2],"response_start":1}},{}],"text":{"truncation":"TRUNCATION_LEFT"},"#,
            r#""objective":"OBJECTIVE_SUM_LOG_PROB","priority":77},"#,
            r#""results":[{"reward":0.10000000149011612,"input_tokens":7,"cached_tokens":0,"truncated":false},"#,
            r#"{"error":{"code":"INVALID_ARGUMENT","message":"why"}}]}"#
        );
        assert_eq!(serde_json::to_string(&record).unwrap(), line);
        assert_eq!(serde_json::from_str::<Record>(line).unwrap(), record);
    }

    #[test]
    fn a_ranking_is_read_as_it_was_written() {
        let candidate = |candidate| v1::Candidate { candidate: Some(candidate) };
        let rank = v1::RankRequest {
            model: Some(v1::ModelSpec {
                name: String::new(),
                choice: Some(v1::model_spec::Choice::Label("stable".into())),
            }),
            prompt: Some(conversation(&[("user", "q\n\u{1}\u{2028}é")])),
            candidates: vec![
                candidate(v1::candidate::Candidate::Text("a".into())),
                candidate(v1::candidate::Candidate::TokenIds(token_ids(&[9], None))),
                v1::Candidate::default(),
            ],
            text: Some(v1::TextOptions {
                chat_format: v1::ChatFormat::HumanAssistant.into(),
                hhh_prompt: v1::HhhPrompt::Short.into(),
                truncation: v1::Truncation::Refuse.into(),
                max_tokens: Some(9),
            }),
            request_id: "id".into(),
            priority: v1::Priority::High.into(),
            ..Default::default()
        };
        let record = Record { rank: Some(rank), timings: Some(v1::Timings::default()), ..Record::default() };
        let line = serde_json::to_string(&record).unwrap();
        assert!(!line.contains('\n') && line.contains("\"CHAT_FORMAT_HUMAN_ASSISTANT\""), "{line}");
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
    }

    #[test]
    fn what_a_later_server_adds_is_passed_over_and_unknown_names_are_not() {
        let more = r#"{"plumb_record":1,"colour":"red","score":{"items":[{"text":"t"}],"shape":[1]},"results":[]}"#;
        let read: Record = serde_json::from_str(more).unwrap();
        assert_eq!(read.score.unwrap().items.len(), 1);
        let wrong = r#"{"plumb_record":1,"score":{"items":[],"objective":"OBJECTIVE_LOUDNESS"}}"#;
        let error = serde_json::from_str::<Record>(wrong).unwrap_err().to_string();
        assert!(error.contains("OBJECTIVE_LOUDNESS is no value"), "{error}");
    }

    proptest! {
        #[test]
        fn a_reward_keeps_its_bits(bits: u32) {
            let reward = f32::from_bits(bits);
            prop_assume!(reward.is_finite());
            let outcome = Outcome::from(&v1::Score { reward, ..Default::default() });
            let read: Outcome = serde_json::from_str(&serde_json::to_string(&outcome).unwrap()).unwrap();
            prop_assert_eq!((read.reward.unwrap() as f32).to_bits(), bits);
        }
    }
}
