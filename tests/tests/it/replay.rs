//! Calls that the real server took down, asked again with `plumb replay`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use plumb_client::{dialogue, text, v1};
use plumb_tests::call::{self, candidate, candidate_ids, ids, items, labelled, named, version};
use plumb_tests::fixture::Copied;
use plumb_tests::{Exposition, Launch, Server};
use serde_json::Value;

use crate::command::{plumb, run};

const PM: &str = "llama-pm";

/// A server that takes down all calls.
async fn recording(folder: &Path, fixtures: &[&str], flags: &str) -> Server {
    let launch = Launch::of(fixtures.iter().copied()).env("PLUMB_RECORD_DIR", folder.to_str().unwrap());
    launch.flags(flags).start().await
}

/// Waits until so many calls are in the files.
async fn until_recorded(server: &Server, folder: &Path, calls: usize) {
    let counted = |metrics: &Exposition| metrics.value("plumb_records_total", &[]) >= calls as f64;
    server.until("calls are recorded", counted).await;
    // A line is counted when it is taken, and written when no other is waiting.
    while lines(folder).len() < calls {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The lines of all plain files.
fn lines(folder: &Path) -> Vec<String> {
    let plain = files(folder).into_iter().filter(|file| file.extension().is_some_and(|e| e == "jsonl"));
    let texts = plain.map(|file| std::fs::read_to_string(file).unwrap());
    texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths.filter(|path| !path.ends_with("lock")).collect();
    files.sort();
    files
}

/// Conversations, texts and token ids with one prompt or many, one of which fails.
fn mixed() -> Vec<v1::Input> {
    vec![
        dialogue("What is 2 + 2?", "4."),
        dialogue("What is 2 + 2?", "I do not know. é\u{1}\n"),
        text("A text."),
        ids(&[5, 6, 7]),
        ids(&[280]),
        call::prompt_response(&[7, 8, 9], &[10, 11]),
    ]
}

fn ranking(i: usize) -> v1::RankRequest {
    let prompt = plumb_client::conversation([("user", format!("Question {i}?"))]);
    let candidates = (0..6).map(|j| candidate(format!("Answer {} to {i}.", j * j + i))).collect();
    v1::RankRequest { prompt: Some(prompt), candidates, request_id: format!("rank-{i}"), ..Default::default() }
}

/// A copy of the fixture that has another opinion.
fn changed() -> Copied {
    Copied::of(PM).tensors(|tensors| {
        let head = tensors.get_mut("score.weight").unwrap();
        // bf16: the upper byte of every fourth weight has its sign turned.
        head.bytes.chunks_exact_mut(8).for_each(|weights| weights[1] ^= 0x80);
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_same_version_nothing_differs() {
    let folder = tempfile::tempdir().unwrap();
    let server = recording(folder.path(), &[PM, "llama-lm"], "").await;
    let client = server.client().await;
    client.score(v1::ScoreRequest { request_id: "mixed".into(), ..items(named(PM), mixed()) }).await.unwrap();
    let cut = v1::TextOptions { truncation: v1::Truncation::Left.into(), ..Default::default() };
    let long = text("long ".repeat(1000));
    client.score(v1::ScoreRequest { text: Some(cut), per_token: true, ..items(named(PM), vec![long]) }).await.unwrap();
    let streamed = futures::stream::iter((0..3).map(|i| items(None, vec![text(format!("streamed {i}"))])));
    let answers: Vec<_> = client.score_stream(streamed).await.unwrap().collect().await;
    assert_eq!(answers.len(), 3);
    client.rank(ranking(1)).await.unwrap();
    let of_ids = v1::RankRequest {
        prompt: Some(ids(&[5, 6])),
        candidates: vec![candidate_ids(&[7, 8]), candidate_ids(&[9])],
        ..Default::default()
    };
    client.rank(of_ids).await.unwrap();
    let best_of = v1::GenerateRequest {
        prompt: Some(plumb_client::conversation([("user", "Hello")])),
        best_of: Some(v1::BestOf { samples: 4, ranker: None }),
        stopping: Some(v1::Stopping { max_new_tokens: Some(8), ..Default::default() }),
        ..Default::default()
    };
    call::generate(&client, best_of).await.unwrap();
    // A call that fails is taken down too, one of another model as well.
    client.score(items(version(PM, 9), vec![text("nobody")])).await.unwrap_err();
    let language =
        v1::ScoreRequest { objective: v1::Objective::SumLogProb.into(), ..items(None, vec![dialogue("q", "a")]) };
    client.score(v1::ScoreRequest { model: named("llama-lm"), ..language }).await.unwrap();
    until_recorded(&server, folder.path(), 10).await;

    let log = folder.path().to_str().unwrap();
    let mixed_models = plumb(&server, "", &["replay", log, "--version", "1"]).await;
    assert!(mixed_models.code == 64 && mixed_models.err.contains("--recorded-model"), "{}", mixed_models.err);
    let arguments = ["replay", log, "--version", "1", "--fail-if-difference-over", "0"];
    for (name, calls, compared, failed) in [(PM, 8, 21, 1), ("llama-lm", 1, 1, 0)] {
        let chosen = [&arguments[..], &["--recorded-model", name, "--json"]].concat();
        let report = plumb(&server, "", &chosen).await.lines(0).remove(0);
        let number = |key: &str| report[key].as_u64().unwrap();
        assert_eq!((number("calls"), number("compared"), number("identical")), (calls, compared, compared), "{report}");
        assert_eq!(number("failed_on_both"), failed, "{report}");
        assert_eq!(report["difference"]["largest"], 0.0);
        assert_eq!(report["candidate"]["models"], report["reference"]["models"]);
        assert_eq!(number("truncated_by_both"), u64::from(name == PM));
    }
    // What it asked was taken down too, and is not asked again.
    while !lines(folder.path()).iter().any(|line| line.contains("\"request_id\":\"replay:")) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Also both sides asked anew.
    let against = ["--against", "1", "--recorded-model", PM, "--fail-if-flips-over", "0"];
    let words = plumb(&server, "", &[&arguments[..], &against].concat()).await;
    assert_eq!(words.code, 0, "{}{}", words.out, words.err);
    assert!(
        words.out.contains("21 compared, 21 with the same bits") && words.out.contains("flips: 0 (0.00 %"),
        "{}",
        words.out
    );

    // What a record holds, the other commands take.
    let records: Vec<Value> = lines(folder.path()).iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first = records.iter().find(|record| record["score"]["request_id"] == "mixed").unwrap();
    let stdin: String = first["score"]["items"].as_array().unwrap().iter().map(|item| format!("{item}\n")).collect();
    let rescored = plumb(&server, &stdin, &["score", "--model", PM, "--json", "-"]).await.lines(1);
    let rewards =
        |lines: &[Value]| lines.iter().map(|line| line["reward"].as_f64().map(|r| r as f32)).collect::<Vec<_>>();
    assert_eq!(rewards(&rescored), rewards(first["results"].as_array().unwrap()));
    assert_eq!(records.iter().filter(|record| record["rpc"] == "Generate").count(), 1);
    let failed = records.iter().find(|record| record["error"]["code"] == "NOT_FOUND").unwrap();
    assert_eq!(failed["model"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_another_version_the_report_says_what_direct_calls_say() {
    let folder = tempfile::tempdir().unwrap();
    let server = recording(folder.path(), &[PM], "").await;
    let client = server.client().await;
    let other = changed();
    let source = other.path().to_str().unwrap().to_owned();
    client.load_version(v1::LoadVersionRequest { name: PM.into(), source, ..Default::default() }).await.unwrap();
    client.set_label(PM, "stable", Some(1)).await.unwrap();
    client.set_label(PM, "canary", Some(2)).await.unwrap();
    let (mut old, mut new): (Vec<Vec<f32>>, Vec<Vec<f32>>) = Default::default();
    for i in 0..8 {
        for (model, rewards) in [(labelled(PM, "stable"), &mut old), (labelled(PM, "canary"), &mut new)] {
            let answer = client.rank(v1::RankRequest { model, ..ranking(i) }).await.unwrap();
            let mut by_index = vec![f32::NAN; 6];
            answer.ranked.iter().for_each(|r| by_index[r.index as usize] = r.score.as_ref().unwrap().reward);
            rewards.push(by_index);
        }
    }
    until_recorded(&server, folder.path(), 16).await;

    let log = folder.path().to_str().unwrap();
    let arguments = ["replay", log, "--label", "canary", "--recorded-version", "1", "--json"];
    let report = plumb(&server, "", &arguments).await.lines(0).remove(0);
    let shifts: Vec<f64> =
        old.iter().flatten().zip(new.iter().flatten()).map(|(a, b)| f64::from(*b) - f64::from(*a)).collect();
    let mean = shifts.iter().sum::<f64>() / 48.0;
    let largest = shifts.iter().fold(0.0, |largest: f64, shift| largest.max(shift.abs()));
    let (mut flipped, mut same_best) = (0, 0);
    for (a, b) in old.iter().zip(&new) {
        let pairs = (0..6).flat_map(|i| (0..i).map(move |j| (i, j)));
        flipped += pairs.filter(|&(i, j)| (a[i] > a[j] && b[i] < b[j]) || (a[i] < a[j] && b[i] > b[j])).count();
        let best = |r: &[f32]| (0..6).rev().max_by(|&i, &j| r[i].total_cmp(&r[j])).unwrap();
        same_best += usize::from(best(a) == best(b));
    }
    assert!(flipped > 0 && largest > 0.0, "the two versions do not differ");
    let close =
        |value: &Value, expect: f64| assert!((value.as_f64().unwrap() - expect).abs() < 1e-9, "{value} {expect}");
    close(&report["difference"]["mean"]["mean"], mean);
    close(&report["difference"]["largest"], largest);
    close(&report["reference"]["rewards"]["mean"], old.iter().flatten().map(|r| f64::from(*r)).sum::<f64>() / 48.0);
    close(&report["candidate"]["rewards"]["mean"], new.iter().flatten().map(|r| f64::from(*r)).sum::<f64>() / 48.0);
    close(&report["pairs"]["flips"]["mean"], flipped as f64 / 120.0);
    close(&report["pairs"]["same_best"], same_best as f64 / 8.0);
    assert_eq!((&report["pairs"]["flipped"], &report["skipped"]["not_chosen"]), (&flipped.into(), &8.into()));
    assert_eq!(report["candidate"]["models"][0]["version"], 2);

    // A pipeline that does not want it is told why; and the other way round there is as much to see.
    let bars = ["replay", log, "--version", "2", "--recorded-version", "1", "--fail-if-flips-over", "0.0001"];
    let missed = plumb(&server, "", &bars).await;
    assert!(missed.code == 1 && missed.err.contains("share of flipped pairs"), "{}{}", missed.out, missed.err);
    assert!(missed.out.contains("rank-") && missed.out.contains("Answer"), "{}", missed.out);
    let fresh = ["replay", log, "--version", "1", "--against", "canary", "--limit", "8", "--json"];
    let back = plumb(&server, "", &fresh).await.lines(0).remove(0);
    assert_eq!((&back["calls"], &back["reference"]["recorded"]), (&8.into(), &false.into()));
    assert_eq!(back["reference"]["models"][0]["version"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_server_left_is_read_up_to_its_broken_last_line() {
    let folder = tempfile::tempdir().unwrap();
    let server = recording(folder.path(), &[PM], "").await;
    let client = server.client().await;
    for i in 0..5 {
        client.score(items(None, vec![text(format!("text {i}"))])).await.unwrap();
    }
    until_recorded(&server, folder.path(), 5).await;
    // By kill -9.
    drop(server);
    let file = files(folder.path()).remove(0);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 40]).unwrap();

    // The next server packs what the last one left, and begins a file of its own.
    let server = recording(folder.path(), &[PM], "").await;
    server.client().await.score(items(None, vec![text("text 5")])).await.unwrap();
    until_recorded(&server, folder.path(), 1).await;
    let log = folder.path().to_str().unwrap();
    let report = plumb(&server, "", &["replay", log, "--json"]).await.lines(0).remove(0);
    assert_eq!((&report["identical"], &report["skipped"]["unfinished"]), (&5.into(), &1.into()), "{report}");
    assert!(report["skipped"]["example"].as_str().unwrap().contains("ends in the middle"), "{report}");

    let nothing = run(&server.url(), "", &["replay", "-", "--version", "1"]).await;
    assert!(nothing.code == 2 && nothing.err.contains("there are no records"), "{}", nothing.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_was_answered_is_in_the_files_when_the_server_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = recording(folder.path(), &[PM], "--no-record-compression --record-max-mib 1").await;
    let client = server.client().await;
    for i in 0..60 {
        let words = format!("text {i} {}", "word ".repeat(150));
        client.score(items(None, vec![text(words); 40])).await.unwrap();
    }
    server.terminate();
    assert_eq!(server.exit_code().await, 0);
    let files = files(folder.path());
    assert!(files.len() > 1 && files.iter().all(|file| file.metadata().unwrap().len() <= 1 << 20), "{files:?}");
    let texts = files.iter().map(|file| std::fs::read_to_string(file).unwrap());
    assert_eq!(texts.map(|text| text.lines().count()).sum::<usize>(), 60);
}
