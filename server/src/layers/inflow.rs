//! How much memory requests take: before a large message is read there has to be room for all of it.
//!
//! A message says how long it is in its first five bytes. Until there is room for so much, nothing more of it is read: the
//! stream's HTTP/2 window closes, and its sender waits with what it has still to send. The room is held until the
//! request's work is done. What the message is made of is counted as it is read, by [`parts`](super::parts).
//!
//! Nobody waits for ever for somebody who waits. Whoever waits for room holds none for that message, of which nothing but
//! what is in the window is here; what was read before it has been passed on, so a stream's earlier requests go on.
//! Whoever has room has it for a whole message, and needs no more to read it and to answer it. There are two bounds, of a
//! client and of all, always taken in this order. What remains is a client that is slow to send, or to read its answers:
//! it holds no more than its own part, which is half of all, until its deadline or the end of its connection.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::PollSemaphore;
use tonic::Status;

use super::caller::Caller;
use super::parts::{Kind, MAX_PARTS, Parts};
use super::receive::late;
use super::rpc::{Class, Rpc};

/// Messages of a unary call up to this size need no room: the window brings as much anyway, and calls are counted.
pub(crate) const SMALL: u32 = 64 << 10;
/// Bytes that are counted as one.
const UNIT: usize = 1 << 10;
/// Bytes before every message: whether it is compressed, and how long it is.
const PREFIX: usize = 5;

/// Room for messages, in all and of each client.
pub(crate) struct Inflow {
    room: Arc<Semaphore>,
    of_client: usize,
    clients: Mutex<HashMap<Arc<str>, Arc<Semaphore>>>,
    /// Longer messages are refused where they are decoded.
    longest: usize,
    /// How long a message, or a body over HTTP, may take to arrive once there is room for it.
    pub(crate) arrival: Duration,
}

impl Inflow {
    /// Room for `bytes`, of which half is enough for a message of the `longest` size.
    pub(crate) fn new(bytes: usize, longest: usize, arrival: Duration) -> Arc<Self> {
        let units = (bytes / UNIT).min(Semaphore::MAX_PERMITS);
        let room = Arc::new(Semaphore::new(units));
        Arc::new(Self { room, of_client: units / 2, clients: Mutex::default(), longest, arrival })
    }

    /// Room for a request of so many bytes that is no message, once there is. A small one needs none.
    pub(crate) async fn room(&self, caller: &Caller, bytes: usize) -> Option<Room> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if bytes <= SMALL {
            return None;
        }
        let mut wanted = Wanted::new(self, caller, bytes);
        poll_fn(|cx| wanted.poll(cx)).await
    }

    fn client(&self, caller: &Caller) -> Arc<Semaphore> {
        let mut clients = lock(&self.clients);
        // Those that nobody holds are whole again.
        clients.retain(|_, room| Arc::strong_count(room) > 1);
        let room = clients.entry(Arc::clone(&caller.0)).or_insert_with(|| Arc::new(Semaphore::new(self.of_client)));
        Arc::clone(room)
    }
}

/// Room for the messages of a call, in their order. It is given back when the last holder of this is gone.
#[derive(Clone, Default)]
pub(crate) struct Received(Arc<Mutex<VecDeque<Option<Room>>>>);

/// Room for a message. It is only held.
pub(crate) struct Room {
    _of_client: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Received {
    /// The room of the next message, for whoever answers it by itself.
    pub(crate) fn next(&self) -> Option<Room> {
        lock(&self.0).pop_front().flatten()
    }

    fn push(&self, room: Option<Room>) {
        lock(&self.0).push_back(room);
    }
}

/// Reads the call's messages as there is room for them.
pub(crate) async fn inflow(State(inflow): State<Arc<Inflow>>, mut request: Request, next: Next) -> Response {
    let rpc = Rpc::of(&request);
    if rpc.class == Class::Infrastructure {
        // Its messages are bounded where they are decoded, and strangers take no room from those who have a key.
        return next.run(request).await;
    }
    let streams = rpc.streams_requests();
    let kind = Kind::of(request.uri().path());
    let received = Received::default();
    let caller = Caller::of(request.extensions());
    request.extensions_mut().insert(received.clone());
    let request = request.map(|inner| {
        let (prefix, received) = (Prefix::default(), received.clone());
        Body::new(Metered {
            inner,
            inflow,
            caller,
            streams,
            kind,
            received,
            prefix,
            begun: 0,
            parts: None,
            rest: None,
            wanted: None,
            end: None,
        })
    });
    let response = next.run(request).await;
    // The request of a unary call has been worked on by now; a stream's body holds on to its own.
    drop(received);
    response
}

/// A body that is read as there is room for its messages.
struct Metered {
    inner: Body,
    inflow: Arc<Inflow>,
    caller: Caller,
    /// There may be several messages.
    streams: bool,
    /// None for an rpc that is not there.
    kind: Option<Kind>,
    received: Received,
    prefix: Prefix,
    /// Messages that have begun.
    begun: usize,
    /// Those of the message that comes now.
    parts: Option<Parts>,
    /// Read, and not yet passed on.
    rest: Option<Bytes>,
    wanted: Option<Wanted>,
    /// When the message that comes now has to be here.
    end: Option<Pin<Box<Sleep>>>,
}

/// Room that is waited for.
struct Wanted {
    units: u32,
    of_client: PollSemaphore,
    of_all: PollSemaphore,
    got: Option<OwnedSemaphorePermit>,
}

impl Wanted {
    fn new(inflow: &Inflow, caller: &Caller, bytes: u32) -> Self {
        Self {
            units: bytes.div_ceil(UNIT as u32).max(1),
            of_client: PollSemaphore::new(inflow.client(caller)),
            of_all: PollSemaphore::new(Arc::clone(&inflow.room)),
            got: None,
        }
    }

