//! The flags: each option is written once, here, with its environment variable, its default and its help.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{BoolishValueParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser};

use super::secret::Secret;
use super::versions::SwapPolicy;

const EXAMPLES: &str = "\
Examples:
  # The small models that come with the server
  plumb-server

  # One model from a folder, on this machine only
  plumb-server --model-id ./checkpoints/pm/3

  # A preference model and a language model, reachable from outside, with a key
  plumb-server --model pm=org/reward-model --model lm=./smollm2.gguf --hostname 0.0.0.0 --api-key-file /run/key

  # The same over TLS, with names and roles for those who call, and changes to models from this machine only
  plumb-server --model pm=org/reward-model --hostname 0.0.0.0 --tls-cert tls.crt --tls-key tls.key \\
    --auth-tokens-file tokens.toml --admin-port 50052

  # A large model split over two GPUs, and a smaller one on a third
  plumb-server --model pm=org/reward-model-70b --model lm=./smollm2 --device pm=cuda:0,cuda:1 --device lm=cuda:2

  # Rewards for OpenRLHF, verl and others that speak HTTP
  plumb-server --model pm=org/reward-model --http-port 8000

  # Every version that is published below a folder takes over from the one before it
  plumb-server --model-root ./checkpoints

  # Keep every hundredth call, to see before a switch what the next version makes of them
  plumb-server --model-id ./checkpoints/pm/3 --record-dir /var/lib/plumb/calls --record-sample 0.01

  # Free ports for a test, written to a file once they are bound
  plumb-server --model-id tests/fixtures/llama-pm --port 0 --prometheus-port 0 --port-file ports.json

  # Where does every value come from?
  plumb-server --config plumb.toml --print-config

  # Completions for bash (or elvish, fish, powershell, zsh), and a man page
  plumb-server --generate bash > ~/.local/share/bash-completion/completions/plumb-server
  plumb-server --generate man ~/.local/share/man/man1

