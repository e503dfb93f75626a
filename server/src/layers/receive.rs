//! How long a request may take to arrive: a caller that opens a call and never sends its message holds a place that
//! others could use.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::rpc::Rpc;

/// Ends a request that is not there in time. A stream of requests may take as long as it likes, and a body over HTTP has
/// its time from when there is room for it: the gateway looks at its clock.
pub(crate) async fn receive(State(timeout): State<Duration>, request: Request, next: Next) -> Response {
    let rpc = Rpc::of(&request);
    if rpc.streams_requests() || rpc.is_http() {
        return next.run(request).await;
    }
    next.run(request.map(|inner| Body::new(Timed { inner, timeout, end: Box::pin(sleep(timeout)) }))).await
}

/// Why a request, or a message of a stream, is not waited for.
pub(crate) fn late(timeout: Duration) -> Status {
    Status::deadline_exceeded(format!("the request did not arrive within {} s", timeout.as_secs_f64()))
}

struct Timed {
    inner: Body,
    timeout: Duration,
    end: Pin<Box<Sleep>>,
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // First: a request that always has some more to say would never end.
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(late(self.timeout).into())));
        }
        Pin::new(&mut self.inner).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
