//! The JSON that callers send, as one list of fields, of which a protocol takes its own; others are passed over.
//!
//! Nothing is made of what was not asked for, and lists have a length: what is here takes no more than a few times its
//! size in memory.

use std::fmt;
use std::marker::PhantomData;

use plumb_proto::v1;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::malformed;
use crate::config::version_folder;
use crate::error::{Error, Result};
use crate::layers::parts::MAX_PARTS;

/// All fields of all protocols.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    pub(super) request_id: Option<String>,

    pub(super) input: Option<Inputs>,
    pub(super) messages: Option<List<Turn>>,
    pub(super) query: Option<Texts>,
    pub(super) queries: Option<Texts>,
    pub(super) documents: Option<Texts>,
    pub(super) items: Option<Texts>,
    pub(super) text_1: Option<Texts>,
    pub(super) text_2: Option<Texts>,
    pub(super) data_1: Option<Texts>,
    pub(super) data_2: Option<Texts>,

    pub(super) truncate_prompt_tokens: Option<i64>,
    pub(super) truncation_side: Option<Side>,
    use_activation: Option<bool>,
    /// Its former name, which some send beside it.
    activation: Option<bool>,
    pub(super) top_n: Option<usize>,
    pub(super) return_documents: Option<bool>,
    pub(super) encoding_format: Option<Encoding>,

    // What would change a score, and cannot be had.
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template: Option<IgnoredAny>,
    max_tokens_per_doc: Option<IgnoredAny>,
    dimensions: Option<IgnoredAny>,
}

/// Where a text is cut.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Side {
    Left,
    Right,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Encoding {
    Float,
    Base64,
}

impl Body {
    /// Reads it.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with what is wrong, and where.
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err(Error::invalid("", "the body is not what is expected here: an object"));
        }
        let body: Self = serde_json::from_slice(bytes).map_err(|error| malformed(&error))?;
        let asks_for = |asked: bool, field: &str, message: &str| match asked {
            true => Err(Error::invalid(field, message)),
            false => Ok(()),
        };
        let has_texts = matches!(body.input, Some(Inputs::Texts(_)));
        asks_for(
            body.add_special_tokens == Some(false) && has_texts,
            "add_special_tokens",
            "a text gets the special tokens that it lacks; send token ids for one without",
        )?;
        asks_for(body.add_generation_prompt == Some(true), "add_generation_prompt", "what is scored is complete")?;
        asks_for(body.continue_final_message == Some(true), "continue_final_message", "what is scored is complete")?;
        asks_for(body.chat_template.is_some(), "chat_template", "the checkpoint's own is used")?;
        asks_for(body.max_tokens_per_doc.is_some(), "max_tokens_per_doc", "use truncate_prompt_tokens")?;
        asks_for(body.dimensions.is_some(), "dimensions", "a reward is one number")?;
        Ok(body)
    }

    /// The model that is meant; the default one if none is named.
    pub(super) fn model(&self) -> Option<v1::ModelSpec> {
        self.model.as_deref().map(spec)
    }

    /// Nothing is cut unless somebody asks for it. vLLM cuts what it pools at the right.
    pub(super) fn text_options(&self) -> Result<v1::TextOptions> {
        let Some(tokens) = self.truncate_prompt_tokens else { return Ok(v1::TextOptions::default()) };
        let truncation = match self.truncation_side {
            Some(Side::Left) => v1::Truncation::Left,
            Some(Side::Right) | None => v1::Truncation::Right,
        };
        let max_tokens = match tokens {
            // As many as the model takes.
            -1 => None,
            tokens => Some(u32::try_from(tokens).map_err(|_| {
                Error::invalid("truncate_prompt_tokens", format!("{tokens} is neither -1 nor a number of tokens"))
            })?),
        };
        Ok(v1::TextOptions { truncation: truncation.into(), max_tokens, ..v1::TextOptions::default() })
    }

    /// Whether probabilities are asked for instead of rewards.
    pub(super) fn wants_probability(&self, default: bool) -> bool {
        self.use_activation.or(self.activation).unwrap_or(default)
    }

    /// `input` or `messages`, as items.
    pub(super) fn inputs(&mut self) -> Result<(&'static str, Vec<v1::Input>)> {
        match (self.input.take(), self.messages.take()) {
            (Some(Inputs::Texts(texts)), None) => Ok(("input", texts.into_iter().map(text).collect())),
            (Some(Inputs::Ids(ids)), None) => Ok(("input", ids.into_iter().map(token_ids).collect())),
            (None, Some(List(turns))) => Ok(("messages", vec![conversation(turns)])),
            _ => Err(Error::invalid("", "one of `input` and `messages` is needed")),
        }
    }
}