Precedence: flag, environment variable, --config file, default. The file holds the same names:
  model = [\"pm=./checkpoints/pm/3\"]
  max-batch-tokens = 8192

Also read: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT (Hugging Face repositories).

Exit codes: 0 after a shutdown that was asked for, 1 if a model does not load or a port is taken,
64 if the configuration is wrong; and where only a new process helps: 70 if the engine died,
71 if the device fails whatever it is given, 75 if the engine got stuck (--stall-timeout-secs).";

/// Scores, ranks and generates text over gRPC.
#[derive(Debug, Parser)]
#[command(name = "plumb-server", version, after_long_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Flags {
    /// TOML file with any of these options.
    #[arg(long, env = "PLUMB_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print every option with its value and where it comes from, then exit.
    #[arg(long)]
    pub(crate) print_config: bool,
    #[command(flatten)]
    pub(crate) models: ModelFlags,
    #[command(flatten)]
    pub(crate) engine: EngineFlags,
    #[command(flatten)]
    pub(crate) limits: LimitFlags,
    #[command(flatten)]
    pub(crate) network: NetworkFlags,
    #[command(flatten)]
    pub(crate) access: AccessFlags,
    #[command(flatten)]
    pub(crate) recording: RecordingFlags,
    #[command(flatten)]
    pub(crate) telemetry: TelemetryFlags,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelFlags {
    /// A model: a folder, a .gguf file or a Hugging Face repository. Its name is the last part of the path; a folder
    /// named by an integer is a version of the folder above it. Without any model, the two small ones that come with
    /// the server are served: bundled:pm and bundled:lm.
    #[arg(long, env = "PLUMB_MODEL_ID", value_name = "SOURCE")]
    pub(crate) model_id: Option<String>,
    /// A model under a name of its own; repeat for several.
    #[arg(long, env = "PLUMB_MODEL", value_name = "NAME=SOURCE", value_delimiter = ',')]
    pub(crate) model: Vec<String>,
    /// LoRA adapter to merge: plain for --model-id, NAME=SOURCE for a --model; repeat for several.
    #[arg(long, env = "PLUMB_ADAPTER", value_name = "[NAME=]SOURCE", value_delimiter = ',')]
    pub(crate) adapter: Vec<String>,
    /// Branch, tag or commit of a Hugging Face repository: plain for --model-id, NAME=REVISION for a --model.
    #[arg(long, env = "PLUMB_REVISION", value_name = "[NAME=]REVISION", value_delimiter = ',')]
    pub(crate) revision: Vec<String>,
    /// Folder that is watched: a version MODEL/N/ in it is loaded once its manifest.json is there, as `plumb-train publish`
    /// writes it. Changes are noticed at once where the system tells, else by polling.
    #[arg(long, env = "PLUMB_MODEL_ROOT", value_name = "FOLDER")]
    pub(crate) model_root: Option<PathBuf>,
    /// Which versions of a watched model are served: latest:N, all, or specific:N+N; for one model with its name in front
    /// [default: latest:1].
    #[arg(long, env = "PLUMB_VERSION_POLICY", value_name = "[NAME=]POLICY", value_delimiter = ',')]
    pub(crate) version_policy: Vec<String>,
    /// What is first when a version takes the place of another one.
    #[arg(long, env = "PLUMB_SWAP_POLICY", default_value = "availability")]
    pub(crate) swap_policy: SwapPolicy,
    /// How often the watched folder is read when nothing tells of a change, as on network file systems.
    #[arg(long, env = "PLUMB_POLL_INTERVAL_SECS", default_value = "10", value_parser = seconds, value_name = "SECS")]
    pub(crate) poll_interval_secs: Duration,
    /// A new version that computes NaN within this time is taken back, and its callers get the version before. With
    /// `--swap-policy availability` that one stays in memory for so long; otherwise, it is loaded again.
    #[arg(long, env = "PLUMB_ROLLBACK_WINDOW_SECS", default_value = "60", value_parser = seconds, value_name = "SECS")]
    pub(crate) rollback_window_secs: Duration,
    /// A label that is set once its version is available; repeat for several.
    #[arg(long, env = "PLUMB_LABEL", value_name = "MODEL:LABEL=VERSION", value_delimiter = ',')]
    pub(crate) label: Vec<String>,
    /// Splits calls that name neither version nor label, by a hash of the request: pm:stable=95,pm:canary=5.
    #[arg(long, env = "PLUMB_TRAFFIC", value_name = "MODEL:LABEL=WEIGHT", value_delimiter = ',')]
    pub(crate) traffic: Vec<String>,
    /// Where models compute: cpu, cuda:N, or auto, which takes the first GPU if there is one and the server was built
    /// with CUDA; a list such as cuda:0,cuda:1 splits each model over these GPUs. For one model with its name in front;
    /// repeat for several, in the environment between semicolons [default: auto].
    #[arg(long, env = "PLUMB_DEVICE", value_name = "[NAME=]DEVICE", value_delimiter = ';')]
    pub(crate) device: Vec<String>,
    /// Type in which weights are held; auto takes the checkpoint's.
    #[arg(long, env = "PLUMB_DTYPE", default_value = "auto")]
    pub(crate) dtype: DType,
    /// Which preference model an empty name means [default: the first one].
    #[arg(long, env = "PLUMB_DEFAULT_PREFERENCE_MODEL", value_name = "NAME")]
    pub(crate) default_preference_model: Option<String>,
    /// Which language model an empty name means [default: the first one].
    #[arg(long, env = "PLUMB_DEFAULT_LANGUAGE_MODEL", value_name = "NAME")]
    pub(crate) default_language_model: Option<String>,
    /// Replaces the built-in HHH prompt: conversations separated by lines of dashes.
    #[arg(long, env = "PLUMB_HHH_PROMPT_FILE", value_name = "FILE")]
    pub(crate) hhh_prompt_file: Option<PathBuf>,
}

/// Type in which weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DType {
    /// The checkpoint's own.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// bfloat16, and the linear layers in e4m3: half the memory, and faster on a GPU of compute capability 8.9 or later.
    Fp8,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineFlags {
    /// Most tokens in a batch; those far into a long text count for more, as their attention costs more. A large batch
    /// keeps a large device busy; a small one lets a short call pass a long one sooner.
    #[arg(long, env = "PLUMB_MAX_BATCH_TOKENS", default_value_t = 4096, value_parser = count())]
    pub(crate) max_batch_tokens: usize,
    /// Most sequences in a batch.
    #[arg(long, env = "PLUMB_MAX_BATCH_SEQUENCES", default_value_t = 256, value_parser = count())]
    pub(crate) max_batch_sequences: usize,
    /// Most prompt tokens in a batch while streams are being generated: what their readers may have to wait for.
    #[arg(long, env = "PLUMB_MAX_PREFILL_BESIDE_DECODE", default_value_t = 512, value_parser = count())]
    pub(crate) max_prefill_beside_decode: usize,
    /// Share of the engine's time that streams get while prompts and scores wait for it, 0 to 0.9; scores get the rest.
    #[arg(long, env = "PLUMB_DECODE_SHARE", default_value_t = 0.5, value_parser = share, value_name = "SHARE")]
    pub(crate) decode_share: f64,
    /// Compute every input from its first token on instead of using what earlier ones with the same beginning have left.
    #[arg(
        long, env = "PLUMB_NO_PREFIX_CACHE", value_parser = BoolishValueParser::new(),
        default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true
    )]
    pub(crate) no_prefix_cache: bool,
    /// Most memory for the key-value cache of each model, over all GPUs that share it, in MiB; taken when the model is
    /// loaded. Small models take less [default: 1024; on a GPU, what is left if each model is there twice, as while one
    /// version replaces another].
    #[arg(long, env = "PLUMB_KV_CACHE_MIB", value_parser = count(), value_name = "MIB")]
    pub(crate) kv_cache_mib: Option<usize>,
    /// On a GPU, or two that share a model, give a text the same bits whatever else is in the batch, as on a CPU:
    /// algorithms are chosen without regard to the number of rows, which costs some speed.
    #[arg(
        long, env = "PLUMB_BATCH_INVARIANT", value_parser = BoolishValueParser::new(),
        default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true
    )]
    pub(crate) batch_invariant: bool,
    /// Threads, of low priority, that read, check and pack a model while others are served. Each is mostly one thread's
    /// work; more help with checkpoints of several files.
    #[arg(long, env = "PLUMB_LOAD_THREADS", default_value = "1", value_parser = nonzero, value_name = "N")]
    pub(crate) load_threads: NonZeroUsize,
    /// Most MiB a second that a load reads of files, for checking and for packing; a disk that others need too is left to
    /// them [default: no limit].
    #[arg(long, env = "PLUMB_LOAD_RATE_MIB_PER_SEC", value_parser = mib_per_second, value_name = "MIB")]
    pub(crate) load_rate_mib_per_sec: Option<NonZeroU64>,
    /// Threads that compute [default: physical cores].
    #[arg(long, env = "PLUMB_THREADS", value_parser = count())]
    pub(crate) threads: Option<usize>,
    /// The server ends if the engine, with work to do, gets no further for this long: not by a layer of a step.
    #[arg(long, env = "PLUMB_STALL_TIMEOUT_SECS", default_value = "60", value_parser = some_seconds, value_name = "SECS")]
    pub(crate) stall_timeout_secs: Duration,
    /// Threads that render and tokenize [default: logical cores, at most 8].
    #[arg(long, env = "PLUMB_TOKENIZATION_WORKERS", value_parser = count())]
    pub(crate) tokenization_workers: Option<usize>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitFlags {
    /// Most calls at a time, streams included; more are refused with RESOURCE_EXHAUSTED. It bounds what calls take by
    /// merely being there; what they make the server do is bounded by --max-queue-tokens.
    #[arg(long, env = "PLUMB_MAX_CONCURRENT_REQUESTS", default_value_t = 4096, value_parser = count())]
    pub(crate) max_concurrent_requests: usize,
    /// Most items, candidates or samples in a call.
    #[arg(long, env = "PLUMB_MAX_CLIENT_BATCH_SIZE", default_value_t = 256, value_parser = count())]
    pub(crate) max_client_batch_size: usize,
    /// Most tokens of work that are admitted and not yet done; more are refused with RESOURCE_EXHAUSTED [default: what
    /// the server does in about a second, as measured, and at least two batches].
    #[arg(long, env = "PLUMB_MAX_QUEUE_TOKENS", value_parser = count())]
    pub(crate) max_queue_tokens: Option<usize>,
    /// Most tokens in an input, below what the model allows [default: what the model allows].
    #[arg(long, env = "PLUMB_MAX_INPUT_TOKENS", value_parser = count())]
    pub(crate) max_input_tokens: Option<usize>,
    /// Largest message that is received or sent, in bytes.
    #[arg(long, env = "PLUMB_MAX_MESSAGE_BYTES", default_value_t = 64 << 20, value_parser = count(), value_name = "BYTES")]
    pub(crate) max_message_bytes: usize,
    /// Most memory for messages that are being received, or whose work is not done, in MiB; beyond it the server reads
    /// on when there is room. One client may use half of it [default: 512, or eight times --max-message-bytes if that is
    /// more].
    #[arg(long, env = "PLUMB_MAX_REQUEST_MEMORY_MIB", value_parser = count(), value_name = "MIB")]
    pub(crate) max_request_memory_mib: Option<usize>,
    /// Most new tokens that a call may ask for, per sample.
    #[arg(long, env = "PLUMB_MAX_NEW_TOKENS_LIMIT", default_value_t = 4096, value_parser = count())]
    pub(crate) max_new_tokens_limit: usize,
    /// New tokens per sample where a call does not say.
    #[arg(long, env = "PLUMB_DEFAULT_MAX_NEW_TOKENS", default_value_t = 256, value_parser = count())]
    pub(crate) default_max_new_tokens: usize,
    /// Requests of one ScoreStream that are worked on at a time; the next is read when one is answered.
    #[arg(long, env = "PLUMB_MAX_STREAM_IN_FLIGHT", default_value_t = 32, value_parser = count())]
    pub(crate) max_stream_in_flight: usize,
    /// Cut inputs over the limit at the left, where a call does not say, instead of refusing them.
    #[arg(
        long, env = "PLUMB_AUTO_TRUNCATE", value_parser = BoolishValueParser::new(),
        default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true
    )]
    pub(crate) auto_truncate: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct NetworkFlags {
    /// Address to listen on, for rpcs, HTTP and metrics. The default is this machine only; a container wants 0.0.0.0.
    #[arg(long, env = "PLUMB_HOSTNAME", default_value = "127.0.0.1")]
    pub(crate) hostname: String,
    /// Port of the rpcs; 0 picks a free one and logs it.
    #[arg(long, env = "PLUMB_PORT", default_value = "50051", value_parser = port)]
    pub(crate) port: u16,
    /// Also answer HTTP with JSON on this port, as OpenRLHF, vLLM, SGLang and Cohere have it: /get_reward, /score,
    /// /classify, /pooling, /rerank, /v1/embeddings, /v1/models, /health; 0 picks a free one and logs it [default: do
    /// not].
    #[arg(long, env = "PLUMB_HTTP_PORT", value_parser = port)]
    pub(crate) http_port: Option<u16>,
    /// Port of /metrics, /healthz and /readyz; 0 picks a free one and logs it.
    #[arg(long, env = "PLUMB_PROMETHEUS_PORT", default_value = "9000", value_parser = port)]
    pub(crate) prometheus_port: u16,
    /// Change models on a port of their own only; 0 picks a free one [default: on the port of the rpcs].
    #[arg(long, env = "PLUMB_ADMIN_PORT", value_parser = port)]
    pub(crate) admin_port: Option<u16>,
    /// Address of that port [default: 127.0.0.1].
    #[arg(long, env = "PLUMB_ADMIN_HOSTNAME", value_name = "ADMIN_HOSTNAME")]
    pub(crate) admin_hostname: Option<String>,
    /// Write the bound addresses to this file as JSON: {"grpc": "127.0.0.1:50051", "metrics": "127.0.0.1:9000"}, and
    /// "admin" and "http" where there is an --admin-port or --http-port.
    #[arg(long, env = "PLUMB_PORT_FILE", value_name = "FILE")]
    pub(crate) port_file: Option<PathBuf>,
    /// Ask clients to reconnect after this time, so that load spreads over replicas [default: never].
    #[arg(long, env = "PLUMB_MAX_CONNECTION_AGE_SECS", value_parser = seconds, value_name = "SECS")]
    pub(crate) max_connection_age_secs: Option<Duration>,
    /// Calls in flight on a connection that is too old may go on for this long; then it is cut.
    #[arg(long, env = "PLUMB_MAX_CONNECTION_AGE_GRACE_SECS", default_value = "300", value_parser = seconds, value_name = "SECS")]
    pub(crate) max_connection_age_grace_secs: Duration,
    /// Most open connections of a listener; more are closed at once.
    #[arg(long, env = "PLUMB_MAX_CONNECTIONS", default_value_t = 4096, value_parser = count())]
    pub(crate) max_connections: usize,
    /// Longest wait for the beginning of a connection: the TLS handshake and what HTTP/2 begins with.
    #[arg(long, env = "PLUMB_HANDSHAKE_TIMEOUT_SECS", default_value = "10", value_parser = seconds, value_name = "SECS")]
    pub(crate) handshake_timeout_secs: Duration,
    /// Longest time that a request may take to arrive; the messages of a stream may take longer.
    #[arg(long, env = "PLUMB_RECEIVE_TIMEOUT_SECS", default_value = "60", value_parser = seconds, value_name = "SECS")]
    pub(crate) receive_timeout_secs: Duration,
    /// Most bytes in a request's headers, counted as HTTP/2 does: 32 for each beside its name and value.
    #[arg(
        long, env = "PLUMB_MAX_HEADER_BYTES", default_value_t = 16 << 10, value_name = "BYTES",
        value_parser = RangedU64ValueParser::<u32>::new().range(1024..=1 << 20)
    )]
    pub(crate) max_header_bytes: u32,
    /// HTTP/2 ping on idle connections.
    #[arg(long, env = "PLUMB_KEEPALIVE_INTERVAL_SECS", default_value = "30", value_parser = seconds, value_name = "SECS")]
    pub(crate) keepalive_interval_secs: Duration,
    /// A connection whose ping is not answered within this time is closed.
    #[arg(long, env = "PLUMB_KEEPALIVE_TIMEOUT_SECS", default_value = "20", value_parser = seconds, value_name = "SECS")]
    pub(crate) keepalive_timeout_secs: Duration,
    /// Most calls at a time on one connection.
    #[arg(
        long, env = "PLUMB_MAX_CONCURRENT_STREAMS", default_value_t = 1024,
        value_parser = RangedU64ValueParser::<u32>::new().range(1..)
    )]
    pub(crate) max_concurrent_streams: u32,
    /// After NOT_SERVING, go on as before for this long: load balancers need it to notice.
    #[arg(long, env = "PLUMB_LAME_DUCK_SECS", default_value = "0", value_parser = seconds, value_name = "SECS")]
    pub(crate) lame_duck_secs: Duration,
    /// After that, calls in flight may finish for this long; the rest fail with UNAVAILABLE. A second signal means: now.
    #[arg(long, env = "PLUMB_DRAIN_TIMEOUT_SECS", default_value = "30", value_parser = seconds, value_name = "SECS")]
    pub(crate) drain_timeout_secs: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
