//! What is written is there whole, or not at all.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes a file under a name of its own, which it then gives up for the right one.
pub(crate) fn write_file(path: &Path, content: &str) -> Result<()> {
    let unfinished = unfinished(path);
    let write = || {
        let mut file = fs::File::create(&unfinished)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().map_err(Error::io(path))
}

/// Lets `write` fill a folder, which takes the place of the named one when it is complete.
pub(crate) fn write_folder(folder: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let unfinished = unfinished(folder);
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished))?;
    }
    fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished))?;
    write(&unfinished)?;
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(Error::io(folder))?;
    }
    fs::rename(&unfinished, folder).map_err(Error::io(folder))
}

/// What something is called until it is complete.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    path.with_file_name(name)
}
