//! The server is killed at random points of a load, a swap and its recording, and started again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use futures::StreamExt;
use plumb_client::Code;
use plumb_client::v1::ModelState;
use plumb_proto::record::Record;
use rand::Rng;

use crate::context::{Context, Experiment};
use crate::expected::{LM, PM};
use crate::load::{Load, Tally};
use crate::options::Common;
use crate::report::Measure;
use crate::rollout::begin_to_publish;
use crate::server::{Server, free_ports};
use crate::surface;

/// Variants that are published in turn.
const VARIANTS: u64 = 3;
/// Versions that stay on disk; older ones are removed as an operator would.
const KEPT: u64 = 3;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct ServerKill {
    #[command(flatten)]
    common: Common,
    /// Times that the server is killed [quick: 3].
    #[arg(long, default_value_t = 50, value_name = "N")]
    kills: usize,
}

impl ServerKill {
    fn kills(&self) -> usize {
        self.common.or_quick(self.kills, 3)
    }
}

impl Experiment for ServerKill {
    const NAME: &'static str = "server-kill";
    const TITLE: &'static str = "Server killed at random points";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "{} times a version is published for a server that watches the root and records every call, under the load of \
             {}, and the server is killed with SIGKILL at a moment drawn evenly from one and a half times what such a swap \
             takes. Started again, it has to serve the newest version. Calls are not tried again: one may be UNAVAILABLE; \
             every other answer is compared bit for bit. In the end every line of the records has to be whole, but for the \
             last of a file.",
            self.kills(),
            self.common.mix().in_words()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(VARIANTS, 1).await?;
        let root = context.folder().join("root");
        let records = context.folder().join("records");
        let ports = free_ports()?;
        let launch = context.launch().model(LM, &cast.language[0]).ports(ports).flags("--kv-cache-mib 64");
        let recording = format!("--record-dir {} --no-record-compression --record-keep 10000", records.display());
        let launch = launch.flags(&surface::watching(&root)).flags(surface::ROOMY).flags(&recording);
        let publish = |version: u64| -> Result<Child> {
            let variant = (version - 1) % VARIANTS;
            cast.judge.begins(PM, version, variant as usize);
            begin_to_publish(context, &cast.preference[variant as usize], &root, PM)
        };
        let published = |mut child: Child, version: u64| -> Result<()> {
            ensure!(child.wait()?.success(), "publishing version {version} failed");
            let old = root.join(PM).join(version.saturating_sub(KEPT).to_string());
            if old.exists() {
                // Out of the root first, by a rename.
                let trash = context.folder().join("trash");
                fs::rename(&old, &trash)?;
                fs::remove_dir_all(&trash)?;
            }
            Ok(())
        };

        cast.judge.begins(LM, 1, 0);
        let mut version = 1;
        published(publish(version)?, version)?;
        let mut server = launch.start(context.folder()).await?;
        let tally = Arc::new(Mutex::new(Tally::default()));
        let load = Load::of(server.url(), &cast.judge, tally.clone(), context.seed);
        let running = load.start(self.common.mix());
        // One that nobody disturbs.
        let began = Instant::now();
        version += 1;
        published(publish(version)?, version)?;
        let client = server.client()?;
        surface::until_available(&client, PM, version).await?;
        cast.judge.ends(PM, version - 1);
        surface::until_ended(&client, PM, version - 1).await?;
        let swap = began.elapsed();

