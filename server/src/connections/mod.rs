//! Connections: how they come in, and what each may cost.
//!
//! A listener is a stream of [`Connection`]s for tonic. Every handshake runs in a task of its own, so that one that
//! never ends holds nobody up; a connection takes room from its first moment on, and gives it back with its last.

mod connection;
pub(crate) mod tls;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;

use self::connection::Io;
pub(crate) use self::connection::{Connection, Peer};
use self::tls::Tls;
use crate::config::Connections;
use crate::telemetry::events::{ConnectionRefused, ConnectionsChanged};

/// Pause after a failed accept: the process has no file descriptors left, and looking at once helps nobody.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections between the end of their handshake and their first request.
const READY: usize = 64;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Everybody.
    Public,
    /// Those who change models.
    Admin,
    /// Everybody who speaks HTTP/1.1 instead of gRPC.
    Http,
}

/// A listener: yields connections until it is dropped, which closes its socket.
pub(crate) struct Incoming {
    ready: mpsc::Receiver<Connection>,
    #[expect(dead_code, reason = "only held")]
    accepting: AbortOnDropHandle<()>,
}

impl Incoming {
    /// Begins to accept. Without `tls`, connections are plain.
    pub(crate) fn new(listener: TcpListener, kind: Kind, limits: Connections, tls: Option<Arc<Tls>>) -> Self {
        let (sender, ready) = mpsc::channel(READY);
        let door = Arc::new(Door { kind, limits, tls, room: Arc::new(Semaphore::new(limits.max_connections)), sender });
        let accepting = AbortOnDropHandle::new(tokio::spawn(accept(listener, door)));
        Self { ready, accepting }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

/// What a connection has to pass.
struct Door {
    kind: Kind,
    limits: Connections,
    tls: Option<Arc<Tls>>,
    room: Arc<Semaphore>,
    sender: mpsc::Sender<Connection>,
}

/// A connection's place among those that may be open.
pub(crate) struct Room(#[expect(dead_code, reason = "only held")] OwnedSemaphorePermit);

impl Room {
    fn take(room: &Arc<Semaphore>) -> Option<Self> {
        let permit = Arc::clone(room).try_acquire_owned().ok()?;
        ConnectionsChanged { by: 1.0 }.emit();
        Some(Self(permit))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        ConnectionsChanged { by: -1.0 }.emit();
    }
}

async fn accept(listener: TcpListener, door: Arc<Door>) {
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = handshakes.join_next() => continue,
        };
        match accepted {
            Ok((stream, address)) => match Room::take(&door.room) {
                Some(room) => drop(handshakes.spawn(Arc::clone(&door).enter(stream, address, room))),
                // Closed at once: a caller that waits in the queue of the system would wait for nothing.
                None => ConnectionRefused::Full { peer: address, limit: door.limits.max_connections }.emit(),
            },
            // The caller went away before it was served.
            Err(error) if is_the_callers(&error) => {}
            Err(error) => {
                ConnectionRefused::NotAccepted { error: &error }.emit();
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_the_callers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

impl Door {
    /// Makes a connection ready for requests, or drops it.
    async fn enter(self: Arc<Self>, stream: TcpStream, address: SocketAddr, room: Room) {
        let began = Instant::now();
        let preface_by = began + self.limits.handshake_timeout;
        let oldest = self.limits.max_age.map(|age| began + age + self.limits.max_age_grace);
        // Small answers leave at once. A socket that cannot be told is about to fail anyway.
        let _ = stream.set_nodelay(true);
        let Ok(local) = stream.local_addr() else { return };
        let mut peer = Peer { address, local, listener: self.kind, certificate: None };
        let io = match &self.tls {
            None => Io::Plain(stream),
            Some(tls) => match timeout_at(preface_by, tls.acceptor(self.kind).accept(stream)).await {
                Ok(Ok(stream)) => {
                    let certificates = stream.get_ref().1.peer_certificates();
                    peer.certificate = certificates.and_then(<[_]>::first).and_then(tls::name).map(Arc::from);
                    Io::Tls(Box::new(stream))
                }
                Ok(Err(error)) => return ConnectionRefused::Handshake { peer: address, error: &error }.emit(),
                Err(_) => return ConnectionRefused::HandshakeTimedOut { peer: address }.emit(),
            },
        };
        // The receiver goes away when the server stops.
        let _ = self.sender.send(Connection::new(io, peer, preface_by, oldest, room)).await;
    }
}

/// Lets the process have as many files open as the system allows: many systems hand out 1024, which connections alone
/// may need. Failing to do so is no reason not to start.
pub(crate) fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::StreamExt as _;
    use tonic::transport::server::Connected as _;

    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn limits() -> Connections {
        Connections {
            max_connections: 2,
            handshake_timeout: Duration::from_millis(200),
            max_age: None,
            max_age_grace: Duration::ZERO,
        }
    }

    async fn listen(limits: Connections) -> (Incoming, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (Incoming::new(listener, Kind::Public, limits, None), address)
    }

    async fn next(incoming: &mut Incoming) -> Connection {
        incoming.next().await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn connections_above_the_limit_are_closed_until_one_ends() {
        let (mut incoming, address) = listen(limits()).await;
        let _clients = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        let first = next(&mut incoming).await;
        let _second = next(&mut incoming).await;
        let mut third = TcpStream::connect(address).await.unwrap();
        assert!(matches!(third.read(&mut [0]).await, Ok(0) | Err(_)), "the third is closed");
        drop(first);
        let fourth = TcpStream::connect(address).await.unwrap();
        let connection = next(&mut incoming).await;
        assert_eq!(connection.connect_info().address, fourth.local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_is_cut_and_one_that_speaks_is_not() {
        let (mut incoming, address) = listen(limits()).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut connection = next(&mut incoming).await;
        silent.write_all(&PREFACE[..23]).await.unwrap();
        let error = connection.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let mut speaks = TcpStream::connect(address).await.unwrap();
        let mut connection = next(&mut incoming).await;
        speaks.write_all(PREFACE).await.unwrap();
        connection.read_exact(&mut [0; 24]).await.unwrap();
        let more = tokio::time::timeout(limits().handshake_timeout * 2, connection.read(&mut [0])).await;
        assert!(more.is_err(), "it may be idle as long as it likes: {more:?}");
    }

    #[tokio::test]
    async fn a_connection_is_cut_when_its_grace_is_over() {
        let age = Duration::from_millis(50);
        let (mut incoming, address) = listen(Connections { max_age: Some(age), max_age_grace: age, ..limits() }).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        let mut connection = next(&mut incoming).await;
        client.write_all(PREFACE).await.unwrap();
        let error = connection.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_dropped_listener_takes_nobody_in() {
        let (incoming, address) = listen(limits()).await;
        drop(incoming);
        // The task ends at its next turn.
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }
}
