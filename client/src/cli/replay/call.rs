//! A recorded call, and how it is asked again.

use std::collections::HashMap;

use plumb_client::record::{Outcome, Record};
use plumb_client::{Client, Code, Error, ItemFailure, code_name, score, v1};

use crate::cli::input::{Place, preview, shorten};
use crate::cli::scoring::is_passing;

/// How the ids of replayed requests begin: a server that records takes them down too, and a replay of its log passes them
/// over, so that no replay feeds on itself.
const REPLAYED: &str = "replay:";
/// The longest id that a server takes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// What was asked.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Score(v1::ScoreRequest),
    Rank(v1::RankRequest),
}

/// A score, or the name of a code.
pub(super) type Item = Result<Score, String>;

/// What is compared of a score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Score {
    pub(super) reward: f32,
    pub(super) input_tokens: u32,
    pub(super) truncated: bool,
    /// Made of log-probabilities.
    pub(super) is_language: bool,
}

/// What one side has to say: a score for every item of the request, in its order.
#[derive(Clone, Debug, Default)]
pub(super) struct Side {
    pub(super) model: Option<v1::ModelIdentity>,
    pub(super) items: Vec<Item>,
    /// An example of what went wrong.
    pub(super) failure: Option<String>,
}

/// A recorded call.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) place: Place,
    pub(super) caller: Option<String>,
    pub(super) request: Request,
    pub(super) recorded: Side,
}

impl Call {
    /// Reads a record; the error says what is wrong with it.
    pub(super) fn of(place: Place, record: Record) -> Result<Self, String> {
        let Record { caller, model, score, rank, results, error, .. } = record;
        let (request, n) = match (score, rank) {
            (Some(request), None) => (Request::Score(request.clone()), request.items.len()),
            (None, Some(request)) => (Request::Rank(request.clone()), request.candidates.len()),
            _ => return Err("has neither `score` nor `rank`, or both".into()),
        };
        let (items, failure) = match error {
            Some(error) => (vec![Err(error.code.clone()); n], Some(format!("{}: {}", error.code, error.message))),
            None => (results.iter().map(item).collect::<Vec<_>>(), None),
        };
        if items.len() != n {
            return Err(format!("has {} results for {n} items", items.len()));
        }
        Ok(Self { place, caller, request, recorded: Side { model, items, failure } })
    }

