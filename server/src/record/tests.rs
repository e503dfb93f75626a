use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use tempfile::TempDir;

use super::*;

fn recording(folder: PathBuf) -> Recording {
    Recording {
        folder,
        sample: 1.0,
        max_bytes: 1 << 20,
        max_age: Duration::from_secs(3600),
        keep: 100,
        compress: false,
    }
}

fn origin(caller: Option<&str>) -> Origin {
    Origin { rpc: "Score", caller: caller.map(Arc::from) }
}

fn request(text: &str) -> v1::ScoreRequest {
    let items = vec![v1::Input { input: Some(v1::input::Input::Text(text.to_owned())) }];
    v1::ScoreRequest { items, ..Default::default() }
}

fn answer(reward: f32) -> Result<v1::ScoreResponse> {
    let score = v1::score_result::Outcome::Score(v1::Score { reward, ..Default::default() });
    let results = vec![v1::ScoreResult { outcome: Some(score) }];
    Ok(v1::ScoreResponse { results, timings: Some(v1::Timings::default()), ..Default::default() })
}

/// Files with the beginning of their names, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths.filter(|path| !path.ends_with("lock")).collect();
    files.sort();
    files
}

fn records(folder: &Path) -> Vec<Record> {
    let texts = files(folder).into_iter().map(|path| match path.extension().unwrap() == "zst" {
        true => String::from_utf8(zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap()).unwrap(),
        false => std::fs::read_to_string(path).unwrap(),
    });
    texts.flat_map(|text| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>()).collect()
}

async fn close(recorder: &Recorder) {
    recorder.close(Instant::now() + Duration::from_secs(60)).await;
}

/// A queue whose other end a test holds.
fn queue(length: usize) -> (Recorder, Receiver<Message>) {
    let (sender, receiver) = sync_channel(length);
    (Recorder(Some(Queue { sender, bytes: Arc::default(), closed: Mutex::default() })), receiver)
}

fn waiting_bytes(recorder: &Recorder) -> usize {
    recorder.0.as_ref().unwrap().bytes.load(Ordering::Relaxed)
}

#[tokio::test]
async fn calls_are_in_the_file_with_their_scores_callers_and_errors() {
    let folder = TempDir::new().unwrap();
    let recorder = Recorder::start(Some(&recording(folder.path().join("a/b")))).unwrap();
    recorder.score(origin(Some("trainer")), request("t"), &answer(0.1));
    recorder.score(origin(None), request("u"), &Err(Error::not_found("no model")));
    for told_to_come_again in
        [Error::Draining, Error::ResourceExhausted { what: "full".into(), retry_after: CLOSE_INTERVAL }]
    {
        recorder.score(origin(None), request("again"), &Err(told_to_come_again));
    }
    let ranked = |index, reward: Option<f32>| v1::Ranked {
        index,
        score: reward.map(|reward| v1::Score { reward, ..Default::default() }),
        error: reward.is_none().then(|| v1::ItemError { code: 3, message: "why".into() }),
        ..Default::default()
    };
    let ranking = v1::RankResponse {
        ranked: vec![ranked(2, Some(5.0)), ranked(0, Some(4.0)), ranked(1, None)],
        ..Default::default()
    };
    let candidates = vec![v1::Candidate::default(); 3];
    recorder.rank(
        Origin { rpc: "Rank", caller: None },
        v1::RankRequest { candidates, ..Default::default() },
        &Ok(ranking),
    );
    close(&recorder).await;

    let folder = folder.path().join("a/b");
    let records = records(&folder);
    assert_eq!(records.len(), 3);
    let [scored, failed, ranked] = &records[..] else { unreachable!() };
    assert_eq!((scored.plumb_record, scored.rpc.as_ref(), scored.caller.as_deref()), (1, "Score", Some("trainer")));
    assert_eq!(scored.score, Some(request("t")));
    assert_eq!((scored.results[0].reward.unwrap() as f32).to_bits(), 0.1f32.to_bits());
    assert!(scored.time.ends_with('Z') && scored.time.len() == "2026-01-02T03:04:05.000006Z".len(), "{}", scored.time);
    assert_eq!((failed.error.as_ref().unwrap().code.as_str(), failed.results.len()), ("NOT_FOUND", 0));
    let rewards: Vec<_> = ranked.results.iter().map(|result| result.reward).collect();
    assert_eq!(rewards, [Some(4.0), None, Some(5.0)], "in the order of the request");
    assert_eq!(ranked.results[1].error.as_ref().unwrap().code, "INVALID_ARGUMENT");

    let mode = |path: &Path| Permissions::mode(&path.metadata().unwrap().permissions()) & 0o777;
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(files(&folder).iter().map(|path| mode(path)).collect::<Vec<_>>(), [0o600]);
}

