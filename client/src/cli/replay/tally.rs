//! Counts what two sides say about the same calls. Pure: calls in, numbers out. Of every item two numbers are kept, of every call
//! none.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use plumb_client::stats::ClusteredMean;
use plumb_client::v1;
use serde::Serialize;

use super::call::{Call, Item, Score, Side};

/// Callers that are told apart; the rest is one.
const MAX_CALLERS: usize = 50;

/// Everything that was counted.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) calls: u64,
    pub(super) items: u64,
    /// Rewards that both sides have, in the order of the items.
    pub(super) rewards: [Vec<f32>; 2],
    /// Of these, pairs with the same bits.
    pub(super) identical: u64,
    /// Of these, pairs where tokens were dropped: by one side only, and by both.
    pub(super) truncated: [u64; 2],
    pub(super) truncated_both: u64,
    /// Of these, pairs with different numbers of tokens: a template or tokenizer has changed.
    pub(super) other_tokens: u64,
    /// Of these, rewards that are made of log-probabilities.
    pub(super) language: [u64; 2],
    pub(super) objectives: BTreeMap<i32, u64>,
    pub(super) models: [Vec<(v1::ModelIdentity, u64)>; 2],
    pub(super) failures: [Failures; 2],
    pub(super) failed_both: u64,
    pub(super) shift: ClusteredMean,
    pub(super) largest_shift: Option<Shift>,
    pub(super) callers: BTreeMap<String, ClusteredMean>,
    pub(super) pairs: Pairs,
    flips: BinaryHeap<Reverse<Flip>>,
    keep_flips: usize,
}

/// Items without a score.
#[derive(Default)]
pub(super) struct Failures {
    /// While the other side has one.
    pub(super) only: u64,
    /// By code.
    pub(super) codes: BTreeMap<String, u64>,
    pub(super) example: Option<String>,
}

/// The item that moved most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Shift {
    pub(super) place: String,
    pub(super) request_id: String,
    pub(super) item: usize,
    pub(super) reference: f32,
    pub(super) candidate: f32,
    pub(super) text: String,
}

impl Shift {
    pub(super) fn size(&self) -> f64 {
        (f64::from(self.candidate) - f64::from(self.reference)).abs()
    }
}

/// Pairs of items with one prompt.
#[derive(Default)]
pub(super) struct Pairs {
    pub(super) groups: u64,
    pub(super) same_best: u64,
    /// How many change their order.
    pub(super) flips: ClusteredMean,
    pub(super) flipped: u64,
    /// Equal rewards on one side only: neither kept nor flipped.
    pub(super) ties_changed: u64,
    /// Sum of the reference's margins, of all and of those that flip.
    pub(super) margin: f64,
    pub(super) flipped_margin: f64,
}

/// A pair that changes its order. Margins are of the item that the reference prefers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Flip {
    pub(super) place: String,
    pub(super) request_id: String,
    /// The one that the reference prefers, and the one that the candidate does.
    pub(super) items: [usize; 2],
    pub(super) reference_margin: f64,
    pub(super) candidate_margin: f64,
    pub(super) texts: [String; 2],
}

impl Flip {
    /// How far the two have moved past one another.
    fn swing(&self) -> f64 {
        self.reference_margin - self.candidate_margin
    }
}

impl Eq for Flip {}

impl PartialOrd for Flip {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Flip {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.swing().total_cmp(&other.swing())
    }
}

impl Tally {
    /// Keeps so many of the largest flips.
    pub(super) fn new(keep_flips: usize) -> Self {
        Self { keep_flips, ..Self::default() }
    }

    /// Counts a call with what the two sides answered to it.
    pub(super) fn add(&mut self, call: &Call, sides: [&Side; 2]) {
        self.calls += 1;
        let n = call.recorded.items.len();
        self.items += n as u64;
        for (side, name) in sides.into_iter().zip(0..) {
            self.failures[name].example = self.failures[name].example.take().or_else(|| side.failure.clone());
        }
        let mut compared = Vec::with_capacity(n);
        for i in 0..n {
            compared.push(match sides.map(|side| side.items.get(i)) {
                [Some(Ok(a)), Some(Ok(b))] => {
                    self.item(call, i, [*a, *b]);
                    Some([a.reward, b.reward])
                }
                items => {
                    self.failed(items);
                    None
                }
            });
        }
        let scored = compared.iter().flatten().count() as u64;
        let shift = compared.iter().flatten().map(|[a, b]| f64::from(*b) - f64::from(*a)).sum();
        self.shift.add(shift, scored);
        self.caller(call.caller.as_deref()).add(shift, scored);
        if scored > 0 {
            *self.objectives.entry(call.objective().into()).or_default() += scored;
        }
        for (side, name) in sides.into_iter().zip(0..) {
            let scores = side.items.iter().filter(|item| item.is_ok()).count() as u64;
            if let Some(model) = side.model.as_ref().filter(|_| scores > 0) {
                self.answered(name, model, scores);
            }
        }
        for group in call.groups() {
            self.group(call, &group, &compared);
        }
    }

