//! The folder of recorded calls: files named by the time of their first record, packed when they have ended, the oldest given up
//! for new ones.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;
use time::format_description::well_known::iso8601::{Config, EncodedConfig, TimePrecision};

use super::lines::Files;
use crate::config::Recording;
use crate::telemetry::events::RecordingFailed;

/// How files begin, in front of their time.
const PREFIX: &str = "plumb-";
const PLAIN: &str = ".jsonl";
const PACKED: &str = ".jsonl.zst";
const TEMPORARY: &str = ".tmp";
/// Held by the server that writes: two would give up each other's files.
const LOCK: &str = "lock";
/// zstd's own default; text shrinks to a third or a quarter.
const LEVEL: i32 = 3;

const STAMP: Config =
    Config::DEFAULT.set_time_precision(TimePrecision::Second { decimal_digits: std::num::NonZero::new(6) });
const WITH_SEPARATORS: EncodedConfig = STAMP.encode();
const WITHOUT_SEPARATORS: EncodedConfig = STAMP.set_use_separators(false).encode();

/// The folder, and the right to write to it.
pub(super) struct Folder {
    path: PathBuf,
    keep: usize,
    packer: Option<Sender<PathBuf>>,
    #[expect(dead_code, reason = "only held")]
    lock: Arc<File>,
}

/// A file that is being written.
pub(super) struct Growing {
    file: File,
    path: PathBuf,
}

impl Folder {
    /// Makes the folder if it is not there, and tidies up after an earlier server that was killed.
    pub(super) fn open(recording: &Recording) -> io::Result<Self> {
        let path = recording.folder.clone();
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let lock = own(OpenOptions::new().create(true)).open(path.join(LOCK))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::other("another server records into this folder; give each its own"),
            TryLockError::Error(error) => error,
        })?;
        let lock = Arc::new(lock);
        let unpacked = tidy(&path)?;
        let packer = recording.compress.then(|| start_packer(Arc::clone(&lock))).transpose()?;
        if let Some(packer) = &packer {
            // The thread is there.
            unpacked.into_iter().for_each(|file| drop(packer.send(file)));
        }
        Ok(Self { path, keep: recording.keep, packer, lock })
    }

    /// Gives up the oldest files, so that there is room for a new one.
    fn thin_out(&self) -> io::Result<()> {
        // One that is just being packed is there twice.
        let plain = |path: PathBuf| if ends_with(&path, PACKED) { path.with_extension("") } else { path };
        let files: BTreeSet<_> = recorded(&self.path)?.into_iter().map(plain).collect();
        let too_many = (files.len() + 1).saturating_sub(self.keep);
        files.iter().take(too_many).try_for_each(|file| {
            remove(file)?;
            remove(packed(file)).map(drop)
        })
    }
}

impl Files for Folder {
    type File = Growing;

    fn create(&mut self) -> io::Result<Growing> {
        self.thin_out()?;
        let mut now = SystemTime::now();
        let growing = loop {
            let path = self.path.join(format!("{PREFIX}{}{PLAIN}", name_stamp(now)));
            match own(OpenOptions::new().create_new(true)).open(&path) {
                Ok(file) => break Growing { file, path },
                // A clock that was set back.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => now += Duration::from_micros(1),
                Err(error) => return Err(error),
            }
        };
        Ok(growing)
    }

    fn finish(&mut self, growing: Growing) -> io::Result<()> {
        growing.file.sync_data()?;
        drop(growing.file);
        if let Some(packer) = &self.packer {
            // A packer that is gone leaves files as they are.
            let _ = packer.send(growing.path);
        }
        Ok(())
    }
}

impl io::Write for Growing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A time in UTC with microseconds, as RFC 3339 has it.
pub(super) fn stamp(time: SystemTime) -> String {
    // Fails for years of more than four digits.
    OffsetDateTime::from(time).format(&Iso8601::<WITH_SEPARATORS>).unwrap_or_default()
}

/// The same for the name of a file; names are in the order of times.
fn name_stamp(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Iso8601::<WITHOUT_SEPARATORS>).unwrap_or_default()
}

/// A file that others cannot read: it holds prompts.
fn own(options: &mut OpenOptions) -> &mut OpenOptions {
    options.write(true).mode(0o600)
}

fn ends_with(path: &Path, end: &str) -> bool {
    path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(end))
}

/// What a plain file becomes.
fn packed(path: &Path) -> PathBuf {
    path.with_extension("jsonl.zst")
}

/// Files of records, plain and packed, and no others.
fn recorded(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in folder.read_dir()? {
        files.push(entry?.path());
    }
    files.retain(|path| ends_with(path, PLAIN) || ends_with(path, PACKED));
    Ok(files)
}

/// Removes what was half packed, and what is there twice. Answers the files that are not packed.
fn tidy(folder: &Path) -> io::Result<Vec<PathBuf>> {
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if ends_with(&path, TEMPORARY) {
            remove(path)?;
        }
    }
    let mut unpacked: Vec<_> = recorded(folder)?.into_iter().filter(|path| ends_with(path, PLAIN)).collect();
    unpacked.sort();
    let (twice, once): (Vec<_>, Vec<_>) = unpacked.into_iter().partition(|path| packed(path).exists());
    twice.iter().try_for_each(|path| remove(path).map(drop))?;
    Ok(once)
}

/// Answers whether it was there.
fn remove(path: impl AsRef<Path>) -> io::Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Packs files, one after the other, beside the thread that writes. What it has not done when the server ends, the next one
/// does. Until then it holds the lock.
fn start_packer(lock: Arc<File>) -> io::Result<Sender<PathBuf>> {
    let (sender, receiver): (_, Receiver<PathBuf>) = channel();
    std::thread::Builder::new().name("plumb-pack".to_owned()).spawn(move || {
        for path in receiver {
            if let Err(error) = pack(&path) {
                RecordingFailed { what: &format_args!("{}: {error}", path.display()) }.emit();
            }
        }
        drop(lock);
    })?;
    Ok(sender)
}

/// Puts a packed file into a plain one's place. The packed one is whole before it has its name.
fn pack(path: &Path) -> io::Result<()> {
    let mut plain = match File::open(path) {
        Ok(file) => file,
        // Given up for a new one meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let temporary = path.with_extension("jsonl.zst.tmp");
    let file = own(OpenOptions::new().create(true).truncate(true)).open(&temporary)?;
    let written = zstd::stream::copy_encode(&mut plain, &file, LEVEL).and_then(|()| file.sync_data());
    if let Err(error) = written {
        remove(&temporary)?;
        return Err(error);
    }
    std::fs::rename(temporary, packed(path))?;
    if !remove(path)? {
        // Given up for a new one meanwhile, and not to come back.
        remove(packed(path))?;
    }
    Ok(())
}
