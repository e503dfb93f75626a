//! How a client connects: everything that can be chosen, with its default.

use std::fmt;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::{Error, RetryPolicy};

/// What servers may send on a connection before it is read. HTTP/2 below cuts off a connection whose unread messages are
/// many and small, which those of `Generate` are, and takes its measure from this: some 70,000.
const CONNECTION_WINDOW: u32 = 32 << 20;

/// How a [`crate::Client`] connects and how long it waits.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Servers, as `http://host:port` or `https://host:port`. Calls go to them in turn.
    pub endpoints: Vec<String>,
    /// Sent as `authorization: Bearer ...`.
    pub api_key: Option<ApiKey>,
    /// PEM of an authority to trust beside those of the operating system; only for https.
    pub ca_certificate_pem: Option<Vec<u8>>,
    /// Shown to servers that ask for a certificate (mutual TLS); only for https.
    pub identity: Option<ClientIdentity>,
    /// Who calls, sent as `x-client-id`: calls of one id share what the server grants a client. Default: none, and the
    /// server goes by the key or the address.
    pub client_id: Option<String>,
    /// Longest wait for a connection. Default 5 s.
    pub connect_timeout: Duration,
    /// Longest wait for an answer, all tries together; sent to the server, which drops work that it can not do in
    /// time. `None` waits for ever. Default 60 s.
    pub call_timeout: Option<Duration>,
    /// While calls wait, the connection is probed this often, so that a server that vanished is noticed. Default 20 s.
    pub keepalive_interval: Duration,
    /// Longest wait for the answer to a probe. Default 10 s.
    pub keepalive_timeout: Duration,
    /// Largest message, sent or received. Default 64 MiB: gRPC's usual 4 MiB are too few for token values of a batch.
    pub max_message_bytes: usize,
    /// What is tried again, and when.
    pub retry: RetryPolicy,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:50051".into()],
            api_key: None,
            ca_certificate_pem: None,
            identity: None,
            client_id: None,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Some(Duration::from_secs(60)),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            max_message_bytes: 64 << 20,
            retry: RetryPolicy::default(),
        }
    }
}

impl ClientOptions {
    /// The defaults, for one server.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self { endpoints: vec![endpoint.into()], ..Self::default() }
    }

    /// The endpoints, configured; fails on a bad address or certificate.
    pub(crate) fn transport(&self) -> Result<Vec<Endpoint>, Error> {
        if self.endpoints.is_empty() {
            return Err(Error::Options("no endpoint given".into()));
        }
        self.endpoints.iter().map(|address| self.endpoint(address)).collect()
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, Error> {
        let bad = |reason: &dyn fmt::Display| Error::Options(format!("{address}: {reason}"));
        if !address.starts_with("http://") && !address.starts_with("https://") {
            return Err(bad(&"must start with http:// or https://"));
        }
        let endpoint = Endpoint::from_shared(address.to_owned())
            .map_err(|e| bad(&e))?
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .initial_connection_window_size(CONNECTION_WINDOW)
            // Small messages should leave at once: scoring in an RL loop waits for each.
            .tcp_nodelay(true);
        if !address.starts_with("https://") {
            return Ok(endpoint);
        }
        let mut tls = ClientTlsConfig::new().with_enabled_roots();
        if let Some(pem) = &self.ca_certificate_pem {
            tls = tls.ca_certificate(Certificate::from_pem(pem));
        }
        if let Some(ClientIdentity { certificate_pem, key_pem }) = &self.identity {
            tls = tls.identity(Identity::from_pem(certificate_pem, key_pem));
        }
        endpoint.tls_config(tls).map_err(|e| bad(&e))
    }

    /// The `authorization` header.
    pub(crate) fn authorization(&self) -> Result<Option<MetadataValue<Ascii>>, Error> {
        let Some(key) = &self.api_key else { return Ok(None) };
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.0)
            .parse()
            .map_err(|_| Error::Options("the API key has characters that a header can not carry".into()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// The `x-client-id` header.
    pub(crate) fn client_id(&self) -> Result<Option<MetadataValue<Ascii>>, Error> {
        let bad = |_| Error::Options("the client id has characters that a header can not carry".into());
        self.client_id.as_deref().map(|id| id.parse().map_err(bad)).transpose()
    }
}

/// A certificate and its private key, which does not show in logs.
#[derive(Clone)]
pub struct ClientIdentity {
    certificate_pem: Vec<u8>,
    key_pem: Vec<u8>,
}

impl ClientIdentity {
    /// Takes a chain of certificates and a private key, both as PEM.
    pub fn from_pem(certificate_pem: impl Into<Vec<u8>>, key_pem: impl Into<Vec<u8>>) -> Self {
        Self { certificate_pem: certificate_pem.into(), key_pem: key_pem.into() }
    }
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(***)")
    }
}

/// A bearer token, which does not show in logs.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// Wraps a token.
    pub fn new(key: impl Into<String>) -> Self {
        Self(key.into())
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}
