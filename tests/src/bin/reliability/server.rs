//! Starts, calls, watches, stops and kills a real server.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use plumb_client::{Client, ClientOptions, RetryPolicy};
use plumb_tests::Exposition;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::process::{self, Held};

/// How long something that has to happen may take.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);
/// Bytes that a caller who does not read is sent. In messages of a token each, some 250: at a thousand that wait, h2 takes
/// the server for an attacker and ends the connection.
const WINDOW: u32 = 4 << 10;

/// How a server is started.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    ports: (u16, u16),
    cores: Option<String>,
}

impl Launch {
    /// On free ports of this machine.
    pub(crate) fn of(program: &Path) -> Self {
        let program = program.to_owned();
        Self { program, arguments: Vec::new(), environment: Vec::new(), ports: (0, 0), cores: None }
    }

    /// With a model.
    pub(crate) fn model(mut self, name: &str, source: &Path) -> Self {
        self.arguments.extend(["--model".to_owned(), format!("{name}={}", source.display())]);
        self
    }

    /// With flags, separated by spaces.
    pub(crate) fn flags(mut self, flags: &str) -> Self {
        self.arguments.extend(flags.split_whitespace().map(str::to_owned));
        self
    }

    /// With so many compute threads; `None` leaves it to the server.
    pub(crate) fn threads(self, threads: Option<usize>) -> Self {
        match threads {
            Some(threads) => self.flags(&format!("--threads {threads}")),
            None => self,
        }
    }

    /// With an environment variable.
    pub(crate) fn variable(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// On these ports, for rpcs and for metrics.
    pub(crate) fn ports(self, ports: (u16, u16)) -> Self {
        Self { ports, ..self }
    }

    /// On these cores only, as `taskset -c` takes them.
    pub(crate) fn cores(self, cores: Option<String>) -> Self {
        Self { cores, ..self }
    }

    /// Starts it and waits until it serves. Its log goes into `folder`.
    pub(crate) async fn start(&self, folder: &Path) -> Result<Server> {
        let server = self.spawn(folder).await?;
        let began = Instant::now();
        let client = server.client()?;
        while !matches!(client.health("").await, Ok(ServingStatus::Serving)) {
            if began.elapsed() > PATIENCE {
                bail!("the server does not serve\n{}", server.log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(server)
    }

    async fn spawn(&self, folder: &Path) -> Result<Server> {
        let place = tempfile::Builder::new().prefix("server-").tempdir_in(folder)?.keep();
        let (port_file, log) = (place.join("ports.json"), place.join("log"));
        let mut command = match &self.cores {
            None => Command::new(&self.program),
            Some(cores) => {
                let mut command = Command::new("taskset");
                command.args(["-c", cores]).arg(&self.program);
                command
            }
        };
        // What the shell has set is not the experiment's.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["PLUMB_", "HF_", "RUST_LOG"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name.as_ref());
            }
        }
        let output = std::fs::File::create(&log)?;
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PLUMB_PORT", self.ports.0.to_string())
            .env("PLUMB_PROMETHEUS_PORT", self.ports.1.to_string())
            .env("PLUMB_PORT_FILE", &port_file)
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().with_context(|| format!("starting {}", self.program.display()))?;
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut server = Server { child, log, address: nowhere, metrics_address: nowhere };
        let began = Instant::now();
        while !port_file.exists() {
            let ended = server.child.try_wait()?;
            if ended.is_some() || began.elapsed() > PATIENCE {
                bail!("the server does not listen: {ended:?}\n{}", server.log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
        let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(&port_file)?)?;
        let address = |port: &str| -> Result<SocketAddr> { Ok(ports[port].as_str().unwrap_or_default().parse()?) };
        (server.address, server.metrics_address) = (address("grpc")?, address("metrics")?);
        Ok(server)
    }
}

/// Two ports that nobody listens on now.
pub(crate) fn free_ports() -> Result<(u16, u16)> {
    let listeners = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((listeners.0.local_addr()?.port(), listeners.1.local_addr()?.port()))
}

/// A server that runs. It is killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
    address: SocketAddr,
    metrics_address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// For clients.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client that takes every answer as it comes: it never tries again. It has connections of its own.
    pub(crate) fn client(&self) -> Result<Client> {
        client_of(&self.url(), RetryPolicy::none())
    }

    /// A connection with a small window, for a reader that stops to read and shall be noticed soon.
    pub(crate) async fn narrow_channel(&self) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(self.url())?;
        Ok(endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW).connect().await?)
    }

    /// What it holds now.
    pub(crate) fn held(&self) -> Result<Held> {
        Held::by(self.pid())
    }

    /// Its metrics.
    pub(crate) async fn metrics(&self) -> Result<Exposition> {
        let mut stream = TcpStream::connect(self.metrics_address).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.metrics_address);
        stream.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        let (_, body) = response.split_once("\r\n\r\n").context("no page of metrics")?;
        Exposition::parse(body).map_err(|error| anyhow::anyhow!("metrics: {error}"))
    }

    /// The end of its log.
    pub(crate) fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Asks it to stop, as an orchestrator does.
    pub(crate) fn terminate(&self) -> Result<()> {
        process::terminate(self.pid())
    }

    /// Ends it at once, as the out-of-memory killer does, and waits for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        process::kill(self.pid())?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end; answers the exit code, or `None` if a signal ended it or it did not end in time.
    pub(crate) async fn exit_code(&mut self, patience: Duration) -> Result<Option<i32>> {
        let began = Instant::now();
        while began.elapsed() < patience {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(None)
    }
}

/// A client with connections of its own.
pub(crate) fn client_of(url: &str, retry: RetryPolicy) -> Result<Client> {
    let mut options = ClientOptions::new(url);
    options.retry = retry;
    Ok(Client::connect_lazy(options)?)
}
