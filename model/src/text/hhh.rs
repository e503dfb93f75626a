//! The helpful, honest, harmless prompt: example conversations that stand before the real one (Askell et al. 2021,
//! section 2).
//!
//! A prompt file is a preamble and conversations, separated by lines of `-----`, in `Human:` and `Assistant:` turns.
//! Ours is compiled in; any other comes as a file. Its text alone decides what follows: how labels and contents are
//! separated, and where the short variant ends.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::HhhPrompt;
use super::dialogue::{ASSISTANT, HUMAN};
use crate::{Error, Result};

const FULL: &str = include_str!("../../prompts/hhh.txt");
const SHORT: &str = include_str!("../../prompts/hhh-short.txt");

/// sha256 of the paper's own prompt, which is published without a licence and so not included.
const ASKELL_2021_SHA256: &str = "51dd74e1c2ba9bc14173b20db4d9c3a6b6196b0c477da11811dd42cfe585cfba";

/// Largest prompt file: ten times the size of ours.
const MAX_BYTES: u64 = 256 << 10;

/// The line between conversations.
pub(super) const RULE: &str = "-----";

/// Which prompt is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HhhName {
    /// The one that comes with Plumb.
    Plumb,
    /// The paper's, recognised by its sha256.
    Askell2021,
    /// Another file.
    Custom,
}

impl HhhName {
    /// The name as the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plumb => "plumb",
            Self::Askell2021 => "askell-2021",
            Self::Custom => "custom",
        }
    }
}

/// The prompt in its full and its short form.
#[derive(Clone, Debug)]
pub struct HhhPrompts {
    name: HhhName,
    full: Prefix,
    short: Prefix,
}

/// What stands before the first real turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    /// The prompt, a blank line, `-----` and a blank line.
    pub text: String,
    /// What the prompt writes between `Human:` and what the human says.
    pub separator: String,
}

impl Default for HhhPrompts {
    /// The prompt that comes with Plumb.
    fn default() -> Self {
        Self { name: HhhName::Plumb, full: Prefix::new(FULL), short: Prefix::new(SHORT) }
    }
}

impl HhhPrompts {
    /// Reads a prompt file; its short form is the preamble and the first conversation.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is larger than 256 KiB, is not UTF-8, or lacks `Human:` or `Assistant:` turns.
    pub fn from_file(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        if bytes > MAX_BYTES {
            return Err(malformed(format!("{bytes} bytes, an HHH prompt may have {MAX_BYTES}")));
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let text = std::str::from_utf8(&bytes).map_err(|error| malformed(error.to_string()))?;
        Self::from_text(text).map_err(malformed)
    }

    fn from_text(original: &str) -> Result<Self, String> {
        let text = original.trim_start_matches('\u{feff}').replace("\r\n", "\n");
        for label in [HUMAN, ASSISTANT] {
            if !text.lines().any(|line| line.starts_with(label)) {
                return Err(format!("an HHH prompt needs lines that start with `{label}`"));
            }
        }
        if original == FULL {
            return Ok(Self::default());
        }
        let name = match hex::encode(Sha256::digest(original)).as_str() {
            ASKELL_2021_SHA256 => HhhName::Askell2021,
            _ => HhhName::Custom,
        };
        Ok(Self { name, short: Prefix::new(first_conversation(&text)), full: Prefix::new(&text) })
    }

    /// Which prompt this is.
    pub fn name(&self) -> HhhName {
        self.name
    }

    /// What stands before the first real turn; nothing for `HhhPrompt::None`.
    pub(super) fn prefix(&self, prompt: HhhPrompt) -> Option<&Prefix> {
        match prompt {
            HhhPrompt::None => None,
            HhhPrompt::Full => Some(&self.full),
            HhhPrompt::Short => Some(&self.short),
        }
    }
}

impl Prefix {
    fn new(prompt: &str) -> Self {
        let prompt = prompt.trim_end();
        let prompt = prompt.strip_suffix(RULE).unwrap_or(prompt).trim_end();
        let said = prompt.lines().find_map(|line| line.strip_prefix(HUMAN)).unwrap_or_default();
        let spaces = said.len() - said.trim_start_matches(' ').len();
        Self { text: format!("{prompt}\n\n{RULE}\n\n"), separator: " ".repeat(spaces.max(1)) }
    }
}

/// The text up to the end of the first part that has a `Human:` turn.
fn first_conversation(text: &str) -> &str {
    let mut end = 0;
    let mut has_turn = false;
    for line in text.split_inclusive('\n') {
        if line.trim_end() == RULE && has_turn {
            return &text[..end];
        }
        has_turn |= line.starts_with(HUMAN);
        end += line.len();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, short: &str, separator: &str) {
        let prompts = HhhPrompts::from_text(text).unwrap();
        let prefix = prompts.prefix(HhhPrompt::Short).unwrap();
        assert_eq!(*prefix, Prefix { text: short.into(), separator: separator.into() });
        assert_eq!(prompts.name().as_str(), "custom");
    }

    #[test]
    fn the_short_form_is_the_first_conversation() {
        check("Human: a\n\nAssistant: b\n", "Human: a\n\nAssistant: b\n\n-----\n\n", " ");
        check(
            "Hi.\n\n-----\n\nHuman:  a\n\nAssistant:  b\n\n-----\n\nHuman: c\n",
            "Hi.\n\n-----\n\nHuman:  a\n\nAssistant:  b\n\n-----\n\n",
            "  ",
        );
        check("\u{feff}Human:a\r\nAssistant:b\r\n-----\r\n", "Human:a\nAssistant:b\n\n-----\n\n", " ");
    }

    #[test]
    fn ours_is_recognised_and_its_short_file_is_its_first_conversation() {
        let prompts = HhhPrompts::from_text(FULL).unwrap();
        assert_eq!(prompts.name(), HhhName::Plumb);
        assert_eq!(first_conversation(FULL).trim_end(), SHORT.trim_end());
        for prompt in [HhhPrompt::Full, HhhPrompt::Short] {
            let prefix = prompts.prefix(prompt).unwrap();
            assert_eq!(prefix.separator, "  ");
            assert!(prefix.text.ends_with(".\n\n-----\n\n"));
        }
        assert_eq!(prompts.prefix(HhhPrompt::None), None);
        assert_eq!(FULL.matches("\n-----\n").count(), 14);
    }

    #[test]
    fn files_that_are_no_prompt_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hhh.txt");
        let too_large = vec![b'x'; MAX_BYTES as usize + 1];
        for (content, reason) in [
            (&b"Human: hello"[..], "`Assistant:`"),
            (b"Assistant: hello", "`Human:`"),
            (b"Human: \xff\nAssistant: ", "utf-8"),
            (&too_large, "262144"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = HhhPrompts::from_file(&path).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("hhh.txt"), "{error}");
        }
        assert!(matches!(HhhPrompts::from_file(&folder.path().join("none")), Err(Error::Io { .. })));
        std::fs::write(&path, FULL).unwrap();
        assert_eq!(HhhPrompts::from_file(&path).unwrap().name(), HhhName::Plumb);
    }
}
