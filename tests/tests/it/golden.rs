//! What Transformers computed, asked for over the wire.

use plumb_client::{Client, text, v1};
use plumb_tests::call::{self, ids, items, named, prompt_response};
use plumb_tests::fixture::{Case, Conversation, expected, fixture};
use plumb_tests::{Launch, Server};

const TOLERANCE: f32 = 1e-4;

const PREFERENCE: [&str; 8] =
    ["llama-pm", "qwen2-pm", "qwen3-pm", "mistral-pm", "gemma2-pm", "neox-pm", "openrlhf-pm", "trl-value-head"];

const LANGUAGE: [&str; 8] = [
    "llama-lm",
    "llama-lm-sharded",
    "qwen2-lm",
    "qwen3-lm",
    "mistral-lm",
    "gemma2-lm",
    "neox-lm",
    "neox-lm-sequential",
];

/// Expects equal lengths and values within the tolerance.
#[track_caller]
fn close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= TOLERANCE, "{what}, value {i}: {found}, Transformers has {expected}");
    }
}

fn values(score: &v1::Score) -> Vec<f32> {
    score.tokens.iter().map(|token| token.value).collect()
}

/// Tokenize and Render feed the model what Transformers fed it.
async fn check_tokens(client: &Client, model: &str, case: &Case) {
    let request = v1::TokenizeRequest { model: named(model), texts: vec![case.text.clone()], add_special_tokens: None };
    let tokenized = client.tokenize(request).await.unwrap().tokenized.remove(0);
    let found: Vec<u32> = tokenized.tokens.iter().map(|token| token.id).collect();
    assert_eq!(found, case.token_ids, "{model}, {}", case.name);
    for input in [text(case.text.as_str()), ids(&case.token_ids)] {
        let request = v1::RenderRequest { model: named(model), input: Some(input), ..Default::default() };
        let rendered = client.render(request).await.unwrap();
        assert_eq!(rendered.token_ids, case.token_ids, "{model}, {}", case.name);
    }
}

async fn render(client: &Client, model: &str, conversation: &Conversation, generate: bool) -> v1::RenderResponse {
    let input = Some(conversation.input());
    let request =
        v1::RenderRequest { model: named(model), input, add_generation_prompt: generate, ..Default::default() };
    client.render(request).await.unwrap()
}

async fn check_rendering(client: &Client, model: &str, conversation: &Conversation) {
    let score = render(client, model, conversation, false).await;
    assert_eq!((&score.text, &score.token_ids), (&conversation.rendered, &conversation.token_ids), "{model}");
    let generate = render(client, model, conversation, true).await;
    let expected = (&conversation.rendered_with_generation_prompt, &conversation.token_ids_with_generation_prompt);
    assert_eq!((&generate.text, &generate.token_ids), expected, "{model}");
    assert_eq!(score.template_sha256.len(), 64, "{model}");
    assert_eq!(score.template_sha256, generate.template_sha256, "{model}");
}