    /// The largest flips, largest first.
    pub(super) fn largest_flips(&self) -> Vec<Flip> {
        let mut flips: Vec<Flip> = self.flips.iter().map(|Reverse(flip)| flip.clone()).collect();
        flips.sort_by(|a, b| b.cmp(a));
        flips
    }

    fn item(&mut self, call: &Call, i: usize, [a, b]: [Score; 2]) {
        self.rewards[0].push(a.reward);
        self.rewards[1].push(b.reward);
        self.identical += u64::from(a.reward.to_bits() == b.reward.to_bits());
        self.other_tokens += u64::from(a.input_tokens != b.input_tokens);
        match (a.truncated, b.truncated) {
            (true, true) => self.truncated_both += 1,
            (true, false) => self.truncated[0] += 1,
            (false, true) => self.truncated[1] += 1,
            (false, false) => {}
        }
        self.language[0] += u64::from(a.is_language);
        self.language[1] += u64::from(b.is_language);
        let size = (f64::from(b.reward) - f64::from(a.reward)).abs();
        if size > self.largest_shift.as_ref().map_or(0.0, Shift::size) {
            self.largest_shift = Some(Shift {
                place: call.place.to_string(),
                request_id: call.request_id().to_owned(),
                item: i,
                reference: a.reward,
                candidate: b.reward,
                text: call.preview(i),
            });
        }
    }

    fn failed(&mut self, items: [Option<&Item>; 2]) {
        let failed = items.map(|item| match item {
            Some(Ok(_)) => None,
            Some(Err(code)) => Some(code.clone()),
            None => Some("UNKNOWN".to_owned()),
        });
        self.failed_both += u64::from(failed.iter().all(Option::is_some));
        for (i, code) in failed.iter().enumerate() {
            let Some(code) = code else { continue };
            let failures = &mut self.failures[i];
            failures.only += u64::from(failed[1 - i].is_none());
            *failures.codes.entry(code.clone()).or_default() += 1;
        }
    }

    fn caller(&mut self, name: Option<&str>) -> &mut ClusteredMean {
        let name = name.unwrap_or("");
        let is_new = !self.callers.contains_key(name);
        let name = if is_new && self.callers.len() >= MAX_CALLERS { "(others)" } else { name };
        self.callers.entry(name.to_owned()).or_default()
    }

    fn answered(&mut self, side: usize, model: &v1::ModelIdentity, scores: u64) {
        // There are a few at most.
        match self.models[side].iter_mut().find(|(known, _)| known == model) {
            Some((_, n)) => *n += scores,
            None => self.models[side].push((model.clone(), scores)),
        }
    }

    fn group(&mut self, call: &Call, group: &[usize], compared: &[Option<[f32; 2]>]) {
        let scored: Vec<(usize, [f32; 2])> = group.iter().filter_map(|&i| Some((i, compared[i]?))).collect();
        if scored.len() < 2 {
            return;
        }
        self.pairs.groups += 1;
        self.pairs.same_best += u64::from(best(&scored, 0) == best(&scored, 1));
        let (mut pairs, mut flipped) = (0, 0);
        for (place, &(i, a)) in scored.iter().enumerate() {
            for &(j, b) in &scored[place + 1..] {
                pairs += 1;
                let margins = [0, 1].map(|side| f64::from(a[side]) - f64::from(b[side]));
                self.pairs.margin += margins[0].abs();
                if margins[0] * margins[1].signum() < 0.0 && margins[1] != 0.0 {
                    flipped += 1;
                    self.pairs.flipped_margin += margins[0].abs();
                    self.flip(call, if margins[0] > 0.0 { [i, j] } else { [j, i] }, margins);
                } else if (margins[0] == 0.0) != (margins[1] == 0.0) {
                    self.pairs.ties_changed += 1;
                }
            }
        }
        self.pairs.flipped += flipped;
        self.pairs.flips.add(flipped as f64, pairs);
    }

    fn flip(&mut self, call: &Call, items: [usize; 2], margins: [f64; 2]) {
        let swing = margins[0].abs() + margins[1].abs();
        let is_full = self.flips.len() >= self.keep_flips;
        if is_full && self.flips.peek().is_none_or(|Reverse(smallest)| swing <= smallest.swing()) {
            return;
        }
        if is_full {
            self.flips.pop();
        }
        self.flips.push(Reverse(Flip {
            place: call.place.to_string(),
            request_id: call.request_id().to_owned(),
            items,
            reference_margin: margins[0].abs(),
            candidate_margin: -margins[1].abs(),
            texts: items.map(|i| call.preview(i)),
        }));
    }
}

/// The first of the best, as `Rank` orders them.
fn best(scored: &[(usize, [f32; 2])], side: usize) -> Option<usize> {
    let first = scored.first()?;
    let better = |best: (usize, f32), &(i, rewards): &(usize, [f32; 2])| {
        if rewards[side] > best.1 { (i, rewards[side]) } else { best }
    };
    Some(scored.iter().fold((first.0, first.1[side]), better).0)
}

