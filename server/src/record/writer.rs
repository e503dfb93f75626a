//! The thread that writes.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use plumb_proto::record::MAX_LINE_BYTES;

use super::folder::stamp;
use super::lines::{Files, Lines};
use super::sample::is_chosen;
use super::{Entry, Message};
use crate::telemetry::events::{RecordDropped, RecordWritten, RecordingFailed};

/// How often an idle thread looks whether its file is old, and what a full disk says now.
const TICK: Duration = Duration::from_secs(1);
/// How often the log tells of a disk that refuses; the metric counts every record.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// Memory for a line that is kept for the next one.
const USUAL_LINE_BYTES: usize = 64 << 10;

/// What the thread works with.
pub(super) struct Writer<F: Files> {
    lines: Lines<F>,
    sample: f64,
    /// What waits, shared with whoever puts something there.
    bytes: Arc<AtomicUsize>,
    /// Reused for every line.
    line: Vec<u8>,
    complained: Option<Instant>,
}

impl<F: Files> Writer<F> {
    pub(super) fn new(lines: Lines<F>, sample: f64, bytes: Arc<AtomicUsize>) -> Self {
        Self { lines, sample, bytes, line: Vec::new(), complained: None }
    }

    /// Writes until it is told to stop. While nothing waits, all is in the file.
    pub(super) fn run(mut self, receiver: &Receiver<Message>) {
        loop {
            let message = match receiver.try_recv() {
                Err(TryRecvError::Empty) => {
                    self.idle();
                    match receiver.recv_timeout(TICK) {
                        Err(RecvTimeoutError::Timeout) => continue,
                        Err(RecvTimeoutError::Disconnected) => break,
                        Ok(message) => message,
                    }
                }
                Err(TryRecvError::Disconnected) => break,
                Ok(message) => message,
            };
            match message {
                Message::Call(entry) => self.take(*entry),
                Message::Close => break,
            }
        }
        if let Err((lost, error)) = self.lines.close(Instant::now()) {
            RecordDropped { reason: "disk", records: lost }.emit();
            RecordingFailed { what: &error }.emit();
        }
    }

    fn take(&mut self, entry: Entry) {
        let Entry { time, mut record, bytes } = entry;
        if is_chosen(&record, self.sample) {
            record.time = stamp(time);
            // Writing to memory does not fail, and what was decoded can be encoded.
            let encoded = serde_json::to_writer(&mut self.line, &record);
            self.line.push(b'\n');
            if encoded.is_err() || self.line.len() > MAX_LINE_BYTES {
                RecordDropped { reason: "too_long", records: 1 }.emit();
            } else {
                match self.lines.push(&self.line, Instant::now()) {
                    Ok(()) => RecordWritten.emit(),
                    Err(error) => {
                        RecordDropped { reason: "disk", records: 1 }.emit();
                        self.complain(&error);
                    }
                }
            }
            self.line.clear();
            // A long line's memory is not held for ever.
            self.line.shrink_to(USUAL_LINE_BYTES);
        }
        // Only now: until here the request was in memory.
        drop(record);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn idle(&mut self) {
        let now = Instant::now();
        if let Err(error) = self.lines.flush(now).and_then(|()| self.lines.finish_old(now)) {
            self.complain(&error);
        }
    }

    fn complain(&mut self, error: &dyn Display) {
        if self.complained.is_none_or(|last| last.elapsed() >= COMPLAINT_INTERVAL) {
            self.complained = Some(Instant::now());
            RecordingFailed { what: error }.emit();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::SystemTime;

    use plumb_proto::record::Record;

    use super::*;

    struct Nowhere;

    impl Files for Nowhere {
        type File = io::Sink;

        fn create(&mut self) -> io::Result<io::Sink> {
            Ok(io::sink())
        }

        fn finish(&mut self, _: io::Sink) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_long_lines_memory_is_given_back_whatever_becomes_of_it() {
        let mut writer = Writer::new(Lines::new(Nowhere, u64::MAX, TICK), 1.0, Arc::default());
        for length in [1, 1 << 20, MAX_LINE_BYTES, 1] {
            let record = Record { caller: Some("x".repeat(length)), ..Record::default() };
            writer.take(Entry { time: SystemTime::now(), record, bytes: 0 });
            let kept = writer.line.capacity();
            assert!(kept < 2 * USUAL_LINE_BYTES, "{kept} bytes are kept after {length}");
        }
    }
}
