//! `plumb score --output-dir`, as a process that may be killed.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::ParquetMetaDataWriter;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use plumb_client::parquet::Rows;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Status;

use crate::command::{Run, plumb, shown};
use crate::fake::{Fake, Step};

/// A table of ids, two columns of words and a note, in groups of rows.
fn table(path: &Path, columns: [&str; 2], rows: &[(i64, &str, &str)], group: usize) {
    let rows: Vec<_> = rows.iter().map(|&(id, first, second)| (id, [first, second, "n"])).collect();
    wide_table(path, [columns[0], columns[1], "note"], &rows, group);
}

fn wide_table(path: &Path, columns: [&str; 3], rows: &[(i64, [&str; 3])], group: usize) {
    let columns = columns.map(|name| format!("optional binary {name} (STRING);")).concat();
    let schema = format!("message m {{ required int64 id; {columns} }}");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for rows in rows.chunks(group) {
        let mut out = writer.next_row_group().unwrap();
        let ids: Vec<i64> = rows.iter().map(|row| row.0).collect();
        let mut column = out.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        for words in [0, 1, 2].map(|column| rows.iter().map(|row| row.1[column]).collect::<Vec<_>>()) {
            // A dash is null.
            let levels: Vec<i16> = words.iter().map(|word| i16::from(*word != "-")).collect();
            let values: Vec<ByteArray> = words.into_iter().filter(|word| *word != "-").map(ByteArray::from).collect();
            let mut column = out.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        out.close().unwrap();
    }
    writer.close().unwrap();
}

fn read(path: &Path) -> Vec<Value> {
    Rows::open(path).unwrap().map(|row| serde_json::from_slice(&row.unwrap()).unwrap()).collect()
}

fn manifest(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join("_manifests").join(name)).unwrap()).unwrap()
}

/// A folder with two files of responses and one of pairs, and one for the scores.
fn texts() -> (TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let responses = ["a", "bb", "refuse", "dddd", "eeeee"];
    let rows: Vec<_> = (0..).zip(responses).map(|(id, response)| (id, "q", response)).collect();
    table(&input.join("one.parquet"), ["prompt", "response"], &rows, 2);
    table(&input.join("deep/two.parquet"), ["prompt", "response"], &[(9, "q", "abc"), (10, "q", "-")], 10);
    table(&input.join("pairs.parquet"), ["chosen", "rejected"], &[(1, "abc", "d"), (2, "refuse", "e")], 1);
    fs::write(input.join("_not.parquet"), "nothing").unwrap();
    let output = folder.path().join("out");
    let (input, output) = (shown(&input), shown(&output));
    (folder, input, output)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_scores_for_every_row() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let run = plumb(&fake, &["score", "--output-dir", &output, "--batch-size", "2", &input]).await;
    assert_eq!(run.code, 1, "{}{}", run.out, run.err);
    assert!(run.out.contains("3 files scored\n") && run.out.contains("2 items failed"), "{}", run.out);

    let out = folder.path().join("out");
    let by = json!({"model": "pm", "model_version": 3, "weights_digest": "0123456789abcdef"});
    let with = |row: Value| -> Value {
        let (row, by) = (row.as_object().unwrap().clone(), by.as_object().unwrap().clone());
        row.into_iter().chain(by).collect()
    };
    let scored = |id: u32, n: u32| with(json!({"id": id, "reward": n as f32, "input_tokens": n, "truncated": false}));
    assert_eq!(
        read(&out.join("one.parquet")),
        [
            scored(0, 1),
            scored(1, 2),
            json!({"id": 2, "error": "INVALID_ARGUMENT: too long"}),
            scored(3, 4),
            scored(4, 5)
        ]
    );
    let two = read(&out.join("deep/two.parquet"));
    assert_eq!((two.len(), &two[0]), (2, &scored(9, 3)));
    assert!(two[1]["error"].as_str().unwrap().contains("exactly one of"), "{two:?}");
    let sides = json!({"chosen_reward": 3.0, "rejected_reward": 1.0, "margin": 2.0, "chosen_input_tokens": 3, "rejected_input_tokens": 1});
    let pairs = read(&out.join("pairs.parquet"));
    for (name, value) in sides.as_object().unwrap() {
        assert_eq!(&pairs[0][name], value, "{name}");
    }
    assert_eq!((&pairs[1]["chosen_reward"], &pairs[1]["margin"]), (&Value::Null, &Value::Null));
    assert_eq!((pairs[1]["rejected_reward"].as_f64(), &pairs[1]["model"]), (Some(1.0), &by["model"]));

    // The same rewards as line by line.
    let file = format!("{input}/one.parquet");
    let lines = plumb(&fake, &["score", "--json", &file]).await.json();
    let rewards = |rows: &[Value]| rows.iter().map(|row| row["reward"].as_f64()).collect::<Vec<_>>();
    assert_eq!(rewards(&lines), rewards(&read(&out.join("one.parquet"))));

    let one = manifest(&out, "one.parquet.json");
    assert_eq!((&one["rows"], &one["errors"], &one["tokens"]), (&json!(5), &json!(1), &json!(12)));
    assert_eq!(one["input"]["path"], "one.parquet");
    assert_eq!(one["models"], json!([{"model": "pm", "version": 3, "weights_digest": "0123456789abcdef"}]));
    assert_eq!(files_of(&out, "part"), 0);
}

