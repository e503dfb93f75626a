use plumb_proto::v1::model_spec::Choice;
use tonic::Code;

use super::*;

/// The handles are numbers, which the tests choose.
type Numbers = Catalog<u32>;

fn empty() -> Numbers {
    Numbers::new(Defaults::default(), Vec::new(), BTreeMap::new())
}

fn facts(kind: ModelKind) -> Facts {
    let details = v1::ModelDetails { kind: kind.into(), ..v1::ModelDetails::default() };
    Facts { weights_digest: "d1".to_owned(), details }
}

fn load(catalog: &mut Numbers, name: &str, kind: ModelKind, handle: u32) -> u64 {
    let version = catalog.add(name, None).unwrap();
    catalog.loading(name, version);
    catalog.warming(name, version, facts(kind));
    catalog.available(name, version, handle);
    version
}

fn served() -> Numbers {
    let mut catalog = empty();
    load(&mut catalog, "lm", ModelKind::Language, 10);
    load(&mut catalog, "pm", ModelKind::Preference, 20);
    catalog.finish_start();
    catalog
}

fn spec(name: &str, choice: Option<Choice>) -> v1::ModelSpec {
    v1::ModelSpec { name: name.to_owned(), choice }
}

fn check(catalog: &Numbers, name: &str, choice: Option<Choice>, need: Need, expect: Result<u32, Code>) {
    let found = catalog.resolve(&spec(name, choice.clone()), need, || 0);
    assert_eq!(found.map_err(|error| error.code()), expect, "{name} {choice:?} {need:?}");
}

fn state(catalog: &Numbers, name: &str, version: u64) -> v1::ModelState {
    catalog.status(&spec(name, Some(Choice::Version(version)))).unwrap().state()
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code()
}

#[test]
fn a_version_is_given_out_only_while_it_is_available() {
    let mut catalog = empty();
    let one = |catalog: &Numbers, expect| {
        check(catalog, "pm", None, Need::Any, expect);
        check(catalog, "pm", Some(Choice::Version(1)), Need::Any, expect);
    };
    one(&catalog, Err(Code::Unavailable));
    catalog.finish_start();
    one(&catalog, Err(Code::NotFound));
    assert_eq!(catalog.add("pm", None).unwrap(), 1);
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Start);
    one(&catalog, Err(Code::Unavailable));
    catalog.loading("pm", 1);
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Loading);
    one(&catalog, Err(Code::Unavailable));
    assert_eq!(code(catalog.drain("pm", 1)), Code::FailedPrecondition);
    catalog.warming("pm", 1, facts(ModelKind::Preference));
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Warming);
    one(&catalog, Err(Code::Unavailable));
    catalog.available("pm", 1, 7);
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Available);
    one(&catalog, Ok(7));
    assert_eq!(catalog.drain("pm", 1).unwrap(), Some(7));
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Draining);
    one(&catalog, Err(Code::NotFound));
    assert_eq!(catalog.drain("pm", 1).unwrap(), None, "draining twice is draining once");
    catalog.ended("pm", 1);
    assert_eq!(state(&catalog, "pm", 1), v1::ModelState::Ended);
    one(&catalog, Err(Code::NotFound));
}

#[test]
fn a_failed_version_says_why_and_may_be_tried_again() {
    let mut catalog = empty();
    catalog.finish_start();
    catalog.add("pm", Some(4)).unwrap();
    catalog.failed("pm", 4, "tensor `score.weight` is missing".to_owned());
    let status = catalog.status(&spec("pm", None)).unwrap();
    assert_eq!((status.state(), status.error.as_str()), (v1::ModelState::Failed, "tensor `score.weight` is missing"));
    check(&catalog, "pm", None, Need::Any, Err(Code::NotFound));
    assert_eq!(catalog.add("pm", None).unwrap(), 5);
    assert_eq!(catalog.add("pm", Some(4)).unwrap(), 4);
    assert_eq!(code(catalog.add("pm", Some(4))), Code::AlreadyExists);
}

#[test]
fn names_choices_and_kinds_are_resolved() {
    let catalog = served();
    let version = |number| Some(Choice::Version(number));
    let label = |label: &str| Some(Choice::Label(label.to_owned()));
    check(&catalog, "", None, Need::Any, Ok(20));
    check(&catalog, "", None, Need::Language, Ok(10));
    check(&catalog, "", None, Need::Preference, Ok(20));
    check(&catalog, "lm", None, Need::Any, Ok(10));
    check(&catalog, "lm", version(1), Need::Language, Ok(10));
    check(&catalog, "xx", None, Need::Any, Err(Code::NotFound));
    check(&catalog, "pm", version(9), Need::Any, Err(Code::NotFound));
    check(&catalog, "pm", label("canary"), Need::Any, Err(Code::NotFound));
    check(&catalog, "pm", None, Need::Language, Err(Code::FailedPrecondition));
    check(&catalog, "lm", None, Need::Preference, Err(Code::FailedPrecondition));
}

