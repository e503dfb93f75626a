//! What is to be scored, in whatever protocol it came, cut into calls that a service takes.

use std::ops::Range;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::Extensions;
use plumb_proto::v1;
use plumb_proto::v1::preference_server::Preference;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};

use super::json::{Body, question};
use super::{PATIENCE, now};
use crate::error::{Error, Result};
use crate::layers::trace::Arrived;
use crate::services::Patience;
use crate::services::limits::MAX_TEXT_BYTES;

/// Calls of one request at a time: while one is computed, the next is tokenized.
const AT_A_TIME: usize = 2;

/// What is to be scored, and how.
#[derive(Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) model: Option<v1::ModelSpec>,
    pub(super) items: Items,
    /// The caller's name for the items, for errors.
    pub(super) field: &'static str,
    pub(super) text: v1::TextOptions,
    pub(super) request_id: String,
}

/// The items.
#[derive(Debug, PartialEq)]
pub(super) enum Items {
    /// Each by itself.
    Inputs(Vec<v1::Input>),
    /// Answers to one question, which is sent once.
    Answers { question: String, answers: Vec<String> },
}

/// The scores, in the order of the items.
#[derive(Debug)]
pub(super) struct Scored {
    pub(super) model: v1::ModelIdentity,
    pub(super) scores: Vec<v1::Score>,
    /// Of the request.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
}

/// A part of a request, as a service takes it.
#[derive(Clone, Debug)]
enum Part {
    Score(v1::ScoreRequest),
    Rank(v1::RankRequest),
}

/// What a service has answered.
type Answered = (v1::ModelIdentity, Vec<v1::Score>);

impl Ask {
    /// With what a body says of the model and the text.
    pub(super) fn of(body: Body, field: &'static str, items: Items) -> Result<Self> {
        // Before there is a copy of it for every part.
        if let Items::Answers { question, .. } = &items
            && question.len() > MAX_TEXT_BYTES
        {
            let message = format!("the query has {} bytes, {MAX_TEXT_BYTES} are allowed", question.len());
            return Err(Error::invalid("", message));
        }
        let (model, text) = (body.model(), body.text_options()?);
        Ok(Self { model, items, field, text, request_id: body.request_id.unwrap_or_default() })
    }

    /// Asks `service`, with so many items in a call, on behalf of whom `extensions` name.
    ///
    /// # Errors
    /// If an item has no score: nobody has asked for a part of the answer.
    pub(super) async fn run<S: Preference>(
        self,
        service: &S,
        extensions: &Extensions,
        at_most: usize,
    ) -> Result<Scored, Status> {
        let Self { field, ref request_id, .. } = self;
        let id =
            if request_id.is_empty() { format!("plumb-{:016x}", rand::random::<u64>()) } else { request_id.clone() };
        if self.items.len() == 0 {
            return Err(Error::invalid(field, "at least one is needed").into());
        }
        let answers = self.parts(at_most).map(|(range, part)| async move {
            // What follows waits for its own kind: much has been spent by then.
            let patience = if range.start == 0 { Patience(PATIENCE) } else { Patience::ENDLESS };
            let answered = ask(service, part, extensions.clone(), patience).await;
            answered.map_err(|status| renamed(&status, field, range.start))
        });
        let answers: Vec<Answered> = stream::iter(answers).buffered(AT_A_TIME).try_collect().await?;
        let (model, scores) = joined(answers)?;
        Ok(Scored { model, scores, id, created: now() })
    }

