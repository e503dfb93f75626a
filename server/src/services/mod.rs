//! The rpcs. A service checks a request, hands it to what does the work, and shapes the answer.
//!
//! Read [`input`] first: it turns the wire's messages into what the model crate understands. [`scoring`] does the work
//! of `Score`, `ScoreStream`, `Rank` and best-of; [`sample`] that of a generated text.

mod best_of;
mod generation;
mod input;
pub(crate) mod limits;
mod models;
mod preference;
mod rank;
mod sample;
mod scoring;
mod stop;
mod tokens;
mod work;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};
use tracing::Instrument as _;

pub(crate) use self::generation::GenerationService;
pub(crate) use self::models::ModelsService;
pub(crate) use self::preference::PreferenceService;
pub(crate) use self::tokens::TokensService;
use crate::admission::{Admission, Ask, Estimator, Permit, Work};
use crate::config::Limits;
use crate::engine::Priority;
use crate::error::{Error, Result};
use crate::layers::admission::Aborted;
use crate::layers::caller::Caller;
use crate::layers::deadline::Deadline;
use crate::layers::trace::Arrived;
use crate::pool::CpuPool;
use crate::record::Recorder;
use crate::registry::Registry;
use crate::telemetry::events::Rejected;

/// Messages of a stream that wait for a slow reader. The work goes on ahead of it by no more than this.
const STREAM_BUFFER: usize = 16;

/// What the services work with.
pub(crate) struct Context {
    pub(crate) registry: Arc<Registry>,
    pub(crate) pool: CpuPool,
    pub(crate) admission: Arc<Admission>,
    pub(crate) estimator: Estimator,
    /// Sequences may use what others have computed.
    pub(crate) prefix_cache: bool,
    pub(crate) limits: Limits,
    pub(crate) recorder: Arc<Recorder>,
    /// Cancelled when streams should come to an end, because the server does.
    pub(crate) draining: CancellationToken,
    /// Tells when they have to.
    pub(crate) aborted: Aborted,
}

impl Context {
    /// Room for a call's work, of which so many tokens are `certain` and the rest is a guess. A request of a stream waits
    /// for it: meanwhile the stream is read no further, and its sender is held up by flow control. Others wait as long as
    /// they have patience.
    async fn admit(&self, call: &Call, priority: Priority, work: Work, certain: usize) -> Result<Permit> {
        let Call { ref caller, arrived, deadline, patience: Patience(patience) } = *call;
        let waits = !patience.is_zero();
        let end = [arrived.checked_add(patience), deadline].into_iter().flatten().min();
        let ask = Ask { client: Arc::clone(&caller.0), priority, work, certain, deadline };
        loop {
            let refused = match self.admission.admit(ask.clone()) {
                Ok(permit) => return Ok(permit),
                Err(refused) => refused,
            };
            match refused.retry_after().map(|after| Instant::now() + after) {
                Some(then) if waits && end.is_none_or(|end| then < end) => {
                    tokio::time::sleep_until(then.into()).await;
                }
                _ => {
                    let error = refused.give_up();
                    Rejected { error: &error }.emit();
                    return Err(error);
                }
            }
        }
    }

    /// Refuses a list that is empty or longer than a call may bring.
    fn check_count(&self, field: &str, count: usize) -> Result<()> {
        let limit = self.limits.max_client_batch_size;
        match count {
            0 => Err(Error::invalid(field, "at least one is needed")),
            count if count > limit => Err(Error::invalid(field, format!("{count} are given, {limit} are allowed"))),
            _ => Ok(()),
        }
    }
}

/// Whose a call is, when it came, and until when its answer is of use.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) caller: Caller,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) patience: Patience,
}

/// How long a call waits for room, from its arrival on, before it is refused.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Patience(pub(crate) Duration);

impl Patience {
    /// Until its deadline.
    pub(crate) const ENDLESS: Self = Self(Duration::MAX);
}

impl Call {
    fn of<T>(request: &Request<T>) -> Self {
        let extensions = request.extensions();
        Self {
            caller: Caller::of(extensions),
            arrived: extensions.get().map_or_else(Instant::now, |&Arrived(arrived)| arrived),
            deadline: extensions.get().map(|&Deadline(deadline)| deadline),
            patience: extensions.get().copied().unwrap_or_default(),
        }
    }
}

/// Decides which version a call gets where calls are split: equal requests get equal versions, here and on every other
/// replica.
fn split_hash(request_id: &str, request: &impl Message) -> u64 {
    let digest = match request_id {
        "" => Sha256::digest(request.encode_to_vec()),
        id => Sha256::digest(id),
    };
    digest.iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

/// A stream that `drive` feeds, in a task that ends when the stream is dropped: then `drive` is dropped with all the
/// work that it holds. An error ends the stream.
fn stream<T, F>(
    mut aborted: Aborted,
    drive: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F,
) -> ReceiverStream<Result<T, Status>>
where
    T: Send + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
    let driven = drive(sender.clone());
    let task = async move {
        let ended = tokio::select! {
            () = sender.closed() => return,
            cause = aborted.cause() => Err(cause),
            ended = driven => ended,
        };
        if let Err(error) = ended {
            // The reader may be gone.
            let _ = sender.send(Err(error.into())).await;
        }
    };
    tokio::spawn(task.in_current_span());
    ReceiverStream::new(receiver)
}
