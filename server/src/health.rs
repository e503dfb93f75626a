//! What the server says of itself: SERVING only where it is true, service by service.
//!
//! A service serves while the models that it needs are available, all models of the command line were loaded, the
//! engine lives and no shutdown has begun. The server as a whole (`""`) serves while any model can be asked.

use std::sync::Arc;

use futures::FutureExt as _;
use plumb_proto::v1;
use tokio::sync::{Mutex, watch};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::engine::Loss;
use crate::registry::Kinds;
use crate::telemetry::events::{EngineLost, ReadinessChanged};

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Models of the command line are being loaded.
    Starting,
    /// They are loaded.
    Serving,
    /// A shutdown has begun.
    Stopping,
}

/// For each service, whether it serves. The first is the server as a whole.
type Statuses = [(&'static str, bool); 5];

/// All that decides on the answers.
#[derive(Clone, Copy, Debug)]
struct Inputs {
    phase: Phase,
    engine_alive: bool,
    kinds: Kinds,
}

impl Inputs {
    fn statuses(self) -> Statuses {
        let up = self.engine_alive && self.phase == Phase::Serving;
        let Kinds { language, preference } = self.kinds;
        let any = up && (language || preference);
        [
            ("", any),
            (v1::preference_server::SERVICE_NAME, any),
            (v1::generation_server::SERVICE_NAME, up && language),
            // Works without a model: it is how one comes in.
            (v1::models_server::SERVICE_NAME, up),
            (v1::tokens_server::SERVICE_NAME, any),
        ]
    }
}

/// What has been told last, and why.
struct Told {
    inputs: Inputs,
    /// Nothing before the first time.
    statuses: Option<Statuses>,
}

/// Answers health checks.
pub(crate) struct Health {
    /// Held while the answers are changed, so that the last change is the one that stays.
    told: Mutex<Told>,
    reporter: HealthReporter,
    ready: watch::Sender<bool>,
    alive: watch::Sender<bool>,
}

impl Health {
    /// Nothing serves yet.
    pub(crate) async fn new(reporter: HealthReporter) -> Arc<Self> {
        let inputs = Inputs { phase: Phase::Starting, engine_alive: true, kinds: Kinds::default() };
        let health = Self {
            told: Mutex::new(Told { inputs, statuses: None }),
            reporter,
            ready: watch::Sender::new(false),
            alive: watch::Sender::new(true),
        };
        health.change(|_| {}).await;
        Arc::new(health)
    }

    /// The answers are different when this returns.
    pub(crate) async fn set_phase(&self, phase: Phase) {
        self.change(|inputs| inputs.phase = phase).await;
    }

    /// Follows the models and the engine, for as long as it is polled.
    pub(crate) async fn follow(&self, mut kinds: watch::Receiver<Kinds>, mut lost: watch::Receiver<Option<Loss>>) {
        loop {
            let now = *kinds.borrow_and_update();
            self.change(|inputs| inputs.kinds = now).await;
            tokio::select! {
                Ok(()) = kinds.changed() => {}
                Some(loss) = lost.wait_for(Option::is_some).map(|loss| *loss.ok()?) => {
                    self.change(|inputs| inputs.engine_alive = false).await;
                    EngineLost { loss }.emit();
                    self.alive.send_replace(false);
                    return;
                }
                else => return,
            }
        }
    }

    /// Whether the server as a whole serves.
    pub(crate) fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Whether the engine lives.
    pub(crate) fn alive(&self) -> watch::Receiver<bool> {
        self.alive.subscribe()
    }

    /// Returns once the engine is lost, and health says so.
    pub(crate) async fn engine_lost(&self) {
        // The sender is ours and lives as long.
        let _ = self.alive().wait_for(|alive| !alive).await;
    }

    /// Those who watch a service hear of it only when its answer is another.
    async fn change(&self, change: impl FnOnce(&mut Inputs)) {
        let mut told = self.told.lock().await;
        change(&mut told.inputs);
        let statuses = told.inputs.statuses();
        let before = told.statuses.replace(statuses);
        for (at, (service, serves)) in statuses.into_iter().enumerate() {
            if before.is_some_and(|before| before[at].1 == serves) {
                continue;
            }
            let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
            self.reporter.set_service_status(service, status).await;
        }
        let (_, ready) = statuses[0];
        // The first time too: a server that never gets ready has to say so.
        if self.ready.send_replace(ready) != ready || before.is_none() {
            ReadinessChanged { ready }.emit();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as WireStatus;
    use tonic_health::pb::health_server::Health as _;
    use tonic_health::server::HealthService;

    use super::*;

    fn check(phase: Phase, engine_alive: bool, language: bool, preference: bool, expected: [bool; 5]) {
        let inputs = Inputs { phase, engine_alive, kinds: Kinds { language, preference } };
        assert_eq!(inputs.statuses().map(|(_, serves)| serves), expected, "{inputs:?}");
    }

    #[test]
    fn a_service_serves_while_it_can() {
        let (yes, no) = (true, false);
        // The server, Preference, Generation, Models, Tokens.
        check(Phase::Serving, yes, yes, yes, [yes, yes, yes, yes, yes]);
        check(Phase::Serving, yes, no, yes, [yes, yes, no, yes, yes]);
        check(Phase::Serving, yes, yes, no, [yes, yes, yes, yes, yes]);
        check(Phase::Serving, yes, no, no, [no, no, no, yes, no]);
        check(Phase::Serving, no, yes, yes, [no; 5]);
        check(Phase::Starting, yes, yes, yes, [no; 5]);
        check(Phase::Stopping, yes, yes, yes, [no; 5]);
    }

    #[test]
    fn a_server_that_was_never_ready_says_so() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let new = || Health::new(HealthReporter::new()).now_or_never().unwrap();
        drop(metrics::with_local_recorder(&recorder, new));
        let exposition = recorder.handle().render();
        assert!(exposition.contains("plumb_ready 0\n"), "{exposition}");
    }

    #[tokio::test]
    async fn who_watches_hears_of_changes_only() {
        let reporter = HealthReporter::new();
        let service = HealthService::from_health_reporter(reporter.clone());
        let health = Health::new(reporter).await;
        health.change(|inputs| inputs.kinds.preference = true).await;
        health.set_phase(Phase::Serving).await;
        let request = tonic::Request::new(HealthCheckRequest { service: String::new() });
        let mut watched = service.watch(request).await.unwrap().into_inner();
        let mut next = async || watched.next().await.unwrap().unwrap().status();
        assert_eq!(next().await, WireStatus::Serving);
        health.change(|inputs| inputs.kinds.language = true).await;
        health.set_phase(Phase::Stopping).await;
        assert_eq!(next().await, WireStatus::NotServing);
        health.set_phase(Phase::Serving).await;
        assert_eq!(next().await, WireStatus::Serving);
    }

    #[tokio::test]
    async fn the_loss_of_the_engine_is_noticed() {
        let health = Health::new(HealthReporter::new()).await;
        health.set_phase(Phase::Serving).await;
        let kinds = watch::Sender::new(Kinds { language: true, preference: false });
        let (engine, lost) = watch::channel(None);
        let follower = Arc::clone(&health);
        let following = tokio::spawn(async move { follower.follow(kinds.subscribe(), lost).await });
        let mut ready = health.ready();
        ready.wait_for(|ready| *ready).await.unwrap();
        engine.send_replace(Some(Loss::Stuck));
        health.engine_lost().await;
        following.await.unwrap();
        assert!(!*ready.borrow() && !*health.alive().borrow());
    }
}
