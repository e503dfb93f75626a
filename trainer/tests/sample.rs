//! Samples are asked of a server, in the order of the lines, and go on where they stopped.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use clap::Parser;
use futures::{Stream, stream};
use plumb_client::v1;
use plumb_client::v1::generation_server::{Generation, GenerationServer};
use plumb_client::v1::models_server::{Models, ModelsServer};
use plumb_trainer::{Error, Sampled, Sampling, sample};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// Says after a prompt: its last words, and the number that the seed drew. `refuse` in a prompt is refused.
#[derive(Clone)]
struct Fake {
    calls: watch::Sender<usize>,
    /// Until so many calls have come, none is answered.
    hold: usize,
    digest: &'static str,
    requests: Arc<Mutex<Vec<v1::GenerateRequest>>>,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Generation for Fake {
    type GenerateStream = Out<v1::GenerateResponse>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.requests.lock().unwrap().push(request.clone());
        self.calls.send_modify(|calls| *calls += 1);
        self.calls.subscribe().wait_for(|calls| *calls >= self.hold).await.unwrap();
        let words = match request.prompt.unwrap().input.unwrap() {
            v1::input::Input::Text(text) => text,
            v1::input::Input::Conversation(turns) => turns.messages.last().unwrap().content.clone(),
            v1::input::Input::TokenIds(_) => String::new(),
        };
        if words.contains("refuse") {
            return Err(Status::invalid_argument("refused"));
        }
        let seed = request.sampling.unwrap().seed.unwrap();
        let pieces = [
            v1::GenerateResponse { text: format!("{words}/"), ..Default::default() },
            v1::GenerateResponse { text: seed.to_string(), end: Some(v1::SampleEnd::default()), ..Default::default() },
        ];
        // A stream that breaks off, where it is asked for.
        let kept = if words.contains("breaks") { 1 } else { 2 };
        Ok(Response::new(Box::pin(stream::iter(pieces.into_iter().take(kept).map(Ok)))))
    }
}

#[tonic::async_trait]
impl Models for Fake {
    async fn get_model(&self, request: Request<v1::GetModelRequest>) -> Result<Response<v1::GetModelResponse>, Status> {
        let name = request.into_inner().model.unwrap().name;
        let model = v1::ModelIdentity { name, version: 3, weights_digest: self.digest.to_owned() };
        let status = v1::ModelStatus { model: Some(model), ..Default::default() };
        Ok(Response::new(v1::GetModelResponse { model: Some(status) }))
    }