#[cfg(test)]
mod tests {
    use plumb_client::record::Record;

    use super::*;
    use crate::cli::input::Place;

    type Rewards<'a> = &'a [Option<f32>];

    fn side(rewards: Rewards<'_>) -> Side {
        let score = |reward| Score { reward, input_tokens: 3, truncated: false, is_language: false };
        let item = |reward: &Option<f32>| reward.map(score).ok_or_else(|| "INTERNAL".to_owned());
        let model = v1::ModelIdentity { name: "pm".into(), version: 1, ..Default::default() };
        Side { model: Some(model), items: rewards.iter().map(item).collect(), failure: None }
    }

    fn ranking(line: u64, caller: Option<&str>, reference: &[Option<f32>]) -> Call {
        let text = |i| v1::Candidate { candidate: Some(v1::candidate::Candidate::Text(format!("text {i}"))) };
        let candidates = (0..reference.len()).map(text).collect();
        let record = Record {
            rank: Some(v1::RankRequest { candidates, ..Default::default() }),
            caller: caller.map(str::to_owned),
            results: vec![Default::default(); reference.len()],
            ..Default::default()
        };
        Call { recorded: side(reference), ..Call::of(Place { file: None, line }, record).unwrap() }
    }

    fn tally(keep: usize, calls: &[(Rewards<'_>, Rewards<'_>)]) -> Tally {
        let mut tally = Tally::new(keep);
        for ((reference, candidate), line) in calls.iter().zip(1..) {
            let call = ranking(line, None, reference);
            tally.add(&call, [&call.recorded, &side(candidate)]);
        }
        tally
    }

    #[test]
    fn pairs_flip_tie_or_stay() {
        let some = |rewards: [f32; 3]| rewards.map(Some);
        let (reference, candidate) = (some([3.0, 1.0, 0.0]), some([1.0, 2.0, -1.0]));
        let t = tally(9, &[(&reference, &candidate), (&some([0.0, 0.0, 1.0]), &some([0.0, 1.0, 1.0]))]);
        // Of the first call one pair flips; of the second one tie is broken and one is made.
        assert_eq!((t.pairs.groups, t.pairs.flips.n(), t.pairs.flipped, t.pairs.ties_changed), (2, 6, 1, 2));
        // In the second call the reference's best is item 2, and the first of the candidate's two best is item 1.
        assert_eq!((t.pairs.same_best, t.pairs.margin, t.pairs.flipped_margin), (0, 8.0, 2.0));
        let flip = t.largest_flips().remove(0);
        assert_eq!((flip.items, flip.reference_margin, flip.candidate_margin), ([0, 1], 2.0, -1.0));
        assert_eq!((flip.place.as_str(), flip.texts[1].as_str()), ("1", "text 1"));
        assert_eq!(t.largest_shift.as_ref().map(|shift| (shift.item, shift.size())), Some((0, 2.0)));
        assert!((t.shift.estimate().unwrap().mean + 1.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn the_largest_flips_are_kept() {
        let calls: Vec<_> = (1..=50).map(|i| ([Some(i as f32), Some(0.0)], [Some(0.0), Some(1.0)])).collect();
        let calls: Vec<(Rewards<'_>, Rewards<'_>)> = calls.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        let margins = |keep| tally(keep, &calls).largest_flips().iter().map(|f| f.reference_margin).collect::<Vec<_>>();
        assert_eq!(margins(3), [50.0, 49.0, 48.0]);
        assert_eq!(margins(0), [0.0; 0]);
        assert_eq!(margins(60).len(), 50);
    }

    #[test]
    fn items_without_a_score_are_counted_by_side_and_not_compared() {
        let t = tally(1, &[(&[Some(1.0), None, None], &[None, Some(2.0), None]), (&[Some(-0.0)], &[Some(0.0)])]);
        assert_eq!((t.items, t.rewards[0].len(), t.identical, t.failed_both), (4, 1, 0, 1));
        for failures in &t.failures {
            assert_eq!((failures.only, failures.codes["INTERNAL"]), (1, 2));
        }
        assert_eq!(t.pairs.groups, 0, "one item is no group");
    }

    #[test]
    fn callers_are_told_apart_up_to_a_number() {
        let mut t = Tally::new(0);
        for i in 0..(2 * MAX_CALLERS) {
            let call = ranking(1, Some(&format!("caller {i}")), &[Some(0.0)]);
            t.add(&call, [&call.recorded, &side(&[Some(i as f32)])]);
        }
        assert_eq!(t.callers.len(), MAX_CALLERS + 1);
        assert_eq!(t.callers["caller 7"].estimate().unwrap().mean, 7.0);
        assert_eq!(t.callers["(others)"].n(), MAX_CALLERS as u64);
    }
}
