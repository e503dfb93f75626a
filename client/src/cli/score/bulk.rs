//! `plumb score --output-dir`: a file of scores for each input file, exactly once however often the run was ended.
//!
//! A file's scores are written beside the manifests, put on disk, renamed to where they belong, and only then described
//! by a manifest. A run does what has no manifest, or one that does not fit; a lock keeps runs at the same time apart.
//! A run asks for one version by its number from start to end, and holds every answer's digest against it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use clap::Args;
use futures::{StreamExt, stream};
use plumb_client::parquet::is_parquet;
use plumb_client::{Error, v1};
use serde_json::{Value, json};

use super::manifest::{self, Input, Manifest, Output, Stamp, rename, sha256};
use super::table::{Keep, Table};
use super::{Report, ScoreArgs, Sink, Slot, slots};
use crate::cli::args::{Global, Priority};
use crate::cli::input::Reading;
use crate::cli::output::{Lines, Model, describe, print, print_json};
use crate::cli::progress::Progress;
use crate::cli::scoring::{self, Scorer};
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

/// Every `of`th file, from the `index`th.
#[derive(Clone, Copy, Debug)]
struct Share {
    index: usize,
    of: usize,
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
    let mut shards = shards(&args.files, &folder)?;
    if !bulk.keep.is_empty()
        && let Some(shard) = shards.iter().find(|shard| !is_parquet(&shard.source))
    {
        return Err(Usage(format!("--keep is for Parquet files, which {} is not", shard.source.display())).into());
    }
    if let Some(Share { index, of }) = bulk.shard {
        shards = shards.into_iter().skip(index).step_by(of).collect();
    }
    let client = global.connect().await?;
    let mut scorer = args.scoring.scorer(&client, args.objective, args.hhh_prompt, false, Priority::Normal);
    let model = if bulk.mixed_versions { None } else { Some(scorer.pin().await?) };
    let reading = args.source.reading();
    let keep = Keep::new(&bulk.keep);
    let options = json!({"request": scorer.options()?, "split_turns": reading.split_turns, "keep": bulk.keep});
    let job = Job { scorer, model, reading, keep, options, args: bulk };

    // Before anything is computed: what must not be done is said now.
    let mut due = Vec::new();
    let mut counts = Counts::default();
    for shard in shards {
        match job.is_due(&shard)? {
            true => due.push(shard),
            false => counts.before += 1,
        }
    }
    let files: Vec<_> = due.iter().map(|shard| shard.source.clone()).collect();
    let mut report = Report { model: job.model.clone(), ..Report::new(Progress::files(&files, None)) };
    for shard in &due {
        let ended = job.score(shard, &mut report).await.with_context(|| shard.source.display().to_string())?;
        report.sink = Sink::Shown;
        match ended {
            Ended::Scored(manifest) if global.json => {
                counts.scored += 1;
                print_json(&manifest)?;
            }
            Ended::Scored(_) => counts.scored += 1,
            Ended::Elsewhere => counts.elsewhere += 1,
            Ended::Unreadable(reason) => {
                counts.unreadable += 1;
                report.progress.note(&format!("plumb: {}: {reason}", shard.source.display()));
            }
        }
    }
    let outcome = report.finish(global.json)?;
    if global.json {
        eprint!("{counts}");
    } else {
        print(counts.to_string())?;
    }
    Ok(if counts.unreadable > 0 { Outcome::SomeFailed } else { outcome })
}

/// What became of the files.
#[derive(Default)]
struct Counts {
    scored: u64,
    before: u64,
    elsewhere: u64,
    unreadable: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} files scored", self.scored)?;
        for (n, what) in
            [(self.before, "done before"), (self.elsewhere, "left to another run"), (self.unreadable, "unreadable")]
        {
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
    output: PathBuf,
    manifest: PathBuf,
    /// The output while it is written.
    part: PathBuf,
    /// Held by the run that writes; removed when the manifest is there.
    lock: PathBuf,
}

impl Shard {
    fn new(source: PathBuf, name: PathBuf, folder: &Path) -> Self {
        let output = match name.extension().and_then(OsStr::to_str) {
            Some("gz" | "zst") => name.with_extension(""),
            _ => name.clone(),
        };
        let beside = |extension| folder.join(MANIFESTS).join(&output).with_added_extension(extension);
        let (manifest, part, lock) = (beside("json"), beside("part"), beside("lock"));
        Self { source, name, output: folder.join(output), manifest, part, lock }
    }
}

