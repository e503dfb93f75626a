//! Text from a language model: what is drawn, when it ends, how it comes.

use futures::StreamExt;
use plumb_client::{conversation, dialogue, text, v1};
use plumb_tests::Launch;
use plumb_tests::call::{self, Generated, generate, ids, items, named, occupy, prompt_response};
use plumb_tests::fixture::{Copied, fixture};
use tokenizers::Tokenizer;
use v1::FinishReason::{Eos, Length, StopString};

const PROMPT: &str = "The reward is the last token.";

/// What `llama-lm` writes after the prompt, with this seed.
fn request(max_new_tokens: u32, temperature: f32, seed: Option<u64>) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(text(PROMPT)),
        sampling: Some(v1::Sampling { temperature: Some(temperature), seed, ..Default::default() }),
        stopping: Some(v1::Stopping { max_new_tokens: Some(max_new_tokens), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    }
}

fn with_sampling(mut request: v1::GenerateRequest, change: impl FnOnce(&mut v1::Sampling)) -> v1::GenerateRequest {
    change(request.sampling.as_mut().unwrap());
    request
}

fn with_stopping(mut request: v1::GenerateRequest, change: impl FnOnce(&mut v1::Stopping)) -> v1::GenerateRequest {
    change(request.stopping.as_mut().unwrap());
    request
}

fn texts(generated: &Generated) -> Vec<&str> {
    generated.samples.iter().map(|sample| sample.text.as_str()).collect()
}

fn token_ids(generated: &Generated) -> Vec<&[u32]> {
    generated.samples.iter().map(|sample| &sample.ids[..]).collect()
}