    /// `None` if there will never be room, which is when the server is gone.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Room>> {
        if self.got.is_none() {
            self.got = ready!(self.of_client.poll_acquire_many(cx, self.units));
        }
        let of_all = ready!(self.of_all.poll_acquire_many(cx, self.units));
        Poll::Ready(
            self.got.take().zip(of_all).map(|(of_client, of_all)| Room { _of_client: of_client, _of_all: of_all }),
        )
    }
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        loop {
            if let Some(wanted) = &mut this.wanted {
                let room = ready!(wanted.poll(cx));
                this.wanted = None;
                this.received.push(room);
                this.end = Some(Box::pin(sleep(this.inflow.arrival)));
            }
            if let Some(end) = &mut this.end
                && end.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Some(Err(axum::Error::new(late(this.inflow.arrival)))));
            }
            let mut data = match this.rest.take() {
                Some(data) => data,
                None => match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => data,
                        Err(frame) => return Poll::Ready(Some(Ok(frame))),
                    },
                    end => return Poll::Ready(end),
                },
            };
            let Found { before, message } = this.prefix.scan(&data);
            if this.prefix.left == 0 {
                this.end = None;
            }
            if let Some(bytes) = message {
                this.begun += 1;
                if this.begun > 1 && !this.streams {
                    let error = Status::invalid_argument("the request has more than one message");
                    return Poll::Ready(Some(Err(axum::Error::new(error))));
                }
                // Of a stream there may be many at a time.
                let needs_room = bytes > SMALL || this.streams;
                match needs_room && bytes as usize <= this.inflow.longest {
                    true => this.wanted = Some(Wanted::new(&this.inflow, &this.caller, bytes)),
                    false => this.received.push(None),
                }
            }
            let passed = data.split_to(before);
            if let Some(parts) = &mut this.parts
                && parts.take(&passed).is_err()
            {
                let error = format!("the request has more than {MAX_PARTS} items, turns and texts in all: split it");
                return Poll::Ready(Some(Err(axum::Error::new(Status::invalid_argument(error)))));
            }
            if let Some(bytes) = message {
                // What is passed on next begins with what is left of the prefix.
                let before = this.prefix.left - u64::from(bytes);
                this.parts = this.kind.map(|kind| Parts::new(kind, before, bytes.into()));
            }
            if !data.is_empty() {
                this.rest = Some(data);
            }
            if !passed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.inner.size_hint();
        if let Some(rest) = &self.rest {
            // What was read is to come as well.
            let exact = hint.exact();
            hint = SizeHint::new();
            if let Some(exact) = exact {
                hint.set_exact(exact + rest.len() as u64);
            }
        }
        hint
    }
}

/// Where messages begin.
#[derive(Debug, Default)]
struct Prefix {
    bytes: [u8; PREFIX],
    read: usize,
    /// Bytes until the next prefix.
    left: u64,
}

/// What was found in some bytes.
#[derive(Debug, PartialEq)]
struct Found {
    /// Bytes that belong to what was found before.
    before: usize,
    /// Length of the message whose prefix ends after them.
    message: Option<u32>,
}

