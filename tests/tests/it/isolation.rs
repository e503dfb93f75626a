//! What goes wrong on the device: an input that makes it fail fails alone, and a device that is stuck or broken is not
//! kept up.

use std::path::PathBuf;

use futures::StreamExt;
use futures::future::join_all;
use plumb_client::{Client, Code, reward, v1};
use plumb_tests::call::{self, Generated, ids, items, named, occupy, refused, rewards};
use plumb_tests::fixture::Copied;
use plumb_tests::{Exposition, Launch, Server};
use tempfile::TempDir;
use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};

/// The faults of a server, which come and go while it runs.
struct Faults(TempDir);

impl Faults {
    fn none() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("faults")
    }

    /// The only faults from now on, one a line.
    fn set(&self, lines: &str) {
        // The server never reads half of it.
        let new = self.0.path().join("new");
        std::fs::write(&new, lines).unwrap();
        std::fs::rename(new, self.file()).unwrap();
    }

    fn among(&self, launch: Launch) -> Launch {
        launch.env("PLUMB_FAULTS", self.file().to_str().unwrap())
    }
}

/// Inputs of many lengths, of which some begin in the same way. None holds a token from 200 on.
fn inputs(n: u32) -> Vec<Vec<u32>> {
    let tokens = |i: u32| {
        let (shared, own) = (i % 5 * 20, 2 + i * 13 % 70);
        (0..shared).map(|t| t * 7 % 200).chain((0..own).map(move |t| (t * 11 + i) % 200)).collect()
    };
    (0..n).map(tokens).collect()
}

/// The bits of a score, or what is wrong with it.
type Scored = Result<u32, (Code, String)>;

/// What a server answers to all inputs in calls of four, at most `at_once` at a time.
async fn score_all(client: &Client, model: &str, inputs: &[Vec<u32>], at_once: usize) -> Vec<Scored> {
    let score = async |inputs: &[Vec<u32>]| {
        let call = items(named(model), inputs.iter().map(|tokens| ids(tokens)).collect());
        match client.score(call).await {
            Ok(answer) => {
                let bits = |result| reward(result).map(f32::to_bits).map_err(|error| (error.code, error.message));
                answer.results.iter().map(bits).collect::<Vec<_>>()
            }
            // All items alike.
            error => {
                let error = refused(error);
                vec![Err((error.code, error.message)); inputs.len()]
            }
        }
    };
    let answers: Vec<_> = futures::stream::iter(inputs.chunks(4)).map(score).buffered(at_once).collect().await;
    answers.concat()
}

/// Streams of a language model, drawn beside one another.
async fn generate_all(client: &Client) -> Vec<Generated> {
    let generate = |seed: u32| {
        let request = v1::GenerateRequest {
            model: named("llama-lm"),
            prompt: Some(ids(&(0..40 + seed).map(|t| t * 3 % 200).collect::<Vec<_>>())),
            sampling: Some(v1::Sampling { seed: Some(u64::from(seed)), ..Default::default() }),
            stopping: Some(v1::Stopping { max_new_tokens: Some(150), ignore_eos: true, ..Default::default() }),
            ..Default::default()
        };
        call::generate(client, request)
    };
    join_all((0..4).map(generate)).await.into_iter().map(Result::unwrap).collect()
}

