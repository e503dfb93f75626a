//! Recorded calls from files, folders and patterns; what cannot be read is told apart and passed over.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plumb_client::record::{MAX_LINE_BYTES, Record, VERSION};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::cli::Usage;
use crate::cli::input::Place;
use crate::cli::source::open;

/// Records that are read before anyone has asked for them; each may be as long as a line may be.
const AHEAD: usize = 8;

/// A line of a log.
pub(super) enum Line {
    Record(Place, Box<Record>),
    Skipped(Place, Skip),
}

/// Why a line is passed over.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Skip {
    /// It is no record.
    Broken(String),
    /// The file ends in the middle of it: its server was killed, or is writing it.
    Unfinished,
    /// It is longer than a server writes.
    TooLong,
    /// It has another version of the format.
    Format(u32),
    /// The rest of the file cannot be read.
    Damaged(String),
}

/// The files that are meant: files as they are, the records of folders and what patterns match.
pub(super) fn files(logs: &[PathBuf]) -> Result<Vec<PathBuf>, Usage> {
    let mut files = Vec::new();
    for log in logs {
        let before = files.len();
        if log.is_dir() {
            let entries = log.read_dir().map_err(|error| wrong(log, &error))?;
            let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<BTreeSet<_>, _>>();
            let paths = paths.map_err(|error| wrong(log, &error))?;
            // One that is just being packed is there twice.
            let is_once = |path: &&PathBuf| is_packed(path) || !paths.contains(&with_ending(path, ".zst"));
            files.extend(paths.iter().filter(|path| is_log(path)).filter(is_once).cloned());
        } else if log.exists() || log.as_os_str() == "-" {
            files.push(log.clone());
        } else if let Some(pattern) = log.to_str().filter(|text| text.contains(['*', '?', '['])) {
            let paths = glob::glob(pattern).map_err(|error| wrong(log, &error))?;
            files.extend(paths.filter_map(Result::ok).filter(|path| path.is_file()));
        } else {
            return Err(wrong(log, &"there is no such file or folder"));
        }
        if files.len() == before {
            return Err(wrong(log, &"there are no files of records (.jsonl, .jsonl.zst, .jsonl.gz)"));
        }
    }
    Ok(files)
}

fn wrong(log: &Path, what: &dyn std::fmt::Display) -> Usage {
    Usage(format!("{}: {what}", log.display()))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn is_packed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst" || extension == "gz")
}

fn is_log(path: &Path) -> bool {
    let name = path.to_str().unwrap_or_default();
    [".jsonl", ".jsonl.zst", ".jsonl.gz"].iter().any(|ending| name.ends_with(ending))
}

