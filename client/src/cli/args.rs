//! Options that several subcommands share, and how they become messages of the contract.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use plumb_client::{ApiKey, Client, ClientIdentity, ClientOptions, Error, RetryPolicy, v1};

use super::Usage;

const SERVER: &str = "Server and output";

/// What every subcommand takes.
#[derive(Args)]
pub(crate) struct Global {
    /// Address of the server; several, separated by commas, are used in turn
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_SERVER",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:50051"
    )]
    server: Vec<String>,
    /// Bearer token
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
    )]
    api_key: Option<String>,
    /// PEM file of an authority to trust beside the system's, for https
    #[arg(long, global = true, help_heading = SERVER, env = "PLUMB_CA_CERT", value_name = "FILE")]
    ca_cert: Option<PathBuf>,
    /// PEM file of a certificate to show to the server, for mutual TLS
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_CLIENT_CERT",
        value_name = "FILE",
        requires = "client_key",
    )]
    client_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_CLIENT_KEY",
        value_name = "FILE",
        requires = "client_cert",
    )]
    client_key: Option<PathBuf>,
    /// Who calls: the server shares its work fairly between clients [default: known by key or address]
    #[arg(long, global = true, help_heading = SERVER, env = "PLUMB_CLIENT_ID", value_name = "ID")]
    client_id: Option<String>,
    /// Longest wait for the answer to a call, all tries together [default: 300; for models load: 3600]
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_TIMEOUT_SECS",
        value_name = "SECS",
        value_parser = seconds,
    )]
    timeout_secs: Option<Duration>,
    /// Longest wait for a connection
    #[arg(
        long,
        global = true,
        help_heading = SERVER,
        env = "PLUMB_CONNECT_TIMEOUT_SECS",
        value_name = "SECS",
        value_parser = seconds,
        default_value = "5",
    )]
    connect_timeout_secs: Duration,
    /// How often a call that may succeed later is tried again [default: 4; for score --output-dir: until its time is up]
    #[arg(long, global = true, help_heading = SERVER, env = "PLUMB_MAX_RETRIES", value_name = "N")]
    max_retries: Option<u32>,
    /// Write JSON lines instead of tables
    #[arg(long, global = true, help_heading = SERVER)]
    pub(crate) json: bool,
}

impl Global {
    /// Connects as asked.
    pub(crate) async fn connect(&self) -> anyhow::Result<Client> {
        self.connect_with(self.retries(4)).await
    }

    /// Connects for work that waits for a server to come back: a call's deadline alone ends its tries.
    pub(crate) async fn connect_patiently(&self) -> anyhow::Result<Client> {
        self.connect_with(self.retries(u32::MAX)).await
    }

    fn retries(&self, usual: u32) -> RetryPolicy {
        let max_attempts = self.max_retries.unwrap_or(usual).saturating_add(1);
        RetryPolicy { max_attempts, ..RetryPolicy::default() }
    }

    /// Connects with another retry policy.
    pub(crate) async fn connect_with(&self, retry: RetryPolicy) -> anyhow::Result<Client> {
        let read = |option: &str, path: &Path| {
            std::fs::read(path).map_err(|e| Usage(format!("--{option} {}: {e}", path.display())))
        };
        let ca_certificate_pem = self.ca_cert.as_deref().map(|path| read("ca-cert", path)).transpose()?;
        let identity = match (&self.client_cert, &self.client_key) {
            (Some(certificate), Some(key)) => {
                Some(ClientIdentity::from_pem(read("client-cert", certificate)?, read("client-key", key)?))
            }
            _ => None,
        };
        let options = ClientOptions {
            endpoints: self.server.clone(),
            api_key: self.api_key.clone().map(ApiKey::new),
            ca_certificate_pem,
            identity,
            client_id: self.client_id.clone(),
            connect_timeout: self.connect_timeout_secs,
            call_timeout: Some(self.timeout(Duration::from_secs(300))),
            retry,
            ..ClientOptions::default()
        };
        Client::connect(options).await.map_err(|error| match error {
            Error::Connect { .. } => {
                anyhow::Error::new(error).context("no server; is plumb-server running, and is --server right?")
            }
            other => other.into(),
        })
    }