    /// Calls of so many items, and which those are. Each is made when it is its turn: all have the question.
    fn parts(self, at_most: usize) -> impl Iterator<Item = (Range<usize>, Part)> {
        let Self { model, items, field: _, text, request_id: mut id } = self;
        let is_cut = items.len() > at_most;
        let parts: Box<dyn Iterator<Item = _> + Send> = match items {
            Items::Inputs(inputs) => Box::new(cut(inputs, at_most).map(move |(range, items)| {
                let request = v1::ScoreRequest { model: model.clone(), items, text: Some(text), ..Default::default() };
                (range, Part::Score(request))
            })),
            Items::Answers { question: query, answers } => {
                Box::new(cut(answers, at_most).map(move |(range, answers)| {
                    let candidate = |text| v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(text)) };
                    let request = v1::RankRequest {
                        model: model.clone(),
                        prompt: Some(question(query.clone())),
                        candidates: answers.into_iter().map(candidate).collect(),
                        text: Some(text),
                        ..Default::default()
                    };
                    (range, Part::Rank(request))
                }))
            }
        };
        parts.map(move |(range, mut part)| {
            // Where calls are split between versions, those with one id get one version.
            if is_cut && id.is_empty() {
                id = part.digest();
            }
            match &mut part {
                Part::Score(request) => request.request_id.clone_from(&id),
                Part::Rank(request) => request.request_id.clone_from(&id),
            }
            (range, part)
        })
    }
}

impl Items {
    fn len(&self) -> usize {
        match self {
            Self::Inputs(inputs) => inputs.len(),
            Self::Answers { answers, .. } => answers.len(),
        }
    }
}