    async fn list_models(&self, _: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn load_version(
        &self,
        _: Request<v1::LoadVersionRequest>,
    ) -> Result<Response<v1::LoadVersionResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn unload_version(
        &self,
        _: Request<v1::UnloadVersionRequest>,
    ) -> Result<Response<v1::UnloadVersionResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn set_label(&self, _: Request<v1::SetLabelRequest>) -> Result<Response<v1::SetLabelResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn set_traffic(&self, _: Request<v1::SetTrafficRequest>) -> Result<Response<v1::SetTrafficResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type WatchModelsStream = Out<v1::WatchModelsResponse>;

    async fn watch_models(
        &self,
        _: Request<v1::WatchModelsRequest>,
    ) -> Result<Response<Self::WatchModelsStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// A server, and a folder.
struct Work {
    folder: tempfile::TempDir,
    _runtime: Runtime,
    url: String,
    requests: Arc<Mutex<Vec<v1::GenerateRequest>>>,
}

impl Work {
    fn new(hold: usize, digest: &'static str) -> Self {
        let runtime = Runtime::new().unwrap();
        let fake = Fake { calls: watch::Sender::new(0), hold, digest, requests: Arc::default() };
        let requests = fake.requests.clone();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server =
            Server::builder().add_service(GenerationServer::new(fake.clone())).add_service(ModelsServer::new(fake));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { folder: tempfile::tempdir().unwrap(), _runtime: runtime, url, requests }
    }

    fn write(&self, lines: &[Value]) -> PathBuf {
        let path = self.folder.path().join("in.jsonl");
        fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        path
    }

    /// With options as on the command line.
    fn sample(&self, input: &Path, output: &str, options: &str) -> Result<Sampled, Error> {
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            sampling: Sampling,
        }
        let begin = ["x", "--model", "lm", "--server", &self.url];
        let cli = Cli::parse_from(begin.into_iter().chain(options.split_whitespace()));
        sample(&[input.to_owned()], &self.folder.path().join(output), &cli.sampling, &mut |_| ())
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[test]
fn the_rejected_side_is_a_sample_from_the_same_prompt() {
    let work = Work::new(0, "d");
    let input = work.write(&[
        json!({"prompt": "Q: ", "chosen": "yes", "rejected": "no"}),
        json!({"prompt": [turn("user", "Hi")], "chosen": [turn("assistant", "Hello")], "rejected": [turn("assistant", "?")]}),
        json!({"chosen": [turn("user", "Hi"), turn("assistant", "Hey")], "rejected": []}),
        json!({"chosen": "no prompt", "rejected": ""}),
        json!({"prompt": "no chosen"}),
    ]);
    assert_eq!(
        work.sample(&input, "out.jsonl", "--temperature 0.5 --stop END").unwrap(),
        Sampled { lines: 3, kept: 0 }
    );
    let lines = work.lines("out.jsonl");
    let mut seeds = Vec::new();
    for (line, (prompt, chosen, said)) in lines.iter().zip([
        (json!("Q: "), json!("yes"), "Q: /"),
        (json!([turn("user", "Hi")]), json!([turn("assistant", "Hello")]), "Hi/"),
        (json!([turn("user", "Hi")]), json!([turn("assistant", "Hey")]), "Hi/"),
    ]) {
        assert_eq!((&line["prompt"], &line["chosen"]), (&prompt, &chosen));
        let rejected = line["rejected"].as_str().unwrap_or_else(|| line["rejected"][0]["content"].as_str().unwrap());
        seeds.push(rejected.strip_prefix(said).unwrap().to_owned());
        assert_eq!(line["rejected"].is_array(), chosen.is_array());
    }
    seeds.sort();
    seeds.dedup();
    assert_eq!(seeds.len(), 3, "each has a seed of its own");
    let request = work.requests.lock().unwrap()[0].clone();
    assert_eq!(request.model.unwrap().choice, Some(v1::model_spec::Choice::Version(3)));
    assert_eq!(
        (request.sampling.unwrap().temperature, request.stopping.unwrap().stop_strings),
        (Some(0.5), vec!["END".into()])
    );
    assert_eq!(work.names(), ["in.jsonl", "out.jsonl"]);
    assert!(work.sample(&input, "out.jsonl", "").unwrap_err().to_string().contains("exists"));
    let strict = work.sample(&input, "other.jsonl", "--max-bad-lines 1").unwrap_err().to_string();
    assert!(strict.contains("line 5"), "{strict}");
}

#[test]
fn rows_do_not_depend_on_how_many_calls_are_in_flight() {
    let prompts = [
        json!({"task_id": "T/1", "prompt": "one", "entry_point": "f"}),
        json!({"prompt": "two", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "two", "chosen": "a", "rejected": "c"}),
    ];
    // All six calls come before any is answered.
    let (together, one_by_one) = (Work::new(6, "d"), Work::new(0, "d"));
    let rows = |work: &Work, options: &str| {
        let input = work.write(&prompts);
        let sampled = work.sample(&input, "out.jsonl", &format!("--samples 3 {options}")).unwrap();
        assert_eq!(sampled.lines, 6);
        work.lines("out.jsonl")
    };
    let expected = rows(&one_by_one, "--concurrency 1");
    assert_eq!(rows(&together, "--concurrency 6"), expected);
    let ids: Vec<&Value> = expected.iter().map(|row| &row["id"]).collect();
    assert!(
        ids[..3].iter().all(|id| **id == json!("T/1")) && ids[3..].iter().all(|id| *id == ids[3] && id.is_string())
    );
    let mut responses: Vec<&str> = expected.iter().map(|row| row["response"].as_str().unwrap()).collect();
    assert!(responses[..3].iter().all(|response| response.starts_with("one/")), "{responses:?}");
    responses.sort();
    responses.dedup();
    assert_eq!(responses.len(), 6);
    assert_ne!(rows(&Work::new(0, "d"), "--seed 1"), expected);
}

#[test]
fn what_was_interrupted_goes_on() {
    let work = Work::new(0, "d");
    let prompts = |word: &str| ["one", "two", word, "four"].map(|prompt| json!({"prompt": prompt}));
    let whole = work.sample(&work.write(&prompts("breaks")[..2]), "whole.jsonl", "--samples 1").unwrap();
    assert_eq!(whole.lines, 2);
    let input = work.write(&prompts("refuse"));
    let error = work.sample(&input, "out.jsonl", "--samples 1 --concurrency 1").unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
    let names = work.names();
    let unfinished = names.iter().find(|name| name.ends_with(".unfinished")).unwrap();
    assert!(!names.contains(&"out.jsonl".to_owned()));
    assert_eq!(work.lines(unfinished), work.lines("whole.jsonl"));
    // As many bytes, so that it is the same input; and half a line, as a crash leaves it.
    let input = work.write(&prompts("three!"));
    let path = work.folder.path().join(unfinished);
    let half = fs::read_to_string(&path).unwrap() + "{\"id";
    fs::write(&path, half).unwrap();
    let before = work.requests.lock().unwrap().len();
    let sampled = work.sample(&input, "out.jsonl", "--samples 1").unwrap();
    assert_eq!(sampled, Sampled { lines: 4, kept: 2 });
    assert_eq!(work.requests.lock().unwrap().len() - before, 2);
    let prompts: Vec<Value> = work.lines("out.jsonl").iter().map(|row| row["prompt"].clone()).collect();
    assert_eq!(prompts, ["one", "two", "three!", "four"]);

    // With other options it begins again.
    let refused = work.write(&[json!({"prompt": "one"}), json!({"prompt": "breaks"})]);
    for seed in ["--seed 1", "--seed 2", "--seed 1"] {
        let error = work.sample(&refused, "again.jsonl", &format!("--samples 1 {seed}")).unwrap_err().to_string();
        assert!(error.contains("without an end"), "{error}");
    }
    let begun = work.names().iter().filter(|name| name.starts_with(".again")).count();
    assert_eq!(begun, 2);
}
