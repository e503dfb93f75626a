//! The pipeline on the fixtures' tokenizers.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use RenderMode::{Generate, Score, Unconditional};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::*;
use crate::checkpoint::SpecialTokens;
use crate::{Error, Result};

/// Puts `<|bos|>` before every text; its template puts none.
const LLAMA: &str = "llama-lm";
/// The same tokenizer with a template that writes the BOS.
const LLAMA_PM: &str = "llama-pm";
/// Puts nothing; has an EOS and no BOS.
const QWEN: &str = "qwen2-lm";
/// Puts nothing; splits text like GPT-2.
const NEOX: &str = "neox-lm";

const BOS: u32 = 0;
const EOS: u32 = 1;
const LIMIT: usize = 512;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures"))
}

fn read(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn string(value: &Value) -> Option<String> {
    value.as_str().or(value["content"].as_str()).map(str::to_owned)
}

/// What the checkpoint loader makes of a folder, as far as text goes.
fn config(folder: PathBuf) -> TextConfig {
    let tokenizer_config = read(folder.join("tokenizer_config.json"));
    let file = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
    TextConfig {
        tokenizer: Tokenizer::from_file(folder.join("tokenizer.json")).unwrap(),
        chat_template: file.or(string(&tokenizer_config["chat_template"])),
        special: SpecialTokens {
            bos: string(&tokenizer_config["bos_token"]),
            eos: string(&tokenizer_config["eos_token"]),
            eos_ids: vec![EOS],
            ..SpecialTokens::default()
        },
        vocab_size: 280,
        max_tokens: LIMIT,
        hhh: Arc::default(),
    }
}

fn fixture(name: &str) -> TextConfig {
    config(fixtures().join(name))
}

/// The same without chat template, with a prompt that fits, and with a changed tokenizer.json.
fn plain(name: &str, change: impl FnOnce(&mut Value)) -> TextPipeline {
    let mut config = fixture(name);
    let mut tokenizer: Value = serde_json::from_str(&config.tokenizer.to_string(false).unwrap()).unwrap();
    change(&mut tokenizer);
    config.tokenizer = tokenizer.to_string().parse().unwrap();
    config.chat_template = None;
    config.hhh = Arc::new(short_prompt());
    TextPipeline::new(config).unwrap()
}

fn short_prompt() -> HhhPrompts {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "Hi.\n\n-----\n\nHuman:  a\n\nAssistant:  b\n\n-----\n\nHuman:  c\n").unwrap();
    HhhPrompts::from_file(file.path()).unwrap()
}

fn conversation(turns: &[(&str, &str)]) -> TextInput {
    TextInput::Conversation(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect())
}

fn candidate(prompt: TextInput, response: &str) -> TextInput {
    TextInput::PromptResponse { prompt: Arc::new(prompt), response: Response::Text(response.into()) }
}

fn options(chat_format: ChatFormat, hhh_prompt: HhhPrompt) -> RenderOptions {
    RenderOptions { chat_format, hhh_prompt, ..RenderOptions::default() }
}

/// The text of a range of tokens, special ones included.
fn text_of(pipeline: &TextPipeline, ids: &[u32]) -> String {
    pipeline.codec.decode(ids, false).unwrap()
}

/// Checks the whole text, special tokens included, and the response in it.
#[track_caller]
fn check(pipeline: &TextPipeline, input: &TextInput, how: (&RenderOptions, RenderMode), text: &str, response: &str) {
    let rendered = pipeline.render(input, how.0, how.1).unwrap();
    assert_eq!(text_of(pipeline, &rendered.ids), text);
    assert_eq!(text_of(pipeline, &rendered.ids[rendered.response.clone()]), response);
}

#[track_caller]
fn refuses<T: std::fmt::Debug>(result: Result<T>, reason: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::InvalidInput(_) | Error::Unsupported(_)), "{error:?}");
    assert!(error.to_string().contains(reason), "{error}");
}

