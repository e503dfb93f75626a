//! Whose a call is, as far as sharing the server goes.
//!
//! Clients are told apart by the name of their key, where keys have names, else by the address that they call from. A
//! client that is many, such as the workers of one run behind one key or one address, may tell them apart by `x-client-id`;
//! the server takes their word for it: a caller that makes up ids gets the share of several. What a key may do is decided
//! by the key alone.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{Extensions, HeaderMap};
use tonic::Status;
use tonic::transport::server::TcpConnectInfo;

use super::auth::KeyName;
use super::rpc::{Class, Rpc};
use crate::error::{Error, Result};
use crate::telemetry::events::Rejected;

/// Where a caller may say which of the clients behind its key or address it is.
const CLIENT_ID: &str = "x-client-id";
/// Ids are kept for as long as their client has work.
const MAX_CLIENT_ID_LENGTH: usize = 64;

/// Whose a call is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller(pub(crate) Arc<str>);

impl Caller {
    /// The caller that the layer has found out.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_else(|| Self(Arc::from("(unknown)")))
    }
}

/// Finds out whose the call is.
pub(crate) async fn caller(mut request: Request, next: Next) -> Response {
    if Rpc::of(&request).class == Class::Infrastructure {
        return next.run(request).await;
    }
    match identify(request.headers(), request.extensions()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            Rejected { error: &error }.emit();
            Status::from(error).into_http()
        }
    }
}

fn identify(headers: &HeaderMap, extensions: &Extensions) -> Result<Caller> {
    let owner = match extensions.get::<KeyName>() {
        Some(KeyName(name)) => format!("key:{name}"),
        None => peer(extensions).map_or_else(|| "(unknown)".to_owned(), address),
    };
    let Some(id) = headers.get(CLIENT_ID) else { return Ok(Caller(owner.into())) };
    let good = |id: &&str| (1..=MAX_CLIENT_ID_LENGTH).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    let id = id.to_str().ok().filter(good).ok_or_else(|| {
        let allowed = format!("1 to {MAX_CLIENT_ID_LENGTH} visible ASCII characters are allowed");
        Error::invalid(CLIENT_ID, allowed)
    })?;
    Ok(Caller(format!("{owner} {id}").into()))
}

/// Where the connection comes from.
fn peer(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<TcpConnectInfo>()?.remote_addr().map(|address| address.ip())
}

/// A host with IPv6 has a network of addresses to itself.
fn address(ip: IpAddr) -> String {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::/64")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(id: Option<&str>, key: Option<&str>, address: Option<&str>, expected: Result<&str, &str>) {
        let mut headers = HeaderMap::new();
        if let Some(id) = id {
            headers.insert(CLIENT_ID, http::HeaderValue::from_bytes(id.as_bytes()).unwrap());
        }
        let mut extensions = Extensions::new();
        if let Some(key) = key {
            extensions.insert(KeyName(key.into()));
        }
        if let Some(address) = address {
            let address = Some(address.parse().unwrap());
            extensions.insert(TcpConnectInfo { local_addr: None, remote_addr: address });
        }
        match (identify(&headers, &extensions), expected) {
            (Ok(Caller(found)), Ok(expected)) => assert_eq!(&*found, expected),
            (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
            (found, _) => panic!("{found:?} for {id:?}, {key:?}, {address:?}"),
        }
    }

    #[test]
    fn a_key_comes_before_an_address_and_an_id_tells_its_clients_apart() {
        check(None, None, None, Ok("(unknown)"));
        check(None, None, Some("10.0.0.7:1234"), Ok("10.0.0.7"));
        check(None, None, Some("[::ffff:10.0.0.7]:1234"), Ok("10.0.0.7"));
        check(None, None, Some("[2001:db8:1:2:3:4:5:6]:1"), Ok("2001:db8:1:2::/64"));
        check(Some("worker-3"), None, Some("10.0.0.7:1"), Ok("10.0.0.7 worker-3"));
        check(None, Some("run"), Some("10.0.0.7:1"), Ok("key:run"));
        check(Some("eval"), Some("run"), Some("10.0.0.7:1"), Ok("key:run eval"));
    }

    #[test]
    fn ids_are_bounded() {
        for wrong in ["", "a b", "é", &"x".repeat(65)] {
            check(Some(wrong), None, None, Err("x-client-id: 1 to 64 visible ASCII"));
        }
    }
}
