//! Whole lines into one file after another, whatever the disk does.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Bytes that are worth a write.
const WORTH_A_WRITE: usize = 64 << 10;
/// Most bytes that wait while writing fails; what comes then is not taken.
const MAX_UNWRITTEN: usize = 1 << 20;

/// Where files come from and go to.
pub(super) trait Files {
    /// A file that is being written.
    type File: Write;

    /// A new one.
    fn create(&mut self) -> io::Result<Self::File>;

    /// It has all its lines.
    fn finish(&mut self, file: Self::File) -> io::Result<()>;
}

/// Writes lines. A write that fails is tried again with the next line, from the byte on where it failed: no line is broken by
/// a disk that was full for a while.
pub(super) struct Lines<F: Files> {
    files: F,
    max_bytes: u64,
    max_age: Duration,
    current: Option<Current<F::File>>,
    /// Whole lines, of which the first `written` bytes are in the file.
    waiting: Vec<u8>,
    written: usize,
}

struct Current<T> {
    file: T,
    bytes: u64,
    since: Instant,
}

impl<F: Files> Lines<F> {
    /// Files end before they are larger than `max_bytes`, unless a single line is, and once they are `max_age` old.
    pub(super) fn new(files: F, max_bytes: u64, max_age: Duration) -> Self {
        Self { files, max_bytes, max_age, current: None, waiting: Vec::new(), written: 0 }
    }

