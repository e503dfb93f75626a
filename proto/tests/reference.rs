//! The reference of the API in the guide, made from the contract and its comments: it has to be what is committed.
//! `PLUMB_WRITE_REFERENCE=1` writes it.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::{env, fs};

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/src/reference/api.md");

const HEAD: &str = "\
# The API

<!-- Written by proto/tests/reference.rs from proto/plumb/v1: change that. -->

The package is `plumb.v1`. The server also answers `grpc.health.v1.Health` and reflection, so that `grpcurl` needs no files.
A field that is not marked `optional` and is not set has the default of its type: zero, empty, or the first value of an enum.
";

/// Numbers of fields in descriptors, of which paths to comments are made.
const MESSAGE: i32 = 4;
const ENUM: i32 = 5;
const SERVICE: i32 = 6;
/// Of a message, a service or an enum: its fields, methods or values.
const MEMBER: i32 = 2;
const ONEOF: i32 = 8;

#[test]
fn the_reference_is_that_of_the_contract() {
    let set = FileDescriptorSet::decode(plumb_proto::FILE_DESCRIPTOR_SET).unwrap();
    let page = page(&set);
    if env::var_os("PLUMB_WRITE_REFERENCE").is_some() {
        fs::write(PAGE, &page).unwrap();
    }
    let committed = fs::read_to_string(PAGE).unwrap();
    assert!(committed == page, "{PAGE} is stale: PLUMB_WRITE_REFERENCE=1 cargo test -p plumb-proto --test reference");
}

fn page(set: &FileDescriptorSet) -> String {
    let mut out = HEAD.to_owned();
    // Services first; what they share comes last.
    let (shared, services): (Vec<_>, Vec<_>) = set.file.iter().partition(|file| file.service.is_empty());
    for file in services.into_iter().chain(shared) {
        write!(out, "\n## {}\n", file.name()).unwrap();
        let comments = Comments::of(file);
        for (i, part) in (0..).zip(&file.service) {
            service(&mut out, part, &comments, i);
        }
        for (i, part) in (0..).zip(&file.message_type) {
            message(&mut out, part, &comments, i);
        }
        for (i, part) in (0..).zip(&file.enum_type) {
            values(&mut out, part, &comments, i);
        }
    }
    out
}

fn service(out: &mut String, service: &ServiceDescriptorProto, comments: &Comments, i: i32) {
    write!(out, "\n### Service {}\n\n{}\n\n", service.name(), comments.at(&[SERVICE, i])).unwrap();
    out.push_str("| rpc | takes | answers | |\n|---|---|---|---|\n");
    for (j, method) in (0..).zip(&service.method) {
        let side = |streams, name| format!("{}{}", if streams { "stream of " } else { "" }, link(name));
        let takes = side(method.client_streaming(), method.input_type());
        let answers = side(method.server_streaming(), method.output_type());
        let what = comments.at(&[SERVICE, i, MEMBER, j]);
        writeln!(out, "| `{}` | {takes} | {answers} | {what} |", method.name()).unwrap();
    }
}

fn message(out: &mut String, message: &DescriptorProto, comments: &Comments, i: i32) {
    assert!(message.nested_type.is_empty() && message.enum_type.is_empty(), "say how nested types are shown");
    write!(out, "\n### {}\n\n{}\n", message.name(), comments.at(&[MESSAGE, i])).unwrap();
    if message.field.is_empty() {
        return;
    }
    out.push_str("\n| field | number | type | |\n|---|---|---|---|\n");
    let mut begun = None;
    for (j, field) in (0..).zip(&message.field) {
        let choice = field.oneof_index.filter(|_| !field.proto3_optional());
        if let Some(choice) = choice.filter(|_| choice != begun) {
            let name = message.oneof_decl[usize::try_from(choice).unwrap()].name();
            let what = comments.at(&[MESSAGE, i, ONEOF, choice]);
            writeln!(out, "| *{name}* | | at most one of the next | {what} |").unwrap();
        }
        begun = choice;
        let kind = kind(field);
        let what = comments.at(&[MESSAGE, i, MEMBER, j]);
        writeln!(out, "| `{}` | {} | {kind} | {what} |", field.name(), field.number()).unwrap();
    }
}

fn values(out: &mut String, values: &EnumDescriptorProto, comments: &Comments, i: i32) {
    write!(out, "\n### {}\n\n{}\n\n| value | number | |\n|---|---|---|\n", values.name(), comments.at(&[ENUM, i]))
        .unwrap();
    for (j, value) in (0..).zip(&values.value) {
        let what = comments.at(&[ENUM, i, MEMBER, j]);
        writeln!(out, "| `{}` | {} | {what} |", value.name(), value.number()).unwrap();
    }
}

fn kind(field: &FieldDescriptorProto) -> String {
    let of = match field.r#type() {
        Type::Message | Type::Enum => link(field.type_name()),
        // `TYPE_UINT32`
        scalar => format!("`{}`", scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase()),
    };
    match field.label() {
        Label::Repeated => format!("list of {of}"),
        _ if field.proto3_optional() => format!("optional {of}"),
        _ => of,
    }
}

/// `.plumb.v1.Name`, as a link to its heading.
fn link(name: &str) -> String {
    let name = name.trim_start_matches(".plumb.v1.");
    format!("[{name}](#{})", name.to_lowercase())
}

/// What stands before a declaration, by the path to it.
struct Comments(HashMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        Self(locations.map(|place| (place.path.clone(), place.leading_comments().to_owned())).collect())
    }

    /// In one line, fit for a cell of a table.
    fn at(&self, path: &[i32]) -> String {
        let comment = self.0.get(path).map(String::as_str).unwrap_or_default();
        comment.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
    }
}