#[test]
fn an_empty_name_without_a_model_of_the_kind() {
    let mut catalog = empty();
    check(&catalog, "", None, Need::Any, Err(Code::Unavailable));
    load(&mut catalog, "lm", ModelKind::Language, 10);
    // The preference model may be next on the command line.
    check(&catalog, "", None, Need::Any, Err(Code::Unavailable));
    check(&catalog, "", None, Need::Language, Ok(10));
    catalog.finish_start();
    check(&catalog, "", None, Need::Any, Ok(10));
    check(&catalog, "", None, Need::Preference, Err(Code::FailedPrecondition));
    catalog.drain("lm", 1).unwrap();
    check(&catalog, "", None, Need::Any, Err(Code::NotFound));
}

#[test]
fn a_chosen_default_comes_before_the_first_of_its_kind() {
    let defaults = Defaults { preference: Some("second".to_owned()), language: None };
    let mut catalog = Numbers::new(defaults, Vec::new(), BTreeMap::new());
    load(&mut catalog, "first", ModelKind::Preference, 1);
    check(&catalog, "", None, Need::Any, Err(Code::Unavailable));
    load(&mut catalog, "second", ModelKind::Preference, 2);
    check(&catalog, "", None, Need::Any, Ok(2));
    let defaults = catalog.statuses().iter().map(|status| status.is_default).collect::<Vec<_>>();
    assert_eq!(defaults, [false, true]);
}

#[test]
fn the_newest_version_takes_over_unless_a_label_holds_the_place() {
    let mut catalog = served();
    load(&mut catalog, "pm", ModelKind::Preference, 21);
    check(&catalog, "pm", None, Need::Any, Ok(21));
    check(&catalog, "pm", Some(Choice::Version(1)), Need::Any, Ok(20));
    catalog.set_label("pm", "stable", Some(1)).unwrap();
    check(&catalog, "pm", None, Need::Any, Ok(20));
    check(&catalog, "", None, Need::Any, Ok(20));
    check(&catalog, "pm", Some(Choice::Label("stable".to_owned())), Need::Any, Ok(20));
    assert_eq!(code(catalog.drain("pm", 1)), Code::FailedPrecondition);
    catalog.set_label("pm", "stable", None).unwrap();
    assert_eq!(catalog.drain("pm", 1).unwrap(), Some(20));
    assert_eq!(catalog.active_versions()["pm"], 2);
}

#[test]
fn labels_point_only_at_available_versions() {
    let mut catalog = served();
    catalog.add("pm", None).unwrap();
    assert_eq!(code(catalog.set_label("pm", "canary", Some(2))), Code::FailedPrecondition);
    assert_eq!(code(catalog.set_label("pm", "canary", Some(9))), Code::NotFound);
    assert_eq!(code(catalog.set_label("xx", "canary", Some(1))), Code::NotFound);
    assert_eq!(code(catalog.set_label("pm", "canary", None)), Code::NotFound);
    for i in 0..MAX_LABELS {
        catalog.set_label("pm", &format!("l{i}"), Some(1)).unwrap();
    }
    assert_eq!(code(catalog.set_label("pm", "one-more", Some(1))), Code::FailedPrecondition);
    catalog.set_label("pm", "l0", Some(1)).unwrap();
}

#[test]
fn neither_memory_nor_the_list_grows_for_ever() {
    let mut catalog = empty();
    for i in 0..MAX_LIVE_VERSIONS {
        catalog.add(&format!("m{i}"), None).unwrap();
    }
    assert_eq!(code(catalog.add("more", None)), Code::FailedPrecondition);
    catalog.failed("m0", 1, String::new());
    for _ in 0..MAX_PAST_VERSIONS {
        let version = catalog.add("m0", None).unwrap();
        catalog.failed("m0", version, String::new());
    }
    assert_eq!(catalog.statuses().len(), MAX_LIVE_VERSIONS - 1 + MAX_PAST_VERSIONS);
    let oldest = catalog.statuses()[0].model.clone().unwrap();
    assert_eq!((oldest.name.as_str(), oldest.version), ("m0", 2), "the one that failed first is forgotten");
}

#[test]
fn what_drains_leaves_its_place_to_another_within_bounds() {
    let mut catalog = empty();
    for number in 1..=2 * MAX_LIVE_VERSIONS as u64 {
        if number > MAX_LIVE_VERSIONS as u64 {
            assert!(matches!(catalog.add("pm", None), Err(Error::NoRoom { .. })), "{number}");
            catalog.drain("pm", number - MAX_LIVE_VERSIONS as u64).unwrap();
        }
        load(&mut catalog, "pm", ModelKind::Preference, 0);
    }
    catalog.drain("pm", 2 * MAX_LIVE_VERSIONS as u64).unwrap();
    assert!(matches!(catalog.add("pm", None), Err(Error::NoRoom { .. })));
    catalog.ended("pm", 1);
    catalog.add("pm", None).unwrap();
}

fn share(label: &str, weight: u32) -> Share {
    Share { label: label.to_owned(), weight }
}

