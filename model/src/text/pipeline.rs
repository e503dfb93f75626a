//! What a loaded model needs to turn inputs into tokens and tokens into text, checked and prepared once.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::detokenize::StreamDecoder;
use super::dialogue::{ASSISTANT, HUMAN};
use super::hhh::RULE;
use super::template::ChatTemplate;
use super::tokens::{Codec, Lead, TokenSpan};
use super::{ChatFormat, HhhName, HhhPrompt, HhhPrompts, RenderOptions, dialogue};
use crate::checkpoint::SpecialTokens;
use crate::{Error, Result};

/// Most bytes that one input may have.
pub(super) const MAX_TEXT_BYTES: usize = super::template::MAX_RENDERED_BYTES;

/// What a checkpoint says about its text.
pub struct TextConfig {
    /// `tokenizer.json`. Its padding and truncation are ignored.
    pub tokenizer: Tokenizer,
    /// The chat template's source.
    pub chat_template: Option<String>,
    /// Tokens that have a role.
    pub special: SpecialTokens,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Most tokens in a sequence.
    pub max_tokens: usize,
    /// The HHH prompt.
    pub hhh: Arc<HhhPrompts>,
}

/// Turns inputs into tokens and tokens into text. Immutable: to be shared.
pub struct TextPipeline {
    pub(super) codec: Codec,
    pub(super) template: Option<ChatTemplate>,
    hhh: Arc<HhhPrompts>,
    full: Prepared,
    short: Prepared,
    bare: Prepared,
    /// The token that stands before a text whose first token needs a context: BOS, else EOS.
    pub(super) context: Option<u32>,
    /// Leading tokens that truncation keeps where the tokenizer adds none itself.
    pub(super) bos: Option<u32>,
    eos_ids: Vec<u32>,
    pub(super) vocab_size: usize,
    pub(super) max_tokens: usize,
}

/// The `Human:`/`Assistant:` form with or without an HHH prompt.
pub(super) struct Prepared {
    /// The prompt's text.
    pub text: String,
    /// The tokens of all of it but `tail`, with the tokenizer's leading special tokens.
    pub ids: Vec<u32>,
    /// Its last newlines, where they are tokenized with what follows.
    pub tail: &'static str,
    /// What stands between a label and what is said.
    pub separator: String,
    /// sha256 of form and prompt in hexadecimal.
    pub sha256: String,
}