pub(crate) struct AccessFlags {
    /// Certificate chain of the server in PEM form, for rpcs over TLS. Read again when it changes [default: no TLS].
    #[arg(long, env = "PLUMB_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key in PEM form.
    #[arg(long, env = "PLUMB_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Authorities of clients' certificates in PEM form: mutual TLS. A certificate is good for what an --api-key is,
    /// unless --auth-tokens-file says otherwise.
    #[arg(long, env = "PLUMB_TLS_CLIENT_CA", value_name = "FILE")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Whether clients without a certificate are let in to present a key instead.
    #[arg(long, env = "PLUMB_TLS_CLIENT_AUTH", default_value = "required")]
    pub(crate) tls_client_auth: ClientAuth,
    /// TOML file with tokens, their names, roles (score, generate, admin) and ends: see SECURITY.md. Read again when
    /// it changes.
    #[arg(long, env = "PLUMB_AUTH_TOKENS_FILE", value_name = "FILE")]
    pub(crate) auth_tokens_file: Option<PathBuf>,
    /// Keys that clients present as `authorization: Bearer KEY`, separated by commas [default: open to all].
    #[arg(long, env = "PLUMB_API_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    pub(crate) api_key: Vec<Secret>,
    /// File with such keys, one a line. Read again when it changes.
    #[arg(long, env = "PLUMB_API_KEY_FILE", value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Keys that may also change models, separated by commas [default: whoever has a key; without any, whoever calls
    /// from this machine].
    #[arg(long, env = "PLUMB_ADMIN_API_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    pub(crate) admin_api_key: Vec<Secret>,
    /// File with such keys, one a line. Read again when it changes.
    #[arg(long, env = "PLUMB_ADMIN_API_KEY_FILE", value_name = "FILE")]
    pub(crate) admin_api_key_file: Option<PathBuf>,
}

