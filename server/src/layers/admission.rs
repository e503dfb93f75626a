//! How many calls are worked on at a time, and how many that is now.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::Status;

use super::body;
use super::rpc::{Class, Rpc};
use crate::error::{Error, Result};
use crate::telemetry::events::Rejected;

/// Calls come and go in milliseconds; how fast is not known here.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Counts the calls in flight, up to a limit.
pub(crate) struct Gate {
    limit: u32,
    room: Arc<Semaphore>,
    /// Why nobody is let in any more.
    closed: OnceLock<Error>,
    /// Why what is in flight has to fail.
    abort: watch::Sender<Option<Error>>,
}

/// Tells a call in flight that it has to fail.
#[derive(Clone, Debug)]
pub(crate) struct Aborted(watch::Receiver<Option<Error>>);

impl Aborted {
    /// Returns when it has to, with the reason.
    pub(crate) async fn cause(&mut self) -> Error {
        match self.0.wait_for(Option::is_some).await.map(|cause| cause.clone()) {
            Ok(Some(cause)) => cause,
            // The gate is gone, and nobody is left to say so.
            _ => std::future::pending().await,
        }
    }

    /// The reason, if it has to.
    pub(crate) fn known(&self) -> Option<Error> {
        self.0.borrow().clone()
    }
}

impl Gate {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let room = Arc::new(Semaphore::new(limit as usize));
        Arc::new(Self { limit, room, closed: OnceLock::new(), abort: watch::Sender::new(None) })
    }

    /// Tells when calls in flight have to fail: streams, whose answer has begun, look at it themselves.
    pub(crate) fn aborted(&self) -> Aborted {
        Aborted(self.abort.subscribe())
    }

    /// Calls in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.limit as usize - self.room.available_permits()
    }

    /// Lets nobody in any more.
    pub(crate) fn close(&self, cause: Error) {
        // The first cause stays.
        let _ = self.closed.set(cause);
    }

    /// Fails all calls in flight, whatever they wait for: the engine may be in the middle of a long step.
    pub(crate) fn abort(&self, cause: Error) {
        self.abort.send_replace(Some(cause));
    }

    /// Waits until no call is in flight. The gate has to be closed.
    pub(crate) async fn empty(&self) {
        // The semaphore is never closed.
        let _all = self.room.acquire_many(self.limit).await;
    }

    fn enter(&self) -> Result<OwnedSemaphorePermit> {
        if let Some(cause) = self.closed.get() {
            return Err(cause.clone());
        }
        Arc::clone(&self.room).try_acquire_owned().map_err(|_| Error::ResourceExhausted {
            what: format!("{} calls are in flight, which is the limit", self.limit),
            retry_after: RETRY_AFTER,
        })
    }
}

/// Lets the call pass if there is room; the room is given back when the answer is complete.
pub(crate) async fn admission(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    if Rpc::of(&request).class == Class::Infrastructure {
        return next.run(request).await;
    }
    match gate.enter() {
        Ok(permit) => {
            let mut aborted = gate.aborted();
            let response = tokio::select! {
                response = next.run(request) => response,
                cause = aborted.cause() => Status::from(cause).into_http(),
            };
            body::on_end(response, move |_| drop(permit))
        }
        Err(error) => {
            Rejected { error: &error }.emit();
            Status::from(error).into_http()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_gate_counts_and_refuses() {
        let gate = Gate::new(2);
        let first = gate.enter().unwrap();
        let second = gate.enter().unwrap();
        assert_eq!(gate.in_flight(), 2);
        assert!(gate.enter().unwrap_err().retry_after().is_some());
        drop(first);
        assert_eq!(gate.in_flight(), 1);
        gate.close(Error::Draining);
        assert_eq!(gate.enter().unwrap_err(), Error::Draining);
        drop(second);
        gate.empty().await;
        assert_eq!(gate.in_flight(), 0);
    }
}
