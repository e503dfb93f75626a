//! Starts, watches and stops the real server.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use plumb_client::{Client, ClientOptions, RetryPolicy};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::fixture::fixture;
use crate::{Exposition, binary};

/// How long something that has to happen may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A server that is about to be started.
#[derive(Debug)]
pub struct Launch {
    command: Command,
    folder: TempDir,
    hub: Option<TcpListener>,
}

impl Launch {
    /// On free ports, with one compute thread and little memory, and room for generations that last longer than a test.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary("plumb-server"));
        // What the developer's shell has set is not the test's.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["PLUMB_", "HF_", "RUST_LOG"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name.as_ref());
            }
        }
        // As environment variables, so that a test's flags come first.
        command
            .env("PLUMB_PORT", "0")
            .env("PLUMB_PROMETHEUS_PORT", "0")
            .env("PLUMB_PORT_FILE", folder.path().join("ports.json"))
            .env("PLUMB_THREADS", "1")
            .env("PLUMB_KV_CACHE_MIB", "16")
            .env("PLUMB_MAX_NEW_TOKENS_LIMIT", "60000")
            // How much is let in would follow from the speed, which is any in a test.
            .env("PLUMB_MAX_QUEUE_TOKENS", "1048576")
            .env("HF_HOME", folder.path())
            .env("HF_HUB_OFFLINE", "1");
        Self { command, folder, hub: None }
    }

    /// With fixtures, each under its own name.
    #[must_use]
    pub fn of<'a>(fixtures: impl IntoIterator<Item = &'a str>) -> Self {
        fixtures.into_iter().fold(Self::new(), |launch, name| launch.model(name, fixture(name)))
    }

    /// With a model.
    #[must_use]
    pub fn model(mut self, name: &str, source: impl AsRef<Path>) -> Self {
        self.command.arg("--model").arg(format!("{name}={}", source.as_ref().display()));
        self
    }

    /// With a model that never gets through loading: its hub takes the request and says nothing.
    #[must_use]
    pub fn model_that_never_loads(mut self, name: &str) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        self.hub = Some(hub);
        self.env("HF_ENDPOINT", &endpoint).env("HF_HUB_OFFLINE", "0").model(name, "org/repository")
    }

    /// With flags, separated by spaces.
    #[must_use]
    pub fn flags(mut self, flags: &str) -> Self {
        self.command.args(flags.split_whitespace());
        self
    }

    /// With an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it and waits until it serves.
    pub async fn start(self) -> Server {
        let server = self.listen().await;
        server.until_health(ServingStatus::Serving).await;
        server
    }

    /// Starts it and waits until its ports are bound; its models are not loaded yet.
    pub async fn listen(self) -> Server {
        let mut server = self.spawn();
        let ports = server.folder.path().join("ports.json");
        let began = Instant::now();
        while !ports.exists() {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "does not listen: {ended:?}\n{}", server.log());
            tokio::time::sleep(POLL).await;
        }
        let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(ports).unwrap()).unwrap();
        let address = |port: &str| ports[port].as_str().unwrap().parse().unwrap();
        (server.address, server.metrics_address) = (address("grpc"), address("metrics"));
        let other = |port: &str| ports[port].as_str().map(|address| address.parse().unwrap());
        (server.admin_address, server.http_address) = (other("admin"), other("http"));
        server
    }

    /// Starts what is expected to end by itself, and answers its exit code and what it said.
    pub async fn fail(self) -> (i32, String) {
        let mut server = self.spawn();
        (server.exit_code().await, server.log())
    }

    fn spawn(mut self) -> Server {
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        self.command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let child = self.command.spawn().unwrap();
        Server {
            child,
            folder: self.folder,
            address: nowhere,
            metrics_address: nowhere,
            admin_address: None,
            http_address: None,
            _hub: self.hub,
        }
    }
}

impl Default for Launch {
    fn default() -> Self {
        Self::new()
    }
}

/// A server that runs. It is killed when dropped; if a test fails, its log is shown.
#[derive(Debug)]
pub struct Server {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
    metrics_address: SocketAddr,
    admin_address: Option<SocketAddr>,
    http_address: Option<SocketAddr>,
    _hub: Option<TcpListener>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the server:\n{}---", self.log());
        }
    }
}

impl Server {
    /// Where rpcs are taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where models are changed, if not there.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Where HTTP is answered, if it is.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// Where metrics and probes are taken.
    #[must_use]
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics_address
    }

    /// Where rpcs are taken, for a client.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A client that takes every answer as it comes: it never tries again.
    pub async fn client(&self) -> Client {
        self.client_with(|options| options.retry = RetryPolicy::none()).await
    }

    /// A client with other options than the defaults.
    pub async fn client_with(&self, change: impl FnOnce(&mut ClientOptions)) -> Client {
        let mut options = ClientOptions::new(self.url());
        change(&mut options);
        Client::connect(options).await.unwrap()
    }

    /// A connection, for what the client does not do.
    pub async fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url()).unwrap().connect().await.unwrap()
    }

    /// What it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Its health, now and whenever it changes.
    pub async fn health(&self) -> Streaming<HealthCheckResponse> {
        let mut client = HealthClient::new(self.channel().await);
        client.watch(HealthCheckRequest::default()).await.unwrap().into_inner()
    }

    /// Waits for a state of health.
    pub async fn until_health(&self, wanted: ServingStatus) {
        let mut changes = self.health().await;
        loop {
            match tokio::time::timeout(PATIENCE, changes.message()).await {
                Ok(Ok(Some(change))) if change.status() == wanted => return,
                Ok(Ok(Some(_))) => {}
                other => panic!("never {wanted:?}: {other:?}"),
            }
        }
    }

    /// Waits until it serves, by the probe beside the rpcs: for servers that ask for a certificate.
    pub async fn until_ready(&self) {
        let began = Instant::now();
        while self.page("/readyz").await.0 != 200 {
            assert!(began.elapsed() < PATIENCE, "never ready");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Answers the text of a page beside the rpcs, such as `/metrics`, and its status.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.metrics_address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.metrics_address);
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Its metrics.
    pub async fn metrics(&self) -> Exposition {
        self.read_metrics().await.0
    }

    async fn read_metrics(&self) -> (Exposition, String) {
        let (status, text) = self.page("/metrics").await;
        assert_eq!(status, 200, "{text}");
        (Exposition::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}")), text)
    }

    /// Waits until the metrics show something.
    pub async fn until(&self, what: &str, shown: impl Fn(&Exposition) -> bool) -> Exposition {
        let began = Instant::now();
        loop {
            let (metrics, text) = self.read_metrics().await;
            if shown(&metrics) {
                return metrics;
            }
            assert!(began.elapsed() < PATIENCE, "the metrics never show that {what}:\n{text}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks it to stop, as an orchestrator does.
    pub fn terminate(&self) {
        // The shell's own `kill` is everywhere.
        let status = Command::new("sh").arg("-c").arg(format!("kill -s TERM {}", self.child.id())).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end and answers its exit code.
    pub async fn exit_code(&mut self) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("{status}"));
            }
            assert!(began.elapsed() < PATIENCE, "does not end");
            tokio::time::sleep(POLL).await;
        }
    }
}
