//! Events of connections, and of the keys and certificates that they are let in by.

use std::net::SocketAddr;
use std::path::Path;

use metrics::{counter, gauge};
use plumb_proto::code_name;
use tonic::Code;
use tracing::{debug, info, warn};

use crate::telemetry::metrics as names;

/// A connection began or ended.
pub struct ConnectionsChanged {
    /// 1 or -1.
    pub by: f64,
}

impl ConnectionsChanged {
    /// Shows it.
    pub fn emit(self) {
        gauge!(names::CONNECTIONS.name).increment(self.by);
    }
}

/// A connection was not let in.
pub enum ConnectionRefused<'a> {
    /// As many as allowed are open.
    Full {
        /// Who it came from.
        peer: SocketAddr,
        /// How many are allowed.
        limit: usize,
    },
    /// The TLS handshake failed.
    Handshake {
        /// Who it came from.
        peer: SocketAddr,
        /// Why.
        error: &'a std::io::Error,
    },
    /// The TLS handshake took too long.
    HandshakeTimedOut {
        /// Who it came from.
        peer: SocketAddr,
    },
    /// The system did not hand it over.
    NotAccepted {
        /// Why.
        error: &'a std::io::Error,
    },
}

impl ConnectionRefused<'_> {
    /// Logs and counts it. What a stranger can bring about at will is for `debug`.
    pub fn emit(self) {
        let reason = match self {
            Self::Full { peer, limit } => {
                debug!(target: "plumb::connection", %peer, limit, "refused: too many connections are open");
                "full"
            }
            Self::Handshake { peer, error } => {
                debug!(target: "plumb::connection", %peer, %error, "refused: the handshake failed");
                "handshake"
            }
            Self::HandshakeTimedOut { peer } => {
                debug!(target: "plumb::connection", %peer, "refused: the handshake took too long");
                "handshake_timeout"
            }
            Self::NotAccepted { error } => {
                warn!(target: "plumb::connection", %error, "cannot accept connections");
                "not_accepted"
            }
        };
        counter!(names::CONNECTIONS_REFUSED.name, "reason" => reason).increment(1);
    }
}

/// The certificate was read, at the start or because its files have changed.
pub enum CertificateLoaded<'a> {
    /// New handshakes use it.
    Read {
        /// Its file.
        path: &'a Path,
        /// When it ends, in seconds since 1970.
        expires: i64,
    },
    /// It is broken; the one before stays.
    Refused {
        /// Why.
        error: &'a str,
    },
}

impl CertificateLoaded<'_> {
    /// Logs and shows it.
    pub fn emit(self) {
        let code = match self {
            Self::Read { path, expires } => {
                gauge!(names::CERTIFICATE_EXPIRY.name).set(expires as f64);
                let expired = time::OffsetDateTime::now_utc().unix_timestamp() >= expires;
                match time::OffsetDateTime::from_unix_timestamp(expires) {
                    Ok(at) if expired => {
                        warn!(target: "plumb::access", path = %path.display(), expired = %at, "certificate has expired");
                    }
                    Ok(at) => info!(target: "plumb::access", path = %path.display(), expires = %at, "certificate"),
                    Err(_) => info!(target: "plumb::access", path = %path.display(), "certificate"),
                }
                Code::Ok
            }
            Self::Refused { error } => {
                warn!(target: "plumb::access", error, "the new certificate is refused; the old one stays");
                Code::InvalidArgument
            }
        };
        counter!(names::CERTIFICATE_LOADS.name, "code" => code_name(code)).increment(1);
    }
}

/// Keys and tokens were read, at the start or because a file has changed.
pub enum KeysLoaded<'a> {
    /// Calls are checked against these from now on.
    Read {
        /// How many there are.
        keys: usize,
    },
    /// A file is broken; the keys from before stay.
    Refused {
        /// Why.
        error: &'a str,
    },
}

impl KeysLoaded<'_> {
    /// Logs and counts it.
    pub fn emit(self) {
        let code = match self {
            Self::Read { keys } => {
                info!(target: "plumb::access", keys, "keys");
                Code::Ok
            }
            Self::Refused { error } => {
                warn!(target: "plumb::access", error, "the new keys are refused; the old ones stay");
                Code::InvalidArgument
            }
        };
        counter!(names::KEY_LOADS.name, "code" => code_name(code)).increment(1);
    }
}

/// The server can be reached from other machines, and asks nobody for a key.
pub struct OpenToNetwork {
    /// Whether it speaks TLS at least.
    pub tls: bool,
    /// Where models may be changed without a key.
    pub changes: &'static str,
}

impl OpenToNetwork {
    /// Warns.
    pub fn emit(self) {
        let Self { tls, changes } = self;
        warn!(
            target: "plumb::access", tls, changes,
            "everybody who reaches the port may call: set --api-key-file, --auth-tokens-file or --tls-client-ca"
        );
    }
}
