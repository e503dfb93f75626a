//! The clients of one priority, and what is fair between them.
//!
//! A client's work is put on a virtual clock, as in fair queueing: the clock goes on by a token for every token that each
//! client could have had done, and a client's `finish` is where the clock will be when it has got all that it was let in
//! with. Who is behind the clock has had less than the others, who is ahead more (Parekh and Gallager 1993, "A
//! Generalized Processor Sharing Approach to Flow Control"; Goyal et al. 1996, "Start-time Fair Queueing"). Clients that
//! ask for less than their share are never ahead, and the clock goes the faster for the others: max-min fairness.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::{RETRY_AFTER, RETRY_GUESSED, RETRY_UNKNOWN, Work};

/// Clients of a priority that are told apart. Those that come when there are so many share one place.
pub(super) const MAX_CLIENTS: usize = 4096;
/// What the place of all others is called.
const OTHERS: &str = "(others)";
/// A client that was refused counts as one that wants something until it should have come back, and this much longer.
const PATIENCE: Duration = Duration::from_secs(1);

/// A client's account.
#[derive(Debug, Default)]
pub(super) struct Client {
    pub(super) work: Work,
    /// Where the clock will be when it has got what it was let in with.
    finish: f64,
    /// When calls of it that were refused should come back, and their tokens: one is its turn after the other.
    promises: VecDeque<(Instant, usize)>,
    /// When there should be room for it, where that is all it waits for.
    slot: Option<Instant>,
    wants_until: Option<Instant>,
    active: bool,
}

impl Client {
    /// A call comes: the one that was told to, if it is time.
    fn keep_promise(&mut self, now: Instant) {
        while self.promises.front().is_some_and(|(due, _)| *due + FORGOTTEN < now) {
            self.promises.pop_front();
        }
        self.promises.pop_front_if(|(due, _)| *due <= now);
    }

    fn wants(&self, now: Instant) -> bool {
        self.wants_until.is_some_and(|until| until > now)
    }
}

/// How much later than at its turn a client is told to come: who comes too early has come in vain.
const LATER: f64 = 1.2;
/// A call that has not come back by then will not.
const FORGOTTEN: Duration = Duration::from_secs(3);
/// Calls of a client that are told one time after the other; more of them are told the last one.
const MAX_PROMISES: usize = 32;

/// The clients of one priority.
#[derive(Debug, Default)]
pub(super) struct Lane {
    clients: HashMap<Arc<str>, Client>,
    /// What all of them have in the gate.
    pub(super) work: Work,
    /// The virtual clock, in tokens of each client.
    clock: f64,
    /// Clients with work in the gate, and those that were told to come back.
    active: usize,
    /// Until when the room that will be free is promised.
    promised_until: Option<Instant>,
    /// The same to those who came when they were told, and there was no room yet.
    again_until: Option<Instant>,
    /// Of prompts and new tokens alike.
    pub(super) pace: Pace,
}

/// How a client stands among the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Standing {
    /// It has had no more than its share.
    Within,
    /// It has had more, and nobody else wants anything.
    Alone,
    /// It has had more, by so many tokens of the clock.
    Ahead(f64),
}

impl Lane {
    /// The name under which a client is counted.
    pub(super) fn key(&self, client: &Arc<str>) -> Arc<str> {
        match self.clients.contains_key(client) || self.clients.len() < MAX_CLIENTS {
            true => Arc::clone(client),
            false => Arc::from(OTHERS),
        }
    }

    pub(super) fn clients(&self) -> usize {
        self.clients.len()
    }

    /// Clients that want something.
    pub(super) fn active(&self) -> usize {
        self.active.max(1)
    }

    pub(super) fn client(&self, key: &Arc<str>) -> Option<&Client> {
        self.clients.get(key)
    }

    /// How a client stands, of which none has to wait for more than `limit` tokens. Each may be ahead of the clock by
    /// what it gets if all of them, and one more, divide the limit: where there are few, their work can wait here.
    pub(super) fn standing(&self, key: &Arc<str>, limit: usize, now: Instant) -> Standing {
        let Some(client) = self.clients.get(key) else { return Standing::Within };
        let others = self.active - usize::from(client.active);
        let ahead = client.finish - self.clock(now) - limit as f64 / (others + 2) as f64;
        match (ahead > 0.0, others) {
            (false, _) => Standing::Within,
            (true, 0) => Standing::Alone,
            (true, _) => Standing::Ahead(ahead),
        }
    }

    /// Where the clock is. A batch moves it on when it ends; in between it is as far as the batch is likely to be.
    fn clock(&self, now: Instant) -> f64 {
        let done = self.pace.rate() * self.pace.at_work(now).as_secs_f64();
        self.clock + done.min(self.work.tokens() as f64) / self.active() as f64
    }

    pub(super) fn admit(&mut self, key: &Arc<str>, work: Work, now: Instant) {
        let clock = self.clock;
        let client = self.account(key);
        let tokens = work.tokens() as f64;
        // Whoever comes back a little late has not lost its turn; whoever was away has not saved up any. Whoever got in
        // because nobody else was there pays for a call at most, and not for all of them later.
        let finish = client.finish.max(clock - tokens / 2.0) + tokens;
        client.finish = finish.min(clock + (client.work + work).tokens() as f64 + tokens);
        client.work += work;
        (client.slot, client.wants_until) = (None, None);
        self.work += work;
        self.pace.begin(now);
    }

