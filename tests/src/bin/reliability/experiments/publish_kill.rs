//! `plumb-train publish` is killed at random points: what can be seen is whole, and the next publish succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use plumb_client::Client;
use plumb_client::v1::ModelState;
use rand::Rng;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::checkpoint;
use crate::context::{Context, Experiment};
use crate::expected::PM;
use crate::options::Common;
use crate::report::Measure;
use crate::rollout::{begin_to_publish, publish};
use crate::server::Server;
use crate::surface::{self, MANIFEST};

/// Versions that stay on disk; older ones are removed as an operator would.
const KEPT: usize = 3;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct PublishKill {
    #[command(flatten)]
    common: Common,
    /// Publishes that are killed [quick: 6].
    #[arg(long, default_value_t = 100, value_name = "N")]
    kills: usize,
}

impl PublishKill {
    fn kills(&self) -> usize {
        self.common.or_quick(self.kills, 6)
    }
}

impl Experiment for PublishKill {
    const NAME: &'static str = "publish-kill";
    const ASKS: bool = false;
    const TITLE: &'static str = "Publish killed at random points";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "plumb-train publish is killed with SIGKILL {} times: half of the times at a moment drawn evenly from all of \
             its run, half from the part in which it writes. After each, every folder with a version's number has to hold \
             a manifest, exactly the files that it lists, with the sha256 that it lists, and all files of the checkpoint \
             unchanged (checked here, without the code of Plumb); then a publish that nobody kills has to succeed, and a \
             server that watches the folder all along has to take it up.",
            self.kills()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let source = context.folder().join("checkpoint");
        checkpoint::variant(&context.common.preference_checkpoint(), &source, 1)?;
        let site = Site { source, root: context.folder().join("root"), trash: context.folder().join("trash") };
        fs::create_dir_all(&site.trash)?;
        let undisturbed = site.time_undisturbed(context)?;
        let server = site.watch(context).await?;
        let client = server.client()?;
        let mut seen = Seen::default();
        let mut rng = context.rng(1);
        context.begin(self.kills() as u64, "kills");
        while seen.killed < self.kills() {
            let share = rng.random::<f64>();
            let stage = if seen.killed % 2 == 0 {
                site.kill_after(context, undisturbed.all.mul_f64(share), false)?
            } else {
                site.kill_after(context, undisturbed.writing.mul_f64(share), true)?
            };
            // One that was done before the moment came was not killed.
            let Some(stage) = stage else { continue };
            seen.killed += 1;
            *seen.stages.entry(stage).or_default() += 1;
            seen.check(&site, context)?;
            let version = site.publish(context)?;
            seen.published += usize::from(version.is_some());
            seen.check(&site, context)?;
            if let Some(version) = version {
                surface::until_available(&client, PM, version).await?;
                seen.taken_up += 1;
            }
            site.remove_old()?;
            context.step();
        }
        Ok(seen.measures(self.kills(), undisturbed, site.leftovers()?, failed_versions(&client).await?))
    }
}

async fn failed_versions(client: &Client) -> Result<usize> {
    let statuses = client.list_models().await?;
    Ok(statuses.iter().filter(|status| status.state() == ModelState::Failed).count())
}

/// How long a publish takes that nobody kills.
#[derive(Clone, Copy)]
struct Undisturbed {
    all: Duration,
    writing: Duration,
}

/// How far a publish had come when it was killed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    BeforeWriting,
    Writing,
    ManifestWritten,
    Visible,
}

impl Stage {
    const ALL: [(Self, &'static str); 4] = [
        (Self::BeforeWriting, "killed before it wrote anything"),
        (Self::Writing, "killed while files were written"),
        (Self::ManifestWritten, "killed between manifest and rename"),
        (Self::Visible, "killed after the rename"),
    ];
}

#[derive(Default)]
struct Seen {
    killed: usize,
    stages: BTreeMap<Stage, usize>,
    checked: usize,
    half: usize,
    published: usize,
    taken_up: usize,
}

impl Seen {
    fn check(&mut self, site: &Site, context: &Context) -> Result<()> {
        for folder in site.visible()? {
            self.checked += 1;
            if let Err(error) = site.verify(&folder) {
                self.half += 1;
                context.note(&format!("  {}: {error:#}", folder.display()));
            }
        }
        Ok(())
    }

    fn measures(&self, kills: usize, usual: Undisturbed, left: usize, refused: usize) -> Vec<Measure> {
        let mut measures = vec![
            Measure::all("publishes killed", self.killed, kills),
            Measure::never("half versions seen", self.half),
            Measure::new("versions verified", self.checked as f64, ""),
            Measure::all("publishes after a kill that succeeded", self.published, kills),
            Measure::never("drafts left behind after the last publish", left),
            Measure::new("a publish takes, median", usual.all.as_secs_f64(), "s"),
            Measure::new("of which it writes", usual.writing.as_secs_f64(), "s"),
        ];
        for (stage, name) in Stage::ALL {
            measures.push(Measure::new(name, self.stages.get(&stage).copied().unwrap_or_default() as f64, ""));
        }
        measures.push(Measure::all("versions that the watching server took up", self.taken_up, kills));
        measures.push(Measure::never("versions that it could not load", refused));
        measures
    }
}

/// Where versions are published.
struct Site {
    source: PathBuf,
    root: PathBuf,
    trash: PathBuf,
}

impl Site {
    fn versions(&self) -> PathBuf {
        self.root.join(PM)
    }

