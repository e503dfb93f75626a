//! Puts the server together, and runs it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{OptionFuture, try_join_all};
use futures::{Stream, StreamExt as _, stream};
use metrics_exporter_prometheus::PrometheusHandle;
use plumb_model::decoder::Device;
use plumb_model::decoder::StepSize;
use plumb_model::loaded::{Background, DTypeChoice, LoadOptions};
use plumb_model::text::HhhPrompts;
use plumb_proto::v1;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;

use crate::access::{Access, is_this_machine};
use crate::admission::{Admission, AdmissionLimits, Estimator};
use crate::config::{Config, ConfigError, DType};
use crate::connections::tls::Tls;
use crate::connections::{self, Incoming, Kind};
use crate::device::Places;
use crate::engine::{EngineOptions, Loss};
use crate::error::{Error, Result};
use crate::gateway::{self, Gateway};
use crate::health::{Health, Phase};
use crate::layers;
use crate::layers::admission::Gate;
use crate::layers::inflow::Inflow;
use crate::pool::CpuPool;
use crate::record::Recorder;
use crate::registry::{Registry, Root};
use crate::services::{Context, GenerationService, ModelsService, PreferenceService, TokensService};
use crate::shutdown::{self, Shutdown};
use crate::telemetry::events::{ConfigLoaded, Fatal, Listening, OpenToNetwork, Serving, ThreadPanicked};
use crate::telemetry::status::Status;
use crate::telemetry::{exporter, metrics, tracing};

/// From the loss of the engine to the end of the process, if it does not come by itself: callers are told within a second.
const LAST_RESORT: Duration = Duration::from_secs(5);
/// Calls that a client may open and take back before they were looked at: with more of them at a time, its connection
/// ends (rapid reset, CVE-2023-44487).
const MAX_RESET_STREAMS: usize = 20;
/// The same for calls that end because the client broke the protocol (CVE-2025-8671).
const MAX_ERROR_STREAMS: usize = 256;
/// What a sender may send of a call before the server reads on. A call whose message waits for room holds so much memory
/// beside it. On a line of 10 ms a single call gets 25 MB/s out of it, more than any engine scores.
const STREAM_WINDOW: u32 = 256 << 10;
/// The same of all calls of a connection: sixteen that wait do not hold up the others.
const CONNECTION_WINDOW: u32 = 16 * STREAM_WINDOW;

/// A message to health or reflection, which anybody may send.
const MAX_INFRASTRUCTURE_BYTES: usize = 64 << 10;

/// Why the server ended although nobody asked it to.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// The configuration is wrong: exit code 64, as sysexits.h has it for usage.
    Configuration(Error),
    /// A model does not load, or a port is taken: exit code 1.
    Start(Error),
    /// The engine cannot compute any more. Exit code 70 if it died, an internal software error; 71 if the device fails
    /// whatever it is given, an error of the system; 75 if the engine got stuck: another process may well do better.
    Engine(Loss),
}

impl Failure {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 64,
            Self::Start(_) => 1,
            Self::Engine(Loss::Died) => 70,
            Self::Engine(Loss::Broken) => 71,
            Self::Engine(Loss::Stuck) => 75,
        }
    }

    fn error(&self) -> &Error {
        match self {
            Self::Configuration(error) | Self::Start(error) => error,
            Self::Engine(_) => &Error::DeviceLost,
        }
    }
}

impl ConfigError {
    /// Prints what has to be said and gives the exit code.
    #[must_use]
    #[expect(
        clippy::print_stdout,
        clippy::print_stderr,
        reason = "the logs are not set up yet, and this is the answer"
    )]
    pub fn report(self) -> ExitCode {
        match self {
            // Help and version are no errors.
            Self::Flags(error) => {
                let _ = error.print();
                ExitCode::from(if error.use_stderr() { 64 } else { 0 })
            }
            Self::Printed(origins) => {
                for origin in origins {
                    println!("{:<28} {:<40} # {}", origin.option, origin.value, origin.origin);
                }
                ExitCode::SUCCESS
            }
            Self::Wrong(message) => {
                eprintln!("error: {message}\n\nFor more information, try '--help'.");
                ExitCode::from(64)
            }
        }
    }
}