    /// The same work turns out to be more or less.
    pub(super) fn correct(&mut self, key: &Arc<str>, from: Work, to: Work) {
        let client = self.account(key);
        client.finish += to.tokens() as f64 - from.tokens() as f64;
        client.work = client.work - from + to;
        self.work = self.work - from + to;
    }

    /// Work leaves the gate, done or given up: what was not done is not charged.
    pub(super) fn leave(&mut self, key: &Arc<str>, work: Work, done: bool, now: Instant) {
        let tokens = work.tokens();
        let client = self.account(key);
        client.work = client.work - work;
        if !done {
            client.finish -= tokens as f64;
        }
        self.work = self.work - work;
        if done {
            self.clock += tokens as f64 / self.active() as f64;
            self.pace.done(tokens, self.work.tokens(), now);
        } else {
            self.pace.given_up(tokens, self.work.tokens(), now);
        }
    }

    /// A client calls.
    pub(super) fn arrive(&mut self, key: &Arc<str>, now: Instant) {
        if let Some(client) = self.clients.get_mut(key) {
            client.keep_promise(now);
        }
    }

    /// When a client should come back that is `ahead` of the clock: when the clock has caught up with all that it was
    /// let in with, and told to come back with. A call that is `over` by then is told all the same, and not waited for.
    pub(super) fn turn(
        &mut self,
        key: &Arc<str>,
        work: Work,
        ahead: f64,
        over: Option<Instant>,
        now: Instant,
    ) -> Duration {
        let per_second = self.pace.rate() / self.active() as f64;
        // Then there may still be others who wait for room.
        let (line, longest) = (self.line(now), self.longest());
        let client = self.account(key);
        let promised: usize = client.promises.iter().map(|(_, tokens)| tokens).sum();
        let wait = seconds(ahead + promised as f64, per_second);
        let wait = wait.mul_f64(LATER).saturating_add(line).min(longest);
        if client.promises.len() < MAX_PROMISES && comes_back(now + wait, over) {
            client.promises.push_back((now + wait, work.tokens()));
        }
        wait
    }

    /// Whether others were told before that there will be room for them, and this client was not.
    pub(super) fn is_behind(&self, key: &Arc<str>, now: Instant) -> bool {
        let was_told = self.clients.get(key).and_then(|client| client.slot).is_some_and(|slot| slot <= now);
        !was_told && !self.line(now).is_zero()
    }

    /// The longest wait that a client is told. A pace that is a guess is not good for more than a moment.
    fn longest(&self) -> Duration {
        if self.pace.known_rate().is_some() { RETRY_AFTER.1 } else { RETRY_GUESSED }
    }

    /// How long those wait who only need room.
    fn line(&self, now: Instant) -> Duration {
        self.promised_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// When a client should come back that only needs room: behind those who were told the same before. `rate` is that at
    /// which room becomes free, if it is not the lane's own. None is kept for a call that is `over` by then.
    pub(super) fn room(
        &mut self,
        key: &Arc<str>,
        work: Work,
        excess: f64,
        rate: Option<f64>,
        over: Option<Instant>,
        now: Instant,
    ) -> Duration {
        let rate = rate.unwrap_or(self.pace.rate());
        let own = seconds(excess, rate);
        let time = if rate > 0.0 { seconds(work.tokens() as f64, rate) } else { Duration::ZERO };
        let (slot, longest) = (self.account(key).slot, self.longest());
        let line = match slot {
            Some(slot) if slot > now => return slot - now,
            Some(_) => &mut self.again_until,
            None => &mut self.promised_until,
        };
        let wait = line.map_or(own, |until| own.max(until.saturating_duration_since(now))).min(longest);
        if !comes_back(now + wait, over) {
            return wait;
        }
        *line = Some(now + wait + time);
        if slot.is_none() {
            self.account(key).slot = Some(now + wait);
        }
        wait
    }

    /// A client was told to come back with a call that is `over` some time.
    pub(super) fn refuse(&mut self, key: &Arc<str>, retry_after: Duration, over: Option<Instant>, now: Instant) {
        self.pace.crowd();
        let until = now + retry_after.mul_f64(1.5);
        let until = over.map_or(until, |over| until.min(over)) + PATIENCE;
        let client = self.account(key);
        client.wants_until = client.wants_until.max(Some(until));
    }

    /// Forgets clients that want nothing any more.
    pub(super) fn sweep(&mut self, now: Instant) {
        let (clock, busy) = (self.clock, self.work.tokens() > 0);
        self.clients.retain(|_, client| {
            client.active = client.work.tokens() > 0 || client.wants(now);
            client.active || (busy && client.finish > clock)
        });
        self.active = self.clients.values().filter(|client| client.active).count();
    }

    /// The account of a client, which is active from now on.
    fn account(&mut self, key: &Arc<str>) -> &mut Client {
        let clock = self.clock;
        let new = || Client { finish: clock, ..Client::default() };
        let client = self.clients.entry(Arc::clone(key)).or_insert_with(new);
        self.active += usize::from(!client.active);
        client.active = true;
        client
    }
}

/// Whether a call that is told to come at a time still can.
fn comes_back(at: Instant, over: Option<Instant>) -> bool {
    over.is_none_or(|over| at < over)
}

/// How long so many tokens take.
pub(super) fn seconds(tokens: f64, rate: f64) -> Duration {
    if rate <= 0.0 {
        return RETRY_UNKNOWN;
    }
    Duration::try_from_secs_f64(tokens.max(0.0) / rate).unwrap_or(RETRY_AFTER.1)
}
