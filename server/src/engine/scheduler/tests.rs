//! The scheduler, played through in tables.

use super::*;
use std::time::Duration;

use plumb_model::cache::PAGE;

const LIMITS: Limits = Limits {
    max_batch_tokens: 256,
    max_batch_sequences: 8,
    max_prefill_beside_decode: 64,
    decode_share: 0.0,
    prefix_cache: true,
};
/// Attention for nothing, so that a token costs one.
const COST: Cost = Cost { keys_per_unit: usize::MAX, window: Some(1) };

fn scheduler(pages: usize) -> Scheduler {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.add_model(1, pages, COST);
    scheduler
}

fn sequence(seed: u32, len: usize, want: Want) -> NewSequence {
    NewSequence {
        model: 1,
        tokens: (0..len as u32).map(|i| seed * 10_000 + i).collect(),
        want,
        priority: Priority::Normal,
        deadline: None,
        arrived: Instant::now(),
        pinned_prefix: 0,
        client: 0,
        work: len,
    }
}

fn slices(scheduler: &mut Scheduler) -> Vec<(SequenceId, Range<usize>)> {
    let plan = scheduler.plan(Instant::now());
    plan.map(|p| p.slices.into_iter().map(|s| (s.id, s.positions)).collect()).unwrap_or_default()
}

#[test]
fn a_sequence_that_does_not_fit_lets_smaller_ones_pass() {
    let mut s = scheduler(100);
    for len in [200, 100, 50] {
        s.add(sequence(len, len as usize, Want::Reward)).unwrap();
    }
    assert_eq!(slices(&mut s), [(0, 0..200), (2, 0..50)]);
    assert_eq!(slices(&mut s), [(1, 0..100)]);
    assert_eq!(slices(&mut s), []);
}

#[test]
fn a_sequence_is_not_passed_over_for_ever() {
    let mut s = scheduler(1000);
    s.add(sequence(0, 40, Want::Reward)).unwrap();
    s.add(sequence(1, 250, Want::Reward)).unwrap();
    let mut steps = 0;
    loop {
        // Always something small and urgent in front.
        s.add(NewSequence { priority: Priority::High, ..sequence(2 + steps, 40, Want::Reward) }).unwrap();
        let step = slices(&mut s);
        steps += 1;
        if step.iter().any(|(id, _)| *id == 1) {
            break;
        }
        assert!(steps < 40, "starved");
    }
}

#[test]
fn priority_goes_before_arrival() {
    let mut s = scheduler(100);
    for (seed, priority) in [(1, Priority::Low), (2, Priority::Normal), (3, Priority::High)] {
        s.add(NewSequence { priority, ..sequence(seed, 100, Want::Reward) }).unwrap();
    }
    assert_eq!(slices(&mut s), [(2, 0..100), (1, 0..100)]);
    assert_eq!(slices(&mut s), [(0, 0..100)]);
}

#[test]
fn a_sequence_longer_than_a_step_is_cut_and_ends() {
    let mut s = scheduler(100);
    s.add(sequence(1, 600, Want::LogProbs(300..600))).unwrap();
    let mut rows = Vec::new();
    for expected in [0..256, 256..512, 512..600] {
        let plan = s.plan(Instant::now()).unwrap();
        assert_eq!(plan.slices[0].positions, expected);
        let read = log_prob_rows(&(300..600), &expected);
        rows.extend(read.clone().map(|r| r + expected.start));
        let done = s.complete(&plan.slices[0], vec![0.0; read.len()]);
        assert_eq!(done, expected.end == 600);
    }
    assert_eq!(rows, (299..599).collect::<Vec<_>>());
}

#[test]
fn a_shared_beginning_runs_once_in_the_same_step() {
    let mut s = scheduler(100);
    for candidate in 0..3u32 {
        let mut new = sequence(1, 64, Want::Reward);
        new.tokens.extend([90_000 + candidate; 10]);
        s.add(new).unwrap();
    }
    assert_eq!(slices(&mut s), [(0, 0..74), (1, 64..74), (2, 64..74)]);
    assert_eq!(s.entry(2).unwrap().cached(), 64);
}

