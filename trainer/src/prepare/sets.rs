//! Readers of the data sets, each of a format that is published.

use std::io::Read as _;
use std::path::Path;

use plumb_client::parquet::is_parquet;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Body, Dataset, Record, Sink, Turn};
use super::{stack_exchange, wikipedia};
use crate::input::{Lines, open};
use crate::{Error, Result};

/// What a line came to: a record, or why there is none.
type Found = std::result::Result<Record, String>;

/// Reads a file into the sink.
pub(super) fn read(dataset: Dataset, path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    match dataset {
        Dataset::StackExchange if unpacked_name(path).ends_with(".xml") => stack_exchange::read_dump(path, sink),
        Dataset::StackExchange => json_lines(path, sink, stack_exchange::question),
        Dataset::Wikipedia => wikipedia::read_history(path, sink),
        Dataset::WikiEdits if unpacked_name(path).ends_with(".tsv") => wiki_split(path, sink),
        Dataset::WikiEdits => json_lines(path, sink, |line, _| wikipedia::edit(line)),
        Dataset::HhRlhf => json_lines(path, sink, |line, _| hh_rlhf(line)),
        Dataset::Hellaswag => json_lines(path, sink, hellaswag),
        Dataset::Gsm8kSolutions => json_lines(path, sink, gsm8k),
        Dataset::Pairs => json_lines(path, sink, |line, _| pairs(line)),
        Dataset::Webgpt => webgpt(path, sink),
        Dataset::SummarizeFromFeedback => json_lines(path, sink, |line, _| summaries(line)),
        Dataset::Reddit | Dataset::Code => Err(Error::Recipe("these files are read together".into())),
        Dataset::EthicsUtilitarianism => ethics(path, sink, false, |row| ethics_row(dataset, row)),
        Dataset::EthicsJustice | Dataset::EthicsDeontology | Dataset::EthicsCommonsense | Dataset::EthicsVirtue => {
            ethics(path, sink, true, |row| ethics_row(dataset, row))
        }
        Dataset::Text if is_parquet(path) || unpacked_name(path).contains(".json") => {
            json_lines(path, sink, |line: TextLine, _| Ok(text(line.text)))
        }
        Dataset::Text => {
            let mut content = String::new();
            open(path)?.read_to_string(&mut content).map_err(Error::io(path))?;
            sink.read();
            sink.record(text(content))
        }
    }
}

/// The name of a file in lower case, without the ending that says how it is packed.
fn unpacked_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let packed = [".gz", ".bz2", ".zst"].into_iter().find_map(|ending| name.strip_suffix(ending));
    packed.map(str::to_owned).unwrap_or(name)
}

