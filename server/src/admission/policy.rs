//! What is let in: pure bookkeeping, no clock of its own, no locks.
//!
//! Two amounts are limited. Prompts that are not yet computed are what others wait behind: of them there may be what the
//! server computes in [`TARGET`] at its measured pace (Little's law: the wait is the work before it over the pace), and
//! always enough for two full batches, so that one is ready when another ends. All tokens of calls that are not yet done,
//! those to be generated included, are what takes memory, and have a fixed limit. Of both limits a part is kept for
//! higher priorities, and a small one for lower ones.
//!
//! Within a priority a client that is within its share ([`super::lane`]) finds room as long as there is any that was not
//! promised to others. One that is ahead of its share gets in where it does nobody harm: while it is alone, or while the
//! queue is short. The parts below were found with the simulations: at ten times the load all of the server's capacity is
//! used, clients get equal parts of it however much they ask for, and those that come back when told find room.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lane::{Lane, Standing, seconds};
use super::pace::Pace;
use super::{AdmissionLimits, Ask, RETRY_AFTER, Refusal, Work};
use crate::engine::Priority;

/// The delay that is aimed at: what the work that is let in takes in sum. Where two full batches take longer, it is that.
pub(super) const TARGET: Duration = Duration::from_secs(1);

/// How much of a limit work of LOW, NORMAL, HIGH and below may take: the rest is there for whoever is more urgent.
const WITH_BELOW: [f64; 3] = [0.5, 15.0 / 16.0, 1.0];
/// How much of a limit work of LOW, NORMAL, HIGH and above may take: the rest is there for whoever is less urgent.
const WITH_ABOVE: [f64; 3] = [1.0, 15.0 / 16.0, 7.0 / 8.0];
/// How much of that is for a client that has had more than its share, alone: the rest is there for the next one that comes.
const ALONE: f64 = 15.0 / 16.0;
/// The same for a client within its share that was not told to come, while others were: they have the rest.
const BEHIND: f64 = 1.0 / 2.0;
/// The same for a client that has had more than its share, while others want something: it keeps the queue from running
/// dry when those who were told to come do not.
const AHEAD: f64 = 1.0 / 3.0;

/// The pace is not the same all the time: what is just in time by the average is late every other time.
const CERTAINTY: f64 = 1.15;

/// How often accounts are looked through.
const SWEEP: Duration = Duration::from_millis(100);

/// Everything that is in the gate.
#[derive(Debug)]
pub(super) struct Policy {
    limits: AdmissionLimits,
    /// By priority, the lowest first.
    lanes: [Lane; 3],
    /// Of prompts.
    pace: Pace,
    swept: Option<Instant>,
}

impl Policy {
    pub(super) fn new(limits: AdmissionLimits) -> Self {
        Self { limits, lanes: Default::default(), pace: Pace::default(), swept: None }
    }

    /// Lets a call in and answers the name under which it is counted, and as how much; or says why not.
    pub(super) fn admit(&mut self, ask: &Ask, now: Instant) -> Result<(Arc<str>, Work), Refusal> {
        self.sweep(now);
        let ceiling = self.limits.ceiling();
        if ask.certain > ceiling || ask.work.new > ceiling {
            return Err(Refusal::TooLarge { tokens: ask.work.tokens(), limit: ceiling });
        }
        let work = Work { prompt: ask.work.prompt.min(ceiling - ask.work.new), ..ask.work };
        let ask = &Ask { work, ..ask.clone() };
        let lane = &mut self.lanes[ask.priority as usize];
        let key = lane.key(&ask.client);
        lane.arrive(&key, now);
        let result = match self.late(ask, &key, now) {
            Some(refusal) => Err(refusal),
            None => self.find_room(ask, &key, now),
        };
        match result {
            Ok(()) => {
                self.pace.begin(now);
                self.lanes[ask.priority as usize].admit(&key, ask.work, now);
                Ok((key, work))
            }
            Err(refusal) => {
                if let Some(retry_after) = refusal.retry_after() {
                    self.pace.crowd();
                    self.lanes[ask.priority as usize].refuse(&key, retry_after, ask.deadline, now);
                }
                Err(refusal)
            }
        }
    }