/// The lines of all files in their order, read on a thread of its own. Dropping the stream stops the reading.
pub(super) fn read(files: Vec<PathBuf>) -> ReceiverStream<Line> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        for file in files {
            if !read_file(&file, &mut |line| sender.blocking_send(line).is_ok()) {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Sends every line until `send` has enough, in which case the answer is false.
fn read_file(path: &Path, send: &mut dyn FnMut(Line) -> bool) -> bool {
    let file: Arc<Path> = path.into();
    let place = |line| Place { file: Some(Arc::clone(&file)), line };
    let lines = match open(path) {
        Ok(lines) => lines,
        Err(error) => return send(Line::Skipped(place(0), Skip::Damaged(error.to_string()))),
    };
    // As the file is now: a server may be writing to it, about this very replay among other things.
    let is_growing = path.is_file() && !is_packed(path);
    let length = if is_growing { path.metadata().map_or(u64::MAX, |file| file.len()) } else { u64::MAX };
    let mut lines = lines.take(length);
    let mut line = Vec::new();
    for number in 1.. {
        let sent = match read_line(&mut lines, &mut line) {
            Ok(Ending::None) if line.is_empty() => return true,
            Ok(Ending::None) => match parse(&line) {
                // Somebody's editor left the last line break out.
                Ok(record) => send(Line::Record(place(number), Box::new(record))),
                Err(Skip::Broken(_)) => send(Line::Skipped(place(number), Skip::Unfinished)),
                Err(skip) => send(Line::Skipped(place(number), skip)),
            },
            Ok(Ending::Break) if line.trim_ascii().is_empty() => true,
            Ok(Ending::Break) => match parse(&line) {
                Ok(record) => send(Line::Record(place(number), Box::new(record))),
                Err(skip) => send(Line::Skipped(place(number), skip)),
            },
            Ok(Ending::TooLong) => send(Line::Skipped(place(number), Skip::TooLong)),
            Err(error) => return send(Line::Skipped(place(number), Skip::Damaged(error.to_string()))),
        };
        if !sent {
            return false;
        }
    }
    true
}

/// How a line ends.
enum Ending {
    Break,
    /// With the file.
    None,
    /// Not within the limit; the rest of it is passed over.
    TooLong,
}

fn read_line(lines: &mut dyn BufRead, line: &mut Vec<u8>) -> io::Result<Ending> {
    line.clear();
    let limit = MAX_LINE_BYTES as u64 + 1;
    let n = (&mut *lines).take(limit).read_until(b'\n', line)?;
    if line.ends_with(b"\n") {
        return Ok(Ending::Break);
    }
    if (n as u64) < limit {
        return Ok(Ending::None);
    }
    line.clear();
    lines.skip_until(b'\n')?;
    Ok(Ending::TooLong)
}

fn parse(line: &[u8]) -> Result<Record, Skip> {
    /// What every version of the format has.
    #[derive(Deserialize)]
    struct Head {
        plumb_record: u32,
    }
    match serde_json::from_slice::<Record>(line) {
        Ok(record) if record.plumb_record == VERSION => Ok(record),
        Ok(Record { plumb_record: 0, .. }) => Err(Skip::Broken("is no record: it has no plumb_record".into())),
        Ok(Record { plumb_record, .. }) => Err(Skip::Format(plumb_record)),
        Err(error) => match serde_json::from_slice(line) {
            Ok(Head { plumb_record }) if plumb_record != VERSION => Err(Skip::Format(plumb_record)),
            _ => Err(Skip::Broken(error.to_string())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"plumb_record":1,"score":{"items":[{"text":"a"}]},"results":[{"reward":1.0}]}"#;

    fn lines(path: &Path) -> Vec<String> {
        let mut seen = Vec::new();
        read_file(path, &mut |line| {
            seen.push(match line {
                Line::Record(place, _) => format!("{} record", place.line),
                Line::Skipped(place, skip) => format!("{} {skip:?}", place.line),
            });
            true
        });
        seen
    }

    #[test]
    fn what_is_no_record_is_told_apart_and_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let later = r#"{"plumb_record":2,"score":"another shape"}"#;
        let long = "x".repeat(MAX_LINE_BYTES + 1);
        let text = format!("{RECORD}\n\n{{\"text\": \"a\"}}\n{later}\n{long}\n{RECORD}\n{}", &RECORD[..20]);
        std::fs::write(&path, &text).unwrap();
        let expect = [
            "1 record",
            "3 Broken(\"is no record: it has no plumb_record\")",
            "4 Format(2)",
            "5 TooLong",
            "6 record",
            "7 Unfinished",
        ];
        assert_eq!(lines(&path), expect);
        let packed = folder.path().join("b.jsonl.zst");
        let bytes = zstd::encode_all(text.as_bytes(), 0).unwrap();
        std::fs::write(&packed, &bytes).unwrap();
        assert_eq!(lines(&packed), expect);
        std::fs::write(&packed, &bytes[..bytes.len() - 9]).unwrap();
        assert!(lines(&packed).pop().unwrap().contains("Damaged"), "{:?}", lines(&packed));
        std::fs::write(&path, RECORD).unwrap();
        assert_eq!(lines(&path), ["1 record"], "a last line without its break");
    }

    #[test]
    fn files_folders_and_patterns() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.jsonl.zst", "a.jsonl", "c.jsonl.gz", "lock", "d.jsonl.zst.tmp", "e.txt"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let found = |log: &str| {
            files(&[folder.path().join(log)]).map(|files| {
                files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(found("").unwrap(), ["a.jsonl.zst", "b.jsonl", "c.jsonl.gz"]);
        assert_eq!(found("e.txt").unwrap(), ["e.txt"]);
        assert_eq!(found("?.jsonl").unwrap(), ["a.jsonl", "b.jsonl"]);
        assert!(found("x.jsonl").unwrap_err().to_string().contains("no such file"));
        assert!(found("x*").unwrap_err().to_string().contains("no files of records"));
    }
}
