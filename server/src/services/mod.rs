//! The rpcs. A service checks a request, hands it to what does the work, and shapes the answer.
//!
//! Read [`input`] first: it turns the wire's messages into what the model crate understands. [`scoring`] does the work
//! of `Score`, `ScoreStream`, `Rank` and best-of; [`sample`] that of a generated text.

mod best_of;
mod generation;
mod input;
mod models;
mod preference;
mod rank;
mod sample;
mod scoring;
mod stop;
mod tokens;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

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
use crate::admission::{TokenBudget, TokenPermit};
use crate::config::Limits;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::layers::admission::Aborted;
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
    pub(crate) engine: Engine,
    pub(crate) pool: CpuPool,
    pub(crate) budget: Arc<TokenBudget>,
    pub(crate) limits: Limits,
    pub(crate) recorder: Arc<Recorder>,
    /// Cancelled when streams should come to an end, because the server does.
    pub(crate) draining: CancellationToken,
    /// Tells when they have to.
    pub(crate) aborted: Aborted,
}

impl Context {
    /// Room for sequences of these lengths.
    fn admit(&self, tokens: &[usize]) -> Result<Vec<TokenPermit>> {
        let admitted = self.budget.admit(tokens, self.engine.tokens_per_second());
        admitted.inspect_err(|error| Rejected { error }.emit())
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

/// When a call came, and until when its answer is of use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallTimes {
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
}

impl CallTimes {
    fn of<T>(request: &Request<T>) -> Self {
        let extensions = request.extensions();
        Self {
            arrived: extensions.get().map_or_else(Instant::now, |&Arrived(arrived)| arrived),
            deadline: extensions.get().map(|&Deadline(deadline)| deadline),
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