    fn find_room(&mut self, ask: &Ask, key: &Arc<str>, now: Instant) -> Result<(), Refusal> {
        let limit = self.limit();
        let standing = self.lanes[ask.priority as usize].standing(key, limit, now);
        let behind = standing == Standing::Within && self.lanes[ask.priority as usize].is_behind(key, now);
        let part = match standing {
            Standing::Within if behind => BEHIND,
            Standing::Within => 1.0,
            Standing::Alone => ALONE,
            Standing::Ahead(_) => AHEAD,
        };
        let ceiling = self.limits.ceiling();
        let waits = self.excess(ask.priority, |lane| lane.work.prompt, limit, part);
        // The ceiling is never passed; the other limits are, by as much as the last call that gets in.
        let over = (self.work().tokens() + ask.work.tokens()) as f64 - ceiling as f64;
        let held = self.excess(ask.priority, |lane| lane.work.tokens(), ceiling, part).max(over);
        if waits < 0.0 && held <= 0.0 {
            return Ok(());
        }
        let (work, batch) = (self.work(), self.limits.max_batch_tokens);
        let (excess, rate) = if held > 0.0 { (held, None) } else { (waits, Some(self.pace.rate())) };
        // Room comes a batch at a time: it is there for certain when the batch has ended in which it becomes free.
        let excess = if behind { 0.0 } else { excess } + batch.min(work.prompt) as f64;
        let lane = &mut self.lanes[ask.priority as usize];
        let retry_after = match standing {
            Standing::Within => lane.room(key, ask.work, excess, rate, ask.deadline, now),
            // Its calls come back one after the other.
            Standing::Alone => lane.turn(key, ask.work, excess, ask.deadline, now),
            Standing::Ahead(ahead) => {
                let retry_after = lane.turn(key, ask.work, ahead, ask.deadline, now);
                return Err(Refusal::Share { retry_after, limit });
            }
        };
        Err(match held > 0.0 {
            true => Refusal::Full { retry_after, used: work.tokens(), limit: ceiling, tokens: ask.work.tokens() },
            false => Refusal::Full { retry_after, used: work.prompt, limit, tokens: ask.work.prompt },
        })
    }

    /// Refuses what cannot be done in time, once the pace is known. What nobody could do in time is over; for the rest
    /// there is a time when the queue will be short enough.
    fn late(&self, ask: &Ask, key: &Arc<str>, now: Instant) -> Option<Refusal> {
        let left = ask.deadline?.saturating_duration_since(now);
        // Nobody is kept from showing what the server can do now.
        if self.work().prompt == 0 {
            return None;
        }
        let rate = self.pace.known_rate()?;
        let own = seconds(ask.work.prompt as f64, rate);
        if own > left {
            return Some(Refusal::Hopeless { needs: own, left });
        }
        let wait = self.wait(ask.priority, ask.work.prompt, key, now);
        // It is done when its batch is.
        let batch = self.limits.max_batch_tokens.min(self.work().prompt);
        let done = (wait + own.max(seconds(batch as f64, rate))).mul_f64(CERTAINTY);
        let late = done.checked_sub(left).filter(|late| !late.is_zero())?;
        Some(Refusal::Late { retry_after: late, wait, left })
    }

