//! Who may call: the key of a call, or the certificate of its connection, against the rules of [`Access`].

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header;
use tonic::Status;
use tonic::transport::server::TcpConnectInfo;

use super::rpc::Rpc;
use super::trace;
use crate::access::Access;
use crate::connections::Peer;
use crate::telemetry::events::Rejected;

/// Whose key a call came with; not there if the server asks for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyName(pub(crate) Arc<str>);

/// Lets the call pass, or answers it.
pub(crate) async fn auth(State(access): State<Arc<Access>>, mut request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
    let peer = request.extensions().get::<Peer>();
    let addresses = peer.map(|Peer { address, local, .. }| (*address, *local));
    match access.check(Rpc::of(&request).class, authorization.map(bearer), peer) {
        Ok(name) => {
            let extensions = request.extensions_mut();
            if let Some((remote, local)) = addresses {
                // Where tonic's own `remote_addr` looks.
                extensions.insert(TcpConnectInfo { local_addr: Some(local), remote_addr: Some(remote) });
            }
            if let Some(name) = name {
                trace::record_caller(&name);
                extensions.insert(KeyName(name));
            }
            next.run(request).await
        }
        Err(error) => {
            Rejected { error: &error }.emit();
            Status::from(error).into_http()
        }
    }
}

/// The key in `Bearer KEY`; the scheme's case does not matter (RFC 9110). Anything else is a key that nobody has.
fn bearer(authorization: &str) -> &str {
    match authorization.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_stands_behind_its_scheme() {
        for (authorization, expected) in
            [("Bearer c1", "c1"), ("bearer  c2 ", "c2"), ("Basic c1", ""), ("Bearer", ""), ("", "")]
        {
            assert_eq!(bearer(authorization), expected, "{authorization}");
        }
    }
}