    /// Takes a line, with its line break.
    ///
    /// # Errors
    /// If it was not taken, because those before it cannot be written.
    pub(super) fn push(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        let unwritten = self.unwritten();
        let bytes = self.current.as_ref().map_or(0, |current| current.bytes) + unwritten as u64;
        let tried = if bytes > 0 && bytes + line.len() as u64 > self.max_bytes {
            self.flush(now).and_then(|()| self.finish())
        } else if unwritten >= WORTH_A_WRITE {
            self.flush(now)
        } else {
            Ok(())
        };
        // Trouble with the disk is no trouble yet while there is room.
        tried.or_else(|error| if self.unwritten() >= MAX_UNWRITTEN { Err(error) } else { Ok(()) })?;
        self.waiting.extend_from_slice(line);
        Ok(())
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// The disk's; nothing is lost yet.
    pub(super) fn flush(&mut self, now: Instant) -> io::Result<()> {
        if self.unwritten() == 0 {
            return Ok(());
        }
        let current = match &mut self.current {
            Some(current) => current,
            none => none.insert(Current { file: self.files.create()?, bytes: 0, since: now }),
        };
        while self.written < self.waiting.len() {
            match current.file.write(&self.waiting[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.written += n;
                    current.bytes += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.waiting.clear();
        // A long line's memory is not held for ever.
        self.waiting.shrink_to(MAX_UNWRITTEN);
        self.written = 0;
        Ok(())
    }

    /// Ends a file that is old enough, for whoever collects them.
    pub(super) fn finish_old(&mut self, now: Instant) -> io::Result<()> {
        let is_old =
            self.current.as_ref().is_some_and(|current| now.saturating_duration_since(current.since) >= self.max_age);
        if is_old { self.flush(now).and_then(|()| self.finish()) } else { Ok(()) }
    }

    /// Writes what waits and ends the file. Answers how many lines are lost, if that fails.
    pub(super) fn close(mut self, now: Instant) -> Result<(), (u64, io::Error)> {
        if let Err(error) = self.flush(now) {
            let lost = self.waiting[self.written..].iter().filter(|&&byte| byte == b'\n').count();
            return Err((lost as u64, error));
        }
        self.finish().map_err(|error| (0, error))
    }

    fn finish(&mut self) -> io::Result<()> {
        self.current.take().map_or(Ok(()), |current| self.files.finish(current.file))
    }

    fn unwritten(&self) -> usize {
        self.waiting.len() - self.written
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use super::*;

    /// A disk in memory, with so much room.
    #[derive(Clone, Default)]
    struct Disk {
        files: Rc<RefCell<Vec<Vec<u8>>>>,
        finished: Rc<Cell<usize>>,
        room: Rc<Cell<usize>>,
    }

    impl Files for Disk {
        type File = Self;

        fn create(&mut self) -> io::Result<Self> {
            self.files.borrow_mut().push(Vec::new());
            Ok(self.clone())
        }

        fn finish(&mut self, _: Self) -> io::Result<()> {
            self.finished.set(self.finished.get() + 1);
            Ok(())
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.room.get());
            if n == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room.set(self.room.get() - n);
            self.files.borrow_mut().last_mut().unwrap().extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Disk {
        fn with_room(bytes: usize) -> Self {
            let disk = Self::default();
            disk.room.set(bytes);
            disk
        }

        fn texts(&self) -> Vec<String> {
            self.files.borrow().iter().map(|file| String::from_utf8(file.clone()).unwrap()).collect()
        }
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn files_end_before_they_are_too_large_and_lines_stay_whole() {
        let (disk, now) = (Disk::with_room(usize::MAX), Instant::now());
        let mut lines = Lines::new(disk.clone(), 8, LONG);
        for line in ["abc\n", "def\n", "g\n", "a line of its own\n", "h\n"] {
            lines.push(line.as_bytes(), now).unwrap();
        }
        lines.close(now).unwrap();
        assert_eq!(disk.texts(), ["abc\ndef\n", "g\n", "a line of its own\n", "h\n"]);
        assert_eq!(disk.finished.get(), 4);
    }

    #[test]
    fn a_file_ends_when_it_is_old_and_no_empty_one_is_begun() {
        let (disk, now) = (Disk::with_room(usize::MAX), Instant::now());
        let mut lines = Lines::new(disk.clone(), u64::MAX, LONG);
        lines.finish_old(now + 2 * LONG).unwrap();
        lines.push(b"a\n", now).unwrap();
        lines.flush(now).unwrap();
        lines.finish_old(now + LONG / 2).unwrap();
        assert_eq!(disk.finished.get(), 0);
        lines.push(b"b\n", now).unwrap();
        lines.finish_old(now + LONG).unwrap();
        lines.finish_old(now + 3 * LONG).unwrap();
        assert_eq!((disk.texts(), disk.finished.get()), (vec!["a\nb\n".to_owned()], 1));
        lines.close(now).unwrap();
        assert_eq!(disk.texts().len(), 1);
    }

    #[test]
    fn a_full_disk_breaks_no_line_and_memory_is_bounded() {
        let (disk, now) = (Disk::with_room(6), Instant::now());
        let mut lines = Lines::new(disk.clone(), u64::MAX, LONG);
        lines.push(b"abc\n", now).unwrap();
        lines.push(b"def\n", now).unwrap();
        assert_eq!(lines.flush(now).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.texts(), ["abc\nde"]);
        let line = [vec![b'x'; WORTH_A_WRITE - 1], b"\n".to_vec()].concat();
        let mut taken = 0;
        while lines.push(&line, now).is_ok() {
            taken += 1;
        }
        assert!((taken - 1) * line.len() < MAX_UNWRITTEN && lines.unwritten() < MAX_UNWRITTEN + line.len(), "{taken}");
        disk.room.set(usize::MAX);
        lines.push(b"end\n", now).unwrap();
        lines.close(now).unwrap();
        let text = disk.texts().remove(0);
        assert_eq!(text.len(), 8 + taken * line.len() + 4);
        assert!(text.starts_with("abc\ndef\nxxx") && text.ends_with("x\nend\n"));
    }

    #[test]
    fn what_cannot_be_written_at_the_end_is_counted() {
        let (disk, now) = (Disk::with_room(4), Instant::now());
        let mut lines = Lines::new(disk.clone(), u64::MAX, LONG);
        for line in ["abc\n", "def\n", "ghi\n"] {
            lines.push(line.as_bytes(), now).unwrap();
        }
        assert_eq!(lines.close(now).unwrap_err().0, 2);
        assert_eq!(disk.texts(), ["abc\n"]);
    }
}