/// Reads JSONL; what `found` says no to is dropped with its reason.
fn json_lines<T: DeserializeOwned>(
    path: &Path,
    sink: &mut Sink<'_>,
    found: impl Fn(T, &Sink<'_>) -> Found,
) -> Result<()> {
    let mut lines = Lines::open(path)?;
    while let Some((number, line)) = lines.next()? {
        sink.read();
        match serde_json::from_slice(&line) {
            Ok(line) => match found(line, sink) {
                Ok(record) => sink.record(record)?,
                Err(reason) => sink.drop(&reason),
            },
            Err(error) => sink.bad(path, number, &error.to_string())?,
        }
    }
    Ok(())
}

fn pair(group: &str, prompt: String, chosen: &str, rejected: &str) -> Record {
    let body = Body::Pair { prompt, chosen: chosen.to_owned(), rejected: rejected.to_owned() };
    Record { group: group.to_owned(), body }
}

/// A binary task as a pair: the prompt with the right label is better than with the wrong one (Askell et al. 2021, section
/// 3.1). `labels` are those of 0 and 1.
fn labelled(group: &str, label: &str, prompt: &str, labels: [&str; 2]) -> Option<Record> {
    let right = match label {
        "0" => 0,
        "1" => 1,
        _ => return None,
    };
    Some(pair(group, format!("{prompt}\n"), labels[right], labels[1 - right]))
}

/// A row of one of the Ethics sets as a pair; `None` for other columns, or another label, than the set has.
pub(crate) fn ethics_row(dataset: Dataset, row: &[&str]) -> Option<Record> {
    match (dataset, row) {
        (Dataset::EthicsUtilitarianism, [better, worse]) => Some(pair(better, String::new(), better, worse)),
        (Dataset::EthicsJustice, [label, scenario]) => {
            labelled(&first_words(scenario, 6), label, scenario, ["Bad", "Good"])
        }
        (Dataset::EthicsDeontology, [label, scenario, excuse]) => {
            labelled(scenario, label, &format!("{scenario} {excuse}"), ["Bad", "Good"])
        }
        // 1 means clearly wrong.
        (Dataset::EthicsCommonsense, [label, input, ..]) => labelled(input, label, input, ["Good", "Bad"]),
        (Dataset::EthicsVirtue, [label, scenario]) => {
            let (scenario, virtue) = scenario.split_once("[SEP]")?;
            let prompt = format!("{}\n{}", scenario.trim(), virtue.trim());
            labelled(scenario, label, &prompt, ["False", "True"])
        }
        _ => None,
    }
}

fn first_words(text: &str, count: usize) -> String {
    text.split_whitespace().take(count).collect::<Vec<_>>().join(" ")
}

/// Reads CSV; fields may hold line breaks.
fn ethics(path: &Path, sink: &mut Sink<'_>, header: bool, found: impl Fn(&[&str]) -> Option<Record>) -> Result<()> {
    let mut reader = csv::ReaderBuilder::new().has_headers(header).flexible(true).from_reader(open(path)?);
    for row in reader.records() {
        sink.read();
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                let line = error.position().map_or(0, csv::Position::line);
                sink.bad(path, line, &error.to_string())?;
                continue;
            }
        };
        let line = row.position().map_or(0, csv::Position::line);
        match found(&row.iter().collect::<Vec<_>>()) {
            Some(record) => sink.record(record)?,
            None => sink.bad(path, line, "other columns or another label than this set has")?,
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Transcripts {
    chosen: String,
    rejected: String,
}

/// Transcripts of `Human:` and `Assistant:` turns as dialogues.
fn hh_rlhf(line: Transcripts) -> Found {
    let [chosen, rejected] = [&line.chosen, &line.rejected].map(|text| turns(text, ["\n\nHuman:", "\n\nAssistant:"]));
    dialogue(chosen, rejected)
}

/// Two dialogues that may begin alike.
fn dialogue(chosen: Vec<Turn>, rejected: Vec<Turn>) -> Found {
    let ends_well = |turns: &[Turn]| turns.last().is_some_and(|(role, _)| *role == "assistant");
    if !ends_well(&chosen) || !ends_well(&rejected) {
        return Err("no answer at the end".to_owned());
    }
    let group = chosen.first().map(|(_, content)| content.trim().to_lowercase()).unwrap_or_default();
    let [last_chosen, last_rejected] = [chosen.len() - 1, rejected.len() - 1];
    let body = match chosen[..last_chosen] == rejected[..last_rejected] {
        true => Body::Dialogue {
            chosen: chosen[last_chosen..].to_vec(),
            rejected: rejected[last_rejected..].to_vec(),
            prompt: chosen[..last_chosen].to_vec(),
        },
        false => Body::Dialogue { prompt: Vec::new(), chosen, rejected },
    };
    Ok(Record { group, body })
}

/// WikiSplit: a sentence, and the two that an editor made of it.
fn wiki_split(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let mut lines = Lines::open(path)?;
    while let Some((number, line)) = lines.next()? {
        sink.read();
        match std::str::from_utf8(&line).ok().and_then(|line| line.split_once('\t')) {
            Some((before, after)) => {
                let after = after.replace(" <::::> ", " ");
                sink.record(pair(before, String::new(), &after, before))?;
            }
            None => sink.bad(path, number, "not two columns of UTF-8")?,
        }
    }
    Ok(())
}

/// Takes a transcript apart at the labels of user and assistant.
fn turns(text: &str, labels: [&str; 2]) -> Vec<Turn> {
    const ROLES: [&str; 2] = ["user", "assistant"];
    let mut found = Vec::new();
    let mut rest = text;
    // The next label, which one it is, and what comes after it.
    let next = |text: &str| {
        let at = |i: usize| text.find(labels[i]).map(|position| (position, i));
        [at(0), at(1)].into_iter().flatten().min()
    };
    let Some((position, mut label)) = next(rest) else { return found };
    rest = &rest[position + labels[label].len()..];
    loop {
        let following = next(rest);
        let content = &rest[..following.map_or(rest.len(), |(position, _)| position)];
        found.push((ROLES[label], content.trim().to_owned()));
        let Some((position, other)) = following else { return found };
        rest = &rest[position + labels[other].len()..];
        label = other;
    }
}

/// A context, its endings, and which of them is right.
#[derive(Deserialize)]
pub(crate) struct Hellaswag {
    pub(crate) ctx: String,
    pub(crate) endings: Vec<String>,
    pub(crate) label: usize,
}

/// The right ending and one of the wrong ones, drawn (Askell et al. 2021, section 3.2).
fn hellaswag(line: Hellaswag, sink: &Sink<'_>) -> Found {
    let Hellaswag { ctx, endings, label } = line;
    let Some(right) = endings.get(label) else { return Err("no such ending as the label says".to_owned()) };
    let wrong: Vec<&String> =
        endings.iter().enumerate().filter(|(i, _)| *i != label).map(|(_, ending)| ending).collect();
    let Some(wrong) = pick(&wrong, sink.draw("ending", &ctx)) else { return Err("no wrong ending".to_owned()) };
    Ok(pair(&ctx, format!("{ctx} "), right, wrong))
}

/// One of several, by a number from 0 to 1.
pub(super) fn pick<T>(of: &[T], draw: f64) -> Option<&T> {
    of.get(((draw * of.len() as f64) as usize).min(of.len().saturating_sub(1)))
}

#[derive(Deserialize)]
struct Gsm8k {
    question: String,
    #[serde(flatten)]
    solutions: serde_json::Map<String, serde_json::Value>,
}

/// A right and a wrong solution of a question, drawn.
fn gsm8k(line: Gsm8k, sink: &Sink<'_>) -> Found {
    let marked = |right: bool| {
        let solutions = line.solutions.values().filter(|value| value["is_correct"].as_bool() == Some(right));
        let texts: Vec<&str> = solutions.filter_map(|value| value["solution"].as_str()).collect();
        pick(&texts, sink.draw(if right { "right" } else { "wrong" }, &line.question)).copied()
    };
    match (marked(true), marked(false)) {
        (Some(right), Some(wrong)) => {
            Ok(pair(&line.question, format!("Question: {}\nAnswer: ", line.question), right, wrong))
        }
        _ => Err("not both a right and a wrong solution".to_owned()),
    }
}

#[derive(Deserialize)]
struct Summaries {
    info: Summarized,
    summaries: [TextLine; 2],
    choice: usize,
}

/// Of a post or an article.
#[derive(Deserialize)]
struct Summarized {
    title: Option<String>,
    post: Option<String>,
    article: Option<String>,
}

fn summaries(line: Summaries) -> Found {
    let Summaries { info, summaries: [first, second], choice } = line;
    let Some(text) = info.post.or(info.article) else { return Err("neither a post nor an article".to_owned()) };
    let (chosen, rejected) = match choice {
        0 => (first.text, second.text),
        1 => (second.text, first.text),
        _ => return Err("no such summary as the choice says".to_owned()),
    };
    let title = info.title.map(|title| format!("{title}\n\n")).unwrap_or_default();
    Ok(pair(&text, format!("{title}{text}\n\nTL;DR: "), chosen.trim(), rejected.trim()))
}

#[derive(Deserialize)]
struct Comparison {
    text: [String; 2],
    score: [f64; 2],
}

fn webgpt(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let comparisons: Vec<Comparison> = serde_json::from_reader(open(path)?)
        .map_err(|error| Error::Malformed { path: path.to_owned(), reason: error.to_string() })?;
    for Comparison { text, score } in comparisons {
        sink.read();
        let [first, second] = text.map(|text| turns(&text, ["## Human:", "## Assistant:"]));
        let found = match score[0].total_cmp(&score[1]) {
            std::cmp::Ordering::Greater => dialogue(first, second),
            std::cmp::Ordering::Less => dialogue(second, first),
            std::cmp::Ordering::Equal => Err("tie".to_owned()),
        };
        match found {
            Ok(record) => sink.record(record)?,
            Err(reason) => sink.drop(&reason),
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Pairs {
    #[serde(default)]
    prompt: Side,
    chosen: Side,
    rejected: Side,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Side {
    Text(String),
    Dialogue(Vec<Message>),
}

impl Default for Side {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

fn pairs(line: Pairs) -> Found {
    let turns = |messages: Vec<Message>| {
        let turn = |Message { role, content }| match &role[..] {
            "system" => Ok(("system", content)),
            "user" => Ok(("user", content)),
            "assistant" => Ok(("assistant", content)),
            _ => Err(format!("role {role}")),
        };
        messages.into_iter().map(turn).collect::<std::result::Result<Vec<Turn>, String>>()
    };
    match (line.prompt, line.chosen, line.rejected) {
        (Side::Text(prompt), Side::Text(chosen), Side::Text(rejected)) => {
            let group = if prompt.is_empty() { chosen.clone() } else { prompt.clone() };
            Ok(pair(&group, prompt, &chosen, &rejected))
        }
        (Side::Dialogue(prompt), Side::Text(chosen), Side::Text(rejected)) => {
            let prompt = turns(prompt)?;
            let answer = |content| [prompt.clone(), vec![("assistant", content)]].concat();
            dialogue(answer(chosen), answer(rejected))
        }
        (Side::Dialogue(prompt), Side::Dialogue(chosen), Side::Dialogue(rejected)) => {
            let prompt = turns(prompt)?;
            dialogue([prompt.clone(), turns(chosen)?].concat(), [prompt, turns(rejected)?].concat())
        }
        (Side::Text(prompt), Side::Dialogue(chosen), Side::Dialogue(rejected)) if prompt.is_empty() => {
            dialogue(turns(chosen)?, turns(rejected)?)
        }
        _ => Err("a text beside a dialogue".to_owned()),
    }
}

#[derive(Deserialize)]
struct TextLine {
    text: String,
}

fn text(text: String) -> Record {
    Record { group: text.clone(), body: Body::Text(text) }
}
