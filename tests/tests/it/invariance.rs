//! A score does not depend on its neighbours: alone, in a batch, behind a cached prefix, in steps of any size, among
//! concurrent calls, as a candidate: the same bits.

use futures::future::join_all;
use plumb_client::{Client, dialogue, text, v1};
use plumb_tests::Launch;
use plumb_tests::call::{self, candidate, candidate_ids, items, named, prompt_response};
use plumb_tests::fixture::{Copied, expected, fixture};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Windows, soft caps, biases, grouped heads: between them, all that attention can be.
const MODELS: [&str; 4] = ["gemma2-pm", "llama-pm", "mistral-lm", "qwen2-lm"];

/// A prompt and responses to it.
#[derive(Clone, Debug)]
struct Shape {
    model: &'static str,
    objective: v1::Objective,
    prompt: Vec<u32>,
    responses: Vec<Vec<u32>>,
}

impl Shape {
    fn request(&self, items: Vec<v1::Input>) -> v1::ScoreRequest {
        v1::ScoreRequest { objective: self.objective.into(), ..call::items(named(self.model), items) }
    }

    fn inputs(&self) -> Vec<v1::Input> {
        self.responses.iter().map(|response| prompt_response(&self.prompt, response)).collect()
    }

    /// The bits of every item in a call of its own, all calls at the same time.
    async fn alone(&self, client: &Client) -> Vec<u32> {
        let calls = self.inputs().into_iter().map(|input| call::rewards(client, self.request(vec![input])));
        join_all(calls).await.concat()
    }

    async fn ranked(&self, client: &Client) -> Vec<u32> {
        let request = v1::RankRequest {
            model: named(self.model),
            prompt: Some(call::ids(&self.prompt)),
            candidates: self.responses.iter().map(|response| candidate_ids(response)).collect(),
            objective: self.objective.into(),
            ..Default::default()
        };
        let mut ranked = client.rank(request).await.unwrap().ranked;
        assert!(ranked.windows(2).all(|pair| reward(&pair[0]) >= reward(&pair[1])), "not in order: {ranked:?}");
        ranked.sort_by_key(|ranked| ranked.index);
        ranked.iter().map(|ranked| reward(ranked).to_bits()).collect()
    }
}

fn reward(ranked: &v1::Ranked) -> f32 {
    ranked.score.as_ref().unwrap().reward
}

fn shapes() -> impl Strategy<Value = Shape> {
    let tokens = |lengths| prop::collection::vec(0u32..280, lengths);
    let objectives = [v1::Objective::MeanLogProb, v1::Objective::SumLogProb, v1::Objective::MutualInformation];
    let choices = (prop::sample::select(&MODELS[..]), prop::sample::select(objectives.to_vec()));
    (choices, tokens(1..200), prop::collection::vec(tokens(1..100), 1..10))
        .prop_map(|((model, objective), prompt, responses)| Shape { model, objective, prompt, responses })
}

