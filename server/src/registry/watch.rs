//! Follows a folder of versions: reads it when something changes, and does what the [policy](super::policy) says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use plumb_model::checkpoint::Source;
use plumb_model::checkpoint::manifest::MANIFEST;
use plumb_model::loaded::LoadedModel;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::{JoinHandle, JoinSet};

use super::Registry;
use super::policy::{Action, OnDisk, Stamp, Watched};
use crate::config::{Versions, check_name};
use crate::error::{Error, Result};
use crate::telemetry::events::{ModelLoaded, RootUnreadable, RootWatched};

/// A publishing trainer causes several events; they are looked at together.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a load waits for the memory of versions that go: a stream may hold one for as long as its reader likes.
const MAKE_ROOM: Duration = Duration::from_secs(30);
/// Most versions of a model that are looked at, those with the highest numbers.
const MAX_VERSIONS: usize = 4096;
/// Most models.
const MAX_MODELS: usize = 1024;

/// The models of a folder.
pub(crate) struct Root {
    path: PathBuf,
    versions: Versions,
    registry: Arc<Registry>,
    models: BTreeMap<String, Watched>,
    loads: JoinSet<Loaded>,
    /// Folders whose last reading failed: said once.
    unreadable: BTreeSet<PathBuf>,
}

/// A load that has ended.
struct Loaded {
    model: String,
    version: u64,
    stamp: Stamp,
    /// Versions that were to make room and have not gone.
    stayed: Vec<u64>,
    result: Result<()>,
}

/// What is found on disk, by model; or why a model's folder cannot be read.
type Found = BTreeMap<String, io::Result<OnDisk>>;

impl Root {
    /// The folder of the configuration, if there is one.
    pub(crate) fn new(versions: &Versions, registry: Arc<Registry>) -> Option<Self> {
        let path = versions.root.clone()?;
        let versions = versions.clone();
        let (models, loads, unreadable) = (BTreeMap::new(), JoinSet::new(), BTreeSet::new());
        Some(Self { path, versions, registry, models, loads, unreadable })
    }

    /// Brings in what is there, and returns when nothing is on its way any more. What does not load is FAILED.
    ///
    /// # Errors
    /// If there is no such folder.
    pub(crate) async fn settle(&mut self) -> Result<()> {
        if !self.path.is_dir() {
            let path = self.path.display();
            return Err(Error::failed_precondition(format!("--model-root {path}: there is no such folder")));
        }
        loop {
            self.look().await;
            let Some(ended) = self.loads.join_next().await else { return Ok(()) };
            self.end(ended.ok());
        }
    }

    /// Goes on for as long as it is polled.
    pub(crate) async fn follow(mut self) {
        let changed = Arc::new(Notify::new());
        let watcher = watch(&self.path, Arc::clone(&changed));
        RootWatched { path: &self.path, error: watcher.as_ref().err() }.emit();
        let (_, mut changes) = self.registry.watch();
        loop {
            let again = self.look().await;
            let poll = Instant::now() + self.versions.poll_interval;
            tokio::select! {
                () = changed.notified() => {}
                Some(ended) = self.loads.join_next() => self.end(ended.ok()),
                change = changes.recv() => if let Err(RecvError::Closed) = change { return },
                () = tokio::time::sleep_until(again.map_or(poll, |again| again.min(poll)).into()) => continue,
            }
            tokio::time::sleep(SETTLE).await;
            // What has come meanwhile is looked at with the rest.
            while changes.try_recv().is_ok() {}
        }
    }

