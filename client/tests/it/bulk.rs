//! `plumb score --output-dir`, as a process that may be killed.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use plumb_client::parquet::Rows;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::{plumb, shown};
use crate::fake::{Fake, Step};

/// A table of ids and one or two columns of words, in groups of rows.
fn table(path: &Path, columns: [&str; 2], rows: &[(i64, &str, &str)], group: usize) {
    let [first, second] = columns;
    let text = "(STRING)";
    let schema = format!(
        "message m {{ required int64 id; optional binary {first} {text}; optional binary {second} {text}; optional binary note {text}; }}"
    );
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
        let words: [Vec<&str>; 3] =
            [rows.iter().map(|r| r.1).collect(), rows.iter().map(|r| r.2).collect(), vec!["n"; rows.len()]];
        for words in words {
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
    let left: Vec<_> = fs::read_dir(out.join("_manifests")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "locks or parts are left: {left:?}");
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
    fs::remove_file(out.join("_manifests/one.parquet.json")).unwrap();
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
async fn runs_at_the_same_time_leave_each_other_their_files() {
    // The first run holds its first file until the second is at its last.
    let fake = Fake::start([Step::HoldUntilCalls(3)]).await;
    let (folder, input, output) = texts();
    let args = ["score", "--output-dir", &output, "--concurrency", "1", &input];
    let (first, second) = tokio::join!(plumb(&fake, &args), async {
        while fake.calls() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        plumb(&fake, &args).await
    });
    assert!(first.out.contains("1 files scored, 2 left to another run"), "{}", first.out);
    assert!(second.out.contains("2 files scored, 1 left to another run"), "{}", second.out);
    assert_eq!(read(&folder.path().join("out/one.parquet")).len(), 5);
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
    let left: Vec<_> = fs::read_dir(output.join("_manifests")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 6, "{left:?}");
}
