//! A connection that was let in: bytes, who is at the other end, and until when it may last.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::{Kind, Room};

/// What an HTTP/2 client says first (RFC 9113, section 3.4). From then on, its connection is probed by pings.
const PREFACE_BYTES: u64 = 24;

/// Who is at the other end. Every request of the connection carries it.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// Its address.
    pub(crate) address: SocketAddr,
    /// Where it came in.
    pub(crate) local: SocketAddr,
    pub(crate) listener: Kind,
    /// Whom its verified certificate names. Unset without a certificate, or if it names nobody.
    pub(crate) certificate: Option<Arc<str>>,
}

/// The bytes below HTTP/2.
pub(super) enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection.
pub(crate) struct Connection {
    io: Io,
    peer: Peer,
    /// Bytes of the preface that are still to come.
    awaited: u64,
    /// When it is over: at first, when the preface should have come; then, when it is too old.
    end: Option<Pin<Box<Sleep>>>,
    oldest: Option<Instant>,
    #[expect(dead_code, reason = "only held")]
    room: Room,
}

impl Connection {
    /// The preface has to be there at `preface_by`; at `oldest` the connection is cut, whatever it does.
    pub(super) fn new(io: Io, peer: Peer, preface_by: Instant, oldest: Option<Instant>, room: Room) -> Self {
        let end = Some(Box::pin(tokio::time::sleep_until(preface_by)));
        Self { io, peer, awaited: PREFACE_BYTES, end, oldest, room }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &mut self.end {
            Some(end) => end.as_mut().poll(cx).map(|()| io::ErrorKind::TimedOut.into()),
            None => Poll::Pending,
        }
    }

    fn has_read(&mut self, bytes: u64) {
        if self.awaited > 0 {
            self.awaited = self.awaited.saturating_sub(bytes);
            if self.awaited == 0 {
                self.end = self.oldest.map(|oldest| Box::pin(tokio::time::sleep_until(oldest)));
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        let before = buffer.filled().len();
        let read = match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buffer),
            Io::Tls(io) => Pin::new(io).poll_read(cx, buffer),
        };
        self.has_read((buffer.filled().len() - before) as u64);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write(cx, bytes),
            Io::Tls(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bytes),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