#[test]
fn fixtures_tokenize_as_in_transformers() {
    let mut conversations = 0;
    for folder in std::fs::read_dir(fixtures()).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.join("tokenizer.json").exists() || !folder.join("expected.json").exists() {
            continue;
        }
        let pipeline = TextPipeline::new(config(folder.clone())).unwrap();
        let expected = read(folder.join("expected.json"));
        let default = RenderOptions::default();
        let check = |input: TextInput, mode, text: &Value, ids: &Value| {
            let rendered = pipeline.render(&input, &default, mode).unwrap();
            assert_eq!(json!(rendered.text), *text, "{}", folder.display());
            assert_eq!(json!(rendered.ids), *ids, "{}", folder.display());
        };
        for case in expected["cases"].as_array().unwrap() {
            check(TextInput::Text(string(&case["text"]).unwrap()), Score, &case["text"], &case["token_ids"]);
        }
        for case in expected["conversations"].as_array().into_iter().flatten() {
            let messages = case["messages"].as_array().unwrap();
            let message =
                |message: &Value| Message::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap());
            let input = TextInput::Conversation(messages.iter().map(message).collect());
            check(input.clone(), Score, &case["rendered"], &case["token_ids"]);
            let prompt = &case["rendered_with_generation_prompt"];
            check(input, Generate, prompt, &case["token_ids_with_generation_prompt"]);
            conversations += 1;
        }
    }
    assert!(conversations >= 6, "{conversations}");
}

#[test]
fn special_tokens_stand_once() {
    let default = RenderOptions::default();
    let text = |text: &str| TextInput::Text(text.into());
    let hello = conversation(&[("user", "q")]);

    let llama = plain(LLAMA, |_| {});
    check(&llama, &text("a b"), (&default, Score), "<|bos|>a b", "a b");
    check(&llama, &text("<|bos|>a b"), (&default, Score), "<|bos|>a b", "a b");
    check(&llama, &text("a<|bos|>"), (&default, Score), "<|bos|>a<|bos|>", "a<|bos|>");
    check(&llama, &hello, (&default, Generate), "<|bos|>Human: q\n\nAssistant:", "");

    let qwen = plain(QWEN, |_| {});
    check(&qwen, &text("<|bos|>a b"), (&default, Score), "<|bos|>a b", "a b");
    check(&qwen, &hello, (&default, Generate), "Human: q\n\nAssistant:", "");

    let both = plain(LLAMA, |tokenizer| {
        let template = &mut tokenizer["post_processor"]["processors"][1];
        let eos = json!({"SpecialToken": {"id": "<|eos|>", "type_id": 0}});
        template["single"].as_array_mut().unwrap().push(eos);
        template["special_tokens"]["<|eos|>"] = json!({"id": "<|eos|>", "ids": [EOS], "tokens": ["<|eos|>"]});
    });
    check(&both, &text("a b"), (&default, Score), "<|bos|>a b<|eos|>", "a b<|eos|>");
    check(&both, &text("<|bos|>a b<|eos|>"), (&default, Score), "<|bos|>a b<|eos|>", "a b<|eos|>");
    check(&both, &text("a b"), (&default, Generate), "<|bos|>a b", "");
    let answered = conversation(&[("user", "q"), ("assistant", "a")]);
    let expected = "<|bos|>Human: q\n\nAssistant: a<|eos|>";
    check(&both, &answered, (&default, Score), expected, " a");

    // Templates write their own.
    let templated = TextPipeline::new(fixture(LLAMA)).unwrap();
    check(&templated, &hello, (&default, Generate), "<|user|>q\n<|assistant|>", "");
    let templated = TextPipeline::new(fixture(LLAMA_PM)).unwrap();
    check(&templated, &hello, (&default, Generate), "<|bos|><|user|>q\n<|assistant|>", "");
    // As in Transformers, those in a content are special, too.
    let rendered = templated.render(&conversation(&[("user", "<|eos|>")]), &default, Score).unwrap();
    assert!(rendered.ids.contains(&EOS));
}

