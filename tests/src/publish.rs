//! Publishes checkpoints as a trainer does.

use std::path::Path;
use std::process::Command;

use crate::binary;

/// Publishes a checkpoint below a root with `plumb-train publish`.
///
/// # Panics
/// If that does not succeed.
pub fn publish(checkpoint: &Path, root: &Path, model: &str) {
    let output = Command::new(binary("plumb-train"))
        .arg("publish")
        .arg(checkpoint)
        .arg(root)
        .args(["--name", model])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
