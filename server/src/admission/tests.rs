use super::*;

const BATCH: usize = 100;

fn gate(max_queue_tokens: Option<usize>) -> Arc<Admission> {
    Admission::new(AdmissionLimits { max_queue_tokens, max_batch_tokens: BATCH })
}

fn ask(client: &str, tokens: usize) -> Ask {
    let work = Work::prompt(tokens);
    Ask { client: client.into(), priority: Priority::Normal, work, certain: tokens, deadline: None }
}

fn held(gate: &Admission) -> Work {
    gate.lock().work()
}

fn admit(gate: &Arc<Admission>, ask: Ask) -> Result<Permit> {
    gate.admit(ask).map_err(Refused::give_up)
}

#[track_caller]
fn refused(result: Result<Permit>, words: &str) {
    match result {
        Err(Error::ResourceExhausted { what, retry_after }) => {
            assert!(what.contains(words), "{what}");
            assert!((RETRY_AFTER.0..=RETRY_AFTER.1.mul_f64(1.0 + SPREAD)).contains(&retry_after), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_call_is_let_in_whole_or_not_at_all() {
    let gate = gate(Some(100));
    let permit = gate.admit(ask("a", 80)).unwrap();
    let mut permits = permit.split(&[Work::prompt(30), Work::prompt(50)]).unwrap();
    refused(admit(&gate, ask("a", 30)), "80 of 100 tokens are queued, the call needs 30");
    drop(gate.admit(ask("a", 20)).unwrap());
    // A sequence that is done makes room although its call goes on.
    permits.remove(0).finish();
    let _rest = gate.admit(ask("a", 50)).unwrap();
    assert_eq!(held(&gate), Work::prompt(100));
    drop(permits);
    assert_eq!(held(&gate), Work::prompt(50));
}

#[test]
fn what_is_never_let_in_is_not_worth_a_retry() {
    let gate = gate(Some(100));
    assert!(matches!(admit(&gate, ask("a", 101)), Err(Error::InvalidArgument { .. })));
    // A guess is no reason, but what has come of it is.
    let permit = gate.admit(Ask { certain: 10, ..ask("a", 1000) }).unwrap();
    assert_eq!(held(&gate), Work::prompt(100));
    assert!(matches!(permit.split(&[Work::prompt(60); 2]), Err(Error::InvalidArgument { .. })));
    assert_eq!(held(&gate), Work::default());
    assert!(gate.admit(ask("a", 0)).unwrap().split(&[]).unwrap().is_empty());
}

#[test]
fn who_asks_again_was_not_turned_away() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let gate = gate(Some(100));
    metrics::with_local_recorder(&recorder, || {
        let _permit = gate.admit(ask("a", 80)).unwrap();
        let refused = gate.admit(ask("a", 30)).unwrap_err();
        assert!(refused.retry_after().is_some());
        assert!(!recorder.handle().render().contains("plumb_admission_refusals_total"));
        assert!(matches!(refused.give_up(), Error::ResourceExhausted { .. }));
        drop(admit(&gate, ask("a", 101)));
    });
    let exposition = recorder.handle().render();
    for reason in ["queue", "too_large"] {
        let counted = format!("plumb_admission_refusals_total{{reason=\"{reason}\"}} 1\n");
        assert!(exposition.contains(&counted), "{exposition}");
    }
}

#[test]
fn a_stream_holds_what_it_has_still_to_do() {
    let gate = gate(Some(1000));
    let work = Work { prompt: 100, new: 50 };
    let mut permit = gate.admit(Ask { work, ..ask("a", 100) }).unwrap();
    permit.prompt_is_done();
    permit.token_is_drawn();
    permit.prompt_is_done();
    assert_eq!(held(&gate), Work { prompt: 0, new: 49 });
    let ranking = permit.take(Work { prompt: 0, new: 9 });
    drop(permit);
    assert_eq!(held(&gate), Work { prompt: 0, new: 9 });
    drop(ranking);
    assert_eq!(held(&gate), Work::default());
}

#[test]
fn what_is_to_be_generated_is_no_queue() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let (gate, work) = (gate(Some(1000)), Work { prompt: 100, new: 50 });
    let check = |expected: &[&str]| {
        let exposition = recorder.handle().render();
        assert!(expected.iter().all(|line| exposition.contains(&format!("{line}\n"))), "{expected:?}: {exposition}");
    };
    metrics::with_local_recorder(&recorder, || {
        let mut permit = gate.admit(Ask { work, ..ask("a", 100) }).unwrap();
        check(&["plumb_admitted_tokens 150", "plumb_admitted_prompt_tokens 100", "plumb_admission_limit_tokens 1000"]);
        permit.prompt_is_done();
        check(&["plumb_admitted_tokens 50", "plumb_admitted_prompt_tokens 0"]);
    });
}

#[test]
fn higher_priorities_find_room_where_lower_ones_do_not() {
    let gate = gate(Some(1000));
    let fill = |priority| {
        let mut permits = Vec::new();
        while let Ok(permit) = gate.admit(Ask { priority, ..ask("a", 10) }) {
            permits.push(permit);
        }
        permits
    };
    let low = fill(Priority::Low);
    assert_eq!(low.len(), 50);
    let normal = fill(Priority::Normal);
    // A sixteenth is for the urgent.
    assert_eq!(normal.len(), 44);
    let high = fill(Priority::High);
    assert_eq!(low.len() + normal.len() + high.len(), 100);
    // And the other way round.
    drop((low, normal, high));
    let high = fill(Priority::High);
    let normal = fill(Priority::Normal);
    let low = fill(Priority::Low);
    assert!(!normal.is_empty() && !low.is_empty(), "{} {} {}", high.len(), normal.len(), low.len());
}

#[test]
fn without_a_limit_there_is_room_for_two_batches_at_first_and_for_a_larger_call() {
    let gate = gate(None);
    let _large = gate.admit(ask("a", 5000)).unwrap();
    refused(admit(&gate, ask("a", 10)), "5000 of 200 tokens are queued");
    assert!(matches!(admit(&gate, ask("a", CEILING + 1)), Err(Error::InvalidArgument { .. })));
}

#[test]
fn streams_do_not_count_as_a_queue_once_their_prompt_is_computed() {
    let gate = gate(None);
    let mut stream = gate.admit(Ask { work: Work { prompt: 100, new: 100_000 }, ..ask("a", 0) }).unwrap();
    stream.prompt_is_done();
    let _score = gate.admit(ask("a", 100)).unwrap();
    let _other = gate.admit(ask("b", 100)).unwrap();
}

/// A gate that has been doing 1000 tokens a second for a while, and has `waiting` tokens of a client `a` in it.
fn at_work(waiting: usize) -> (Policy, Instant) {
    let mut policy = Policy::new(AdmissionLimits { max_queue_tokens: None, max_batch_tokens: BATCH });
    let mut now = Instant::now();
    let (key, _) = policy.admit(&ask("a", 3000 + waiting), now).unwrap();
    for _ in 0..30 {
        now += Duration::from_millis(100);
        policy.leave(&key, Priority::Normal, Work::prompt(100), true, now);
    }
    (policy, now)
}

#[test]
fn what_cannot_be_done_in_time_is_refused_at_once() {
    let check = |waiting: usize, tokens: usize, millis: u64, priority: Priority, expected: Option<&str>| {
        let (mut policy, now) = at_work(waiting);
        let deadline = Some(now + Duration::from_millis(millis));
        let refusal = policy.admit(&Ask { deadline, priority, ..ask("b", tokens) }, now).err();
        assert_eq!(refusal.map(Refusal::reason), expected, "{tokens} behind {waiting} in {millis} ms: {refusal:?}");
    };
    let normal = Priority::Normal;
    check(600, 300, 10_000, normal, None);
    check(600, 300, 1200, normal, None);
    // Twice 300: fair queueing serves as much of the other client before it.
    check(600, 300, 600, normal, Some("late"));
    check(600, 300, 400, Priority::High, None);
    check(600, 300, 200, Priority::High, Some("hopeless"));
    check(600, 100, 400, normal, None);
    check(600, 100, 210, normal, Some("late"));
}

#[test]
fn nothing_is_refused_for_being_late_before_the_pace_is_known() {
    let gate = gate(None);
    let deadline = Some(Instant::now() + Duration::from_millis(1));
    let _permit = gate.admit(Ask { deadline, ..ask("a", 100) }).unwrap();
    let _other = gate.admit(Ask { deadline, ..ask("b", 50) }).unwrap();
}

#[test]
fn the_number_of_clients_is_bounded_and_those_that_have_gone_are_forgotten() {
    let mut policy = Policy::new(AdmissionLimits { max_queue_tokens: Some(1 << 20), max_batch_tokens: BATCH });
    let now = Instant::now();
    let permits: Vec<_> =
        (0..2 * lane::MAX_CLIENTS).map(|client| policy.admit(&ask(&client.to_string(), 1), now).unwrap()).collect();
    assert_eq!(policy.clients(), lane::MAX_CLIENTS + 1);
    for (key, work) in permits {
        policy.leave(&key, Priority::Normal, work, true, now + Duration::from_secs(1));
    }
    assert_eq!(policy.work(), Work::default());
    policy.leave(&"x".into(), Priority::Normal, Work::default(), true, now + Duration::from_secs(60));
    assert!(policy.clients() <= 1, "{}", policy.clients());
}

#[test]
fn a_client_with_many_calls_is_told_one_time_after_the_other() {
    let (mut policy, now) = at_work(900);
    policy.admit(&ask("b", 100), now).unwrap();
    let waits: Vec<_> = (0..4).map(|_| policy.admit(&ask("a", 300), now).unwrap_err().retry_after().unwrap()).collect();
    assert!(waits.is_sorted() && waits[3] > 2 * waits[0], "{waits:?}");
    assert!(
        (0..1000).all(|_| policy
            .admit(&ask("a", 300), now)
            .is_err_and(|refusal| refusal.retry_after() <= Some(RETRY_AFTER.1)))
    );
}