    /// Reads the folder and does what has to be done. Answers when to look again if nothing else happens.
    async fn look(&mut self) -> Option<Instant> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || scan(&path)).await;
        let disk = match read.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(disk) => disk,
            Err(error) => {
                if self.unreadable.insert(self.path.clone()) {
                    RootUnreadable { path: &self.path, error: &error }.emit();
                }
                return None;
            }
        };
        let mut unreadable = BTreeSet::new();
        for (name, found) in &disk {
            if let Err(error) = found {
                let path = self.path.join(name);
                if !self.unreadable.contains(&path) {
                    RootUnreadable { path: &path, error }.emit();
                }
                unreadable.insert(path);
            } else if !self.models.contains_key(name) {
                let policy = self.versions.policies.get(name).unwrap_or(&self.versions.policy).clone();
                let watched = Watched::new(policy, self.versions.swap, self.versions.rollback_window);
                self.models.insert(name.clone(), watched);
            }
        }
        self.unreadable = unreadable;
        let mut again = None;
        for (name, watched) in &mut self.models {
            let empty = OnDisk::new();
            let versions = match disk.get(name) {
                Some(Ok(versions)) => versions,
                // It stays as it is.
                Some(Err(_)) => continue,
                None => &empty,
            };
            let (now, standing) = (Instant::now(), self.registry.standing(name));
            let (actions, next) = watched.reconcile(versions, &standing, now);
            for version in watched.collisions(versions, &standing, now) {
                let message =
                    format!("another version {version} of `{name}` is served; unload it to get the published one");
                let error = Error::AlreadyExists { message };
                ModelLoaded { model: name, version, duration: now.elapsed(), error: Some(&error) }.emit();
            }
            again = again.into_iter().chain(next).min();
            for action in actions {
                match action {
                    Action::Load { version, make_room } => {
                        let Some(&stamp) = versions.get(&version) else { continue };
                        let folder = self.path.join(name).join(version.to_string());
                        let task = start(&self.registry, name, version, folder, make_room, stamp);
                        match task {
                            Ok(task) => drop(self.loads.spawn(task)),
                            Err((error, stayed)) => {
                                ModelLoaded { model: name, version, duration: now.elapsed(), error: Some(&error) }
                                    .emit();
                                watched.failed(version, stamp, &error, now);
                                stayed.into_iter().for_each(|version| watched.kept(version));
                            }
                        }
                    }
                    // A label may have come to it just now.
                    Action::Unload(version) => {
                        if self.registry.unload(name, version).is_err() {
                            watched.kept(version);
                        }
                    }
                }
            }
        }
        again
    }

    fn end(&mut self, ended: Option<Loaded>) {
        let Some(Loaded { model, version, stamp, stayed, result }) = ended else { return };
        let Some(watched) = self.models.get_mut(&model) else { return };
        stayed.into_iter().for_each(|version| watched.kept(version));
        if let Err(error) = result {
            watched.failed(version, stamp, &error, Instant::now());
        }
    }
}

/// Announces a version, and answers what loads it once there is room; or why not, and which of those that were to make
/// room have not gone.
fn start(
    registry: &Arc<Registry>,
    model: &str,
    version: u64,
    folder: PathBuf,
    make_room: Vec<u64>,
    stamp: Stamp,
) -> Result<impl Future<Output = Loaded> + Send + use<>, (Error, Vec<u64>)> {
    let source = Source { model: folder.to_string_lossy().into_owned(), ..Source::default() };
    let announce = || registry.announce(model.to_owned(), Some(version), source.clone());
    let (mut make_room, mut going, mut stayed) = (make_room, Vec::new(), Vec::new());
    let mut announced = announce();
    if matches!(announced, Err(Error::NoRoom { .. })) && !make_room.is_empty() {
        // Those that go do not count.
        (going, stayed) = see_off(registry, model, &std::mem::take(&mut make_room));
        announced = announce();
    }
    let load = match announced {
        Ok(load) => load,
        Err(error) => {
            stayed.extend(make_room);
            return Err((error, stayed));
        }
    };
    let (registry, model) = (Arc::clone(registry), model.to_owned());
    Ok(async move {
        // Nobody goes for a checkpoint that cannot be read.
        if make_room.is_empty() || has_headers(&registry, source).await {
            let (more, cannot) = see_off(&registry, &model, &make_room);
            going.extend(more);
            stayed.extend(cannot);
        } else {
            stayed.extend(make_room);
        }
        for gone in going {
            // One that somebody holds for long goes later.
            let _ = tokio::time::timeout(MAKE_ROOM, gone).await;
        }
        let result = registry.load(load).await.map(drop);
        Loaded { model, version, stamp, stayed, result }
    })
}

