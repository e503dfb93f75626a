//! The caller's deadline: how long it says that it waits, and no work after that.

use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tonic::Status;

use super::trace::Arrived;
use crate::error::Error;

/// Until when a call's answer is of use; absent if the caller did not say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(pub(crate) Instant);

/// Tells the service the deadline, and gives up on it then: dropping a call takes its work out of the queue.
pub(crate) async fn deadline(mut request: Request, next: Next) -> Response {
    let Some(deadline) = of(&request) else { return next.run(request).await };
    request.extensions_mut().insert(Deadline(deadline));
    // tonic has a timer of its own outside of the layers, set later and so never earlier; it would say CANCELLED.
    match tokio::time::timeout_at(deadline.into(), next.run(request)).await {
        Ok(response) => response,
        Err(_) => Status::from(Error::DeadlineExceeded).into_http(),
    }
}

/// Until when the caller says that it waits.
pub(super) fn of(request: &Request) -> Option<Instant> {
    let timeout = parse(request.headers().get("grpc-timeout")?.to_str().ok()?)?;
    let arrived = request.extensions().get().map_or_else(Instant::now, |&Arrived(arrived)| arrived);
    arrived.checked_add(timeout)
}

/// Up to eight digits and a unit, as the protocol has it.
fn parse(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.is_empty() || number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_of_the_protocol() {
        let check = |text: &str, expected: Option<Duration>| assert_eq!(parse(text), expected, "{text}");
        check("2H", Some(Duration::from_secs(7200)));
        check("3M", Some(Duration::from_secs(180)));
        check("42S", Some(Duration::from_secs(42)));
        check("250m", Some(Duration::from_millis(250)));
        check("99999999u", Some(Duration::from_micros(99_999_999)));
        check("1n", Some(Duration::from_nanos(1)));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "999999999S", "1é"] {
            check(wrong, None);
        }
    }
}