#[test]
fn streams_that_fill_every_step_leave_others_their_part() {
    let mut s = Scheduler::new(Limits { decode_share: 0.5, ..LIMITS });
    s.add_model(1, 1000, COST);
    // More than a step holds.
    let streams: Vec<_> =
        (0..12).map(|i| s.add(sequence(100 + i, 10, Want::Generate { max_new_tokens: 900 })).unwrap()).collect();
    let mut drawn = HashMap::<SequenceId, usize>::new();
    let mut scored = 0;
    for _ in 0..400 {
        // One always waits.
        if s.entries.len() == streams.len() {
            s.add(sequence(1, 100, Want::Reward)).unwrap();
        }
        let Some(plan) = s.plan(Instant::now()) else { break };
        for slice in &plan.slices {
            if streams.contains(&slice.id) {
                s.complete(slice, Vec::new());
                s.push_token(slice.id, 7);
                *drawn.entry(slice.id).or_default() += 1;
            } else if s.complete(slice, vec![0.0]) {
                s.remove(slice.id);
                scored += 1;
            }
        }
        s.ran(&plan, Duration::from_millis(50));
    }
    assert!(scored > 40, "{scored}");
    let (least, most) = (drawn.values().min().unwrap(), drawn.values().max().unwrap());
    assert_eq!(drawn.len(), streams.len());
    assert!(*most < 2 * least, "{drawn:?}");
}

#[test]
fn what_led_to_no_number_is_computed_again() {
    for pinned_prefix in [0, 64] {
        let mut s = scheduler(100);
        let add = |s: &mut Scheduler| s.add(NewSequence { pinned_prefix, ..sequence(1, 100, Want::Reward) }).unwrap();
        let ids = [add(&mut s), add(&mut s), add(&mut s)];
        assert_eq!(slices(&mut s), [(ids[0], 0..100), (ids[1], 96..100), (ids[2], 96..100)]);
        // What another has computed stays, and what the sequence itself has not.
        for (bad, start) in [(ids[1], 96), (ids[0], 0)] {
            s.distrust(bad);
            s.remove(bad);
            let again = add(&mut s);
            assert_eq!(slices(&mut s), [(again, start..100)]);
        }
    }
}

#[test]
fn values_that_need_a_token_make_it_run() {
    let mut s = scheduler(100);
    s.add(sequence(1, 96, Want::Reward)).unwrap();
    s.add(sequence(1, 96, Want::Reward)).unwrap();
    s.add(sequence(1, 96, Want::LogProbs(33..96))).unwrap();
    s.add(sequence(1, 96, Want::LogProbs(32..96))).unwrap();
    s.add(sequence(1, 96, Want::TokenRewards)).unwrap();
    let starts: Vec<_> = [slices(&mut s), slices(&mut s)].concat().into_iter().map(|(_, p)| p.start).collect();
    assert_eq!(starts, [0, 64, 32, 0, 0]);
}

#[test]
fn decoding_goes_on_beside_a_long_prompt() {
    let mut s = scheduler(100);
    let id = s.add(sequence(1, 10, Want::Generate { max_new_tokens: 50 })).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    assert!(!s.complete(&plan.slices[0], vec![]));
    s.push_token(id, 7);
    s.add(sequence(2, 300, Want::Reward)).unwrap();
    assert_eq!(slices(&mut s), [(id, 10..11), (1, 0..64)]);
    s.push_token(id, 8);
    assert_eq!(slices(&mut s), [(id, 11..12), (1, 64..128)]);
    // A drawn token that has not come yet leaves the step to the others.
    assert_eq!(slices(&mut s), [(1, 128..300)]);
}

#[test]
fn room_for_everything_that_may_be_drawn_is_taken_at_the_start() {
    let mut s = scheduler(4);
    assert!(s.add(sequence(1, 100, Want::Generate { max_new_tokens: 40 })).is_err(), "never fits");
    let first = s.add(sequence(1, 40, Want::Generate { max_new_tokens: 30 })).unwrap();
    let second = s.add(sequence(2, 40, Want::Generate { max_new_tokens: 30 })).unwrap();
    assert_eq!(slices(&mut s), [(first, 0..40)]);
    s.remove(first);
    assert_eq!(slices(&mut s), [(second, 0..40)]);
}

