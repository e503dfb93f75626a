//! The programs under test: real ones, as they are built for a release.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::options::{Common, root};
use crate::surface;

/// Where the programs are.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// `plumb-server`.
    pub(crate) server: PathBuf,
    /// The same with faults on demand, where it is needed.
    pub(crate) faulty: Option<PathBuf>,
    /// `plumb-train`.
    pub(crate) train: PathBuf,
}

/// Finds or builds the programs; the server with faults on demand only where it is needed.
pub(crate) fn programs(common: &Common, needs_faults: bool) -> Result<Programs> {
    let folder = match &common.binaries {
        Some(folder) => folder.clone(),
        None => build(&["-p", "plumb-server", "-p", "plumb-trainer"], &target()?)?,
    };
    let faulty = match &common.faulty_binaries {
        _ if !needs_faults => None,
        Some(folder) => Some(program(folder, "plumb-server")?),
        None => {
            let what = ["-p", "plumb-server", "--features", surface::FAULTS_FEATURE];
            Some(program(&build(&what, &target()?.join("faults"))?, "plumb-server")?)
        }
    };
    Ok(Programs { server: program(&folder, "plumb-server")?, faulty, train: program(&folder, "plumb-train")? })
}

fn program(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing; name a folder that has it, or let it be built", path.display());
    }
    Ok(path.canonicalize()?)
}

/// `<target>` of `<target>/<profile>/reliability`.
fn target() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let target = program.ancestors().nth(2).context("this program is in no target folder; use --binaries")?;
    Ok(target.to_owned())
}

/// Builds with the profile of this program, and answers the folder of the programs.
fn build(what: &[&str], target: &Path) -> Result<PathBuf> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg("build").args(what).arg("--manifest-path").arg(root().join("Cargo.toml"));
    cargo.arg("--target-dir").arg(target);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    if profile == "release" {
        cargo.arg("--release");
    }
    if !cargo.status().context("cargo")?.success() {
        bail!("the programs under test do not build");
    }
    Ok(target.join(profile))
}
