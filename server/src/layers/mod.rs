//! What happens to every call before it reaches its service, as one list.
//!
//! Each layer is a plain async function in a file of its own: it looks at the request, calls the next one, looks at the
//! response. Health checks and reflection pass all of them, but are neither counted, asked for a key nor limited.

pub(crate) mod admission;
pub(crate) mod auth;
mod body;
pub(crate) mod caller;
pub(crate) mod deadline;
pub(crate) mod inflow;
pub(crate) mod metrics;
pub(crate) mod parts;
pub(crate) mod receive;
pub(crate) mod rpc;
pub(crate) mod trace;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tower::ServiceBuilder;

use self::admission::Gate;
use self::inflow::Inflow;
use crate::access::Access;

/// Puts the layers around the services, outermost first.
pub(crate) fn around(
    services: Router,
    access: Arc<Access>,
    receive_timeout: Duration,
    gate: Arc<Gate>,
    inflow: Arc<Inflow>,
) -> Router {
    // Innermost: nobody reads a message of a call that is refused.
    let services = services.layer(from_fn_with_state(inflow, inflow::inflow));
    around_work(services, access, receive_timeout, gate)
}

/// The same around services that read their requests by themselves.
pub(crate) fn around_work(services: Router, access: Arc<Access>, receive_timeout: Duration, gate: Arc<Gate>) -> Router {
    services.layer(
        ServiceBuilder::new()
            // Outermost: what the others log belongs to the call's span, and the arrival is when the call came in.
            .layer(from_fn(trace::trace))
            // Outside of all that may refuse a call: a refusal is an answer, and counts as one.
            .layer(from_fn(metrics::metrics))
            // Before anything is spent on a caller who may not call.
            .layer(from_fn_with_state(access, auth::auth))
            // Behind the keys, whose names tell clients apart.
            .layer(from_fn(caller::caller))
            // Around all that reads the request, which is only the service.
            .layer(from_fn_with_state(receive_timeout, receive::receive))
            // Around the work and nothing else: a refusal needs no time limit, work must not outlive its caller's.
            .layer(from_fn(deadline::deadline))
            // What is in flight here is work, which is what a shutdown waits for.
            .layer(from_fn_with_state(gate, admission::admission)),
    )
}