/// The tokens of all samples, and the bits of what they sum up to.
fn tokens(generated: &[Generated]) -> Vec<(&[u32], u32)> {
    let samples = generated.iter().flat_map(|generated| &generated.samples);
    samples.map(|sample| (&sample.ids[..], sample.end.sum_log_prob.to_bits())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_makes_kernels_fail_fails_alone_and_changes_no_bit_of_others() {
    let faults = Faults::none();
    let launch = Launch::of(["llama-pm", "llama-lm"]).flags("--threads 2 --max-batch-sequences 16");
    let server = faults.among(launch).start().await;
    let client = server.client().await;
    let mut inputs = inputs(10_000);
    let expected = score_all(&client, "llama-pm", &inputs, 8).await;
    let drawn = generate_all(&client).await;
    // A token that no stream draws.
    let poison = (200..280).find(|id| tokens(&drawn).iter().all(|(ids, _)| !ids.contains(id))).unwrap();
    // One for every batch that is full.
    let poisoned: Vec<_> = (0..inputs.len()).step_by(16).collect();
    for (i, at) in poisoned.iter().enumerate() {
        let middle = inputs[*at].len() * i / poisoned.len();
        inputs[*at][middle] = poison;
    }
    for fault in ["kernel-error", "kernel-panic"] {
        faults.set(&format!("{fault} {poison}"));
        let (found, redrawn) = tokio::join!(score_all(&client, "llama-pm", &inputs, 8), generate_all(&client));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            match found {
                Err((code, message)) if poisoned.contains(&i) => {
                    assert!(
                        *code == Code::Internal && message.contains("isolated to this input"),
                        "{i}: {code:?} {message}"
                    );
                }
                found => assert_eq!(found, expected, "{fault}, item {i}"),
            }
        }
        assert_eq!(tokens(&drawn), tokens(&redrawn), "{fault}");
    }
    let metrics = server.metrics().await;
    let value = |name: &str| metrics.value(name, &[("model", "llama-pm")]);
    assert_eq!(value("plumb_isolated_inputs_total"), 2.0 * poisoned.len() as f64);
    assert!(value("plumb_batch_failures_total") >= value("plumb_isolated_inputs_total"));
    assert!(value("plumb_batch_reruns_total") > 0.0);
    assert!(metrics.trouble("llama-pm", "1", "batch_failed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_held_a_nan_are_as_good_as_new() {
    const POISON: u32 = 279;
    let (pm, lm) = (Copied::of("llama-pm").poisoned(POISON), Copied::of("llama-lm").poisoned(POISON));
    let launch = Launch::of(["llama-pm", "llama-lm"]).model("pm", pm.path()).model("lm", lm.path());
    // Too little room to keep what all inputs leave.
    let server = launch.flags("--kv-cache-mib 1 --max-batch-tokens 512").start().await;
    let client = server.client().await;
    let mut inputs = inputs(240);
    for (sound, changed) in [("llama-pm", "pm"), ("llama-lm", "lm")] {
        let expected = score_all(&client, sound, &inputs, 8).await;
        for tokens in inputs.iter_mut().step_by(3) {
            let last = tokens.len() - 1;
            tokens[last / 2] = POISON;
        }
        for _ in 0..2 {
            let found = score_all(&client, changed, &inputs, 8).await;
            let is_wrong = |(tokens, (found, expected)): (&Vec<u32>, (&Scored, &Scored))| match tokens.contains(&POISON)
            {
                true => !matches!(found, Err((Code::Internal, _))),
                false => found != expected,
            };
            let wrong: Vec<_> =
                (0..inputs.len()).filter(|&i| is_wrong((&inputs[i], (&found[i], &expected[i])))).collect();
            assert!(wrong.is_empty(), "{wrong:?} of {changed}");
        }
        inputs = self::inputs(240);
    }
    let metrics = server.metrics().await;
    assert!(metrics.value("plumb_prefix_evictions_total", &[]) > 0.0, "pages were used again");
}

/// A server whose engine takes ten minutes for a step from now on, with a call in flight.
async fn stuck(flags: &str) -> (Server, Faults, tokio::task::JoinHandle<plumb_client::CallError>) {
    let faults = Faults::none();
    let server = faults.among(Launch::of(["llama-pm"]).flags(flags)).start().await;
    let client = server.client().await;
    faults.set("stuck-engine 600000");
    let call = tokio::spawn(async move { refused(client.score(items(None, vec![ids(&[1, 2, 3])])).await) });
    server.until("the call waits for its step", |m| m.value("plumb_admitted_tokens", &[]) > 0.0).await;
    (server, faults, call)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_engine_is_given_up_with_its_own_exit_code() {
    let faults = Faults::none();
    let launch = faults.among(Launch::of(["llama-pm"]).flags("--stall-timeout-secs 0.5"));
    let mut server = launch.start().await;
    let client = server.client().await;
    let mut health = server.health().await;
    assert_eq!(health.message().await.unwrap().unwrap().status(), Serving);
    faults.set("stuck-engine 600000");
    let error = refused(client.score(items(None, vec![ids(&[1, 2, 3])])).await);
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert!(error.retry_after.is_some_and(|after| !after.is_zero()), "{error:?}");
    assert_eq!(health.message().await.unwrap().unwrap().status(), NotServing);
    assert_eq!(server.exit_code().await, 75, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_fails_at_everything_is_given_up_with_its_own_exit_code() {
    let faults = Faults::none();
    let launch = faults.among(Launch::of(["llama-pm", "llama-lm"]));
    let mut server = launch.start().await;
    let client = server.client().await;
    // The token that a device is tried out with.
    faults.set("kernel-error 0");
    let request = v1::GenerateRequest { model: named("llama-lm"), prompt: Some(ids(&[0])), ..Default::default() };
    let error = refused(call::generate(&client, request).await);
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert_eq!(server.exit_code().await, 71, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_step_does_not_hold_a_shutdown_up() {
    let (mut server, _faults, call) = stuck("--drain-timeout-secs 0.5").await;
    let mut health = server.health().await;
    assert_eq!(health.message().await.unwrap().unwrap().status(), Serving);
    server.terminate();
    assert_eq!(health.message().await.unwrap().unwrap().status(), NotServing);
    let error = call.await.unwrap();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert!(error.retry_after.is_some(), "{error:?}");
    assert_eq!(server.exit_code().await, 0, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_drain() {
    let (mut server, _faults, call) = stuck("--drain-timeout-secs 3600").await;
    let mut health = server.health().await;
    assert_eq!(health.message().await.unwrap().unwrap().status(), Serving);
    server.terminate();
    assert_eq!(health.message().await.unwrap().unwrap().status(), NotServing);
    server.terminate();
    assert_eq!(call.await.unwrap().code, Code::Unavailable);
    assert_eq!(server.exit_code().await, 0, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_never_reads_does_not_hold_a_shutdown_up() {
    let lm = Copied::long_lm();
    let launch = Launch::new().model("lm", lm.path()).flags("--drain-timeout-secs 0.5");
    let mut server = launch.start().await;
    let client = server.client().await;
    let _unread = occupy(&client, "lm").await;
    server.terminate();
    assert_eq!(server.exit_code().await, 0, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_accepted_before_a_shutdown_is_answered_and_the_rest_is_unavailable() {
    let faults = Faults::none();
    let launch = faults.among(Launch::of(["llama-pm"]).flags("--max-batch-sequences 2"));
    let mut server = launch.start().await;
    let client = server.client().await;
    let inputs = inputs(24);
    let call = |tokens: &[u32]| items(None, vec![ids(tokens)]);
    let mut expected = Vec::new();
    for tokens in &inputs {
        expected.push(rewards(&client, call(tokens)).await);
    }
    // The first step takes until all are in flight.
    faults.set("stuck-engine 3000");
    let accepted: Vec<_> = inputs
        .iter()
        .map(|tokens| (client.clone(), call(tokens)))
        .map(|(client, call)| tokio::spawn(async move { rewards(&client, call).await }))
        .collect();
    let all = |m: &Exposition| m.value("plumb_requests_in_flight", &[]) == 24.0;
    server.until("all calls are in flight", all).await;
    faults.set("stuck-engine 100");
    let mut health = server.health().await;
    assert_eq!(health.message().await.unwrap().unwrap().status(), Serving);
    server.terminate();
    assert_eq!(health.message().await.unwrap().unwrap().status(), NotServing);
    // Health says so first: until the server takes nothing new, a call may still come in, along the open connection.
    for _ in 0..20 {
        match client.score(call(&inputs[0])).await {
            Ok(_) => {}
            error => assert_eq!(refused(error).code, Code::Unavailable),
        }
    }
    for (accepted, expected) in accepted.into_iter().zip(expected) {
        assert_eq!(accepted.await.unwrap(), expected);
    }
    assert_eq!(server.exit_code().await, 0, "{}", server.log());
}
