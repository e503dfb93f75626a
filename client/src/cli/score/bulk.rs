//! `plumb score --output-dir`: a file of scores for each input file, exactly once however often the run was ended.
//!
//! A file's scores are written beside the manifests, put on disk, renamed to where they belong, and only then described
//! by a manifest. A run does what has no manifest, or one that does not fit; a lock keeps runs at the same time apart.
//! A run asks for one version by its number from start to end, and holds every answer's digest against it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::task::Poll;

use anyhow::{Context, anyhow};
use clap::Args;
use futures::{StreamExt, stream};
use parquet::errors::ParquetError;
use plumb_client::parquet::is_parquet;
use plumb_client::{Error, v1};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::manifest::{self, Input, Manifest, Output, Stamp, rename, sha256};
use super::table::{Keep, Table};
use super::target::{Sink, Target};
use super::{Report, ScoreArgs, slots};
use crate::cli::args::{Global, Priority};
use crate::cli::input::Reading;
use crate::cli::output::{Lines, describe, print, print_json};
use crate::cli::progress::Progress;
use crate::cli::scoring::{Scorer, is_passing};
use crate::cli::{Outcome, Usage, source};

/// Folders and files that begin so are none of the data's, to other programs too.
const MANIFESTS: &str = "_manifests";

/// How folders of files are scored.
#[derive(Args, Clone)]
pub(super) struct BulkArgs {
    /// Write a file of scores for each input file into this folder; a run that was ended goes on where it was
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["output", "text", "prompt", "per_token", "limit"])]
    output_dir: Option<PathBuf>,
    /// Columns of Parquet files to copy beside the scores; * is all [default: id, where there is one]
    #[arg(long, value_name = "COLUMN", value_delimiter = ',', requires = "output_dir")]
    keep: Vec<String>,
    /// Do the Ith of N shares of the files, I from 0: a share for each machine
    #[arg(long, value_name = "I/N", requires = "output_dir")]
    shard: Option<Share>,
    /// Score again what was scored with other options or by another version
    #[arg(long, requires = "output_dir")]
    overwrite: bool,
    /// Score files again in which a row has no score
    #[arg(long, requires = "output_dir")]
    retry_errors: bool,
    /// Let the version change while the run goes on; the rows say which one scored them
    #[arg(long, requires = "output_dir")]
    mixed_versions: bool,
}

impl BulkArgs {
    pub(super) fn is_asked_for(&self) -> bool {
        self.output_dir.is_some()
    }
}

/// One of `of` shares of the files.
#[derive(Clone, Copy, Debug)]
struct Share {
    index: u64,
    of: u64,
}

impl Share {
    /// By the name alone: whichever files come and go while the machines begin, each belongs to one of them.
    fn has(self, shard: &Shard) -> bool {
        let digest = Sha256::digest(shard.key.as_bytes());
        digest.first_chunk().copied().map_or(0, u64::from_be_bytes) % self.of == self.index
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        match parsed {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err("expected I/N with I from 0 to N - 1, such as 0/4".to_owned()),
        }
    }
}

