//! Chat templates, and conversations that go through them.

use std::sync::{Arc, LazyLock};

use plumb_model::Error;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::text::{
    HhhPrompts, Message, RenderMode, RenderOptions, TextConfig, TextInput, TextPipeline, Truncation,
};
use tempfile::TempDir;

use crate::{Target, folder};

/// A refusal has to be the template's own doing, not that of a process that renders and was lost.
fn assert_own(error: &Error) {
    assert!(!matches!(error, Error::Renderer(_)), "{error}");
}

/// A template's source, then turns as `role:content`: the way of a request up to its tokens.
pub const TEMPLATE: Target = Target { name: "template", take, fixed: 256 << 20, per_byte: 1024 };

/// An HHH prompt that is tokenized at once: every template makes a pipeline.
pub(crate) static HHH: LazyLock<Arc<HhhPrompts>> = LazyLock::new(|| {
    let folder: TempDir = folder::with(&[("hhh.txt", b"Human: a\n\nAssistant: b\n")]);
    Arc::new(HhhPrompts::from_file(&folder.path().join("hhh.txt")).expect("a prompt"))
});

/// The text of a checkpoint, as a server uses it.
pub(crate) fn text_config(checkpoint: Checkpoint) -> TextConfig {
    let Checkpoint { config, tokenizer, special, chat_template, .. } = checkpoint;
    TextConfig {
        tokenizer,
        chat_template,
        special,
        vocab_size: config.vocab_size,
        max_tokens: config.max_position_embeddings,
        hhh: Arc::clone(&HHH),
    }
}

fn take(data: &[u8]) {
    static MODEL: LazyLock<TextConfig> = LazyLock::new(|| {
        let source = Source { model: folder::fixture("llama-lm"), ..Source::default() };
        text_config(Checkpoint::open(&source).expect("a checkpoint"))
    });
    let mut parts = data.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let source = parts.next().unwrap_or_default().into_owned();
    let turn = |part: std::borrow::Cow<'_, str>| match part.split_once(':') {
        Some((role, content)) => Message::new(role, content),
        None => Message::new("user", part),
    };
    let turns: Vec<Message> = parts.map(turn).collect();
    let config = TextConfig {
        tokenizer: MODEL.tokenizer.clone(),
        chat_template: Some(source),
        special: MODEL.special.clone(),
        vocab_size: MODEL.vocab_size,
        max_tokens: MODEL.max_tokens,
        hhh: Arc::clone(&HHH),
    };
    let pipeline = match TextPipeline::new(config) {
        Ok(pipeline) => pipeline,
        Err(error) => return assert_own(&error),
    };
    let options = RenderOptions { truncation: Truncation::Left, ..RenderOptions::default() };
    // One of the three: what one of them may take, all of them together may not.
    let mode = match turns.last().map(|turn| turn.role.as_str()) {
        Some("assistant") if turns.len().is_multiple_of(2) => RenderMode::Score,
        Some("assistant") => RenderMode::Unconditional,
        _ => RenderMode::Generate,
    };
    let rendered = match pipeline.render(&TextInput::Conversation(turns), &options, mode) {
        Ok(rendered) => rendered,
        Err(error) => return assert_own(&error),
    };
    assert!(rendered.ids.len() <= MODEL.max_tokens, "{} tokens", rendered.ids.len());
    assert!(rendered.ids.iter().all(|id| (*id as usize) < MODEL.vocab_size), "{:?}", rendered.ids);
    assert!(rendered.response.start <= rendered.response.end && rendered.response.end <= rendered.ids.len());
}