/// Whether clients have to show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ClientAuth {
    /// A connection without one is refused.
    Required,
    /// One that is shown has to be good.
    Optional,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Recording")]
pub(crate) struct RecordingFlags {
    /// Write requests and their scores, texts included, to files in this folder, for `plumb replay` [default: do not].
    #[arg(long, env = "PLUMB_RECORD_DIR", value_name = "DIR")]
    pub(crate) record_dir: Option<PathBuf>,
    /// Share of the calls to write; their texts decide which, so that all servers choose the same.
    #[arg(long, env = "PLUMB_RECORD_SAMPLE", default_value_t = 1.0, value_parser = sample, value_name = "SHARE")]
    pub(crate) record_sample: f64,
    /// Begin a new file before one becomes larger.
    #[arg(long, env = "PLUMB_RECORD_MAX_MIB", default_value_t = 256, value_parser = count(), value_name = "MIB")]
    pub(crate) record_max_mib: usize,
    /// Begin a new file when one is as old.
    #[arg(long, env = "PLUMB_RECORD_MAX_AGE_SECS", default_value = "3600", value_parser = age, value_name = "SECS")]
    pub(crate) record_max_age_secs: Duration,
    /// Files to keep; the oldest are deleted.
    #[arg(long, env = "PLUMB_RECORD_KEEP", default_value_t = 48, value_parser = count(), value_name = "FILES")]
    pub(crate) record_keep: usize,
    /// Leave files as they are instead of packing them with zstd once they have ended.
    #[arg(
        long, env = "PLUMB_NO_RECORD_COMPRESSION", value_parser = BoolishValueParser::new(),
        default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true
    )]
    pub(crate) no_record_compression: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Telemetry")]
