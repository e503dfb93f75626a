//! Scores by a running server.

use std::ops::Range;
use std::time::Duration;

use futures::{StreamExt, stream};
use plumb_client::v1::{self, model_spec::Choice};
use plumb_client::{ApiKey, Client, ClientOptions, Code, Error as ClientError, ItemFailure};
use plumb_model::loaded::ModelKind;
use plumb_model::text::{ChatFormat, HhhPrompt as Prompt, Message, Response, TextInput, Truncation};
use tokio::runtime::Runtime;

use super::options::{HhhPrompt, Options, Task};
use super::scorer::{Advance, How, Model, Outcome, Score, Scorer, kind_name, with_separator};
use crate::{Error, Result};

/// Items in a call, well below any server's limit.
const BATCH: usize = 32;

/// Calls in flight: enough for the server's steps to be full.
const CALLS: usize = 8;

/// Longest wait for an answer, with all tries.
const PATIENCE: Duration = Duration::from_secs(600);

/// A server and one of its models.
pub(super) struct Server {
    runtime: Runtime,
    client: Client,
    /// The version that was there at the beginning answers to the end.
    spec: v1::ModelSpec,
    model: Model,
}

/// A call, and the texts that it answers.
enum Call {
    Score(Vec<usize>, Vec<v1::Input>),
    /// Responses to one prompt.
    Rank(Vec<usize>, v1::Input, Vec<v1::Candidate>),
}

type Answers<T> = Vec<(usize, std::result::Result<T, String>)>;

impl Server {
    pub(super) fn open(url: &str, options: &Options) -> Result<Self> {
        let runtime = Runtime::new().map_err(|error| Error::Recipe(format!("no threads for the client: {error}")))?;
        let client = runtime.block_on(Client::connect(ClientOptions {
            api_key: options.api_key.clone().map(ApiKey::new),
            call_timeout: Some(PATIENCE),
            ..ClientOptions::new(url)
        }))?;
        let named = v1::ModelSpec {
            name: options.name.clone().unwrap_or_default(),
            choice: options.version.map(Choice::Version),
        };
        let status = runtime.block_on(async {
            if options.name.is_some() || options.task != Task::Lambada {
                return client.get_model(named).await;
            }
            // An empty name means a preference model, if there is one.
            let models = client.list_models().await?;
            let language = |status: &v1::ModelStatus| status.is_default && kind(status) == Some(ModelKind::Language);
            models.into_iter().find(language).ok_or_else(|| ClientError::Contract("it has no language model".into()))
        })?;
        let (Some(identity), Some(details), Some(kind)) = (&status.model, &status.details, kind(&status)) else {
            return Err(Error::Recipe(format!("{url}: the model is not loaded yet; wait for it, or name another")));
        };
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let model = Model {
            source: url.to_owned(),
            name: Some(identity.name.clone()),
            version: Some(identity.version),
            adapter: some(&details.adapter),
            kind: kind_name(kind),
            architecture: details.architecture.clone(),
            dtype: details.dtype.clone(),
            parameters: details.parameters,
            max_input_tokens: details.max_input_tokens as usize,
            weights_digest: identity.weights_digest.clone(),
            chat_template_sha256: some(&details.chat_template_sha256),
            hhh_prompt: details.hhh_prompt.clone(),
        };
        let spec = v1::ModelSpec { name: identity.name.clone(), choice: Some(Choice::Version(identity.version)) };
        Ok(Self { runtime, client, spec, model })
    }

