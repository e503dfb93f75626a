//! From the text of a `tokenizer.json` to a tokenizer.
//!
//! The crate that builds it trusts the file. So what the file asks for is looked at first: how many steps, how long
//! tokens, how much longer a text can become on its way, and which regular expressions. And what the crate does with a
//! file that nobody has foreseen, up to a panic, is an error like any other.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use super::tokenizer_regex;

/// Bytes of a `tokenizer.json`. Gemma's, with 256,000 tokens, has 34 MB.
pub(super) const MOST_BYTES: u64 = 64 << 20;
/// Tokens of a vocabulary: four times as many as the largest one has.
const MOST_TOKENS: usize = 1 << 20;
/// Bytes of a token. Runs of spaces are the longest ones: 128 of them, at two or three bytes each.
pub(super) const MOST_TOKEN: usize = 1024;
/// Bytes of all tokens of a `Unigram` vocabulary, which becomes a tree with a table for each of them. XLM-R's has 3 MB.
const MOST_UNIGRAM: usize = 8 << 20;
/// Steps of one kind: normalizers, for example. Published tokenizers have up to six.
const MOST_STEPS: usize = 32;
/// How many times as long a text may become on its way. NFKC of SentencePiece makes 33 bytes of 3, a space becomes 3.
const MOST_GROWTH: usize = 64;
/// Characters of a word that `WordPiece` takes apart, in time that grows with their square. BERT has 100.
const MOST_WORD: u64 = 1000;

/// The parts of a tokenizer that are steps.
const PARTS: [&str; 4] = ["normalizer", "pre_tokenizer", "post_processor", "decoder"];

/// Checks a tokenizer and builds it.
///
/// # Errors
/// What is wrong with it.
pub(super) fn build(text: &[u8]) -> Result<Tokenizer, String> {
    let json: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    check_vocabulary(&json)?;
    for part in PARTS.into_iter().filter(|part| !json[*part].is_null()) {
        let mut steps = Steps { count: 0, growth: 1 };
        steps.add(&json[part]).map_err(|reason| format!("`{part}`: {reason}"))?;
    }
    drop(json);
    match catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(text))) {
        Ok(Ok(tokenizer)) => Ok(without_cache(tokenizer)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it contradicts itself".to_owned()),
    }
}

/// The same tokenizer without its memory of words. That belongs to threads, which keep it when the tokenizer has gone:
/// megabytes for every version that was ever served. Without it, tokenization takes a third longer (13 ms instead of 10
/// for 10,000 tokens), which is little beside what is then computed.
fn without_cache(mut tokenizer: Tokenizer) -> Tokenizer {
    if let ModelWrapper::BPE(model) = tokenizer.get_model() {
        let mut model = model.clone();
        model.resize_cache(0);
        tokenizer.with_model(model);
    }
    tokenizer
}

fn check_vocabulary(json: &Value) -> Result<(), String> {
    let model = &json["model"];
    let added = json["added_tokens"].as_array().into_iter().flatten().filter_map(|token| token["content"].as_str());
    let listed = model["vocab"].as_array().into_iter().flatten().filter_map(|token| token[0].as_str());
    let mapped = model["vocab"].as_object().into_iter().flat_map(|tokens| tokens.keys().map(String::as_str));
    let (mut count, mut bytes) = (0, 0);
    for token in added.chain(listed).chain(mapped) {
        (count, bytes) = (count + 1, bytes + token.len());
        if count > MOST_TOKENS || token.len() > MOST_TOKEN {
            return Err(format!(
                "a vocabulary of more than {MOST_TOKENS} tokens, or with one of more than {MOST_TOKEN} bytes"
            ));
        }
    }
    if model["type"] == "Unigram" && bytes > MOST_UNIGRAM {
        return Err(format!("a Unigram vocabulary of {bytes} bytes, {MOST_UNIGRAM} are allowed"));
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        return Err("`dropout` is set: a text would have other tokens each time".to_owned());
    }
    if model["max_input_chars_per_word"].as_u64().is_some_and(|word| word > MOST_WORD) {
        return Err(format!("`max_input_chars_per_word` is above {MOST_WORD}"));
    }
    Ok(())
}

/// The steps of a part, as far as they have been seen.
struct Steps {
    count: usize,
    growth: usize,
}

impl Steps {
    fn add(&mut self, step: &Value) -> Result<(), String> {
        self.count += 1;
        if self.count > MOST_STEPS {
            return Err(format!("more than {MOST_STEPS} steps"));
        }
        if let Some(expression) = step["pattern"]["Regex"].as_str() {
            tokenizer_regex::check(expression)
                .map_err(|reason| format!("the regular expression is not run: {reason}"))?;
        }
        self.growth = self.growth.saturating_mul(growth(step)?);
        if self.growth > MOST_GROWTH {
            return Err(format!("a text can become more than {MOST_GROWTH} times as long"));
        }
        for children in ["normalizers", "pretokenizers", "processors", "decoders"] {
            step[children].as_array().into_iter().flatten().try_for_each(|child| self.add(child))?;
        }
        Ok(())
    }
}

