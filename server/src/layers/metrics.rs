//! Counts calls, by rpc and code, and how long they take.

use std::time::Instant;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tonic::Code;

use super::body;
use super::rpc::{Class, Rpc};
use crate::telemetry::events::{RequestFinished, RequestStarted};

/// Counts the call when its answer is complete.
pub(crate) async fn metrics(request: Request, next: Next) -> Response {
    let rpc = Rpc::of(&request);
    if rpc.class == Class::Infrastructure {
        return next.run(request).await;
    }
    let call = Call::start(rpc.name);
    let response = next.run(request).await;
    body::on_end(response, move |code| call.finish(code))
}

/// A call in flight. One that is dropped was cancelled.
struct Call {
    rpc: &'static str,
    began: Instant,
    code: Code,
}

impl Call {
    fn start(rpc: &'static str) -> Self {
        RequestStarted { rpc }.emit();
        Self { rpc, began: Instant::now(), code: Code::Cancelled }
    }

    fn finish(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        RequestFinished { rpc: self.rpc, code: self.code, duration: self.began.elapsed() }.emit();
    }
}
