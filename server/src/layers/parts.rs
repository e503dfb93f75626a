//! What a message is made of, counted while its bytes come.
//!
//! Two bytes are an empty turn, which takes some hundred when it is decoded: too many turns, items and texts are refused
//! before that. What is malformed is left to the decoder, which ends where it finds it, and which has read no more parts
//! than are counted here.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost::Message as _;
use prost_types::FileDescriptorSet;
use prost_types::field_descriptor_proto::{Label, Type};

/// Most parts of a request: 256 items of 500 turns each.
pub(crate) const MAX_PARTS: usize = 1 << 17;

/// The messages of the contract, by what they can hold.
struct Schema {
    /// Those of their fields in which there may be parts.
    messages: Vec<HashMap<u64, Part>>,
    /// Which message an rpc takes, by its path.
    requests: HashMap<String, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// A place of [`Schema::messages`].
    Message {
        place: usize,
        /// One of many; another one stands in what holds it, and takes nothing by being there.
        repeated: bool,
    },
    /// One of many strings.
    Text,
}

impl Part {
    fn counts(self) -> bool {
        matches!(self, Self::Message { repeated: true, .. } | Self::Text)
    }
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    // It is part of the program; a test reads it.
    Schema::of(&FileDescriptorSet::decode(plumb_proto::FILE_DESCRIPTOR_SET).unwrap_or_default())
});

impl Schema {
    fn of(files: &FileDescriptorSet) -> Self {
        let all: Vec<_> = files
            .file
            .iter()
            .flat_map(|file| file.message_type.iter().map(|message| (format!(".{}", file.package()), message)))
            .flat_map(|(package, message)| {
                let name = format!("{package}.{}", message.name());
                // Messages in messages, such as the entries of a map, are one deep.
                let nested = message.nested_type.iter().map(|nested| (format!("{name}.{}", nested.name()), nested));
                nested.chain([(name.clone(), message)]).collect::<Vec<_>>()
            })
            .collect();
        let place = |name: &str| all.iter().position(|(known, _)| known == name);
        let part = |field: &prost_types::FieldDescriptorProto| {
            let repeated = field.label() == Label::Repeated;
            match field.r#type() {
                Type::Message => Some(Part::Message { place: place(field.type_name())?, repeated }),
                Type::String | Type::Bytes if repeated => Some(Part::Text),
                _ => None,
            }
        };
        let number = |field: &prost_types::FieldDescriptorProto| u64::try_from(field.number()).unwrap_or_default();
        let fields = |message: &prost_types::DescriptorProto| {
            message.field.iter().filter_map(|field| Some((number(field), part(field)?))).collect()
        };
        let methods = files.file.iter().flat_map(|file| {
            let service =
                move |service: &prost_types::ServiceDescriptorProto| format!("/{}.{}", file.package(), service.name());
            file.service.iter().flat_map(move |s| s.method.iter().map(move |method| (service(s), method)))
        });
        let request = |(service, method): (String, &prost_types::MethodDescriptorProto)| {
            Some((format!("{service}/{}", method.name()), place(method.input_type())?))
        };
        Self {
            messages: all.iter().map(|(_, message)| fields(message)).collect(),
            requests: methods.filter_map(request).collect(),
        }
    }
}

/// What the requests of an rpc are made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind(usize);

impl Kind {
    /// That of the rpc with this path, if it is one of the contract.
    pub(super) fn of(path: &str) -> Option<Self> {
        SCHEMA.requests.get(path).copied().map(Self)
    }
}

/// Counts the parts of a message.
#[derive(Debug)]
pub(super) struct Parts {
    /// Bytes so far.
    at: u64,
    /// The messages that one is inside of, and where they end.
    open: Vec<(usize, u64)>,
    reading: Reading,
    /// Groups that one is inside of. The decoder knows none, and skips what is in them.
    groups: u64,
    /// Bits of a number that have come, and how many.
    number: (u64, u32),
    count: usize,
}