/// Runs a server until it is asked to stop by a signal.
#[must_use]
#[expect(clippy::print_stderr, reason = "the logs may not be set up yet")]
pub fn run(config: Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        let guard = tracing::init(&config.telemetry).map_err(Failure::Configuration);
        if let Err(failure) = &guard {
            eprintln!("error: {}", failure.error());
        }
        let _guard = guard?;
        // The usual hook prints the message, and one about a slice of a text prints the text.
        std::panic::set_hook(Box::new(|panic| ThreadPanicked { location: panic.location() }.emit()));
        let ended = serve(config).await;
        if let Err(failure) = &ended {
            Fatal { error: failure.error() }.emit();
        }
        ended
    });
    // A load that is still reading does not hold the process up.
    runtime.shutdown_background();
    ended.map_or_else(|failure| ExitCode::from(failure.exit_code()), |()| ExitCode::SUCCESS)
}

async fn serve(config: Config) -> Result<(), Failure> {
    ConfigLoaded { origins: &config.origins }.emit();
    let asked = shutdown::asked().map_err(Failure::Start)?;
    let server = Server::start(config).await?;
    end_with(server.lost.clone()).map_err(Failure::Start)?;
    server.run(asked).await
}

/// Ends the process some time after the engine is lost, from a thread of its own: the runtime may hang with the engine.
fn end_with(mut lost: watch::Receiver<Option<Loss>>) -> Result<()> {
    let failed = |error: std::io::Error| Error::internal(format!("cannot start a thread: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(failed)?;
    let end = move || {
        // An engine whose handles are gone has died in good order.
        let is_fatal = |loss: &Option<Loss>| loss.is_some_and(|loss| loss != Loss::Died);
        if let Ok(Some(loss)) = runtime.block_on(lost.wait_for(is_fatal)).as_deref() {
            std::thread::sleep(LAST_RESORT);
            std::process::exit(Failure::Engine(*loss).exit_code().into());
        }
    };
    std::thread::Builder::new().name("plumb-last-resort".into()).spawn(end).map(drop).map_err(failed)
}

/// A server that listens. Until it is [run](Server::run) it serves nothing.
pub struct Server {
    /// What is of use until the last moment. Dropped first: after that, nobody wonders where the engine has gone.
    #[expect(dead_code, reason = "only held")]
    background: Vec<AbortOnDropHandle<()>>,
    config: Config,
    grpc: SocketAddr,
    admin: Option<SocketAddr>,
    metrics: SocketAddr,
    registry: Arc<Registry>,
    lost: watch::Receiver<Option<Loss>>,
    recorder: Arc<Recorder>,
    shutdown: Shutdown,
}

impl Server {
    /// Binds the ports and starts the engine. Health checks are answered from now on, with NOT_SERVING.
    ///
    /// # Errors
    /// If the HHH prompt, a certificate or a file of keys makes no sense, a port is taken or threads cannot be started.
    pub async fn start(config: Config) -> Result<Self, Failure> {
        let hhh = match &config.hhh_prompt_file {
            Some(path) => HhhPrompts::from_file(path).map_err(|error| Failure::Configuration(error.into()))?,
            None => HhhPrompts::default(),
        };
        let exposition = metrics::install().map_err(Failure::Start)?;
        let wrong = |message| Failure::Configuration(Error::invalid("", message));
        let tls = config.tls.as_ref().map(Tls::load).transpose().map_err(wrong)?.map(Arc::new);
        let access = Access::load(&config.access, config.listen.admin.is_some()).map_err(wrong)?;
        Self::start_with(config, hhh, exposition, tls, Arc::new(access)).await.map_err(Failure::Start)
    }

    async fn start_with(
        config: Config,
        hhh: HhhPrompts,
        exposition: &'static PrometheusHandle,
        tls: Option<Arc<Tls>>,
        access: Arc<Access>,
    ) -> Result<Self> {
        connections::raise_file_limit();
        let listener = bind(&config.listen.hostname, config.listen.port).await?;
        let admin_listener = match &config.listen.admin {
            Some(admin) => Some(bind(&admin.hostname, admin.port).await?),
            None => None,
        };
        let metrics_listener = bind(&config.listen.hostname, config.listen.prometheus_port).await?;
        let http_listener = match config.listen.http_port {
            Some(port) => Some(bind(&config.listen.hostname, port).await?),
            None => None,
        };
        let (grpc, metrics) = (address(&listener)?, address(&metrics_listener)?);
        let http = http_listener.as_ref().map(address).transpose()?;
        let admin = admin_listener.as_ref().map(address).transpose()?;

        let places = Places::open(
            &config.devices,
            config.engine.batch_invariant,
            EngineOptions {
                max_batch_tokens: config.engine.max_batch_tokens,
                max_batch_sequences: config.engine.max_batch_sequences,
                max_prefill_beside_decode: config.engine.max_prefill_beside_decode,
                decode_share: config.engine.decode_share,
                prefix_cache: config.engine.prefix_cache,
                threads: config.engine.threads,
                stall_timeout: config.engine.stall_timeout,
            },
        )?;
        let lost = places.lost();
        let largest_step =
            StepSize { tokens: config.engine.max_batch_tokens, sequences: config.engine.max_batch_sequences };
        let names = || config.models.iter().map(|model| model.name.clone()).collect();
        let registry = Registry::new(
            places,
            load_options(&config, hhh),
            largest_step,
            config.engine.kv_cache_bytes.is_none().then(names),
            config.defaults.clone(),
            &config.versions,
        );
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let health = Health::new(reporter).await;
        let gate = Gate::new(config.limits.max_concurrent_requests);
        let draining = CancellationToken::new();
        let recorder = Arc::new(Recorder::start(config.recording.as_ref())?);
        let context = Arc::new(Context {
            registry: Arc::clone(&registry),
            pool: CpuPool::new(config.engine.tokenization_workers)?,
            admission: Admission::new(AdmissionLimits {
                max_queue_tokens: config.limits.max_queue_tokens,
                max_batch_tokens: config.engine.max_batch_tokens,
            }),
            estimator: Estimator::default(),
            prefix_cache: config.engine.prefix_cache,
            limits: config.limits.clone(),
            recorder: Arc::clone(&recorder),
            draining: draining.clone(),
            aborted: gate.aborted(),
        });

        let routes =
            services(&context)?.add_service(health_service.max_decoding_message_size(MAX_INFRASTRUCTURE_BYTES));
        let inflow =
            Inflow::new(config.limits.max_request_bytes, config.limits.max_message_bytes, config.http2.receive_timeout);
        let gateway = Gateway::new(&context, Arc::clone(&inflow), health.ready()).routes(|calls| {
            layers::around_work(calls, Arc::clone(&access), config.http2.receive_timeout, Arc::clone(&gate))
        });
        let routes = layers::around(
            routes.into_axum_router(),
            Arc::clone(&access),
            config.http2.receive_timeout,
            Arc::clone(&gate),
            inflow,
        );
        let accepting = CancellationToken::new();
        let listeners = [(Some(listener), Kind::Public), (admin_listener, Kind::Admin)];
        let served = listeners.into_iter().filter_map(|(listener, kind)| {
            let incoming = Incoming::new(listener?, kind, config.connections, tls.clone());
            let routes = Routes::from(routes.clone());
            let stop = accepting.clone().cancelled_owned();
            Some(builder(&config).add_routes(routes).serve_with_incoming_shutdown(incoming, stop))
        });
        let served = try_join_all(served.collect::<Vec<_>>());
        let gateway = http_listener.map(|listener| {
            let incoming = Incoming::new(listener, Kind::Http, config.connections, tls.clone());
            let bounds = gateway::serve::Bounds::new(config.connections, &config.http2);
            gateway::serve::serve(incoming, gateway, bounds, accepting.clone())
        });
        let connections = tokio::spawn(async move {
            let (served, _) = tokio::join!(served, OptionFuture::from(gateway));
            served.map(drop).map_err(|error| Error::internal(format!("listening: {error}")))
        });

        let probes = exporter::Probes { alive: health.alive(), ready: health.ready() };
        let status = Status::new(exposition.clone(), Arc::clone(&registry), probes.clone())?;
        let routes = exporter::routes(exposition.clone(), probes, Arc::clone(&status));
        let exporter = exporter::serve(metrics_listener, routes);
        let (follower, kinds, followed) = (Arc::clone(&health), registry.kinds(), lost.clone());
        let background = vec![
            AbortOnDropHandle::new(tokio::spawn(exporter)),
            AbortOnDropHandle::new(tokio::spawn(async move { access.follow().await })),
            AbortOnDropHandle::new(tokio::spawn(follow(tls))),
            AbortOnDropHandle::new(tokio::spawn(metrics::upkeep(exposition))),
            AbortOnDropHandle::new(tokio::spawn(status.follow())),
            AbortOnDropHandle::new(tokio::spawn(async move { follower.follow(kinds, followed).await })),
        ];

        Listening { grpc, admin, http, metrics }.emit();
        warn_if_open(&config, grpc, admin);
        if let Some(path) = &config.listen.port_file {
            write_ports(path, grpc, [("admin", admin), ("http", http)], metrics)?;
        }
        let shutdown = Shutdown { health, gate, accepting, draining, connections };
        Ok(Self { background, config, grpc, admin, metrics, registry, lost, recorder, shutdown })
    }

    /// Where rpcs are taken.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    /// Where models are changed, if not where rpcs are taken.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Where metrics and probes are taken.
    #[must_use]
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Loads the models, serves until `asked` yields who wants an end, and stops in good order; faster if it yields
    /// another one.
    ///
    /// # Errors
    /// If a model does not load, or the engine is lost.
    pub async fn run(mut self, asked: impl Stream<Item = &'static str>) -> Result<(), Failure> {
        let mut asked = std::pin::pin!(asked.chain(stream::pending()));
        let mut asked = async || asked.next().await.unwrap_or_default();
        let by = tokio::select! {
            by = asked() => by,
            failure = self.serve() => {
                self.shutdown.give_up(failure.error().clone()).await;
                self.recorder.close(Instant::now()).await;
                return Err(failure);
            }
        };
        let health = Arc::clone(&self.shutdown.health);
        let times = self.config.shutdown;
        let deadline = Instant::now() + times.lame_duck + times.drain_timeout;
        tokio::select! {
            () = self.shutdown.run(by, times, asked()) => {
                self.recorder.close(deadline).await;
                return Ok(());
            }
            () = health.engine_lost() => {}
        }
        self.shutdown.give_up(Error::DeviceLost).await;
        self.recorder.close(Instant::now()).await;
        Err(self.loss())
    }

    /// Loads the models, then serves. Returns only if that is not possible, or not any more.
    async fn serve(&self) -> Failure {
        let loads = async {
            if let Err(error) = self.load_models().await {
                return Failure::Start(error);
            }
            let root = match self.watch_root().await {
                Ok(root) => root,
                Err(error) => return Failure::Start(error),
            };
            self.registry.finish_start();
            self.shutdown.health.set_phase(Phase::Serving).await;
            Serving { models: &self.registry.statuses() }.emit();
            if let Some(root) = root {
                root.follow().await;
            }
            std::future::pending().await
        };
        tokio::select! {
            failure = loads => failure,
            () = self.shutdown.health.engine_lost() => self.loss(),
        }
    }

    fn loss(&self) -> Failure {
        Failure::Engine(self.lost.borrow().unwrap_or(Loss::Died))
    }

    /// All are listed from the start. They are fetched beside one another, and loaded one after the other.
    async fn load_models(&self) -> Result<()> {
        let announce = |model: &crate::config::ModelConfig| {
            self.registry.announce(model.name.clone(), Some(model.version), model.source.clone())
        };
        let loads = self.config.models.iter().map(announce).collect::<Result<Vec<_>>>()?;
        try_join_all(loads.into_iter().map(|load| self.registry.load(load))).await.map(drop)
    }

    /// Brings in what lies in the watched folder, and answers what follows it from then on.
    async fn watch_root(&self) -> Result<Option<Root>> {
        let Some(mut root) = Root::new(&self.config.versions, Arc::clone(&self.registry)) else { return Ok(None) };
        root.settle().await?;
        Ok(Some(root))
    }
}

/// All services and the descriptions of them.
fn services(context: &Arc<Context>) -> Result<Routes> {
    use v1::generation_server::GenerationServer;
    use v1::models_server::ModelsServer;
    use v1::preference_server::PreferenceServer;
    use v1::tokens_server::TokensServer;

    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(plumb_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let wrong = |error| Error::internal(format!("reflection: {error}"));
    let limit = context.limits.max_message_bytes;
    macro_rules! limited {
        ($server:ident, $service:ident) => {
            $server::new($service::new(Arc::clone(context)))
                .max_decoding_message_size(limit)
                .max_encoding_message_size(limit)
        };
    }
    Ok(Routes::new(limited!(PreferenceServer, PreferenceService))
        .add_service(limited!(GenerationServer, GenerationService))
        .add_service(limited!(ModelsServer, ModelsService))
        .add_service(limited!(TokensServer, TokensService))
        .add_service(reflection().build_v1().map_err(wrong)?.max_decoding_message_size(MAX_INFRASTRUCTURE_BYTES))
        .add_service(reflection().build_v1alpha().map_err(wrong)?.max_decoding_message_size(MAX_INFRASTRUCTURE_BYTES)))
}

fn builder(config: &Config) -> tonic::transport::Server {
    let http2 = &config.http2;
    let mut builder = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(http2.keepalive_interval))
        .http2_keepalive_timeout(Some(http2.keepalive_timeout))
        .http2_max_header_list_size(http2.max_header_bytes)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESET_STREAMS))
        .http2_max_local_error_reset_streams(Some(MAX_ERROR_STREAMS))
        .max_concurrent_streams(http2.max_concurrent_streams)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    if let Some(age) = config.connections.max_age {
        // Asks clients to go elsewhere; calls in flight end where they are, until the connection is cut. tonic's own
        // grace leaves the asking out.
        builder = builder.max_connection_age(age);
    }
    builder
}