pub(crate) struct TelemetryFlags {
    /// What is logged, in the syntax of tracing's EnvFilter: `info`, `plumb=debug,h2=warn`.
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "FILTER")]
    pub(crate) log: String,
    /// One JSON object a line instead of text.
    #[arg(
        long, env = "PLUMB_JSON_OUTPUT", value_parser = BoolishValueParser::new(),
        default_value_t = false, default_missing_value = "true", num_args = 0..=1, require_equals = true
    )]
    pub(crate) json_output: bool,
    /// Send traces to this OTLP collector over gRPC, such as http://localhost:4317 [default: no traces].
    #[arg(long, env = "PLUMB_OTLP_ENDPOINT", value_name = "URL")]
    pub(crate) otlp_endpoint: Option<String>,
    /// Name of this service in traces.
    #[arg(long, env = "PLUMB_OTLP_SERVICE_NAME", default_value = "plumb-server", value_name = "NAME")]
    pub(crate) otlp_service_name: String,
}

/// A number of things, at least one.
fn count() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<u64>::new().range(1..=u64::from(u32::MAX)).map(|value| value as usize)
}

/// The same where the type says so.
fn nonzero(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .ok()
        .filter(|number: &NonZeroUsize| number.get() <= 1024)
        .ok_or_else(|| "not a number from 1 to 1024".to_owned())
}

