//! How an experiment is carried out: what it is given, and what becomes of its figures.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use crate::checkpoint;
use crate::dialogues::dialogues;
use crate::expected::{Expected, Judge, LM, PM, Reference};
use crate::load::Tally;
use crate::machine::Machine;
use crate::options::Common;
use crate::programs::{Programs, programs};
use crate::report::{Measure, Report};
use crate::server::Launch;
use crate::surface::Faults;

/// An experiment, with its options.
pub(crate) trait Experiment {
    /// The subcommand.
    const NAME: &'static str;
    /// What it shows.
    const TITLE: &'static str;
    /// Whether models are asked about dialogues.
    const ASKS: bool = true;
    /// Whether its server needs faults on demand.
    const FAULTY: bool = false;

    /// The options that all have.
    fn common(&self) -> &Common;

    /// What is done, in sentences.
    fn what(&self) -> String;

    /// What has to happen while the process has a single thread: later threads inherit it.
    fn before_threads(&self) -> Result<()> {
        Ok(())
    }

    /// Does it once.
    async fn run(&self, context: &Context) -> Result<Vec<Measure>>;
}

/// What a run is given.
pub(crate) struct Context {
    /// The options that all have.
    pub(crate) common: Common,
    /// The programs under test.
    pub(crate) programs: Programs,
    /// Of this run.
    pub(crate) seed: u64,
    folder: TempDir,
    bar: ProgressBar,
}

/// Runs an experiment as often as is asked, shows the figures and writes them; answers whether all bars are met.
pub(crate) fn conduct<E: Experiment>(experiment: &E) -> Result<bool> {
    let common = experiment.common();
    let programs = programs(common, E::FAULTY)?;
    let machine = Machine::here();
    experiment.before_threads()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    eprintln!("{}: {}", E::NAME, experiment.what());
    let began = Instant::now();
    let mut runs = Vec::new();
    for run in 0..common.runs {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(200));
        let folder = tempfile::Builder::new().prefix("plumb-reliability-").tempdir()?;
        let seed = common.seed + u64::from(run);
        let context = Context { common: common.clone(), programs: programs.clone(), seed, folder, bar };
        let measures = runtime.block_on(experiment.run(&context));
        context.bar.finish_and_clear();
        runs.push(measures.with_context(|| format!("run {} of {}", run + 1, common.runs))?);
    }
    let report = Report {
        experiment: E::NAME.to_owned(),
        title: E::TITLE.to_owned(),
        what: experiment.what(),
        command: command(),
        material: if E::ASKS { common.material() } else { String::new() },
        machine,
        seed: common.seed,
        seconds: began.elapsed().as_secs_f64().round(),
        runs,
    };
    println!("{}", report.table(common.quick));
    if !common.quick {
        println!("written to {}", report.write(&common.results)?.display());
    }
    let missed = report.missed(common.quick);
    missed.iter().for_each(|line| eprintln!("{line}"));
    Ok(missed.is_empty())
}

/// The command line, as one would type it elsewhere: without folders of this machine.
fn command() -> String {
    format!("cargo run --release -p plumb-tests --bin reliability -- {}", without_folders(std::env::args().skip(1)))
}

fn without_folders(mut arguments: impl Iterator<Item = String>) -> String {
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--binaries" | "--faulty-binaries" | "--results" => drop(arguments.next()),
            _ => kept.push(argument),
        }
    }
    kept.join(" ")
}

impl Context {
    /// One of two values: the second for a quick run.
    pub(crate) fn or_quick<T>(&self, full: T, quick: T) -> T {
        self.common.or_quick(full, quick)
    }

    /// For all that a run writes.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A generator of its own for every purpose.
    pub(crate) fn rng(&self, purpose: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(purpose);
        rng
    }

    /// Begins to count towards a number of things.
    pub(crate) fn begin(&self, total: u64, things: &str) {
        let template = format!("{{elapsed_precise}} {{wide_bar}} {{human_pos}}/{{human_len}} {things} {{msg}}");
        self.bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.bar.set_message("");
        self.bar.set_length(total);
        self.bar.set_position(0);
    }

    /// One more of them is done.
    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }

    /// So many of them are done.
    pub(crate) fn at(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Says something beside the bar.
    pub(crate) fn message(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Writes a line without tearing the bar.
    pub(crate) fn note(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Shows what went wrong with calls, if anything did.
    pub(crate) fn show(&self, tally: &Tally) {
        tally.examples.iter().for_each(|example| self.note(&format!("  {example}")));
    }

    /// A server of the program under test.
    pub(crate) fn launch(&self) -> Launch {
        Launch::of(&self.programs.server).threads(self.common.threads)
    }

    /// A server with faults on demand.
    pub(crate) fn launch_faulty(&self, faults: &Faults) -> Result<Launch> {
        let program = self.programs.faulty.as_ref().context("the experiment has no server with faults")?;
        let file = faults.0.display().to_string();
        Ok(Launch::of(program).threads(self.common.threads).variable(Faults::VARIABLE, file))
    }

    /// Waits a while, seen on the bar.
    pub(crate) async fn pause(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Makes variants of both checkpoints and computes what they have to answer.
    pub(crate) async fn cast(&self, preference: u64, language: u64) -> Result<Cast> {
        self.begin(2 * (preference + language), "variants and their scores");
        let make = |name: &str, from: &Path, count: u64| -> Result<Vec<PathBuf>> {
            let folders = (0..count).map(|number| {
                let folder = self.folder().join(format!("{name}-{number}"));
                checkpoint::variant(from, &folder, number)?;
                self.step();
                Ok(folder)
            });
            folders.collect()
        };
        let preference = make(PM, &self.common.preference_checkpoint(), preference)?;
        let language = make(LM, &self.common.language_checkpoint(), language)?;
        self.cast_of(preference, language).await
    }

    /// Computes what these checkpoints have to answer.
    pub(crate) async fn cast_of(&self, preference: Vec<PathBuf>, language: Vec<PathBuf>) -> Result<Cast> {
        let reference = Reference {
            program: &self.programs.server,
            threads: self.common.threads,
            preference: &preference,
            language: &language,
            dialogues: dialogues(&self.common.data()?, self.common.dialogues(), self.seed)?,
        };
        let expected = Expected::compute(reference, self.folder(), || self.step()).await?;
        Ok(Cast { judge: Arc::new(Judge::new(expected)), preference, language })
    }
}

/// Checkpoints and who knows what they answer.
pub(crate) struct Cast {
    /// Knows what is right.
    pub(crate) judge: Arc<Judge>,
    /// Variants of the preference model.
    pub(crate) preference: Vec<PathBuf>,
    /// Variants of the language model.
    pub(crate) language: Vec<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_names_no_folder_of_this_machine() {
        let arguments = ["swaps", "--binaries", "/a", "--runs", "3", "--results", "/b"].map(str::to_owned);
        assert_eq!(without_folders(arguments.into_iter()), "swaps --runs 3");
    }
}
