//! How much work is let in, counted in tokens: a call is admitted whole or refused at once, before anything is spent on
//! it, with the time after which there should be room for it.
//!
//! Read `policy` first: it decides; `lane` says what is fair between clients, `pace` how fast work gets done,
//! `estimate` how many tokens a text will be. Here is what a call holds meanwhile: a [`Permit`], of which each of its
//! sequences gets a part, and gives it back when it is done, cancelled or failed.
//!
//! This gate bounds what a call makes the engine do. The count of calls in `layers/admission.rs` comes before it and
//! bounds what a call takes by merely being there: a task, buffers, a stream of its connection. A call that waits, such
//! as `WatchModels`, takes a place there and no tokens here; a call of thousands of tokens takes one place there. In
//! ordinary use this gate is the one that says no.

mod estimate;
mod lane;
mod pace;
mod policy;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::{Add, AddAssign, Sub};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use self::estimate::Estimator;
use self::policy::Policy;
use crate::engine::Priority;
use crate::error::{Error, Result};
use crate::telemetry::events::{AdmissionChanged, AdmissionRefused};

/// No client is asked to come back sooner, or later, than this.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));
/// Waited for where the pace is not known yet.
const RETRY_UNKNOWN: Duration = Duration::from_millis(200);
/// The longest wait where it is a guess.
const RETRY_GUESSED: Duration = Duration::from_secs(1);
/// Clients that are refused together are spread over this part of their wait.
const SPREAD: f64 = 0.1;
/// Tokens that are admitted and not done, where nobody sets a limit: at some twenty bytes each, what takes memory.
const CEILING: usize = 1 << 20;

/// What is let in.
#[derive(Clone, Copy, Debug)]
pub struct AdmissionLimits {
    /// Tokens of work that are admitted and not yet done; without it, what the server does in about a second.
    pub max_queue_tokens: Option<usize>,
    /// Tokens in a batch.
    pub max_batch_tokens: usize,
}

impl AdmissionLimits {
    fn ceiling(&self) -> usize {
        self.max_queue_tokens.unwrap_or(CEILING)
    }
}

/// An amount of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens to compute before there is an answer.
    pub prompt: usize,
    /// Tokens that may be drawn after that.
    pub new: usize,
}

impl Work {
    /// Of a sequence that is scored.
    #[must_use]
    pub fn prompt(tokens: usize) -> Self {
        Self { prompt: tokens, new: 0 }
    }

    fn tokens(self) -> usize {
        self.prompt.saturating_add(self.new)
    }
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { prompt: self.prompt.saturating_add(other.prompt), new: self.new.saturating_add(other.new) }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Work {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { prompt: self.prompt.saturating_sub(other.prompt), new: self.new.saturating_sub(other.new) }
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// A call that wants to be let in.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Whose it is.
    pub client: Arc<str>,
    /// How urgent it is.
    pub priority: Priority,
    /// How much it is, as far as that is known.
    pub work: Work,
    /// Tokens of it that are counted. The others are guessed, and no reason to refuse it for good.
    pub certain: usize,
    /// When its answer is of no use any more.
    pub deadline: Option<Instant>,
}

/// Why a call is not let in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Refusal {
    /// There is never room for so much.
    TooLarge { tokens: usize, limit: usize },
    /// There is no room now.
    Full { retry_after: Duration, used: usize, limit: usize, tokens: usize },
    /// The client has had more than its share, and others want theirs.
    Share { retry_after: Duration, limit: usize },
    /// It would be done after its deadline, because of what is before it.
    Late { retry_after: Duration, wait: Duration, left: Duration },
    /// It would be done after its deadline even if it were alone.
    Hopeless { needs: Duration, left: Duration },
}

impl Refusal {
    /// Value of the `reason` label.
    fn reason(self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::Full { .. } => "queue",
            Self::Share { .. } => "share",
            Self::Late { .. } => "late",
            Self::Hopeless { .. } => "hopeless",
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        // Never sooner than was said: there is no room before.
        let spread = 1.0 + SPREAD * rand::random::<f64>();
        let retry_after = refusal.retry_after().unwrap_or_default().mul_f64(spread);
        let what = match refusal {
            Refusal::TooLarge { tokens, limit } => {
                let message = format!("the call is {tokens} tokens of work, {limit} are allowed at a time; split it");
                return Self::invalid("", message);
            }
            Refusal::Hopeless { .. } => return Self::DeadlineExceeded,
            Refusal::Full { used, limit, tokens, .. } => {
                format!("{used} of {limit} tokens are queued, the call needs {tokens}")
            }
            Refusal::Share { limit, .. } => {
                format!("others wait for their share of the {limit} tokens that may be queued")
            }
            Refusal::Late { wait, left, .. } => {
                format!("the queue takes {} ms, the deadline is in {} ms", wait.as_millis(), left.as_millis())
            }
        };
        Self::ResourceExhausted { what, retry_after }
    }
}

