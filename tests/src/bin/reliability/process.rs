//! What the system knows of a process, and signals to it.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Held {
    /// Physical memory, VmRSS.
    pub(crate) resident: u64,
    /// The part of it that is not backed by files: what was allocated, RssAnon.
    pub(crate) anonymous: u64,
    /// The most physical memory that it has had so far, VmHWM.
    pub(crate) peak: u64,
    /// Open file descriptors.
    pub(crate) descriptors: usize,
    /// Threads.
    pub(crate) threads: usize,
}

impl Held {
    /// Of a process that runs.
    pub(crate) fn by(pid: u32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}"));
        let status = std::fs::read_to_string(path.join("status")).context("the process has ended")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).context("no procfs as on Linux")
        };
        Ok(Self {
            resident: field("VmRSS")? << 10,
            anonymous: field("RssAnon")? << 10,
            peak: field("VmHWM")? << 10,
            descriptors: std::fs::read_dir(path.join("fd"))?.count(),
            threads: usize::try_from(field("Threads")?)?,
        })
    }
}

/// Sends SIGTERM.
pub(crate) fn terminate(pid: u32) -> Result<()> {
    signal(pid, Signal::TERM)
}

/// Sends SIGKILL.
pub(crate) fn kill(pid: u32) -> Result<()> {
    signal(pid, Signal::KILL)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no such process")?;
    kill_process(pid, signal).with_context(|| format!("signal to process {}", pid.as_raw_nonzero()))
}
