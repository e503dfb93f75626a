//! The tokenizer that a GGUF file describes, put into the words of a `tokenizer.json`.
//!
//! The file holds a vocabulary and the name of a way to split text (`tokenizer.ggml.pre`). What a name means is in
//! llama.cpp's `llama-vocab.cpp`; a name that is not known here is refused, because a wrong split gives wrong token ids
//! and nothing would show it.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json, json};

use super::fields::excerpt;
use super::gguf::Metadata;
use super::tokenizer::{SpecialTokens, TextParts};
use super::tokenizer_json::{self, MOST_TOKEN};
use crate::{Error, Result};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const PRE: &str = "tokenizer.ggml.pre";

/// How text is split before byte pairs are merged.
struct Split {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Matches are the pieces; `None`: each digit is one, and the rest is split as GPT-2 does.
    pattern: Option<&'static str>,
    /// A piece that is a token is that token, whatever the merges would make of it.
    ignore_merges: bool,
    /// Whether a text begins with a BOS if the file does not say.
    add_bos: bool,
    /// Unicode normalisation form C first. llama.cpp has none, the models' own tokenizers do.
    nfc: bool,
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const SPLITS: [Split; 5] = [
    Split { names: &["gpt-2"], pattern: Some(GPT2), ignore_merges: false, add_bos: false, nfc: false },
    Split {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: Some(LLAMA3),
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    Split {
        names: &["qwen2", "deepseek-r1-qwen"],
        pattern: Some(QWEN2),
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    // SmolLM and SmolLM2.
    Split { names: &["smollm"], pattern: None, ignore_merges: false, add_bos: false, nfc: false },
    // Mistral Nemo.
    Split { names: &["tekken"], pattern: Some(TEKKEN), ignore_merges: true, add_bos: true, nfc: false },
];

/// llama.cpp's types of tokens, as far as they count here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenType {
    /// Merged from text.
    Normal,
    /// Never comes from text; left out when decoding.
    Special,
    /// Always found whole in text.
    UserDefined,
    /// A single byte, for text that no token covers.
    Byte,
}

/// Reads the tokenizer, special tokens and chat template.
pub(super) fn read(metadata: &Metadata<'_>) -> Result<TextParts> {
    let tokens = texts(metadata, TOKENS)?.ok_or_else(|| metadata.wrong(TOKENS, "the vocabulary"))?;
    let types = token_types(metadata, tokens.len())?;
    let (mut parts, add_bos) = match metadata.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => sentence_piece(metadata, &tokens, &types)?,
        _ => return Err(metadata.wrong("tokenizer.ggml.model", "\"gpt2\" or \"llama\"")),
    };
    let role = |name: &str| -> Result<Option<String>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = metadata.whole(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
        token.map(|token| Some(token.clone())).ok_or_else(|| metadata.wrong(&key, "the id of a token"))
    };
    let special = SpecialTokens {
        bos: role("bos")?,
        eos: role("eos")?,
        pad: role("padding")?,
        unk: role("unknown")?,
        eos_ids: Vec::new(),
    };

    parts.insert("version".to_owned(), json!("1.0"));
    parts.insert("added_tokens".to_owned(), added_tokens(&tokens, &types));
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
    let add_eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let bos = special.bos.as_deref().filter(|_| add_bos);
    let eos = special.eos.as_deref().filter(|_| add_eos);
    parts.insert("post_processor".to_owned(), frame(&tokens, bos, eos));
    let tokenizer = tokenizer_json::build(Json::Object(parts).to_string().as_bytes())
        .map_err(|reason| metadata.wrong(TOKENS, &format!("a vocabulary that fits its merges ({reason})")))?;

    let chat_template = metadata.optional_text("tokenizer.chat_template")?.map(str::to_owned);
    let mut text = TextParts { tokenizer, special, chat_template };
    text.set_eos_ids(end_ids(metadata)?);
    Ok(text)
}

/// Ends of a text, of a turn and of a message.
fn end_ids(metadata: &Metadata<'_>) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id")) {
        if let Some(id) = metadata.whole(&key)? {
            ids.push(u32::try_from(id).map_err(|_| metadata.wrong(&key, "the id of a token"))?);
        }
    }
    Ok(ids)
}

/// Byte-level byte pair encoding, as of GPT-2. Also returns whether a BOS is usual.
fn byte_level(metadata: &Metadata<'_>, tokens: &[String]) -> Result<(Map<String, Json>, bool)> {
    let name = metadata.optional_text(PRE)?.unwrap_or("missing");
    let Some(split) = SPLITS.iter().find(|split| split.names.contains(&name)) else {
        let served: Vec<&str> = SPLITS.iter().flat_map(|split| split.names.iter().copied()).collect();
        let name = excerpt(name);
        return Err(Error::Unsupported(format!(
            "`{PRE}` is {name}, and how it splits text is not known; served are {}. The model's folder with its \
             tokenizer.json can be served instead",
            served.join(", ")
        )));
    };
    let merges = texts(metadata, MERGES)?.ok_or_else(|| metadata.wrong(MERGES, "the merges of the vocabulary"))?;
    let pair = |merge: &String| match merge.split_once(' ') {
        Some((left, right)) => Ok(json!([left, right])),
        None => Err(metadata.wrong(MERGES, "two tokens and a space between them")),
    };
    let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
    let first = match split.pattern {
        Some(regex) => {
            json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
        }
        None => json!({ "type": "Digits", "individual_digits": true }),
    };
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": split.pattern.is_none(),
    });
    let parts = json!({
        "model": {
            "type": "BPE", "vocab": vocabulary(tokens), "merges": merges, "ignore_merges": split.ignore_merges,
        },
        "normalizer": if split.nfc { json!({ "type": "NFC" }) } else { Json::Null },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [first, bytes] },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false },
    });
    Ok((into_map(parts), split.add_bos))
}

