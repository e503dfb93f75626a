//! How the bytes of a checkpoint come from its files: all of them come this way, at the rate that is allowed, and with
//! the faults that a test asks for.
//!
//! A load reads its weights twice: once to compare their digests with the manifest's, before anything is made of them,
//! and once, from the page cache where there is room for them, to pack them. Both count against the rate, since the
//! second one takes memory bandwidth from those who compute.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::faults::{Fault, asked};
use crate::{Error, Result};

/// Bytes that are read at a time, and between two of which a slowed load waits.
const CHUNK: usize = 1 << 20;

/// Opens files. Clones share the rate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reader(Option<Arc<Mutex<Throttle>>>);

impl Reader {
    /// Reads so many bytes a second, or as fast as the disk does.
    pub(crate) fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        Self(bytes_per_second.map(|rate| Arc::new(Mutex::new(Throttle { rate, free: Instant::now() }))))
    }

    pub(super) fn open(&self, path: &Path) -> Result<Bytes> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        // Before it is opened: opening a pipe waits for a writer, maybe for ever.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::Malformed { path: path.to_owned(), reason: "not a plain file".to_owned() });
        }
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let length = asked(Fault::ShortRead).map_or(length, |most| length.min(most));
        Ok(Bytes { path: path.to_owned(), file, length, reader: self.clone() })
    }

    /// The sha256 of a file, in hexadecimal.
    pub(super) fn digest(&self, path: &Path) -> Result<String> {
        let file = self.open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < file.length {
            let chunk = &mut buffer[..CHUNK.min((file.length - done) as usize)];
            file.read_exact_at(chunk, done)?;
            hasher.update(&*chunk);
            done += chunk.len() as u64;
        }
        Ok(hex::encode(hasher.finalize()))
    }

    fn wait(&self, bytes: usize) {
        let throttled = self
            .0
            .as_ref()
            .map(|throttle| throttle.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, Instant::now()));
        let slow = asked(Fault::SlowRead).map(Duration::from_millis);
        if let Some(wait) = [throttled, slow].into_iter().flatten().reduce(|a, b| a + b)
            && !wait.is_zero()
        {
            std::thread::sleep(wait);
        }
    }
}

/// The whole of a small file, at most so many bytes.
pub(super) fn whole(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = Reader::default().open(path)?;
    if file.length > most {
        let reason = format!("{} bytes, {most} are allowed", file.length);
        return Err(Error::Malformed { path: path.to_owned(), reason });
    }
    let mut bytes = vec![0; file.length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The whole of a small file of text, at most so many bytes.
pub(super) fn text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(whole(path, most)?)
        .map_err(|error| Error::Malformed { path: path.to_owned(), reason: format!("not UTF-8: {error}") })
}

/// An open file of a checkpoint.
#[derive(Debug)]
pub(super) struct Bytes {
    path: PathBuf,
    file: File,
    length: u64,
    reader: Reader,
}

impl Bytes {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` with what stands from `offset` on.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the file ends before.
    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let too_short = || {
            let reason = format!("it ends after {} bytes, which is too early: copy it again", self.length);
            Error::Malformed { path: self.path.clone(), reason }
        };
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.length) {
            return Err(too_short());
        }
        let mut offset = offset;
        for chunk in buffer.chunks_mut(CHUNK) {
            self.reader.wait(chunk.len());
            self.file.read_exact_at(chunk, offset).map_err(|error| match error.kind() {
                // Somebody has cut it since it was opened.
                io::ErrorKind::UnexpectedEof => too_short(),
                _ => Error::Io { path: self.path.clone(), source: error },
            })?;
            if let Some(at) = asked(Fault::CorruptByte).and_then(|at| at.checked_sub(offset))
                && let Some(byte) = usize::try_from(at).ok().and_then(|at| chunk.get_mut(at))
            {
                *byte = !*byte;
            }
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// The same as a stream, for readers of formats that want one.
    pub(super) fn stream(&self) -> Stream<'_> {
        Stream { bytes: self, at: 0 }
    }
}

/// A place in a file.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    bytes: &'a Bytes,
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.length.saturating_sub(self.at);
        let len = (buffer.len() as u64).min(left) as usize;
        self.bytes.read_exact_at(&mut buffer[..len], self.at).map_err(|error| match error {
            Error::Io { source, .. } => source,
            error => io::Error::other(error.to_string()),
        })?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Stream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.bytes.length.checked_add_signed(by),
        };
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Spreads reads over time.
#[derive(Debug)]
struct Throttle {
    /// Bytes a second.
    rate: NonZeroU64,
    /// When what has been taken is paid for.
    free: Instant,
}

impl Throttle {
    /// How long to wait before so many bytes are read.
    fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let wait = self.free.saturating_duration_since(now);
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate.get() as f64);
        self.free = self.free.max(now) + cost;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_spread_over_time() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut throttle = Throttle { rate: NonZeroU64::new(1000).unwrap(), free: start };
        // Now, bytes, and the wait before them, in milliseconds.
        for (now, bytes, wait) in
            [(0, 100, 0), (0, 100, 100), (150, 50, 50), (250, 10, 0), (1000, 500, 0), (1000, 1, 500)]
        {
            assert_eq!(throttle.take(bytes, at(now)), Duration::from_millis(wait), "{bytes} bytes at {now} ms");
        }
    }

    #[test]
    fn a_stream_reads_what_the_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let content: Vec<u8> = (0..2 * CHUNK + 3).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = Reader::new(NonZeroU64::new(1 << 40)).open(&path).unwrap();
        let mut stream = file.stream();
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        assert!(read == content);
        assert_eq!(stream.seek(SeekFrom::End(-3)).unwrap(), content.len() as u64 - 3);
        assert!(stream.seek(SeekFrom::Current(i64::MIN)).is_err());
        let mut four = [0; 4];
        assert!(stream.read_exact(&mut four).is_err(), "three are left");
        let error = file.read_exact_at(&mut four, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("too early"), "{error}");
        assert_eq!(Reader::default().digest(&path).unwrap(), hex::encode(Sha256::digest(&content)));
        assert!(whole(&path, 1 << 20).unwrap_err().to_string().contains("are allowed"));
    }

    #[test]
    fn what_is_no_plain_file_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("pipe", &link).unwrap();
        for path in [pipe.as_path(), &link, folder.path(), Path::new("/dev/zero")] {
            let error = Reader::default().open(path).unwrap_err().to_string();
            assert!(error.contains("not a plain file"), "{error}");
        }
    }
}
