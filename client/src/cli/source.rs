//! Files of lines, read on a thread of their own and handed on a few at a time, so that a file of any size fits.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use flate2::read::MultiGzDecoder;
use plumb_client::parquet::{Rows, count_rows, is_parquet};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Usage;
use super::input::{self, Body, Place, Reading, Record};

/// Lines that are read before anyone has asked for them: a few calls' worth.
const AHEAD: usize = 512;

/// A line that can not be understood.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    pub(crate) place: Place,
    pub(crate) reason: String,
    /// Whether the file cannot be read any further.
    pub(crate) is_last: bool,
}

/// A line, understood or not.
pub(crate) type ReadLine = Result<Record, Broken>;

/// Which part of the files is read, and how.
#[derive(Args, Clone)]
pub(crate) struct SourceArgs {
    /// Read Human: and Assistant: markers in strings as turns of a conversation
    #[arg(long)]
    pub(crate) split_turns: bool,
    /// Stop after this many lines of the input
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
}

impl SourceArgs {
    pub(crate) fn reading(&self) -> Reading {
        Reading { split_turns: self.split_turns, raw: false }
    }
}

/// The files to read: those given, or standard input if it is not a terminal.
pub(crate) fn files_or_stdin(files: Vec<PathBuf>) -> Result<Vec<PathBuf>, Usage> {
    if files.is_empty() && io::stdin().is_terminal() {
        return Err(Usage("nothing to do: name a file, or - for standard input; --help shows examples".into()));
    }
    let files = if files.is_empty() { vec!["-".into()] } else { files };
    for file in &files {
        if !is_stdin(file) {
            File::open(file).map_err(|e| Usage(format!("{}: {e}", file.display())))?;
        }
    }
    Ok(files)
}

/// The lines of all files in their order. Dropping the stream stops the reading.
pub(crate) fn read(files: Vec<PathBuf>, reading: Reading, limit: Option<u64>) -> ReceiverStream<ReadLine> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut left = limit.unwrap_or(u64::MAX);
        for file in files {
            let mut send = |line| {
                left = left.saturating_sub(1);
                sender.blocking_send(line).is_ok() && left > 0
            };
            if limit == Some(0) || !read_file(&file, reading, &mut send) {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Sends every line of a file until `send` has enough, in which case the answer is false.
pub(crate) fn read_file(path: &Path, reading: Reading, send: &mut dyn FnMut(ReadLine) -> bool) -> bool {
    let file: Arc<Path> = path.into();
    let place = |line| Place { file: Some(file.clone()), line };
    let last = |line, error: io::Error| Err(Broken { place: place(line), reason: error.to_string(), is_last: true });
    let lines = match lines(path) {
        Ok(lines) => lines,
        Err(error) => return send(last(0, error)),
    };
    for (number, line) in (1..).zip(lines) {
        let line = match line {
            Ok(line) if line.trim_ascii().is_empty() => continue,
            Ok(line) => line,
            // The rest of a damaged archive is lost; the other files are not.
            Err(error) => return send(last(number, error)),
        };
        let place = place(number);
        let read = match input::parse(line.trim_ascii(), reading) {
            Ok((id, body)) => Ok(Record { place, id, body }),
            Err(reason) => Err(Broken { place, reason, is_last: false }),
        };
        if !send(read) {
            return false;
        }
    }
    true
}

/// The lines of a file, or the rows of a Parquet file as such.
fn lines(path: &Path) -> io::Result<Box<dyn Iterator<Item = io::Result<Vec<u8>>>>> {
    Ok(match is_parquet(path) {
        true => Box::new(Rows::open_columns(path, input::KEYS)?),
        false => Box::new(open(path)?.split(b'\n')),
    })
}

/// How many rows or lines that are not blank the files have; `None` if one of them can be read only once.
pub(crate) fn count_lines(files: &[PathBuf]) -> Option<u64> {
    if files.iter().any(|file| is_stdin(file)) {
        return None;
    }
    let mut count = 0;
    for file in files {
        if is_parquet(file) {
            count += count_rows(file).ok()?;
            continue;
        }
        let mut lines = open(file).ok()?;
        let mut is_blank = true;
        // Without holding a line: it may be longer than anybody wants to read.
        loop {
            let bytes = lines.fill_buf().ok()?;
            if bytes.is_empty() {
                break;
            }
            for byte in bytes {
                // A line counts when its first character is seen.
                count += u64::from(is_blank && !byte.is_ascii_whitespace());
                is_blank = *byte == b'\n' || is_blank && byte.is_ascii_whitespace();
            }
            let n = bytes.len();
            lines.consume(n);
        }
    }
    Some(count)
}

/// Records from texts on the command line.
pub(crate) fn records(bodies: impl IntoIterator<Item = Body>) -> Vec<ReadLine> {
    let place = |i| Place { file: None, line: i as u64 + 1 };
    bodies.into_iter().enumerate().map(|(i, body)| Ok(Record { place: place(i), id: None, body })).collect()
}

/// Opens a file, and unpacks it if its name says that it is packed.
pub(crate) fn open(path: &Path) -> io::Result<Box<dyn BufRead>> {
    const BUFFER: usize = 1 << 16;
    if is_stdin(path) {
        return Ok(Box::new(BufReader::with_capacity(BUFFER, io::stdin())));
    }
    let file = File::open(path)?;
    let bytes: Box<dyn Read> = match path.extension().and_then(OsStr::to_str) {
        Some("gz") => Box::new(MultiGzDecoder::new(file)),
        Some("zst") => Box::new(zstd::Decoder::new(file)?),
        _ => Box::new(file),
    };
    Ok(Box::new(BufReader::with_capacity(BUFFER, bytes)))
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use tokio_stream::StreamExt;

    use super::*;

    const LINES: &str = "{\"text\": \"a\"}\n\nnot json\n{\"text\": \"b\", \"id\": 7}";

    async fn collect(files: &[&Path], limit: Option<u64>) -> Vec<String> {
        let files = files.iter().map(|f| f.to_path_buf()).collect();
        let show = |read: ReadLine| match read {
            Ok(record) => format!("{} {:?}", record.place.line, record.id),
            Err(broken) => format!("{} broken", broken.place.line),
        };
        read(files, Reading::default(), limit).map(show).collect().await
    }

    #[tokio::test]
    async fn plain_packed_and_broken_files() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, packed, cut) =
            (folder.path().join("a.jsonl"), folder.path().join("a.jsonl.gz"), folder.path().join("c.gz"));
        std::fs::write(&plain, LINES).unwrap();
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(LINES.as_bytes()).unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&packed, &bytes).unwrap();
        std::fs::write(&cut, &bytes[..4]).unwrap();
        let zst = folder.path().join("a.jsonl.zst");
        std::fs::write(&zst, zstd::encode_all(LINES.as_bytes(), 0).unwrap()).unwrap();

        let expect = ["1 None", "3 broken", "4 Some(Number(7))"];
        assert_eq!(collect(&[&plain], None).await, expect);
        assert_eq!(collect(&[&packed], None).await, expect);
        assert_eq!(collect(&[&zst], None).await, expect);
        assert_eq!(collect(&[&cut, &plain], None).await, [&["1 broken"], expect.as_slice()].concat());
        assert_eq!(collect(&[&plain, &packed], Some(4)).await, [expect.as_slice(), &["1 None"]].concat());
        assert_eq!(collect(&[&plain], Some(0)).await, [""; 0]);
        assert_eq!(count_lines(&[plain, packed]), Some(6));
        assert_eq!(count_lines(&["-".into()]), None);
    }
}
