//! Readers of the sets that are measured on.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use plumb_client::hhh;
use plumb_model::text::{Message, TextInput};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::items::{Item, Sink, common, document, input, key, names, plain, read_text, turns};
use super::options::{Options, Task};
use super::rewardbench;
use crate::Result;
use crate::data::Turns;
use crate::input::{BadLines, Lines, open};
use crate::prepare::Dataset;
use crate::prepare::sets::{Hellaswag, ethics_row};
use crate::prepare::{Body, Record};

/// Why a line is no item.
type Found = std::result::Result<Item, String>;

/// The items of a task's files, and how many lines make no sense.
pub(super) fn read(options: &Options, warn: &mut dyn FnMut(&str)) -> Result<(Vec<Item>, u64)> {
    let files = names(&options.files);
    let mut sink = Sink {
        files: &files,
        limit: options.limit.unwrap_or(usize::MAX),
        items: Vec::new(),
        bad: BadLines::at_most(options.max_bad_lines),
        warn,
    };
    for (file, path) in options.files.iter().enumerate() {
        read_file(options.task, file, path, &mut sink)?;
    }
    Ok((sink.items, sink.bad.skipped()))
}

fn read_file(task: Task, file: usize, path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    match task {
        Task::Pairs => sink.json_lines(file, path, pair),
        Task::Groups => groups(file, path, sink),
        Task::Choices => sink.json_lines(file, path, choices),
        Task::Hellaswag => sink.json_lines(file, path, hellaswag),
        Task::EthicsUtilitarianism => ethics(Dataset::EthicsUtilitarianism, 1, file, path, sink),
        Task::EthicsCommonsense => ethics(Dataset::EthicsCommonsense, 1, file, path, sink),
        // Askell et al. 2021, section 3.2: all of a group have to be right.
        Task::EthicsJustice => ethics(Dataset::EthicsJustice, 4, file, path, sink),
        Task::EthicsDeontology => ethics(Dataset::EthicsDeontology, 4, file, path, sink),
        Task::EthicsVirtue => ethics(Dataset::EthicsVirtue, 5, file, path, sink),
        Task::Hhh => {
            let malformed = |reason| crate::Error::Malformed { path: path.to_owned(), reason };
            let found = hhh::comparisons(&read_text(path)?).map_err(malformed)?;
            sink.list(file, path, found.into_iter().map(|found| found.map(comparison)))
        }
        Task::Truthfulqa => {
            let questions: Vec<Question> = document(path)?;
            sink.list(file, path, questions.into_iter().map(question))
        }
        Task::Rerank => samples(file, path, true, sink),
        Task::BestOfN => samples(file, path, false, sink),
        Task::Rewardbench => sink.json_lines(file, path, rewardbench::row),
        Task::RmBench => {
            let rows: Vec<rewardbench::Styles> = document(path)?;
            sink.list(file, path, rows.into_iter().map(rewardbench::styles))
        }
        Task::Lambada | Task::Elo => Ok(()),
    }
}

#[derive(Deserialize)]
struct PairLine {
    prompt: Option<Turns>,
    chosen: Turns,
    rejected: Turns,
    group: Option<Value>,
    id: Option<Value>,
}

fn pair(line: PairLine) -> Found {
    let PairLine { prompt, chosen, rejected, group: _, id } = line;
    if chosen == rejected {
        return Err("equal sides".to_owned());
    }
    let cluster = prompt.as_ref().map_or_else(|| common(&chosen, &rejected), key);
    let [chosen, rejected] = [chosen, rejected].map(|side| input(prompt.as_ref(), side));
    Ok(Item { id: id.map(words), ..Item::pair(cluster, chosen?, rejected?) })
}

/// A JSON value as the word that it stands for.
fn words(value: Value) -> String {
    match value {
        Value::String(text) => text,
        value => value.to_string(),
    }
}

