//! Compiles the `.proto` files with protox, so that no protoc has to be installed.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 4] =
    ["plumb/v1/preference.proto", "plumb/v1/generation.proto", "plumb/v1/models.proto", "plumb/v1/tokens.proto"];

/// What a record holds, and of that the fields that are left out where they have their default.
const RECORDED: [(&str, &[&str]); 12] = [
    ("ModelSpec", &["name"]),
    ("ModelIdentity", &[]),
    ("Message", &[]),
    ("Conversation", &[]),
    ("TokenIds", &["response_start"]),
    ("Input", &[]),
    ("Candidate", &[]),
    ("TextOptions", &["chat_format", "hhh_prompt", "truncation", "max_tokens"]),
    ("ScoreRequest", &["model", "text", "objective", "per_token", "request_id", "priority"]),
    ("RankRequest", &["model", "prompt", "text", "objective", "request_id", "priority"]),
    ("LogProbs", &["unconditional_sum"]),
    ("Timings", &[]),
];
/// One of several fields, which stands in the message as itself.
const ONEOFS: [&str; 3] = ["ModelSpec.choice", "Input.input", "Candidate.candidate"];
/// Enums are written by their names.
const ENUMS: [(&str, &str); 7] = [
    ("TextOptions.chat_format", "ChatFormat"),
    ("TextOptions.hhh_prompt", "HhhPrompt"),
    ("TextOptions.truncation", "Truncation"),
    ("ScoreRequest.objective", "Objective"),
    ("ScoreRequest.priority", "Priority"),
    ("RankRequest.objective", "Objective"),
    ("RankRequest.priority", "Priority"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=plumb");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // Reflection serves these bytes.
    std::fs::write(out.join("plumb.v1.bin"), descriptors.encode_to_vec())?;
    let mut builder = tonic_prost_build::configure();
    if std::env::var_os("CARGO_FEATURE_RECORD").is_some() {
        builder = with_json(builder);
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}

/// Lets what is recorded be written and read as JSON, in the form that Protobuf defines, with the names of the `.proto`.
fn with_json(mut builder: tonic_prost_build::Builder) -> tonic_prost_build::Builder {
    let path = |name: &str| format!(".plumb.v1.{name}");
    // A path with a leading dot would also mean what is inside of it, here the variants.
    let only = |name: &str| format!("v1.{name}");
    for (message, optional) in RECORDED {
        builder = builder
            .type_attribute(path(message), "#[derive(serde::Serialize, serde::Deserialize)]")
            .message_attribute(path(message), "#[serde(default)]");
        for field in optional {
            let attribute = "#[serde(skip_serializing_if = \"crate::json::is_default\")]";
            builder = builder.field_attribute(path(&format!("{message}.{field}")), attribute);
        }
    }
    for oneof in ONEOFS {
        builder = builder
            .field_attribute(only(oneof), "#[serde(flatten)]")
            .enum_attribute(path(oneof), "#[serde(rename_all = \"snake_case\")]");
    }
    for (field, name) in ENUMS {
        let attribute = format!("#[serde(with = \"crate::json::ByName::<{name}>\")]");
        builder = builder.field_attribute(path(field), attribute);
    }
    builder
}