    /// A server that watches.
    async fn watch(&self, context: &Context) -> Result<Server> {
        let launch = context.launch().flags("--kv-cache-mib 16").flags(&surface::watching(&self.root));
        launch.start(context.folder()).await
    }

    fn start(&self, context: &Context) -> Result<Child> {
        begin_to_publish(context, &self.source, &self.root, PM)
    }

    /// Publishes; answers the version, or `None` if it failed.
    fn publish(&self, context: &Context) -> Result<Option<u64>> {
        let before = self.numbers()?;
        if let Err(error) = publish(context, &self.source, &self.root, PM) {
            context.note(&format!("  {error:#}"));
            return Ok(None);
        }
        let new: Vec<u64> = self.numbers()?.difference(&before).copied().collect();
        match new[..] {
            [version] => Ok(Some(version)),
            _ => bail!("a publish made the versions {new:?}"),
        }
    }

    fn time_undisturbed(&self, context: &Context) -> Result<Undisturbed> {
        let mut times = Vec::new();
        for _ in 0..context.or_quick(5, 1) {
            let began = Instant::now();
            let mut child = self.start(context)?;
            let wrote = self.until_draft(&mut child)?;
            if !child.wait()?.success() {
                bail!("a publish that nobody killed failed");
            }
            times.push((began.elapsed(), wrote.map_or(Duration::ZERO, |at| at.elapsed())));
        }
        times.sort();
        let (all, writing) = times[times.len() / 2];
        Ok(Undisturbed { all, writing })
    }

    /// Waits until a publish begins to write; `None` if it ended first.
    fn until_draft(&self, child: &mut Child) -> Result<Option<Instant>> {
        let before = self.leftovers()?;
        loop {
            if self.leftovers()? > before {
                return Ok(Some(Instant::now()));
            }
            if child.try_wait()?.is_some() {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Kills a publish some time after its start, or after it began to write; `None` if it was done before.
    fn kill_after(&self, context: &Context, time: Duration, from_draft: bool) -> Result<Option<Stage>> {
        let versions = self.numbers()?;
        let before = self.drafts()?;
        let mut child = self.start(context)?;
        if from_draft && self.until_draft(&mut child)?.is_none() {
            return Ok(None);
        }
        std::thread::sleep(time);
        // It is ours, and was not waited for: its number cannot be another's.
        child.kill()?;
        if child.wait()?.code().is_some() {
            return Ok(None);
        }
        let draft = self.drafts()?.difference(&before).next().cloned();
        Ok(Some(match draft {
            Some(draft) if draft.join(MANIFEST).exists() => Stage::ManifestWritten,
            Some(_) => Stage::Writing,
            None if self.numbers()? == versions => Stage::BeforeWriting,
            None => Stage::Visible,
        }))
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        match fs::read_dir(self.versions()) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// What a reader takes for versions: all that is named by a number.
    fn visible(&self) -> Result<Vec<PathBuf>> {
        Ok(self.entries()?.into_iter().filter(|path| number(path).is_some()).collect())
    }

    fn numbers(&self) -> Result<BTreeSet<u64>> {
        Ok(self.entries()?.iter().filter_map(|path| number(path)).collect())
    }

    /// All else.
    fn drafts(&self) -> Result<BTreeSet<PathBuf>> {
        Ok(self.entries()?.into_iter().filter(|path| number(path).is_none()).collect())
    }

    fn leftovers(&self) -> Result<usize> {
        Ok(self.drafts()?.len())
    }

    /// Whether a version is whole.
    fn verify(&self, folder: &Path) -> Result<()> {
        #[derive(Deserialize)]
        struct Listed {
            files: BTreeMap<String, String>,
        }
        let listed: Listed = serde_json::from_slice(&fs::read(folder.join(MANIFEST)).context(MANIFEST)?)?;
        let names = |folder: &Path| -> Result<BTreeSet<String>> {
            fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        let mut there = names(folder)?;
        there.remove(MANIFEST);
        let all: BTreeSet<String> = listed.files.keys().cloned().collect();
        if there != all {
            bail!("the files are {there:?}, listed are {all:?}");
        }
        for (name, digest) in &listed.files {
            let found = sha256(&folder.join(name))?;
            if found != *digest {
                bail!("{name} has the sha256 {found}, listed is {digest}");
            }
        }
        for name in names(&self.source)? {
            if listed.files.get(&name) != Some(&sha256(&self.source.join(&name))?) {
                bail!("{name} is not that of the checkpoint");
            }
        }
        Ok(())
    }

    /// Removes all but the newest versions: out of the root first, by a rename.
    fn remove_old(&self) -> Result<()> {
        let numbers = self.numbers()?;
        for number in numbers.iter().rev().skip(KEPT) {
            let trash = self.trash.join(number.to_string());
            fs::rename(self.versions().join(number.to_string()), &trash)?;
            fs::remove_dir_all(&trash)?;
        }
        Ok(())
    }
}

fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok()
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(hex::encode(Sha256::digest(bytes)))
}