/// Of the manifests' folder itself, by extension.
fn files_of(out: &Path, extension: &str) -> usize {
    let files = fs::read_dir(out.join("_manifests")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|found| found == extension)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_due_is_scored() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let out = folder.path().join("out");
    let score = |more: &'static [&str]| {
        let (fake, input, output) = (fake.clone(), input.clone(), output.clone());
        async move {
            let before = fake.calls();
            let run = plumb(&fake, &[&["score", "--output-dir", &output], more, &[&input]].concat()).await;
            (run.code, fake.calls() - before, run.out + &run.err)
        }
    };
    assert_eq!(score(&[]).await.0, 1);
    let (code, calls, said) = score(&[]).await;
    assert!(code == 0 && calls == 0 && said.contains("0 files scored, 3 done before"), "{said}");

    // Other options, or an output that is not ours, are not written over unasked.
    let (code, calls, said) = score(&["--hhh-prompt", "full"]).await;
    assert!(code == 64 && calls == 0 && said.contains("HHH_PROMPT_FULL") && said.contains("--overwrite"), "{said}");
    assert_eq!(read(&out.join("one.parquet"))[0]["reward"], 1.0);
    assert!(score(&["--hhh-prompt", "full", "--overwrite"]).await.2.contains("3 files scored\n"));
    assert_eq!(read(&out.join("one.parquet"))[0]["reward"], -1.0);
    assert!(score(&["--hhh-prompt", "full", "--overwrite"]).await.2.contains("0 files scored"));
    assert!(score(&["--overwrite"]).await.2.contains("3 files scored\n"));
    assert!(score(&["--retry-errors"]).await.2.contains("3 files scored\n"));
    for extension in ["json", "lock"] {
        fs::remove_file(out.join("_manifests/one.parquet").with_added_extension(extension)).unwrap();
    }
    let (code, _, said) = score(&[]).await;
    assert!(code == 64 && said.contains("was not made by plumb score"), "{said}");
    // As a run leaves it that is killed before it has written the manifest.
    fs::write(out.join("_manifests/one.parquet.lock"), "").unwrap();
    assert!(score(&[]).await.2.contains("1 files scored, 2 done before"));

    // A file that changes is scored again; one that is only younger is not.
    let one = Path::new(&input).join("one.parquet");
    fs::copy(&one, one.with_extension("copy")).unwrap();
    fs::rename(one.with_extension("copy"), &one).unwrap();
    assert!(score(&[]).await.2.contains("0 files scored"));
    table(&one, ["prompt", "response"], &[(7, "q", "changed")], 1);
    assert!(score(&[]).await.2.contains("1 files scored, 2 done before"));
    assert_eq!(read(&out.join("one.parquet"))[0]["reward"], 7.0);

    // What cannot be read does not end the run.
    fs::write(&one, "no table").unwrap();
    let (code, _, said) = score(&[]).await;
    assert!(code == 1 && said.contains("0 files scored, 2 done before, 1 unreadable"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_are_copied_and_lines_stay_lines() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let one = format!("{input}/one.parquet");
    plumb(&fake, &["score", "--output-dir", &output, "--keep", "*", &one]).await;
    let out = folder.path().join("out");
    let rows = read(&out.join("one.parquet"));
    assert_eq!(
        (&rows[4]["response"], &rows[4]["note"], &rows[4]["reward"]),
        (&json!("eeeee"), &json!("n"), &json!(5.0))
    );
    plumb(&fake, &["score", "--output-dir", &output, "--overwrite", "--keep", "note", &one]).await;
    assert_eq!(read(&out.join("one.parquet"))[0].as_object().unwrap().keys().next().unwrap(), "note");
    let run = plumb(&fake, &["score", "--output-dir", &output, "--overwrite", "--keep", "x", &one]).await;
    assert!(run.code == 1 && run.err.contains("there is no column x"), "{}", run.err);

    // Fixtures of pyarrow: nested columns, and a group for each row.
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parquet");
    for (name, kept) in [("dialogues", "chosen"), ("pairs-gzip", "raw"), ("pairs-none", "score")] {
        let path = fixtures.join(name).with_extension("parquet");
        plumb(&fake, &["score", "--output-dir", &output, "--keep", kept, &shown(&path)]).await.ok();
        let (before, after) = (read(&path), read(&out.join(name).with_extension("parquet")));
        assert_eq!(after.len(), before.len());
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before[kept], after[kept], "{name}");
            assert!(after["margin"].is_number(), "{after}");
        }
    }
    let path = fixtures.join("candidates.parquet");
    assert_eq!(plumb(&fake, &["score", "--output-dir", &output, &shown(&path)]).await.code, 1);
    let rows = read(&out.join("candidates.parquet"));
    assert_eq!((&rows[0]["rewards"], &rows[0]["input_tokens"]), (&json!([1.0, 2.0]), &json!([1, 2])));
    assert_eq!((rows[1].get("rewards"), rows[1]["error"].is_string()), (None, true));
    assert_eq!((&rows[2]["rewards"], &rows[2]["id"]), (&json!([3.0, null, 1.0]), &json!(3)));

    let lines = folder.path().join("lines.jsonl");
    fs::write(&lines, "{\"prompt\": \"q\", \"candidates\": [\"a\", \"bb\"], \"id\": 5}\nbroken\n").unwrap();
    let run = plumb(&fake, &["--json", "score", "--output-dir", &output, &shown(&lines)]).await;
    assert_eq!((run.code, &run.json()[0]["rows"], &run.json()[0]["errors"]), (1, &json!(2), &json!(1)));
    let written = fs::read_to_string(out.join("lines.jsonl")).unwrap();
    let written: Vec<Value> = written.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (&written[1]["id"], &written[1]["candidate"], &written[1]["reward"]),
        (&json!(5), &json!(1), &json!(2.0))
    );
    assert_eq!(written[2]["error"]["code"], "INVALID_ARGUMENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_that_would_mix() {
    let fake = Fake::start([]).await;
    let (_folder, input, output) = texts();
    let one = format!("{input}/one.parquet");
    for (args, reason) in [
        (vec!["--output-dir", &input, &input], "lies within"),
        (vec!["--output-dir", &format!("{input}/not/there"), &input], "lies within"),
        (vec!["--output-dir", &input, &one], "lies within"),
        (vec!["--output-dir", &output, &one, &one], "for two of the files"),
        (vec!["--output-dir", &output, "--shard", "2/2", &one], "I from 0 to N - 1"),
        (vec!["--output-dir", &output, "--limit", "2", &one], "cannot be used"),
        (vec!["--keep", "id", &one], "--output-dir"),
    ] {
        let run = plumb(&fake, &[&["score"], &args[..]].concat()).await;
        assert!(run.code == 64 && run.err.contains(reason), "{args:?}: {}", run.err);
    }
    assert_eq!(fake.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_are_disjoint_and_cover_all() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let mut seen = 0;
    for shard in ["0/2", "1/2"] {
        let run = plumb(&fake, &["--json", "score", "--output-dir", &output, "--shard", shard, &input]).await;
        assert!(run.err.contains("files scored\n"), "{}", run.err);
        seen += run.json().len();
    }
    assert_eq!(seen, 3);
    assert_eq!(read(&folder.path().join("out/deep/two.parquet")).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_comes_late_moves_no_other_to_another_share() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), shown(&folder.path().join("out")));
    let line = |name: String| {
        fs::create_dir_all(&input).unwrap();
        fs::write(input.join(name), "{\"text\": \"a\"}\n").unwrap();
    };
    (10..26).for_each(|n| line(format!("{n}.jsonl")));
    for share in ["0/3", "1/3", "2/3"] {
        plumb(&fake, &["score", "--output-dir", &output, "--shard", share, &shown(&input)]).await.ok();
        // Before all others.
        line(format!("0{}.jsonl", &share[..1]));
    }
    let missing: Vec<_> = (10..26).filter(|n| !Path::new(&output).join(format!("{n}.jsonl")).exists()).collect();
    assert!(missing.is_empty(), "in no share: {missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_at_the_same_time_leave_each_other_their_files() {
    // The first run has no answer until the second asks.
    let fake = Fake::start([Step::HoldUntilCalls(2)]).await;
    let (folder, input, output) = texts();
    let args = ["score", "--output-dir", &output, "--concurrency", "1", &input];
    let (first, second) = tokio::join!(plumb(&fake, &args), async {
        while fake.calls() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        plumb(&fake, &args).await
    });
    let scored = |run: &Run| -> u64 {
        let counts = run.out.lines().last().unwrap();
        let numbers: Vec<u64> = counts.split(' ').filter_map(|word| word.parse().ok()).collect();
        assert!(counts.contains("left to another run") && numbers[0] + numbers[1] == 3, "{counts}");
        numbers[0]
    };
    assert_eq!(scored(&first) + scored(&second), 3);
    assert_eq!(read(&folder.path().join("out/one.parquet")).len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waited_for_a_lock_has_it() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let one = format!("{input}/one.parquet");
    let manifests = folder.path().join("out/_manifests");
    fs::create_dir_all(&manifests).unwrap();
    // As a run that opens the lock while another has it.
    let waiting = File::create(manifests.join("one.parquet.lock")).unwrap();
    assert!(plumb(&fake, &["score", "--output-dir", &output, &one]).await.out.contains("1 files scored\n"));
    waiting.try_lock().unwrap();
    let run = plumb(&fake, &["score", "--output-dir", &output, "--overwrite", "--hhh-prompt", "full", &one]).await;
    assert!(run.out.contains("0 files scored, 1 left to another run"), "{}{}", run.out, run.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_weights_do_not_mix() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let out = folder.path().join("out");
    let one = format!("{input}/one.parquet");
    plumb(&fake, &["score", "--output-dir", &output, &one]).await;
    // As another version would have left it.
    let path = out.join("_manifests/one.parquet.json");
    let changed = fs::read_to_string(&path).unwrap().replace("0123456789abcdef", "fedcba9876543210");
    fs::write(&path, changed.replace("\"version\": 3", "\"version\": 2")).unwrap();
    let run = plumb(&fake, &["score", "--output-dir", &output, &input]).await;
    assert!(run.code == 64 && run.err.contains("--version 2 goes on"), "{}", run.err);
    let run = plumb(&fake, &["score", "--output-dir", &output, "--mixed-versions", &input]).await;
    assert!(run.out.contains("2 files scored, 1 done before"), "{}{}", run.out, run.err);
    // In the middle of a run.
    let fake = Fake::start([Step::Answer, Step::OtherWeights]).await;
    let args = ["score", "--output-dir", &output, "--overwrite", "--batch-size", "2", "--concurrency", "1", &one];
    let run = plumb(&fake, &args).await;
    assert!(run.code == 2 && run.err.contains("do not serve the same weights"), "{}", run.err);
    assert_eq!(read(&out.join("one.parquet")).len(), 5, "the older scores are there");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_once_however_often_the_run_is_killed() {
    let fake = Fake::start([]).await;
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    let words: Vec<String> = (0..60).map(|n| "x".repeat(n + 1)).collect();
    for file in 0..6 {
        let rows: Vec<_> = (0..).zip(&words).map(|(id, word)| (file * 100 + id, "q", word.as_str())).collect();
        table(&input.join(format!("{file}.parquet")), ["prompt", "response"], &rows, 7);
    }
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plumb"));
        command.args(["--server", &fake.url, "score", "--batch-size", "1", "--concurrency", "2", "--output-dir"]);
        command.arg(&output).arg(&input).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let mut killed = 0;
    let mut patience = Duration::from_millis(20);
    loop {
        let mut child = start();
        tokio::time::sleep(patience.mul_f64(rand::random_range(0.5..1.5))).await;
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed += 1;
        patience = patience.mul_f64(1.3);
    }
    assert!(killed > 0);
    for file in 0..6 {
        let rows = read(&output.join(format!("{file}.parquet")));
        let found: Vec<_> = rows.iter().map(|row| (row["id"].as_i64(), row["reward"].as_f64())).collect();
        let expected: Vec<_> = (0..60).map(|n| (Some(file * 100 + n), Some(n as f64 + 1.0))).collect();
        assert_eq!(found, expected, "file {file}");
    }
    assert_eq!((files_of(&output, "json"), files_of(&output, "part")), (6, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_scored_does_not_end_the_run() {
    let fake = Fake::start([]).await;
    let (folder, _, output) = texts();
    let input = folder.path().join("rows");
    let words = [vec!["a"; 32], vec!["refuse"]].concat();
    let rows: Vec<_> = (0..).zip(words).map(|(id, word)| (id, "q", word)).collect();
    table(&input.join("a.parquet"), ["prompt", "response"], &rows, 50);
    table(&input.join("b.parquet"), ["prompt", "response"], &[(0, "q", "infinite")], 1);
    let run = plumb(&fake, &["score", "--output-dir", &output, &shown(&input)]).await;
    assert!(run.code == 1 && run.out.contains("2 files scored\n"), "{}{}", run.out, run.err);
    let rows = read(&folder.path().join("out/a.parquet"));
    assert_eq!((rows.len(), &rows[31]["reward"]), (33, &json!(1.0)));
    assert_eq!(rows[32]["error"], "INVALID_ARGUMENT: items[0]: too long");
    let run = plumb(&fake, &["score", "--output-dir", &output, &shown(&input)]).await;
    assert!(run.ok().contains("0 files scored, 2 done before"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_that_may_pass_leaves_the_file_for_the_next_run() {
    let slow = Fake::start([Step::Hang]).await;
    let short = Fake::start([Step::Forget]).await;
    for (fake, reason) in [(slow, "DEADLINE_EXCEEDED"), (short, "does not fit")] {
        let (folder, input, output) = texts();
        let out = folder.path().join("out");
        let args = ["--timeout-secs", "1", "score", "--output-dir", &output, "--concurrency", "1", &input];
        let run = plumb(&fake, &args).await;
        assert!(run.code == 2 && run.out.contains("2 files scored, 1 not done"), "{}{}", run.out, run.err);
        assert!(run.err.contains(reason) && run.err.contains("1 files are not done"), "{}", run.err);
        assert_eq!(files_of(&out, "json") + usize::from(out.join("_manifests/deep/two.parquet.json").exists()), 2);
        let run = plumb(&fake, &args).await;
        assert!(run.out.contains("1 files scored, 2 done before"), "{}{}", run.out, run.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_is_waited_for() {
    let away = || Step::Fail(Status::unavailable("away"));
    let fake = Fake::start(std::iter::repeat_with(away).take(6)).await;
    let (_folder, input, output) = texts();
    let pairs = format!("{input}/deep");
    let run = plumb(&fake, &["score", "--output-dir", &output, &pairs]).await;
    assert!(run.out.contains("1 files scored\n"), "{}{}", run.out, run.err);
    let fake = Fake::start([away(), away()]).await;
    let args = ["--max-retries", "1", "score", "--output-dir", &output, "--concurrency", "1", &input];
    let run = plumb(&fake, &args).await;
    assert!(run.code == 2 && run.err.contains("UNAVAILABLE: away (after 2 tries)"), "{}", run.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_file_does_not_wait_for_the_last_answer() {
    let fake = Fake::start([Step::HoldUntilCalls(4)]).await;
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    fs::create_dir_all(&input).unwrap();
    for n in 0..4 {
        fs::write(input.join(format!("{n}.jsonl")), "{\"text\": \"a\"}\n").unwrap();
    }
    let output = shown(&folder.path().join("out"));
    let run = plumb(&fake, &["--timeout-secs", "20", "score", "--output-dir", &output, &shown(&input)]).await;
    assert!(run.ok().contains("4 files scored\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_models_and_labels_do_not_mix() {
    let fake = Fake::start([]).await;
    let (_folder, input, output) = texts();
    let score = |model: &'static [&str]| {
        let (fake, input, output) = (fake.clone(), input.clone(), output.clone());
        async move {
            let args = [&["score", "--output-dir", &output, "--mixed-versions"], model, &[&input]].concat();
            plumb(&fake, &args).await
        }
    };
    assert!(score(&["--model", "a", "--label", "stable"]).await.out.contains("3 files scored\n"));
    assert!(score(&["--model", "a", "--label", "stable"]).await.ok().contains("3 done before"));
    for other in [&["--model", "b", "--label", "stable"][..], &["--model", "a", "--label", "canary"]] {
        let run = score(other).await;
        assert!(run.code == 64 && run.err.contains("was scored with the options"), "{}{}", run.out, run.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_do_not_mix_versions() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    plumb(&fake, &["score", "--output-dir", &output, &input]).await;
    let path = folder.path().join("out/_manifests/one.parquet.json");
    let changed = fs::read_to_string(&path).unwrap().replace("0123456789abcdef", "fedcba9876543210");
    fs::write(&path, changed).unwrap();
    // In the share of one of the two, and refused by both.
    for share in ["0/2", "1/2"] {
        let run = plumb(&fake, &["score", "--output-dir", &output, "--shard", share, &input]).await;
        assert!(run.code == 64 && run.err.contains("and now pm version 3"), "{share}: {}{}", run.out, run.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_with_an_error_is_counted() {
    // The sides of the second pair are scored by different versions.
    let fake = Fake::start([Step::Answer, Step::Answer, Step::Answer, Step::OtherWeights]).await;
    let (folder, _, output) = texts();
    let input = folder.path().join("wide");
    let rows = [(0, ["aa", "b", "-"]), (1, ["cc", "d", "-"]), (2, ["-", "-", "only a text"])];
    wide_table(&input.join("wide.parquet"), ["chosen", "rejected", "text"], &rows, 8);
    let input = shown(&input);
    let args =
        ["score", "--output-dir", &output, "--mixed-versions", "--batch-size", "1", "--concurrency", "1", &input];
    let run = plumb(&fake, &args).await;
    assert!(run.code == 1 && run.out.contains("1 items failed") && run.out.contains("1 broken lines"), "{}", run.out);
    let out = folder.path().join("out");
    let rows = read(&out.join("wide.parquet"));
    assert_eq!((&rows[0]["margin"], rows[0].get("error")), (&json!(1.0), None));
    assert_eq!(rows[1]["error"], "ABORTED: scored by another version than the row");
    assert_eq!((&rows[1]["chosen_reward"], rows[1].get("margin")), (&json!(2.0), None));
    assert_eq!(rows[2]["error"], "INVALID_ARGUMENT: asks for something else than the columns say");
    let manifest = manifest(&out, "wide.parquet.json");
    assert_eq!((&manifest["rows"], &manifest["errors"]), (&json!(3), &json!(2)));
    let run = plumb(&fake, &[&args[..], &["--retry-errors"]].concat()).await;
    assert!(run.code == 1 && run.out.contains("1 files scored\n"), "{}{}", run.out, run.err);
    assert_eq!(read(&out.join("wide.parquet"))[1]["margin"], 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_column_that_is_kept_does_not_end_the_run() {
    let fake = Fake::start([]).await;
    let (_folder, input, output) = texts();
    // The note of every row is said to lie where there is no file any more.
    let one = Path::new(&input).join("one.parquet");
    let mut metadata = SerializedFileReader::new(File::open(&one).unwrap()).unwrap().metadata().clone().into_builder();
    let groups = metadata.take_row_groups().into_iter().map(|group| {
        let mut group = group.into_builder();
        let mut columns = group.take_columns();
        let note = columns.pop().unwrap().into_builder().set_total_compressed_size(1 << 40).build().unwrap();
        columns.push(note);
        group.set_column_metadata(columns).build().unwrap()
    });
    let groups = groups.collect();
    let metadata = metadata.set_row_groups(groups).build();
    let mut file = File::options().append(true).open(&one).unwrap();
    ParquetMetaDataWriter::new(&mut file, &metadata).finish().unwrap();
    let run = plumb(&fake, &["score", "--output-dir", &output, "--keep", "note", &input]).await;
    assert!(run.code == 1 && run.out.contains("2 files scored, 1 unreadable"), "{}{}", run.out, run.err);
    assert!(run.err.contains("one.parquet: ") && run.err.contains("ends after the file"), "{}", run.err);
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_no_manifest_can_hold_is_refused_at_once() {
    use std::os::unix::ffi::OsStrExt;

    let fake = Fake::start([]).await;
    let (_folder, input, output) = texts();
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9.jsonl");
    fs::write(Path::new(&input).join(name), "{\"text\": \"a\"}\n").unwrap();
    let run = plumb(&fake, &["score", "--output-dir", &output, &input]).await;
    assert!(run.code == 64 && run.err.contains("must be UTF-8") && fake.calls() == 0, "{}{}", run.out, run.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_another_version_is_left_alone() {
    let fake = Fake::start([]).await;
    let (folder, input, output) = texts();
    let one = format!("{input}/one.parquet");
    plumb(&fake, &["score", "--output-dir", &output, &one]).await;
    let path = folder.path().join("out/_manifests/one.parquet.json");
    fs::write(&path, "{\"plumb_manifest\": 2, \"rows\": \"in another form\"}").unwrap();
    let run = plumb(&fake, &["score", "--output-dir", &output, &one]).await;
    assert!(run.code == 64 && run.err.contains("has a manifest of version 2"), "{}{}", run.out, run.err);
    let run = plumb(&fake, &["score", "--output-dir", &output, "--overwrite", &one]).await;
    assert!(run.out.contains("1 files scored\n"), "{}{}", run.out, run.err);
}
