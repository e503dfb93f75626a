//! A response's body that tells when it has ended, and how: a streamed call is over with its last message, and its code
//! stands in the trailers.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tonic::Code;

/// Calls back once with the code: that of the headers or the trailers, or CANCELLED if the caller went away before.
pub(super) fn on_end(response: Response, ended: impl FnOnce(Code) + Send + 'static) -> Response {
    if let Some(code) = code(response.headers()) {
        ended(code);
        return response;
    }
    response.map(|inner| Body::new(Watched { inner, ended: Some(Box::new(ended)) }))
}

struct Watched {
    inner: Body,
    ended: Option<Box<dyn FnOnce(Code) + Send>>,
}

impl Watched {
    fn end(&mut self, code: Code) {
        if let Some(ended) = self.ended.take() {
            ended(code);
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.end(code(trailers).unwrap_or(Code::Unknown));
                }
            }
            Some(Err(_)) => self.end(Code::Unknown),
            // An HTTP response without trailers, such as a 404: no gRPC answer.
            None => self.end(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A body with one piece of data and then these trailers.
    struct Streamed(Vec<Frame<Bytes>>);

    impl HttpBody for Streamed {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Ready(self.0.pop().map(Ok))
        }
    }

    fn response(trailers: &str) -> (Response, mpsc::Receiver<Code>) {
        let trailers =
            HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), trailers.parse().unwrap())]);
        let frames = vec![Frame::trailers(trailers), Frame::data(Bytes::from_static(b"message"))];
        let (sender, receiver) = mpsc::channel();
        let response = Response::new(Body::new(Streamed(frames)));
        (on_end(response, move |code| sender.send(code).unwrap()), receiver)
    }

    async fn frame(response: &mut Response) {
        std::future::poll_fn(|cx| Pin::new(response.body_mut()).poll_frame(cx)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_trailers() {
        let (mut response, ended) = response("5");
        frame(&mut response).await;
        assert!(ended.try_recv().is_err(), "the answer goes on");
        frame(&mut response).await;
        assert_eq!(ended.try_recv().unwrap(), Code::NotFound);
        drop(response);
        assert!(ended.try_recv().is_err(), "an answer ends once");
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_to_the_end_is_cancelled() {
        let (mut response, ended) = response("0");
        frame(&mut response).await;
        drop(response);
        assert_eq!(ended.try_recv().unwrap(), Code::Cancelled);
    }

    #[test]
    fn an_error_without_a_message_is_over_at_once() {
        let (sender, ended) = mpsc::channel();
        let status = tonic::Status::unavailable("later").into_http::<Body>();
        let _response = on_end(status, move |code| sender.send(code).unwrap());
        assert_eq!(ended.try_recv().unwrap(), Code::Unavailable);
    }
}