/// `NAME`, `NAME@VERSION`, `NAME:LABEL`, or a path or repository, which means the model that is named after it.
fn spec(model: &str) -> v1::ModelSpec {
    use v1::model_spec::Choice;
    let of = |name: &str, choice| v1::ModelSpec { name: name.to_owned(), choice };
    if let Some((name, version)) = version_folder(model) {
        return of(&name, Some(Choice::Version(version)));
    }
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let last = last.strip_suffix(".gguf").unwrap_or(last);
    if let Some((name, version)) = last.split_once('@').and_then(|(name, version)| Some((name, version.parse().ok()?)))
    {
        return of(name, Some(Choice::Version(version)));
    }
    match last.split_once(':') {
        Some((name, label)) => of(name, Some(Choice::Label(label.to_owned()))),
        None => of(last, None),
    }
}

/// A text as it is.
pub(super) fn text(text: String) -> v1::Input {
    v1::Input { input: Some(v1::input::Input::Text(text)) }
}

fn token_ids(ids: Vec<u32>) -> v1::Input {
    v1::Input { input: Some(v1::input::Input::TokenIds(v1::TokenIds { ids, response_start: None })) }
}

fn conversation(turns: Vec<Turn>) -> v1::Input {
    let messages = turns.into_iter().map(|Turn { role, content }| v1::Message { role, content: content.0 }).collect();
    v1::Input { input: Some(v1::input::Input::Conversation(v1::Conversation { messages })) }
}

/// A question, which may be the first turn of several conversations.
pub(super) fn question(query: String) -> v1::Input {
    conversation(vec![Turn { role: "user".to_owned(), content: Content(query) }])
}

/// A question and what answers it.
pub(super) fn pair(query: String, document: String) -> v1::Input {
    let turn = |role: &str, text| Turn { role: role.to_owned(), content: Content(text) };
    conversation(vec![turn("user", query), turn("assistant", document)])
}

/// A turn of a conversation.
#[derive(Debug, Deserialize)]
pub(super) struct Turn {
    role: String,
    content: Content,
}

/// A list that is not too long.
#[derive(Debug)]
pub(super) struct List<T>(pub(super) Vec<T>);

/// One text or a list of them.
#[derive(Debug)]
pub(super) struct Texts(pub(super) Vec<String>);

/// Texts or token ids, one of them or several.
#[derive(Debug, PartialEq)]
pub(super) enum Inputs {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

/// A text, plain or as `{"text": ...}`.
#[derive(Debug)]
struct Text(String);

/// What a turn says: a text, or parts that are texts, which vLLM puts into lines of their own.
#[derive(Debug)]
struct Content(String);

/// The first element of `input`.
enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

fn collect<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(mut list: Vec<T>, mut seq: A) -> Result<Vec<T>, A::Error> {
    while let Some(item) = seq.next_element()? {
        if list.len() == MAX_PARTS {
            return Err(A::Error::custom(format!("a list has more than {MAX_PARTS} elements: split it")));
        }
        list.push(item);
    }
    Ok(list)
}

/// Ids are bounded by the size of the body: they are not much smaller there.
fn collect_ids<'de, A: SeqAccess<'de>>(first: u32, mut seq: A) -> Result<Vec<u32>, A::Error> {
    let mut ids = vec![first];
    while let Some(id) = seq.next_element()? {
        ids.push(id);
    }
    Ok(ids)
}

/// A part of a text, as an object.
#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
}

fn text_of_part<'de, A: MapAccess<'de>>(map: A) -> Result<String, A::Error> {
    let Part { kind, text } = Part::deserialize(MapAccessDeserializer::new(map))?;
    match (kind.as_deref(), text) {
        (None | Some("text"), Some(text)) => Ok(text),
        (None | Some("text"), None) => Err(A::Error::missing_field("text")),
        (Some(_), _) => Err(A::Error::custom("only parts of the type `text` can be scored")),
    }
}

macro_rules! visited {
    ($type:ty, $visitor:ident, $expecting:literal, { $($methods:tt)* }) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any($visitor)
            }
        }

        struct $visitor;

        impl<'de> Visitor<'de> for $visitor {
            type Value = $type;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($expecting)
            }

            $($methods)*
        }
    };
}