    /// How long a call would wait: for what is more urgent, and for as much of each other client of its priority as it
    /// has itself, which is what fair queueing serves before it; less what the server has done of that already. That is
    /// no more than there is, except that behind calls of its own it is overtaken by those that others are going to send.
    fn wait(&self, priority: Priority, prompt: usize, key: &Arc<str>, now: Instant) -> Duration {
        let Some(rate) = self.pace.known_rate() else { return Duration::ZERO };
        let (lane, above) = (&self.lanes[priority as usize], &self.lanes[priority as usize + 1..]);
        let urgent: usize = above.iter().map(|lane| lane.work.prompt).sum();
        let own = lane.client(key).map_or(0, |client| client.work.prompt);
        let fair = (own + prompt).saturating_mul(lane.active());
        let short = (self.work().prompt as f64) < self.limit() as f64 * AHEAD;
        let before = if own == 0 || short { lane.work.prompt.min(fair) } else { fair };
        seconds((urgent + before) as f64, rate).saturating_sub(self.pace.at_work(now))
    }

    /// Work that was let in turns out to be more or less.
    ///
    /// # Errors
    /// If so much is never let in.
    pub(super) fn correct(&mut self, key: &Arc<str>, priority: Priority, from: Work, to: Work) -> Result<(), Refusal> {
        if to.tokens() > self.limits.ceiling() {
            return Err(Refusal::TooLarge { tokens: to.tokens(), limit: self.limits.ceiling() });
        }
        self.lanes[priority as usize].correct(key, from, to);
        Ok(())
    }

    /// Work leaves: it is done, or nobody wants it any more.
    pub(super) fn leave(&mut self, key: &Arc<str>, priority: Priority, work: Work, done: bool, now: Instant) {
        self.lanes[priority as usize].leave(key, work, done, now);
        let left = self.work().prompt;
        if work.prompt > 0 {
            match done {
                true => self.pace.done(work.prompt, left, now),
                false => self.pace.given_up(work.prompt, left, now),
            }
        }
        if left as f64 >= self.limit() as f64 * AHEAD {
            self.pace.crowd();
            self.lanes[priority as usize].pace.crowd();
        }
        self.sweep(now);
    }

    /// Prompts that may wait at a time.
    pub(super) fn limit(&self) -> usize {
        match self.limits.max_queue_tokens {
            Some(limit) => limit,
            None => {
                let in_time = (self.pace.rate() * TARGET.as_secs_f64()) as usize;
                in_time.max(2 * self.limits.max_batch_tokens).min(self.limits.ceiling())
            }
        }
    }

    /// All that is in the gate.
    pub(super) fn work(&self) -> Work {
        self.lanes.iter().fold(Work::default(), |sum, lane| sum + lane.work)
    }

    /// Clients that have work in the gate, or were told to come back.
    pub(super) fn clients(&self) -> usize {
        self.lanes.iter().map(Lane::clients).sum()
    }

    /// How long all that waits takes.
    pub(super) fn predicted_wait(&self) -> Duration {
        self.pace.known_rate().map_or(Duration::ZERO, |rate| seconds(self.work().prompt as f64, rate))
    }

    /// By how much the work in the gate is over what a priority may add to, of which a client gets a `part`; below zero if
    /// there is room. What is less urgent than the client takes nothing from its part.
    fn excess(&self, priority: Priority, amount: impl Fn(&Lane) -> usize, limit: usize, part: f64) -> f64 {
        let (lane, limit) = (priority as usize, limit as f64);
        let sum = |lanes: &[Lane]| lanes.iter().map(&amount).sum::<usize>() as f64;
        let below = sum(&self.lanes[..=lane]) - limit * WITH_BELOW[lane];
        let above = sum(&self.lanes[lane..]) - limit * WITH_ABOVE[lane] * part;
        below.max(above).max(sum(&self.lanes) - limit)
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.lanes.iter_mut().for_each(|lane| lane.sweep(now));
        }
    }
}

impl Refusal {
    /// When to come back, spread by the caller; `None` if that does not help.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::TooLarge { .. } | Self::Hopeless { .. } => None,
            Self::Full { retry_after, .. } | Self::Share { retry_after, .. } | Self::Late { retry_after, .. } => {
                Some((*retry_after).clamp(RETRY_AFTER.0, RETRY_AFTER.1))
            }
        }
    }
}
