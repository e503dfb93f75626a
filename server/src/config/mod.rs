//! Configuration: flags, environment, a TOML file and defaults become a [`Config`] that cannot be wrong in itself.
//!
//! `args` says what the options are; `file` puts a file's values in the place of defaults; `models` reads
//! `NAME=SOURCE` lists, `devices` where they compute, `versions` what is said of versions; here the result is checked and turned into what the rest of the server asks for. Nothing is
//! opened or bound on the way, apart from the files of options.

mod args;
mod devices;
mod file;
mod models;
mod secret;
mod versions;

use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command, CommandFactory as _, FromArgMatches as _};

pub use self::args::DType;
use self::args::{ClientAuth, Flags};
pub use self::devices::{DeviceChoice, Devices};
use self::file::FileValues;
pub use self::models::ModelConfig;
pub(crate) use self::models::{check_name, version_folder};
pub use self::secret::Secret;
pub(crate) use self::versions::WantedLabel;
pub use self::versions::{SwapPolicy, VersionPolicy, Versions};
use crate::access::table::Table;

/// Everything that is decided before the server starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is loaded at start; without a watched folder at least one, if only what comes with the program.
    pub models: Vec<ModelConfig>,
    /// How versions come and go.
    pub versions: Versions,
    /// Which models an empty name means.
    pub defaults: Defaults,
    /// Where models compute.
    pub devices: Devices,
    /// Type in which weights are held.
    pub dtype: DType,
    /// Replaces the built-in HHH prompt.
    pub hhh_prompt_file: Option<PathBuf>,
    /// Sizes of the engine.
    pub engine: EngineSizes,
    /// What a call may ask for.
    pub limits: Limits,
    /// Where the server listens.
    pub listen: Listen,
    /// What connections may cost.
    pub connections: Connections,
    /// Behaviour of connections.
    pub http2: Http2,
    /// Certificates; without them, connections are plain.
    pub tls: Option<Tls>,
    /// Who may call.
    pub access: Access,
    /// How the server stops.
    pub shutdown: Shutdown,
    /// Which calls are recorded; none if unset.
    pub recording: Option<Recording>,
    /// Logs and traces.
    pub telemetry: Telemetry,
    /// Every option with its value and origin, for the log; secrets are masked.
    pub origins: Vec<Origin>,
}

/// Which model an empty name means; unset: the first of its kind.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// For `Score` and `Rank`.
    pub preference: Option<String>,
    /// For `Generate`.
    pub language: Option<String>,
}

/// Sizes of the engine.
#[derive(Clone, Debug)]
pub struct EngineSizes {
    /// Most tokens in a batch.
    pub max_batch_tokens: usize,
    /// Most sequences in a batch.
    pub max_batch_sequences: usize,
    /// Cost of prompts in a batch that also decodes.
    pub max_prefill_beside_decode: usize,
    /// Part of the engine's time for streams while others wait.
    pub decode_share: f64,
    /// Sequences may use what others have computed.
    pub prefix_cache: bool,
    /// Key-value cache of each model; `None` if it follows from what there is.
    pub kv_cache_bytes: Option<usize>,
    /// On a GPU, bits do not depend on the batch.
    pub batch_invariant: bool,
    /// Threads that load a model.
    pub load_threads: NonZeroUsize,
    /// Bytes a second that a load reads.
    pub load_bytes_per_second: Option<NonZeroU64>,
    /// Threads that compute.
    pub threads: usize,
    /// How long the engine may get no further.
    pub stall_timeout: Duration,
    /// Threads that render and tokenize.
    pub tokenization_workers: usize,
}

/// What a call may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Calls at a time.
    pub max_concurrent_requests: usize,
    /// Items, candidates or samples in a call.
    pub max_client_batch_size: usize,
    /// Tokens of work admitted and not yet done; unset: what the server does in about a second.
    pub max_queue_tokens: Option<usize>,
    /// Tokens in an input; the model may allow less.
    pub max_input_tokens: Option<usize>,
    /// Size of a message.
    pub max_message_bytes: usize,
    /// Messages that are being received, or whose work is not done.
    pub max_request_bytes: usize,
    /// New tokens that a call may ask for, per sample.
    pub max_new_tokens_limit: usize,
    /// New tokens per sample where a call does not say.
    pub default_max_new_tokens: usize,
    /// Requests of one stream that are worked on at a time.
    pub max_stream_in_flight: usize,
    /// Cut inputs over the limit where a call does not say.
    pub auto_truncate: bool,
}