impl Prefix {
    /// Looks for the next message. What comes after `before` has to be given again.
    fn scan(&mut self, data: &[u8]) -> Found {
        let before = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
        self.left -= before as u64;
        let prefix = data[before..].iter().take(PREFIX - self.read);
        let (mut read, start) = (self.read, self.read);
        for &byte in prefix {
            self.bytes[read] = byte;
            read += 1;
        }
        if read < PREFIX {
            self.read = read;
            return Found { before: data.len(), message: None };
        }
        let [_compressed, length @ ..] = self.bytes;
        let length = u32::from_be_bytes(length);
        self.read = 0;
        self.left = (PREFIX - start) as u64 + u64::from(length);
        Found { before, message: Some(length) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use futures::future::poll_immediate;
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        [&[0][..], &u32::try_from(length).unwrap().to_be_bytes(), &vec![7; length]].concat()
    }

    fn body(inflow: &Arc<Inflow>, client: &str, chunks: Vec<Vec<u8>>) -> (Body, Received) {
        let received = Received::default();
        let chunks = chunks.into_iter().map(|chunk| Ok::<_, std::convert::Infallible>(Bytes::from(chunk)));
        let metered = Metered {
            inner: Body::from_stream(futures::stream::iter(chunks)),
            inflow: Arc::clone(inflow),
            caller: Caller(client.into()),
            streams: true,
            kind: None,
            received: received.clone(),
            prefix: Prefix::default(),
            begun: 0,
            parts: None,
            rest: None,
            wanted: None,
            end: None,
        };
        (Body::new(metered), received)
    }

    /// What can be read now.
    async fn read(body: &mut axum::body::BodyDataStream) -> Vec<u8> {
        let mut read = Vec::new();
        while let Some(Some(data)) = poll_immediate(body.next()).await {
            read.extend(data.unwrap());
        }
        read
    }

    #[tokio::test]
    async fn nothing_of_a_message_is_passed_on_before_there_is_room_for_all_of_it() {
        let inflow = Inflow::new(400 << 10, 200 << 10, Duration::from_secs(60));
        let large = message(150 << 10);
        let (first, held) = body(&inflow, "a", vec![large.clone()]);
        assert_eq!(read(&mut first.into_data_stream()).await, large);
        // Another client's fits beside it, a second one of the same does not.
        let (other, _of_other) = body(&inflow, "b", vec![large.clone()]);
        assert_eq!(read(&mut other.into_data_stream()).await, large);
        let small = message(100);
        let (same, received) = body(&inflow, "a", vec![[&small[..], &large, &small].concat()]);
        let mut same = same.into_data_stream();
        assert_eq!(read(&mut same).await, small, "what comes before it is not held up");
        drop(held);
        assert_eq!(read(&mut same).await, [&large[..], &small].concat());
        let held: Vec<_> = (0..3).map(|_| received.next()).collect();
        assert!(held.iter().all(Option::is_some), "each by itself");
        assert_eq!(inflow.room.available_permits(), 98, "two of 1 KiB and two of 150 KiB are held");
    }

    #[tokio::test]
    async fn a_message_that_is_refused_anyway_waits_for_nothing() {
        let inflow = Inflow::new(400 << 10, 200 << 10, Duration::from_secs(60));
        let (body, _) = body(&inflow, "a", vec![message(300 << 10)[..1000].to_vec()]);
        assert_eq!(read(&mut body.into_data_stream()).await.len(), 1000);
        assert_eq!(inflow.room.available_permits(), 400);
    }

    #[tokio::test]
    async fn clients_that_have_gone_are_forgotten() {
        let inflow = Inflow::new(400 << 10, 200 << 10, Duration::from_secs(60));
        for client in 0..100 {
            let (body, _) = body(&inflow, &client.to_string(), vec![message(100 << 10)]);
            read(&mut body.into_data_stream()).await;
        }
        assert!(lock(&inflow.clients).len() <= 1);
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let sizes = prop::collection::vec(0..200usize, 0..8);
        proptest!(|(sizes in sizes, cut in 1..40usize)| {
            let all: Vec<u8> = sizes.iter().flat_map(|size| message(*size)).collect();
            let (mut prefix, mut found, mut passed) = (Prefix::default(), Vec::new(), 0);
            for chunk in all.chunks(cut) {
                let mut rest = chunk;
                while !rest.is_empty() {
                    let Found { before, message } = prefix.scan(rest);
                    found.extend(message);
                    passed += before;
                    rest = &rest[before..];
                    prop_assert!(before > 0 || message.is_some());
                }
            }
            prop_assert_eq!(found, sizes.iter().map(|size| *size as u32).collect::<Vec<_>>());
            prop_assert_eq!(passed, all.len());
        });
    }
}