#[test]
fn a_pinned_prefix_stays_and_gives_way_only_to_a_standstill() {
    let mut s = scheduler(8);
    let mut pinned = sequence(1, 70, Want::Reward);
    pinned.pinned_prefix = 64;
    let id = s.add(pinned).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    assert!(s.complete(&plan.slices[0], vec![0.0]));
    s.remove(id);
    // Five other sequences would push it out if it were not kept.
    for seed in 2..7 {
        let id = s.add(sequence(seed, 6 * PAGE, Want::Reward)).unwrap();
        slices(&mut s);
        s.remove(id);
    }
    let again = s.add(sequence(1, 70, Want::Reward)).unwrap();
    assert_eq!(slices(&mut s), [(again, 64..70)]);
    s.remove(again);
    let whole = s.add(sequence(9, 8 * PAGE, Want::Reward)).unwrap();
    assert_eq!(slices(&mut s), [(whole, 0..8 * PAGE)]);
}

#[test]
fn models_take_turns() {
    let mut s = scheduler(100);
    s.add_model(2, 100, COST);
    for model in [1, 1, 2, 2] {
        s.add(NewSequence { model, ..sequence(model as u32, 200, Want::TokenRewards) }).unwrap();
    }
    let order: Vec<_> = (0..4).map(|_| s.plan(Instant::now()).unwrap().model).collect();
    assert_eq!(order, [1, 2, 1, 2]);
}

#[test]
fn a_passed_deadline_is_found() {
    let mut s = scheduler(10);
    let now = Instant::now();
    let soon = NewSequence { deadline: Some(now + Duration::from_secs(1)), ..sequence(1, 5, Want::Reward) };
    let id = s.add(soon).unwrap();
    s.add(sequence(2, 5, Want::Reward)).unwrap();
    assert!(s.expired(now).is_empty());
    assert_eq!(s.expired(now + Duration::from_secs(2)), [id]);
}

#[test]
fn the_sequences_of_a_failed_step_run_in_halves_and_others_begin_again_after_them() {
    let mut s = scheduler(100);
    s.add(sequence(1, 300, Want::TokenRewards)).unwrap();
    s.add(sequence(2, 200, Want::Reward)).unwrap();
    s.add(sequence(3, 250, Want::Reward)).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    s.complete(&plan.slices[0], vec![1.0; 256]);
    // The rest of the first, and the second.
    let failed = s.plan(Instant::now()).unwrap();
    assert_eq!(failed.tokens(), 244);
    let ahead = s.plan(Instant::now()).unwrap();
    assert_eq!(ahead.slices, [Slice { id: 2, positions: 0..250 }]);
    assert_eq!(s.failed(&failed), None);
    assert!(s.entry(0).unwrap().pages().is_empty() && s.entry(2).unwrap().pages().is_empty());
    let new = s.add(NewSequence { priority: Priority::High, ..sequence(4, 10, Want::Reward) }).unwrap();
    // The first half, to its end; then the other one.
    for expected in [(0, 0..256), (0, 256..300), (1, 0..200)] {
        let plan = s.plan(Instant::now()).unwrap();
        assert!(plan.rerun);
        assert_eq!(plan.slices, [Slice { id: expected.0, positions: expected.1 }]);
        if s.complete(&plan.slices[0], vec![]) {
            s.remove(expected.0);
        }
    }
    assert_eq!(slices(&mut s), [(new, 0..10)]);
    assert_eq!(slices(&mut s), [(2, 0..250)]);
}

#[test]
fn a_fault_that_does_not_come_back_harms_nobody() {
    let mut s = scheduler(100);
    let ids: Vec<_> = (0..5).map(|seed| s.add(sequence(seed, 10, Want::Reward)).unwrap()).collect();
    let failed = s.plan(Instant::now()).unwrap();
    assert_eq!(s.failed(&failed), None);
    let mut served = Vec::new();
    while let Some(plan) = s.plan(Instant::now()) {
        for slice in &plan.slices {
            assert!(s.complete(slice, vec![0.0]));
            s.remove(slice.id);
            served.push(slice.id);
        }
    }
    assert_eq!(served, ids);
}

