//! Every row of the contract's table of errors, each seen by a client. Two causes cannot be brought about from outside:
//! a lost device and a fault of a kernel; the server's own tests have them.

use std::fmt::Debug;
use std::time::Duration;

use plumb_client::{ApiKey, Code, Error, FieldViolation, RetryPolicy, conversation, text, v1};
use plumb_proto::v1::preference_client::PreferenceClient;
use plumb_tests::call::{self, candidate, candidate_ids, ids, items, labelled, named, occupy, refused, version};
use plumb_tests::fixture::{Copied, fixture};
use plumb_tests::{Exposition, Launch, Server};

/// Expects a code with the details that belong to it, and a message with these words.
#[track_caller]
pub(super) fn check<T: Debug>(result: Result<T, Error>, code: Code, words: &str) {
    let error = refused(result);
    assert_eq!(error.code, code, "{error}");
    assert!(error.message.contains(words), "`{words}` is not in: {error}");
    assert_eq!(!error.field_violations.is_empty(), code == Code::InvalidArgument, "BadRequest: {error:?}");
    let comes_back = matches!(code, Code::Unavailable | Code::ResourceExhausted);
    assert_eq!(error.retry_after.is_some_and(|after| !after.is_zero()), comes_back, "RetryInfo: {error:?}");
}

/// Expects INVALID_ARGUMENT that names a field and has these words.
#[track_caller]
pub(super) fn invalid<T: Debug>(result: Result<T, Error>, field: &str, words: &str) {
    let error = refused(result);
    assert_eq!(error.code, Code::InvalidArgument, "{error}");
    assert_eq!((error.attempts, error.retry_after), (1, None), "{error}");
    let [FieldViolation { field: found, description }] = &error.field_violations[..] else { panic!("{error:?}") };
    assert_eq!(found, field, "{description}");
    assert!(description.contains(words), "`{words}` is not in: {description}");
}

/// A text of about so many tokens.
fn long(tokens: usize) -> v1::Input {
    ids(&vec![5; tokens])
}