#[test]
fn the_response_of_a_conversation() {
    let default = RenderOptions::default();
    let human = options(ChatFormat::HumanAssistant, HhhPrompt::None);
    let full = options(ChatFormat::Auto, HhhPrompt::Full);
    let turns = conversation(&[("user", "q"), ("assistant", "It is 4. ")]);
    let open = conversation(&[("user", "q")]);
    let llama = TextPipeline::new(fixture(LLAMA)).unwrap();
    let pm = TextPipeline::new(fixture(LLAMA_PM)).unwrap();
    let plain = plain(LLAMA, |_| {});
    let hhh = "<|bos|>Hi.\n\n-----\n\nHuman:  a\n\nAssistant:  b\n\n-----\n\nHuman:  c\n\n-----\n\n";

    check(&llama, &turns, (&default, Score), "<|user|>q\n<|assistant|>It is 4. <|eos|>", "It is 4. ");
    check(&pm, &turns, (&default, Score), "<|bos|><|user|>q\n<|assistant|>It is 4.", "It is 4.");
    check(&llama, &turns, (&human, Score), "<|bos|>Human: q\n\nAssistant: It is 4. ", " It is 4. ");
    let text = format!("{hhh}Human:  q\n\nAssistant:  It is 4. ");
    check(&plain, &turns, (&full, Score), &text, "  It is 4. ");
    check(&llama, &open, (&default, Score), "<|user|>q\n", "");
    check(&plain, &open, (&default, Score), "<|bos|>Human: q", "");
    refuses(plain.render(&open, &default, Score).unwrap().require_response(), "no response to score");

    check(&llama, &turns, (&default, Unconditional), "<|assistant|>It is 4. <|eos|>", "It is 4. ");
    check(&plain, &turns, (&default, Unconditional), "<|bos|>Assistant: It is 4. ", " It is 4. ");
    let text = format!("{hhh}Assistant:  It is 4. ");
    check(&plain, &turns, (&full, Unconditional), &text, "  It is 4. ");
    let system = conversation(&[("system", "Be brief."), ("user", "q"), ("assistant", "a")]);
    check(&plain, &system, (&default, Unconditional), "<|bos|>Be brief.\n\nAssistant: a", " a");
    refuses(plain.render(&open, &default, Unconditional), "needs a query and a response");

    let mut config = fixture(LLAMA);
    config.chat_template =
        Some("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}".into());
    let strict = TextPipeline::new(config).unwrap();
    refuses(strict.render(&turns, &default, Unconditional), "user first; for mutual information");
    refuses(strict.render(&turns, &default, Score), "no tokens");
}

#[test]
fn candidates_are_the_joined_input_with_its_boundary() {
    let default = RenderOptions::default();
    let llama = plain(LLAMA, |_| {});
    let qwen = plain(QWEN, |_| {});
    let text = || TextInput::Text("The answer".into());
    let ids = |ids: &[u32]| TextInput::TokenIds { ids: ids.into(), response_start: None };
    let pair = |prompt: &[u32], response: &[u32]| TextInput::PromptResponse {
        prompt: Arc::new(ids(prompt)),
        response: Response::TokenIds(response.into()),
    };
    let turns = || conversation(&[("user", "q")]);

    check(&llama, &candidate(text(), " is 4."), (&default, Score), "<|bos|>The answer is 4.", " is 4.");
    check(&llama, &candidate(text(), " is 4."), (&default, Unconditional), "<|bos|> is 4.", " is 4.");
    // Nothing stands before a Qwen text; EOS serves.
    check(&qwen, &candidate(text(), " is 4."), (&default, Unconditional), "<|eos|> is 4.", " is 4.");
    check(&qwen, &candidate(text(), ""), (&default, Score), "The answer", "");
    let answered = conversation(&[("user", "q"), ("assistant", "a")]);
    for mode in [Score, Generate, Unconditional] {
        let joined = llama.render(&answered, &default, mode).unwrap();
        assert_eq!(llama.render(&candidate(turns(), "a"), &default, mode).unwrap(), joined);
    }

    let rendered = |input, mode| {
        let rendered = llama.render(&input, &default, mode).unwrap();
        (rendered.ids, rendered.response)
    };
    assert_eq!(rendered(pair(&[0, 5], &[6, 7]), Score), (vec![0, 5, 6, 7], 2..4));
    assert_eq!(rendered(pair(&[0, 5], &[6, 7]), Unconditional), (vec![BOS, 6, 7], 1..3));
    let given = TextInput::TokenIds { ids: vec![4, 5, 6], response_start: Some(2) };
    assert_eq!(rendered(given.clone(), Score), (vec![4, 5, 6], 2..3));
    assert_eq!(rendered(given, Generate), (vec![4, 5, 6], 3..3));
    assert_eq!(rendered(ids(&[4, 5, 6]), Score), (vec![4, 5, 6], 1..3));
    assert_eq!(rendered(ids(&[4]), Score), (vec![4], 1..1));
    let lonely = qwen.render(&pair(&[4], &[5]), &default, Unconditional).unwrap();
    assert_eq!((lonely.ids, lonely.response), (vec![EOS, 5], 1..2));

    let mixed = TextInput::PromptResponse { prompt: Arc::new(text()), response: Response::TokenIds(vec![4]) };
    refuses(llama.render(&mixed, &default, Score), "response is token ids");
    refuses(llama.render(&candidate(ids(&[4]), "a"), &default, Score), "prompt is token ids");
    refuses(llama.render(&candidate(candidate(text(), "a"), "b"), &default, Score), "has a response already");
    refuses(llama.render(&candidate(answered, "b"), &default, Score), "ends with an assistant turn");
    refuses(llama.render(&text(), &default, Unconditional), "needs a query");
}

