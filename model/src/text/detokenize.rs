//! Sampled tokens to text, piece by piece, such that no piece is ever taken back.
//!
//! The text of a token depends on its neighbours: a character may be spread over several tokens, and decoders drop or
//! add spaces at the start of a text. So a window of recent tokens is decoded whenever one comes, and what it says more
//! than before is handed out, unless its end is not a complete character yet.

use std::sync::Arc;

use tokenizers::Tokenizer;

use super::tokens::{decode, is_special};
use crate::Result;

/// What decoders write for bytes that are not UTF-8 (yet).
const REPLACEMENT: char = '\u{fffd}';

/// Tokens of a prompt that are looked at to continue it.
const CONTEXT: usize = 8;

/// Tokens after which a text that still ends with a replacement character is taken for one that is not UTF-8. A
/// character has at most four bytes and a token has at least one.
const PATIENCE: usize = 12;

/// Turns sampled tokens into text. The pieces, joined, are what decoding all tokens at once gives.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    /// The tokens of the last piece, as context, and those that came after it.
    window: Vec<u32>,
    /// Where in the window the last piece ends.
    context: usize,
    /// Bytes of the window's text that have been handed out.
    written: usize,
    /// Leading whitespace is still to be dropped.
    trim: bool,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, window: Vec::new(), context: 0, written: 0, trim: false }
    }

    /// Continues the text of `prompt`, which is not part of the pieces.
    pub(super) fn after(mut self, prompt: &[u32]) -> Result<Self> {
        let visible = prompt.iter().rev().filter(|&&id| is_visible(&self.tokenizer, id));
        self.window = visible.take(CONTEXT).copied().collect();
        self.window.reverse();
        self.context = self.window.len();
        self.written = complete(&decode(&self.tokenizer, &self.window, true)?).len();
        Ok(self)
    }

    /// Drops whitespace at the start of the text, such as the separator that follows `Assistant:`.
    #[must_use]
    pub fn trim_start(mut self) -> Self {
        self.trim = true;
        self
    }

    /// Takes a token and hands out the text that has become certain, if any. Special tokens have no text.
    ///
    /// # Errors
    ///
    /// If the tokenizer cannot decode, which those of known models always can.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        if !is_visible(&self.tokenizer, id) {
            return Ok(None);
        }
        self.window.push(id);
        let text = decode(&self.tokenizer, &self.window, true)?;
        let impatient = self.window.len() - self.context > PATIENCE;
        if text.ends_with(REPLACEMENT) && !impatient {
            return Ok(None);
        }
        let certain = complete(&text);
        let Some(piece) = certain.get(self.written..).filter(|piece| !piece.is_empty()) else { return Ok(None) };
        let piece = piece.to_owned();
        self.written = certain.len();
        // An incomplete character at the end lies within the last four tokens.
        self.forget(if impatient { self.window.len() - 4 } else { self.context })?;
        Ok(self.trimmed(piece))
    }

    /// The rest of the text. An incomplete character becomes a replacement character.
    ///
    /// # Errors
    ///
    /// As [`StreamDecoder::push`].
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = decode(&self.tokenizer, &self.window, true)?;
        let rest = text.get(self.written..).unwrap_or_default().to_owned();
        Ok(self.trimmed(rest))
    }

    /// Drops the window's first tokens, unless the others have no text to stand on.
    fn forget(&mut self, tokens: usize) -> Result<()> {
        let written = complete(&decode(&self.tokenizer, &self.window[tokens..], true)?).len();
        if written > 0 {
            self.window.drain(..tokens);
            self.written = written;
        }
        self.context = self.window.len();
        Ok(())
    }

    fn trimmed(&mut self, piece: String) -> Option<String> {
        let piece = if self.trim { piece.trim_start().to_owned() } else { piece };
        self.trim &= piece.is_empty();
        (!piece.is_empty()).then_some(piece)
    }
}

/// The text without the replacement character that may stand for an incomplete one at its end.
fn complete(text: &str) -> &str {
    text.strip_suffix(REPLACEMENT).unwrap_or(text)
}

/// Tokens that are not, are left out of a text.
fn is_visible(tokenizer: &Tokenizer, id: u32) -> bool {
    !is_special(tokenizer, id) && tokenizer.id_to_token(id).is_some()
}