pub(super) async fn run(global: &Global, args: ScoreArgs) -> anyhow::Result<Outcome> {
    let bulk = args.bulk;
    let folder = bulk.output_dir.clone().unwrap_or_default();
    let shards = shards(&args.files, &folder)?;
    if !bulk.keep.is_empty()
        && let Some(shard) = shards.iter().find(|shard| !is_parquet(&shard.source))
    {
        return Err(Usage(format!("--keep is for Parquet files, which {} is not", shard.source.display())).into());
    }
    let client = global.connect_patiently().await?;
    let scorer = args.scoring.scorer(&client, args.objective, args.hhh_prompt, false, Priority::Normal);
    let mut scorer = scorer.strict();
    let answers = scorer.model().await?;
    let mut asked = v1::ModelSpec { name: answers.name.clone(), choice: None };
    if bulk.mixed_versions {
        asked.choice = args.scoring.model.spec().choice;
    } else {
        scorer.pin(&answers);
    }
    let reading = args.source.reading();
    let options = json!({
        "model": asked,
        "request": scorer.options()?,
        "split_turns": reading.split_turns,
        "keep": bulk.keep,
    });
    let model = (!bulk.mixed_versions).then_some(answers);
    let (keep, turn) = (Keep::new(&bulk.keep), Arc::new(Semaphore::new(1)));
    let job = Job { scorer, model, reading, keep, options, turn, args: bulk };

    // Before anything is computed: what must not be done is said now, be it in another's share.
    let mut due = Vec::new();
    let mut counts = Counts::default();
    for shard in shards {
        let is_due = job.is_due(&shard)?;
        match job.args.shard.is_none_or(|share| share.has(&shard)) {
            true if is_due => due.push(shard),
            true => counts.before += 1,
            false => {}
        }
    }
    let files: Vec<_> = due.iter().map(|shard| shard.source.clone()).collect();
    let report = Report { model: job.model.clone(), ..Report::new(Progress::files(&files, None)) };
    let report = RefCell::new(report);
    let score = async |shard| (shard, job.score(shard, &report).await);
    let files_at_a_time = FILES.min(args.scoring.flow.concurrency as usize + 1);
    let mut work = Box::pin(stream::iter(&due).map(score).buffer_unordered(files_at_a_time));
    while let Some((shard, ended)) = work.next().await {
        let name = shard.source.display();
        let note = |reason: String| report.borrow().progress.note(&format!("plumb: {name}: {reason}"));
        match ended.with_context(|| name.to_string())? {
            Ended::Scored(manifest) => {
                counts.scored += 1;
                if global.json {
                    print_json(&manifest)?;
                }
            }
            Ended::Elsewhere => counts.elsewhere += 1,
            Ended::Unreadable(reason) => {
                counts.unreadable += 1;
                note(reason);
            }
            Ended::Undone(reason) => {
                counts.undone += 1;
                note(reason);
            }
        }
    }
    drop(work);
    let outcome = report.into_inner().finish(&Target::default(), global.json)?;
    if global.json {
        eprint!("{counts}");
    } else {
        print(counts.to_string())?;
    }
    if counts.undone > 0 {
        return Err(anyhow!("{} files are not done; start again to score them", counts.undone));
    }
    Ok(if counts.unreadable > 0 { Outcome::SomeFailed } else { outcome })
}

/// Most files that are open at a time: one is read, the others wait for their last answers.
const FILES: usize = 64;

/// What became of the files.
#[derive(Default)]
struct Counts {
    scored: u64,
    before: u64,
    elsewhere: u64,
    unreadable: u64,
    undone: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} files scored", self.scored)?;
        for (n, what) in [
            (self.before, "done before"),
            (self.elsewhere, "left to another run"),
            (self.unreadable, "unreadable"),
            (self.undone, "not done"),
        ] {
            if n > 0 {
                write!(f, ", {n} {what}")?;
            }
        }
        writeln!(f)
    }
}

/// An input file and what is made of it.
struct Shard {
    source: PathBuf,
    /// Below the folder that was named.
    name: PathBuf,
    /// The output's name below the folder of outputs.
    key: String,
    output: PathBuf,
    manifest: PathBuf,
    /// The output while it is written.
    part: PathBuf,
    /// Locked by the run that writes. It stays: who waits for a file that is removed locks nothing.
    lock: PathBuf,
}

impl Shard {
    fn new(source: PathBuf, name: PathBuf, folder: &Path) -> Result<Self, Usage> {
        let output = match name.extension().and_then(OsStr::to_str) {
            Some("gz" | "zst") => name.with_extension(""),
            _ => name.clone(),
        };
        // Manifests are JSON.
        let Some(key) = output.to_str().map(str::to_owned) else {
            return Err(Usage(format!("{}: a file's name must be UTF-8", source.display())));
        };
        let beside = |extension| folder.join(MANIFESTS).join(&output).with_added_extension(extension);
        let (manifest, part, lock) = (beside("json"), beside("part"), beside("lock"));
        Ok(Self { source, name, key, output: folder.join(output), manifest, part, lock })
    }
}