/// Pairs with a group. The lines of a group need not follow one another.
fn groups(file: usize, path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let limit = std::mem::replace(&mut sink.limit, usize::MAX);
    let before = sink.items.len();
    sink.json_lines(file, path, |line: PairLine| {
        let Some(group) = line.group.clone() else { return Err("expected a group".to_owned()) };
        let group = words(group);
        Ok(Item { cluster: group.clone(), group: Some((group, 0)), ..pair(line)? })
    })?;
    sink.limit = limit;
    let mut sizes: HashMap<String, usize> = HashMap::new();
    let mut order: Vec<String> = Vec::new();
    for (group, _) in sink.items[before..].iter().filter_map(|item| item.group.as_ref()) {
        let size = sizes.entry(group.clone()).or_insert_with(|| {
            order.push(group.clone());
            0
        });
        *size += 1;
    }
    let kept: HashSet<String> = order.into_iter().take(limit).collect();
    let mut own = sink.items.split_off(before);
    own.retain(|item| item.group.as_ref().is_some_and(|(group, _)| kept.contains(group)));
    for item in &mut own {
        if let Some((group, size)) = &mut item.group {
            *size = sizes[group.as_str()];
            // Groups of two files are two groups.
            *group = format!("{file}:{group}");
            item.cluster.clone_from(group);
        }
    }
    sink.items.extend(own);
    Ok(())
}

#[derive(Deserialize)]
struct Choices {
    prompt: Turns,
    choices: Vec<String>,
    label: usize,
}

fn choices(line: Choices) -> Found {
    let Choices { prompt, choices, label } = line;
    if label >= choices.len() || choices.len() < 2 {
        return Err(format!("label {label} of {} choices; from 0 on, and at least 2 choices", choices.len()));
    }
    let texts = choices.into_iter().map(|choice| input(Some(&prompt), Turns::Text(choice)));
    Ok(Item::choice(key(&prompt), texts.collect::<std::result::Result<_, _>>()?, label))
}

fn hellaswag(line: Hellaswag) -> Found {
    let Hellaswag { ctx, endings, label } = line;
    // As a run learns it.
    choices(Choices { prompt: Turns::Text(format!("{ctx} ")), choices: endings, label })
}

/// Rows of one of the Ethics sets, so many a group.
fn ethics(dataset: Dataset, size: usize, file: usize, path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let header = dataset != Dataset::EthicsUtilitarianism;
    let mut reader = csv::ReaderBuilder::new().has_headers(header).flexible(true).from_reader(open(path)?);
    for (number, row) in reader.records().take(sink.limit.saturating_mul(size)).enumerate() {
        let (line, found) = match &row {
            Ok(row) => {
                let line = row.position().map_or(0, csv::Position::line);
                let found = ethics_row(dataset, &row.iter().collect::<Vec<_>>());
                (line, found.ok_or_else(|| "other columns or another label than this set has".to_owned()))
            }
            Err(error) => (error.position().map_or(0, csv::Position::line), Err(error.to_string())),
        };
        match found.and_then(|record| ethics_item(record, file, number, size)) {
            Ok(item) => sink.add(file, line, item),
            Err(reason) => sink.bad(path, line, &reason)?,
        }
    }
    Ok(())
}

fn ethics_item(record: Record, file: usize, number: usize, size: usize) -> Found {
    let Body::Pair { prompt, chosen, rejected } = record.body else { return Err("no pair".to_owned()) };
    let text = |side: String| match prompt.is_empty() {
        true => TextInput::Text(side),
        false => plain(&prompt[..], side),
    };
    let group = (size > 1).then(|| (format!("{file}:{}", number / size), size));
    let cluster = group.as_ref().map_or(record.group, |(group, _)| group.clone());
    Ok(Item { group, ..Item::pair(cluster, text(chosen), text(rejected)) })
}

fn comparison(found: hhh::Comparison) -> Item {
    let turns = found.messages.into_iter().map(|turn| Message::new(turn.role, turn.content));
    let turns: Vec<Message> = turns.collect();
    let side = |answer: String| {
        TextInput::Conversation(turns.iter().cloned().chain([Message::new("assistant", answer)]).collect())
    };
    Item::pair(found.query, side(found.better), side(found.worse))
}

#[derive(Deserialize)]
struct Question {
    question: String,
    mc1_targets: Map<String, Value>,
}

