//! `plumb score --output-dir` against real servers, one of which dies, in a run that dies too.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use plumb_client::parquet::Rows;
use plumb_tests::{Launch, binary};
use serde_json::{Value, json};

use crate::command;

const FILES: usize = 8;
const ROWS: usize = 120;

/// Ids and responses of a file, all of them different.
fn rows(file: usize) -> Vec<(i64, String)> {
    (file * ROWS..(file + 1) * ROWS).map(|id| (id as i64, format!("Answer {id}. ").repeat(1 + id % 9))).collect()
}

fn write_table(path: &Path, rows: &[(i64, String)]) {
    let schema = "message m { required int64 id; required binary prompt (STRING); required binary response (STRING); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for rows in rows.chunks(50) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = rows.iter().map(|row| row.0).collect();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let texts: [Vec<&str>; 2] = [vec!["A question?"; rows.len()], rows.iter().map(|row| row.1.as_str()).collect()];
        for texts in texts {
            let texts: Vec<ByteArray> = texts.into_iter().map(ByteArray::from).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn write_lines(path: &Path, rows: &[(i64, String)]) {
    let mut file = File::create(path).unwrap();
    for (id, response) in rows {
        writeln!(file, "{}", json!({"id": id, "prompt": "A question?", "response": response})).unwrap();
    }
}

/// Ids and rewards in their order; rewards as bits of what the server sent, however many digits the file has.
fn scores(rows: &[Value]) -> Vec<(i64, u32)> {
    let score = |row: &Value| Some((row["id"].as_i64()?, (row["reward"].as_f64()? as f32).to_bits()));
    rows.iter().map(|row| score(row).unwrap_or_else(|| panic!("no score: {row}"))).collect()
}

fn read(path: &Path) -> Vec<Value> {
    let parse = |line: &[u8]| serde_json::from_slice(line).unwrap();
    match path.extension().is_some_and(|extension| extension == "parquet") {
        true => Rows::open(path).unwrap().map(|row| parse(&row.unwrap())).collect(),
        false => fs::read(path).unwrap().split(|byte| *byte == b'\n').filter(|l| !l.is_empty()).map(parse).collect(),
    }
}

/// Waits until so many files are done, while the run goes on.
async fn until_done(folder: &Path, wanted: usize, run: &mut Child) -> usize {
    let began = Instant::now();
    loop {
        let names = fs::read_dir(folder.join("_manifests")).into_iter().flatten().map(|entry| entry.unwrap().path());
        let done = names.filter(|name| name.extension().is_some_and(|extension| extension == "json")).count();
        if done >= wanted {
            return done;
        }
        assert!(run.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60), "only {done} are done");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_is_scored_once_though_a_server_and_the_run_are_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&input).unwrap();
    let names: Vec<String> =
        (0..FILES).map(|file| format!("{file}.{}", if file % 2 == 0 { "parquet" } else { "jsonl" })).collect();
    for (file, name) in names.iter().enumerate() {
        let write = if file % 2 == 0 { write_table } else { write_lines };
        write(&input.join(name), &rows(file));
    }
    let lasting = Launch::of(["llama-pm"]).start().await;
    let mortal = Launch::of(["llama-pm"]).start().await;
    let urls = format!("{},{}", mortal.url(), lasting.url());
    let start = || {
        let mut command = Command::new(binary("plumb"));
        command.args(["--server", &urls, "score", "--batch-size", "4", "--output-dir"]).arg(&output).arg(&input);
        command.env_remove("PLUMB_MODEL").env_remove("PLUMB_API_KEY");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };

    let mut run = start();
    until_done(&output, 1, &mut run).await;
    let port = mortal.address().port();
    drop(mortal);
    until_done(&output, 3, &mut run).await;
    run.kill().unwrap();
    run.wait().unwrap();
    let mut run = start();
    until_done(&output, 5, &mut run).await;
    let _back = Launch::of(["llama-pm"]).flags(&format!("--port {port}")).start().await;
    let run = run.wait_with_output().unwrap();
    let [out, err] = [run.stdout, run.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(run.status.success() && out.contains("done before"), "{out}{err}");

    for (file, name) in names.iter().enumerate() {
        let path: PathBuf = input.join(name);
        let alone = command::run(&lasting.url(), "", &["score", "--json", path.to_str().unwrap()]).await.lines(0);
        let found = scores(&read(&output.join(name)));
        assert_eq!(found, scores(&alone), "{name}");
        assert_eq!(
            found.iter().map(|row| row.0).collect::<Vec<_>>(),
            rows(file).iter().map(|row| row.0).collect::<Vec<_>>()
        );
    }
}