/// Which versions calls of these hashes get.
fn versions(catalog: &Numbers, hashes: std::ops::Range<u64>) -> Vec<u32> {
    hashes.map(|hash| catalog.resolve(&spec("pm", None), Need::Any, || hash).unwrap()).collect()
}

#[test]
fn calls_that_name_nothing_are_split_by_their_hash() {
    let mut catalog = served();
    load(&mut catalog, "pm", ModelKind::Preference, 21);
    catalog.set_label("pm", "stable", Some(1)).unwrap();
    assert_eq!(code(catalog.set_traffic("pm", vec![share("canary", 1)])), Code::NotFound);
    catalog.set_label("pm", "canary", Some(2)).unwrap();
    for wrong in [vec![share("stable", 0)], vec![share("stable", 1); 2], vec![share("stable", 10_001)]] {
        assert_eq!(code(catalog.set_traffic("pm", wrong)), Code::InvalidArgument);
    }
    catalog.set_traffic("pm", vec![share("stable", 3), share("canary", 1)]).unwrap();
    assert_eq!(versions(&catalog, 0..8), [20, 20, 20, 21, 20, 20, 20, 21]);
    let weights = |catalog: &Numbers| catalog.statuses().iter().map(|s| s.traffic_weight).collect::<Vec<_>>();
    assert_eq!(weights(&catalog), [0, 3, 1]);
    check(&catalog, "pm", Some(Choice::Version(1)), Need::Any, Ok(20));
    check(&catalog, "pm", Some(Choice::Label("canary".to_owned())), Need::Any, Ok(21));
    assert_eq!(code(catalog.set_label("pm", "canary", None)), Code::FailedPrecondition);
    catalog.set_traffic("pm", Vec::new()).unwrap();
    assert_eq!(versions(&catalog, 0..4), [20; 4]);
    assert_eq!(weights(&catalog), [0, 0, 0]);
}

#[test]
fn labels_and_splits_of_the_configuration_wait_for_their_versions() {
    let wanted = |label: &str, version| WantedLabel { model: "pm".to_owned(), label: label.to_owned(), version };
    let traffic = [("pm".to_owned(), vec![share("stable", 1), share("canary", 1)])].into();
    let labels = vec![wanted("stable", 1), wanted("canary", 2)];
    let mut catalog = Numbers::new(Defaults::default(), labels, traffic);
    load(&mut catalog, "pm", ModelKind::Preference, 20);
    assert_eq!(versions(&catalog, 0..4), [20; 4], "a label without a version has no share");
    load(&mut catalog, "pm", ModelKind::Preference, 21);
    assert_eq!(versions(&catalog, 0..4), [20, 21, 20, 21]);
    // What somebody has changed since is not set again.
    catalog.set_label("pm", "canary", Some(1)).unwrap();
    catalog.drain("pm", 2).unwrap();
    catalog.ended("pm", 2);
    catalog.add("pm", Some(2)).unwrap();
    catalog.warming("pm", 2, facts(ModelKind::Preference));
    catalog.available("pm", 2, 22);
    assert_eq!(versions(&catalog, 0..4), [20; 4]);
}

#[test]
fn a_bad_version_gives_way_to_the_one_before() {
    let bad = || "NaN".to_owned();
    let mut catalog = served();
    assert_eq!(catalog.roll_back("pm", 1, bad()), None, "there is no other");
    let only = catalog.status(&spec("pm", Some(Choice::Version(1)))).unwrap();
    assert_eq!((only.state(), only.error), (v1::ModelState::Available, bad()), "it says what is wrong");
    assert_eq!(catalog.bad("pm"), [(1, bad())]);
    let mut catalog = served();
    load(&mut catalog, "pm", ModelKind::Preference, 21);
    load(&mut catalog, "pm", ModelKind::Preference, 22);
    assert_eq!(catalog.roll_back("pm", 3, bad()), Some((22, 2)));
    assert_eq!(catalog.roll_back("pm", 3, bad()), None, "once");
    check(&catalog, "pm", None, Need::Any, Ok(21));
    check(&catalog, "pm", Some(Choice::Version(3)), Need::Any, Err(Code::NotFound));
    let status = |catalog: &Numbers| catalog.status(&spec("pm", Some(Choice::Version(3)))).unwrap();
    assert_eq!((status(&catalog).state(), status(&catalog).error), (v1::ModelState::Draining, bad()));
    catalog.ended("pm", 3);
    assert_eq!((status(&catalog).state(), status(&catalog).error), (v1::ModelState::Failed, bad()));
    // `stable` goes back to where it was, not to the newest one.
    catalog.set_label("pm", "stable", Some(1)).unwrap();
    load(&mut catalog, "pm", ModelKind::Preference, 24);
    catalog.set_label("pm", "stable", Some(4)).unwrap();
    catalog.set_label("pm", "canary", Some(4)).unwrap();
    assert_eq!(catalog.roll_back("pm", 4, bad()), Some((24, 1)));
    check(&catalog, "pm", Some(Choice::Label("stable".to_owned())), Need::Any, Ok(20));
    check(&catalog, "pm", Some(Choice::Label("canary".to_owned())), Need::Any, Ok(20));
}