    /// Asks a model the same. An error would meet the next call too.
    pub(super) async fn ask(&self, client: &Client, spec: v1::ModelSpec, priority: i32) -> Result<Side, Error> {
        let model = Some(spec);
        let request_id = replayed_id(self.request_id());
        let answer = match self.request.clone() {
            Request::Score(request) => {
                let request = v1::ScoreRequest { model, priority, request_id, per_token: false, ..request };
                client.score(request).await.map(|answer| Side {
                    model: answer.model,
                    items: answer.results.iter().map(|result| answered(score(result))).collect(),
                    failure: None,
                })
            }
            Request::Rank(request) => {
                let n = request.candidates.len();
                client
                    .rank(v1::RankRequest { model, priority, request_id, ..request })
                    .await
                    .map(|answer| ranking(answer, n))
            }
        };
        match answer {
            Ok(side) => Ok(side),
            Err(error) if is_passing(error.code()) || is_the_calls_own(error.code()) => {
                let items = vec![Err(code_name(error.code()).to_owned()); self.recorded.items.len()];
                Ok(Side { model: None, items, failure: Some(ItemFailure::from(&error).to_string()) })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a language model's score is made in another way than by default.
    pub(super) fn objective(&self) -> v1::Objective {
        let objective = match &self.request {
            Request::Score(request) => request.objective(),
            Request::Rank(request) => request.objective(),
        };
        if objective == v1::Objective::Unspecified { v1::Objective::MeanLogProb } else { objective }
    }

    /// Whether it comes from an earlier replay.
    pub(super) fn is_replay(&self) -> bool {
        self.request_id().starts_with(REPLAYED)
    }

    pub(super) fn request_id(&self) -> &str {
        match &self.request {
            Request::Score(request) => &request.request_id,
            Request::Rank(request) => &request.request_id,
        }
    }

    /// The beginning of an item, for people.
    pub(super) fn preview(&self, item: usize) -> String {
        match &self.request {
            Request::Score(request) => request.items.get(item).map(preview).unwrap_or_default(),
            Request::Rank(request) => match request.candidates.get(item).and_then(|c| c.candidate.as_ref()) {
                Some(v1::candidate::Candidate::Text(text)) => shorten(text),
                _ => String::new(),
            },
        }
    }

    /// Items that answer one prompt, so that their order means something: the candidates of a ranking; of scored items,
    /// conversations that differ in their last turn only, and token ids with the same prompt.
    pub(super) fn groups(&self) -> Vec<Vec<usize>> {
        #[derive(PartialEq, Eq, Hash)]
        enum Prompt<'a> {
            Turns(&'a [v1::Message]),
            Ids(&'a [u32]),
        }
        let request = match &self.request {
            Request::Rank(request) => return vec![(0..request.candidates.len()).collect()],
            Request::Score(request) => request,
        };
        let mut groups: HashMap<Prompt<'_>, Vec<usize>> = HashMap::new();
        for (i, item) in request.items.iter().enumerate() {
            let prompt = match &item.input {
                Some(v1::input::Input::Conversation(conversation)) => match conversation.messages.split_last() {
                    Some((_, prompt)) if !prompt.is_empty() => Prompt::Turns(prompt),
                    _ => continue,
                },
                Some(v1::input::Input::TokenIds(ids)) => {
                    match ids.ids.get(..ids.response_start.unwrap_or(0) as usize) {
                        Some(prompt) if !prompt.is_empty() => Prompt::Ids(prompt),
                        _ => continue,
                    }
                }
                _ => continue,
            };
            groups.entry(prompt).or_default().push(i);
        }
        let mut groups: Vec<_> = groups.into_values().filter(|group| group.len() > 1).collect();
        groups.sort();
        groups
    }
}

/// The id of a replayed request: as much of its own as a server takes.
fn replayed_id(id: &str) -> String {
    let kept = id.floor_char_boundary(MAX_REQUEST_ID_BYTES - REPLAYED.len());
    format!("{REPLAYED}{}", &id[..kept])
}

/// A call that is wrong, or does not suit the model; the next one may be right.
fn is_the_calls_own(code: Code) -> bool {
    matches!(code, Code::InvalidArgument | Code::FailedPrecondition)
}

fn item(outcome: &Outcome) -> Item {
    match (outcome.reward, &outcome.error) {
        (Some(reward), None) => Ok(Score {
            reward: reward as f32,
            input_tokens: outcome.input_tokens.unwrap_or(0),
            truncated: outcome.truncated.unwrap_or(false),
            is_language: outcome.log_probs.is_some(),
        }),
        (_, Some(error)) => Err(error.code.clone()),
        (None, None) => Err("UNKNOWN".into()),
    }
}

fn answered(score: Result<&v1::Score, ItemFailure>) -> Item {
    score.map(compared).map_err(|failure| code_name(failure.code).to_owned())
}

fn compared(score: &v1::Score) -> Score {
    Score {
        reward: score.reward,
        input_tokens: score.input_tokens,
        truncated: score.truncated,
        is_language: score.log_probs.is_some(),
    }
}

fn ranking(answer: v1::RankResponse, n: usize) -> Side {
    let mut items = vec![Err("UNKNOWN".to_owned()); n];
    for ranked in &answer.ranked {
        // The client has seen to it that every candidate is there once.
        if let Some(item) = items.get_mut(ranked.index as usize) {
            *item = match (&ranked.score, &ranked.error) {
                (Some(score), _) => Ok(compared(score)),
                (None, Some(error)) => Err(code_name(Code::from_i32(error.code)).to_owned()),
                (None, None) => continue,
            };
        }
    }
    Side { model: answer.model, items, failure: None }
}

#[cfg(test)]
mod tests {
    use plumb_client::record::Failure;
    use plumb_client::{dialogue, text};

    use super::*;

    fn record(items: Vec<v1::Input>, rewards: &[Option<f64>]) -> Record {
        let outcome = |reward: &Option<f64>| match reward {
            Some(_) => Outcome { reward: *reward, ..Default::default() },
            None => Outcome {
                error: Some(Failure { code: "INTERNAL".into(), message: "why".into() }),
                ..Default::default()
            },
        };
        let results = rewards.iter().map(outcome).collect();
        Record { score: Some(v1::ScoreRequest { items, ..Default::default() }), results, ..Default::default() }
    }

    fn call(record: Record) -> Result<Call, String> {
        Call::of(Place { file: None, line: 1 }, record)
    }

    #[test]
    fn a_record_is_read_with_its_errors() {
        let read = call(record(vec![text("a"), text("b")], &[Some(0.5), None])).unwrap();
        let scores: Vec<_> = read.recorded.items.iter().map(|item| item.clone().map(|score| score.reward)).collect();
        assert_eq!(scores, [Ok(0.5), Err("INTERNAL".into())]);
        let failed = Failure { code: "NOT_FOUND".into(), message: "why".into() };
        let read = call(Record { error: Some(failed), ..record(vec![text("a"), text("b")], &[]) }).unwrap();
        assert_eq!(read.recorded.items, [Err("NOT_FOUND".into()), Err("NOT_FOUND".into())]);
        assert!(call(record(vec![text("a")], &[])).unwrap_err().contains("0 results for 1 items"));
        assert!(call(Record::default()).unwrap_err().contains("neither"));
    }

    #[test]
    fn a_replayed_id_is_one_that_a_server_takes() {
        let (fits, long) = ("x".repeat(121), "x".repeat(128));
        // The last character is of two bytes, of which one would fit.
        let wide = format!("{}\u{e4}", &fits[1..]);
        for (id, kept) in [("", ""), ("a", "a"), (&*fits, &*fits), (&*long, &*fits), (&*wide, &fits[1..])] {
            let replayed = replayed_id(id);
            assert_eq!(replayed, format!("replay:{kept}"));
            assert!(replayed.len() <= 128);
        }
    }

    #[test]
    fn items_with_one_prompt_belong_together() {
        let ids = |ids: &[u32], response_start| {
            let ids = v1::TokenIds { ids: ids.to_vec(), response_start };
            v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
        };
        let items = vec![
            dialogue("q", "a"),
            text("t"),
            dialogue("other", "a"),
            dialogue("q", "b"),
            text("t"),
            ids(&[1, 2, 3], Some(2)),
            ids(&[1, 2, 4], Some(2)),
            ids(&[1, 2], None),
            ids(&[1], Some(9)),
            dialogue("q", "c"),
        ];
        let n = items.len();
        let groups = call(record(items, &vec![Some(0.0); n])).unwrap().groups();
        assert_eq!(groups, [vec![0, 3, 9], vec![5, 6]]);
    }
}
