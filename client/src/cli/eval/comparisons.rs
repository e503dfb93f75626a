//! The files: comparisons of a better and a worse answer.

use std::fs;
use std::path::{Path, PathBuf};

use plumb_client::{hhh, v1};

use crate::cli::input::{Body, Reading, with_response};
use crate::cli::source;

/// What kind of files are read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task {
    /// BIG-bench's hhh_alignment.
    Hhh,
    /// JSONL of chosen and rejected.
    Pairs { split_turns: bool },
}

/// Two answers to one prompt.
#[derive(Clone, Debug)]
pub(super) struct Comparison {
    /// Index of its file.
    pub(super) file: usize,
    /// Its number in the file, from 1.
    pub(super) number: u64,
    /// What the comparisons of one prompt have in common.
    pub(super) prompt: String,
    pub(super) better: v1::Input,
    pub(super) worse: v1::Input,
}

/// What was read of a file.
#[derive(Debug, Default)]
pub(super) struct ReadFile {
    pub(super) comparisons: Vec<Comparison>,
    /// What could not be understood, with its place.
    pub(super) broken: Vec<String>,
}

impl Task {
    /// Reads a file; fails if it is not of this kind at all.
    pub(super) fn read(self, file: usize, path: &Path) -> Result<ReadFile, String> {
        let named = |reason: String| format!("{}: {reason}", path.display());
        match self {
            Self::Hhh => {
                let text = fs::read_to_string(path).map_err(|e| named(e.to_string()))?;
                hhh(file, &text).map_err(named)
            }
            Self::Pairs { split_turns } => {
                fs::metadata(path).map_err(|e| named(e.to_string()))?;
                Ok(pairs(file, path, Reading { split_turns, raw: false }))
            }
        }
    }
}

fn hhh(file: usize, text: &str) -> Result<ReadFile, String> {
    let mut read = ReadFile::default();
    for found in hhh::comparisons(text)? {
        match found {
            Ok(hhh::Comparison { number, query, messages, better, worse }) => {
                let prompt = v1::Input { input: Some(v1::input::Input::Conversation(v1::Conversation { messages })) };
                let (better, worse) = (with_response(&prompt, &better), with_response(&prompt, &worse));
                read.comparisons.push(Comparison { file, number, prompt: query, better, worse });
            }
            Err(reason) => read.broken.push(reason),
        }
    }
    Ok(read)
}

fn pairs(file: usize, path: &Path, reading: Reading) -> ReadFile {
    let mut read = ReadFile::default();
    source::read_file(path, reading, &mut |line| {
        match line {
            Ok(record) => match record.body {
                Body::Pair { chosen, rejected } => {
                    let (number, prompt) = (record.place.line, shared(&chosen, &rejected));
                    read.comparisons.push(Comparison { file, number, prompt, better: chosen, worse: rejected });
                }
                _ => read.broken.push(format!("line {}: needs chosen and rejected", record.place.line)),
            },
            Err(broken) => read.broken.push(format!("line {}: {}", broken.place.line, broken.reason)),
        }
        true
    });
    read
}

/// What two texts have in common at their start.
fn shared(a: &v1::Input, b: &v1::Input) -> String {
    use v1::input::Input::{Conversation, Text};
    match (&a.input, &b.input) {
        (Some(Text(a)), Some(Text(b))) => {
            a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
        }
        (Some(Conversation(a)), Some(Conversation(b))) => {
            let same = a.messages.iter().zip(&b.messages).take_while(|(a, b)| a == b);
            same.map(|(m, _)| format!("{}: {}\n\n", m.role, m.content)).collect()
        }
        _ => String::new(),
    }
}

/// Short names of files: without folders and the usual endings, unless that makes two of them equal.
pub(super) fn names(files: &[PathBuf]) -> Vec<String> {
    let short = |path: &PathBuf| {
        let mut name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for ending in [".gz", ".jsonl", ".json", ".task"] {
            name = name.strip_suffix(ending).map(str::to_owned).unwrap_or(name);
        }
        name
    };
    let names: Vec<String> = files.iter().map(short).collect();
    let unique = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    files
        .iter()
        .zip(&names)
        .map(|(f, name)| if unique(name) { name.clone() } else { f.display().to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn short_names() {
        let files = ["a/helpful.visible.task.json", "b/x.jsonl.gz", "c/x.jsonl"].map(PathBuf::from);
        assert_eq!(names(&files), ["helpful.visible", "b/x.jsonl.gz", "c/x.jsonl"]);
    }

    /// The counts are those of the data's README.
    #[test]
    fn real_files() {
        let Some(data) = std::env::var_os("PLUMB_DATA").map(PathBuf::from) else {
            eprintln!("skipped: PLUMB_DATA is not set to a folder with hhh_alignment and hh-rlhf");
            return;
        };
        let mut prompts = HashSet::new();
        for (file, n, several) in [("harmless", 29, 0), ("helpful", 30, 9), ("honest", 31, 15), ("other", 22, 4)] {
            let read = Task::Hhh.read(0, &data.join(format!("hhh_alignment/{file}.visible.task.json"))).unwrap();
            assert_eq!(read.broken, Vec::<String>::new(), "{file}");
            assert_eq!(read.comparisons.len(), n, "{file}");
            let turns = |c: &Comparison| match &c.better.input {
                Some(v1::input::Input::Conversation(c)) => c.messages.len(),
                _ => 0,
            };
            assert_eq!(read.comparisons.iter().filter(|c| turns(c) > 2).count(), several, "{file}");
            for c in &read.comparisons {
                for side in [&c.better, &c.worse] {
                    let Some(v1::input::Input::Conversation(c)) = &side.input else { panic!("not a conversation") };
                    assert!(c.messages.iter().all(|m| !m.content.contains("\n\nHuman:")), "{c:?}");
                }
            }
            prompts.extend(read.comparisons.into_iter().map(|c| c.prompt));
        }
        assert_eq!(prompts.len(), 11 + 10 + 9 + 18);
        for (file, n) in [("harmless", 219), ("helpful", 224)] {
            let path = data.join(format!("hh-rlhf/{file}-base.test-visible.dev.jsonl.gz"));
            for split_turns in [false, true] {
                let read = Task::Pairs { split_turns }.read(0, &path).unwrap();
                assert_eq!((read.comparisons.len(), read.broken.len()), (n, 0), "{file}");
                assert!(read.comparisons.iter().all(|c| !c.prompt.is_empty()), "{file}");
            }
        }
    }
}