async fn check_rewards(client: &Client, model: &str, expected_of: &str) {
    let expected = expected(expected_of);
    for case in &expected.cases {
        check_tokens(client, model, case).await;
        let inputs = vec![text(case.text.as_str()), ids(&case.token_ids)];
        let request = v1::ScoreRequest { per_token: true, ..items(named(model), inputs) };
        for score in call::scores(client, request).await {
            let what = format!("{model}, {}", case.name);
            // OpenRLHF's rewards are normalised at every token where the checkpoint asks for it.
            let reward = case.normalized_reward.or(case.reward).unwrap();
            close(&what, &[score.reward], &[reward]);
            if case.normalized_reward.is_none() {
                close(&what, &values(&score), &case.token_rewards);
            }
            let found: Vec<u32> = score.tokens.iter().map(|token| token.id).collect();
            assert_eq!((&found, score.input_tokens as usize), (&case.token_ids, found.len()), "{what}");
        }
    }
    for conversation in &expected.conversations {
        check_rendering(client, model, conversation).await;
        let scores = call::scores(client, items(named(model), vec![conversation.input()])).await;
        close(model, &[scores[0].reward], &[conversation.reward.unwrap()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rewards_are_those_of_transformers() {
    let server = Launch::of(PREFERENCE)
        .model("lora-pm", fixture("llama-lm"))
        .flags("--dtype f32 --adapter")
        .flags(&format!("lora-pm={}", fixture("lora-pm").display()))
        .start()
        .await;
    let client = server.client().await;
    for model in PREFERENCE.into_iter().chain(["lora-pm"]) {
        check_rewards(&client, model, model).await;
    }
}

async fn check_log_probs(client: &Client, model: &str, case: &Case) {
    let what = format!("{model}, {}", case.name);
    check_tokens(client, model, case).await;
    let score = async |input: v1::Input, objective: v1::Objective| {
        let request =
            v1::ScoreRequest { objective: objective.into(), per_token: true, ..items(named(model), vec![input]) };
        call::scores(client, request).await.remove(0)
    };
    // Of a text, everything after the first token counts; of token ids, what the caller says.
    let middle = case.token_ids.len() / 2;
    let (prompt, response) = case.token_ids.split_at(middle);
    for (input, expected) in [
        (text(case.text.as_str()), &case.token_log_probs[..]),
        (ids(&case.token_ids), &case.token_log_probs[..]),
        (prompt_response(prompt, response), &case.token_log_probs[middle - 1..]),
    ] {
        let sum: f32 = expected.iter().sum();
        let tokens = expected.len() as f32;
        // A sum may be off by as much as all its tokens together.
        for (objective, reward, scale) in [
            (v1::Objective::Unspecified, sum / tokens, 1.0),
            (v1::Objective::MeanLogProb, sum / tokens, 1.0),
            (v1::Objective::SumLogProb, sum, tokens),
        ] {
            let score = score(input.clone(), objective).await;
            let log_probs = score.log_probs.unwrap();
            close(&what, &values(&score), expected);
            close(&what, &[score.reward / scale, log_probs.mean], &[reward / scale, sum / tokens]);
            assert_eq!(
                (log_probs.response_tokens, log_probs.unconditional_sum),
                (expected.len() as u32, None),
                "{what}"
            );
        }
    }
    let whole = score(prompt_response(prompt, response), v1::Objective::SumLogProb).await;
    let mutual = score(prompt_response(prompt, response), v1::Objective::MutualInformation).await;
    let log_probs = mutual.log_probs.unwrap();
    assert_eq!(log_probs.sum.to_bits(), whole.reward.to_bits(), "{what}");
    close(&what, &[mutual.reward], &[log_probs.sum - log_probs.unconditional_sum.unwrap()]);
    if case.token_ids[0] == 0 {
        // Without its query the response follows the BOS.
        let alone = score(prompt_response(&[0], response), v1::Objective::SumLogProb).await;
        assert_eq!(log_probs.unconditional_sum.map(f32::to_bits), Some(alone.reward.to_bits()), "{what}");
    }
}

async fn check_language(client: &Client, model: &str, expected_of: &str) {
    let expected = expected(expected_of);
    for case in &expected.cases {
        check_log_probs(client, model, case).await;
        let request = v1::GenerateRequest {
            model: named(model),
            prompt: Some(ids(&case.token_ids)),
            sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
            stopping: Some(v1::Stopping { max_new_tokens: Some(16), ignore_eos: true, ..Default::default() }),
            ..Default::default()
        };
        let generated = call::generate(client, request).await.unwrap();
        assert_eq!(generated.samples[0].ids, case.greedy, "{model}, {}", case.name);
        // The same continuation, and one that leaves it at its last token.
        let mut other = case.greedy.clone();
        other.iter_mut().next_back().into_iter().for_each(|last| *last = u32::from(*last == 0));
        let continuations = [&case.greedy, &other].map(|ids| prompt_response(&case.token_ids, ids)).to_vec();
        let scores = call::scores(client, items(named(model), continuations)).await;
        let greedy: Vec<bool> = scores.into_iter().map(|score| score.log_probs.unwrap().greedy).collect();
        assert_eq!(greedy, [true, false], "{model}, {}", case.name);
    }
    for conversation in &expected.conversations {
        check_rendering(client, model, conversation).await;
        if conversation.messages.last().is_some_and(|turn| turn.role == "assistant") {
            let rendered = render(client, model, conversation, false).await;
            let response = rendered.response_start as usize - 1..rendered.response_end as usize - 1;
            let request = v1::ScoreRequest { per_token: true, ..items(named(model), vec![conversation.input()]) };
            let scores = call::scores(client, request).await;
            close(model, &values(&scores[0]), &conversation.token_log_probs[response]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_and_greedy_text_are_those_of_transformers() {
    let server = Launch::of(LANGUAGE)
        .model("lora-lm", fixture("qwen2-lm"))
        .model("llama-gguf", fixture("gguf/llama-lm.gguf"))
        .model("qwen2-gguf", fixture("gguf/qwen2-lm.gguf"))
        .flags("--dtype f32 --adapter")
        .flags(&format!("lora-lm={}", fixture("lora-lm").display()))
        .start()
        .await;
    let client = server.client().await;
    for model in LANGUAGE.into_iter().chain(["lora-lm"]) {
        check_language(&client, model, model).await;
    }
    check_language(&client, "llama-gguf", "gguf/llama-lm.gguf").await;
    check_language(&client, "qwen2-gguf", "gguf/qwen2-lm.gguf").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_checkpoint_is_can_be_asked() {
    let server: Server = Launch::of(["openrlhf-pm", "llama-lm"]).flags("--dtype f32").start().await;
    let client = server.client().await;
    let status = client.get_model(v1::ModelSpec::default()).await.unwrap();
    let identity = status.model.clone().unwrap();
    let details = status.details.clone().unwrap();
    assert_eq!((identity.name.as_str(), identity.version, identity.weights_digest.len()), ("openrlhf-pm", 1, 64));
    assert!(status.is_default && status.state() == v1::ModelState::Available && status.error.is_empty(), "{status:?}");
    assert_eq!(details.kind(), v1::ModelKind::Preference);
    assert_eq!((details.reward_head.as_str(), details.dtype.as_str()), ("value_head.weight", "f32"));
    assert_eq!((details.vocab_size, details.max_input_tokens), (280, 512));
    assert!(details.normalization.is_some_and(|n| n.std == 1.836), "{details:?}");
    assert_eq!(details.hhh_prompt, "plumb");
    let models = client.list_models().await.unwrap();
    let names: Vec<_> = models.iter().map(|status| status.model.as_ref().unwrap().name.as_str()).collect();
    assert_eq!(names, ["llama-lm", "openrlhf-pm"], "by name");
    assert_eq!(models[0].details.as_ref().unwrap().chat_template_sha256.len(), 64);
}
