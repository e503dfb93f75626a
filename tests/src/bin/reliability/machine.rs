//! What the figures were measured on, as in the benchmarks: processor, memory, revision.

use std::process::Command;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::options::root;

/// Vector instructions that decide which kernels run.
const FLAGS: [&str; 4] = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];

/// A machine and a revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// When the run began.
    pub(crate) date: String,
    /// The commit.
    pub(crate) revision: String,
    /// Whether tracked files differed from it.
    pub(crate) changed: bool,
    /// The Rust compiler.
    pub(crate) compiler: String,
    /// Profile that this program was built with, and the programs that it built.
    pub(crate) profile: String,
    /// The processor and what it can.
    pub(crate) cpu: String,
    /// Cores that this process may use.
    pub(crate) cores: usize,
    /// All memory.
    pub(crate) memory_gib: f64,
    /// The kernel.
    pub(crate) kernel: String,
    /// Runnable processes over the last minute when the run began: those of others are noise.
    pub(crate) load_average: f64,
}

impl Machine {
    /// This one; what cannot be found out stays empty.
    pub(crate) fn here() -> Self {
        let root = root().to_string_lossy().into_owned();
        let git = |words: &[&str]| output("git", &[&["-C", &root], words].concat());
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let kib = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        Self {
            date: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            revision: git(&["rev-parse", "HEAD"]),
            changed: !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty(),
            compiler: output("rustc", &["--version"]),
            profile: if cfg!(debug_assertions) { "dev" } else { "release" }.to_owned(),
            cpu: cpu(&read("/proc/cpuinfo")),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: (kib.unwrap_or_default() / f64::from(1 << 20) * 10.0).round() / 10.0,
            kernel: output("uname", &["-sr"]),
            load_average: read("/proc/loadavg").split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default(),
        }
    }

    /// In a sentence.
    pub(crate) fn in_words(&self) -> String {
        let Self { cpu, cores, memory_gib, kernel, compiler, profile, .. } = self;
        let day = self.date.get(..10).unwrap_or_default();
        let revision = self.revision.get(..12).unwrap_or_default();
        let changed = if self.changed { " with changes" } else { "" };
        format!(
            "{day}, revision {revision}{changed}, profile {profile}, {compiler}, on {cpu}, {cores} cores, \
             {memory_gib} GiB, {kernel}."
        )
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// A name, and family and model too: virtual machines often keep the name short.
fn cpu(text: &str) -> String {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name));
        value.map(|(_, value)| value.trim()).unwrap_or_default()
    };
    let has: Vec<&str> = field("flags").split(' ').collect();
    let mut words = vec![format!("family {}, model {}", field("cpu family"), field("model"))];
    words.extend(FLAGS.iter().filter(|flag| has.contains(flag)).map(|flag| (*flag).to_owned()));
    format!("{} ({})", field("model name"), words.join(", "))
}