visited!(Text, TextVisitor, "a text", {
    fn visit_str<E>(self, text: &str) -> Result<Text, E> {
        Ok(Text(text.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Text, A::Error> {
        text_of_part(map).map(Text)
    }
});

visited!(Texts, TextsVisitor, "a text or a list of texts", {
    fn visit_str<E>(self, text: &str) -> Result<Texts, E> {
        Ok(Texts(vec![text.to_owned()]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Texts, A::Error> {
        Ok(Texts(vec![text_of_part(map)?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Texts, A::Error> {
        // A text and its wrapping are of one size: the list stays where it is.
        Ok(Texts(collect(Vec::new(), seq)?.into_iter().map(|Text(text)| text).collect()))
    }
});

visited!(Content, ContentVisitor, "a text or a list of parts", {
    fn visit_str<E>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut content = String::new();
        let mut rest = false;
        while let Some(Text(text)) = seq.next_element()? {
            if std::mem::replace(&mut rest, true) {
                content.push('\n');
            }
            content += &text;
        }
        Ok(Content(content))
    }
});

visited!(Element, ElementVisitor, "a text, a token id or a list of token ids", {
    fn visit_str<E>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_owned()))
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Element, E> {
        u32::try_from(id).map(Element::Id).map_err(|_| E::custom(format!("{id} is not a token id")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
        match seq.next_element()? {
            Some(first) => collect_ids(first, seq).map(Element::Ids),
            None => Ok(Element::Ids(Vec::new())),
        }
    }
});

visited!(Inputs, InputsVisitor, "a text, a list of texts, token ids, or a list of them", {
    fn visit_str<E>(self, text: &str) -> Result<Inputs, E> {
        Ok(Inputs::Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Inputs, A::Error> {
        match seq.next_element()? {
            None => Ok(Inputs::Texts(Vec::new())),
            Some(Element::Text(first)) => collect(vec![first], seq).map(Inputs::Texts),
            Some(Element::Id(first)) => Ok(Inputs::Ids(vec![collect_ids(first, seq)?])),
            Some(Element::Ids(first)) => collect(vec![first], seq).map(Inputs::Ids),
        }
    }
});

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<List<T>, A::Error> {
                collect(Vec::new(), seq).map(List)
            }
        }

        deserializer.deserialize_seq(Elements(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whatever comes, it is taken or refused.
    #[test]
    fn no_body_makes_a_protocol_panic() {
        let field = prop::sample::select(vec![
            "input",
            "messages",
            "query",
            "queries",
            "documents",
            "text_1",
            "text_2",
            "model",
            "top_n",
            "role",
            "content",
            "text",
            "truncate_prompt_tokens",
            "use_activation",
        ]);
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            any::<i64>().prop_map(|number| number.to_string()),
            any::<f64>().prop_map(|number| number.to_string()),
            any::<String>().prop_map(|text| serde_json::Value::from(text).to_string()),
        ];
        let json = leaf.prop_recursive(4, 32, 4, move |inner| {
            let fields = prop::collection::vec((field.clone(), inner.clone()), 0..4);
            prop_oneof![
                prop::collection::vec(inner, 0..4).prop_map(|list| format!("[{}]", list.join(","))),
                fields.prop_map(|fields| {
                    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
                    format!("{{{}}}", fields.join(","))
                }),
            ]
        });
        proptest!(|(json in json)| {
            for (_, protocol) in super::super::SCORES {
                let _ = read(&json).and_then(protocol);
            }
        });
    }

    fn read(json: &str) -> Result<Body> {
        Body::read(json.as_bytes())
    }

    #[track_caller]
    fn refused(json: &str, words: &str) {
        let error = read(json).and_then(|mut body| body.inputs().and(body.text_options())).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(words), "{json}: {error}");
    }

    #[test]
    fn an_input_is_texts_or_token_ids_one_or_several() {
        let texts = |texts: &[&str]| Inputs::Texts(texts.iter().map(|text| (*text).to_owned()).collect());
        for (json, expected) in [
            (r#""a""#, texts(&["a"])),
            (r#"["a", "b"]"#, texts(&["a", "b"])),
            ("[]", texts(&[])),
            ("[1, 2]", Inputs::Ids(vec![vec![1, 2]])),
            ("[[1], [], [2, 3]]", Inputs::Ids(vec![vec![1], vec![], vec![2, 3]])),
        ] {
            assert_eq!(read(&format!(r#"{{"input": {json}}}"#)).unwrap().input, Some(expected), "{json}");
        }
        for wrong in [r#"["a", 1]"#, "[1, [2]]", "[4294967296]", "[-1]", "1.5", "{}", r#"[{"text": "a"}]"#] {
            refused(&format!(r#"{{"input": {wrong}}}"#), "the body is not what is expected here");
        }
    }

    #[test]
    fn texts_may_be_objects_and_contents_lists_of_parts() {
        let body = read(r#"{"documents": ["a", {"text": "b", "title": "t"}], "query": {"text": "q"}}"#).unwrap();
        assert_eq!(
            (body.documents.unwrap().0, body.query.unwrap().0),
            (vec!["a".into(), "b".into()], vec!["q".into()])
        );
        let part = |text| format!(r#"{{"type": "text", "text": "{text}"}}"#);
        let turn = format!(r#"{{"role": "user", "content": ["a", {}, {}]}}"#, part("b"), part("c"));
        let mut body = read(&format!(r#"{{"messages": [{turn}, {{"role": "assistant", "content": "d"}}]}}"#)).unwrap();
        assert_eq!(body.inputs().unwrap(), ("messages", vec![pair("a\nb\nc".into(), "d".into())]));
        refused(r#"{"documents": [{"title": "t"}]}"#, "missing field `text`");
        refused(r#"{"documents": [{"type": "image", "text": ""}]}"#, "only parts of the type `text`");
        refused(r#"{"messages": [{"role": "user", "content": null}]}"#, "a text or a list of parts");
    }

    #[test]
    fn what_would_change_a_score_and_cannot_be_had_is_refused() {
        refused(r#"{"input": "a", "add_special_tokens": false}"#, "add_special_tokens");
        refused(r#"{"messages": [], "add_generation_prompt": true}"#, "add_generation_prompt");
        refused(r#"{"messages": [], "continue_final_message": true}"#, "continue_final_message");
        refused(r#"{"messages": [], "chat_template": "{{ x }}"}"#, "chat_template");
        refused(r#"{"input": "a", "dimensions": 4}"#, "dimensions");
        refused(r#"{"input": "a", "messages": []}"#, "one of `input` and `messages`");
        refused("{}", "one of `input` and `messages`");
        for wrong in ["", "[", "[]", "{", "null", "{}}"] {
            refused(wrong, "the body is not what is expected here");
        }
        refused(r#"{"input": "a", "input": "b"}"#, "duplicate field");
        refused(r#"{"input": "a", "truncate_prompt_tokens": -2}"#, "neither -1 nor a number of tokens");
        read(r#"{"input": [1], "add_special_tokens": false, "images": [{}], "user": null, "top_n": null}"#).unwrap();
    }

    #[test]
    fn a_body_takes_no_more_memory_than_a_few_times_its_size() {
        let many = format!("[{}]", vec![r#""""#; MAX_PARTS + 1].join(","));
        refused(&format!(r#"{{"input": {many}}}"#), "a list has more than 131072 elements");
        refused(&format!(r#"{{"query": {many}}}"#), "a list has more than 131072 elements");
        let deep = format!(r#"{{"metadata": {}{}, "input": "a"}}"#, "[".repeat(1 << 20), "]".repeat(1 << 20));
        assert!(read(&deep).is_ok(), "what nobody reads is passed over without a stack");
        refused(&format!(r#"{{"input": {}}}"#, "[".repeat(1 << 20)), "the body is not what is expected here");
    }

    #[test]
    fn a_text_is_cut_only_where_that_is_asked_for() {
        let options = |json: &str| read(json).unwrap().text_options().unwrap();
        let check = |json: &str, truncation: v1::Truncation, max_tokens| {
            assert_eq!((options(json).truncation(), options(json).max_tokens), (truncation, max_tokens), "{json}");
        };
        check("{}", v1::Truncation::Unspecified, None);
        check(r#"{"truncation_side": "left"}"#, v1::Truncation::Unspecified, None);
        check(r#"{"truncate_prompt_tokens": -1}"#, v1::Truncation::Right, None);
        check(r#"{"truncate_prompt_tokens": 8}"#, v1::Truncation::Right, Some(8));
        check(r#"{"truncate_prompt_tokens": 8, "truncation_side": "left"}"#, v1::Truncation::Left, Some(8));
    }

    #[test]
    fn a_model_is_named_by_name_version_label_or_path() {
        use v1::model_spec::Choice::{Label, Version};
        let check = |model: &str, name: &str, choice| {
            assert_eq!(spec(model), v1::ModelSpec { name: name.to_owned(), choice }, "{model}");
        };
        check("pm", "pm", None);
        check("", "", None);
        check("pm@3", "pm", Some(Version(3)));
        check("pm:canary", "pm", Some(Label("canary".into())));
        check("org/reward-model", "reward-model", None);
        check("/checkpoints/pm/", "pm", None);
        check("/checkpoints/pm/3", "pm", Some(Version(3)));
        check("./lm.Q4.gguf", "lm.Q4", None);
    }
}