#[test]
fn bad_input_is_refused() {
    let llama = plain(LLAMA, |_| {});
    let default = RenderOptions::default();
    let ids = |ids: Vec<u32>, response_start| TextInput::TokenIds { ids, response_start };
    let turn = Message::new("user", "q");
    for (input, reason) in [
        (TextInput::Text(String::new()), "text is empty"),
        (conversation(&[]), "conversation is empty"),
        (TextInput::Conversation(vec![turn; 4097]), "4097 turns"),
        (TextInput::Text("x".repeat((4 << 20) + 1)), "4194305 bytes"),
        (conversation(&[("critic", "q")]), "`critic`"),
        (ids(vec![], None), "no token ids"),
        (ids(vec![0, 280], None), "token 1 is 280, the model has 280"),
        (ids(vec![0, 1], Some(0)), "must be 1 or more"),
        (ids(vec![0, 1], Some(3)), "starts at token 3 of 2"),
    ] {
        refuses(llama.render(&input, &default, Score), reason);
    }
    let turns = conversation(&[("user", "q")]);
    let refused = |input: &TextInput, options: RenderOptions, reason| {
        refuses(llama.render(input, &options, Score), reason);
    };
    refused(&turns, options(ChatFormat::Template, HhhPrompt::None), "has no chat template");
    refused(&turns, options(ChatFormat::Template, HhhPrompt::Short), "does not go with");
    refused(&ids(vec![4], None), options(ChatFormat::Auto, HhhPrompt::Short), "fed as they are");
    refused(&turns, RenderOptions { max_tokens: Some(LIMIT + 1), ..default.clone() }, "the model takes 512");
    refused(&turns, RenderOptions { max_tokens: Some(0), ..default.clone() }, "max_tokens is 0");
}

#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let refused = |change: fn(&mut TextConfig), reason| {
        let mut config = fixture(LLAMA);
        change(&mut config);
        refuses(TextPipeline::new(config), reason);
    };
    refused(|config| config.vocab_size = 279, "has the id 279, the embedding has 279 rows");
    refused(|config| config.chat_template = Some("a\n{% if %}".into()), "line 2");
    let mut config = fixture(LLAMA);
    let added = tokenizers::AddedToken::from("<|new|>", true);
    config.tokenizer.add_special_tokens([added]).unwrap();
    refuses(TextPipeline::new(config), "token `<|new|>` has the id 280");
}

