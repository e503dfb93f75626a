//! A span for every call: part of the caller's trace, with an id that is in every log line of the call.

use std::time::Instant;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::HeaderValue;
use tracing::{Instrument as _, Span, field};

use super::body;
use super::rpc::{Class, Rpc};
use crate::services::limits::MAX_REQUEST_ID_BYTES;
use crate::telemetry::tracing::follow_parent;

/// Where callers may put an id of their own; the answer carries it back.
const REQUEST_ID: &str = "x-request-id";

/// When a call came in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived(pub(crate) Instant);

/// Runs the call inside its span.
pub(crate) async fn trace(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Arrived(Instant::now()));
    let rpc = Rpc::of(&request);
    if rpc.class == Class::Infrastructure {
        return next.run(request).await;
    }
    let id = request_id(&request);
    let span = tracing::info_span!(
        target: "plumb",
        "call",
        otel.name = rpc.name,
        otel.kind = "server",
        rpc.system = rpc.system(),
        rpc = rpc.name,
        id = id.to_str().unwrap_or_default(),
        // Recorded by the service: the id inside the message.
        request_id = field::Empty,
        // Recorded by the auth layer, where callers have names.
        caller = field::Empty,
        code = field::Empty,
    );
    follow_parent(&span, request.headers());
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(REQUEST_ID, id);
    // The span lives as long as the answer.
    body::on_end(response, move |code| {
        span.record("code", field::debug(code));
    })
}

/// Puts the id of a call's message into its span; in a stream the last message's stays.
pub(crate) fn record_request_id(id: &str) {
    if !id.is_empty() && id.len() <= MAX_REQUEST_ID_BYTES {
        Span::current().record("request_id", id);
    }
}

/// Puts the name of a call's caller into its span.
pub(super) fn record_caller(name: &str) {
    Span::current().record("caller", name);
}

/// The caller's, unless it is too long.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|id| id.len() <= MAX_REQUEST_ID_BYTES && id.to_str().is_ok());
    given.cloned().unwrap_or_else(|| {
        let id = format!("{:016x}", rand::random::<u64>());
        HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("-"))
    })
}
