//! Loads fail in every way while a version serves.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use plumb_client::Client;

use crate::checkpoint::{Damage, damaged};
use crate::context::{Context, Experiment};
use crate::expected::PM;
use crate::load::{Load, Tally};
use crate::options::Common;
use crate::report::Measure;
use crate::rollout::{Rollout, Way, publish};
use crate::surface::{self, Faults};

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct FailedLoads {
    #[command(flatten)]
    common: Common,
    /// Loads that fail [quick: one of each kind].
    #[arg(long, default_value_t = 50, value_name = "N")]
    loads: usize,
}

/// A way to fail.
struct Failure {
    name: &'static str,
    cause: Cause,
    /// Words of which the reason has to hold one.
    words: &'static [&'static str],
}

enum Cause {
    /// The checkpoint is damaged.
    Damage(Damage),
    /// The checkpoint is sound, and these faults are asked for.
    Fault(&'static str),
}

const WAYS: [Failure; 9] = [
    Failure { name: "a corrupt byte", cause: Cause::Damage(Damage::CorruptByte), words: &["sha256"] },
    Failure {
        name: "a wrong digest",
        cause: Cause::Damage(Damage::WrongDigest),
        words: &["tokenizer.json` is", "sha256"],
    },
    Failure { name: "a truncated file", cause: Cause::Damage(Damage::Truncated), words: &["model.safetensors"] },
    Failure { name: "a wrong shape", cause: Cause::Damage(Damage::WrongShape), words: &["shape"] },
    Failure { name: "a missing tensor", cause: Cause::Damage(Damage::MissingTensor), words: &["missing", "up_proj"] },
    Failure { name: "weights larger than the memory", cause: Cause::Damage(Damage::TooLarge), words: &["memory"] },
    Failure {
        name: "a slow disk that reads short",
        cause: Cause::Fault("slow-read 20\nshort-read 10000"),
        words: &["safetensors", "sha256", "short"],
    },
    Failure {
        name: "a disk that reads a corrupt byte, slower than all else",
        cause: Cause::Fault("slow-read 100\ncorrupt-byte 1000000"),
        words: &["sha256"],
    },
    Failure { name: "a failed allocation", cause: Cause::Fault("failed-allocation"), words: &["memory"] },
];

impl Experiment for FailedLoads {
    const NAME: &'static str = "failed-loads";
    const TITLE: &'static str = "Failed loads while a version serves";
    const FAULTY: bool = true;

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        let names: Vec<&str> = WAYS.iter().map(|way| way.name).collect();
        format!(
            "{} calls of LoadVersion that have to fail, in turn by {}, under the load of {}. Every score is compared bit \
             for bit with that of the version that serves, no call is tried again, every reason has to name what is wrong \
             and be listed with the version.",
            self.loads(),
            names.join(", "),
            self.common.mix().in_words()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(1, 1).await?;
        let sources = Sources::make(context, &cast.preference[0])?;
        let faults = Faults::in_folder(context.folder())?;
        let (_, server) = Rollout::start(context, &cast, Way::Rpc, surface::ROOMY, Some(&faults)).await?;
        let tally = Arc::new(Mutex::new(Tally::default()));
        let load = Load::of(server.url(), &cast.judge, tally.clone(), context.seed);
        // Connected before and after.
        let client = server.client()?;
        client.list_models().await?;
        // Memory that the load alone takes is taken once.
        let warming = load.start(self.common.mix());
        context.pause(context.or_quick(Duration::from_secs(5), Duration::from_millis(500))).await;
        warming.stop().await?;
        let idle = context.or_quick(Duration::from_secs(3), Duration::from_millis(300));
        context.pause(idle).await;
        let before = server.held()?;

        let running = load.start(self.common.mix());
        let seen = self.fail_all(context, &client, &sources, &faults).await?;
        running.stop().await?;
        context.pause(idle).await;
        let after = server.held()?;

        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
        context.show(&tally);
        let growth = after.resident as f64 / before.resident as f64 - 1.0;
        Ok(vec![
            Measure::all("loads that failed", seen.failed, self.loads()),
            Measure::all("of those, the reason names what is wrong and is listed", seen.named, self.loads()),
            Measure::never("calls of the old version that failed", tally.failures()),
            Measure::never("wrong scores", tally.wrong),
            Measure::new("calls answered right meanwhile", tally.right as f64, ""),
            Measure::new("slowest load to fail", seen.slowest.as_secs_f64(), "s"),
            Measure::new("resident memory before", before.resident as f64 / f64::from(1 << 20), "MiB"),
            Measure::new("growth of resident memory", growth * 100.0, "%").at_most(5.0),
            Measure::new("descriptors more than before", after.descriptors as f64 - before.descriptors as f64, "")
                .at_most(0.0),
        ])
    }
}

/// What became of the loads.
#[derive(Default)]
struct Seen {
    failed: usize,
    named: usize,
    slowest: Duration,
}

impl FailedLoads {
    fn loads(&self) -> usize {
        self.common.or_quick(self.loads, WAYS.len())
    }

    async fn fail_all(&self, context: &Context, client: &Client, sources: &Sources, faults: &Faults) -> Result<Seen> {
        let mut seen = Seen::default();
        context.begin(self.loads() as u64, "failed loads");
        for (i, way) in WAYS.iter().cycle().take(self.loads()).enumerate() {
            context.message(way.name.to_owned());
            if let Cause::Fault(lines) = way.cause {
                faults.ask(lines)?;
            }
            let version = 2 + i as u64;
            let began = Instant::now();
            let refused = surface::refused(client, surface::version_request(PM, version, sources.of(way))).await?;
            seen.slowest = seen.slowest.max(began.elapsed());
            faults.ask("")?;
            context.step();
            let Some(refused) = refused else {
                context.note(&format!("  {}: the load did not fail", way.name));
                surface::take_out(client, PM, version).await?;
                continue;
            };
            seen.failed += 1;
            if refused.is_listed && way.words.iter().any(|word| refused.said.contains(word)) {
                seen.named += 1;
            } else {
                let listed = if refused.is_listed { "" } else { " (not listed so)" };
                context.note(&format!("  {}: {}{listed}", way.name, refused.said));
            }
        }
        Ok(seen)
    }
}

/// Where the checkpoints to be loaded are.
struct Sources {
    sound: PathBuf,
    damaged: Vec<(Damage, PathBuf)>,
}

impl Sources {
    fn make(context: &Context, checkpoint: &Path) -> Result<Self> {
        let root = context.folder().join("published");
        publish(context, checkpoint, &root, PM)?;
        let sound = root.join(PM).join("1");
        let mut sources = Self { sound, damaged: Vec::new() };
        for way in &WAYS {
            if let Cause::Damage(damage) = way.cause {
                let folder = context.folder().join(format!("damaged-{damage:?}"));
                damaged(&sources.sound, &folder, damage)?;
                sources.damaged.push((damage, folder));
            }
        }
        Ok(sources)
    }

    fn of(&self, way: &Failure) -> &Path {
        let wanted = if let Cause::Damage(damage) = way.cause { Some(damage) } else { None };
        let found = self.damaged.iter().find(|(damage, _)| Some(*damage) == wanted);
        found.map_or(&self.sound, |(_, folder)| folder)
    }
}
