//! `plumb-train publish`, killed at random points: a version is whole or it is not there.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use plumb_model::checkpoint::manifest::Manifest;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A file beside the weights that takes so long to copy, sync and hash that half of the kills find it half-way.
const LARGE: usize = 24 << 20;
const KILLS: usize = 20;

fn source(folder: &Path) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-pm");
    for entry in std::fs::read_dir(fixture).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(folder.join("optimizer.bin"), vec![7; LARGE]).unwrap();
}

fn publish(source: &Path, root: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plumb-train"));
    command.args(["publish", source.to_str().unwrap(), root.to_str().unwrap(), "--name", "pm"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What lies beside the versions, by whether it is one.
fn entries(root: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(root.join("pm")) else { return Default::default() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.partition(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'))
}

/// Every visible version is whole; the answer is how many there are.
fn verify(root: &Path) -> usize {
    let (versions, _) = entries(root);
    for version in &versions {
        let manifest = Manifest::read(version).unwrap().unwrap_or_else(|| unreachable!("{version:?} has no manifest"));
        manifest.verify(version).unwrap();
        assert_eq!(manifest.probes().len(), 4, "{version:?}");
        assert_eq!(manifest.files().len(), std::fs::read_dir(version).unwrap().count() - 1, "{version:?}");
    }
    versions.len()
}

/// Waits for a draft, or the end.
fn begun(child: &mut Child, root: &Path) {
    while entries(root).1.is_empty() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn publishing_that_is_killed_never_leaves_half_a_version() {
    let (folder, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    source(folder.path());
    let root = root.path();
    // How long a whole one takes, from its start and from its first file on.
    let start = Instant::now();
    let mut child = publish(folder.path(), root);
    begun(&mut child, root);
    let writing = Instant::now();
    finish(child);
    let (whole, writing) = (start.elapsed(), writing.elapsed());
    assert_eq!(verify(root), 1);

    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut half_way = 0;
    for kill in 0..KILLS {
        let mut child = publish(folder.path(), root);
        // At any moment, and more often while files are written.
        let span = if kill % 4 == 0 { whole } else { writing };
        if kill % 4 != 0 {
            begun(&mut child, root);
        }
        std::thread::sleep(span.mul_f64(random.random_range(0.0..1.1)));
        child.kill().unwrap();
        child.wait().unwrap();
        let before = verify(root);
        half_way += usize::from(!entries(root).1.is_empty());
        finish(publish(folder.path(), root));
        assert_eq!(verify(root), before + 1, "the next one is published");
        assert_eq!(entries(root).1, Vec::<PathBuf>::new(), "nothing is left of the one that was killed");
        // Room on the disk.
        for version in entries(root).0 {
            std::fs::remove_dir_all(version).unwrap();
        }
    }
    assert!(half_way > 0, "no kill found a version half-way");
}