    /// Makes calls, some at a time, and puts what they answer in the order of the texts.
    fn all<C, T, F>(
        &self,
        count: usize,
        calls: Vec<C>,
        call: impl Fn(C) -> F,
        advance: Advance<'_>,
    ) -> Result<Vec<std::result::Result<T, String>>>
    where
        F: Future<Output = std::result::Result<Answers<T>, ClientError>>,
    {
        let mut outcomes: Vec<_> = (0..count).map(|_| None).collect();
        self.runtime.block_on(async {
            let mut answers = stream::iter(calls).map(call).buffer_unordered(CALLS);
            while let Some(answers) = answers.next().await {
                for (place, answer) in answers? {
                    advance(1);
                    outcomes[place] = Some(answer);
                }
            }
            Ok::<_, ClientError>(())
        })?;
        let missing = || Err("the server has not answered".to_owned());
        Ok(outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(missing)).collect())
    }

    async fn call(
        &self,
        call: Call,
        text: v1::TextOptions,
        objective: v1::Objective,
    ) -> std::result::Result<Answers<Score>, ClientError> {
        let (model, priority) = (Some(self.spec.clone()), v1::Priority::Low as i32);
        let (text, objective) = (Some(text), objective as i32);
        match call {
            Call::Score(places, items) => {
                let request = v1::ScoreRequest { model, items, text, objective, priority, ..Default::default() };
                let answered = match self.client.score(request).await {
                    Ok(answered) => answered.results,
                    Err(error) => return of_items(error, &places),
                };
                let scores = answered.iter().map(|result| match plumb_client::score(result) {
                    Ok(found) => Ok(score(found)),
                    Err(failure) => Err(failure.message),
                });
                Ok(places.into_iter().zip(scores).collect())
            }
            Call::Rank(places, prompt, candidates) => {
                let prompt = Some(prompt);
                let request =
                    v1::RankRequest { model, prompt, candidates, text, objective, priority, ..Default::default() };
                let answered = match self.client.rank(request).await {
                    Ok(answered) => answered.ranked,
                    Err(error) => return of_items(error, &places),
                };
                let scores = answered.into_iter().map(|ranked| {
                    let outcome = match (&ranked.score, ranked.error) {
                        (Some(found), _) => Ok(score(found)),
                        (None, Some(error)) => Err(error.message),
                        (None, None) => Err("the server sent neither a score nor an error".to_owned()),
                    };
                    (places[ranked.index as usize], outcome)
                });
                Ok(scores.collect())
            }
        }
    }

    /// Whether the likeliest tokens after a text are those of its continuation.
    async fn goes_on(
        &self,
        ids: Vec<u32>,
        response: Range<usize>,
        text: v1::TextOptions,
    ) -> std::result::Result<bool, ClientError> {
        let expected = ids[response.clone()].to_vec();
        let prompt = v1::TokenIds { ids: ids[..response.start].to_vec(), response_start: None };
        let request = v1::GenerateRequest {
            model: Some(self.spec.clone()),
            prompt: Some(v1::Input { input: Some(v1::input::Input::TokenIds(prompt)) }),
            text: Some(text),
            sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
            stopping: Some(v1::Stopping {
                max_new_tokens: Some(u32::try_from(expected.len()).unwrap_or(u32::MAX)),
                ignore_eos: true,
                ..Default::default()
            }),
            priority: v1::Priority::Low as i32,
            ..Default::default()
        };
        let mut answers = self.client.generate(request).await?;
        let mut drawn = Vec::new();
        while let Some(answer) = answers.next().await {
            drawn.extend(answer?.token_ids);
        }
        Ok(drawn == expected)
    }
}

impl Scorer for Server {
    fn model(&self) -> &Model {
        &self.model
    }

    fn score(&mut self, texts: &[&TextInput], how: &How, advance: Advance<'_>) -> Result<Vec<Outcome>> {
        let objective = match how.mutual_information {
            true => v1::Objective::MutualInformation,
            false => v1::Objective::MeanLogProb,
        };
        let text = wire_options(how);
        self.all(texts.len(), calls(texts), |call| self.call(call, text, objective), advance)
    }

    fn continues(
        &mut self,
        texts: &[(String, String)],
        how: &How,
        advance: Advance<'_>,
    ) -> Result<Vec<std::result::Result<bool, String>>> {
        let text = wire_options(how);
        let call = async |place: usize| {
            let (before, continuation) = &texts[place];
            let whole = vec![format!("{before}{continuation}")];
            let request =
                v1::TokenizeRequest { model: Some(self.spec.clone()), texts: whole, add_special_tokens: None };
            let outcome = match self.client.tokenize(request).await {
                Ok(answer) => {
                    let tokens = answer.tokenized.into_iter().next().unwrap_or_default().tokens;
                    let response = covering(&tokens, before.len());
                    let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
                    match response.is_empty() || response.start == 0 {
                        true => return Ok(vec![(place, Err("there is nothing to continue".to_owned()))]),
                        false => self.goes_on(ids, response, text).await,
                    }
                }
                Err(error) => Err(error),
            };
            match outcome {
                Ok(same) => Ok(vec![(place, Ok(same))]),
                Err(error) => of_items(error, &[place]),
            }
        };
        self.all(texts.len(), (0..texts.len()).collect(), call, advance)
    }

    fn opening(&mut self, said: &str, hhh_prompt: HhhPrompt) -> Result<String> {
        let request = v1::RenderRequest {
            model: Some(self.spec.clone()),
            input: Some(plumb_client::conversation([("user", said)])),
            text: Some(v1::TextOptions {
                chat_format: v1::ChatFormat::HumanAssistant as i32,
                hhh_prompt: wire_prompt(hhh_prompt.of_text()) as i32,
                truncation: v1::Truncation::Left as i32,
                max_tokens: None,
            }),
            add_generation_prompt: true,
        };
        Ok(with_separator(self.runtime.block_on(self.client.render(request))?.text, said))
    }
}