#[derive(Clone, Copy, Debug)]
enum Reading {
    Tag,
    /// The length of a field.
    Length(Option<Part>),
    /// A number that means nothing here.
    Number,
    /// So many bytes mean nothing here.
    Skipped(u64),
}

/// There are more than [`MAX_PARTS`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooMany;

impl Parts {
    /// Of a message of so many bytes, which begins after `before` more.
    pub(super) fn new(kind: Kind, before: u64, bytes: u64) -> Self {
        let end = before + bytes;
        let reading = Reading::Skipped(before);
        Self { at: 0, open: vec![(kind.0, end)], reading, groups: 0, number: (0, 0), count: 0 }
    }

    /// Goes on. What comes after the message is left alone.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), TooMany> {
        loop {
            if let Reading::Skipped(left) = &mut self.reading {
                let skipped = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= skipped as u64;
                self.at += skipped as u64;
                bytes = &bytes[skipped..];
                if *left == 0 {
                    self.reading = Reading::Tag;
                }
            }
            while self.open.pop_if(|(_, end)| *end <= self.at).is_some() {}
            let (Some(&(message, _)), Some((&byte, rest))) = (self.open.last(), bytes.split_first()) else {
                return Ok(());
            };
            (bytes, self.at) = (rest, self.at + 1);
            let Some(number) = self.number(byte) else { continue };
            self.reading = match self.reading {
                Reading::Tag => match number & 7 {
                    0 => Reading::Number,
                    1 => Reading::Skipped(8),
                    2 if self.groups > 0 => Reading::Length(None),
                    2 => Reading::Length(SCHEMA.messages[message].get(&(number >> 3)).copied()),
                    3 => {
                        self.groups += 1;
                        Reading::Tag
                    }
                    4 => {
                        self.groups = self.groups.saturating_sub(1);
                        Reading::Tag
                    }
                    5 => Reading::Skipped(4),
                    _ => Reading::Tag,
                },
                Reading::Length(part) => {
                    self.count += usize::from(part.is_some_and(Part::counts));
                    if self.count > MAX_PARTS {
                        return Err(TooMany);
                    }
                    match part {
                        Some(Part::Message { place, .. }) => {
                            self.open.push((place, self.at.saturating_add(number)));
                            Reading::Tag
                        }
                        Some(Part::Text) | None => Reading::Skipped(number),
                    }
                }
                Reading::Number | Reading::Skipped(_) => Reading::Tag,
            };
        }
    }

    /// Takes a byte of a number, which has seven bits in each; the number, if this was its last.
    fn number(&mut self, byte: u8) -> Option<u64> {
        let (so_far, shift) = self.number;
        let number = so_far | u64::from(byte & 127).checked_shl(shift).unwrap_or_default();
        let more = byte & 128 != 0;
        self.number = if more { (number, shift.saturating_add(7)) } else { (0, 0) };
        (!more).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use plumb_proto::v1;
    use proptest::prelude::*;

    use super::*;

    const SCORE: &str = "/plumb.v1.Preference/Score";

    fn conversation(turns: usize) -> v1::Input {
        let turn = |i: usize| v1::Message { role: "user".repeat(i % 3), content: "é".repeat(i % 200) };
        let conversation = v1::Conversation { messages: (0..turns).map(turn).collect() };
        v1::Input { input: Some(v1::input::Input::Conversation(conversation)) }
    }

    fn tokens(count: usize) -> v1::Input {
        let ids = v1::TokenIds { ids: (0..count as u32).collect(), response_start: Some(1) };
        v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
    }

    /// What is counted when the bytes come in pieces, after five and before others.
    fn count(path: &str, message: &[u8], piece: usize) -> Result<usize, TooMany> {
        let all = [&[255; 5], message, &[10; 40]].concat();
        let mut parts = Parts::new(Kind::of(path).unwrap(), 5, message.len() as u64);
        all.chunks(piece).try_for_each(|bytes| parts.take(bytes))?;
        Ok(parts.count)
    }

    #[test]
    fn items_turns_and_texts_are_counted_and_nothing_else() {
        let request = v1::ScoreRequest {
            model: Some(v1::ModelSpec { name: "pm".into(), choice: Some(v1::model_spec::Choice::Version(7)) }),
            items: vec![conversation(3), tokens(1000), v1::Input::default()],
            request_id: "an id".into(),
            ..v1::ScoreRequest::default()
        };
        assert_eq!(count(SCORE, &request.encode_to_vec(), 7), Ok(6), "three items and three turns");
        let request = v1::TokenizeRequest { texts: vec!["a".into(), String::new()], ..Default::default() };
        assert_eq!(count("/plumb.v1.Tokens/Tokenize", &request.encode_to_vec(), 7), Ok(2));
        assert!(Kind::of("/plumb.v1.Preference/DropAllTables").is_none());
    }

    #[test]
    fn every_rpc_of_the_contract_is_known() {
        for file in FileDescriptorSet::decode(plumb_proto::FILE_DESCRIPTOR_SET).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(Kind::of(&path).is_some(), "{path}");
                }
            }
        }
    }

    #[test]
    fn too_many_are_told_before_they_have_all_come() {
        let empty = [18, 0].repeat(MAX_PARTS);
        assert_eq!(count(SCORE, &empty, 1000), Ok(MAX_PARTS));
        let mut parts = Parts::new(Kind::of(SCORE).unwrap(), 0, 1 << 40);
        assert_eq!(parts.take(&empty), Ok(()));
        assert_eq!(parts.take(&[18, 0]), Err(TooMany));
        // However deep they lie, and however long the item says it is.
        let turns = [vec![18, 255, 255, 255, 15, 10, 255, 255, 255, 15], [10, 0].repeat(MAX_PARTS)].concat();
        assert_eq!(count(SCORE, &turns, 1000), Err(TooMany));
    }

    #[test]
    fn what_is_in_a_group_hides_nothing() {
        // A field in a group of its own, which as an item would be one of 64 MiB.
        let group = [0x7b, 0x12, 0x05, 0x7a, 0xff, 0xff, 0xff, 0x1f, 0x7c];
        let request = [&group[..], &[18, 0].repeat(100)].concat();
        assert_eq!(decoded(&request), Some(100));
        assert_eq!(count(SCORE, &request, 3), Ok(100));
        let nested = [&[0x7b, 0x7b][..], &group, &[0x7c, 0x7c, 18, 0]].concat();
        assert_eq!((decoded(&nested), count(SCORE, &nested, 1)), (Some(1), Ok(1)));
    }

    /// How many parts the decoder makes of a request, if it is well-formed.
    fn decoded(bytes: &[u8]) -> Option<usize> {
        let request = v1::ScoreRequest::decode(bytes).ok()?;
        let of = |item: &v1::Input| match &item.input {
            Some(v1::input::Input::Conversation(conversation)) => conversation.messages.len(),
            _ => 0,
        };
        Some(request.items.len() + request.items.iter().map(of).sum::<usize>())
    }

    proptest! {
        #[test]
        fn however_they_are_cut_parts_are_the_same(turns in prop::collection::vec(0..20usize, 0..8), piece in 1..40usize) {
            let request = v1::ScoreRequest {
                items: turns.iter().flat_map(|turns| [conversation(*turns), tokens(*turns)]).collect(),
                ..v1::ScoreRequest::default()
            };
            let bytes = request.encode_to_vec();
            prop_assert_eq!(count(SCORE, &bytes, piece), Ok(decoded(&bytes).unwrap()));
        }

        #[test]
        fn what_the_decoder_makes_of_anything_is_counted(
            bytes in prop::collection::vec(
                prop_oneof![Just(18u8), Just(10u8), Just(0x7bu8), Just(0x7cu8), 0..8u8, any::<u8>()],
                0..200,
            ),
            piece in 1..40usize,
        ) {
            if let Some(parts) = decoded(&bytes) {
                prop_assert!(count(SCORE, &bytes, piece).unwrap() >= parts);
            }
        }
    }
}