#[test]
fn the_hhh_prompt_is_a_fixed_prefix() {
    let pipeline = plain(LLAMA, |_| {});
    let turns = conversation(&[("user", "q"), ("assistant", "a")]);
    let default = RenderOptions::default();
    let bare = pipeline.render(&turns, &default, Score).unwrap();
    assert_eq!(bare.prefix_len, 0);
    let mut hashes = vec![bare.template_sha256];
    for prompt in [HhhPrompt::Full, HhhPrompt::Short] {
        let options = options(ChatFormat::Auto, prompt);
        let prefix = pipeline.hhh_prefix_ids(prompt).unwrap();
        assert_eq!(pipeline.prepared(prompt).tail, "");
        let alone = pipeline.tokenize(&pipeline.prepared(prompt).text, true).unwrap();
        assert_eq!(prefix, alone.iter().map(|token| token.id).collect::<Vec<_>>());
        let rendered = pipeline.render(&turns, &options, Score).unwrap();
        assert_eq!(rendered.prefix_len, prefix.len());
        assert!(rendered.ids.starts_with(prefix));
        assert_eq!(rendered.ids.iter().filter(|id| **id == BOS).count(), 1);
        assert!(rendered.text.ends_with("\n\n-----\n\nHuman:  q\n\nAssistant:  a"));
        hashes.push(rendered.template_sha256);
        // A text continues the prompt; a BOS of its own would be the second.
        for text in ["Human:  q", "<|bos|>Human:  q"] {
            let rendered = pipeline.render(&TextInput::Text(text.into()), &options, Score).unwrap();
            assert_eq!(text_of(&pipeline, &rendered.ids[prefix.len()..]), "Human:  q");
            assert_eq!(rendered.response, prefix.len()..rendered.ids.len());
        }
        assert_eq!(pipeline.default_stop_strings(&options), ["\n\nHuman:", "\n\n-----"]);
    }
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 3);
    assert_eq!(pipeline.hhh_prefix_ids(HhhPrompt::None), None);
    assert_eq!(pipeline.hhh_name().as_str(), "custom");

    // Ours is longer than this model's context.
    let small = TextPipeline::new(fixture(LLAMA)).unwrap();
    assert_eq!(small.hhh_prefix_ids(HhhPrompt::Full), None);
    let options = options(ChatFormat::Auto, HhhPrompt::Full);
    for truncation in [Truncation::Refuse, Truncation::Left, Truncation::Right] {
        let options = RenderOptions { truncation, ..options.clone() };
        assert!(matches!(small.render(&turns, &options, Score), Err(Error::TooLong { limit: LIMIT, .. })));
    }
    assert_eq!(small.default_stop_strings(&default), Vec::<String>::new());
    assert_eq!(small.chat_template_sha256().unwrap().len(), 64);
    let rendered = small.render(&turns, &default, Score).unwrap();
    assert_eq!(Some(rendered.template_sha256.as_str()), small.chat_template_sha256());
}

#[test]
fn prompt_and_turns_have_the_tokens_of_the_whole_text() {
    let turns = conversation(&[("user", "What is 2 + 2?"), ("assistant", "It is 4.")]);
    let with_blank_lines = |tokenizer: &mut Value| {
        let model = &mut tokenizer["model"];
        model["vocab"].as_object_mut().unwrap().retain(|_, id| *id != 279);
        model["vocab"]["ĊĊ"] = json!(279);
        *model["merges"].as_array_mut().unwrap().last_mut().unwrap() = json!(["Ċ", "Ċ"]);
    };
    for (name, tail) in [(LLAMA, ""), (QWEN, ""), (NEOX, "\n")] {
        let pipeline = plain(name, with_blank_lines);
        for prompt in [HhhPrompt::Full, HhhPrompt::Short] {
            assert_eq!(pipeline.prepared(prompt).tail, tail);
            let options = options(ChatFormat::Auto, prompt);
            for mode in [Score, Generate, Unconditional] {
                let rendered = pipeline.render(&turns, &options, mode).unwrap();
                let whole = pipeline.render(&TextInput::Text(rendered.text.clone()), &RenderOptions::default(), Score);
                assert_eq!(rendered.ids, whole.unwrap().ids);
                assert_eq!(text_of(&pipeline, &rendered.ids).trim_start_matches("<|bos|>"), rendered.text);
            }
            let rendered = pipeline.render(&turns, &options, Score).unwrap();
            assert_eq!(text_of(&pipeline, &rendered.ids[rendered.response]), "  It is 4.");
            let text = pipeline.render(&TextInput::Text("Human:  q".into()), &options, Score).unwrap();
            assert_eq!(text_of(&pipeline, &text.ids[text.response]), "Human:  q");
        }
    }
}

