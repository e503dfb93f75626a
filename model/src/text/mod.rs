//! From conversations, texts and token ids to the tokens that a model is fed, and back.
//!
//! A [`TextPipeline`] renders a [`TextInput`] with the checkpoint's own chat template or in the `Human:`/`Assistant:`
//! form of Askell et al. 2021 (arXiv 2112.00861), puts the HHH prompt before it where that is asked for, tokenizes,
//! says which tokens are the response, and cuts to the model's limit. A [`StreamDecoder`] turns sampled tokens into
//! text that is never taken back.
//!
//! **Special tokens stand exactly once.** A rendered chat template is tokenized as it is, because templates write their
//! special tokens themselves. Texts and the `Human:`/`Assistant:` form get those that the tokenizer's post-processor
//! adds, unless the text already begins (or ends) with them.
//!
//! **Special tokens inside content are special tokens.** `<|im_end|>` in a user's message becomes that token, as in
//! Transformers. Whoever takes messages from strangers has to remove such strings first.

mod detokenize;
mod dialogue;
mod hhh;
mod json;
mod locate;
mod pipeline;
mod render;
#[cfg(target_os = "linux")]
mod renderer;
mod template;
#[cfg(test)]
mod tests;
mod tokens;
mod truncate;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use detokenize::StreamDecoder;
pub use hhh::{HhhName, HhhPrompts};
pub use pipeline::{TextConfig, TextPipeline};
pub use render::{MAX_MESSAGES, Rendered};
#[cfg(target_os = "linux")]
pub use renderer::render_templates_apart;
pub(crate) use template::MAX_TEMPLATE_BYTES;
pub use tokens::TokenSpan;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; a chat template may know others.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What is to be scored or continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextInput {
    /// Turns, oldest first; in scoring, a last turn of the assistant's is the response.
    Conversation(Vec<Message>),
    /// A text, used as it is. In scoring, everything after the first token counts as the response.
    Text(String),
    /// Tokens, fed as they are.
    TokenIds {
        /// The tokens.
        ids: Vec<u32>,
        /// `ids[response_start..]` is the response; unset: everything after the first token.
        response_start: Option<usize>,
    },
    /// One candidate of a ranking: the same tokens as the joined input, and the response begins right where the prompt
    /// ends. A conversation takes the response as its next turn, a text and token ids take it as their continuation.
    PromptResponse {
        /// What is answered: any of the other three. Its candidates share it.
        prompt: Arc<TextInput>,
        /// The answer, in the prompt's own form.
        response: Response,
    },
}

/// An answer to a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// For a prompt that is a conversation or a text.
    Text(String),
    /// For a prompt of token ids.
    TokenIds(Vec<u32>),
}

/// How a conversation becomes text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChatFormat {
    /// The checkpoint's chat template, or [`ChatFormat::HumanAssistant`] if it has none or an HHH prompt is asked for.
    #[default]
    Auto,
    /// The checkpoint's chat template; an error if it has none.
    Template,
    /// `Human:` and `Assistant:` turns separated by a blank line (Askell et al. 2021, section 2).
    HumanAssistant,
}

/// Which HHH prompt stands before the input (Askell et al. 2021, section 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HhhPrompt {
    /// None.
    #[default]
    None,
    /// All its conversations.
    Full,
    /// Its first conversation, for small contexts (section 2.2.3).
    Short,
}

/// What happens to an input over the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncation {
    /// It is refused with [`Error::TooLong`](crate::Error::TooLong).
    #[default]
    Refuse,
    /// Tokens are dropped at the start, after the HHH prompt or the leading special token, which stay.
    Left,
    /// Tokens are dropped at the end. The HHH prompt stays.
    Right,
}

/// How an input becomes tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// How a conversation becomes text.
    pub chat_format: ChatFormat,
    /// What stands before it; anything but `None` implies [`ChatFormat::HumanAssistant`].
    pub hhh_prompt: HhhPrompt,
    /// What happens to an input over the limit.
    pub truncation: Truncation,
    /// The limit in tokens; unset means the model's own, and more than that is refused.
    pub max_tokens: Option<usize>,
}

/// What the tokens are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenderMode {
    /// To be scored: the input, complete.
    Score,
    /// To be continued: the input up to the point where the assistant's answer begins.
    Generate,
    /// The response with the query left out, for mutual information log P(a|q) - log P(a) (Askell et al. 2021, section
    /// 2.2.1). HHH prompt and system turns stay, all other turns before the response go. A text or token response
    /// stands behind the special token that the tokenizer puts first; where it puts none, behind the checkpoint's BOS
    /// or else EOS, so that its first token has a probability.
    Unconditional,
}
