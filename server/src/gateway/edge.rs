//! Where HTTP meets gRPC: headers come in as those of gRPC, and statuses go out as JSON.
//!
//! What is overloaded answers 503 and not 429: verl takes every 4xx for final, and OpenRLHF, the clients of OpenAI and
//! Cohere and proxies come back after either.

use std::time::Duration;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use plumb_proto::code_name;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::{Error, Result};

/// Content type of all that is said.
pub(super) const JSON: &str = "application/json";
/// Where the layers look for a status.
pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// How long a caller waits, in seconds.
const TIMEOUT: &str = "x-request-timeout";
/// When to come back where nobody says so: the error of an item does not.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Milliseconds that fit into gRPC's header.
const MAX_MILLIS: f64 = 99_999_999.0;

/// Translates a request and its answer.
pub(super) async fn edge(mut request: Request, next: Next) -> Response {
    if let Err(error) = translate(request.headers_mut()) {
        return failed(&error.into());
    }
    let mut response = next.run(request).await;
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::Ok => {
            response.headers_mut().remove(GRPC_STATUS);
            response
        }
        Some(status) => {
            let mut answer = failed(&status);
            if let Some(id) = response.headers_mut().remove("x-request-id") {
                answer.headers_mut().insert("x-request-id", id);
            }
            answer
        }
        None if response.status().is_client_error() => {
            let code = response.status();
            let kind = if code == StatusCode::NOT_FOUND { Code::NotFound } else { Code::InvalidArgument };
            let mut answer = said(code, code.canonical_reason().unwrap_or_default(), code_name(kind));
            if let Some(allowed) = response.headers_mut().remove(header::ALLOW) {
                answer.headers_mut().insert(header::ALLOW, allowed);
            }
            answer
        }
        None => response,
    }
}

/// Puts time limit and key where the layers look for them.
fn translate(headers: &mut HeaderMap) -> Result<()> {
    if let Some(timeout) = headers.get(TIMEOUT) {
        let seconds = timeout.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
        let seconds = seconds
            .filter(|seconds| *seconds > 0.0)
            .ok_or_else(|| Error::invalid(TIMEOUT, "a number of seconds above 0 is expected"))?;
        let millis = (seconds * 1000.0).ceil().min(MAX_MILLIS) as u64;
        headers.insert("grpc-timeout", value(format!("{millis}m")));
    }
    // Frameworks that know nothing of keys take a URL with one: http://:KEY@host.
    if let Some(key) = headers.get(header::AUTHORIZATION).and_then(basic) {
        headers.insert(header::AUTHORIZATION, value(format!("Bearer {key}")));
    }
    Ok(())
}

/// The password of `Basic` credentials (RFC 7617), or the user's name where there is none.
fn basic(authorization: &HeaderValue) -> Option<String> {
    let (scheme, credentials) = authorization.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let credentials = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
    let (user, password) = credentials.split_once(':')?;
    Some(if password.is_empty() { user } else { password }.to_owned())
}

/// What has no place in a header is a key that nobody has.
fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
}

/// A status as the protocols have it.
fn failed(status: &Status) -> Response {
    let code = http_status(status.code());
    let is_busy = code == StatusCode::SERVICE_UNAVAILABLE;
    let mut response = said(code, status.message(), code_name(status.code()));
    let headers = response.headers_mut();
    let delay = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
    if let Some(delay) = delay.or(is_busy.then_some(RETRY_AFTER)) {
        headers.insert(header::RETRY_AFTER, whole_seconds(delay).into());
        // What OpenAI's clients read first.
        headers.insert("retry-after-ms", u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).into());
    }
    if status.code() == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn said(code: StatusCode, message: &str, kind: &str) -> Response {
    let body = json!({ "error": { "message": message, "type": kind, "code": code.as_u16() } }).to_string();
    (code, [(header::CONTENT_TYPE, JSON)], body).into_response()
}

