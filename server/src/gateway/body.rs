//! Reads the body of a request, as far as there is room for it.

use axum::body::{Body, HttpBody as _};
use futures::StreamExt as _;
use http::{HeaderMap, header};
use tonic::Status;

use crate::error::{Error, Result};
use crate::layers::caller::Caller;
use crate::layers::inflow::{Inflow, Room, SMALL};

/// JSON has to be called so: a page in a browser then cannot send it here without asking first (CORS).
pub(super) fn check_type(headers: &HeaderMap) -> Result<()> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match given.to_ascii_lowercase().contains("json") {
        true => Ok(()),
        false => Err(Error::invalid("content-type", "`application/json` is expected")),
    }
}

/// The whole body, and the room that it takes. What does not say how long it is takes room for the `longest`.
///
/// # Errors
/// OUT_OF_RANGE if it is longer, DEADLINE_EXCEEDED if it does not arrive in time, CANCELLED if it breaks off.
pub(super) async fn read(
    inflow: &Inflow,
    longest: usize,
    caller: &Caller,
    body: Body,
) -> Result<(Vec<u8>, Option<Room>), Status> {
    let too_long = || Status::out_of_range(format!("the body has more than {longest} bytes, which is the limit"));
    let length = body.size_hint().exact().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if length.is_some_and(|length| length > longest) {
        return Err(too_long());
    }
    let mut room = match length {
        Some(length) => inflow.room(caller, length).await,
        None => None,
    };
    let mut bytes = Vec::with_capacity(length.unwrap_or_default());
    let mut body = body.into_data_stream();
    while let Some(data) = body.next().await {
        let data = data.map_err(broken)?;
        if data.len() > longest - bytes.len() {
            return Err(too_long());
        }
        if length.is_none() && room.is_none() && bytes.len() + data.len() > SMALL as usize {
            room = inflow.room(caller, longest).await;
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, room))
}

/// A status, if a layer has cut the body; else it is the caller that is gone.
fn broken(error: axum::Error) -> Status {
    let mut causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
    let status = causes.find_map(|error| error.downcast_ref::<Status>());
    status.cloned().unwrap_or_else(|| Error::Cancelled.into())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    fn inflow() -> std::sync::Arc<Inflow> {
        Inflow::new(400 << 10, 200 << 10, Duration::from_secs(60))
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
            let found = read(&inflow, 200_000, &caller, body).await;
            let found = found.map(|(bytes, room)| (bytes.len(), room.is_some())).map_err(|status| status.code());
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn a_body_that_a_layer_cuts_says_why() {
        let cut = || Err::<Vec<u8>, _>(Status::deadline_exceeded("late"));
        let gone = || Err(std::io::Error::other("reset"));
        let bodies = [
            (Body::from_stream(futures::stream::iter([cut()])), Code::DeadlineExceeded),
            (Body::from_stream(futures::stream::iter([gone() as std::io::Result<Vec<u8>>])), Code::Cancelled),
        ];
        for (body, code) in bodies {
            let error = read(&inflow(), 1000, &Caller("a".into()), body).await.err().unwrap();
            assert_eq!(error.code(), code);
        }
    }

    #[test]
    fn json_has_to_be_called_json() {
        let check = |value: &'static str| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, http::HeaderValue::from_static(value))]);
            check_type(&headers).is_ok()
        };
        assert!(check("application/json") && check("Application/JSON; charset=utf-8"));
        assert!(!check("text/plain") && check_type(&HeaderMap::new()).is_err());
    }
}
