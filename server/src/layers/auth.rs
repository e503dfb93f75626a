//! Who may call: bearer keys, compared in constant time.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use tonic::Status;

use super::rpc::{Class, Rpc};
use crate::config::{Access, Secret};
use crate::error::{Error, Result};
use crate::telemetry::events::Rejected;

/// Whose key a call came with; not there if the server asks for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyName(pub(crate) Arc<str>);

/// Keys of a server. Their hashes are compared, so that the time tells nothing about lengths either.
pub(crate) struct Keys {
    client: Vec<[u8; 32]>,
    admin: Vec<[u8; 32]>,
}

impl Keys {
    pub(crate) fn new(access: &Access) -> Arc<Self> {
        let hashes = |keys: &[Secret]| keys.iter().map(|key| hash(key.reveal())).collect();
        Arc::new(Self { client: hashes(&access.api_keys), admin: hashes(&access.admin_api_keys) })
    }

    /// Whether a caller with this `authorization` may call an rpc. An admin's key is good for everything; where no
    /// admin key is set, whoever may call may also change models; where no key is set at all, everybody may.
    fn check(&self, class: Class, authorization: Option<&str>) -> Result<()> {
        let (expected, role) = match class {
            Class::Infrastructure => return Ok(()),
            Class::Client => (&self.client, "a client's"),
            Class::Admin if self.admin.is_empty() => (&self.client, "a client's"),
            Class::Admin => (&self.admin, "an admin's"),
        };
        if expected.is_empty() {
            return Ok(());
        }
        let key = authorization.and_then(bearer).ok_or_else(|| Error::Unauthenticated {
            message: "this server needs a key: send `authorization: Bearer KEY`".to_owned(),
        })?;
        let key = hash(key);
        let (is_client, is_admin) = (is_one_of(&key, &self.client), is_one_of(&key, &self.admin));
        if is_admin || (is_client && std::ptr::eq(expected, &self.client)) {
            return Ok(());
        }
        Err(match is_client {
            true => Error::PermissionDenied { message: format!("this rpc needs {role} key") },
            false => Error::Unauthenticated { message: "the key is not known to this server".to_owned() },
        })
    }
}

/// Lets the call pass, or answers it.
pub(crate) async fn auth(State(keys): State<Arc<Keys>>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    match keys.check(Rpc::of(&request).class, authorization) {
        Ok(()) => next.run(request).await,
        Err(error) => {
            Rejected { error: &error }.emit();
            Status::from(error).into_http()
        }
    }
}

/// The key in `Bearer KEY`; the scheme's case does not matter (RFC 9110).
fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, key) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Looks at every key, whichever it is.
fn is_one_of(key: &[u8; 32], keys: &[[u8; 32]]) -> bool {
    keys.iter().fold(Choice::from(0), |found, other| found | key.ct_eq(other)).into()
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn keys(client: &[&str], admin: &[&str]) -> Arc<Keys> {
        let secrets = |keys: &[&str]| keys.iter().map(|key| key.parse().unwrap()).collect();
        Keys::new(&Access { api_keys: secrets(client), admin_api_keys: secrets(admin) })
    }

    fn check(keys: &Keys, class: Class, authorization: Option<&str>, expected: Code) {
        let code = keys.check(class, authorization).map_or_else(|error| error.code(), |()| Code::Ok);
        assert_eq!(code, expected, "{class:?} with {authorization:?}");
    }

    #[test]
    fn keys_open_what_they_are_for() {
        let both = keys(&["c1", "c2"], &["a"]);
        check(&both, Class::Infrastructure, None, Code::Ok);
        check(&both, Class::Client, None, Code::Unauthenticated);
        check(&both, Class::Client, Some("Bearer wrong"), Code::Unauthenticated);
        check(&both, Class::Client, Some("Basic c1"), Code::Unauthenticated);
        check(&both, Class::Client, Some("Bearer"), Code::Unauthenticated);
        check(&both, Class::Client, Some("Bearer c1"), Code::Ok);
        check(&both, Class::Client, Some("bearer  c2 "), Code::Ok);
        check(&both, Class::Client, Some("Bearer a"), Code::Ok);
        check(&both, Class::Admin, None, Code::Unauthenticated);
        check(&both, Class::Admin, Some("Bearer wrong"), Code::Unauthenticated);
        check(&both, Class::Admin, Some("Bearer c1"), Code::PermissionDenied);
        check(&both, Class::Admin, Some("Bearer a"), Code::Ok);
    }

    #[test]
    fn without_keys_the_server_is_open() {
        let open = keys(&[], &[]);
        check(&open, Class::Client, None, Code::Ok);
        check(&open, Class::Admin, Some("Bearer whatever"), Code::Ok);
        let client_only = keys(&["c"], &[]);
        check(&client_only, Class::Admin, None, Code::Unauthenticated);
        check(&client_only, Class::Admin, Some("Bearer c"), Code::Ok);
        let admin_only = keys(&[], &["a"]);
        check(&admin_only, Class::Client, None, Code::Ok);
        check(&admin_only, Class::Admin, None, Code::Unauthenticated);
        check(&admin_only, Class::Admin, Some("Bearer a"), Code::Ok);
    }
}