/// The files that were named and those in folders, in the order of their names, which does not depend on the machine.
fn shards(paths: &[PathBuf], folder: &Path) -> anyhow::Result<Vec<Shard>> {
    let mut shards = Vec::new();
    let both = |path: &Path| path.canonicalize().ok().zip(folder.canonicalize().ok());
    for path in paths {
        if path.is_dir() {
            if both(path).is_some_and(|(path, folder)| folder.starts_with(path)) {
                return Err(Usage(format!("--output-dir lies within {}", path.display())).into());
            }
            let mut found = Vec::new();
            walk(path, &mut found).with_context(|| path.display().to_string())?;
            for file in found {
                let name = file.strip_prefix(path).unwrap_or(&file).to_owned();
                shards.push(Shard::new(file, name, folder));
            }
        } else {
            File::open(path).map_err(|e| Usage(format!("{}: {e}", path.display())))?;
            if both(path).is_some_and(|(path, folder)| path.starts_with(folder)) {
                return Err(Usage(format!("{} lies within --output-dir", path.display())).into());
            }
            let name = path.file_name().unwrap_or_default().into();
            shards.push(Shard::new(path.clone(), name, folder));
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
    args: BulkArgs,
}

/// How the work on a file ended.
enum Ended {
    Scored(Box<Manifest>),
    /// Another run does it, or has done it meanwhile.
    Elsewhere,
    Unreadable(String),
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
            // A run that was ended between the two leaves its lock.
            if written.is_some() && !shard.lock.exists() && !self.args.overwrite {
                let reason = "exists and was not made by plumb score; name another folder, or --overwrite";
                return Err(Usage(format!("{output}: {reason}")).into());
            }
            return Ok(true);
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
        if manifest.plumb_manifest != manifest::VERSION {
            return Some(format!("has a manifest of version {}", manifest.plumb_manifest));
        }
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
    async fn score(&self, shard: &Shard, report: &mut Report) -> anyhow::Result<Ended> {
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
            fs::remove_file(&shard.lock)?;
            return Ok(Ended::Elsewhere);
        }

        let stamp = Stamp::of(&shard.source)?;
        let digest = blocking(&shard.source, sha256);
        report.sink = if is_parquet(&shard.source) {
            match Table::create(&shard.source, &self.keep, File::create(&shard.part)?) {
                Ok(table) => Sink::Table(Box::new(table)),
                Err(error) => return Ok(Ended::Unreadable(error.to_string())),
            }
        } else {
            Sink::Lines(Lines::open(Some(&shard.part))?)
        };
        let mut totals = Totals::default();
        let reads = source::read(vec![shard.source.clone()], self.reading, None);
        let batches = self.scorer.run(reads.flat_map(|read| stream::iter(slots(read))));
        let mut batches = std::pin::pin!(batches);
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            self.check(batch.model.as_ref())?;
            if let Some(reason) = totals.add(&batch) {
                return Ok(Ended::Unreadable(reason));
            }
            report.batch(batch)?;
        }
        match std::mem::take(&mut report.sink) {
            Sink::Table(table) => table.finish()?,
            Sink::Lines(mut lines) => lines.flush()?,
            Sink::Shown => {}
        }
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
        fs::remove_file(&shard.lock)?;
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

/// What a manifest says of the rows.
#[derive(Default)]
struct Totals {
    models: Vec<Model>,
    rows: u64,
    errors: u64,
    tokens: u64,
    /// Whether an item of the row that is not complete has failed.
    has_failed: bool,
}

impl Totals {
    /// Counts a batch; answers why the file cannot be read any further, if so.
    fn add(&mut self, batch: &scoring::Batch<Slot>) -> Option<String> {
        if let Some(model) = batch.model.as_ref().map(Model::from)
            && !self.models.contains(&model)
        {
            self.models.push(model);
        }
        for (slot, outcome) in &batch.items {
            if let Err(broken) = &slot.record
                && broken.is_last
            {
                return Some(broken.reason.clone());
            }
            match outcome {
                Some(Ok(score)) => self.tokens += u64::from(score.input_tokens),
                _ => self.has_failed = true,
            }
            if slot.last {
                self.rows += 1;
                self.errors += u64::from(std::mem::take(&mut self.has_failed));
            }
        }
        None
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
