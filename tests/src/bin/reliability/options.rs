//! What every experiment can be told.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::load::Mix;

/// Options of every experiment.
#[derive(Args, Clone, Debug)]
pub(crate) struct Common {
    /// Small numbers, to see that everything works: figures of speed and size are not judged, and nothing is written.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Repeat the experiment so often: figures are medians over the runs, counts of what went wrong the worst.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub(crate) runs: u32,
    /// Seed of all that is drawn.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Folder with plumb-server and plumb-train [default: they are built, with the profile of this program].
    #[arg(long, value_name = "FOLDER")]
    pub(crate) binaries: Option<PathBuf>,
    /// Folder with a plumb-server that has faults on demand [default: it is built, into target/faults].
    #[arg(long, value_name = "FOLDER")]
    pub(crate) faulty_binaries: Option<PathBuf>,
    /// Folder with the checkpoints `pm`, a preference model, and `smollm2` or `lm`, a language model
    /// [default: the small models that come with the server].
    #[arg(long, env = "PLUMB_MODELS", value_name = "FOLDER")]
    models: Option<PathBuf>,
    /// JSONL files, packed or not, with the two sides of a dialogue as `chosen` and `rejected`, in the form of hh-rlhf
    /// [default: those of hh-rlhf in the folder that PLUMB_DATA names, else made-up ones].
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Dialogues that calls are drawn from [default: 500, quick 12].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(8..))]
    dialogues: Option<u32>,
    /// Threads that the server computes with [default: physical cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Where results are written.
    #[arg(long, default_value_os_t = root().join("tests/reliability/results"), value_name = "FOLDER")]
    pub(crate) results: PathBuf,
}

/// The repository.
pub(crate) fn root() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

impl Common {
    /// One of two values: the second for a quick run.
    pub(crate) fn or_quick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Load that keeps a server busy.
    pub(crate) fn mix(&self) -> Mix {
        self.or_quick(Mix::SATURATING, Mix::LIGHT)
    }

    /// Dialogues that calls are drawn from.
    pub(crate) fn dialogues(&self) -> usize {
        self.dialogues.unwrap_or(self.or_quick(500, 12)) as usize
    }

    /// The checkpoint of a preference model.
    pub(crate) fn preference_checkpoint(&self) -> PathBuf {
        self.models().join("pm")
    }

    /// The checkpoint of a language model.
    pub(crate) fn language_checkpoint(&self) -> PathBuf {
        let large = self.models().join("smollm2");
        if large.is_dir() { large } else { self.models().join("lm") }
    }

    /// Models and dialogues in words, without folders of this machine.
    pub(crate) fn material(&self) -> String {
        let named = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let models = match self.models {
            None => "the bundled models".to_owned(),
            Some(_) => {
                [self.preference_checkpoint(), self.language_checkpoint()].map(|path| named(&path)).join(" and ")
            }
        };
        let data = match (self.data.as_slice(), std::env::var_os("PLUMB_DATA")) {
            ([], None) => "that are made up".to_owned(),
            ([], Some(_)) => "of hh-rlhf".to_owned(),
            (files, _) => format!("of {}", files.iter().map(|file| named(file)).collect::<Vec<_>>().join(", ")),
        };
        format!("{models} and {} dialogues {data}", self.dialogues())
    }

    fn models(&self) -> PathBuf {
        self.models.clone().unwrap_or_else(|| root().join("server/models"))
    }

    /// Files with dialogues; empty where there are none.
    pub(crate) fn data(&self) -> Result<Vec<PathBuf>> {
        let Some(folder) = std::env::var_os("PLUMB_DATA").filter(|_| self.data.is_empty()) else {
            return Ok(self.data.clone());
        };
        let folder = Path::new(&folder).join("hh-rlhf");
        let entries = std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
        let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|file| file.to_string_lossy().contains(".jsonl"));
        files.sort();
        Ok(files)
    }
}