#[test]
fn truncation_keeps_what_must_stay() {
    let pipeline = plain(LLAMA, |_| {});
    let turns = conversation(&[("user", "The question is long."), ("assistant", "It is 4.")]);
    let prefix = pipeline.hhh_prefix_ids(HhhPrompt::Short).unwrap();
    let cut = |hhh, truncation, max_tokens| {
        let options = RenderOptions { truncation, max_tokens: Some(max_tokens), ..options(ChatFormat::Auto, hhh) };
        pipeline.render(&turns, &options, Score)
    };
    let whole = cut(HhhPrompt::Short, Truncation::Refuse, LIMIT).unwrap();
    let limit = whole.ids.len() - 5;
    assert!(matches!(cut(HhhPrompt::Short, Truncation::Refuse, limit), Err(Error::TooLong { .. })));
    let left = cut(HhhPrompt::Short, Truncation::Left, limit).unwrap();
    assert!(left.truncated && left.ids.len() == limit && left.ids.starts_with(prefix));
    assert_eq!(left.ids[left.response.clone()], whole.ids[whole.response.clone()]);
    let right = cut(HhhPrompt::Short, Truncation::Right, limit).unwrap();
    assert_eq!(right.ids, whole.ids[..limit]);
    assert_eq!(right.response, whole.response.start..limit);

    let left = cut(HhhPrompt::None, Truncation::Left, 3).unwrap();
    assert_eq!((left.ids.len(), left.ids[0], left.response), (3, BOS, 1..3));
    let right = cut(HhhPrompt::None, Truncation::Right, 3).unwrap();
    refuses(right.require_response(), "after truncation");

    // Without a special token to keep, the first token that is left has no context and is not counted.
    let qwen = plain(QWEN, |_| {});
    let options = RenderOptions { truncation: Truncation::Left, max_tokens: Some(3), ..RenderOptions::default() };
    assert_eq!(qwen.render(&turns, &options, Score).unwrap().response, 1..3);
}

#[test]
fn tokens_know_where_they_stand() {
    let pipeline = plain(LLAMA, |_| {});
    let tokens = pipeline.tokenize("a 🙂 b<|eos|>", true).unwrap();
    assert_eq!((tokens[0].id, tokens[0].special, tokens[0].start..tokens[0].stop), (BOS, true, 0..0));
    assert_eq!(tokens[1].text, "a");
    let last = tokens.last().unwrap();
    assert_eq!((last.id, last.special, last.start..last.stop), (EOS, true, 8..15));
    assert!(tokens.iter().filter(|token| token.special).count() == 2);
    let without = pipeline.tokenize("a 🙂 b<|eos|>", false).unwrap();
    assert_eq!(without, tokens[1..]);
    let space = without.iter().find(|token| token.start == 1).unwrap();
    assert_eq!((space.text.as_str(), pipeline.token_text(space.id).as_str()), ("Ġ", " "));
    assert_eq!(pipeline.token_text(EOS), "<|eos|>");
    assert_eq!(pipeline.token_text(9999), "");
    let piece = without.iter().find(|token| token.start == 2).unwrap();
    assert_eq!((piece.stop, pipeline.token_text(piece.id).as_str()), (6, "\u{fffd}"));
    assert_eq!(pipeline.eos_ids(), [EOS]);
}

/// A SentencePiece-like tokenizer: `▁` for spaces, one before the text, bytes for what it does not know.
fn sentencepiece() -> TextPipeline {
    let mut vocab: Vec<(String, u32)> = vec![("<s>".into(), 0), ("</s>".into(), 1)];
    let pieces = (0..=255).map(|byte| format!("<0x{byte:02X}>")).chain("▁abcHumanAsit:.-\n".chars().map(String::from));
    for piece in pieces {
        if vocab.iter().all(|(known, _)| *known != piece) {
            vocab.push((piece, vocab.len() as u32));
        }
    }
    let size = vocab.len();
    let vocab: serde_json::Map<String, Value> = vocab.into_iter().map(|(piece, id)| (piece, json!(id))).collect();
    let special = |id, content| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "byte_fallback": true, "fuse_unk": true, "vocab": vocab, "merges": []},
    });
    let mut config = fixture(LLAMA);
    config.tokenizer = tokenizer.to_string().parse().unwrap();
    config.chat_template = None;
    config.vocab_size = size;
    TextPipeline::new(config).unwrap()
}