fn tokens_of(ids: &[u32], response_start: u32) -> v1::Input {
    let ids = v1::TokenIds { ids: ids.to_vec(), response_start: Some(response_start) };
    v1::Input { input: Some(v1::input::Input::TokenIds(ids)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_score_that_makes_no_sense_is_an_invalid_argument() {
    let server = Launch::of(["llama-pm", "llama-lm"]).flags("--max-client-batch-size 4").start().await;
    let client = server.client().await;
    let with = |change: &dyn Fn(&mut v1::ScoreRequest)| {
        let mut request = items(None, vec![text("a")]);
        change(&mut request);
        client.score(request)
    };
    let options = |change: &dyn Fn(&mut v1::TextOptions)| {
        let mut options = v1::TextOptions::default();
        change(&mut options);
        let request = items(None, vec![text("a")]);
        client.score(v1::ScoreRequest { text: Some(options), ..request })
    };
    let item = |input: v1::Input| client.score(items(None, vec![input]));
    let lm = |input: v1::Input, objective: v1::Objective| {
        client.score(v1::ScoreRequest { objective: objective.into(), ..items(named("llama-lm"), vec![input]) })
    };
    invalid(client.score(v1::ScoreRequest::default()).await, "items", "at least one");
    invalid(with(&|r| r.items = vec![text("a"); 5]).await, "items", "5 are given, 4 are allowed");
    invalid(with(&|r| r.objective = 99).await, "objective", "99");
    invalid(with(&|r| r.priority = -1).await, "priority", "-1");
    invalid(options(&|o| o.chat_format = 99).await, "text.chat_format", "99");
    invalid(options(&|o| o.hhh_prompt = 99).await, "text.hhh_prompt", "99");
    invalid(options(&|o| o.truncation = 99).await, "text.truncation", "99");
    invalid(options(&|o| o.max_tokens = Some(0)).await, "text.max_tokens", "0 is not in 1..=1024");
    invalid(options(&|o| o.max_tokens = Some(1025)).await, "text.max_tokens", "1025 is not in 1..=1024");
    invalid(item(v1::Input::default()).await, "items[0]", "`conversation`, `text` and `token_ids`");
    invalid(item(text("")).await, "items[0]", "empty");
    invalid(item(ids(&[])).await, "items[0]", "no token ids");
    invalid(item(conversation::<&str, &str>([])).await, "items[0]", "empty");
    invalid(item(conversation([("tool", "a")])).await, "items[0]", "unexpected role: tool");
    invalid(item(ids(&[5, 280])).await, "items[0]", "token 1 is 280");
    invalid(item(tokens_of(&[5, 6], 3)).await, "items[0]", "response starts at token 3");
    invalid(item(long(1025)).await, "items[0]", "1025 tokens, 1024 are allowed");
    invalid(lm(text("a"), v1::Objective::MutualInformation).await, "items[0]", "a query and a response");
    invalid(lm(ids(&[5]), v1::Objective::MeanLogProb).await, "items[0]", "no response");
    invalid(lm(conversation([("user", "a")]), v1::Objective::SumLogProb).await, "items[0]", "no response");
    // If all are wrong in this way, the first one stands for them.
    invalid(with(&|r| r.items = vec![text(""), ids(&[280])]).await, "items[0]", "empty");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_item_does_not_fail_its_neighbours() {
    let server = Launch::of(["llama-pm"]).start().await;
    let client = server.client().await;
    let expected = call::rewards(&client, items(None, vec![text("one"), text("two")])).await;
    let answer = client.score(items(None, vec![text("one"), ids(&[280]), text("two"), long(1025)])).await.unwrap();
    let results: Vec<_> = answer.results.iter().map(plumb_client::reward).collect();
    assert_eq!([&results[0], &results[2]].map(|r| r.as_ref().unwrap().to_bits()), expected[..]);
    for (i, words) in [(1, "items[1]: token 0 is 280"), (3, "items[3]: the input has 1025 tokens")] {
        let failure = results[i].as_ref().unwrap_err();
        assert_eq!(failure.code, Code::InvalidArgument);
        assert!(failure.message.contains(words), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_requests_that_make_no_sense_are_invalid_arguments() {
    let server = Launch::of(["llama-pm", "llama-lm"]).flags("--max-client-batch-size 4").start().await;
    let client = server.client().await;
    let rank = |prompt: Option<v1::Input>, candidates: Vec<v1::Candidate>| {
        client.rank(v1::RankRequest { prompt, candidates, ..Default::default() })
    };
    let question = || Some(conversation([("user", "q")]));
    invalid(rank(question(), vec![]).await, "candidates", "at least one");
    invalid(rank(question(), vec![candidate("a"); 5]).await, "candidates", "4 are allowed");
    invalid(rank(None, vec![candidate("a")]).await, "prompt", "is needed");
    invalid(rank(question(), vec![v1::Candidate::default()]).await, "candidates[0]", "is needed");
    invalid(rank(question(), vec![candidate_ids(&[5])]).await, "candidates[0]", "any other prompt takes text");
    invalid(rank(Some(ids(&[5])), vec![candidate("a")]).await, "candidates[0]", "takes token ids");

    let generate = async |change: &dyn Fn(&mut v1::GenerateRequest)| {
        let mut request = v1::GenerateRequest { prompt: Some(text("a")), ..Default::default() };
        change(&mut request);
        call::generate(&client, request).await
    };
    macro_rules! sampling {
        ($field:ident: $value:expr) => {
            generate(&|r| r.sampling = Some(v1::Sampling { $field: $value, ..Default::default() })).await
        };
    }
    macro_rules! stopping {
        ($field:ident: $value:expr) => {
            generate(&|r| r.stopping = Some(v1::Stopping { $field: $value, ..Default::default() })).await
        };
    }
    macro_rules! best_of {
        ($samples:expr) => {
            generate(&|r| {
                r.n = Some(2);
                r.best_of = Some(v1::BestOf { samples: $samples, ranker: None });
            })
            .await
        };
    }
    invalid(generate(&|r| r.prompt = None).await, "prompt", "is needed");
    invalid(generate(&|r| r.prompt = Some(long(512))).await, "prompt", "512 tokens");
    invalid(generate(&|r| r.n = Some(0)).await, "n", "at least one");
    invalid(generate(&|r| r.n = Some(5)).await, "n", "4 are allowed");
    invalid(generate(&|r| r.priority = 99).await, "priority", "99");
    invalid(best_of!(1), "best_of.samples", "fewer than n");
    invalid(best_of!(5), "best_of.samples", "4 are allowed");
    invalid(sampling!(temperature: Some(-1.0)), "sampling.temperature", "0 or from 0.001 to 1000");
    invalid(sampling!(temperature: Some(f32::NAN)), "sampling.temperature", "0 or from 0.001 to 1000");
    invalid(sampling!(top_p: Some(0.0)), "sampling.top_p", "above 0");
    invalid(sampling!(min_p: Some(1.5)), "sampling.min_p", "from 0 to 1");
    invalid(sampling!(repetition_penalty: Some(0.0)), "sampling.repetition_penalty", "from 0.01 to 100");
    invalid(sampling!(banned_strings: vec!["a".into(), String::new()]), "sampling.banned_strings[1]", "empty");
    invalid(stopping!(stop_strings: vec![String::new()]), "stopping.stop_strings[0]", "empty");
    invalid(stopping!(max_new_tokens: Some(0)), "stopping.max_new_tokens", "0 is not in 1..=60000");
    invalid(stopping!(max_new_tokens: Some(60_001)), "stopping.max_new_tokens", "60001 is not in");

    let tokenize = |texts: Vec<String>| client.tokenize(v1::TokenizeRequest { texts, ..Default::default() });
    invalid(tokenize(vec![]).await, "texts", "at least one");
    invalid(tokenize(vec![String::new(); 5]).await, "texts", "4 are allowed");
    invalid(client.render(v1::RenderRequest::default()).await, "input", "is needed");
    let load = |name: &str, version: Option<u64>, source: &str| {
        let (name, source) = (name.to_owned(), source.to_owned());
        client.load_version(v1::LoadVersionRequest { name, version, source, ..Default::default() })
    };
    invalid(load("", None, "x").await, "name", "1 to 128 letters");
    invalid(load("a b", None, "x").await, "name", "letters, digits");
    invalid(load("pm", Some(0), "x").await, "version", "begin at 1");
    invalid(load("pm", None, "").await, "source", "is needed");
    invalid(client.set_label("llama-pm", "", Some(1)).await, "label", "letters, digits");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_version_or_label_is_not_found() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let client = server.client().await;
    for (model, words) in [
        (named("nobody"), "no model `nobody`; there is llama-pm, llama-lm"),
        (version("llama-pm", 9), "`llama-pm` has no version 9; there is 1"),
        (labelled("llama-pm", "canary"), "`llama-pm` has no label `canary`"),
    ] {
        let not_found = |result| check::<()>(result, Code::NotFound, words);
        not_found(client.score(items(model.clone(), vec![text("a")])).await.map(drop));
        let rank = v1::RankRequest {
            model: model.clone(),
            prompt: Some(text("q")),
            candidates: vec![candidate("a")],
            ..Default::default()
        };
        not_found(client.rank(rank).await.map(drop));
        let generate = v1::GenerateRequest { model: model.clone(), prompt: Some(text("q")), ..Default::default() };
        not_found(client.generate(generate).await.map(drop));
        let tokenize = v1::TokenizeRequest { model: model.clone(), texts: vec!["a".into()], ..Default::default() };
        not_found(client.tokenize(tokenize).await.map(drop));
        let render = v1::RenderRequest { model: model.clone(), input: Some(text("a")), ..Default::default() };
        not_found(client.render(render).await.map(drop));
        not_found(client.get_model(model.unwrap()).await.map(drop));
    }
    let ranker = v1::BestOf { samples: 1, ranker: named("nobody") };
    let generate = v1::GenerateRequest { prompt: Some(text("q")), best_of: Some(ranker), ..Default::default() };
    check(call::generate(&client, generate).await, Code::NotFound, "no model `nobody`");
    check(client.unload_version("nobody", 1).await, Code::NotFound, "nobody");
    check(client.unload_version("llama-pm", 9).await, Code::NotFound, "no version 9");
    check(client.set_label("llama-pm", "stable", Some(9)).await, Code::NotFound, "no version 9");
    check(client.set_label("llama-pm", "canary", None).await, Code::NotFound, "no label `canary`");
    check(client.health("plumb.v1.Nothing").await, Code::NotFound, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_rpc_for_the_other_kind_of_model_is_a_failed_precondition() {
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let preference_only = Launch::of(["llama-pm"]).start().await;
    let generate = async |server: &Server, model: Option<v1::ModelSpec>, ranker: Option<v1::ModelSpec>| {
        let best_of = ranker.map(|ranker| v1::BestOf { samples: 2, ranker: Some(ranker) });
        let request = v1::GenerateRequest { model, prompt: Some(text("q")), best_of, ..Default::default() };
        call::generate(&server.client().await, request).await
    };
    let precondition = |result, words: &str| check::<call::Generated>(result, Code::FailedPrecondition, words);
    precondition(generate(&server, named("llama-pm"), None).await, "`llama-pm` is a preference model");
    precondition(generate(&server, None, named("llama-lm")).await, "`llama-lm` is a language model");
    precondition(generate(&preference_only, None, None).await, "needs a language model");
    let status = preference_only.client().await.health("plumb.v1.Generation").await.unwrap();
    assert_eq!(status.as_str_name(), "NOT_SERVING");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_calls_are_refused_with_a_time_to_come_back() {
    let server = Launch::of(["llama-pm"]).flags("--max-concurrent-requests 1").start().await;
    let client = server.client().await;
    let mut watched = client.watch_models("").await.unwrap();
    futures::StreamExt::next(&mut watched).await.unwrap().unwrap();
    let one = || items(None, vec![text("a")]);
    check(client.score(one()).await, Code::ResourceExhausted, "1 calls are in flight");
    assert_eq!(client.health("").await.unwrap().as_str_name(), "SERVING", "health checks always pass");
    let metrics = server.metrics().await;
    assert_eq!(metrics.value("plumb_rejections_total", &[("reason", "resource_exhausted")]), 1.0);
    drop(watched);
    // The client comes back by itself.
    server.client_with(|_| {}).await.score(one()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_tokens_than_the_budget_has_left_are_refused_with_a_time_to_come_back() {
    let lm = Copied::long_lm();
    let server = Launch::of(["llama-pm"]).model("lm", lm.path()).flags("--max-queue-tokens 60000").start().await;
    let client = server.client().await;
    let running = occupy(&client, "lm").await;
    let large = || items(None, vec![long(1000); 20]);
    check(client.score(large()).await, Code::ResourceExhausted, "of 60000 tokens are queued");
    client.score(items(None, vec![long(1000)])).await.unwrap();
    // What would never fit is not worth coming back for.
    check(client.score(items(None, vec![long(1000); 61])).await, Code::InvalidArgument, "61000 tokens of work");
    drop(running);
    server.client_with(|options| options.retry = RetryPolicy::default()).await.score(large()).await.unwrap();
    server.until("nothing is admitted any more", |m| m.value("plumb_admitted_tokens", &[]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_passes_in_the_queue_costs_no_work() {
    let lm = Copied::long_lm();
    let server = Launch::new().model("lm", lm.path()).flags("--max-batch-sequences 1 --decode-share 0").start().await;
    let client = server.client().await;
    let larger = |m: &Exposition| {
        m.value("plumb_batch_tokens_count", &[]) - m.value("plumb_batch_tokens_bucket", &[("le", "1")])
    };
    let warmed = larger(&server.metrics().await);
    // Takes the only place in every step, with one token.
    let running = occupy(&client, "lm").await;
    let timeout = Duration::from_millis(300);
    let late = client.with_call_timeout(Some(timeout)).score(items(None, vec![long(100)])).await;
    check(late, Code::DeadlineExceeded, "");
    // A client's own clock ends a single call; in a stream the server has to say it.
    let mut request = tonic::Request::new(tokio_stream::once(items(None, vec![long(100)])));
    request.set_timeout(timeout);
    let answers = PreferenceClient::new(server.channel().await).score_stream(request).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    assert_eq!(answer.error.unwrap().code, Code::DeadlineExceeded as i32);

    let over = |m: &Exposition| m.value("plumb_requests_in_flight", &[]) == 1.0;
    let metrics = server.until("only the generation is left", over).await;
    let ended = |code| metrics.value("plumb_requests_total", &[("rpc", "Preference/Score"), ("code", code)]);
    // The client's clock may be a moment ahead.
    assert_eq!(ended("DEADLINE_EXCEEDED") + ended("CANCELLED"), 1.0);
    assert_eq!(larger(&metrics), warmed, "a step had more than one token");
    drop(running);
    client.score(items(None, vec![long(100)])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_is_unavailable() {
    let mut server = Launch::of(["llama-pm"]).model_that_never_loads("slow").listen().await;
    let state = |m: &Exposition| m.value("plumb_model_state", &[("model", "slow")]);
    server.until("the second model is fetched", |m| state(m) == f64::from(v1::ModelState::Start as i32)).await;
    let client = server.client().await;
    assert_eq!(client.health("").await.unwrap().as_str_name(), "NOT_SERVING");
    assert_eq!(server.page("/readyz").await.0, 503);
    assert_eq!(server.page("/healthz").await.0, 200);
    check(client.score(items(named("slow"), vec![text("a")])).await, Code::Unavailable, "still being loaded");
    let generate = v1::GenerateRequest { prompt: Some(text("q")), ..Default::default() };
    check(call::generate(&client, generate).await, Code::Unavailable, "still being loaded");
    let source = fixture("llama-lm").display().to_string();
    let other = v1::LoadVersionRequest { name: "other".into(), source, ..Default::default() };
    assert_eq!(
        client.load_version(other).await.unwrap().state(),
        v1::ModelState::Available,
        "nobody waits for the hub"
    );
    server.terminate();
    assert_eq!(server.exit_code().await, 0, "a load that hangs does not hold the end up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nan_is_an_internal_error_of_its_item_alone() {
    const POISON: u32 = 279;
    let (pm, lm) = (Copied::of("llama-pm").poisoned(POISON), Copied::of("llama-lm").poisoned(POISON));
    let server = Launch::of(["llama-pm"]).model("pm", pm.path()).model("lm", lm.path()).start().await;
    let client = server.client().await;
    let good = [ids(&[0, 50, 51, 52]), ids(&[0, 50, 51, 53])];
    let expected = call::rewards(&client, items(named("llama-pm"), good.to_vec())).await;
    let poisoned = ids(&[0, 50, POISON, 52]);
    let [first, second] = good;
    // Twice: what the first call has left in the cache harms nobody.
    for _ in 0..2 {
        let all = vec![first.clone(), poisoned.clone(), second.clone()];
        let answer = client.score(items(named("pm"), all)).await.unwrap();
        let results: Vec<_> = answer.results.iter().map(plumb_client::reward).collect();
        assert_eq!([&results[0], &results[2]].map(|r| r.as_ref().unwrap().to_bits()), expected[..]);
        assert_eq!(results[1].as_ref().unwrap_err().code, Code::Internal);
    }
    check(client.score(items(named("pm"), vec![poisoned.clone()])).await, Code::Internal, "not a finite number");
    check(client.score(items(named("lm"), vec![poisoned.clone()])).await, Code::Internal, "not a finite number");
    let generate = v1::GenerateRequest { model: named("lm"), prompt: Some(poisoned), ..Default::default() };
    check(call::generate(&client, generate).await, Code::Internal, "not a finite number");
    let metrics = server.metrics().await;
    assert_eq!(metrics.value("plumb_non_finite_total", &[("model", "pm"), ("version", "1")]), 3.0);
    assert!(metrics.trouble("pm", "1", "non_finite") && metrics.trouble("lm", "1", "non_finite"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_they_are_for() {
    let launch = Launch::of(["llama-pm"]).flags("--api-key client-secret --admin-api-key admin-secret");
    let server = launch.flags("--log debug").start().await;
    let with = async |key: Option<&str>| {
        let key = key.map(ApiKey::new);
        server.client_with(|options| (options.api_key, options.retry) = (key, RetryPolicy::none())).await
    };
    for (key, score, label) in [
        (None, Some(Code::Unauthenticated), Some(Code::Unauthenticated)),
        (Some("wrong-secret"), Some(Code::Unauthenticated), Some(Code::Unauthenticated)),
        (Some("client-secret"), None, Some(Code::PermissionDenied)),
        (Some("admin-secret"), None, None),
    ] {
        let client = with(key).await;
        let scored = client.score(items(None, vec![text("a")])).await.map(drop);
        let labelled = client.set_label("llama-pm", "stable", Some(1)).await.map(drop);
        let loaded = client.load_version(v1::LoadVersionRequest {
            name: "llama-pm".into(),
            source: fixture("llama-pm").display().to_string(),
            ..Default::default()
        });
        for (result, expected) in [(scored, score), (labelled, label), (loaded.await.map(drop), label)] {
            match expected {
                None => result.unwrap(),
                Some(code) => check(result, code, "key"),
            }
        }
        assert_eq!(client.health("").await.unwrap().as_str_name(), "SERVING", "health checks need no key");
    }
    assert!(!server.log().contains("-secret"), "the log has a key:\n{}", server.log());
}