impl Part {
    fn digest(&self) -> String {
        let bytes = match self {
            Self::Score(request) => request.encode_to_vec(),
            Self::Rank(request) => request.encode_to_vec(),
        };
        Sha256::digest(bytes).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Lists of so many, each with where it was.
fn cut<T>(items: Vec<T>, at_most: usize) -> impl Iterator<Item = (Range<usize>, Vec<T>)> {
    let mut items = items.into_iter();
    let mut start = 0;
    std::iter::from_fn(move || {
        let part: Vec<T> = items.by_ref().take(at_most).collect();
        let range = start..start + part.len();
        start = range.end;
        (!part.is_empty()).then_some((range, part))
    })
}

async fn ask<S: Preference>(
    service: &S,
    part: Part,
    mut extensions: Extensions,
    patience: Patience,
) -> Result<Answered, Status> {
    extensions.insert(patience);
    extensions.insert(Arrived(Instant::now()));
    match part {
        Part::Score(message) => {
            let request = Request::from_parts(MetadataMap::new(), extensions, message);
            let v1::ScoreResponse { model, results, .. } = service.score(request).await?.into_inner();
            let scores = results.into_iter().map(|result| match result.outcome {
                Some(v1::score_result::Outcome::Score(score)) => Ok(score),
                Some(v1::score_result::Outcome::Error(error)) => Err(item_error(error)),
                None => Err(missing()),
            });
            Ok((model.unwrap_or_default(), scores.collect::<Result<_, _>>()?))
        }
        Part::Rank(message) => {
            let count = message.candidates.len();
            let request = Request::from_parts(MetadataMap::new(), extensions, message);
            let v1::RankResponse { model, ranked, .. } = service.rank(request).await?.into_inner();
            Ok((model.unwrap_or_default(), in_order(ranked, count)?))
        }
    }
}

/// Scores of candidates in their own order; of those that have none, the first one's error.
fn in_order(mut ranked: Vec<v1::Ranked>, count: usize) -> Result<Vec<v1::Score>, Status> {
    ranked.sort_by_key(|ranked| ranked.index);
    if ranked.len() != count {
        return Err(missing());
    }
    let scores = ranked.into_iter().map(|ranked| match (ranked.score, ranked.error) {
        (Some(score), None) => Ok(score),
        (_, Some(error)) => Err(item_error(error)),
        (None, None) => Err(missing()),
    });
    scores.collect()
}

fn item_error(error: v1::ItemError) -> Status {
    Status::new(Code::from_i32(error.code), error.message)
}

fn missing() -> Status {
    Error::internal("an answer is missing").into()
}

/// All scores, if all are of one model.
fn joined(answers: Vec<Answered>) -> Result<Answered> {
    let mut answers = answers.into_iter();
    let (model, mut scores) = answers.next().unwrap_or_default();
    for (other, more) in answers {
        if other != model {
            let message = format!("`{}` was replaced by another version meanwhile; try again", model.name);
            return Err(Error::Unavailable { message, retry_after: Duration::ZERO });
        }
        scores.extend(more);
    }
    Ok((model, scores))
}

/// The same in the caller's words: its own name for the items, and where they were in its request.
fn renamed(status: &Status, field: &str, start: usize) -> Status {
    let message = status.message();
    let item = ["items", "candidates"].iter().find_map(|list| {
        let rest = message.strip_prefix(list)?;
        if rest.starts_with(": ") {
            return Some(format!("{field}{rest}"));
        }
        let (index, rest) = rest.strip_prefix('[')?.split_once(']')?;
        Some(format!("{field}[{}]{rest}", index.parse::<usize>().ok()? + start))
    });
    let limit = || Some(format!("truncate_prompt_tokens{}", message.strip_prefix("text.max_tokens")?));
    match item.or_else(limit) {
        // The details name the field too, and nobody reads them here.
        Some(message) => Status::new(status.code(), message),
        None => status.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tonic::{Response, Streaming};

    use super::super::json::text;
    use super::*;

    fn ask(items: Items) -> Ask {
        let text = v1::TextOptions { max_tokens: Some(8), ..v1::TextOptions::default() };
        Ask { model: None, items, field: "query", text, request_id: String::new() }
    }

    #[test]
    fn what_is_too_much_for_a_call_is_cut_and_keeps_its_order() {
        let texts: Vec<String> = (0..5).map(|i| i.to_string()).collect();
        let inputs: Vec<_> = texts.iter().cloned().map(text).collect();
        let parts: Vec<_> = ask(Items::Inputs(inputs.clone())).parts(2).collect();
        assert_eq!(parts.iter().map(|(range, _)| range.clone()).collect::<Vec<_>>(), [0..2, 2..4, 4..5]);
        let mut ids = Vec::new();
        for (range, part) in parts {
            let Part::Score(request) = part else { panic!("{part:?}") };
            assert_eq!((&request.items[..], request.text.unwrap().max_tokens), (&inputs[range], Some(8)));
            ids.push(request.request_id);
        }
        assert!(!ids[0].is_empty() && ids.iter().all(|id| *id == ids[0]), "all go to one version: {ids:?}");
        let answers = || Items::Answers { question: "q".into(), answers: texts.clone() };
        for (range, part) in ask(answers()).parts(3) {
            let Part::Rank(request) = part else { panic!("{part:?}") };
            assert_eq!((request.candidates.len(), request.prompt), (range.len(), Some(question("q".into()))));
        }
        let parts: Vec<_> = ask(answers()).parts(5).collect();
        let [(_, Part::Rank(whole))] = &parts[..] else { panic!("cut without need") };
        assert_eq!(whole.request_id, "", "a call by itself is told apart by all of it");
    }

    /// Refuses everything, and counts.
    #[derive(Default)]
    struct Refuses(AtomicUsize);

    #[tonic::async_trait]
    impl Preference for Refuses {
        type ScoreStreamStream = stream::Empty<Result<v1::ScoreResponse, Status>>;

        async fn score(&self, _: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Err(Error::invalid("items", "too much").into())
        }

        async fn score_stream(
            &self,
            _: Request<Streaming<v1::ScoreRequest>>,
        ) -> Result<Response<Self::ScoreStreamStream>, Status> {
            Ok(Response::new(stream::empty()))
        }

        async fn rank(&self, _: Request<v1::RankRequest>) -> Result<Response<v1::RankResponse>, Status> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Err(Error::invalid("candidates", "too much").into())
        }
    }

    /// The most memory that this process has ever had, in bytes; `None` where there is no procfs.
    fn peak_memory() -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix("kB")?;
        Some(kib.trim().parse::<u64>().ok()? << 10)
    }

    #[tokio::test]
    async fn a_question_is_not_multiplied_by_its_calls() {
        let question =
            |bytes: usize| Items::Answers { question: "q".repeat(bytes), answers: vec![String::new(); 1 << 17] };
        let service = Refuses::default();
        let before = peak_memory();
        let refused = ask(question(4 << 20)).run(&service, &Extensions::new(), 256).await.unwrap_err();
        // All 512 calls are 2 GiB; other tests run beside this one.
        let grown = peak_memory().zip(before).map_or(0, |(after, before)| after - before);
        assert!(grown < 1 << 30, "{grown} bytes");
        assert!(refused.message() == "query: too much" && service.0.into_inner() <= AT_A_TIME, "{refused}");

        let error = Ask::of(Body::default(), "documents", question((4 << 20) + 1)).unwrap_err();
        assert_eq!(error.to_string(), "the query has 4194305 bytes, 4194304 are allowed");
    }

    #[tokio::test]
    async fn nothing_is_asked_for_nothing() {
        for items in [Items::Inputs(Vec::new()), Items::Answers { question: "q".into(), answers: Vec::new() }] {
            let service = Refuses::default();
            let refused = ask(items).run(&service, &Extensions::new(), 5).await.unwrap_err();
            assert_eq!((refused.message(), service.0.into_inner()), ("query: at least one is needed", 0));
        }
    }

    #[test]
    fn errors_are_in_the_callers_words() {
        let check = |message: &str, expected: &str| {
            let status = renamed(&Status::invalid_argument(message), "query", 256);
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, expected));
        };
        check("items[3]: the input is empty", "query[259]: the input is empty");
        check("items: why", "query: why");
        check("candidates: why", "query: why");
        check("items of a list", "items of a list");
        check("candidates[0].text: why", "query[256].text: why");
        check("text.max_tokens: 9 is not in 1..=8", "truncate_prompt_tokens: 9 is not in 1..=8");
        check("no model is named `items[0]`", "no model is named `items[0]`");
        let full = Error::ResourceExhausted { what: "full".into(), retry_after: Duration::from_secs(3) };
        let status = renamed(&full.into(), "query", 0);
        assert!(tonic_types::StatusExt::get_error_details(&status).retry_info().is_some(), "a time to come back stays");
    }

    #[test]
    fn scores_of_two_versions_are_not_mixed() {
        let of = |version, reward| {
            let model = v1::ModelIdentity { name: "pm".into(), version, ..Default::default() };
            (model, vec![v1::Score { reward, ..Default::default() }])
        };
        let (model, scores) = joined(vec![of(1, 0.5), of(1, 0.25)]).unwrap();
        assert_eq!((model.version, scores.iter().map(|score| score.reward).collect::<Vec<_>>()), (1, vec![0.5, 0.25]));
        let error = joined(vec![of(1, 0.5), of(2, 0.25)]).unwrap_err();
        assert!(error.retry_after().is_some(), "{error}");
    }

    #[test]
    fn candidates_come_back_in_their_own_order_or_not_at_all() {
        let ranked = |index, rank, reward| {
            let score = Some(v1::Score { reward, ..Default::default() });
            v1::Ranked { index, rank, score, ..Default::default() }
        };
        let scores = in_order(vec![ranked(2, 1, 3.0), ranked(0, 2, 2.0), ranked(1, 3, 1.0)], 3).unwrap();
        assert_eq!(scores.iter().map(|score| score.reward).collect::<Vec<_>>(), [2.0, 1.0, 3.0]);
        let error = Some(v1::ItemError { code: 3, message: "candidates[1]: why".into() });
        let failed = v1::Ranked { index: 1, error, ..Default::default() };
        let status = in_order(vec![ranked(0, 1, 2.0), failed], 2).unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "candidates[1]: why"));
        assert_eq!(in_order(vec![ranked(0, 1, 2.0)], 2).unwrap_err().code(), Code::Internal);
    }
}
