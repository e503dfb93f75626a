//! The tokenizer, its special tokens and the chat template of a folder.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::fields::{Fields, read_json};
use super::{read, tokenizer_json};
use crate::text::MAX_TEMPLATE_BYTES;
use crate::{Error, Result};

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const SPECIAL_TOKENS: &str = "special_tokens_map.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";

/// The files about text that a folder has.
pub(super) fn files(folder: &Path) -> impl Iterator<Item = String> {
    [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, GENERATION_CONFIG]
        .into_iter()
        .filter(move |file| folder.join(file).is_file())
        .map(str::to_owned)
}

/// Special tokens by their role, as chat templates know them (`bos_token`, `eos_token`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<String>,
    /// Ends a text or a turn.
    pub eos: Option<String>,
    /// Fills up; Plumb never pads, but templates may name it.
    pub pad: Option<String>,
    /// Stands for what the vocabulary does not hold.
    pub unk: Option<String>,
    /// Tokens that end a generation, ascending: those of `generation_config.json`, else of `config.json`, and `eos`.
    pub eos_ids: Vec<u32>,
}

/// All that a checkpoint says about text.
pub(super) struct TextParts {
    pub(super) tokenizer: Tokenizer,
    pub(super) special: SpecialTokens,
    pub(super) chat_template: Option<String>,
}

/// Reads the tokenizer of a checkpoint's folder; `config` is its `config.json`.
pub(super) fn read_folder(folder: &Path, config: &Fields<'_>) -> Result<TextParts> {
    let mut parts = read_parts(folder)?;
    let generation = folder.join(GENERATION_CONFIG);
    let mut ids = Vec::new();
    if generation.is_file() {
        ids = Fields::new(&generation, &read_json(&generation)?)?.token_ids("eos_token_id")?;
    }
    if ids.is_empty() {
        ids = config.token_ids("eos_token_id")?;
    }
    parts.set_eos_ids(ids);
    Ok(parts)
}

impl TextParts {
    /// An adapter was trained with the tokenizer and template that lie beside it, if any do.
    pub(super) fn override_from(&mut self, adapter: &Path) -> Result<()> {
        if adapter.join(TOKENIZER).is_file() {
            let mut parts = read_parts(adapter)?;
            parts.chat_template = parts.chat_template.or(self.chat_template.take());
            parts.set_eos_ids(self.special.eos_ids.clone());
            *self = parts;
        } else if let Some(template) = chat_template(adapter)? {
            self.chat_template = Some(template);
        }
        Ok(())
    }

    /// `eos` ends a generation whatever the configuration says: templates end turns with it.
    pub(super) fn set_eos_ids(&mut self, ids: Vec<u32>) {
        let eos = self.special.eos.as_ref().and_then(|eos| self.tokenizer.token_to_id(eos));
        let ids: BTreeSet<u32> = ids.into_iter().chain(eos).collect();
        self.special.eos_ids = ids.into_iter().collect();
    }

    /// Refuses a tokenizer that gives ids for which there is no row in the embedding.
    pub(super) fn check_vocabulary(&self, rows: usize) -> Result<()> {
        let vocabulary = self.tokenizer.get_vocab(true);
        match vocabulary.iter().max_by_key(|(_, id)| **id) {
            Some((token, id)) if *id as usize >= rows => Err(Error::Unsupported(format!(
                "the tokenizer's token `{token}` has id {id}, but the embedding has {rows} rows (`vocab_size`); take \
                 the tokenizer that the model was saved with"
            ))),
            _ => Ok(()),
        }
    }
}

/// All but `eos_ids`.
fn read_parts(folder: &Path) -> Result<TextParts> {
    let path = folder.join(TOKENIZER);
    if !path.is_file() {
        let what = format!(
            "`{TOKENIZER}` (if there is only a `tokenizer.model` or `vocab.json`, save it with \
             AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        );
        return Err(Error::MissingFile { path: folder.to_owned(), what });
    }
    let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
    let text = read::whole(&path, tokenizer_json::MOST_BYTES)?;
    let built = tokenizer_json::build(&text);
    let mut tokenizer = built.map_err(|reason| malformed(format!("not a tokenizer: {reason}")))?;
    // Left over from training; Plumb never pads, and what is too long is refused or cut where the caller says so.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
    Ok(TextParts { tokenizer, special: special_tokens(folder)?, chat_template: chat_template(folder)? })
}

/// From `tokenizer_config.json`; what it does not mention from `special_tokens_map.json`.
fn special_tokens(folder: &Path) -> Result<SpecialTokens> {
    let mut special = SpecialTokens::default();
    for file in [SPECIAL_TOKENS, TOKENIZER_CONFIG] {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let json = read_json(&path)?;
        let fields = Fields::new(&path, &json)?;
        let roles = [
            ("bos_token", &mut special.bos),
            ("eos_token", &mut special.eos),
            ("pad_token", &mut special.pad),
            ("unk_token", &mut special.unk),
        ];
        for (key, role) in roles {
            if fields.has(key) {
                *role = token(&fields, key)?;
            }
        }
    }
    Ok(special)
}

/// A token, written as a string or as an object with its `content`.
fn token(fields: &Fields<'_>, key: &str) -> Result<Option<String>> {
    match fields.get(key) {
        None => Ok(None),
        Some(Value::String(token)) => Ok(Some(token.clone())),
        Some(value) => match value.get("content").and_then(Value::as_str) {
            Some(content) => Ok(Some(content.to_owned())),
            None => Err(fields.wrong(key, "a token or an object with its `content`")),
        },
    }
}

/// From its own file, else from `tokenizer_config.json`: one template, or named ones of which one is `default`.
fn chat_template(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(CHAT_TEMPLATE);
    if path.is_file() {
        return read::text(&path, MAX_TEMPLATE_BYTES as u64).map(Some);
    }
    let path = folder.join(TOKENIZER_CONFIG);
    if !path.is_file() {
        return Ok(None);
    }
    let json = read_json(&path)?;
    let fields = Fields::new(&path, &json)?;
    let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
    match fields.get("chat_template") {
        None => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => match templates.iter().find(named).and_then(|entry| entry.get("template")) {
            Some(Value::String(template)) => Ok(Some(template.clone())),
            _ => Ok(None),
        },
        Some(_) => Err(fields.wrong("chat_template", "a template or a list of named ones")),
    }
}
