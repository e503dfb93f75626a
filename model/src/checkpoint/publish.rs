//! How a checkpoint becomes a version: copied and synced under a hidden name, then the manifest, and the folder gets its
//! number last, by a rename. Readers therefore see a whole version or none, whenever the publishing ends.
//!
//! What a process that was killed has left behind is removed by the next one that publishes beside it, see [`Draft`].

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::CONFIG;
use super::manifest::{MANIFEST, Manifest, Probe, files_of, io, is_file_name, sync_folder};
use crate::{Error, Result};

/// How the names of folders begin that are being written.
const DRAFT: &str = ".publishing-";

/// After how long a draft of another machine, whose locks are not seen here, has nobody who writes it any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Copies a checkpoint to `<root>/<model>/<version>/` and returns that folder. Without a `version` it becomes the one
/// after the highest there, or 1.
///
/// The copy is made in a hidden folder beside the versions, which a crash may leave behind and nothing reads. Files of
/// `added`, by name and content, are written beside the copies, in place of those that have the same name. The manifest
/// gets the `probes`.
///
/// # Errors
/// [`Error::InvalidInput`] for an unusable model name or a version that exists; [`Error::MissingFile`] if `source`
/// holds no `config.json`.
pub fn publish(
    source: &Path,
    root: &Path,
    model: &str,
    version: Option<u64>,
    added: &[(&str, &str)],
    probes: &[Probe],
) -> Result<PathBuf> {
    if !is_file_name(model) || model.starts_with('.') {
        return Err(Error::InvalidInput(format!("`{model}` cannot be the name of a model: it has to name one folder")));
    }
    if !source.join(CONFIG).is_file() {
        return Err(Error::MissingFile { path: source.to_owned(), what: CONFIG.to_owned() });
    }
    let versions = root.join(model);
    std::fs::create_dir_all(&versions).map_err(|error| io(&versions, error))?;
    if let Some(version) = version {
        refuse_existing(&versions.join(version.to_string()))?;
    }

    let draft = Draft::new(&versions)?;
    for (name, path) in files_of(source)? {
        if name != MANIFEST && added.iter().all(|(other, _)| name != *other) {
            copy_synced(&path, &draft.folder.join(name))?;
        }
    }
    for (name, content) in added {
        let path = draft.folder.join(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()
        };
        write().map_err(|error| io(&path, error))?;
    }
    Manifest::write(&draft.folder, probes)?;

    loop {
        let folder = versions.join(match version {
            Some(version) => version.to_string(),
            None => next_version(&versions)?.to_string(),
        });
        // A published folder is never empty, and a rename onto one that is not empty fails: no version is replaced,
        // even when two publish at once.
        match std::fs::rename(&draft.folder, &folder) {
            Ok(()) => {
                sync_folder(&versions)?;
                sync_folder(root)?;
                return Ok(folder);
            }
            Err(_) if version.is_none() && folder.exists() => continue,
            Err(error) => {
                refuse_existing(&folder)?;
                return Err(io(&folder, error));
            }
        }
    }
}

/// A version that is being written; removed unless it was renamed.
///
/// Its name has the id of this start of the kernel, and the folder is locked for as long as its process lives. Where the
/// id is the same the lock therefore tells whether anybody writes it; what another machine has left on a shared disk, or
/// this one before it was started anew, is told by its age.
struct Draft {
    folder: PathBuf,
    #[expect(dead_code, reason = "only held: the lock goes with it, or with the process")]
    lock: File,
}

impl Draft {
    fn new(versions: &Path) -> Result<Self> {
        // Between the making of a draft and its lock nobody may take it for abandoned.
        let turn = File::open(versions).map_err(|error| io(versions, error))?;
        let alone = turn.lock().is_ok();
        let kernel = kernel_id();
        if alone {
            remove_abandoned(versions, &kernel)?;
        }
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let folder = versions.join(format!("{DRAFT}{kernel}-{}-{}", std::process::id(), started.as_nanos()));
        let make = || {
            std::fs::create_dir(&folder)?;
            let lock = File::open(&folder)?;
            // A file system without locks: nobody removes anything there.
            let _ = lock.try_lock();
            Ok(lock)
        };
        let lock = make().map_err(|error| io(&folder, error))?;
        Ok(Self { folder, lock })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Not there after the rename; otherwise the error that ends the publishing matters more than this one.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Removes the drafts that nobody writes any more.
fn remove_abandoned(versions: &Path, kernel: &str) -> Result<()> {
    for entry in std::fs::read_dir(versions).map_err(|error| io(versions, error))? {
        let entry = entry.map_err(|error| io(versions, error))?;
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(DRAFT)) else { continue };
        let Ok(folder) = File::open(entry.path()) else { continue };
        let free = !matches!(folder.try_lock(), Err(TryLockError::WouldBlock | TryLockError::Error(_)));
        let changed = folder.metadata().and_then(|metadata| metadata.modified()).ok();
        let old = changed.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > ABANDONED);
        if free && (old || (!kernel.is_empty() && rest.starts_with(&format!("{kernel}-")))) {
            // What cannot be removed only takes room.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Tells this start of this machine's kernel, within which locks are seen, from all others; empty where it has no id.
fn kernel_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.chars().filter(char::is_ascii_alphanumeric).collect()
}

fn refuse_existing(folder: &Path) -> Result<()> {
    if folder.exists() {
        let folder = folder.display();
        return Err(Error::InvalidInput(format!("{folder} exists; a published version never changes: choose another")));
    }
    Ok(())
}

fn next_version(versions: &Path) -> Result<u64> {
    let mut highest = 0;
    for entry in std::fs::read_dir(versions).map_err(|error| io(versions, error))? {
        let entry = entry.map_err(|error| io(versions, error))?;
        if let Some(version) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) {
            highest = highest.max(version);
        }
    }
    highest.checked_add(1).ok_or_else(|| Error::InvalidInput(format!("{}: versions are used up", versions.display())))
}

fn copy_synced(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to).map_err(|error| io(from, error))?;
    File::open(to).and_then(|file| file.sync_all()).map_err(|error| io(to, error))
}
