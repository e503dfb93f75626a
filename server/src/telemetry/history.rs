//! What happened to models of late, for the status page. Like the metrics it is the process's, so that events need no
//! handle.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use time::OffsetDateTime;

/// A day of an RL loop is in the log; the page shows what an operator comes for.
const KEPT: usize = 20;

static LAST: Mutex<VecDeque<Happening>> = Mutex::new(VecDeque::new());

/// Something that happened to a model.
#[derive(Clone, Debug)]
pub(crate) struct Happening {
    pub(crate) at: OffsetDateTime,
    /// Name of the model.
    pub(crate) model: String,
    /// What, as a short sentence.
    pub(crate) what: String,
    /// Whether it is as it should be.
    pub(crate) good: bool,
}

/// Remembers it, and forgets the oldest.
pub(crate) fn remember(model: &str, what: String, good: bool) {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    last.truncate(KEPT - 1);
    last.push_front(Happening { at: OffsetDateTime::now_utc(), model: model.to_owned(), what, good });
}

/// What is remembered, the newest first.
pub(crate) fn last() -> Vec<Happening> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}