/// The files that were named and those in folders, in the order of their names, which does not depend on the machine.
fn shards(paths: &[PathBuf], folder: &Path) -> anyhow::Result<Vec<Shard>> {
    let mut shards = Vec::new();
    let both = |path: &Path| path.canonicalize().ok().zip(real(folder).ok());
    for path in paths {
        if path.is_dir() {
            if both(path).is_some_and(|(path, folder)| folder.starts_with(path)) {
                return Err(Usage(format!("--output-dir lies within {}", path.display())).into());
            }
            let mut found = Vec::new();
            walk(path, &mut found).with_context(|| path.display().to_string())?;
            for file in found {
                let name = file.strip_prefix(path).unwrap_or(&file).to_owned();
                shards.push(Shard::new(file, name, folder)?);
            }
        } else {
            File::open(path).map_err(|e| Usage(format!("{}: {e}", path.display())))?;
            if both(path).is_some_and(|(path, folder)| path.starts_with(folder)) {
                return Err(Usage(format!("{} lies within --output-dir", path.display())).into());
            }
            let name = path.file_name().unwrap_or_default().into();
            shards.push(Shard::new(path.clone(), name, folder)?);
        }
    }
    if shards.is_empty() {
        return Err(Usage("no Parquet or JSONL files to score".into()).into());
    }
    shards.sort_by(|a, b| a.output.cmp(&b.output));
    let mut outputs = HashSet::new();
    match shards.iter().find(|shard| !outputs.insert(&shard.output)) {
        Some(twice) => Err(Usage(format!("{}: for two of the files", twice.output.display())).into()),
        None => Ok(shards),
    }
}

/// The path without links of what may not be there yet.
fn real(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let there = |part: &Path| Some(part.canonicalize().ok()?.join(path.strip_prefix(part).ok()?));
    Ok(path.ancestors().find_map(there).unwrap_or_else(|| path.clone()))
}

/// Files of the known kinds, also in folders further down; what begins with . or _ is none of the data's.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with(['.', '_']) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(&path, found)?;
        } else if is_parquet(&path) || [".jsonl", ".jsonl.gz", ".jsonl.zst"].iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
    Ok(())
}

/// What is done to every file.
struct Job {
    scorer: Scorer,
    /// The one model that may answer.
    model: Option<v1::ModelIdentity>,
    reading: Reading,
    keep: Keep,
    options: Value,
    /// Had by the file that is read. The next one is read while the last answers of this one are awaited, so that the
    /// servers have work between files, and no more files than needed are begun.
    turn: Arc<Semaphore>,
    args: BulkArgs,
}

/// How the work on a file ended.
enum Ended {
    Scored(Box<Manifest>),
    /// Another run does it, or has done it meanwhile.
    Elsewhere,
    Unreadable(String),
    /// By a failure that may pass.
    Undone(String),
}