fn stream(mut decoder: StreamDecoder, ids: &[u32]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().filter_map(|id| decoder.push(*id).unwrap()).collect();
    pieces.extend(decoder.finish().unwrap());
    pieces
}

fn ids_of(pipeline: &TextPipeline, text: &str) -> Vec<u32> {
    pipeline.tokenize(text, false).unwrap().into_iter().map(|token| token.id).collect()
}

#[test]
fn streams_hold_back_incomplete_characters() {
    for pipeline in [plain(LLAMA, |_| {}), sentencepiece()] {
        let ids = ids_of(&pipeline, "a 🙂🙂é b");
        assert!(ids.len() > 10);
        assert_eq!(stream(pipeline.stream_decoder(), &ids), ["a", " ", "🙂", "🙂", "é", " ", "b"]);
        let cut = ids[..4].to_vec();
        assert_eq!(stream(pipeline.stream_decoder(), &cut).concat(), pipeline.decode(&cut).unwrap());
        let spaces = ids_of(&pipeline, "  a b");
        assert_eq!(stream(pipeline.stream_decoder().trim_start(), &spaces), ["a", " ", "b"]);
        assert_eq!(stream(pipeline.stream_decoder().trim_start(), &spaces[..1]), Vec::<String>::new());
    }
}

#[test]
fn streams_continue_a_prompt() {
    let pipeline = sentencepiece();
    let ids = ids_of(&pipeline, "a b c");
    let (prompt, rest) = ids.split_at(2);
    assert_eq!(text_of(&pipeline, rest), "b c");
    assert_eq!(stream(pipeline.stream_decoder_after(prompt).unwrap(), rest).concat(), " b c");
    assert_eq!(pipeline.token_text(rest[0]), " ");
}

#[test]
fn streams_do_not_wait_for_ever() {
    let pipeline = plain(LLAMA, |_| {});
    let continuation = ids_of(&pipeline, "🙂")[1];
    let mut decoder = pipeline.stream_decoder();
    let pieces: Vec<_> = (0..100).filter_map(|_| decoder.push(continuation).unwrap()).collect();
    assert!(pieces.len() > 5);
    let all = pieces.concat() + &decoder.finish().unwrap().unwrap();
    assert_eq!(all, pipeline.decode(&[continuation; 100]).unwrap());
}

/// The bytes of the text that a range of tokens stands for.
fn bytes_of(pipeline: &TextPipeline, text: &str, tokens: Range<usize>) -> Range<usize> {
    let spans = pipeline.tokenize(text, true).unwrap();
    spans[tokens.start].start..spans[tokens.end - 1].stop
}

static TEMPLATED: LazyLock<[TextPipeline; 2]> =
    LazyLock::new(|| [LLAMA, LLAMA_PM].map(|name| TextPipeline::new(fixture(name)).unwrap()));
static PLAIN: LazyLock<[TextPipeline; 3]> =
    LazyLock::new(|| [plain(LLAMA, |_| {}), plain(QWEN, |_| {}), sentencepiece()]);
