//! The programs under test. Cargo names only the binaries of a test's own package, so they are built here.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// Set to a folder that holds the binaries, nothing is built.
const FOLDER: &str = "PLUMB_TEST_BINARIES";

/// Path of `plumb-server` or `plumb`, as the working tree has it.
///
/// # Panics
/// If it does not build.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| env::var_os(FOLDER).map_or_else(build, PathBuf::from));
    folder.join(name).with_extension(env::consts::EXE_EXTENSION)
}

/// Builds with the profile and into the folder that this test was built with and into. Cargo holds no lock while it
/// runs tests, so that the second one does not wait for the first.
fn build() -> PathBuf {
    // <target>/<folder of the profile>/deps/<this test>
    let test = env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    let target = folder.parent().unwrap();
    let profile = match folder.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        other => other,
    };
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--package", "plumb-server", "--package", "plumb-client", "--bins"])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")])
        .args(["--profile", profile, "--target-dir"])
        .arg(target)
        .output()
        .unwrap();
    assert!(output.status.success(), "the binaries do not build:\n{}", String::from_utf8_lossy(&output.stderr));
    folder.to_owned()
}