/// A question's answers, of which one is right (Askell et al. 2021, appendix B.3).
fn question(line: Question) -> Found {
    let Question { question, mc1_targets } = line;
    let right: Vec<bool> = mc1_targets.values().map(|value| value.as_f64() == Some(1.0)).collect();
    let label = right.iter().position(|right| *right);
    let (Some(label), 1) = (label, right.iter().filter(|right| **right).count()) else {
        return Err("not exactly one right answer".to_owned());
    };
    let texts = mc1_targets.keys().map(|answer| plain(&question[..], format!(" {answer}"))).collect();
    Ok(Item::choice(question, texts, label))
}

#[derive(Deserialize)]
struct Sample {
    id: Value,
    prompt: Turns,
    response: Turns,
    correct: Option<bool>,
}

/// Samples as problems, by their id; they need not follow one another. Where it is asked for, each has to say whether it is
/// correct.
fn samples(file: usize, path: &Path, graded: bool, sink: &mut Sink<'_>) -> Result<()> {
    let mut lines = Lines::open(path)?;
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut problems: Vec<(u64, Item)> = Vec::new();
    while let Some((number, line)) = lines.next()? {
        let sample = serde_json::from_slice(&line).map_err(|error| error.to_string());
        let found = sample.and_then(|Sample { id, prompt, response, correct }| {
            let correct = correct.or((!graded).then_some(false)).ok_or("missing field `correct`")?;
            Ok((words(id), key(&prompt), input(Some(&prompt), response)?, correct))
        });
        match found {
            Ok((id, prompt, text, correct)) => {
                let place = *places.entry(id.clone()).or_insert_with(|| {
                    problems.push((number, Item { id: Some(id), cluster: prompt, ..Item::default() }));
                    problems.len() - 1
                });
                let (_, problem) = &mut problems[place];
                problem.texts.push(text);
                problem.right.push(correct);
            }
            Err(reason) => sink.bad(path, number, &reason)?,
        }
    }
    let limit = sink.limit;
    problems.into_iter().take(limit).for_each(|(line, item)| sink.add(file, line, item));
    Ok(())
}

/// Passages and their last words.
pub(super) fn lambada(
    files: &[PathBuf],
    limit: usize,
    bad: &mut BadLines,
    warn: &mut dyn FnMut(&str),
) -> Result<Vec<Passage>> {
    let mut passages = Vec::new();
    for (file, path) in files.iter().enumerate() {
        let mut lines = Lines::open(path)?;
        let mut taken = 0;
        while taken < limit {
            let Some((line, bytes)) = lines.next()? else { break };
            match passage(&bytes) {
                Ok((context, word)) => {
                    taken += 1;
                    passages.push(Passage { file, line, context, word });
                }
                Err(reason) => bad.skip(path, line, &reason, warn)?,
            }
        }
    }
    Ok(passages)
}

/// A passage of LAMBADA.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Passage {
    pub(super) file: usize,
    pub(super) line: u64,
    pub(super) context: String,
    /// With the blank before it.
    pub(super) word: String,
}

#[derive(Deserialize)]
struct PassageLine {
    context: Option<String>,
    continuation: Option<String>,
    text: Option<String>,
}

fn passage(line: &[u8]) -> std::result::Result<(String, String), String> {
    let line: PassageLine = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let (context, word) = match line {
        PassageLine { context: Some(context), continuation: Some(word), text: None } => (context, word),
        PassageLine { context: None, continuation: None, text: Some(text) } => {
            let (context, word) = text.trim_end().rsplit_once(char::is_whitespace).unwrap_or_default();
            (context.to_owned(), word.to_owned())
        }
        _ => return Err("expected context and continuation, or text".to_owned()),
    };
    let (context, word) = (context.trim_end(), word.trim());
    if context.is_empty() || word.is_empty() {
        return Err("no context, or no word after it".to_owned());
    }
    Ok((context.to_owned(), format!(" {word}")))
}

/// A dialogue of a prompt and each of some responses.
pub(super) fn dialogues(prompt: &str, responses: &[String]) -> Vec<TextInput> {
    responses.iter().map(|response| turns(prompt, response)).collect()
}
