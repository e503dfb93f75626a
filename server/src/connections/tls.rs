//! The server's certificate and the authority of its clients', read anew whenever the files change.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Kind;
use crate::config;
use crate::files::{self, Files};
use crate::telemetry::events::CertificateLoaded;

/// What is negotiated: gRPC needs HTTP/2, the gateway speaks HTTP/1.1.
const GRPC_ALPN: &[u8] = b"h2";
const HTTP_ALPN: &[u8] = b"http/1.1";
/// Longer names would fill logs and metrics.
const MAX_NAME_LENGTH: usize = 128;

/// What handshakes are done with.
pub(crate) struct Tls {
    config: config::Tls,
    /// As they were before they were read.
    files: Files,
    current: RwLock<Current>,
}

/// The same for either protocol.
#[derive(Debug)]
struct Current {
    grpc: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Which file is wrong, and why.
    pub(crate) fn load(config: &config::Tls) -> Result<Self, String> {
        let config::Tls { certificate, key, client_ca, .. } = config;
        let files = Files::look([certificate, key].into_iter().chain(client_ca).cloned());
        let current = RwLock::new(read(config)?);
        Ok(Self { config: config.clone(), files, current })
    }

    /// For a handshake that begins now. A handshake ends with what it began with.
    pub(crate) fn acceptor(&self, kind: Kind) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        match kind {
            Kind::Public | Kind::Admin => Arc::clone(&current.grpc).into(),
            Kind::Http => Arc::clone(&current.http).into(),
        }
    }

    /// Reads the files again whenever they change. What is broken changes nothing.
    pub(crate) async fn follow(&self) {
        let mut files = self.files.clone();
        loop {
            files.changed().await;
            let config = self.config.clone();
            let Ok(read) = tokio::task::spawn_blocking(move || read(&config)).await else { continue };
            match read {
                // Sessions of the old configuration are not resumed under the new one: it has tickets of its own.
                Ok(new) => *self.current.write().unwrap_or_else(PoisonError::into_inner) = new,
                Err(error) => CertificateLoaded::Refused { error: &error }.emit(),
            }
        }
    }
}

fn read(config: &config::Tls) -> Result<Current, String> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(&config.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&files::read(&config.key)?)
        .map_err(|error| format!("{}: no private key in PEM form: {error}", config.key.display()))?;
    let expires = expiry(&chain[0]).map_err(|error| format!("{}: {error}", config.certificate.display()))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match &config.client_ca {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            builder.with_client_cert_verifier(verifier(authority, config.client_auth_optional, provider)?)
        }
    };
    let (certificate, key_path) = (config.certificate.display(), config.key.display());
    let server = builder
        .with_single_cert(chain, key)
        .map_err(|error| format!("{certificate} and {key_path} do not go together: {error}"))?;
    CertificateLoaded::Read { path: &config.certificate, expires }.emit();
    let negotiates = |protocol: &[u8]| {
        let mut server = server.clone();
        server.alpn_protocols.push(protocol.to_vec());
        Arc::new(server)
    };
    Ok(Current { grpc: negotiates(GRPC_ALPN), http: negotiates(HTTP_ALPN) })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = files::read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        Ok(_) => Err(format!("{}: no certificate in PEM form", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn verifier(
    authority: &Path,
    optional: bool,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", authority.display());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authority)? {
        roots.add(certificate).map_err(|error| named(&error))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = if optional { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(|error| named(&error))
}

/// When a certificate ends, in seconds since 1970.
fn expiry(certificate: &CertificateDer<'_>) -> Result<i64, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| format!("no certificate: {error}"))?;
    Ok(parsed.validity().not_after.timestamp())
}

/// Whom a certificate names: the first URI or else the first DNS name of its subject alternative names, or else its
/// common name. Only of use once the certificate was verified.
pub(super) fn name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let alternatives = alternatives.map_or(&[][..], |extension| &extension.value.general_names);
    let uri = alternatives.iter().find_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    let dns = alternatives.iter().find_map(|name| if let GeneralName::DNSName(dns) = name { Some(*dns) } else { None });
    let common = || certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let name = uri.or(dns).or_else(common)?;
    let fits = !name.is_empty() && name.len() <= MAX_NAME_LENGTH && !name.chars().any(char::is_control);
    fits.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn check(common: Option<&str>, alternatives: Vec<SanType>, expected: Option<&str>) {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(common) = common {
            params.distinguished_name.push(DnType::CommonName, common);
        }
        params.subject_alt_names = alternatives;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(name(certificate.der()).as_deref(), expected, "{common:?}");
    }

    #[test]
    fn a_certificate_names_its_holder() {
        let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
        let uri = |name: &str| SanType::URI(name.try_into().unwrap());
        check(Some("trainer"), vec![], Some("trainer"));
        check(Some("trainer"), vec![dns("a.example"), dns("b.example")], Some("a.example"));
        check(None, vec![dns("a.example"), uri("spiffe://example/rl")], Some("spiffe://example/rl"));
        check(None, vec![], None);
        check(Some("two\nlines"), vec![], None);
        check(Some(&"x".repeat(129)), vec![], None);
    }

    #[tokio::test]
    async fn a_pair_that_comes_between_reading_and_following_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (folder.path().join("cert"), folder.path().join("key"));
        let write = || {
            let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            std::fs::write(&certificate, own.cert.pem()).unwrap();
            std::fs::write(&key, own.signing_key.serialize_pem()).unwrap();
        };
        write();
        let (certificate, key) = (certificate.clone(), key.clone());
        let config = config::Tls { certificate, key, client_ca: None, client_auth_optional: false };
        let tls = Tls::load(&config).unwrap();
        let tls = Tls { files: tls.files.clone().every(Duration::from_millis(5)), ..tls };
        let old = Arc::clone(&tls.current.read().unwrap().grpc);
        write();
        let seen = async {
            while Arc::ptr_eq(&old, &tls.current.read().unwrap().grpc) {
                tokio::task::yield_now().await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(60), seen);
        tokio::select! {
            () = tls.follow() => {}
            seen = seen => seen.unwrap(),
        }
    }

    #[test]
    fn what_is_wrong_with_the_files_is_said_with_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let good = config::Tls {
            certificate: write("cert", &own.cert.pem()),
            key: write("key", &own.signing_key.serialize_pem()),
            client_ca: Some(write("ca", &own.cert.pem())),
            client_auth_optional: false,
        };
        assert!(read(&good).is_ok());
        let wrong = |config: config::Tls, words: &[&str]| {
            let error = read(&config).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{words:?} are not in: {error}");
        };
        let other = write("other", &KeyPair::generate().unwrap().serialize_pem());
        wrong(config::Tls { key: other, ..good.clone() }, &["cert and ", "other do not go together"]);
        wrong(config::Tls { key: good.certificate.clone(), ..good.clone() }, &["cert: no private key"]);
        wrong(config::Tls { certificate: good.key.clone(), ..good.clone() }, &["key: no certificate"]);
        wrong(config::Tls { client_ca: Some(write("empty", "")), ..good.clone() }, &["empty: no certificate"]);
        let absent = folder.path().join("absent");
        wrong(config::Tls { certificate: absent, ..good }, &["absent: No such file"]);
    }
}
