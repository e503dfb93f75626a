//! Answers the requests of connections: HTTP/1.1, which is all that the protocols' clients speak.

use std::pin::pin;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected as _;
use tower::ServiceExt as _;

use crate::config::{Connections, Http2};
use crate::connections::{Connection, Incoming};

/// Bytes that a connection holds of a request that is not read on.
const BUFFER: usize = 256 << 10;
/// Names and values of a request.
const MAX_HEADERS: usize = 100;

/// How long connections last, and what they may send.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) connections: Connections,
    pub(crate) max_header_bytes: u32,
    /// From the end of an answer to the last header of the next request.
    pub(crate) receive_timeout: std::time::Duration,
}

impl Bounds {
    pub(crate) fn new(connections: Connections, http2: &Http2) -> Self {
        Self { connections, max_header_bytes: http2.max_header_bytes, receive_timeout: http2.receive_timeout }
    }
}

/// Answers until `stop`, and then what has begun.
pub(crate) async fn serve(mut incoming: Incoming, routes: Router, bounds: Bounds, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let connection = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            connection = incoming.next() => connection,
        };
        let Some(Ok(connection)) = connection else { break };
        connections.spawn(answer(connection, routes.clone(), bounds, stop.clone()));
    }
    // Closes the socket.
    drop(incoming);
    while connections.join_next().await.is_some() {}
}

async fn answer(connection: Connection, routes: Router, bounds: Bounds, stop: CancellationToken) {
    let peer = connection.connect_info();
    let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        routes.clone().oneshot(request.map(Body::new))
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(bounds.receive_timeout)
        .max_buf_size(BUFFER.max(2 * bounds.max_header_bytes as usize))
        .max_header_size(bounds.max_header_bytes as usize)
        .max_headers(MAX_HEADERS);
    let mut served = pin!(http.serve_connection(TokioIo::new(connection), service));
    let old = async {
        match bounds.connections.max_age {
            Some(age) => tokio::time::sleep(age).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // Nobody is left to be told how it ended.
        _ = served.as_mut() => return,
        () = stop.cancelled() => {}
        () = old => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = served.await;
}