/// Takes versions out of service. Answers tasks that end when they have gone, and those that cannot go because a label
/// has come to them.
fn see_off(registry: &Arc<Registry>, model: &str, versions: &[u64]) -> (Vec<JoinHandle<()>>, Vec<u64>) {
    let (mut going, mut stayed) = (Vec::new(), Vec::new());
    for &version in versions {
        match registry.drain(model, version) {
            Ok(gone) => going.extend(gone),
            Err(Error::FailedPrecondition { .. }) => stayed.push(version),
            // It has long gone.
            Err(_) => {}
        }
    }
    (going, stayed)
}

async fn has_headers(registry: &Registry, source: Source) -> bool {
    let (options, largest) = (registry.options.clone(), registry.largest_step);
    let read = tokio::task::spawn_blocking(move || LoadedModel::footprint(&source, &options, largest).is_ok());
    read.await.unwrap_or(false)
}

/// Is told of changes below a folder, for as long as it is held.
fn watch(path: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading is no change, and we read.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            changed.notify_one();
        }
    })?;
    watcher.watch(path, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// The versions below a folder, by model. What has no manifest is not there, nor is what cannot be a model's name.
fn scan(root: &Path) -> io::Result<Found> {
    let mut models = Found::new();
    for model in fs::read_dir(root)? {
        let model = model?;
        let Ok(name) = model.file_name().into_string() else { continue };
        if check_name(&name).is_err() || name.starts_with('.') || !model.path().is_dir() || models.len() >= MAX_MODELS {
            continue;
        }
        let versions = match versions(&model.path()) {
            Err(error) if is_absent(&error) => continue,
            versions => versions,
        };
        if !versions.as_ref().is_ok_and(BTreeMap::is_empty) {
            models.insert(name, versions);
        }
    }
    Ok(models)
}

/// Whether nothing is there, or what is there is no folder.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn versions(model: &Path) -> io::Result<OnDisk> {
    let mut versions = OnDisk::new();
    for entry in fs::read_dir(model)? {
        let entry = entry?;
        let Some(version) = entry.file_name().to_str().and_then(version_number) else { continue };
        let manifest = match fs::metadata(entry.path().join(MANIFEST)) {
            Ok(manifest) if manifest.is_file() => manifest,
            Ok(_) => continue,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        versions.insert(version, (manifest.modified()?, manifest.len()));
        if versions.len() > MAX_VERSIONS {
            versions.pop_first();
        }
    }
    Ok(versions)
}

/// As it is written by whoever publishes: `7`, not `07`.
fn version_number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|version: &u64| *version > 0 && version.to_string() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_versions_of_named_models_are_there() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "{}").unwrap();
        };
        for path in ["pm/1/manifest.json", "pm/20/manifest.json", "lm/3/manifest.json"] {
            write(path);
        }
        for path in ["pm/3/config.json", "pm/07/manifest.json", "pm/0/manifest.json", "pm/x/manifest.json"] {
            write(path);
        }
        for path in
            ["pm/.publishing-1/manifest.json", "a b/1/manifest.json", ".x/1/manifest.json", "empty/readme", "file"]
        {
            write(path);
        }
        fs::create_dir_all(root.path().join("pm/4/manifest.json")).unwrap();
        fs::write(root.path().join("pm/7"), "no folder").unwrap();
        // What cannot be read keeps nobody else's versions from being found.
        fs::create_dir_all(root.path().join("odd/1")).unwrap();
        std::os::unix::fs::symlink(MANIFEST, root.path().join("odd/1").join(MANIFEST)).unwrap();
        let found = scan(root.path()).unwrap();
        let versions =
            |disk: &io::Result<OnDisk>| disk.as_ref().ok().map(|disk| disk.keys().copied().collect::<Vec<_>>());
        let found: Vec<_> = found.iter().map(|(name, disk)| (name.as_str(), versions(disk))).collect();
        assert_eq!(found, [("lm", Some(vec![3])), ("odd", None), ("pm", Some(vec![1, 20]))]);
        assert!(scan(&root.path().join("nowhere")).is_err());
    }
}
