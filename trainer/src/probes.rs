//! Probes of a version: a few inputs, scored by the decoder that will serve them, whose scores go into the manifest.

use std::ops::Range;
use std::path::{Path, PathBuf};

use plumb_model::cache::PAGE;
use plumb_model::checkpoint::manifest::{MOST_PROBES, Probe, ProbeInput};
use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::{LoadedModel, ModelKind};
use plumb_model::text::{Message, Rendered};
use serde::Deserialize;

use crate::data::Turns;
use crate::input::Lines;
use crate::{Error, Result};

/// Tokens in a step: the activations of a long text stay small.
const STEP_TOKENS: usize = 2048;

/// Which probes a published version gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Probes {
    /// Some short dialogues, as far as the checkpoint's template and context take them.
    #[default]
    Usual,
    /// Those of a file of JSON lines, all of which have to be taken: `{"text"}`, `{"messages"}` or
    /// `{"prompt", "response"}`, as `plumb score` reads them.
    File(PathBuf),
    /// None.
    None,
}

impl Probes {
    /// Scores them.
    ///
    /// # Errors
    /// If the file cannot be read, one of its inputs is refused, or a score is not a finite number.
    pub(crate) fn record(&self, model: &LoadedModel) -> Result<Vec<Probe>> {
        let probes: Vec<(ProbeInput, Rendered)> = match self {
            Self::None => return Ok(Vec::new()),
            Self::Usual => usual().filter_map(|input| Some((input.clone(), rendered(model, &input).ok()?))).collect(),
            Self::File(path) => {
                let render = |(line, input): (u64, ProbeInput)| {
                    let rendered = rendered(model, &input).map_err(|error| wrong(path, line, error))?;
                    Ok((input, rendered))
                };
                read(path)?.into_iter().map(render).collect::<Result<_>>()?
            }
        };
        let longest = probes.iter().map(|(_, rendered)| rendered.ids.len()).max().unwrap_or(0);
        let mut scorer = Scorer {
            model,
            pages: (0..longest.div_ceil(PAGE) as u32).collect(),
            kv: model.decoder.kv_store(longest.div_ceil(PAGE))?,
            workspace: model.decoder.workspace(),
        };
        let probe = |(input, rendered)| {
            let score = scorer.score(&rendered)?;
            if !score.is_finite() {
                return Err(Error::Recipe(format!(
                    "the checkpoint scores a probe as {score}: it is broken, and would answer nothing but errors"
                )));
            }
            Ok(Probe { input, score, dtype: model.decoder.dtype() })
        };
        probes.into_iter().map(probe).collect()
    }
}

/// Of different lengths, in words that any tokenizer takes.
fn usual() -> impl Iterator<Item = ProbeInput> {
    const DIALOGUES: [&[&str]; 4] = [
        &["What is two plus two?", "Four."],
        &["What is two plus two?", "I do not want to talk to you."],
        &[
            "Can you recommend a book about the sea?",
            "Moby-Dick, by Herman Melville. Would you rather have something shorter?",
            "Yes, please.",
            "Then try The Old Man and the Sea, by Ernest Hemingway: about a hundred pages.",
        ],
        &[
            "Why do the leaves of many trees change their colour in autumn, and why do firs and pines stay green?",
            "In summer the green of chlorophyll hides all other colours of a leaf. When days get shorter and colder, the \
             tree takes the chlorophyll apart and stores what it is made of in twigs and roots. The yellow and orange \
             colours that were there all along become visible, and some trees make a red one from sugar that is left in \
             the leaf. Then a layer of cork grows between leaf and twig, and the leaf falls. The needles of firs and \
             pines have little surface and a coat of wax, so that they lose hardly any water and do not freeze easily. \
             The tree can keep them for several years, and has them ready on every warm day of the winter.",
        ],
    ];
    DIALOGUES.into_iter().map(|turns| {
        let roles = ["user", "assistant"].into_iter().cycle();
        ProbeInput::Messages(roles.zip(turns).map(|(role, said)| Message::new(role, *said)).collect())
    })
}

#[derive(Deserialize)]
struct Line {
    text: Option<String>,
    messages: Option<Turns>,
    prompt: Option<Turns>,
    response: Option<String>,
}

/// The inputs of a file with their lines.
fn read(path: &Path) -> Result<Vec<(u64, ProbeInput)>> {
    let mut lines = Lines::open(path)?;
    let mut inputs = Vec::new();
    while let Some((number, line)) = lines.next()? {
        if inputs.len() == MOST_PROBES {
            return Err(wrong(path, number, format!("a manifest holds {MOST_PROBES} probes")));
        }
        inputs.push((number, parse(&line).map_err(|reason| wrong(path, number, reason))?));
    }
    match inputs.is_empty() {
        true => Err(Error::Malformed { path: path.to_owned(), reason: "there is no probe in it".to_owned() }),
        false => Ok(inputs),
    }
}

