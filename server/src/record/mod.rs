//! Takes down requests and their scores, so that `plumb replay` can score them again on another version.
//!
//! Off unless `--record-dir` is given. [`plumb_proto::record`] is the format: JSON lines, one for every `Score` and `Rank`,
//! for every request of a `ScoreStream`, and for the ranking inside a `Generate` with best-of, which is what a preference
//! model was asked there; samples without a ranker have no score and are not recorded. Nor are calls that nobody waited
//! for, and calls that were told to come again (`UNAVAILABLE`, `RESOURCE_EXHAUSTED`): an overload must not fill the disk.
//!
//! A call hands its messages over to [`writer`], a thread of its own, through a bounded queue, and does not wait: where the
//! queue is full, the record is dropped and counted. The thread chooses (`sample`), serialises, and writes whole lines
//! (`lines`) into files that are rotated, packed and thinned out (`folder`). A fault of the disk never fails a call.
//!
//! Records hold prompts: files are for their owner only. They hold the names of keys, and no keys.

mod folder;
mod lines;
mod sample;
mod writer;

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use plumb_proto::record::{Failure, Outcome, Record, VERSION};
use plumb_proto::v1;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout_at};
use tonic::Request;

use self::folder::Folder;
use self::lines::Lines;
use self::writer::Writer;
use crate::config::Recording;
use crate::error::{Error, Result};
use crate::layers::auth::KeyName;
use crate::telemetry::events::{RecordDropped, RecordingFailed, RecordingStarted};

/// Records that wait for the disk: a second of a busy server.
const MAX_WAITING: usize = 1024;
/// Memory of them: twice the longest line.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// For what waits, even if the calls in flight have used up all the time.
const LAST_RECORDS: Duration = Duration::from_secs(1);
/// How often a full queue is tried when the server ends.
const CLOSE_INTERVAL: Duration = Duration::from_millis(5);

/// Where a call comes from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    rpc: &'static str,
    caller: Option<Arc<str>>,
}

impl Origin {
    /// Of a call of the method `rpc`.
    pub(crate) fn of<T>(request: &Request<T>, rpc: &'static str) -> Self {
        let caller = request.extensions().get().map(|KeyName(name)| Arc::clone(name));
        Self { rpc, caller }
    }
}

/// Takes calls down, if it was asked to.
pub(crate) struct Recorder(Option<Queue>);

/// What is on its way to the disk.
struct Queue {
    sender: SyncSender<Message>,
    bytes: Arc<AtomicUsize>,
    /// Comes when the last line is written.
    closed: Mutex<Option<oneshot::Receiver<()>>>,
}

/// What the thread is told.
enum Message {
    Call(Box<Entry>),
    Close,
}

/// A call that ended at `time`.
struct Entry {
    time: SystemTime,
    /// All but the time.
    record: Record,
    /// Its share of [`MAX_WAITING_BYTES`].
    bytes: usize,
}

impl Recorder {
    /// Starts the thread.
    ///
    /// # Errors
    /// If nothing can be written to the folder, or another server writes to it.
    pub(crate) fn start(recording: Option<&Recording>) -> Result<Self> {
        let Some(recording) = recording else { return Ok(Self(None)) };
        let folder = Folder::open(recording)
            .map_err(|error| Error::internal(format!("--record-dir {}: {error}", recording.folder.display())))?;
        let lines = Lines::new(folder, recording.max_bytes, recording.max_age);
        let (sender, receiver) = sync_channel(MAX_WAITING);
        let (done, closed) = oneshot::channel();
        let bytes = Arc::new(AtomicUsize::new(0));
        let writer = Writer::new(lines, recording.sample, Arc::clone(&bytes));
        let thread = std::thread::Builder::new().name("plumb-record".to_owned());
        let spawned = thread.spawn(move || {
            writer.run(&receiver);
            // Nobody may be waiting.
            let _ = done.send(());
        });
        spawned.map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
        RecordingStarted { folder: &recording.folder, sample: recording.sample }.emit();
        Ok(Self(Some(Queue { sender, bytes, closed: Mutex::new(Some(closed)) })))
    }

    /// Whether calls are taken down.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Takes down a call of `Score`, or a request of a `ScoreStream`.
    pub(crate) fn score(&self, origin: Origin, request: v1::ScoreRequest, answer: &Result<v1::ScoreResponse>) {
        let Some(queue) = &self.0 else { return };
        let Some(mut record) = record(origin, answer.as_ref().err()) else { return };
        if let Ok(answer) = answer {
            record.model = answer.model.clone();
            record.timings = answer.timings;
            record.results = answer.results.iter().map(outcome).collect();
        }
        record.score = Some(request);
        queue.put(record);
    }

    /// Takes down a call of `Rank`, or what came to the same.
    pub(crate) fn rank(&self, origin: Origin, request: v1::RankRequest, answer: &Result<v1::RankResponse>) {
        let Some(queue) = &self.0 else { return };
        let Some(mut record) = record(origin, answer.as_ref().err()) else { return };
        if let Ok(answer) = answer {
            record.model = answer.model.clone();
            record.timings = answer.timings;
            record.results = vec![Outcome::default(); request.candidates.len()];
            for ranked in &answer.ranked {
                if let Some(result) = record.results.get_mut(ranked.index as usize) {
                    let error = || ranked.error.as_ref().map(Outcome::from).unwrap_or_default();
                    *result = ranked.score.as_ref().map_or_else(error, Outcome::from);
                }
            }
        }
        record.rank = Some(request);
        queue.put(record);
    }

