//! What is written is there whole, or not at all.

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// Writes a file.
pub(crate) fn write_file(path: &Path, content: &str) -> Result<()> {
    let mut file = Whole::create(path)?;
    file.file.write_all(content.as_bytes()).map_err(Error::io(path))?;
    file.written()?.publish()
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

/// A file that has no name of its own before it is whole. It goes when this is dropped.
pub(crate) struct Whole {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

/// One that is on the disk and lacks its name.
pub(crate) struct Written {
    path: PathBuf,
    file: NamedTempFile,
}

impl Whole {
    /// Begins a file, beside where it will be.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // As of any other file; the crate's are for their owner alone.
        let permissions = Permissions::from_mode(0o666);
        let file = tempfile::Builder::new().prefix(".unfinished-").permissions(permissions).tempfile_in(folder);
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file.map_err(Error::io(path))?) })
    }

    /// Appends a line.
    pub(crate) fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.file, "{line}").map_err(Error::io(&self.path))
    }

    /// Nothing more comes.
    pub(crate) fn written(self) -> Result<Written> {
        let Self { path, file } = self;
        let file = file.into_inner().map_err(|error| Error::io(&path)(error.into_error()))?;
        File::sync_all(file.as_file()).map_err(Error::io(&path))?;
        Ok(Written { path, file })
    }
}

impl Written {
    /// Gives it its name.
    pub(crate) fn publish(self) -> Result<()> {
        let Self { path, file } = self;
        file.persist(&path).map_err(|error| Error::io(&path)(error.error))?;
        Ok(())
    }
}
