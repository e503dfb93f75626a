//! How sequences that are generated and others that wait for more share the engine.

use std::time::Duration;

/// Seconds that one kind can owe the other: what was missed long ago is not made up for at once.
const MOST_OWED: f64 = 1.0;

/// Keeps account of the engine's time while both kinds want it.
///
/// A step that computes prompts takes the streams along, a token each, but costs many times what they cost alone. The
/// account says how much time the streams are owed since; while they are owed some they run by themselves.
#[derive(Debug)]
pub(super) struct Share {
    /// Part of the time that is the streams'.
    decode: f64,
    /// Seconds that they are owed.
    owed: f64,
}

impl Share {
    pub(super) fn new(decode: f64) -> Self {
        Self { decode, owed: 0.0 }
    }

    /// Whether the next step is the streams' alone.
    pub(super) fn decode_alone(&self) -> bool {
        self.owed > 0.0
    }

    /// Whether the next step is the others' alone: the streams have filled all, or nearly all, of too many.
    pub(super) fn others_alone(&self) -> bool {
        // Streams whose part is nothing are taken along all the same.
        self.decode > 0.0 && self.owed < -MOST_OWED / 2.0
    }

    /// Takes a step to account of which the streams had `part`.
    pub(super) fn ran(&mut self, duration: Duration, part: f64) {
        let owed = self.owed + duration.as_secs_f64() * (self.decode - part);
        self.owed = owed.clamp(-MOST_OWED, MOST_OWED);
    }

    /// One kind has the engine to itself: nobody is owed anything.
    pub(super) fn uncontended(&mut self) {
        self.owed = 0.0;
    }
}