    /// Writes what waits, until the deadline or for a second. What comes later is dropped.
    pub(crate) async fn close(&self, deadline: Instant) {
        let deadline = deadline.max(Instant::now() + LAST_RECORDS);
        let Some(queue) = &self.0 else { return };
        let closed = queue.closed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(closed) = closed else { return };
        while let Err(TrySendError::Full(_)) = queue.sender.try_send(Message::Close) {
            if Instant::now() >= deadline {
                break;
            }
            sleep(CLOSE_INTERVAL).await;
        }
        if timeout_at(deadline.into(), closed).await.is_err() {
            RecordingFailed { what: &"not all that waited was written before the end" }.emit();
        }
    }
}

impl Queue {
    fn put(&self, record: Record) {
        let bytes = size_of::<Entry>() + held(&record);
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > MAX_WAITING_BYTES {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            RecordDropped { reason: "queue_full", records: 1 }.emit();
            return;
        }
        let entry = Box::new(Entry { time: SystemTime::now(), record, bytes });
        if let Err(error) = self.sender.try_send(Message::Call(entry)) {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            let reason = match error {
                TrySendError::Full(_) => "queue_full",
                TrySendError::Disconnected(_) => "closed",
            };
            RecordDropped { reason, records: 1 }.emit();
        }
    }
}

/// The frame of a record; `None` for a call that will come again.
fn record(origin: Origin, error: Option<&Error>) -> Option<Record> {
    if error.is_some_and(|error| error.retry_after().is_some()) {
        return None;
    }
    Some(Record {
        plumb_record: VERSION,
        rpc: Cow::Borrowed(origin.rpc),
        caller: origin.caller.map(|name| name.as_ref().to_owned()),
        error: error.map(|error| (&v1::ItemError::from(error)).into()),
        ..Record::default()
    })
}

fn outcome(result: &v1::ScoreResult) -> Outcome {
    match &result.outcome {
        Some(v1::score_result::Outcome::Score(score)) => score.into(),
        Some(v1::score_result::Outcome::Error(error)) => error.into(),
        None => Outcome::default(),
    }
}

/// Memory that a record holds beside itself. Texts and lists count by the room that they have taken: an empty turn is
/// two bytes on the wire, and dozens here.
fn held(record: &Record) -> usize {
    let Record { caller, model, score, rank, results, error, .. } = record;
    caller.as_ref().map_or(0, String::capacity)
        + model.as_ref().map_or(0, |model| model.name.capacity() + model.weights_digest.capacity())
        + score.as_ref().map_or(0, score_bytes)
        + rank.as_ref().map_or(0, rank_bytes)
        + list_bytes(results, |outcome| outcome.error.as_ref().map_or(0, failure_bytes))
        + error.as_ref().map_or(0, failure_bytes)
}

fn score_bytes(request: &v1::ScoreRequest) -> usize {
    let v1::ScoreRequest { model, items, request_id, .. } = request;
    model.as_ref().map_or(0, spec_bytes) + list_bytes(items, input_bytes) + request_id.capacity()
}

fn rank_bytes(request: &v1::RankRequest) -> usize {
    let v1::RankRequest { model, prompt, candidates, request_id, .. } = request;
    model.as_ref().map_or(0, spec_bytes)
        + prompt.as_ref().map_or(0, input_bytes)
        + list_bytes(candidates, candidate_bytes)
        + request_id.capacity()
}

fn spec_bytes(spec: &v1::ModelSpec) -> usize {
    let label = match &spec.choice {
        Some(v1::model_spec::Choice::Label(label)) => label.capacity(),
        Some(v1::model_spec::Choice::Version(_)) | None => 0,
    };
    spec.name.capacity() + label
}

fn input_bytes(input: &v1::Input) -> usize {
    match &input.input {
        Some(v1::input::Input::Conversation(conversation)) => {
            list_bytes(&conversation.messages, |message| message.role.capacity() + message.content.capacity())
        }
        Some(v1::input::Input::Text(text)) => text.capacity(),
        Some(v1::input::Input::TokenIds(ids)) => list_bytes(&ids.ids, |_| 0),
        None => 0,
    }
}

fn candidate_bytes(candidate: &v1::Candidate) -> usize {
    match &candidate.candidate {
        Some(v1::candidate::Candidate::Text(text)) => text.capacity(),
        Some(v1::candidate::Candidate::TokenIds(ids)) => list_bytes(&ids.ids, |_| 0),
        None => 0,
    }
}

fn failure_bytes(failure: &Failure) -> usize {
    failure.code.capacity() + failure.message.capacity()
}

/// Memory of a list, and of what its elements hold beside themselves.
fn list_bytes<T>(list: &Vec<T>, held: impl Fn(&T) -> usize) -> usize {
    list.capacity() * size_of::<T>() + list.iter().map(held).sum::<usize>()
}

#[cfg(test)]
mod tests;