        let mut rng = context.rng(2);
        let (mut stages, mut starts, mut newest) = (BTreeMap::<Stage, usize>::new(), Vec::new(), 0);
        context.begin(self.kills() as u64, "kills");
        for _ in 0..self.kills() {
            version += 1;
            let stage = Watched::start(&server, version).await?;
            let publishing = publish(version)?;
            context.pause(swap.mul_f64(1.5 * rng.random::<f64>())).await;
            server.kill()?;
            published(publishing, version)?;
            *stages.entry(stage.stop()).or_default() += 1;
            let began = Instant::now();
            server = launch.start(context.folder()).await?;
            starts.push(began.elapsed());
            let state = surface::state(&server.client()?, PM, version).await?;
            newest += usize::from(state == Some(ModelState::Available));
            cast.judge.ends(PM, version - 1);
            context.step();
        }
        running.stop().await?;
        drop(server);
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
        context.show(&tally);
        starts.sort();
        let mut measures = vec![
            Measure::all("servers that came back and served the newest version", newest, self.kills()),
            Measure::never("wrong scores", tally.wrong),
            Measure::never("calls that failed other than UNAVAILABLE", tally.failures_other_than(&[Code::Unavailable])),
            Measure::new("calls answered right", tally.right as f64, ""),
            Measure::new("calls that were UNAVAILABLE", tally.with(Code::Unavailable) as f64, ""),
            Measure::new("an undisturbed swap, publishing included", swap.as_secs_f64(), "s"),
            Measure::new("from start to SERVING, median", starts[starts.len() / 2].as_secs_f64(), "s"),
        ];
        for (stage, count) in stages {
            measures.push(Measure::new(format!("killed {}", stage.in_words()), count as f64, ""));
        }
        measures.extend(Lines::of(&records)?.measures());
        Ok(measures)
    }
}

/// How far a version had come when its server was killed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Unknown,
    Loading,
    Warming,
    Available,
}

impl Stage {
    fn in_words(self) -> &'static str {
        match self {
            Self::Unknown => "before the server knew of the version",
            Self::Loading => "while it was read",
            Self::Warming => "while it was warmed",
            Self::Available => "when it was available",
        }
    }

    fn of(state: ModelState) -> Option<Self> {
        match state {
            ModelState::Start | ModelState::Loading => Some(Self::Loading),
            ModelState::Warming => Some(Self::Warming),
            ModelState::Available => Some(Self::Available),
            _ => None,
        }
    }
}

/// Sees how far a version comes.
struct Watched {
    stage: Arc<Mutex<Stage>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watched {
    async fn start(server: &Server, version: u64) -> Result<Self> {
        let mut changes = server.client()?.watch_models(PM).await?;
        let stage = Arc::new(Mutex::new(Stage::Unknown));
        let seen = Arc::clone(&stage);
        let task = tokio::spawn(async move {
            while let Some(Ok(change)) = changes.next().await {
                let Some(status) = change.model else { continue };
                let about = status.model.as_ref().is_some_and(|model| model.version == version);
                if let Some(stage) = Stage::of(status.state()).filter(|_| about) {
                    *seen.lock().unwrap_or_else(PoisonError::into_inner) = stage;
                }
            }
        });
        Ok(Self { stage, task })
    }

    fn stop(self) -> Stage {
        self.task.abort();
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lines of records.
#[derive(Default)]
struct Lines {
    files: usize,
    whole: usize,
    cut: usize,
    broken: usize,
}

impl Lines {
    fn of(folder: &Path) -> Result<Self> {
        let mut lines = Self::default();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "jsonl") {
                continue;
            }
            lines.files += 1;
            let text = fs::read(&path).with_context(|| path.display().to_string())?;
            for line in text.split_inclusive(|byte| *byte == b'\n') {
                match line.ends_with(b"\n") {
                    false => lines.cut += 1,
                    true if serde_json::from_slice::<Record>(line).is_ok() => lines.whole += 1,
                    true => lines.broken += 1,
                }
            }
        }
        Ok(lines)
    }

    fn measures(&self) -> [Measure; 4] {
        [
            Measure::never("broken lines of records", self.broken),
            Measure::new("whole lines of records", self.whole as f64, ""),
            Measure::new("files of records", self.files as f64, ""),
            Measure::new("last lines that were cut off", self.cut as f64, ""),
        ]
    }
}