#[tokio::test]
async fn files_are_rotated_packed_and_thinned_out() {
    let folder = TempDir::new().unwrap();
    let options = Recording { max_bytes: 1, keep: 3, compress: true, ..recording(folder.path().to_owned()) };
    let recorder = Recorder::start(Some(&options)).unwrap();
    for reward in 0..10_u8 {
        recorder.score(origin(None), request("t"), &answer(f32::from(reward)));
    }
    close(&recorder).await;
    drop(recorder);
    // The folder is free when all is packed.
    while let Err(error) = Recorder::start(Some(&options)) {
        assert!(error.to_string().contains("another server"), "{error}");
        tokio::time::sleep(CLOSE_INTERVAL).await;
    }
    assert!(files(folder.path()).iter().all(|path| path.extension().unwrap() == "zst"));
    let rewards: Vec<_> = records(folder.path()).iter().map(|record| record.results[0].reward.unwrap()).collect();
    assert_eq!(rewards, [7.0, 8.0, 9.0]);
}

#[test]
fn two_servers_do_not_share_a_folder() {
    let folder = TempDir::new().unwrap();
    let options = recording(folder.path().to_owned());
    let first = Recorder::start(Some(&options)).unwrap();
    let error = Recorder::start(Some(&options)).err().unwrap().to_string();
    assert!(error.contains("--record-dir") && error.contains("another server"), "{error}");
    drop(first);
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(Recorder::start(Some(&recording(file))).is_err());
}

#[test]
fn a_full_queue_takes_nothing_and_waits_for_nobody() {
    let (recorder, receiver) = queue(2);
    for i in 0..5 {
        recorder.score(origin(None), request(&i.to_string()), &answer(0.0));
    }
    let taken = |receiver: &Receiver<Message>| -> (Vec<usize>, Vec<v1::Input>) {
        let call = |message| match message {
            Message::Call(entry) => (entry.bytes, entry.record.score.unwrap().items.remove(0)),
            Message::Close => unreachable!(),
        };
        receiver.try_iter().map(call).unzip()
    };
    let (bytes, items) = taken(&receiver);
    assert_eq!(items, [request("0").items[0].clone(), request("1").items[0].clone()]);
    // The memory of what was not taken is not counted.
    assert_eq!(waiting_bytes(&recorder), bytes.iter().sum::<usize>());

    let (recorder, receiver) = queue(10);
    let large = "x".repeat(MAX_WAITING_BYTES / 2 + 1);
    recorder.score(origin(None), request(&large), &answer(0.0));
    recorder.score(origin(None), request(&large), &answer(0.0));
    recorder.score(origin(None), request("small"), &answer(0.0));
    assert_eq!(taken(&receiver).1.len(), 2, "bounded by memory too");
    drop(receiver);
    recorder.score(origin(None), request("late"), &answer(0.0));
}