/// Which of the two ways of writing a conversation.
pub(super) enum Form<'a> {
    Template(&'a ChatTemplate),
    HumanAssistant(&'a Prepared),
}

impl TextPipeline {
    /// Checks and prepares.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for a tokenizer with an id that the embedding has no row for, one whose post-processor
    /// does more than put tokens before and after a text, or a template that does not parse.
    pub fn new(config: TextConfig) -> Result<Self> {
        let codec = Codec::new(config.tokenizer, config.vocab_size)?;
        let id = |token: &Option<String>| token.as_deref().and_then(|token| codec.id(token));
        let special = config.special;
        let bos = id(&special.bos);
        let context = bos.or(id(&special.eos)).or(special.eos_ids.first().copied());
        let template = config.chat_template.map(|source| ChatTemplate::new(&source, &special)).transpose()?;
        let tail = tail(&codec)?;
        Ok(Self {
            full: Prepared::new(&codec, &config.hhh, HhhPrompt::Full, tail)?,
            short: Prepared::new(&codec, &config.hhh, HhhPrompt::Short, tail)?,
            bare: Prepared::new(&codec, &config.hhh, HhhPrompt::None, "")?,
            codec,
            template,
            hhh: config.hhh,
            context,
            bos,
            eos_ids: special.eos_ids,
            vocab_size: config.vocab_size,
            max_tokens: config.max_tokens,
        })
    }

    /// The tokens of a text. With `add_special` those that the tokenizer puts before and after a text are among them,
    /// unless the text has them itself.
    pub fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<TokenSpan>> {
        check_size(text.len())?;
        self.codec.spans(text, add_special)
    }

    /// A token's text as it reads inside a text, with the bytes that are not UTF-8 replaced; empty for an id that the
    /// tokenizer does not have.
    pub fn token_text(&self, id: u32) -> String {
        self.codec.token_text(id)
    }

    /// The text of tokens, without the special ones.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.codec.decode(ids, true)
    }

    /// Turns tokens into text piece by piece, the first token being the first of the text.
    pub fn stream_decoder(&self) -> StreamDecoder {
        StreamDecoder::new(Arc::clone(self.codec.tokenizer()))
    }

    /// The same for tokens that continue `prompt`. It matters for tokenizers of the SentencePiece kind, which drop a
    /// space at the start of a text.
    pub fn stream_decoder_after(&self, prompt: &[u32]) -> Result<StreamDecoder> {
        self.stream_decoder().after(prompt)
    }

    /// Tokens that end a generated text.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// What ends an answer in a conversation under these options: in the `Human:`/`Assistant:` form the next turn or
    /// the next conversation; with a chat template nothing but an end-of-text token.
    pub fn default_stop_strings(&self, options: &RenderOptions) -> Vec<String> {
        match self.form(options) {
            Ok(Form::HumanAssistant(_)) => dialogue::stop_strings(),
            _ => Vec::new(),
        }
    }

    /// The tokens that every input with this HHH prompt begins with. `None` for [`HhhPrompt::None`], and if nothing
    /// fits behind them: requests for that prompt are then refused as too long.
    pub fn hhh_prefix_ids(&self, prompt: HhhPrompt) -> Option<&[u32]> {
        let ids = &self.prepared(prompt).ids;
        (prompt != HhhPrompt::None && ids.len() < self.max_tokens).then_some(ids)
    }

    /// sha256 of all tokens in the order of their ids: equal digests give ids equal meaning.
    pub fn vocabulary_sha256(&self) -> [u8; 32] {
        let mut tokens: Vec<(u32, String)> =
            self.codec.tokenizer().get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort();
        let add = |digest: Sha256, (id, token): &(u32, String)| {
            digest.chain_update(id.to_le_bytes()).chain_update(token).chain_update([0])
        };
        tokens.iter().fold(Sha256::new(), add).finalize().into()
    }

    /// sha256 of the chat template in hexadecimal.
    pub fn chat_template_sha256(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::sha256)
    }

    /// Which HHH prompt is in use.
    pub fn hhh_name(&self) -> HhhName {
        self.hhh.name()
    }

    pub(super) fn prepared(&self, prompt: HhhPrompt) -> &Prepared {
        match prompt {
            HhhPrompt::None => &self.bare,
            HhhPrompt::Full => &self.full,
            HhhPrompt::Short => &self.short,
        }
    }

    pub(super) fn form(&self, options: &RenderOptions) -> Result<Form<'_>> {
        match (options.chat_format, options.hhh_prompt, &self.template) {
            (ChatFormat::Template, HhhPrompt::None, Some(template)) => Ok(Form::Template(template)),
            (ChatFormat::Template, HhhPrompt::None, None) => {
                Err(Error::InvalidInput("the checkpoint has no chat template; use CHAT_FORMAT_HUMAN_ASSISTANT".into()))
            }
            (ChatFormat::Template, _, _) => Err(Error::InvalidInput(
                "the HHH prompt is made of Human/Assistant turns and does not go with CHAT_FORMAT_TEMPLATE".into(),
            )),
            (ChatFormat::Auto, HhhPrompt::None, Some(template)) => Ok(Form::Template(template)),
            (_, prompt, _) => Ok(Form::HumanAssistant(self.prepared(prompt))),
        }
    }
}

impl fmt::Debug for TextPipeline {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TextPipeline")
            .field("chat_template_sha256", &self.chat_template_sha256())
            .field("hhh", &self.hhh_name())
            .field("vocab_size", &self.vocab_size)
            .field("max_tokens", &self.max_tokens)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    fn new(codec: &Codec, hhh: &HhhPrompts, prompt: HhhPrompt, tail: &'static str) -> Result<Self> {
        let (text, separator) = match hhh.prefix(prompt) {
            Some(prefix) => (prefix.text.clone(), prefix.separator.clone()),
            None => (String::new(), " ".to_owned()),
        };
        let head = text.strip_suffix(tail).unwrap_or_default();
        let ids = if head.is_empty() { Vec::new() } else { codec.encode(head, Lead::Once, false)?.ids };
        let sha256 = hex::encode(Sha256::digest(format!("{}\n{text}", dialogue::form(&separator))));
        Ok(Self { text, ids, tail, separator, sha256 })
    }
}

/// How many of the newlines at a prompt's end are tokenized with what follows, so that prompt and turn, tokenized
/// apart, give the tokens of the whole text: GPT-2's tokenizer splits after `-----`, Llama 3's after its newlines.
fn tail(codec: &Codec) -> Result<&'static str> {
    let prompt = format!("a.\n\n{RULE}\n\n");
    for tail in ["", "\n", "\n\n"] {
        let head = prompt.strip_suffix(tail).unwrap_or(&prompt);
        let mut same = true;
        for turn in [HUMAN, ASSISTANT] {
            let whole = codec.encode(&format!("{prompt}{turn}  a"), Lead::Once, false)?.ids;
            let first = codec.encode(head, Lead::Once, false)?.ids;
            let then = codec.encode(&format!("{tail}{turn}  a"), Lead::AsWritten, false)?.ids;
            same &= whole == [first, then].concat();
        }
        if same {
            return Ok(tail);
        }
    }
    Ok("")
}

pub(super) fn check_size(bytes: usize) -> Result<()> {
    if bytes > MAX_TEXT_BYTES {
        return Err(Error::InvalidInput(format!("the input has {bytes} bytes, {MAX_TEXT_BYTES} are allowed")));
    }
    Ok(())
}
