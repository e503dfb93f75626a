//! Whose turn it is among the clients that wait, and how much those get that are less urgent.

use std::collections::HashMap;

use super::{Client, Priority};

/// What the less urgent get of the tokens that begin while more urgent ones wait: one in so many.
const LESS_URGENT: i64 = 16;
/// The most that they can be owed: what was missed long ago is not made up for at once.
const MAX_OWED: i64 = 4096;

/// Accounts beyond which those are given up that say nothing.
const SWEEP: usize = 1024;

/// Start-time fair queueing (Goyal, Vin and Cheng 1996): a sequence gets a start tag, where its client's last one ends or
/// where the clock is, whichever is later, and sequences begin in the order of their tags. The clock is the tag of the
/// last one that began. So a client with one sequence waits for one of each other client, however many those have.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// By priority.
    lanes: [Lane; 3],
    /// Tokens that the less urgent are owed; below zero where they have had more.
    owed: i64,
}

#[derive(Debug, Default)]
struct Lane {
    clock: u64,
    /// Where the last sequence of a client ends.
    ends: HashMap<Client, u64>,
}

impl Turns {
    /// A sequence's tag.
    pub(super) fn enter(&mut self, priority: Priority, client: Client, work: usize) -> u64 {
        let lane = &mut self.lanes[priority as usize];
        let clock = lane.clock;
        if lane.ends.len() >= SWEEP {
            // Whoever is behind the clock begins at the clock anyway.
            lane.ends.retain(|_, end| *end > clock);
            if lane.ends.len() > SWEEP / 2 {
                // Many with a little each: the clock goes past them all, and everybody begins anew.
                lane.clock = lane.ends.drain().map(|(_, end)| end).max().unwrap_or(clock);
            }
        }
        let clock = lane.clock;
        let end = lane.ends.entry(client).or_default();
        let tag = clock.max(*end);
        *end = tag + work.max(1) as u64;
        tag
    }

    /// A sequence begins, and others still wait: more urgent ones, less urgent ones.
    pub(super) fn begin(&mut self, priority: Priority, tag: u64, work: usize, (more, less): (bool, bool)) {
        let lane = &mut self.lanes[priority as usize];
        lane.clock = lane.clock.max(tag);
        let work = work.max(1) as i64;
        if more {
            self.owed -= work;
        } else if less {
            self.owed = (self.owed + work.max(LESS_URGENT) / LESS_URGENT).min(MAX_OWED);
        } else {
            self.owed = 0;
        }
    }

    /// Whether a sequence that is less urgent comes before those that are more.
    pub(super) fn owes(&self) -> bool {
        self.owed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns_by_tokens() {
        let mut turns = Turns::default();
        let mut enter = |client, work| turns.enter(Priority::Normal, client, work);
        // The first sends many, the second one, the third two large ones.
        let first: Vec<_> = (0..4).map(|_| enter(1, 100)).collect();
        assert_eq!(first, [0, 100, 200, 300]);
        assert_eq!(enter(2, 100), 0);
        assert_eq!([enter(3, 250), enter(3, 250)], [0, 250]);
        turns.begin(Priority::Normal, 200, 100, (false, false));
        assert_eq!(turns.enter(Priority::Normal, 2, 100), 200, "nobody saves up turns");
        assert_eq!(turns.enter(Priority::High, 1, 100), 0, "each priority has its own clock");
    }

    #[test]
    fn accounts_do_not_pile_up() {
        let mut turns = Turns::default();
        for client in 0..10 * SWEEP as u64 {
            let tag = turns.enter(Priority::Normal, client, 10);
            turns.begin(Priority::Normal, tag, 10, (false, false));
            assert!(turns.lanes[Priority::Normal as usize].ends.len() <= SWEEP);
        }
        assert!(turns.lanes[Priority::Normal as usize].ends.len() <= SWEEP);
    }

    #[test]
    fn the_less_urgent_get_a_sixteenth_while_others_wait() {
        let mut turns = Turns::default();
        let (mut urgent, mut other) = (0, 0);
        for _ in 0..10_000 {
            match turns.owes() {
                true => {
                    turns.begin(Priority::Low, 0, 300, (true, false));
                    other += 300;
                }
                false => {
                    turns.begin(Priority::High, 0, 100, (false, true));
                    urgent += 100;
                }
            }
        }
        assert!((urgent * 9 / 10..=urgent * 11 / 10).contains(&(other * LESS_URGENT)), "{urgent} {other}");
        turns.begin(Priority::High, 0, 100, (false, false));
        assert!(!turns.owes(), "nobody waits, nobody is owed anything");
    }
}