#[test]
fn a_call_that_waits_counts_by_all_that_it_holds() {
    #[track_caller]
    fn check(expected: usize, take: impl FnOnce(&Recorder)) {
        let (recorder, _receiver) = queue(1);
        take(&recorder);
        let bytes = waiting_bytes(&recorder);
        // Beside it there are the record itself and a single score.
        assert!((expected..expected + 4096).contains(&bytes), "{bytes}, not {expected}");
    }
    const N: usize = 10_000;
    let long = || "x".repeat(N);
    let ids = || v1::TokenIds { ids: vec![7; N], response_start: None };
    let input = |input| v1::Input { input: Some(input) };
    let turns = |messages| input(v1::input::Input::Conversation(v1::Conversation { messages }));
    let turn = |role, content| v1::Message { role, content };
    let items = |items| v1::ScoreRequest { items, ..Default::default() };
    let named = |name, choice| Some(v1::ModelSpec { name, choice });
    let label = || Some(v1::model_spec::Choice::Label(long()));
    for (expected, request) in [
        (N, v1::ScoreRequest { request_id: long(), ..Default::default() }),
        (2 * N, v1::ScoreRequest { model: named(long(), label()), ..Default::default() }),
        (N * size_of::<v1::Input>(), items(vec![v1::Input::default(); N])),
        (N * size_of::<v1::Message>(), items(vec![turns(vec![v1::Message::default(); N])])),
        (2 * N, items(vec![turns(vec![turn(long(), long())])])),
        (N, items(vec![input(v1::input::Input::Text(long()))])),
        (N * size_of::<u32>(), items(vec![input(v1::input::Input::TokenIds(ids()))])),
    ] {
        check(expected, |recorder| recorder.score(origin(None), request, &answer(0.0)));
    }
    let candidate = |candidate| v1::Candidate { candidate: Some(candidate) };
    let candidates = |candidates| v1::RankRequest { candidates, ..Default::default() };
    let failed = || Err(Error::not_found("no model"));
    for (expected, request) in [
        (N, v1::RankRequest { request_id: long(), ..Default::default() }),
        (N, v1::RankRequest { prompt: Some(input(v1::input::Input::Text(long()))), ..Default::default() }),
        (N * size_of::<v1::Candidate>(), candidates(vec![v1::Candidate::default(); N])),
        (N, candidates(vec![candidate(v1::candidate::Candidate::Text(long()))])),
        (N * size_of::<u32>(), candidates(vec![candidate(v1::candidate::Candidate::TokenIds(ids()))])),
    ] {
        check(expected, |recorder| recorder.rank(origin(None), request, &failed()));
    }
    let request = v1::RankRequest { candidates: vec![v1::Candidate::default(); N], ..Default::default() };
    let all = N * (size_of::<v1::Candidate>() + size_of::<Outcome>());
    check(all, |recorder| recorder.rank(origin(None), request, &Ok(v1::RankResponse::default())));
}

#[tokio::test]
async fn without_a_folder_nothing_is_taken_down() {
    let recorder = Recorder::start(None).unwrap();
    assert!(!recorder.is_on());
    recorder.score(origin(None), request("t"), &answer(0.0));
    close(&recorder).await;
}

#[tokio::test]
async fn what_a_killed_server_left_is_tidied_up_and_nothing_else_is_touched() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("plumb-1.jsonl.zst.tmp", b"half");
    write("plumb-1.jsonl", b"a\n");
    write("plumb-2.jsonl", b"b\n");
    write("plumb-2.jsonl.zst", &zstd::encode_all(&b"b\n"[..], 0).unwrap());
    write("notes.jsonl", b"mine");
    let options = Recording { compress: true, keep: 1, ..recording(folder.path().to_owned()) };
    let recorder = Recorder::start(Some(&options)).unwrap();
    close(&recorder).await;
    drop(recorder);
    while Recorder::start(Some(&options)).is_err() {
        tokio::time::sleep(CLOSE_INTERVAL).await;
    }
    let names: Vec<_> = files(folder.path()).iter().map(|path| path.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["notes.jsonl", "plumb-1.jsonl.zst", "plumb-2.jsonl.zst"]);
}
