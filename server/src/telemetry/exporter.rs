//! The HTTP listener beside the rpcs: `/metrics` for Prometheus, `/healthz` and `/readyz` for an orchestrator.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::watch;

/// What the probes answer.
#[derive(Clone)]
pub struct Probes {
    /// Whether the engine lives: a process without one has to be replaced.
    pub alive: watch::Receiver<bool>,
    /// Whether the server as a whole is SERVING.
    pub ready: watch::Receiver<bool>,
}

/// The listener's routes.
pub fn routes(metrics: PrometheusHandle, probes: Probes) -> Router {
    let Probes { alive, ready } = probes;
    Router::new()
        .route("/metrics", get(move || std::future::ready(exposition(&metrics))))
        .route("/healthz", get(move || std::future::ready(probe(*alive.borrow()))))
        .route("/readyz", get(move || std::future::ready(probe(*ready.borrow()))))
}

fn exposition(metrics: &PrometheusHandle) -> impl IntoResponse + use<> {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
}

fn probe(good: bool) -> (StatusCode, &'static str) {
    if good { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ok\n") }
}