#[test]
fn alone_batched_chunked_concurrent_and_ranked_give_the_same_bits() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (wide, narrow) = runtime.block_on(async {
        // The second cuts every long sequence into steps, and mixes them.
        let narrow = Launch::of(MODELS).flags("--max-batch-tokens 48 --max-batch-sequences 3");
        tokio::join!(Launch::of(MODELS).start(), narrow.start())
    });
    let (wide, narrow) = runtime.block_on(async { tokio::join!(wide.client(), narrow.client()) });
    let config = Config { cases: 32, failure_persistence: None, max_shrink_iters: 256, ..Config::default() };
    let checked = TestRunner::new(config).run(&shapes(), |shape| {
        runtime.block_on(async {
            // The prefix is not cached yet.
            let expected = call::rewards(&wide, shape.request(shape.inputs())).await;
            prop_assert_eq!(shape.ranked(&wide).await, expected.clone(), "as candidates");
            prop_assert_eq!(shape.alone(&wide).await, expected.clone(), "alone");
            // Here the calls meet in one batch before anything is cached.
            let (alone, ranked) = tokio::join!(shape.alone(&narrow), shape.ranked(&narrow));
            prop_assert_eq!(alone, expected.clone(), "alone, in small steps");
            prop_assert_eq!(ranked, expected.clone(), "as candidates, in small steps");
            let mut reversed = shape.inputs();
            reversed.reverse();
            let mut found = call::rewards(&narrow, shape.request(reversed)).await;
            found.reverse();
            prop_assert_eq!(found, expected, "in another order");
            Ok(())
        })
    });
    checked.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rank_orders_and_gives_margins() {
    let server = Launch::of(["llama-pm"]).flags("--max-input-tokens 64").start().await;
    let client = server.client().await;
    let long = "too long ".repeat(40);
    let candidates = ["It is 4.", "Five.", long.as_str(), "It is 4.", "I am not sure."];
    let request = v1::RankRequest {
        prompt: Some(plumb_client::conversation([("user", "What is 2 + 2?")])),
        candidates: candidates.map(candidate).into(),
        request_id: "r1".into(),
        ..Default::default()
    };
    let answer = client.rank(request).await.unwrap();
    assert_eq!(answer.request_id, "r1");
    assert!(answer.timings.is_some_and(|t| t.total_ns >= t.inference_ns && t.inference_ns > 0), "{:?}", answer.timings);
    let dialogues = candidates.map(|response| dialogue("What is 2 + 2?", response));
    let scored = client.score(items(None, dialogues.into())).await.unwrap();
    assert_eq!(answer.model, scored.model);
    let (failed, ranked) = answer.ranked.split_last().unwrap();
    let best = reward(&ranked[0]);
    for (place, ranked) in ranked.iter().enumerate() {
        let score = plumb_client::score(&scored.results[ranked.index as usize]).unwrap();
        assert_eq!(reward(ranked).to_bits(), score.reward.to_bits());
        assert_eq!((ranked.rank as usize, ranked.margin), (place + 1, score.reward - best));
        let probability = 1.0 / (1.0 + (best - score.reward).exp());
        assert!((ranked.probability - probability).abs() < 1e-6, "{ranked:?}");
    }
    let place = |index: u32| ranked.iter().position(|ranked| ranked.index == index).unwrap();
    assert_eq!(place(3), place(0) + 1, "equal rewards keep the order of the request");
    assert_eq!((failed.index, failed.rank, &failed.score), (2, 0, &None), "what has no score comes last");
    assert_eq!(failed.error.as_ref().unwrap().code, plumb_client::Code::InvalidArgument as i32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_calls_gives_the_bits_of_single_calls() {
    let server = Launch::of(["llama-pm"]).start().await;
    let client = server.client().await;
    let cases = expected("llama-pm").cases;
    let request = |i: usize| {
        let items = if i == 2 { Vec::new() } else { vec![text(cases[i % cases.len()].text.as_str())] };
        v1::ScoreRequest { request_id: i.to_string(), ..call::items(None, items) }
    };
    let requests: Vec<_> = (0..100).map(request).collect();
    let mut answers = client.score_stream(futures::stream::iter(requests)).await.unwrap();
    let mut seen = [false; 100];
    while let Some(answer) = futures::StreamExt::next(&mut answers).await {
        let answer = answer.unwrap();
        let i: usize = answer.request_id.parse().unwrap();
        assert!(!std::mem::replace(&mut seen[i], true), "{i} was answered twice");
        if i == 2 {
            // What is wrong with one does not end the stream.
            let error = answer.error.unwrap();
            assert_eq!(error.code, plumb_client::Code::InvalidArgument as i32);
            assert!(answer.results.is_empty() && error.message.contains("items"), "{error:?}");
        } else {
            let alone = call::rewards(&client, request(i)).await;
            assert_eq!(plumb_client::reward(&answer.results[0]).unwrap().to_bits(), alone[0]);
        }
    }
    assert!(seen.iter().all(|seen| *seen));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hhh_prompt_is_computed_once_and_changes_no_bit() {
    let lm = Copied::long_lm();
    let server = Launch::new().model("lm", lm.path()).start().await;
    let client = server.client().await;
    let request = |response: &str, hhh: v1::HhhPrompt| v1::ScoreRequest {
        text: Some(v1::TextOptions { hhh_prompt: hhh.into(), ..Default::default() }),
        ..items(None, vec![dialogue("What is 2 + 2?", response)])
    };
    let score = async |response: &str, hhh| call::scores(&client, request(response, hhh)).await.remove(0);
    let first = score("It is 4.", v1::HhhPrompt::Short).await;
    let other = score("Five.", v1::HhhPrompt::Short).await;
    let again = score("It is 4.", v1::HhhPrompt::Short).await;
    let bare = score("It is 4.", v1::HhhPrompt::None).await;
    let prefix = first.input_tokens - bare.input_tokens;
    assert_eq!(first.cached_tokens, 0);
    // All whole pages of 16 tokens.
    for cached in [other.cached_tokens, again.cached_tokens] {
        assert!(prefix > 100 && cached > prefix - 32, "{cached} of {prefix} tokens of the prompt were there");
    }
    assert_eq!(again.reward.to_bits(), first.reward.to_bits());
    assert_ne!(bare.reward, first.reward);
    // In a server that has seen nothing else.
    let fresh_server = Launch::new().model("lm", lm.path()).flags("--max-batch-tokens 100").start().await;
    let fresh = fresh_server.client().await;
    let found = call::scores(&fresh, request("Five.", v1::HhhPrompt::Short)).await.remove(0);
    assert_eq!(found.reward.to_bits(), other.reward.to_bits());
    // In one that never looks into a cache.
    let plain_server = Launch::new().model("lm", lm.path()).flags("--no-prefix-cache").start().await;
    let plain = plain_server.client().await;
    for _ in 0..2 {
        let found = call::scores(&plain, request("Five.", v1::HhhPrompt::Short)).await.remove(0);
        assert_eq!((found.cached_tokens, found.reward.to_bits()), (0, other.reward.to_bits()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_cut_where_the_caller_asks_for_it() {
    use v1::Truncation::{Left, Right, Unspecified};
    let strict = Launch::of(["llama-pm"]).start().await;
    let lenient = Launch::new().model("llama-pm", fixture("llama-pm")).flags("--auto-truncate").start().await;
    let tokens: Vec<u32> = std::iter::once(0).chain((0..1499).map(|i| 4 + i % 250)).collect();
    let left = [&tokens[..1], &tokens[1500 - 1023..]].concat();
    let check = async |server: &plumb_tests::Server, how: v1::Truncation, limit: Option<u32>, expected: &[u32]| {
        let client = server.client().await;
        let cut = v1::TextOptions { truncation: how.into(), max_tokens: limit, ..Default::default() };
        let cut = v1::ScoreRequest { text: Some(cut), ..items(None, vec![call::ids(&tokens)]) };
        let found = call::scores(&client, cut).await.remove(0);
        let whole = call::scores(&client, items(None, vec![call::ids(expected)])).await.remove(0);
        assert_eq!(found.reward.to_bits(), whole.reward.to_bits(), "{how:?} to {limit:?}");
        assert_eq!((found.truncated, found.input_tokens as usize), (true, expected.len()), "{how:?} to {limit:?}");
        assert!(!whole.truncated);
    };
    check(&strict, Left, None, &left).await;
    check(&strict, Right, None, &tokens[..1024]).await;
    check(&strict, Right, Some(10), &tokens[..10]).await;
    check(&lenient, Unspecified, None, &left).await;
    check(&lenient, Right, None, &tokens[..1024]).await;
}