static TRIMMING: LazyLock<TextPipeline> = LazyLock::new(|| {
    plain(LLAMA, |tokenizer| tokenizer["post_processor"]["processors"][0]["trim_offsets"] = json!(true))
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_stream_gives_what_decoding_at_once_gives(
        ids in prop::collection::vec(0u32..280, 0..60),
        text in "[a-cé🙂東 \n]{0,20}",
    ) {
        let [byte_level @ .., sentencepiece] = &*PLAIN;
        for pipeline in byte_level {
            prop_assert_eq!(stream(pipeline.stream_decoder(), &ids).concat(), pipeline.decode(&ids).unwrap());
        }
        let pipeline = sentencepiece;
        let ids = ids_of(pipeline, &text);
        prop_assert_eq!(stream(pipeline.stream_decoder(), &ids).concat(), pipeline.decode(&ids).unwrap());
    }

    /// The tokens cover the response and, where a token lies on its edge, nothing beyond that token.
    #[test]
    fn response_tokens_cover_the_response(prompt in "[a-z é🙂\n]{1,12}", response in "[a-z é🙂\n]{1,12}") {
        let default = RenderOptions::default();
        let [llama, _, sentencepiece] = &*PLAIN;
        for pipeline in [llama, sentencepiece] {
            let input = candidate(TextInput::Text(prompt.clone()), &response);
            let rendered = pipeline.render(&input, &default, Score).unwrap();
            let bytes = bytes_of(pipeline, &rendered.text, rendered.response.clone());
            prop_assert!(bytes.start <= prompt.len() && bytes.end == rendered.text.len());
            let after_first = rendered.response.start + 1;
            if after_first < rendered.response.end {
                let rest = bytes_of(pipeline, &rendered.text, after_first..rendered.response.end);
                prop_assert!(rest.start >= prompt.len());
            }
        }
        let turns = conversation(&[("user", &prompt), ("assistant", &response)]);
        let human = options(ChatFormat::HumanAssistant, HhhPrompt::None);
        let [llama, pm] = &*TEMPLATED;
        for (pipeline, options, text) in [
            (llama, &default, response.clone()),
            (pm, &default, response.trim().to_owned()),
            (llama, &human, format!(" {response}")),
        ] {
            let rendered = pipeline.render(&turns, options, Score).unwrap();
            let found = text_of(pipeline, &rendered.ids[rendered.response]);
            prop_assert!(found.ends_with(&text), "{found:?} {text:?}");
        }
    }

    #[test]
    fn whitespace_is_the_response_s_even_if_the_post_processor_trims_it(response in " {1,3}[a-c]{0,3} {0,3}") {
        let input = candidate(TextInput::Text("The answer".into()), &response);
        let rendered = TRIMMING.render(&input, &RenderOptions::default(), Score).unwrap();
        prop_assert_eq!(text_of(&TRIMMING, &rendered.ids[rendered.response]), response);
    }
}

#[test]
fn real_checkpoints_render_as_in_transformers() {
    let Some(models) = std::env::var_os("PLUMB_MODELS") else {
        println!("skipped: PLUMB_MODELS names no folder with the model `smollm2`");
        return;
    };
    let mut config = config(PathBuf::from(models).join("smollm2"));
    (config.vocab_size, config.max_tokens) = (49152, 8192);
    let pipeline = TextPipeline::new(config).unwrap();
    let default = RenderOptions::default();
    let turns = conversation(&[("user", "Größe 🙂?"), ("assistant", "Yes.")]);
    // Ids by Transformers 5.23.
    let ids = pipeline.render(&turns, &default, Score).unwrap().ids;
    let turn = [1, 4093, 198, 27302, 7466, 34878, 85, 47526, 47, 2, 198, 1, 520, 9531, 198, 10539, 30, 2, 198];
    assert_eq!(ids[21..], turn);
    let text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                <|im_start|>user\nGröße 🙂?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n";
    check(&pipeline, &turns, (&default, Score), text, "Yes.");
    // The vocabulary's BOS is the template's turn mark, which the tokenizer does not put before texts.
    check(&pipeline, &TextInput::Text("a b".into()), (&default, Score), "a b", " b");
    for prompt in [HhhPrompt::Full, HhhPrompt::Short] {
        let rendered = pipeline.render(&turns, &options(ChatFormat::Auto, prompt), Score).unwrap();
        assert_eq!(rendered.prefix_len, pipeline.hhh_prefix_ids(prompt).unwrap().len());
        assert_eq!(text_of(&pipeline, &rendered.ids[rendered.response]), "  Yes.");
        assert_eq!(text_of(&pipeline, &rendered.ids), rendered.text);
        let whole = pipeline.render(&TextInput::Text(rendered.text.clone()), &default, Score).unwrap();
        assert_eq!(rendered.ids, whole.ids);
    }
}
