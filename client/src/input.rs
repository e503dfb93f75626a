//! Short ways to write inputs.

use plumb_proto::v1;

/// A text that is tokenized as it is.
pub fn text(text: impl Into<String>) -> v1::Input {
    v1::Input { input: Some(v1::input::Input::Text(text.into())) }
}

/// A conversation of (role, content) turns, oldest first, rendered by the server with the checkpoint's template.
pub fn conversation<R: Into<String>, C: Into<String>>(turns: impl IntoIterator<Item = (R, C)>) -> v1::Input {
    let messages =
        turns.into_iter().map(|(role, content)| v1::Message { role: role.into(), content: content.into() }).collect();
    v1::Input { input: Some(v1::input::Input::Conversation(v1::Conversation { messages })) }
}

/// A user's prompt and the assistant's response.
pub fn dialogue(prompt: impl Into<String>, response: impl Into<String>) -> v1::Input {
    conversation([("user", prompt.into()), ("assistant", response.into())])
}