/// How many times as long a step can make a text. Its fields count and not its type alone: of a step whose type it does
/// not know, or knows under another name, the crate makes whichever one has such fields.
fn growth(step: &Value) -> Result<usize, String> {
    let Some(kind) = step["type"].as_str() else { return Err("a step has no `type`".to_owned()) };
    let length = |key: &str| step[key].as_str().map_or(0, str::len);
    if length("prepend") > MOST_TOKEN {
        return Err("a long text is put first".to_owned());
    }
    let replaced = match step["pattern"]["String"].as_str() {
        _ if step["pattern"].is_null() || step["content"].is_null() => 1,
        Some("") => return Err("a replacement of nothing".to_owned()),
        Some(pattern) => length("content").div_ceil(pattern.len()),
        // It can match nothing, and leave what is there.
        None => length("content") + 1,
    };
    let mapped = match step["precompiled_charsmap"].as_str() {
        None if kind != "Precompiled" => 1,
        map => longest_entry(map.unwrap_or_default())?,
    };
    // Each sequence in it is the text once more.
    let template = step["single"].as_array().into_iter().flatten();
    let repeated = template.filter(|piece| !piece["Sequence"].is_null()).count();
    let encoded = match kind {
        "ByteLevel" => 2,
        "Metaspace" => 3,
        _ => 1,
    };
    Ok(encoded.max(replaced).max(mapped).max(repeated))
}

/// Bytes of the longest text in a character map of SentencePiece: a tree behind its size, then texts that end with 0.
fn longest_entry(map: &str) -> Result<usize, String> {
    let map = STANDARD.decode(map).map_err(|error| format!("the character map: {error}"))?;
    let size = map.first_chunk::<4>().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    let texts = map.get(4..).and_then(|rest| rest.get(size / 4 * 4..)).ok_or("the character map is cut")?;
    Ok(texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokenizer(part: &str, value: Value) -> Value {
        let mut json = json!({
            "version": "1.0",
            "model": { "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" },
        });
        json[part] = value;
        json
    }

    #[track_caller]
    fn check(part: &str, value: Value, reason: &str) {
        let error = build(tokenizer(part, value).to_string().as_bytes()).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }

    fn replace(pattern: Value, content: &str) -> Value {
        json!({ "type": "Replace", "pattern": pattern, "content": content })
    }

    #[test]
    fn what_would_grow_without_bound_is_refused() {
        let doubled = replace(json!({ "String": "a" }), "aa");
        let steps = |count: usize| json!({ "type": "Sequence", "normalizers": vec![&doubled; count] });
        assert!(build(tokenizer("normalizer", steps(6)).to_string().as_bytes()).is_ok());
        check("normalizer", steps(7), "`normalizer`: a text can become more than 64 times as long");
        check("normalizer", replace(json!({ "String": "" }), "a"), "replacement of nothing");
        check("decoder", replace(json!({ "Regex": "x" }), &"a".repeat(64)), "`decoder`: a text can become");
        check("decoder", replace(json!({ "Regex": "(a+)+" }), ""), "`decoder`: the regular expression is not run");
        let many = json!({ "type": "Sequence", "pretokenizers": vec![json!({ "type": "Whitespace" }); 32] });
        check("pre_tokenizer", many, "more than 32 steps");
        let map = STANDARD.encode([&[0; 4][..], &[b'a'; 65]].concat());
        check("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": map }), "a text can become");
        check("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "/////w==" }), "map is cut");
        let twice = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let twice =
            json!({ "type": "TemplateProcessing", "single": vec![twice; 65], "pair": [], "special_tokens": {} });
        check("post_processor", twice, "a text can become");
    }

    #[test]
    fn a_step_is_what_its_fields_are() {
        let untyped = json!({ "pattern": { "String": "a" }, "content": "a" });
        check("normalizer", untyped.clone(), "`normalizer`: a step has no `type`");
        let within = json!({ "type": "Sequence", "decoders": [{ "type": "Fuse" }, untyped] });
        check("decoder", within, "`decoder`: a step has no `type`");
        check("pre_tokenizer", json!([]), "a step has no `type`");
        check("post_processor", json!({ "type": 1, "single": [] }), "a step has no `type`");
        for kind in ["BertNormalizer", "Unknown"] {
            let long = json!({ "type": kind, "pattern": { "String": "a" }, "content": "a".repeat(65) });
            check("normalizer", long, "a text can become");
        }
        let piece = json!({ "Sequence": ["A", 0] });
        let twice = json!({ "type": "Unknown", "single": vec![piece; 65], "pair": [], "special_tokens": {} });
        check("post_processor", twice, "a text can become");
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        assert!(build(tokenizer("decoder", strip).to_string().as_bytes()).is_ok());
    }

    #[test]
    fn models_have_bounds() {
        let words = |vocab: Value, more: (&str, Value)| {
            let mut model = json!({ "type": "WordLevel", "vocab": vocab, "unk_token": "a" });
            model[more.0] = more.1;
            model
        };
        check("model", words(json!({ "a".repeat(1025): 0 }), ("x", json!(0))), "more than 1024 bytes");
        check("model", words(json!([["a".repeat(1025), 0.0]]), ("x", json!(0))), "more than 1024 bytes");
        check("model", words(json!({ "a": 0 }), ("dropout", json!(0.1))), "other tokens each time");
        check("model", words(json!({ "a": 0 }), ("max_input_chars_per_word", json!(1001))), "above 1000");
        check("added_tokens", json!([{ "id": 0, "content": "a".repeat(1025) }]), "more than 1024 bytes");
        let words = json!({ "type": "Unigram", "vocab": vec![json!(["a".repeat(1024), 0.0]); 8193] });
        check("model", words, "Unigram vocabulary");
    }
}