fn kind(status: &v1::ModelStatus) -> Option<ModelKind> {
    match status.details.as_ref()?.kind() {
        v1::ModelKind::Language => Some(ModelKind::Language),
        v1::ModelKind::Preference => Some(ModelKind::Preference),
        v1::ModelKind::Unspecified => None,
    }
}

/// A call's error is that of its items if it says nothing about other calls; else nothing can be measured.
fn of_items<T>(error: ClientError, places: &[usize]) -> std::result::Result<Answers<T>, ClientError> {
    // All items of a call that fail in the same way fail it as a whole.
    let of_this_call =
        [Code::InvalidArgument, Code::OutOfRange, Code::ResourceExhausted, Code::DeadlineExceeded, Code::Internal];
    if !of_this_call.contains(&error.code()) {
        return Err(error);
    }
    let message = ItemFailure::from(&error).message;
    Ok(places.iter().map(|place| (*place, Err(message.clone()))).collect())
}

fn score(found: &v1::Score) -> Score {
    match &found.log_probs {
        None => Score::Reward(found.reward),
        Some(parts) => Score::LogProb {
            mean: parts.mean,
            sum: parts.sum,
            // The reward is the objective's value, which was asked for.
            mutual_information: parts.unconditional_sum.map(|_| found.reward),
            tokens: u64::from(parts.response_tokens),
        },
    }
}

/// Texts as calls: responses to one prompt that follow one another in one, other texts by the batch.
fn calls(texts: &[&TextInput]) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    let mut last: Option<&TextInput> = None;
    for (place, text) in texts.iter().enumerate() {
        let (prompt, candidate) = match text {
            TextInput::PromptResponse { prompt, response } => (Some(&**prompt), Some(wire_candidate(response))),
            _ => (None, None),
        };
        match (calls.last_mut(), prompt, candidate) {
            (Some(Call::Rank(places, _, candidates)), Some(prompt), Some(candidate))
                if last == Some(prompt) && places.len() < BATCH =>
            {
                places.push(place);
                candidates.push(candidate);
            }
            (_, Some(prompt), Some(candidate)) => {
                calls.push(Call::Rank(vec![place], wire_input(prompt), vec![candidate]));
            }
            (Some(Call::Score(places, items)), ..) if places.len() < BATCH => {
                places.push(place);
                items.push(wire_input(text));
            }
            _ => calls.push(Call::Score(vec![place], vec![wire_input(text)])),
        }
        last = prompt;
    }
    calls
}

fn wire_input(text: &TextInput) -> v1::Input {
    match text {
        TextInput::Text(text) => plumb_client::text(text.as_str()),
        TextInput::Conversation(turns) => {
            plumb_client::conversation(turns.iter().map(|Message { role, content }| (role.as_str(), content.as_str())))
        }
        TextInput::TokenIds { ids, response_start } => {
            let response_start = response_start.and_then(|start| u32::try_from(start).ok());
            let ids = v1::TokenIds { ids: ids.clone(), response_start };
            v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
        }
        // A prompt has no response of its own; the server says so.
        TextInput::PromptResponse { .. } => v1::Input::default(),
    }
}

fn wire_candidate(response: &Response) -> v1::Candidate {
    use v1::candidate::Candidate;
    let candidate = match response {
        Response::Text(text) => Candidate::Text(text.clone()),
        Response::TokenIds(ids) => Candidate::TokenIds(v1::TokenIds { ids: ids.clone(), response_start: None }),
    };
    v1::Candidate { candidate: Some(candidate) }
}

fn wire_options(how: &How) -> v1::TextOptions {
    let chat_format = match how.text.chat_format {
        ChatFormat::Auto => v1::ChatFormat::Unspecified,
        ChatFormat::Template => v1::ChatFormat::Template,
        ChatFormat::HumanAssistant => v1::ChatFormat::HumanAssistant,
    };
    let truncation = match how.text.truncation {
        Truncation::Refuse => v1::Truncation::Refuse,
        Truncation::Left => v1::Truncation::Left,
        Truncation::Right => v1::Truncation::Right,
    };
    v1::TextOptions {
        chat_format: chat_format as i32,
        hhh_prompt: wire_prompt(how.text.hhh_prompt) as i32,
        truncation: truncation as i32,
        max_tokens: None,
    }
}

fn wire_prompt(prompt: Prompt) -> v1::HhhPrompt {
    match prompt {
        Prompt::None => v1::HhhPrompt::None,
        Prompt::Short => v1::HhhPrompt::Short,
        Prompt::Full => v1::HhhPrompt::Full,
    }
}

/// The tokens that stand for at least one byte from `start` on.
fn covering(tokens: &[v1::Token], start: usize) -> Range<usize> {
    let covers = |token: &v1::Token| token.stop > token.start && token.stop as usize > start;
    match (tokens.iter().position(covers), tokens.iter().rposition(covers)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => tokens.len()..tokens.len(),
    }
}