/// Where the server listens.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Name or address of the interface.
    pub hostname: String,
    /// Port of the rpcs; 0 for any.
    pub port: u16,
    /// Port of the HTTP gateway, if there is one; 0 for any.
    pub http_port: Option<u16>,
    /// Port of metrics; 0 for any.
    pub prometheus_port: u16,
    /// Where models are changed, if not where all rpcs are taken.
    pub admin: Option<AdminListen>,
    /// Where the bound addresses are written.
    pub port_file: Option<PathBuf>,
}

/// Where models are changed.
#[derive(Clone, Debug)]
pub struct AdminListen {
    /// Name or address of the interface.
    pub hostname: String,
    /// Port; 0 for any.
    pub port: u16,
}

/// What connections may cost.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Open at a time, for each listener.
    pub max_connections: usize,
    /// From the first packet to the end of the handshakes.
    pub handshake_timeout: Duration,
    /// Clients are asked to reconnect after this time.
    pub max_age: Option<Duration>,
    /// From then until the connection is cut.
    pub max_age_grace: Duration,
}

/// Certificates, as files.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The server's chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities of clients' certificates.
    pub client_ca: Option<PathBuf>,
    /// Clients may come without a certificate.
    pub client_auth_optional: bool,
}

/// Behaviour of connections.
#[derive(Clone, Debug)]
pub struct Http2 {
    /// Size of a request's headers.
    pub max_header_bytes: u32,
    /// From a request's headers to its end.
    pub receive_timeout: Duration,
    /// Ping on idle connections.
    pub keepalive_interval: Duration,
    /// How long a ping may stay unanswered.
    pub keepalive_timeout: Duration,
    /// Calls at a time on a connection.
    pub max_concurrent_streams: u32,
}

/// Who may call. Files are read when the server starts, and whenever they change.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Keys for every rpc that changes nothing.
    pub api_keys: Vec<Secret>,
    /// File with more of them.
    pub api_key_file: Option<PathBuf>,
    /// Keys for every rpc.
    pub admin_api_keys: Vec<Secret>,
    /// File with more of them.
    pub admin_api_key_file: Option<PathBuf>,
    /// File with tokens and roles.
    pub tokens_file: Option<PathBuf>,
    /// Clients are known by verified certificates.
    pub client_certificates: bool,
}

impl Access {
    /// The files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.api_key_file.iter().chain(&self.admin_api_key_file).chain(&self.tokens_file)
    }

    /// Whether somebody is named who may change models.
    pub(crate) fn has_admins(&self) -> bool {
        !self.admin_api_keys.is_empty() || self.admin_api_key_file.is_some() || self.tokens_file.is_some()
    }

    /// Whether nobody is asked for anything but to change models.
    pub(crate) fn is_open_to_clients(&self) -> bool {
        let has_keys = !self.api_keys.is_empty() || self.api_key_file.is_some() || self.tokens_file.is_some();
        !has_keys && !self.client_certificates
    }

    /// Whether nobody is asked for anything.
    pub(crate) fn is_open_to_admins(&self) -> bool {
        self.is_open_to_clients() && !self.has_admins()
    }
}

/// How the server stops.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    /// From NOT_SERVING to the end of accepting.
    pub lame_duck: Duration,
    /// From there until what is in flight fails.
    pub drain_timeout: Duration,
}

/// How calls are recorded.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Where files are written.
    pub folder: PathBuf,
    /// Share of the calls.
    pub sample: f64,
    /// Size of a file.
    pub max_bytes: u64,
    /// Age of a file.
    pub max_age: Duration,
    /// Number of files.
    pub keep: usize,
    /// Files that have ended are packed.
    pub compress: bool,
}

/// Logs and traces.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// An `EnvFilter`.
    pub log: String,
    /// Logs as JSON.
    pub json_output: bool,
    /// Collector of traces.
    pub otlp_endpoint: Option<String>,
    /// Name of this service in traces.
    pub otlp_service_name: String,
}

/// An option, its value and where that comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Name as in `--name`.
    pub option: String,
    /// Its value; masked if secret.
    pub value: String,
    /// `flag`, `environment`, `file` or `default`.
    pub origin: &'static str,
}

/// Why there is no configuration.
#[derive(Debug)]
pub enum ConfigError {
    /// The flags are wrong, or help or the version was asked for.
    Flags(clap::Error),
    /// `--print-config` was asked for: every option in a line.
    Printed(Vec<Origin>),
    /// Something else is wrong.
    Wrong(String),
}