/// SentencePiece's byte pair encoding, as of Llama 2, Mistral and Gemma. A BOS is usual.
fn sentence_piece(
    metadata: &Metadata<'_>,
    tokens: &[String],
    types: &[TokenType],
) -> Result<(Map<String, Json>, bool)> {
    const SPACE: &str = "\u{2581}";
    // Gemma's runs of spaces are stored as such, though text has this sign for each when they are looked up.
    let spelled = |token: &String| match token.len() > 1 && token.bytes().all(|byte| byte == b' ') {
        true => SPACE.repeat(token.len()),
        false => token.clone(),
    };
    let tokens: Vec<String> = tokens.iter().map(spelled).collect();
    let unknown = metadata.whole("tokenizer.ggml.unknown_token_id")?;
    let unknown = unknown.and_then(|id| usize::try_from(id).ok()).and_then(|id| tokens.get(id));
    let prefix_space = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    let mut normalizers = vec![spaces];
    if prefix_space {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let parts = json!({
        "model": {
            "type": "BPE",
            "vocab": vocabulary(&tokens),
            "merges": derived_merges(metadata, &tokens, types)?,
            "unk_token": unknown,
            "fuse_unk": true,
            "byte_fallback": true,
        },
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "decoder": { "type": "Sequence", "decoders": decoders },
    });
    Ok((into_map(parts), true))
}

/// SentencePiece joins the neighbours that make the token with the highest score; as a list of merges, that is every
/// way to make each token from two others, best token first.
fn derived_merges(metadata: &Metadata<'_>, tokens: &[String], types: &[TokenType]) -> Result<Vec<[String; 2]>> {
    const SCORES: &str = "tokenizer.ggml.scores";
    // Gemma's scores do not follow the order of its merges, that of its tokens does.
    let by_position = metadata.text("general.architecture")? == "gemma2";
    let scores = metadata.list(SCORES)?.filter(|_| !by_position);
    let score = |id: usize| match scores {
        None => Some(-(id as f32)),
        Some(scores) => scores.get(id).and_then(|score| score.to_f32().ok()),
    };
    let known: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        // Every way to cut it is looked up: a long one would take time with its square.
        if token.len() > MOST_TOKEN {
            return Err(metadata.wrong(TOKENS, &format!("tokens of up to {MOST_TOKEN} bytes")));
        }
        if !matches!(types[id], TokenType::Normal | TokenType::UserDefined) {
            continue;
        }
        let score = score(id).ok_or_else(|| metadata.wrong(SCORES, "a number for each token"))?;
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains_key(left) && known.contains_key(right) {
                merges.push((score, left, right));
            }
        }
    }
    merges.sort_by(|(a, left_a, _), (b, left_b, _)| b.total_cmp(a).then(left_b.len().cmp(&left_a.len())));
    Ok(merges.into_iter().map(|(_, left, right)| [left.to_owned(), right.to_owned()]).collect())
}

/// What is put around a text.
fn frame(tokens: &[String], bos: Option<&str>, eos: Option<&str>) -> Json {
    let text = |id: &str, type_id: u32| json!({ "Sequence": { "id": id, "type_id": type_id } });
    let framed = |id: &str, type_id: u32| {
        let special = |token| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
        [bos.map(special), Some(text(id, type_id)), eos.map(special)].into_iter().flatten().collect::<Vec<_>>()
    };
    let described = |token: &str| {
        let id = tokens.iter().position(|other| other == token);
        (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }))
    };
    let pair = [framed("A", 0), framed("B", 1)].concat();
    let special: Map<String, Json> = bos.into_iter().chain(eos).map(described).collect();
    json!({
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": pair,
        "special_tokens": special,
    })
}

/// Tokens that are cut out of text before anything else is done with it.
fn added_tokens(tokens: &[String], types: &[TokenType]) -> Json {
    let added = |(id, token): (usize, &String)| {
        let blank = token.trim().is_empty();
        let special = types[id] == TokenType::Special;
        // Gemma's runs of spaces are made by merges, after the spaces were replaced.
        (special || (types[id] == TokenType::UserDefined && !blank)).then(|| {
            json!({
                "id": id, "content": token, "special": special,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
    };
    tokens.iter().enumerate().filter_map(added).collect()
}

fn vocabulary(tokens: &[String]) -> Json {
    tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
}

fn token_types(metadata: &Metadata<'_>, count: usize) -> Result<Vec<TokenType>> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let Some(list) = metadata.list(KEY)? else { return Ok(vec![TokenType::Normal; count]) };
    if list.len() != count {
        return Err(metadata.wrong(KEY, &format!("{count} entries, one for each token")));
    }
    let read = |value: &Value| match value {
        Value::I32(2 | 3) | Value::U32(2 | 3) => TokenType::Special,
        Value::I32(4) | Value::U32(4) => TokenType::UserDefined,
        Value::I32(6) | Value::U32(6) => TokenType::Byte,
        _ => TokenType::Normal,
    };
    Ok(list.iter().map(read).collect())
}

fn texts(metadata: &Metadata<'_>, key: &str) -> Result<Option<Vec<String>>> {
    let Some(list) = metadata.list(key)? else { return Ok(None) };
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(metadata.wrong(key, "texts")),
    };
    list.iter().map(text).collect::<Result<_>>().map(Some)
}

fn into_map(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}
