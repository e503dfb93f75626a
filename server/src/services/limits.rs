//! Bounds of what a caller may send, beside those that are flags: nobody needs more, and what is longer would fill
//! memory, logs or headers. SECURITY.md lists them.

use plumb_model::text::{MAX_MESSAGES, TextInput};
use plumb_proto::v1;

use crate::error::{Error, Result};

/// An id that is echoed and logged.
pub(crate) const MAX_REQUEST_ID_BYTES: usize = 128;
/// Name of a model or label.
const MAX_NAME_BYTES: usize = 128;
/// A text, and texts to tokenize together.
pub(crate) const MAX_TEXT_BYTES: usize = 4 << 20;
/// Role of a turn.
const MAX_ROLE_BYTES: usize = 64;
/// A path, repository or revision.
const MAX_SOURCE_BYTES: usize = 4096;
/// Token ids of an item: as many bytes as a text may have.
const MAX_TOKEN_IDS: usize = 1 << 20;
/// Most stop strings, and most banned strings, of a call: each is looked for after every token.
pub(super) const MAX_STRINGS: usize = 64;
/// A stop string, which as much text is held back for.
const MAX_STRING_BYTES: usize = 1024;

/// The id of a request.
pub(super) fn request_id(id: &str) -> Result<()> {
    at_most("request_id", id.len(), MAX_REQUEST_ID_BYTES)
}

/// Which model is asked; `field` is where it stands.
pub(super) fn spec(field: &str, spec: Option<&v1::ModelSpec>) -> Result<()> {
    let Some(v1::ModelSpec { name: model, choice }) = spec else { return Ok(()) };
    name(&format!("{field}.name"), model)?;
    match choice {
        Some(v1::model_spec::Choice::Label(label)) => name(&format!("{field}.label"), label),
        Some(v1::model_spec::Choice::Version(_)) | None => Ok(()),
    }
}

/// A name that is looked up; what a name is made of is checked where one is given.
pub(super) fn name(field: &str, name: &str) -> Result<()> {
    at_most(field, name.len(), MAX_NAME_BYTES)
}

/// Labels that calls are split between.
pub(super) fn shares(shares: &[v1::TrafficShare]) -> Result<()> {
    shares.iter().enumerate().try_for_each(|(i, share)| name(&format!("shares[{i}].label"), &share.label))
}

/// Where a model comes from.
pub(super) fn source(field: &str, source: &str) -> Result<()> {
    at_most(field, source.len(), MAX_SOURCE_BYTES)
}

/// Parts of an input that the model crate does not bound.
pub(super) fn input(input: &v1::Input) -> Result<()> {
    match &input.input {
        Some(v1::input::Input::Conversation(conversation)) => {
            let turns = conversation.messages.len();
            // Before they are copied.
            if turns > MAX_MESSAGES {
                let message = format!("has {turns} messages, {MAX_MESSAGES} are allowed");
                return Err(Error::invalid("conversation.messages", message));
            }
            let too_long = |message: &v1::Message| message.role.len() > MAX_ROLE_BYTES;
            match conversation.messages.iter().position(too_long) {
                Some(i) => at_most(
                    &format!("conversation.messages[{i}].role"),
                    conversation.messages[i].role.len(),
                    MAX_ROLE_BYTES,
                ),
                None => Ok(()),
            }
        }
        Some(v1::input::Input::TokenIds(ids)) => token_ids(ids),
        Some(v1::input::Input::Text(_)) | None => Ok(()),
    }
}

/// Token ids of an item or of a candidate.
pub(super) fn token_ids(ids: &v1::TokenIds) -> Result<()> {
    match ids.ids.len() {
        count if count > MAX_TOKEN_IDS => {
            Err(Error::invalid("token_ids", format!("{count} are given, {MAX_TOKEN_IDS} are allowed")))
        }
        _ => Ok(()),
    }
}

/// Stop strings or banned strings.
pub(super) fn strings(field: &str, strings: &[String]) -> Result<()> {
    if strings.len() > MAX_STRINGS {
        return Err(Error::invalid(field, format!("{} are given, {MAX_STRINGS} are allowed", strings.len())));
    }
    for (i, string) in strings.iter().enumerate() {
        let field = format!("{field}[{i}]");
        if string.is_empty() {
            return Err(Error::invalid(field, "is empty"));
        }
        at_most(&field, string.len(), MAX_STRING_BYTES)?;
    }
    Ok(())
}

/// Texts that are tokenized and described token by token, in one call.
pub(super) fn texts(texts: &[String]) -> Result<()> {
    at_most("texts", texts.iter().map(String::len).sum(), MAX_TEXT_BYTES)
}

