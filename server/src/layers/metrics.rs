//! Counts calls, by rpc and code, and how long they take.

use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tonic::Code;
use tracing::Span;

use super::rpc::{Class, Rpc};
use super::{body, deadline};
use crate::telemetry::events::{RequestFinished, RequestStarted};

/// Counts the call when its answer is complete.
pub(crate) async fn metrics(request: Request, next: Next) -> Response {
    let rpc = Rpc::of(&request);
    if rpc.class == Class::Infrastructure {
        return next.run(request).await;
    }
    let call = Call::start(rpc.name, deadline::of(&request));
    let response = next.run(request).await;
    // A stream ends outside of the span, where its last message is sent.
    let span = Span::current();
    body::on_end(response, move |code| span.in_scope(|| call.finish(code)))
}

/// A caller's own timer may be ahead of ours by this much: it cancels the call then, which is no change of mind.
const TIMER_SKEW: Duration = Duration::from_millis(50);

/// A call in flight. One that is dropped was cancelled.
struct Call {
    rpc: &'static str,
    began: Instant,
    deadline: Option<Instant>,
    code: Code,
}

impl Call {
    fn start(rpc: &'static str, deadline: Option<Instant>) -> Self {
        RequestStarted { rpc }.emit();
        Self { rpc, began: Instant::now(), deadline, code: Code::Cancelled }
    }

    fn finish(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let out_of_time = self.deadline.is_some_and(|deadline| Instant::now() + TIMER_SKEW >= deadline);
        let code = if self.code == Code::Cancelled && out_of_time { Code::DeadlineExceeded } else { self.code };
        RequestFinished { rpc: self.rpc, code, duration: self.began.elapsed() }.emit();
    }
}
