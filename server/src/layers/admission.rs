//! How many calls are worked on at a time, and how many that is now, of each client and in all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::Status;

use super::body;
use super::caller::Caller;
use super::rpc::{Class, Rpc};
use crate::error::{Error, Result};
use crate::telemetry::events::{AdmissionRefused, Rejected};

/// Calls come and go in milliseconds; how fast is not known here. Those that are refused together are spread over as much
/// again.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// A client may have this many times the places that are free: alone nearly all of them, and the fewer the more others
/// have, so that there is always one for somebody new (Choudhury and Hahne 1998, "Dynamic Queue Length Thresholds for
/// Shared-Memory Packet Switches").
const OF_FREE: usize = 8;

/// Counts the calls in flight, up to a limit.
pub(crate) struct Gate {
    limit: u32,
    of_client: Mutex<HashMap<Arc<str>, usize>>,
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
        Arc::new(Self {
            limit,
            of_client: Mutex::default(),
            room,
            closed: OnceLock::new(),
            abort: watch::Sender::new(None),
        })
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

    fn enter(self: &Arc<Self>, caller: &Caller) -> Result<Place> {
        if let Some(cause) = self.closed.get() {
            return Err(cause.clone());
        }
        let mut of_client = self.counts();
        let held = of_client.get(&caller.0).copied().unwrap_or(0);
        let free = self.room.available_permits();
        if free > 0 && held >= OF_FREE * free {
            return Err(refused(
                "client_calls",
                format!("{held} calls of this client are in flight, {free} places are left"),
            ));
        }
        let permit = Arc::clone(&self.room)
            .try_acquire_owned()
            .map_err(|_| refused("calls", format!("{} calls are in flight, which is the limit", self.limit)))?;
        of_client.insert(Arc::clone(&caller.0), held + 1);
        Ok(Place { permit, caller: caller.clone(), gate: Arc::clone(self) })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.of_client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(reason: &'static str, what: String) -> Error {
    AdmissionRefused { reason }.emit();
    Error::ResourceExhausted { what, retry_after: RETRY_AFTER.mul_f64(1.0 + rand::random::<f64>()) }
}

/// A call's place. It is only held.
struct Place {
    #[expect(dead_code, reason = "only held")]
    permit: OwnedSemaphorePermit,
    caller: Caller,
    gate: Arc<Gate>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_client = self.gate.counts();
        if let Some(held) = of_client.get_mut(&self.caller.0) {
            *held -= 1;
            if *held == 0 {
                of_client.remove(&self.caller.0);
            }
        }
    }
}

/// Lets the call pass if there is room; the room is given back when the answer is complete.
pub(crate) async fn admission(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    if Rpc::of(&request).class == Class::Infrastructure {
        return next.run(request).await;
    }
    match gate.enter(&Caller::of(request.extensions())) {
        Ok(place) => {
            let mut aborted = gate.aborted();
            let response = tokio::select! {
                response = next.run(request) => response,
                cause = aborted.cause() => Status::from(cause).into_http(),
            };
            body::on_end(response, move |_| drop(place))
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

    fn caller(name: &str) -> Caller {
        Caller(name.into())
    }

    #[tokio::test]
    async fn the_gate_counts_and_refuses() {
        let gate = Gate::new(2);
        let first = gate.enter(&caller("a")).unwrap();
        let second = gate.enter(&caller("a")).unwrap();
        assert_eq!(gate.in_flight(), 2);
        assert!(gate.enter(&caller("b")).err().unwrap().retry_after().is_some());
        drop(first);
        assert_eq!(gate.in_flight(), 1);
        gate.close(Error::Draining);
        assert_eq!(gate.enter(&caller("a")).err(), Some(Error::Draining));
        drop(second);
        gate.empty().await;
        assert_eq!(gate.in_flight(), 0);
        assert!(gate.counts().is_empty(), "nobody is remembered");
    }

    #[test]
    fn a_client_leaves_places_for_others() {
        let gate = Gate::new(90);
        let enter = |name: &str| {
            let mut places = Vec::new();
            while let Ok(place) = gate.enter(&caller(name)) {
                places.push(place);
            }
            places
        };
        let alone = enter("a");
        assert_eq!(alone.len(), 80);
        // What it has it keeps; what becomes free is for the others.
        let second = enter("b");
        assert!(!second.is_empty());
        assert!(gate.enter(&caller("a")).is_err());
        drop(alone);
        let third = enter("c");
        assert!(third.len() > 60, "{}", third.len());
    }
}