/// MiB as bytes.
fn mib_per_second(text: &str) -> Result<NonZeroU64, String> {
    let mib: Option<u32> = text.parse().ok();
    mib.and_then(|mib| NonZeroU64::new(u64::from(mib) << 20))
        .ok_or_else(|| "not a whole number of MiB, at least 1".to_owned())
}

/// Less than all: what is left is somebody's too.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=0.9).contains(&share) => Ok(share),
        _ => Err("not a share from 0 to 0.9".to_owned()),
    }
}

fn sample(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("not a share above 0 and up to 1".to_owned()),
    }
}

/// Shorter ones would make a file of every record.
fn age(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        age if age < Duration::from_secs(1) => Err("must be 1 or more".to_owned()),
        age => Ok(age),
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| {
        // Kubernetes injects NAME_PORT=tcp://IP:PORT for every Service of the namespace, one named `plumb` included.
        if text.starts_with("tcp://") {
            "this is a Kubernetes service link; set `enableServiceLinks: false` on the pod".to_owned()
        } else {
            "not a port, 0 to 65535".to_owned()
        }
    })
}

/// Beyond that, times could not be added to one another.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())? {
        time if time <= LONGEST => Ok(time),
        _ => Err("more than ten years".to_owned()),
    }
}

/// A time within which something can be seen.
fn some_seconds(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        time if time >= Duration::from_millis(100) => Ok(time),
        _ => Err("less than 0.1 seconds".to_owned()),
    }
}