impl Job {
    /// Whether a file must be scored, as far as its manifest says.
    ///
    /// # Errors
    /// If that would undo what was done otherwise.
    fn is_due(&self, shard: &Shard) -> anyhow::Result<bool> {
        let output = shard.output.display();
        let written = fs::metadata(&shard.output).ok().map(|metadata| metadata.len());
        let Some(manifest) = Manifest::read(&shard.manifest)? else {
            // A run that was ended between the two has left its lock.
            if written.is_some() && !shard.lock.exists() && !self.args.overwrite {
                let reason = "exists and was not made by plumb score; name another folder, or --overwrite";
                return Err(Usage(format!("{output}: {reason}")).into());
            }
            return Ok(true);
        };
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(_) if self.args.overwrite => return Ok(true),
            Err(version) => {
                let reason = format!("has a manifest of version {version}; name another folder, or --overwrite");
                return Err(Usage(format!("{output} {reason}")).into());
            }
        };
        if written != Some(manifest.output.bytes) || !manifest.input.is(&shard.source)? {
            return Ok(true);
        }
        match self.difference(&manifest) {
            Some(_) if self.args.overwrite => Ok(true),
            Some(difference) => {
                Err(Usage(format!("{output} {difference}; name another folder, or --overwrite")).into())
            }
            None => Ok(self.args.retry_errors && manifest.errors > 0),
        }
    }

    fn difference(&self, manifest: &Manifest) -> Option<String> {
        if manifest.options != self.options {
            return Some(format!("was scored with the options {}, not {}", manifest.options, self.options));
        }
        let asked = self.model.as_ref()?;
        let other = manifest.models.iter().find(|model| model.weights_digest != asked.weights_digest)?;
        let (name, version) = (&other.model, other.version);
        let now = describe(Some(asked));
        Some(format!("was scored by {name} version {version}, and now {now} answers: --version {version} goes on"))
    }

    /// Scores a file, unless another run has it.
    async fn score(&self, shard: &Shard, report: &RefCell<Report>) -> anyhow::Result<Ended> {
        let mut turn = Some(Arc::clone(&self.turn).acquire_owned().await?);
        for path in [&shard.output, &shard.lock] {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
        }
        let lock = File::create(&shard.lock)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Ended::Elsewhere),
            // Some file systems have no locks; --shard keeps runs apart there.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        if !self.is_due(shard)? {
            return Ok(Ended::Elsewhere);
        }

        let stamp = Stamp::of(&shard.source)?;
        let digest = blocking(&shard.source, sha256);
        let (sink, form) = if is_parquet(&shard.source) {
            match Table::create(&shard.source, &self.keep, File::create(&shard.part)?) {
                Ok(table) => {
                    let form = table.form();
                    (Sink::Table(Box::new(table)), Some(form))
                }
                Err(error) => return Ok(Ended::Unreadable(error.to_string())),
            }
        } else {
            (Sink::Lines(Lines::open(Some(&shard.part))?), None)
        };
        let mut target = Target::new(sink);
        let reads = source::read(vec![shard.source.clone()], self.reading, None).map(move |read| match form {
            Some(form) => form.check(read),
            None => read,
        });
        let next_turn = stream::poll_fn(move |_| {
            turn.take();
            Poll::Ready(None)
        });
        let batches = self.scorer.run(reads.flat_map(|read| stream::iter(slots(read))).chain(next_turn));
        let mut batches = std::pin::pin!(batches);
        while let Some(batch) = batches.next().await {
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) if is_passing(error.code()) => return Ok(Ended::Undone(error.to_string())),
                Err(error) => return Err(error.into()),
            };
            self.check(batch.model.as_ref())?;
            let mut broken = batch.items.iter().filter_map(|(slot, _)| slot.record.as_ref().err());
            if let Some(last) = broken.find(|broken| broken.is_last) {
                return Ok(Ended::Unreadable(last.reason.clone()));
            }
            if let Err(error) = report.borrow_mut().batch(&mut target, batch) {
                return unreadable(error);
            }
        }
        match target.sink {
            Sink::Table(table) => {
                if let Err(error) = table.finish() {
                    return unreadable(error.into());
                }
            }
            Sink::Lines(mut lines) => lines.flush()?,
            Sink::Shown => {}
        }
        let totals = target.totals;
        let digest = digest.await??;
        if Stamp::of(&shard.source)? != stamp {
            return Ok(Ended::Unreadable("changed while it was read".to_owned()));
        }

        let output = blocking(&shard.part, Output::sync).await??;
        let manifest = Manifest {
            plumb_manifest: manifest::VERSION,
            input: Input { path: shard.name.clone(), stamp, sha256: digest },
            output,
            options: self.options.clone(),
            models: totals.models,
            rows: totals.rows,
            errors: totals.errors,
            tokens: totals.tokens,
        };
        // At no time does a manifest describe another file than the one that is there.
        match fs::remove_file(&shard.manifest) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        rename(&shard.part, &shard.output)?;
        manifest.write(&shard.manifest)?;
        Ok(Ended::Scored(Box::new(manifest)))
    }

    fn check(&self, answered: Option<&v1::ModelIdentity>) -> Result<(), Error> {
        match (&self.model, answered) {
            (Some(asked), Some(model)) if asked.weights_digest != model.weights_digest => {
                Err(Error::Contract(format!(
                    "{} answered where {} was asked for: the servers do not serve the same weights",
                    describe(Some(model)),
                    describe(Some(asked)),
                )))
            }
            _ => Ok(()),
        }
    }
}

/// What is wrong with a table is a file's own failure, unless reading or writing as such fails.
fn unreadable(error: anyhow::Error) -> anyhow::Result<Ended> {
    match error.downcast::<ParquetError>()? {
        ParquetError::External(cause) => Err(anyhow::Error::from_boxed(cause)),
        error => Ok(Ended::Unreadable(error.to_string())),
    }
}

/// Reads a file on a thread where that is no harm.
fn blocking<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> tokio::task::JoinHandle<io::Result<T>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || read(&path))
}
