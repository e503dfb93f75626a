//! Streams of answers, with the call's deadline and typed errors.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Status, Streaming};

use crate::{CallError, Error};

/// Answers of a streaming call, in the order of their arrival. Dropping it cancels the call on the server.
#[derive(Debug)]
pub struct Answers<T> {
    inner: Streaming<T>,
    // The server has the deadline too; this one holds when the server, or the way to it, is gone.
    deadline: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl<T> Answers<T> {
    pub(crate) fn new(inner: Streaming<T>, deadline: Option<Instant>) -> Self {
        Self { inner, deadline: deadline.map(|at| Box::pin(sleep_until(at))), ended: false }
    }

    fn fail<A>(&mut self, status: &Status) -> Poll<Option<Result<A, Error>>> {
        self.ended = true;
        Poll::Ready(Some(Err(Box::new(CallError::new(status, 1)).into())))
    }
}

impl<T> Stream for Answers<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match Pin::new(&mut self.inner).poll_next(cx) {
            Poll::Ready(Some(Ok(message))) => Poll::Ready(Some(Ok(message))),
            Poll::Ready(Some(Err(status))) => self.fail(&status),
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(None)
            }
            Poll::Pending => match self.deadline.as_mut().map(|sleep| sleep.as_mut().poll(cx)) {
                Some(Poll::Ready(())) => self.fail(&Status::deadline_exceeded("no end of the stream in time")),
                _ => Poll::Pending,
            },
        }
    }
}
