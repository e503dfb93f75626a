//! Files for the time of one input.

use std::path::Path;

use tempfile::TempDir;

/// A folder with these files; `run.sh` has it in memory.
pub(crate) fn with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).expect("a temporary file");
    }
    folder
}

/// The path of a fixture.
pub(crate) fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name).to_string_lossy().into_owned()
}
