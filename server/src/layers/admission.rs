//! How many calls are worked on at a time, and how many that is now.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
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
    closed: AtomicBool,
    /// Cancelled to fail what is in flight.
    abort: CancellationToken,
}

impl Gate {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let room = Arc::new(Semaphore::new(limit as usize));
        Arc::new(Self { limit, room, closed: AtomicBool::new(false), abort: CancellationToken::new() })
    }

    /// Cancelled when calls in flight have to fail: streams, whose answer has begun, look at it themselves.
    pub(crate) fn aborted(&self) -> CancellationToken {
        self.abort.clone()
    }

    /// Calls in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.limit as usize - self.room.available_permits()
    }

    /// Lets nobody in any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Fails all calls in flight, whatever they wait for: the engine may be in the middle of a long step.
    pub(crate) fn abort(&self) {
        self.abort.cancel();
    }

    /// Waits until no call is in flight. The gate has to be closed.
    pub(crate) async fn empty(&self) {
        // The semaphore is never closed.
        let _all = self.room.acquire_many(self.limit).await;
    }

    fn enter(&self) -> Result<OwnedSemaphorePermit> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Draining);
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
            let response = tokio::select! {
                response = next.run(request) => response,
                () = gate.abort.cancelled() => Status::from(Error::Draining).into_http(),
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
        gate.close();
        assert_eq!(gate.enter().unwrap_err(), Error::Draining);
        drop(second);
        gate.empty().await;
        assert_eq!(gate.in_flight(), 0);
    }
}