/// The least that does not come too early.
fn whole_seconds(delay: Duration) -> u64 {
    (delay.as_secs() + u64::from(delay.subsec_nanos() > 0)).max(1)
}

/// As google.rpc.Code has it, but for what is overloaded and what is too large.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        // Only of a size here.
        Code::OutOfRange => StatusCode::PAYLOAD_TOO_LARGE,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::ResourceExhausted | Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn check(error: Error, code: u16, kind: &str, retry_after: Option<&str>) {
        let message = error.to_string();
        let response = failed(&error.into());
        assert_eq!(response.status().as_u16(), code, "{message}");
        let found = response.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(found.as_deref(), retry_after, "{message}");
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body, json!({ "error": { "message": message, "type": kind, "code": code } }));
    }

    #[tokio::test]
    async fn errors_have_the_status_that_makes_callers_do_the_right_thing() {
        let why = || "why".to_owned();
        let full = |millis| Error::ResourceExhausted { what: why(), retry_after: Duration::from_millis(millis) };
        check(Error::invalid("query[3]", "why"), 400, "INVALID_ARGUMENT", None).await;
        check(Error::failed_precondition("why"), 400, "FAILED_PRECONDITION", None).await;
        check(Error::Unauthenticated { message: why() }, 401, "UNAUTHENTICATED", None).await;
        check(Error::PermissionDenied { message: why() }, 403, "PERMISSION_DENIED", None).await;
        check(Error::not_found("why"), 404, "NOT_FOUND", None).await;
        check(Error::internal("why"), 500, "INTERNAL", None).await;
        check(Error::NonFinite { what: why() }, 500, "INTERNAL", None).await;
        // Tried again by verl as well.
        check(full(1), 503, "RESOURCE_EXHAUSTED", Some("1")).await;
        check(full(1001), 503, "RESOURCE_EXHAUSTED", Some("2")).await;
        check(Error::Draining, 503, "UNAVAILABLE", Some("1")).await;
        check(Error::DeviceLost, 503, "UNAVAILABLE", Some("5")).await;
        check(Error::DeadlineExceeded, 504, "DEADLINE_EXCEEDED", None).await;
    }

    #[test]
    fn every_503_says_when_to_come_back() {
        // As from an item's error, which has a code and a message.
        for code in [Code::Unavailable, Code::ResourceExhausted] {
            let headers = failed(&Status::new(code, "why")).headers().clone();
            assert_eq!(
                (&headers[header::RETRY_AFTER], &headers["retry-after-ms"]),
                (&"1".parse().unwrap(), &"1000".parse().unwrap())
            );
        }
        assert!(!failed(&Status::internal("why")).headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn headers_become_those_of_grpc() {
        let check = |name: &'static str, given: &str, becomes: &'static str, expected: Option<&str>| {
            let name = HeaderName::from_static(name);
            let mut headers = HeaderMap::from_iter([(name, given.parse().unwrap())]);
            let found = translate(&mut headers).ok().and_then(|()| headers.remove(becomes));
            assert_eq!(found.as_ref().map(|value| value.to_str().unwrap()), expected, "{given}");
        };
        let timeout = |given, expected| check(TIMEOUT, given, "grpc-timeout", expected);
        timeout("30", Some("30000m"));
        timeout("0.0001", Some("1m"));
        timeout("1e300", Some("99999999m"));
        for wrong in ["0", "-1", "NaN", "30s", ""] {
            timeout(wrong, None);
        }
        let key = |given, expected| check("authorization", given, "authorization", Some(expected));
        key("Bearer abc", "Bearer abc");
        // printf :secret | base64; printf secret: | base64; printf 'user:a:b' | base64
        key("Basic OnNlY3JldA==", "Bearer secret");
        key("basic c2VjcmV0Og==", "Bearer secret");
        key("Basic dXNlcjphOmI=", "Bearer a:b");
        key("Basic !", "Basic !");
    }
}