fn parse(line: &[u8]) -> std::result::Result<ProbeInput, String> {
    let Line { text, messages, prompt, response } = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let turns = |turns: Turns| match turns {
        Turns::Text(text) => vec![Message::new("user", text)],
        Turns::Conversation(turns) => {
            turns.into_iter().map(|turn| Message::new(turn.role, turn.content)).collect::<Vec<_>>()
        }
    };
    match (text, messages, prompt, response) {
        (Some(text), None, None, None) => Ok(ProbeInput::Text(text)),
        (None, Some(messages @ Turns::Conversation(_)), None, None) => Ok(ProbeInput::Messages(turns(messages))),
        (None, None, Some(prompt), Some(response)) => {
            let answer = Message::new("assistant", response);
            Ok(ProbeInput::Messages(turns(prompt).into_iter().chain([answer]).collect()))
        }
        _ => Err("a probe needs exactly one of: text; messages; prompt and response".to_owned()),
    }
}

fn wrong(path: &Path, line: u64, reason: impl std::fmt::Display) -> Error {
    Error::Malformed { path: path.to_owned(), reason: format!("line {line}: {reason}") }
}

/// The tokens of an input that the model can score.
fn rendered(model: &LoadedModel, input: &ProbeInput) -> plumb_model::Result<Rendered> {
    let rendered = input.render(&model.text)?;
    if model.info.kind == ModelKind::Language {
        rendered.require_response()?;
    }
    Ok(rendered)
}

/// Scores one sequence after the other, each from its first token on.
struct Scorer<'a> {
    model: &'a LoadedModel,
    pages: Vec<u32>,
    kv: KvStore,
    workspace: Workspace,
}

impl Scorer<'_> {
    /// A reward, or the mean log-probability of the response.
    fn score(&mut self, rendered: &Rendered) -> Result<f32> {
        let ids = &rendered.ids;
        let mut values = Vec::new();
        for start in (0..ids.len()).step_by(STEP_TOKENS) {
            let positions = start..ids.len().min(start + STEP_TOKENS);
            let read = match self.model.info.kind {
                ModelKind::Preference if positions.end == ids.len() => Read::LastReward,
                ModelKind::Preference => Read::Nothing,
                ModelKind::Language => log_probs(ids, &rendered.response, &positions),
            };
            let sequence = StepSequence {
                tokens: &ids[positions.clone()],
                position: positions.start,
                pages: &self.pages[..positions.end.div_ceil(PAGE)],
                read,
            };
            let step = Step { sequences: vec![sequence] };
            let found = self.model.decoder.step(&step, &mut self.kv, &mut self.workspace)?;
            values.extend(found.into_iter().flatten());
        }
        Ok((values.iter().copied().map(f64::from).sum::<f64>() / values.len() as f64) as f32)
    }
}

/// The log-probabilities of those tokens of a response that follow on a token at one of the positions.
fn log_probs<'a>(ids: &'a [u32], response: &Range<usize>, positions: &Range<usize>) -> Read<'a> {
    let (first, end) = (response.start.max(positions.start + 1), response.end.min(positions.end + 1));
    if first >= end {
        return Read::Nothing;
    }
    Read::LogProbs { rows: first - 1 - positions.start..end - 1 - positions.start, targets: &ids[first..end] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_of_a_response_is_read_once() {
        let ids: Vec<u32> = (0..100).collect();
        for response in [1..100, 40..41, 32..64, 33..97, 64..65] {
            let mut read: Vec<u32> = Vec::new();
            for start in (0..100).step_by(32) {
                let positions = start..100.min(start + 32);
                if let Read::LogProbs { rows, targets } = log_probs(&ids, &response, &positions) {
                    assert!(rows.len() == targets.len() && rows.end <= positions.len(), "{response:?} {positions:?}");
                    assert!(rows.zip(targets).all(|(row, target)| (start + row + 1) as u32 == *target));
                    read.extend(targets);
                }
            }
            assert_eq!(read, ids[response].to_vec());
        }
    }

    #[test]
    fn lines_are_read_as_plumb_score_reads_them() {
        let dialogue = ProbeInput::Messages(vec![Message::new("user", "q"), Message::new("assistant", "a")]);
        for (line, expected) in [
            (r#"{"text": "a", "id": 1}"#, Ok(ProbeInput::Text("a".to_owned()))),
            (r#"{"prompt": "q", "response": "a"}"#, Ok(dialogue.clone())),
            (r#"{"prompt": [{"role": "user", "content": "q"}], "response": "a"}"#, Ok(dialogue.clone())),
            (
                r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
                Ok(dialogue),
            ),
            (r#"{"prompt": "q"}"#, Err("exactly one of")),
            (r#"{"messages": "q"}"#, Err("exactly one of")),
            (r#"{"text": 1}"#, Err("expected a string")),
        ] {
            match (parse(line.as_bytes()), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{line}"),
                (Err(reason), Err(words)) => assert!(reason.contains(words), "{line}: {reason}"),
                (found, expected) => panic!("{line}: {found:?}, not {expected:?}"),
            }
        }
    }
}