/// The gate.
#[derive(Debug)]
pub struct Admission(Mutex<Policy>);

impl Admission {
    /// A gate with nothing in it.
    #[must_use]
    pub fn new(limits: AdmissionLimits) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Policy::new(limits))))
    }

    /// Lets a call in, or refuses it.
    ///
    /// # Errors
    /// `InvalidArgument` if there can never be room for so much, `ResourceExhausted` if there is none now, the client
    /// has had its share, or the queue is too long for the call's deadline; `DeadlineExceeded` if the call is too long
    /// for it by itself.
    pub fn admit(self: &Arc<Self>, ask: Ask) -> Result<Permit, Refused> {
        let mut policy = self.lock();
        match policy.admit(&ask, Instant::now()) {
            Ok((client, work)) => {
                changed(&policy);
                drop(policy);
                Ok(Permit { client, priority: ask.priority, work, gate: Arc::clone(self) })
            }
            Err(refusal) => {
                drop(policy);
                Err(Refused { reason: refusal.reason(), error: refusal.into() })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Policy> {
        // Numbers that are added to: nothing is half written that would matter.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn changed(policy: &Policy) {
    let work = policy.work();
    AdmissionChanged {
        tokens: work.tokens(),
        prompts: work.prompt,
        limit: policy.limit(),
        clients: policy.clients(),
        wait: policy.predicted_wait(),
    }
    .emit();
}

/// That a call was not let in. Who has patience may ask again, and nobody has been turned away.
#[derive(Debug)]
#[must_use]
pub struct Refused {
    reason: &'static str,
    error: Error,
}

impl Refused {
    /// When there should be room; `None` if there will be none in time, or never.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        self.error.retry_after()
    }

    /// What the caller is told: it does not wait, or no longer.
    pub fn give_up(self) -> Error {
        AdmissionRefused { reason: self.reason }.emit();
        self.error
    }
}

/// Room for a call, or for a part of it. Dropping it gives up what is not yet done.
#[derive(Debug)]
pub struct Permit {
    client: Arc<str>,
    priority: Priority,
    work: Work,
    gate: Arc<Admission>,
}

impl Permit {
    /// Names the client to the engine.
    pub(crate) fn client_id(&self) -> u64 {
        // Two clients of one number would take turns as one: rare, and harmless.
        let mut hasher = DefaultHasher::new();
        self.client.hash(&mut hasher);
        hasher.finish()
    }

    /// Tokens that are not yet done.
    pub(crate) fn tokens(&self) -> usize {
        self.work.tokens()
    }

    /// Cuts it into a part for each sequence, of the size that has turned out.
    ///
    /// # Errors
    /// `InvalidArgument` if so much is never let in.
    pub fn split(mut self, sequences: &[Work]) -> Result<Vec<Self>> {
        let all = sequences.iter().copied().sum();
        let mut policy = self.gate.lock();
        policy.correct(&self.client, self.priority, self.work, all)?;
        changed(&policy);
        drop(policy);
        self.work = all;
        Ok(sequences.iter().map(|work| self.take(*work)).collect())
    }

    /// Cuts a part off.
    pub(crate) fn take(&mut self, part: Work) -> Self {
        let rest = self.work - part;
        let work = self.work - rest;
        self.work = rest;
        Self { client: Arc::clone(&self.client), priority: self.priority, work, gate: Arc::clone(&self.gate) }
    }

    /// All of it, for somebody else.
    pub(crate) fn rest(&mut self) -> Self {
        self.take(self.work)
    }

    /// The prompt is computed.
    pub(crate) fn prompt_is_done(&mut self) {
        self.leave(Work { new: 0, ..self.work }, true);
    }

    /// A token was drawn.
    pub(crate) fn token_is_drawn(&mut self) {
        self.leave(Work { prompt: 0, new: self.work.new.min(1) }, true);
    }

    /// All of it is done.
    pub(crate) fn finish(mut self) {
        self.leave(self.work, true);
    }

    fn leave(&mut self, work: Work, done: bool) {
        if work == Work::default() {
            return;
        }
        self.work = self.work - work;
        let mut policy = self.gate.lock();
        policy.leave(&self.client, self.priority, work, done, Instant::now());
        changed(&policy);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.leave(self.work, false);
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