/// Four ASCII letters or so from the middle of a text.
fn middle(text: &str) -> &str {
    let is_word = |word: &&str| word.len() >= 3 && word.is_ascii();
    let words: Vec<&str> = text.split(|c: char| !c.is_ascii_graphic()).filter(is_word).collect();
    words[words.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_join_to_the_text_of_the_tokens() {
    let server = Launch::of(["llama-lm"]).start().await;
    let client = server.client().await;
    let tokenizer = Tokenizer::from_file(fixture("llama-lm/tokenizer.json")).unwrap();
    for seed in 0..4 {
        let request = v1::GenerateRequest { n: Some(3), request_id: "g1".into(), ..request(200, 1.0, Some(seed)) };
        let generated = generate(&client, request).await.unwrap();
        assert_eq!(generated.samples.len(), 3);
        for sample in &generated.samples {
            assert_eq!(sample.text, tokenizer.decode(&sample.ids, true).unwrap());
            assert_eq!((sample.end.finish_reason(), sample.end.new_tokens), (Length, 200));
            assert_eq!((sample.ids.len(), sample.end.reward), (200, None));
            assert!(sample.pieces > 1, "it came in one piece");
        }
        assert_ne!(generated.samples[0].ids, generated.samples[1].ids);
        let summary = &generated.summary;
        assert_eq!((summary.prompt_tokens, summary.seed, summary.truncated), (19, seed, false));
        assert_eq!((summary.request_id.as_str(), generated.model.name.as_str()), ("g1", "llama-lm"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sum_of_log_probabilities_is_that_of_score() {
    let server = Launch::of(["llama-lm"]).flags("--dtype f32").start().await;
    let client = server.client().await;
    let prompt = v1::TokenizeRequest { texts: vec![PROMPT.into()], ..Default::default() };
    let prompt = client.tokenize(prompt).await.unwrap().tokenized.remove(0).tokens;
    let prompt: Vec<u32> = prompt.iter().map(|token| token.id).collect();
    // Whatever the tokens are drawn from, it is the model's own distribution that is told.
    for request in [request(50, 0.0, None), with_sampling(request(50, 2.0, Some(3)), |s| s.top_k = Some(9))] {
        let sample = generate(&client, request).await.unwrap().samples.remove(0);
        let score = v1::ScoreRequest {
            objective: v1::Objective::SumLogProb.into(),
            ..items(None, vec![prompt_response(&prompt, &sample.ids)])
        };
        let score = call::scores(&client, score).await.remove(0).reward;
        assert!((sample.end.sum_log_prob - score).abs() < 1e-3, "{} and {score}", sample.end.sum_log_prob);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_gives_the_same_text_alone_among_others_and_in_a_larger_call() {
    let server = Launch::of(["llama-lm"]).start().await;
    let client = server.client().await;
    let drawn = async |request| generate(&client, request).await.unwrap();
    let alone = drawn(request(60, 1.0, Some(7))).await;
    assert_eq!(token_ids(&drawn(request(60, 1.0, Some(7))).await), token_ids(&alone));
    assert_ne!(token_ids(&drawn(request(60, 1.0, Some(8))).await), token_ids(&alone));
    let beside =
        futures::future::join_all((0..6).map(|seed| drawn(request(60 + 10 * seed, 1.0, Some(u64::from(seed) + 2)))));
    assert_eq!(beside.await[5].samples[0].ids[..60], alone.samples[0].ids, "among others");
    let more = drawn(v1::GenerateRequest { n: Some(4), ..request(60, 1.0, Some(7)) }).await;
    assert_eq!(more.samples[0].ids, alone.samples[0].ids, "the first of four");
    // Without a seed the server draws one and tells it.
    let unseeded = [drawn(request(60, 1.0, None)).await, drawn(request(60, 1.0, None)).await];
    assert_ne!(token_ids(&unseeded[0]), token_ids(&unseeded[1]));
    let again = drawn(request(60, 1.0, Some(unseeded[0].summary.seed))).await;
    assert_eq!(token_ids(&again), token_ids(&unseeded[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn sampling_options_narrow_what_is_drawn() {
    let server = Launch::of(["llama-lm"]).start().await;
    let client = server.client().await;
    let greedy = generate(&client, request(40, 0.0, None)).await.unwrap();
    let narrow = async |change: fn(&mut v1::Sampling)| {
        let request = with_sampling(request(40, 1.0, Some(1)), change);
        token_ids(&generate(&client, request).await.unwrap()) == token_ids(&greedy)
    };
    assert!(!narrow(|_| {}).await);
    assert!(narrow(|s| s.top_k = Some(1)).await, "the likeliest one");
    assert!(narrow(|s| s.top_p = Some(1e-6)).await, "the smallest set");
    assert!(narrow(|s| s.min_p = Some(1.0)).await, "as likely as the likeliest");
    assert!(narrow(|s| s.temperature = Some(1e-3)).await, "cold");
    let penalised = with_sampling(request(40, 0.0, None), |s| s.repetition_penalty = Some(100.0));
    let penalised = generate(&client, penalised).await.unwrap().samples.remove(0).ids;
    let distinct: std::collections::BTreeSet<_> = penalised.iter().collect();
    assert_eq!(distinct.len(), penalised.len(), "a token was repeated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_ends_before_a_stop_string_and_never_has_a_banned_one() {
    let server = Launch::of(["llama-lm"]).start().await;
    let client = server.client().await;
    let free = generate(&client, request(120, 1.0, Some(5))).await.unwrap();
    let text = texts(&free)[0];
    let word = middle(text);
    let stops = vec!["never written".to_owned(), word.to_owned()];
    let stopped = with_stopping(request(120, 1.0, Some(5)), |s| s.stop_strings = stops);
    let stopped = generate(&client, stopped).await.unwrap();
    assert_eq!(texts(&stopped)[0], &text[..text.find(word).unwrap()]);
    let end = &stopped.samples[0].end;
    assert_eq!(end.finish_reason(), StopString);
    assert!(end.new_tokens < 120 && free.samples[0].ids.starts_with(&stopped.samples[0].ids), "{stopped:?}");

    let banned = with_sampling(request(120, 1.0, Some(5)), |s| s.banned_strings = vec![word.to_owned(), "e".into()]);
    let banned = generate(&client, banned).await.unwrap();
    assert!(!texts(&banned)[0].contains(word) && !texts(&banned)[0].contains('e'), "{banned:?}");
    assert_eq!(banned.samples[0].end.finish_reason(), Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_end_with_the_text_the_limit_or_the_context() {
    let server = Launch::of(["llama-lm"]).start().await;
    let client = server.client().await;
    // One of 280 tokens ends a text: hardly one of 16 samples gets to its 400th.
    let natural = with_stopping(request(400, 1.0, Some(1)), |s| s.ignore_eos = false);
    let natural = generate(&client, v1::GenerateRequest { n: Some(16), ..natural }).await.unwrap();
    let (ended, others): (Vec<_>, Vec<_>) =
        natural.samples.iter().partition(|sample| sample.end.finish_reason() == Eos);
    assert!(!ended.is_empty());
    for sample in ended {
        let before = sample.ids.iter().filter(|id| **id == 1).count();
        assert!(before == 1 && sample.ids.ends_with(&[1]) && !sample.text.contains("<|eos|>"), "{sample:?}");
    }
    assert!(others.iter().all(|sample| !sample.ids.contains(&1) && sample.end.finish_reason() == Length));
    // 512 positions, 500 of them for the prompt.
    let full = v1::GenerateRequest { prompt: Some(ids(&[5; 500])), ..request(100, 1.0, Some(1)) };
    let end = generate(&client, full).await.unwrap().samples.remove(0).end;
    assert_eq!((end.finish_reason(), end.new_tokens), (Length, 12));
}

#[tokio::test(flavor = "multi_thread")]
async fn best_of_answers_the_best_by_the_rewards_of_score() {
    let server = Launch::of(["llama-lm", "llama-pm", "gemma2-pm"]).start().await;
    let client = server.client().await;
    let question = "What is 2 + 2?";
    for (ranker, name) in [(None, "llama-pm"), (named("gemma2-pm"), "gemma2-pm")] {
        let request = v1::GenerateRequest {
            prompt: Some(conversation([("user", question)])),
            n: Some(3),
            best_of: Some(v1::BestOf { samples: 8, ranker }),
            ..request(30, 1.0, Some(9))
        };
        let generated = generate(&client, request.clone()).await.unwrap();
        assert_eq!(generated.ranker.as_ref().unwrap().name, name);
        let found: Vec<f32> = generated.samples.iter().map(|sample| sample.end.reward.unwrap()).collect();
        let answers = |generated: &Generated| texts(generated).iter().map(|text| dialogue(question, *text)).collect();
        let scored = call::rewards(&client, items(named(name), answers(&generated))).await;
        assert_eq!(found.iter().map(|reward| reward.to_bits()).collect::<Vec<_>>(), scored);
        assert!(found.len() == 3 && found.is_sorted_by(|a, b| a >= b), "{found:?}");
        // They are the best of the eight that are drawn without a ranker.
        let all = v1::GenerateRequest { n: Some(8), best_of: None, ..request };
        let all = generate(&client, all).await.unwrap();
        let mut rewards = call::rewards(&client, items(named(name), answers(&all))).await;
        rewards.sort_by(|a, b| f32::from_bits(*b).total_cmp(&f32::from_bits(*a)));
        assert_eq!(rewards[..3], scored);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_decode_together_and_one_that_nobody_reads_stops() {
    let lm = Copied::long_lm();
    let server = Launch::new().model("lm", lm.path()).start().await;
    let client = server.client().await;
    let mut running = occupy(&client, "lm").await;
    // A short one comes in, and is through, while the long one goes on.
    let short = generate(&client, request(20, 1.0, Some(1))).await.unwrap();
    assert_eq!(short.samples[0].ids.len(), 20);
    assert!(running.next().await.unwrap().unwrap().end.is_none());
    drop(running);
    let metrics = server
        .until("the engine has stopped", |m| {
            let rpc = [("rpc", "Generation/Generate")];
            m.value("plumb_requests_in_flight", &rpc) == 0.0 && m.value("plumb_admitted_tokens", &[]) == 0.0
        })
        .await;
    assert_eq!(metrics.value("plumb_requests_total", &[("rpc", "Generation/Generate"), ("code", "CANCELLED")]), 1.0);
    let drawn = metrics.value("plumb_generated_tokens_total", &[("model", "lm"), ("version", "1")]);
    assert!(drawn > 20.0 && drawn < 50_000.0, "{drawn} tokens");
    // It takes nothing from the next one.
    generate(&client, request(20, 1.0, Some(1))).await.unwrap();
    let steps = server.metrics().await.value("plumb_batches_total", &[]) - metrics.value("plumb_batches_total", &[]);
    assert!(steps <= 21.0, "{steps} steps for 20 tokens");
}
