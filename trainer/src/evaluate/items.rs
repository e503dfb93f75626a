//! What is compared: texts of which some are right, whichever set they come from.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plumb_model::text::{Message, Response, TextInput};
use serde::de::DeserializeOwned;

use super::options::Form;
use crate::data::{Problem, Turns};
use crate::input::{BadLines, Lines, open};
use crate::{Error, Result};

/// Most bytes of a file that is one JSON document.
const MAX_DOCUMENT: u64 = 1 << 30;

/// Texts that are scored to be compared with each other.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Item {
    /// Where it stands: index of the file, and line, row or number in it.
    pub(super) file: usize,
    pub(super) line: u64,
    /// By what results are told apart: file, category or subset.
    pub(super) category: String,
    /// Items of one cluster, such as those of one prompt, are right or wrong together.
    pub(super) cluster: String,
    /// Where all items of a group have to be right: which group, and how many they are.
    pub(super) group: Option<(String, usize)>,
    /// What the file calls it.
    pub(super) id: Option<String>,
    pub(super) texts: Vec<TextInput>,
    /// Which of the texts are right.
    pub(super) right: Vec<bool>,
}

/// Where readers put what they find.
pub(super) struct Sink<'a> {
    pub(super) files: &'a [String],
    pub(super) limit: usize,
    pub(super) items: Vec<Item>,
    pub(super) bad: BadLines,
    pub(super) warn: &'a mut dyn FnMut(&str),
}

impl Sink<'_> {
    /// A line, or whatever it is counted in, that makes no sense.
    pub(super) fn bad(&mut self, path: &Path, line: u64, reason: &str) -> Result<()> {
        self.bad.skip(path, line, reason, self.warn)
    }

    /// Reads JSONL, as many items of a file as are wanted. What `found` makes is complete but for its place; without a
    /// category it is of its file's.
    pub(super) fn json_lines<T: DeserializeOwned>(
        &mut self,
        file: usize,
        path: &Path,
        found: impl Fn(T) -> std::result::Result<Item, String>,
    ) -> Result<()> {
        let mut lines = Lines::open(path)?;
        let mut taken = 0;
        while taken < self.limit {
            let Some((number, line)) = lines.next()? else { break };
            match serde_json::from_slice(&line).map_err(|error| error.to_string()).and_then(&found) {
                Ok(item) => {
                    taken += 1;
                    self.add(file, number, item);
                }
                Err(reason) => self.bad(path, number, &reason)?,
            }
        }
        Ok(())
    }

    /// Takes what is the elements of a list, or what names each problem, until the limit.
    pub(super) fn list(
        &mut self,
        file: usize,
        path: &Path,
        found: impl IntoIterator<Item = std::result::Result<Item, String>>,
    ) -> Result<()> {
        let mut taken = 0;
        for (number, found) in (1..).zip(found) {
            match found {
                Ok(_) if taken >= self.limit => return Ok(()),
                Ok(item) => {
                    taken += 1;
                    self.add(file, number, item);
                }
                Err(reason) => self.bad(path, number, &reason)?,
            }
        }
        Ok(())
    }

    pub(super) fn add(&mut self, file: usize, line: u64, mut item: Item) {
        (item.file, item.line) = (file, line);
        if item.category.is_empty() {
            item.category.clone_from(&self.files[file]);
        }
        if item.cluster.is_empty() {
            item.cluster = format!("{file}:{line}");
        }
        self.items.push(item);
    }
}

impl Item {
    /// A better and a worse text.
    pub(super) fn pair(cluster: String, chosen: TextInput, rejected: TextInput) -> Self {
        Self { cluster, texts: vec![chosen, rejected], right: vec![true, false], ..Self::default() }
    }

    /// Texts of which one is right.
    pub(super) fn choice(cluster: String, texts: Vec<TextInput>, label: usize) -> Self {
        let right = (0..texts.len()).map(|i| i == label).collect();
        Self { cluster, texts, right, ..Self::default() }
    }

    /// Whether it is a better and a worse text.
    pub(super) fn is_pair(&self) -> bool {
        self.right == [true, false]
    }

    /// With prompts that are strings as turns of the user, and what follows them as the assistant's.
    pub(super) fn in_form(mut self, form: Form) -> Self {
        if form == Form::Dialogue {
            self.texts = self.texts.into_iter().map(as_dialogue).collect();
        }
        self
    }
}

fn as_dialogue(text: TextInput) -> TextInput {
    match text {
        TextInput::PromptResponse { prompt, response: Response::Text(response) } => {
            match Arc::unwrap_or_clone(prompt) {
                TextInput::Text(prompt) => turns(prompt.trim(), response.trim()),
                prompt => TextInput::PromptResponse { prompt: Arc::new(prompt), response: Response::Text(response) },
            }
        }
        text => text,
    }
}

/// What the user says, and what the assistant answers.
pub(super) fn turns(prompt: &str, response: &str) -> TextInput {
    TextInput::Conversation(vec![Message::new("user", prompt), Message::new("assistant", response)])
}

/// A text and what follows it.
pub(super) fn plain(prompt: impl Into<String>, response: impl Into<String>) -> TextInput {
    TextInput::PromptResponse {
        prompt: Arc::new(TextInput::Text(prompt.into())),
        response: Response::Text(response.into()),
    }
}

/// A response with its prompt, in the forms that a run reads.
pub(super) fn input(prompt: Option<&Turns>, response: Turns) -> std::result::Result<TextInput, String> {
    crate::data::input(prompt.cloned(), response).map_err(|problem| match problem {
        Problem::Bad(reason) => reason,
        Problem::Useless(reason) => reason.to_owned(),
    })
}

/// What tells prompts apart.
pub(super) fn key(prompt: &Turns) -> String {
    match prompt {
        Turns::Text(text) => text.clone(),
        Turns::Conversation(turns) => turns.iter().map(|turn| format!("{}: {}\n\n", turn.role, turn.content)).collect(),
    }
}

/// What two sides without a prompt have in common: the turns that they begin with.
pub(super) fn common(chosen: &Turns, rejected: &Turns) -> String {
    match (chosen, rejected) {
        (Turns::Conversation(a), Turns::Conversation(b)) => {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            key(&Turns::Conversation(a[..same].to_vec()))
        }
        _ => String::new(),
    }
}

/// A file that is one JSON document.
pub(super) fn document<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| Error::Malformed { path: path.to_owned(), reason: error.to_string() })
}

/// A file's text.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    open(path)?.take(MAX_DOCUMENT).read_to_string(&mut text).map_err(Error::io(path))?;
    match text.len() as u64 == MAX_DOCUMENT {
        true => Err(Error::Malformed { path: path.to_owned(), reason: format!("more than {MAX_DOCUMENT} bytes") }),
        false => Ok(text),
    }
}

/// Short names of files: without folders and the usual endings, unless that makes two of them equal.
pub(super) fn names(files: &[PathBuf]) -> Vec<String> {
    let short = |path: &PathBuf| {
        let mut name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for ending in [".gz", ".bz2", ".zst", ".jsonl", ".json", ".csv", ".task"] {
            name = name.strip_suffix(ending).map(str::to_owned).unwrap_or(name);
        }
        name
    };
    let names: Vec<String> = files.iter().map(short).collect();
    let unique = |name: &String| names.iter().filter(|other| *other == name).count() == 1;
    let name = |(path, name): (&PathBuf, &String)| if unique(name) { name.clone() } else { path.display().to_string() };
    files.iter().zip(&names).map(name).collect()
}