/// A prompt is joined to each of its candidates: together they may have as many bytes as a message.
pub(super) fn candidates(prompt: &TextInput, candidates: &[v1::Candidate], max_bytes: usize) -> Result<()> {
    let bytes = candidates.iter().map(|candidate| match &candidate.candidate {
        Some(v1::candidate::Candidate::Text(text)) => text.len(),
        Some(v1::candidate::Candidate::TokenIds(ids)) => size_of_val(&ids.ids[..]),
        None => 0,
    });
    joined("candidates", prompt, candidates.len(), bytes.sum(), max_bytes)
}

/// The same for samples that are ranked, before there are any.
pub(super) fn samples(prompt: &TextInput, samples: usize, max_bytes: usize) -> Result<()> {
    joined("best_of.samples", prompt, samples, 0, max_bytes)
}

fn joined(field: &str, prompt: &TextInput, count: usize, bytes: usize, max_bytes: usize) -> Result<()> {
    let joined = size(prompt).saturating_mul(count).saturating_add(bytes);
    if joined > max_bytes {
        let message = format!("joined to the prompt, they have {joined} bytes, {max_bytes} are allowed");
        return Err(Error::invalid(field, message));
    }
    Ok(())
}

fn size(input: &TextInput) -> usize {
    match input {
        TextInput::Text(text) => text.len(),
        TextInput::Conversation(messages) => {
            messages.iter().map(|message| size_of_val(message) + message.role.len() + message.content.len()).sum()
        }
        TextInput::TokenIds { ids, .. } => size_of_val(&ids[..]),
        TextInput::PromptResponse { prompt, .. } => size(prompt),
    }
}

fn at_most(field: &str, bytes: usize, limit: usize) -> Result<()> {
    match bytes > limit {
        true => Err(Error::invalid(field, format!("has {bytes} bytes, {limit} are allowed"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(result: Result<()>, field: &str, words: &str) {
        let Err(Error::InvalidArgument { field: found, message }) = result else { panic!("{result:?}") };
        assert_eq!(found, field);
        assert!(message.contains(words), "{message}");
    }

    #[test]
    fn what_is_longer_than_anybody_needs_is_refused_by_name() {
        let long = |bytes| "x".repeat(bytes);
        refused(request_id(&long(129)), "request_id", "129 bytes, 128 are allowed");
        assert!(request_id(&long(128)).is_ok());
        let model = |name: String, choice| v1::ModelSpec { name, choice };
        refused(spec("model", Some(&model(long(129), None))), "model.name", "128 are allowed");
        let label = Some(v1::model_spec::Choice::Label(long(129)));
        refused(spec("best_of.ranker", Some(&model(String::new(), label))), "best_of.ranker.label", "128 are allowed");
        assert!(spec("model", None).is_ok());
        let share = |bytes| v1::TrafficShare { label: long(bytes), weight: 1 };
        refused(shares(&[share(128), share(129)]), "shares[1].label", "129 bytes, 128 are allowed");
        refused(source("source", &long(4097)), "source", "4096 are allowed");
        refused(strings("stops", &vec![long(1); 65]), "stops", "65 are given");
        refused(strings("stops", &[long(1), long(1025)]), "stops[1]", "1024 are allowed");
        refused(strings("stops", &[long(1), String::new()]), "stops[1]", "is empty");
        assert!(strings("stops", &[long(1)]).is_ok());
    }

    #[test]
    fn inputs_are_bounded_in_all_their_parts() {
        let of = |input| v1::Input { input: Some(input) };
        let turn = |bytes| v1::Message { role: "r".repeat(bytes), content: String::new() };
        let turns = v1::Conversation { messages: vec![turn(64), turn(65)] };
        let field = "conversation.messages[1].role";
        refused(input(&of(v1::input::Input::Conversation(turns))), field, "65 bytes, 64 are allowed");
        let turns = v1::Conversation { messages: vec![turn(0); 4097] };
        refused(input(&of(v1::input::Input::Conversation(turns))), "conversation.messages", "4096 are allowed");
        let ids = v1::TokenIds { ids: vec![0; MAX_TOKEN_IDS + 1], response_start: None };
        refused(input(&of(v1::input::Input::TokenIds(ids))), "token_ids", "1048576 are allowed");
        let candidate = v1::Candidate { candidate: Some(v1::candidate::Candidate::Text("12".to_owned())) };
        let check = |limit| candidates(&TextInput::Text("1234".to_owned()), &vec![candidate.clone(); 3], limit);
        assert!(check(18).is_ok());
        refused(check(17), "candidates", "18 bytes, 17 are allowed");
    }
}
