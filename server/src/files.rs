//! Small files that an operator changes under a running server: keys and certificates.
//!
//! Contents are compared, not times or inodes: Kubernetes mounts a secret through a symbolic link that it points
//! elsewhere, an editor renames, a script writes in place.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_secs(2);
/// A chain of certificates or a thousand tokens are a tenth of it.
const MAX_BYTES: u64 = 1 << 20;

/// Files, and what was in them when they were looked at last.
#[derive(Clone)]
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    seen: Vec<Option<[u8; 32]>>,
    interval: Duration,
}

impl Files {
    /// What is in them now. Taken before they are used, so that no change is missed.
    pub(crate) fn look(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let paths: Vec<_> = paths.into_iter().collect();
        let seen = digests(&paths);
        Self { paths, seen, interval: INTERVAL }
    }

    /// The same, looked at more often.
    #[cfg(test)]
    pub(crate) fn every(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Waits until one of them has another content; a file that cannot be read has none. For ever, if there are none.
    pub(crate) async fn changed(&mut self) {
        if self.paths.is_empty() {
            std::future::pending::<()>().await;
        }
        loop {
            tokio::time::sleep(self.interval).await;
            let paths = self.paths.clone();
            // A secret may lie on a network disk.
            let Ok(now) = tokio::task::spawn_blocking(move || digests(&paths)).await else { continue };
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }
}

/// The text of a small file; an error names it.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let named = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    let file = std::fs::File::open(path).map_err(|error| named(&error))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| named(&error))?;
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(named(&format!("has more than {MAX_BYTES} bytes"))),
        false => Ok(bytes),
    }
}

fn digests(paths: &[PathBuf]) -> Vec<Option<[u8; 32]>> {
    paths.iter().map(|path| read(path).ok().map(|bytes| Sha256::digest(bytes).into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_content_is_a_change_however_it_came() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("1"), "old").unwrap();
        std::fs::write(at("2"), "new").unwrap();
        std::os::unix::fs::symlink(at("1"), at("link")).unwrap();
        let mut files = Files::look([at("link")]).every(Duration::from_millis(5));
        std::fs::write(at("1"), "old").unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(50), files.changed()).await;
        assert!(waited.is_err(), "the same content is no change");
        std::os::unix::fs::symlink(at("2"), at("other")).unwrap();
        std::fs::rename(at("other"), at("link")).unwrap();
        files.changed().await;
        std::fs::write(at("2"), "newer").unwrap();
        files.changed().await;
        std::fs::remove_file(at("2")).unwrap();
        files.changed().await;
    }

    #[test]
    fn a_file_that_is_too_large_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'x'; MAX_BYTES as usize + 1]).unwrap();
        assert!(read(file.path()).unwrap_err().contains("more than 1048576 bytes"));
        assert!(read(Path::new("/nowhere/key")).unwrap_err().starts_with("/nowhere/key: "));
    }
}
