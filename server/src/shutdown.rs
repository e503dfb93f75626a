//! How the server stops: first it says so, then it takes nothing new, then it finishes what it has, and it does not
//! take for ever. Whoever asks a second time is in a hurry.
//!
//! The listening socket is closed as soon as nothing new is taken: a load balancer whose connection is refused tries
//! another server at once, while one whose call is refused has to hear of it.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures::{Stream, stream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::error::{Error, Result};
use crate::health::{Health, Phase};
use crate::layers::admission::Gate;
use crate::telemetry::events::ShutdownStep;

/// For failed calls to tell their callers, and for the last bytes to leave. Streams that nobody reads, such as a health
/// watch, never end by themselves.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// What has to be stopped.
pub(crate) struct Shutdown {
    pub(crate) health: Arc<Health>,
    pub(crate) gate: Arc<Gate>,
    /// Cancelled to close the listening socket, and connections as soon as they are idle.
    pub(crate) accepting: CancellationToken,
    /// Cancelled to bring streams to an end.
    pub(crate) draining: CancellationToken,
    /// Ends when all connections are closed.
    pub(crate) connections: JoinHandle<Result<()>>,
}

impl Shutdown {
    /// Stops, in this order; `again` returns who asks for it a second time.
    pub(crate) async fn run(
        &mut self,
        by: &'static str,
        times: config::Shutdown,
        again: impl Future<Output = &'static str>,
    ) {
        ShutdownStep::Asked { by }.emit();
        self.health.set_phase(Phase::Stopping).await;
        let drained = tokio::select! {
            drained = self.drain(times) => drained,
            by = again => {
                ShutdownStep::Hurried { by }.emit();
                self.close(Error::Draining);
                false
            }
        };
        if !drained {
            ShutdownStep::TimedOut { in_flight: self.gate.in_flight() }.emit();
            // The rest fails with UNAVAILABLE.
            self.gate.abort(Error::Draining);
        }
        self.end().await;
        ShutdownStep::Done.emit();
    }

    /// Lets calls that have failed tell their callers, where there is nothing left to be done for them.
    pub(crate) async fn give_up(&mut self, cause: Error) {
        self.close(cause.clone());
        self.gate.abort(cause);
        self.end().await;
    }

    /// Lets calls in flight finish. False if they have not in time.
    async fn drain(&self, times: config::Shutdown) -> bool {
        if !times.lame_duck.is_zero() {
            ShutdownStep::LameDuck { pause: times.lame_duck }.emit();
            sleep(times.lame_duck).await;
        }
        self.close(Error::Draining);
        ShutdownStep::Draining { in_flight: self.gate.in_flight(), timeout: times.drain_timeout }.emit();
        // Calls, not only the engine's queue: one that is still being tokenized is finished too.
        timeout(times.drain_timeout, self.gate.empty()).await.is_ok()
    }

    /// Takes nothing new: calls that are still on their way along open connections are refused with the cause.
    fn close(&self, cause: Error) {
        self.gate.close(cause);
        self.accepting.cancel();
        self.draining.cancel();
    }

    /// Waits until all is said, but not for long.
    async fn end(&mut self) {
        let end = Instant::now() + LAST_BYTES;
        let _ = timeout_at(end.into(), self.gate.empty()).await;
        let _ = timeout_at(end.into(), &mut self.connections).await;
    }
}

/// Yields the name of every signal that asks for an end.
///
/// # Errors
/// If signals cannot be listened to.
pub fn asked() -> Result<impl Stream<Item = &'static str>> {
    let listen = |kind| signal(kind).map_err(|error| Error::internal(format!("signals: {error}")));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(stream::poll_fn(move |context| {
        if terminate.poll_recv(context).is_ready() {
            return Poll::Ready(Some("SIGTERM"));
        }
        interrupt.poll_recv(context).map(|_| Some("SIGINT"))
    }))
}
