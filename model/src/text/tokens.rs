//! Texts to token ids and back, special tokens once.
//!
//! The tokenizer's post-processor is taken off and replaced by what it was found to put before and after a text. So
//! special tokens can be added exactly where they are missing, and the byte spans of tokens are the exact ones:
//! post-processors like to trim the spaces off them.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{Encoding, Tokenizer};

use crate::{Error, Result};

/// A token of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpan {
    /// The token.
    pub id: u32,
    /// Its text as it stands in the vocabulary.
    pub text: String,
    /// True if the tokenizer holds it to be special.
    pub special: bool,
    /// First byte of the input that it stands for.
    pub start: usize,
    /// One past the last byte of the input that it stands for; equal to `start` for a token that the tokenizer added.
    pub stop: usize,
}

/// What stands before a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// The tokenizer's special tokens, unless the text begins with them.
    Once,
    /// Only what the text says.
    AsWritten,
}

/// The tokens of a text.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    pub ids: Vec<u32>,
    /// For each token, the bytes of the text that it stands for; empty for added ones.
    pub spans: Vec<Range<usize>>,
}

/// A tokenizer that knows its special tokens.
#[derive(Debug)]
pub(super) struct Codec {
    /// Without post-processor, truncation and padding.
    tokenizer: Arc<Tokenizer>,
    /// What the post-processor puts before a text.
    lead: Vec<u32>,
    /// What it puts after.
    trail: Vec<u32>,
    /// An ordinary token and its text.
    anchor: Option<(u32, String)>,
}

impl Codec {
    /// Refuses a tokenizer whose ids do not all fit into `vocab_size` rows.
    pub(super) fn new(mut tokenizer: Tokenizer, vocab_size: usize) -> Result<Self> {
        let largest = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = largest.filter(|(_, id)| *id as usize >= vocab_size) {
            return Err(Error::Unsupported(format!(
                "the tokenizer's token `{token}` has the id {id}, the embedding has {vocab_size} rows"
            )));
        }
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| Error::Unsupported(error.to_string()))?;
        let (lead, trail) = added_tokens(&tokenizer)?;
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        let mut codec = Self { tokenizer: Arc::new(tokenizer), lead, trail, anchor: None };
        if let Some(&id) = codec.encode("a", Lead::AsWritten, false)?.ids.last() {
            let text = codec.decode(&[id], false)?;
            codec.anchor = (!text.is_empty()).then_some((id, text));
        }
        Ok(codec)
    }

    /// The tokens of a text, after the special ones that `lead` asks for; `trail` says whether those that the
    /// tokenizer puts at the end of a text belong to it.
    pub(super) fn encode(&self, text: &str, lead: Lead, trail: bool) -> Result<Encoded> {
        let encoding = encode(&self.tokenizer, text, false)?;
        let own = encoding.get_ids();
        let added = if lead == Lead::Once && !own.starts_with(&self.lead) { &self.lead[..] } else { &[] };
        let after = if trail && !own.ends_with(&self.trail) { &self.trail[..] } else { &[] };

        let ids = added.iter().chain(own).chain(after).copied().collect();
        let spans = encoding.get_offsets().iter().map(|&(start, stop)| start..stop);
        let spans = std::iter::repeat_n(0..0, added.len())
            .chain(spans)
            .chain(std::iter::repeat_n(text.len()..text.len(), after.len()))
            .collect();
        Ok(Encoded { ids, spans })
    }

    /// The same with everything that is known about each token.
    pub(super) fn spans(&self, text: &str, add_special: bool) -> Result<Vec<TokenSpan>> {
        let lead = if add_special { Lead::Once } else { Lead::AsWritten };
        let Encoded { ids, spans } = self.encode(text, lead, add_special)?;
        let token = |(id, span): (u32, Range<usize>)| TokenSpan {
            id,
            text: self.tokenizer.id_to_token(id).unwrap_or_default(),
            special: self.is_special(id),
            start: span.start,
            stop: span.end,
        };
        Ok(ids.into_iter().zip(spans).map(token).collect())
    }

    /// The text of token ids.
    pub(super) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        decode(&self.tokenizer, ids, skip_special)
    }

    /// The text of one token as it reads inside a text: decoders treat the first token of a text in their own ways, so
    /// it is decoded behind another one.
    pub(super) fn token_text(&self, id: u32) -> String {
        let alone = || self.decode(&[id], false).unwrap_or_default();
        let Some((anchor, head)) = &self.anchor else { return alone() };
        let text = self.decode(&[*anchor, id], false).unwrap_or_default();
        text.strip_prefix(head.as_str()).map_or_else(alone, str::to_owned)
    }

    /// The id of a token by its text in the vocabulary.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        is_special(&self.tokenizer, id)
    }

    /// What the tokenizer puts before a text.
    pub(super) fn lead(&self) -> &[u32] {
        &self.lead
    }

    /// The text without what the tokenizer would put before it.
    pub(super) fn strip_lead<'a>(&self, text: &'a str) -> Result<&'a str> {
        let lead = self.decode(&self.lead, false)?;
        Ok(text.strip_prefix(&lead).unwrap_or(text))
    }

    pub(super) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
}

pub(super) fn is_special(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
}

pub(super) fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Result<String> {
    attempt(|| tokenizer.decode(ids, skip_special))
        .map_err(|reason| Error::InvalidInput(format!("the tokens cannot be turned into text: {reason}")))
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Encoding> {
    attempt(|| tokenizer.encode(text, add_special))
        .map_err(|reason| Error::InvalidInput(format!("the text cannot be tokenized: {reason}")))
}

/// A tokenizer is what its file says, and there are files with which it panics: a table that points outside of itself, a
/// regular expression that gives up.
fn attempt<T>(act: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the checkpoint's tokenizer fails on it".to_owned()),
    }
}

/// What the post-processor puts before and after a text, found by trying it on texts.
fn added_tokens(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let first = encode(tokenizer, "a", true)?;
    let (ids, added) = (first.get_ids(), first.get_special_tokens_mask());
    let lead = ids[..added.iter().take_while(|&&added| added == 1).count()].to_vec();
    let rest = &added[lead.len()..];
    let trail = ids[ids.len() - rest.iter().rev().take_while(|&&added| added == 1).count()..].to_vec();
    for text in ["a", "Two words.\n"] {
        let plain = encode(tokenizer, text, false)?;
        if encode(tokenizer, text, true)?.get_ids() != [&lead, plain.get_ids(), &trail].concat() {
            let reason = "the tokenizer's post-processor does more than put tokens before and after a text";
            return Err(Error::Unsupported(reason.into()));
        }
    }
    Ok((lead, trail))
}
