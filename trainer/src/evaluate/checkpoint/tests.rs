use std::sync::Arc;

use clap::Parser;
use serde_json::Value;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn fixture(name: &str) -> String {
    format!("{}/../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn checkpoint(name: &str) -> Checkpoint {
    let line =
        ["evaluate", "pairs", "none.jsonl", "--model", "m", "--dtype", "f32", "--threads", "1", "--kv-cache-mib", "4"];
    Checkpoint::open(&fixture(name), &Line::parse_from(line).options).unwrap()
}

fn cases(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixture(name) + "/expected.json").unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["cases"].as_array().unwrap().clone()
}

fn how(mutual_information: bool) -> How {
    How { text: RenderOptions::default(), mutual_information }
}

fn scores(checkpoint: &mut Checkpoint, texts: &[TextInput], how: &How) -> Vec<Score> {
    let mut done = 0;
    let texts: Vec<&TextInput> = texts.iter().collect();
    let outcomes = checkpoint.score(&texts, how, &mut |more| done += more).unwrap();
    assert!(done <= texts.len() as u64);
    outcomes.into_iter().map(|outcome| outcome.unwrap()).collect()
}

#[test]
fn scores_are_those_of_transformers() {
    let text = |case: &Value| TextInput::Text(case["text"].as_str().unwrap().to_owned());
    let near = |found: f32, expected: f64| assert!((f64::from(found) - expected).abs() < 2e-4, "{found} {expected}");
    for name in ["llama-pm", "gemma2-pm", "neox-pm"] {
        let cases = cases(name);
        let found = scores(&mut checkpoint(name), &cases.iter().map(text).collect::<Vec<_>>(), &how(false));
        for (case, score) in cases.iter().zip(found) {
            let Score::Reward(reward) = score else { panic!("{score:?}") };
            near(reward, case["reward"].as_f64().unwrap());
        }
    }
    for name in ["llama-lm", "qwen2-lm", "mistral-lm"] {
        let cases = cases(name);
        let found = scores(&mut checkpoint(name), &cases.iter().map(text).collect::<Vec<_>>(), &how(false));
        for (case, score) in cases.iter().zip(found) {
            let values: Vec<f64> =
                case["token_log_probs"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let Score::LogProb { mean, tokens, mutual_information: None, .. } = score else { panic!("{score:?}") };
            assert_eq!(tokens as usize, values.len());
            near(mean, values.iter().sum::<f64>() / values.len() as f64);
        }
    }
}

#[test]
fn a_score_has_the_same_bits_whatever_it_is_computed_with() {
    let mut model = checkpoint("llama-lm");
    let prompt = |i: usize| TextInput::Text("A question with a beginning that is longer than a page. ".repeat(i));
    let texts: Vec<TextInput> = (1..5)
        .flat_map(|i| ["Yes.", "No, it is not.", "Perhaps; who knows?"].map(|response| (i, response)))
        .map(|(i, response)| TextInput::PromptResponse {
            prompt: Arc::new(prompt(i)),
            response: Response::Text(response.to_owned()),
        })
        .collect();
    let together = scores(&mut model, &texts, &how(true));
    // Steps that cut every sequence, some within its response; and one sequence after the other.
    for step_tokens in [7, 50] {
        let mut model = checkpoint("llama-lm");
        model.engine.step_tokens = step_tokens;
        assert_eq!(scores(&mut model, &texts, &how(true)), together, "{step_tokens} tokens in a step");
    }
    for (text, expected) in texts.iter().zip(&together) {
        assert_eq!(scores(&mut model, std::slice::from_ref(text), &how(true)), [*expected]);
    }
    let Score::LogProb { mutual_information: Some(mutual), sum, .. } = together[0] else { panic!() };
    assert!(mutual != sum);
}

#[test]
fn the_likeliest_continuation_is_that_of_transformers() {
    let mut found = 0;
    for name in ["llama-lm", "qwen2-lm", "neox-lm", "gemma2-lm"] {
        let mut model = checkpoint(name);
        for case in cases(name) {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> =
                case["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            let greedy = case["greedy"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
            let greedy: Vec<u32> = greedy.take(3).collect();
            let continuation = model.loaded.text.decode(&greedy).unwrap();
            let whole = model.loaded.text.tokenize(&format!("{text}{continuation}"), true).unwrap();
            let whole: Vec<u32> = whole.into_iter().map(|token| token.id).collect();
            // Random models write bytes that are no text, or tokens that merge.
            if whole != [&ids[..], &greedy[..]].concat() {
                continue;
            }
            found += 1;
            let other = if continuation.starts_with('x') { "y" } else { "x" };
            let texts = [continuation.as_str(), other].map(|next| (text.to_owned(), next.to_owned()));
            let outcomes = model.continues(&texts, &how(false), &mut |_| {}).unwrap();
            assert_eq!(outcomes, [Ok(true), Ok(false)], "{name} {text:?} {continuation:?}");
        }
    }
    assert!(found > 0, "no case can be written as text");
}

#[test]
fn what_does_not_fit_fails_alone() {
    let mut model = checkpoint("llama-pm");
    let texts = ["short".to_owned(), "long ".repeat(2000), String::new()].map(TextInput::Text);
    let outcomes = model.score(&texts.each_ref(), &how(false), &mut |_| {}).unwrap();
    assert!(outcomes[0].is_ok());
    assert!(outcomes[1].as_ref().unwrap_err().contains("1024"), "{outcomes:?}");
    assert!(outcomes[2].as_ref().unwrap_err().contains("empty"), "{outcomes:?}");
    let mut how = how(false);
    how.text.truncation = Truncation::Left;
    assert!(model.score(&texts.each_ref(), &how, &mut |_| {}).unwrap()[1].is_ok());
}

#[test]
fn the_opening_of_a_dialogue() {
    let mut model = checkpoint("llama-lm");
    assert_eq!(model.opening("A story?", HhhPrompt::None).unwrap(), "Human: A story?\n\nAssistant: ");
    // Tiny models have no room for an HHH prompt.
    assert!(model.opening("A story?", HhhPrompt::Short).is_err());
    let prompted = checkpoint("../../server/models/lm").opening("A story?", HhhPrompt::Short).unwrap();
    assert!(prompted.ends_with("-----\n\nHuman:  A story?\n\nAssistant:  "), "{prompted}");
}