async fn follow(tls: Option<Arc<Tls>>) {
    if let Some(tls) = tls {
        tls.follow().await;
    }
}

/// A server without keys is for its own machine.
fn warn_if_open(config: &Config, grpc: SocketAddr, admin: Option<SocketAddr>) {
    let is_public = |address: SocketAddr| !is_this_machine(address.ip());
    let open_admin = config.access.is_open_to_admins() && admin.is_some_and(is_public);
    if (config.access.is_open_to_clients() && is_public(grpc)) || open_admin {
        let changes = match config.access.is_open_to_admins() {
            true if open_admin => "by everybody who reaches the admin port",
            true => "from this machine only",
            false => "with an admin's key",
        };
        OpenToNetwork { tls: config.tls.is_some(), changes }.emit();
    }
}

/// Bytes of keys and values of a model on the CPU, where nothing is said.
const DEFAULT_KV_CACHE: usize = 1 << 30;

fn load_options(config: &Config, hhh: HhhPrompts) -> LoadOptions {
    LoadOptions {
        dtype: match config.dtype {
            DType::Auto => DTypeChoice::Auto,
            DType::F32 => DTypeChoice::F32,
            DType::Bf16 => DTypeChoice::Bf16,
            DType::Fp8 => DTypeChoice::Fp8,
        },
        hhh: Arc::new(hhh),
        max_input_tokens: config.limits.max_input_tokens,
        kv_cache_bytes: config.engine.kv_cache_bytes.unwrap_or(DEFAULT_KV_CACHE),
        device: Device::default(),
        background: Background {
            threads: Some(config.engine.load_threads),
            bytes_per_second: config.engine.load_bytes_per_second,
        },
    }
}

async fn bind(hostname: &str, port: u16) -> Result<TcpListener> {
    let bound = TcpListener::bind((hostname, port)).await;
    bound.map_err(|error| Error::internal(format!("cannot listen on {hostname}:{port}: {error}")))
}

fn address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| Error::internal(format!("listening: {error}")))
}

/// Appears with its whole content, so that a test that waits for it reads all of it.
fn write_ports(
    path: &Path,
    grpc: SocketAddr,
    others: [(&str, Option<SocketAddr>); 2],
    metrics: SocketAddr,
) -> Result<()> {
    let mut ports = serde_json::json!({ "grpc": grpc, "metrics": metrics });
    for (name, address) in others {
        if let Some(address) = address {
            ports[name] = address.to_string().into();
        }
    }
    let text = ports.to_string() + "\n";
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|error| Error::internal(format!("--port-file {}: {error}", path.display())))
}
