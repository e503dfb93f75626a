//! Short ways to write requests and to read answers.

use std::fmt::Debug;

use futures::StreamExt;
use plumb_client::{CallError, Client, Error, reward, v1};

/// Token ids as an input.
#[must_use]
pub fn ids(ids: &[u32]) -> v1::Input {
    let ids = v1::TokenIds { ids: ids.to_vec(), response_start: None };
    v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
}

/// Token ids of a prompt and its response.
#[must_use]
pub fn prompt_response(prompt: &[u32], response: &[u32]) -> v1::Input {
    let start = u32::try_from(prompt.len()).unwrap();
    let ids = v1::TokenIds { ids: [prompt, response].concat(), response_start: Some(start) };
    v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
}

/// A candidate of text.
#[must_use]
pub fn candidate(text: impl Into<String>) -> v1::Candidate {
    v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(text.into())) }
}

/// A candidate of token ids.
#[must_use]
pub fn candidate_ids(ids: &[u32]) -> v1::Candidate {
    let ids = v1::TokenIds { ids: ids.to_vec(), response_start: None };
    v1::Candidate { candidate: Some(v1::candidate::Candidate::TokenIds(ids)) }
}

/// A model by its name.
#[must_use]
pub fn named(name: &str) -> Option<v1::ModelSpec> {
    Some(v1::ModelSpec { name: name.to_owned(), choice: None })
}

/// A version of a model.
#[must_use]
pub fn version(name: &str, version: u64) -> Option<v1::ModelSpec> {
    Some(v1::ModelSpec { name: name.to_owned(), choice: Some(v1::model_spec::Choice::Version(version)) })
}

/// A model by a label.
#[must_use]
pub fn labelled(name: &str, label: &str) -> Option<v1::ModelSpec> {
    Some(v1::ModelSpec { name: name.to_owned(), choice: Some(v1::model_spec::Choice::Label(label.to_owned())) })
}

/// Items to score by a model.
#[must_use]
pub fn items(model: Option<v1::ModelSpec>, items: Vec<v1::Input>) -> v1::ScoreRequest {
    v1::ScoreRequest { model, items, ..Default::default() }
}

/// The bits of all rewards of a call, each of which must be there.
pub async fn rewards(client: &Client, request: v1::ScoreRequest) -> Vec<u32> {
    let answer = client.score(request).await.unwrap();
    answer.results.iter().map(|result| reward(result).unwrap().to_bits()).collect()
}

/// The scores of a call, each of which must be there.
pub async fn scores(client: &Client, request: v1::ScoreRequest) -> Vec<v1::Score> {
    let answer = client.score(request).await.unwrap();
    answer.results.iter().map(|result| plumb_client::score(result).unwrap().clone()).collect()
}

/// The error of a call that the server must refuse.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T, Error>) -> CallError {
    match result {
        Err(Error::Call(error)) => *error,
        other => panic!("not refused by the server: {other:?}"),
    }
}

/// All that a call of Generate has answered.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "the names of the messages")]
pub struct Generated {
    pub model: v1::ModelIdentity,
    pub ranker: Option<v1::ModelIdentity>,
    pub samples: Vec<Drawn>,
    pub summary: v1::GenerateSummary,
}

/// A sample, put together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drawn {
    /// All its text.
    pub text: String,
    /// All its token ids.
    pub ids: Vec<u32>,
    /// Messages that it came in.
    pub pieces: usize,
    /// How it ended.
    pub end: v1::SampleEnd,
}

/// Generates to the end, and checks the order of the messages.
///
/// # Errors
/// The call's, whenever it fails.
pub async fn generate(client: &Client, request: v1::GenerateRequest) -> Result<Generated, Error> {
    let mut answers = client.generate(request).await?;
    let first = answers.next().await.unwrap()?;
    let mut generated = Generated { model: first.model.unwrap(), ranker: first.ranker, ..Generated::default() };
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        assert_eq!((answer.model, answer.ranker), (None, None), "only the first message names the models");
        if let Some(summary) = answer.summary {
            generated.summary = summary;
            assert!(answers.next().await.is_none(), "the summary is the last message");
            return Ok(generated);
        }
        let index = answer.index as usize;
        if generated.samples.len() <= index {
            generated.samples.resize(index + 1, Drawn::default());
        }
        let sample = &mut generated.samples[index];
        assert_eq!(sample.end, v1::SampleEnd::default(), "nothing follows the end of a sample");
        sample.text += &answer.text;
        sample.ids.extend(answer.token_ids);
        sample.pieces += 1;
        sample.end = answer.end.unwrap_or_default();
    }
    panic!("no summary: {generated:?}");
}

/// Starts a generation on a model with a long context, which goes on until the answer is dropped, and waits for its
/// first token. Each of its steps computes one token.
pub async fn occupy(
    client: &Client,
    model: &str,
) -> impl StreamExt<Item = Result<v1::GenerateResponse, Error>> + Unpin {
    let request = v1::GenerateRequest {
        model: named(model),
        prompt: Some(ids(&[0])),
        stopping: Some(v1::Stopping { max_new_tokens: Some(50_000), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let mut answers = client.with_call_timeout(None).generate(request).await.unwrap();
    while answers.next().await.unwrap().unwrap().token_ids.is_empty() {}
    answers
}
