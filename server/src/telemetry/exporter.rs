//! The HTTP listener beside the rpcs: `/metrics` for Prometheus, `/healthz` and `/readyz` for an orchestrator, and the
//! status page for people.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::status::{self, Status};

/// Scrapers and probes at a time; others wait in the system's queue.
const MAX_CONNECTIONS: usize = 64;
/// From the first byte of a request to its last header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a connection as a whole, which is for one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// Room for a request's headers.
const MAX_HEADER_BYTES: usize = 16 << 10;
/// Pause after a failed accept: the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the probes answer.
#[derive(Clone)]
pub struct Probes {
    /// Whether the engine lives: a process without one has to be replaced.
    pub alive: watch::Receiver<bool>,
    /// Whether the server as a whole is SERVING.
    pub ready: watch::Receiver<bool>,
}

/// The listener's routes.
pub(crate) fn routes(metrics: PrometheusHandle, probes: Probes, status: Arc<Status>) -> Router {
    let Probes { alive, ready } = probes;
    Router::new()
        .route("/metrics", get(move || std::future::ready(exposition(&metrics))))
        .route("/healthz", get(move || std::future::ready(probe(*alive.borrow()))))
        .route("/readyz", get(move || std::future::ready(probe(*ready.borrow()))))
        .route("/", get(move || page(Arc::clone(&status))))
        .route("/status.css", get(([(header::CONTENT_TYPE, "text/css; charset=utf-8")], status::STYLE)))
}

/// Answers requests for as long as it is polled.
pub async fn serve(listener: TcpListener, routes: Router) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let permit = Arc::clone(&room).acquire_owned().await;
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let answered = answer(stream, routes.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    // Nobody is left to be told how it ended.
                    let _ = timeout(CONNECTION_TIMEOUT, answered).await;
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn answer(stream: TcpStream, routes: Router) -> hyper::Result<()> {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
        .await
}

fn exposition(metrics: &PrometheusHandle) -> impl IntoResponse + use<> {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
}

async fn page(status: Arc<Status>) -> Response {
    match status.page().await {
        Ok(page) => {
            let headers = [
                (header::CONTENT_SECURITY_POLICY, status::POLICY),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (header::REFERRER_POLICY, "no-referrer"),
                (header::CACHE_CONTROL, "no-store"),
            ];
            (headers, Html(page)).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn probe(good: bool) -> (StatusCode, &'static str) {
    if good { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ok\n") }
}