/// The flags, to be told of.
#[must_use]
pub fn command() -> Command {
    Flags::command()
}

impl Config {
    /// Reads the command line, the environment and the file that they name.
    ///
    /// # Errors
    /// What is wrong, or that only a print was asked for.
    pub fn parse(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, ConfigError> {
        let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
        let command = Flags::command();
        // The first pass finds the file; what it finds wrong is wrong whatever the file says.
        let matches = command.clone().try_get_matches_from(&arguments).map_err(ConfigError::Flags)?;
        let Some(path) = matches.get_one::<PathBuf>("config") else {
            return Self::from_matches(&command, matches, &FileValues::new());
        };
        let values = file::read(path, &command).map_err(ConfigError::Wrong)?;
        let command = file::apply(command, &values);
        let matches = command.clone().try_get_matches_from(&arguments).map_err(ConfigError::Flags)?;
        Self::from_matches(&command, matches, &values)
    }

    fn from_matches(command: &Command, matches: ArgMatches, file: &FileValues) -> Result<Self, ConfigError> {
        let origins = origins(command, &matches, file);
        let flags = Flags::from_arg_matches(&matches).map_err(ConfigError::Flags)?;
        if flags.print_config {
            return Err(ConfigError::Printed(origins));
        }
        Self::from_flags(flags, origins).map_err(ConfigError::Wrong)
    }

    fn from_flags(flags: Flags, origins: Vec<Origin>) -> Result<Self, String> {
        let Flags { config: _, print_config: _, models, engine, limits, network, access, recording, telemetry } = flags;
        let served = models::resolve(&models)?;
        let versions = versions::resolve(&models)?;
        // What a watched folder will hold is not known yet.
        let is_name = |name: &str| versions.root.is_some() || served.iter().any(|model| model.name == name);
        let devices = devices::resolve(&models.device, is_name)?;
        let defaults =
            Defaults { preference: models.default_preference_model, language: models.default_language_model };
        for (option, name) in
            [("preference", defaults.preference.as_deref()), ("language", defaults.language.as_deref())]
        {
            if let Some(name) = name.filter(|name| !is_name(name)) {
                return Err(format!("--default-{option}-model {name}: no model has this name"));
            }
        }
        if limits.default_max_new_tokens > limits.max_new_tokens_limit {
            return Err(format!(
                "--default-max-new-tokens {} is above --max-new-tokens-limit {}",
                limits.default_max_new_tokens, limits.max_new_tokens_limit
            ));
        }
        let admin = admin_listen(network.admin_port, network.admin_hostname)?;
        let tls = tls(access.tls_cert, access.tls_key, access.tls_client_ca, access.tls_client_auth)?;
        let access = Access {
            api_keys: access.api_key,
            api_key_file: access.api_key_file,
            admin_api_keys: access.admin_api_key,
            admin_api_key_file: access.admin_api_key_file,
            tokens_file: access.auth_tokens_file,
            client_certificates: tls.as_ref().is_some_and(|tls| tls.client_ca.is_some()),
        };
        // What is wrong with the files is wrong with the configuration.
        Table::read(&access)?;
        // Half of it is a single client's, which has to be able to send the largest message.
        let max_request_bytes = match limits.max_request_memory_mib.map(|mib| mib << 20) {
            None => (512 << 20).max(8 * limits.max_message_bytes),
            Some(bytes) if bytes / 2 >= limits.max_message_bytes => bytes,
            Some(bytes) => {
                return Err(format!(
                    "--max-request-memory-mib {} is less than two messages of --max-message-bytes {}",
                    bytes >> 20,
                    limits.max_message_bytes
                ));
            }
        };
        let logical_cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            models: served,
            versions,
            defaults,
            devices,
            dtype: models.dtype,
            hhh_prompt_file: models.hhh_prompt_file,
            engine: EngineSizes {
                max_batch_tokens: engine.max_batch_tokens,
                max_batch_sequences: engine.max_batch_sequences,
                max_prefill_beside_decode: engine.max_prefill_beside_decode,
                decode_share: engine.decode_share,
                prefix_cache: !engine.no_prefix_cache,
                kv_cache_bytes: engine.kv_cache_mib.map(|mib| mib << 20),
                batch_invariant: engine.batch_invariant,
                load_threads: engine.load_threads,
                load_bytes_per_second: engine.load_rate_mib_per_sec,
                // The physical count is of the machine, the logical one of what a container may use.
                threads: engine.threads.unwrap_or_else(|| num_cpus::get_physical().min(logical_cores).max(1)),
                stall_timeout: engine.stall_timeout_secs,
                tokenization_workers: engine.tokenization_workers.unwrap_or_else(|| logical_cores.min(8)),
            },
            limits: Limits {
                max_concurrent_requests: limits.max_concurrent_requests,
                max_client_batch_size: limits.max_client_batch_size,
                max_queue_tokens: limits.max_queue_tokens,
                max_input_tokens: limits.max_input_tokens,
                max_message_bytes: limits.max_message_bytes,
                max_request_bytes,
                max_new_tokens_limit: limits.max_new_tokens_limit,
                default_max_new_tokens: limits.default_max_new_tokens,
                max_stream_in_flight: limits.max_stream_in_flight,
                auto_truncate: limits.auto_truncate,
            },
            connections: Connections {
                max_connections: network.max_connections,
                handshake_timeout: network.handshake_timeout_secs,
                max_age: network.max_connection_age_secs,
                max_age_grace: network.max_connection_age_grace_secs,
            },
            tls,
            http2: Http2 {
                max_header_bytes: network.max_header_bytes,
                receive_timeout: network.receive_timeout_secs,
                keepalive_interval: network.keepalive_interval_secs,
                keepalive_timeout: network.keepalive_timeout_secs,
                max_concurrent_streams: network.max_concurrent_streams,
            },
            shutdown: Shutdown { lame_duck: network.lame_duck_secs, drain_timeout: network.drain_timeout_secs },
            listen: Listen {
                hostname: network.hostname,
                port: network.port,
                http_port: network.http_port,
                prometheus_port: network.prometheus_port,
                admin,
                port_file: network.port_file,
            },
            access,
            recording: recording.record_dir.map(|folder| Recording {
                folder,
                sample: recording.record_sample,
                max_bytes: (recording.record_max_mib as u64) << 20,
                max_age: recording.record_max_age_secs,
                keep: recording.record_keep,
                compress: !recording.no_record_compression,
            }),
            telemetry: Telemetry {
                log: telemetry.log,
                json_output: telemetry.json_output,
                otlp_endpoint: telemetry.otlp_endpoint,
                otlp_service_name: telemetry.otlp_service_name,
            },
            origins,
        })
    }
}

