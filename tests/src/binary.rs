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
    // A build that failed is not tried again by every test.
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let folder = BUILT.get_or_init(|| env::var_os(FOLDER).map_or_else(build, |folder| Ok(folder.into())));
    let folder = folder.as_ref().unwrap_or_else(|errors| panic!("the binaries do not build:\n{errors}"));
    folder.join(name).with_extension(env::consts::EXE_EXTENSION)
}

/// Builds with the profile and into the folder that this test was built with and into. Cargo holds no lock while it
/// runs tests, so that the second one does not wait for the first.
fn build() -> Result<PathBuf, String> {
    // <target>/<folder of the profile>/deps/<this test>
    let test = env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    let target = folder.parent().unwrap();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The very build that `cargo test --workspace` has just done, so that there it is over at once: with other packages
    // cargo would choose other features for what they depend on, and build that again.
    cargo
        .args(["test", "--quiet", "--workspace", "--no-run"])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")])
        .arg("--target-dir")
        .arg(target);
    let profile = folder.file_name().and_then(|name| name.to_str()).unwrap();
    if profile != "debug" {
        cargo.args(["--profile", profile]);
    }
    let output = cargo.output().unwrap();
    match output.status.success() {
        true => Ok(folder.to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
