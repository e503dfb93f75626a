//! Reads the body of a request, as far as there is room for it.

use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use futures::StreamExt as _;
use http::{HeaderMap, header};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Status;

use crate::error::{Error, Result};
use crate::layers::caller::Caller;
use crate::layers::inflow::{Inflow, Room, SMALL};
use crate::layers::receive::late;
use crate::telemetry::events::{AdmissionRefused, Rejected};

/// When to come back for memory that others hold: bodies come and go with the calls that they ask for.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// JSON has to be called so: a page in a browser then cannot send it here without asking first (CORS). It may send
/// `text/plain` with whatever parameters (Fetch Standard, "CORS-safelisted request-header").
pub(super) fn check_type(headers: &HeaderMap) -> Result<()> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json = |kind: &str| kind == "json" || kind.ends_with("+json");
    match essence.strip_prefix("application/").is_some_and(is_json) {
        true => Ok(()),
        false => Err(Error::invalid("content-type", "`application/json` is expected")),
    }
}

/// The whole body, and the room that it takes. What does not say how long it is takes room for the `longest`.
///
/// # Errors
/// OUT_OF_RANGE if it is longer, RESOURCE_EXHAUSTED if there is no room within `patience`, DEADLINE_EXCEEDED if it does
/// not arrive in time, CANCELLED if it breaks off.
pub(super) async fn read(
    inflow: &Inflow,
    longest: usize,
    caller: &Caller,
    body: Body,
    patience: Duration,
) -> Result<(Vec<u8>, Option<Room>), Status> {
    let too_long = || Status::out_of_range(format!("the body has more than {longest} bytes, which is the limit"));
    // Nobody reads meanwhile: that a caller has gone is not seen before the end.
    let room = async |bytes| match timeout(patience, inflow.room(caller, bytes)).await {
        Ok(room) => Ok(room),
        Err(_) => {
            let what = format!("there is no memory for the {bytes} bytes of the body");
            let error = Error::ResourceExhausted { what, retry_after: RETRY_AFTER };
            AdmissionRefused { reason: "memory" }.emit();
            Rejected { error: &error }.emit();
            Err(error)
        }
    };
    let length = body.size_hint().exact().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if length.is_some_and(|length| length > longest) {
        return Err(too_long());
    }
    let mut held = match length {
        Some(length) => room(length).await?,
        None => None,
    };
    let mut bytes = Vec::with_capacity(length.unwrap_or_default());
    let mut body = body.into_data_stream();
    let mut end = Instant::now() + inflow.arrival;
    while let Some(data) = timeout_at(end, body.next()).await.map_err(|_| late(inflow.arrival))? {
        // Nothing else cuts a body than that its caller is gone.
        let data = data.map_err(|_| Error::Cancelled)?;
        if data.len() > longest - bytes.len() {
            return Err(too_long());
        }
        if length.is_none() && held.is_none() && bytes.len() + data.len() > SMALL as usize {
            held = room(longest).await?;
            end = Instant::now() + inflow.arrival;
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, held))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn inflow() -> std::sync::Arc<Inflow> {
        Inflow::new(400 << 10, 200 << 10, LONG)
    }

    /// A body that comes in pieces and does not say how long it is.
    fn chunked(pieces: usize, bytes: usize) -> Body {
        let pieces = (0..pieces).map(move |_| Ok::<_, Infallible>(vec![b'x'; bytes]));
        Body::from_stream(futures::stream::iter(pieces))
    }

    #[tokio::test]
    async fn a_body_is_bounded_whether_or_not_it_says_how_long_it_is() {
        let (inflow, caller) = (inflow(), Caller("a".into()));
        for (body, expected) in [
            (Body::from(vec![0; 1000]), Ok((1000, false))),
            (Body::from(vec![0; 100_000]), Ok((100_000, true))),
            (chunked(10, 100), Ok((1000, false))),
            (chunked(10, 10_000), Ok((100_000, true))),
            (Body::from(vec![0; 200_001]), Err(Code::OutOfRange)),
            (chunked(200_001, 1), Err(Code::OutOfRange)),
        ] {
            let found = read(&inflow, 200_000, &caller, body, LONG).await;
            let found = found.map(|(bytes, room)| (bytes.len(), room.is_some())).map_err(|status| status.code());
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn a_body_that_finds_no_memory_is_told_to_come_back() {
        let (inflow, caller) = (inflow(), Caller("a".into()));
        let (_, held) = read(&inflow, 200_000, &caller, Body::from(vec![0; 150_000]), LONG).await.unwrap();
        for body in [Body::from(vec![0; 100_000]), chunked(10, 10_000)] {
            let refused = read(&inflow, 200_000, &caller, body, Duration::from_millis(1)).await.err().unwrap();
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
            assert!(refused.get_error_details().retry_info().is_some(), "{refused}");
        }
        // What takes none waits for none.
        let small = read(&inflow, 200_000, &caller, Body::from(vec![0; 1000]), Duration::ZERO).await;
        assert!(small.is_ok_and(|(_, room)| room.is_none()));
        drop(held);
        read(&inflow, 200_000, &caller, Body::from(vec![0; 100_000]), LONG).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_late_and_one_that_breaks_off_is_cancelled() {
        let arrival = Duration::from_millis(50);
        let inflow = Inflow::new(400 << 10, 200 << 10, arrival);
        let caller = Caller("a".into());
        let gone = Body::from_stream(futures::stream::iter([Err::<Vec<u8>, _>(std::io::Error::other("reset"))]));
        let never = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, Infallible>>());
        for (body, code) in [(gone, Code::Cancelled), (never, Code::DeadlineExceeded)] {
            let error = read(&inflow, 1000, &caller, body, LONG).await.err().unwrap();
            assert_eq!(error.code(), code, "{error}");
        }
        // Its time begins when there is room for it.
        for body in [|| Body::from(vec![0; 100_000]), || chunked(10, 10_000)] {
            let (_, held) = read(&inflow, 200_000, &caller, Body::from(vec![0; 150_000]), LONG).await.unwrap();
            let freed = async {
                tokio::time::sleep(2 * arrival).await;
                drop(held);
            };
            let (found, ()) = tokio::join!(read(&inflow, 200_000, &caller, body(), LONG), freed);
            assert_eq!(found.unwrap().0.len(), 100_000);
        }
    }

    #[test]
    fn json_has_to_be_called_json() {
        let check = |value: &'static str| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, http::HeaderValue::from_static(value))]);
            check_type(&headers).is_ok()
        };
        for json in
            ["application/json", "Application/JSON; charset=utf-8", "application/json ;a=b", "application/ld+json"]
        {
            assert!(check(json), "{json}");
        }
        for other in [
            "text/plain",
            "text/plain;x=json",
            "text/plain; x=application/json",
            "application/x-www-form-urlencoded; a=+json",
            "multipart/form-data; boundary=json",
            "text/json",
            "application/jsonp",
            "application/",
            "",
        ] {
            assert!(!check(other), "{other}");
        }
        assert!(check_type(&HeaderMap::new()).is_err());
    }
}