fn admin_listen(port: Option<u16>, hostname: Option<String>) -> Result<Option<AdminListen>, String> {
    match (port, hostname) {
        (Some(port), hostname) => {
            Ok(Some(AdminListen { hostname: hostname.unwrap_or_else(|| "127.0.0.1".to_owned()), port }))
        }
        (None, Some(_)) => Err("--admin-hostname needs --admin-port".to_owned()),
        (None, None) => Ok(None),
    }
}

/// Checked here and not by the parser, for which a value of the file is a default: half of a pair must not mean none.
fn tls(
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    client_auth: ClientAuth,
) -> Result<Option<Tls>, String> {
    let client_auth_optional = client_auth == ClientAuth::Optional;
    if client_auth_optional && client_ca.is_none() {
        return Err("--tls-client-auth needs --tls-client-ca".to_owned());
    }
    match (certificate, key) {
        (Some(certificate), Some(key)) => Ok(Some(Tls { certificate, key, client_ca, client_auth_optional })),
        (Some(_), None) => Err("--tls-cert needs --tls-key".to_owned()),
        (None, Some(_)) => Err("--tls-key needs --tls-cert".to_owned()),
        (None, None) if client_ca.is_some() => Err("--tls-client-ca needs --tls-cert".to_owned()),
        (None, None) => Ok(None),
    }
}

fn origins(command: &Command, matches: &ArgMatches, file: &FileValues) -> Vec<Origin> {
    let options = command.get_arguments().filter_map(|argument| Some((argument, argument.get_long()?)));
    options
        .filter(|(argument, _)| !["help", "version", "print_config"].contains(&argument.get_id().as_str()))
        .map(|(argument, long)| {
            let id = argument.get_id().as_str();
            let values: Vec<_> =
                matches.get_raw(id).into_iter().flatten().map(|value| value.to_string_lossy()).collect();
            let value = match argument.is_hide_env_values_set() && !values.is_empty() {
                true => secret::MASK.to_owned(),
                false => values.join(","),
            };
            let origin = match matches.value_source(id) {
                Some(ValueSource::CommandLine) => "flag",
                Some(ValueSource::EnvVariable) => "environment",
                _ if file.contains_key(id) => "file",
                _ => "default",
            };
            Origin { option: long.to_owned(), value, origin }
        })
        .collect()
}

#[cfg(test)]
mod tests;
