//! A hub on this machine that serves a folder in the way of huggingface.co.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct FakeHub {
    files: TempDir,
    cache: TempDir,
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    /// Serves `org/name` with these files, of which each has its name as content; an index lists its own shards.
    fn serving(files: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let text = match *file {
                safetensors::INDEX => r#"{"weight_map": {"a": "b-1.safetensors", "c": "b-2.safetensors"}}"#,
                name => name,
            };
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (path, log) = (folder.path().to_owned(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &path, &log);
            }
        });
        Self { files: folder, cache: tempfile::tempdir().unwrap(), endpoint, requests }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: self.cache.path().to_owned(),
            token: Some("secret".to_owned()),
            offline: false,
        }
    }

    fn fetched(&self) -> Vec<String> {
        let folder = self.hub().fetch("org/name", None).unwrap();
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Answers one request and closes.
fn answer(mut stream: TcpStream, folder: &Path, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    let target = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let header = |name: &str| headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    log.lock().unwrap().push(target.clone());
    let refuse = |status: &str| format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");

    let response = if header("authorization") != Some("bearer secret") {
        refuse("401 Unauthorized")
    } else if target == "/api/models/org/name/revision/main" {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let siblings: Vec<_> = names.map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": siblings, "sha": COMMIT }).to_string();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
    } else if let Some(file) = target.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")) {
        let body = std::fs::read_to_string(folder.join(file)).unwrap();
        let (first, last) = header("range").unwrap().strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last = last.parse().map_or(body.len(), |last: usize| last + 1);
        format!(
            "HTTP/1.1 206 Partial Content\r\nETag: \"{file}-etag\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes \
             {first}-{last}/{}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}",
            body.len(),
            last - first,
            &body[first..last]
        )
    } else {
        refuse("404 Not Found")
    };
    stream.write_all(response.as_bytes()).unwrap();
}

#[test]
fn what_a_checkpoint_needs_is_fetched_and_nothing_else() {
    let unneeded = ["README.md", "pytorch_model.bin", "b-3.safetensors", "model.gguf"];
    let text = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    let check = |weights: &[&str], expected: &[&str]| {
        let fake = FakeHub::serving(&[&unneeded[..], &text, weights].concat());
        let mut expected = [&text[..], expected].concat();
        expected.sort_unstable();
        assert_eq!(fake.fetched(), expected);
    };
    check(&["model.safetensors"], &["model.safetensors"]);
    let shards = [safetensors::INDEX, "b-1.safetensors", "b-2.safetensors"];
    check(&shards, &shards);
    check(&["adapter_config.json", lora::WEIGHTS], &["adapter_config.json", lora::WEIGHTS]);
    let optional = ["chat_template.jinja", "generation_config.json", "model.safetensors", "special_tokens_map.json"];
    check(&optional, &optional);
}

#[test]
fn the_content_is_that_of_the_commit() {
    let fake = FakeHub::serving(&["config.json", "model.safetensors"]);
    let folder = fake.hub().fetch("org/name", None).unwrap();
    assert!(folder.ends_with(COMMIT));
    assert_eq!(std::fs::read_to_string(folder.join("config.json")).unwrap(), "config.json");
    let requests = fake.requests.lock().unwrap();
    assert!(requests.iter().skip(1).all(|target| target.contains(COMMIT)), "{requests:?}");
}

#[test]
fn a_second_fetch_downloads_nothing() {
    let fake = FakeHub::serving(&["config.json", "model.safetensors"]);
    fake.fetched();
    fake.requests.lock().unwrap().clear();
    fake.fetched();
    assert_eq!(*fake.requests.lock().unwrap(), ["/api/models/org/name/revision/main"]);
}

#[test]
fn offline_uses_the_cache_alone() {
    let fake = FakeHub::serving(&["config.json", "model.safetensors"]);
    let offline = Hub { offline: true, ..fake.hub() };
    let error = offline.fetch("org/name", None).unwrap_err().to_string();
    for word in ["org/name", "main", "HF_HUB_OFFLINE", fake.cache.path().to_str().unwrap()] {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    let folder = fake.hub().fetch("org/name", None).unwrap();
    fake.requests.lock().unwrap().clear();
    assert_eq!(offline.fetch("org/name", None).unwrap(), folder);
    assert_eq!(offline.fetch("org/name", Some(COMMIT)).unwrap(), folder);
    assert!(offline.fetch("org/name", Some("other")).is_err());
    assert!(fake.requests.lock().unwrap().is_empty());
}

#[test]
fn failures_say_what_to_do() {
    let fake = FakeHub::serving(&["config.json", "model.safetensors"]);
    let explained = |hub: Hub, id: &str, words: &[&str]| {
        let error = hub.fetch(id, None).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "`{word}` is not in: {error}"));
    };
    explained(Hub { token: None, ..fake.hub() }, "org/name", &["org/name", "401", "set HF_TOKEN"]);
    explained(fake.hub(), "org/other", &["org/other", "404", "check the id and the revision"]);
    let unreachable = Hub { endpoint: "http://127.0.0.1:1".to_owned(), ..fake.hub() };
    explained(unreachable, "org/name", &["127.0.0.1:1", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"]);
    let file = fake.files.path().join("model.safetensors");
    std::fs::rename(file, fake.files.path().join("model.gguf")).unwrap();
    explained(fake.hub(), "org/name", &["no safetensors", "GGUF files"]);
    std::fs::remove_file(fake.files.path().join("model.gguf")).unwrap();
    std::fs::write(fake.files.path().join("pytorch_model.bin"), "").unwrap();
    explained(fake.hub(), "org/name", &["no safetensors", "pickles"]);
}
