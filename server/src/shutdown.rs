//! How the server stops: first it says so, then it takes nothing new, then it finishes what it has, and it does not
//! take for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// Stops, in this order.
    pub(crate) async fn run(self, by: &'static str, times: config::Shutdown) {
        ShutdownStep::Asked { by }.emit();
        self.health.set_phase(Phase::Stopping).await;
        if !times.lame_duck.is_zero() {
            ShutdownStep::LameDuck { pause: times.lame_duck }.emit();
            sleep(times.lame_duck).await;
        }
        self.accepting.cancel();
        self.gate.close();
        self.draining.cancel();
        let deadline = Instant::now() + times.drain_timeout;
        ShutdownStep::Draining { in_flight: self.gate.in_flight(), timeout: times.drain_timeout }.emit();
        // Calls, not only the engine's queue: one that is still being tokenized is finished too.
        if timeout_at(deadline.into(), self.gate.empty()).await.is_err() {
            ShutdownStep::TimedOut { in_flight: self.gate.in_flight() }.emit();
            // The rest fails with UNAVAILABLE.
            self.gate.abort();
            let _ = timeout(LAST_BYTES, self.gate.empty()).await;
        }
        let _ = timeout(LAST_BYTES, self.connections).await;
        ShutdownStep::Done.emit();
    }

    /// Lets calls that have failed tell their callers, where there is nothing left to be done for them.
    pub(crate) async fn give_up(&self) {
        self.accepting.cancel();
        self.gate.close();
        self.gate.abort();
        let _ = timeout(LAST_BYTES, self.gate.empty()).await;
    }
}

/// Returns the name of the signal that asks for an end.
///
/// # Errors
/// If signals cannot be listened to.
pub fn asked() -> Result<impl Future<Output = &'static str>> {
    let listen = |kind| signal(kind).map_err(|error| Error::internal(format!("signals: {error}")));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}