    /// The deadline of calls that take about `usual` unless the user knows better.
    pub(crate) fn timeout(&self, usual: Duration) -> Duration {
        self.timeout_secs.unwrap_or(usual)
    }
}

/// Which model answers.
#[derive(Args, Clone)]
pub(crate) struct ModelArgs {
    /// Name of the model [default: the server's]
    #[arg(long, env = "PLUMB_MODEL", value_name = "NAME")]
    model: Option<String>,
    /// Version of the model [default: the one labelled stable, else the newest]
    #[arg(long, value_name = "N", conflicts_with = "label")]
    version: Option<u64>,
    /// Label of the version, such as stable or canary
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
}

impl ModelArgs {
    pub(crate) fn spec(&self) -> v1::ModelSpec {
        use v1::model_spec::Choice;
        let choice = self.version.map(Choice::Version).or_else(|| self.label.clone().map(Choice::Label));
        v1::ModelSpec { name: self.model.clone().unwrap_or_default(), choice }
    }
}

/// How inputs become tokens, but for the HHH prompt.
#[derive(Args, Clone)]
pub(crate) struct TextArgs {
    /// How a conversation becomes text [default: the model's template, or human-assistant if it has none]
    #[arg(long, value_enum, value_name = "FORMAT")]
    chat_format: Option<ChatFormat>,
    /// What to do with a text that is too long [default: the server's choice, usually refuse]
    #[arg(long, value_enum, value_name = "HOW")]
    truncate: Option<Truncate>,
    /// Longest text, in tokens [default: the model's limit]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
}

impl TextArgs {
    pub(crate) fn options(&self, hhh_prompt: HhhPrompt) -> v1::TextOptions {
        v1::TextOptions {
            chat_format: self.chat_format.map_or(0, |f| f.wire() as i32),
            hhh_prompt: hhh_prompt.wire() as i32,
            truncation: self.truncate.map_or(0, |t| t.wire() as i32),
            max_tokens: self.max_tokens,
        }
    }
}

/// How many calls, of what size, how urgent.
#[derive(Args, Clone)]
pub(crate) struct FlowArgs {
    /// Items in a call
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch_size: u32,
    /// Calls in flight
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: u32,
    /// How urgent the calls are [default: normal; for eval: low]
    #[arg(long, value_enum)]
    priority: Option<Priority>,
}

impl FlowArgs {
    pub(crate) fn priority(&self, usual: Priority) -> i32 {
        self.priority.unwrap_or(usual).wire() as i32
    }
}

/// A message's enum, as a word on the command line.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident => $wire:ident { $($(#[$doc:meta])* $word:ident = $value:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $name { $($(#[$doc])* $word,)+ }

        impl $name {
            pub(crate) fn wire(self) -> v1::$wire {
                match self { $(Self::$word => v1::$wire::$value,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.to_possible_value().as_ref().map_or("?", |v| v.get_name()))
            }
        }
    };
}

words! {
    /// How a conversation becomes text.
    ChatFormat => ChatFormat {
        /// The model's own template
        Template = Template,
        /// Human: and Assistant: turns separated by a blank line
        HumanAssistant = HumanAssistant,
    }
}

words! {
    /// Whether the helpful, honest, harmless prompt stands before a conversation.
    HhhPrompt => HhhPrompt {
        /// No prompt
        None = None,
        /// All conversations of the server's prompt
        Full = Full,
        /// One example conversation, for small contexts
        Short = Short,
    }
}

words! {
    /// What to do with a text that is too long.
    Truncate => Truncation {
        /// Fail
        Refuse = Refuse,
        /// Drop the start
        Left = Left,
        /// Drop the end
        Right = Right,
    }
}

words! {
    /// How a language model's score is made; a preference model ignores it.
    Objective => Objective {
        /// Mean log-probability of the response's tokens
        Mean = MeanLogProb,
        /// Sum of the log-probabilities
        Sum = SumLogProb,
        /// log P(response | query) - log P(response)
        MutualInformation = MutualInformation,
    }
}

words! {
    /// How urgent a call is.
    Priority => Priority {
        /// Behind everything else
        Low = Low,
        /// As others
        Normal = Normal,
        /// Before others
        High = High,
    }
}

/// Seconds, with a fraction where wanted; more than 0.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text} is not a number of seconds"))?;
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("must be more than 0 seconds".into()),
    }
}