#[test]
fn a_sequence_that_fails_alone_is_at_fault() {
    let mut s = scheduler(100);
    s.add(sequence(1, 10, Want::Reward)).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    assert_eq!(s.failed(&plan), Some(0));
    // Whoever has gone meanwhile may be at fault just as well.
    s.remove(0);
    s.add(sequence(2, 10, Want::Reward)).unwrap();
    s.add(sequence(3, 10, Want::Reward)).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    s.remove(1);
    assert_eq!(s.failed(&plan), None);
    assert_eq!(slices(&mut s), [(2, 0..10)]);
}

#[test]
fn a_sequence_that_was_generating_begins_again_with_what_was_drawn() {
    let mut s = scheduler(3);
    let id = s.add(sequence(1, 60, Want::Generate { max_new_tokens: 30 })).unwrap();
    let plan = s.plan(Instant::now()).unwrap();
    s.complete(&plan.slices[0], vec![]);
    (0..10).for_each(|token| s.push_token(id, token));
    s.failed(&Plan { slices: vec![], ..plan });
    assert_eq!(slices(&mut s), [(id, 0..70)]);
}

#[test]
fn tokens_far_into_a_text_count_for_more() {
    let mut s = Scheduler::new(LIMITS);
    s.add_model(1, 1000, Cost { keys_per_unit: 256, window: None });
    for seed in 1..4 {
        s.add(sequence(seed, 128, Want::Reward)).unwrap();
    }
    // 128 tokens and 128 * 129 / 2 keys: 160 units each.
    assert_eq!(slices(&mut s), [(0, 0..128)]);
    (1..3).for_each(|_| drop(slices(&mut s)));
    s.add(sequence(9, 2000, Want::Reward)).unwrap();
    let lens: Vec<_> = std::iter::from_fn(|| slices(&mut s).first().map(|(_, positions)| positions.len())).collect();
    assert!(lens.windows(2).all(|pair| pair[0] >= pair[1]) && lens.iter().sum::<usize>() == 2000, "{lens:?}");
    // n + n (n + 1) / 2 / 256 is 255 at 187.
    assert_eq!(lens[0], 187);
}

/// Steps until `seconds` have passed, of which a token takes a millisecond; the tokens of streams and of others.
fn run(s: &mut Scheduler, seconds: f64) -> (usize, usize) {
    let (mut time, mut streams, mut others) = (0.0, 0, 0);
    while time < seconds {
        let plan = s.plan(Instant::now()).unwrap();
        let duration = Duration::from_millis(plan.tokens() as u64);
        for slice in &plan.slices {
            match s.entry(slice.id).unwrap().want() {
                Want::Generate { .. } => {
                    streams += slice.positions.len();
                    s.complete(slice, vec![]);
                    s.push_token(slice.id, 5);
                }
                _ => {
                    others += slice.positions.len();
                    if s.complete(slice, vec![]) {
                        s.remove(slice.id);
                        s.add(sequence(slice.id as u32 + 1, 200, Want::Reward)).unwrap();
                    }
                }
            }
        }
        s.ran(&plan, duration);
        time += duration.as_secs_f64();
    }
    (streams, others)
}

#[test]
fn streams_and_scores_share_the_time_as_told() {
    for (decode_share, models) in [(0.0, 1), (0.25, 1), (0.5, 1), (0.8, 1), (0.5, 2)] {
        let mut s = Scheduler::new(Limits { decode_share, ..LIMITS });
        (1..=models).for_each(|model| s.add_model(model, 10_000, COST));
        for seed in 0..4 {
            s.add(sequence(seed, 8, Want::Generate { max_new_tokens: 60_000 })).unwrap();
        }
        s.plan(Instant::now()).unwrap().slices.iter().for_each(|slice| s.push_token(slice.id, 5));
        for seed in 10..14 {
            s.add(NewSequence { model: models, ..sequence(seed, 200, Want::Reward) }).unwrap();
        }
        let (streams, others) = run(&mut s, 60.0);
        let share = streams as f64 / (streams + others) as f64;
        // Whoever takes streams along cannot give them less than that.
        assert!((share - decode_share).abs() < 0.06, "{share} for {decode_share} of {models} models");
    }
}

#[test]
fn a_step_is_planned_ahead_only_if_nothing_is_generated_and_it_is_full() {
    let mut s = scheduler(100);
    let now = Instant::now();
    s.add(sequence(1, 200, Want::Reward)).unwrap();
    s.add(sequence(2, 200, Want::Reward)).unwrap();
    s.plan(now).unwrap();
    assert_eq!(s.plan_ahead(now), None, "what comes meanwhile would fit");
    s.add(sequence(3, 60, Want::Reward)).unwrap();
    assert_eq!(s.plan_ahead(now).unwrap().tokens(), 200);
    s.add(sequence(4, 20, Want::Generate { max_new_tokens: 3 })).unwrap();
    s.add(sequence(5, 200, Want::Reward)).unwrap();
    s.plan(now).unwrap();
    s.add(sequence(6, 200, Want::Reward)).unwrap();
    assert_eq!(s.plan_ahead(now), None, "a token is about to be drawn");
}

#[test]
fn without_a_prefix_cache_nothing_is_shared() {
    let mut s = Scheduler::new(Limits { prefix_cache: false, ..LIMITS });
    s.add_model(1, 100, COST);
    for _ in 0..2 {
        let id = s.add(NewSequence { pinned_prefix: 64, ..sequence(1, 100, Want::Reward) }).unwrap();
        let plan = s.plan(Instant::now()).unwrap();
        assert_eq!((plan.slices[0].positions.clone(), plan.prefixes.hits), (0..100, 0));
        s.complete(&plan.slices[0], vec![0.0]);
        s.remove(id);
    }
}

#[test]
fn lookups_hits_and_saved_tokens_are_counted() {
    let mut s = scheduler(100);
    for (seed, len) in [(1, 100), (1, 70), (2, 30)] {
        s.add(sequence(seed, len, Want::Reward)).unwrap();
    }
    assert_eq!(s.plan(Instant::now()).unwrap().prefixes, Prefixes { lookups: 3, hits: 1, tokens: 64 });
}

#[test]
fn a_client_with_one_sequence_waits_for_one_of_each_other() {
    let mut s = scheduler(100);
    for seed in 0..40 {
        s.add(NewSequence { client: 1, ..sequence(seed, 100, Want::Reward) }).unwrap();
    }
    assert_eq!(slices(&mut s), [(0, 0..100), (1, 0..100)]);
    let late = s.add(NewSequence { client: 2, ..sequence(50, 100, Want::Reward) }).unwrap();
    let small: Vec<_> =
        (60..64).map(|seed| s.add(NewSequence { client: 3, ..sequence(seed, 50, Want::Reward) }).unwrap()).collect();
    // What was there before at the same tag comes first; then everybody's tokens count alike.
    let mut order: Vec<_> = (0..4).flat_map(|_| slices(&mut s)).map(|(id, _)| id).collect();
    order.retain(|id| *id > 40 || *id == late || small.contains(id));
    assert_eq!(order[0], late, "{order:?}");
    assert!(small.iter().all(|id| order.contains(id)), "{order:?}");
}

#[test]
fn the_less_urgent_get_on_behind_any_number_of_more_urgent_ones() {
    let mut s = scheduler(1000);
    let low = s.add(NewSequence { priority: Priority::Low, ..sequence(9000, 200, Want::Reward) }).unwrap();
    let high = |s: &mut Scheduler, seed| {
        s.add(NewSequence { priority: Priority::High, ..sequence(seed, 100, Want::Reward) }).unwrap();
    };
    (0..4).for_each(|seed| high(&mut s, seed));
    for step in 0..4 {
        let ran = slices(&mut s);
        if ran.iter().any(|(id, _)| *id == low) {
            assert!(step > 0, "the urgent come first");
            return;
        }
        ran.iter().for_each(|(id, _)| drop(s.remove(*id)));
        (0..4).for_each(|seed| high(&mut s, 10 + 4 * step + seed));
    }
    panic!("starved");
}
