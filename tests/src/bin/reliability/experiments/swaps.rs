//! Versions are swapped under saturating mixed load: by rpc, and by publishing into a folder that the server watches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;

use crate::context::{Cast, Context, Experiment};
use crate::latency::{Split, Window, milliseconds};
use crate::load::{Call, Kind, Load, Log, Tally};
use crate::options::Common;
use crate::process::Held;
use crate::report::Measure;
use crate::rollout::{Rollout, Way, publishing};
use crate::server::Server;
use crate::surface;

/// With fewer calls, p99 is one call.
const ENOUGH_FOR_P99: u64 = 500;
/// Every so many swaps, the language model is swapped instead of the preference model.
const LANGUAGE_EVERY: usize = 5;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Swaps {
    #[command(flatten)]
    common: Common,
    /// Swaps in all; half of them by rpc, half by publishing [quick: 4].
    #[arg(long, default_value_t = 50, value_name = "N")]
    swaps: usize,
    /// Pause between swaps, the calls of which are the steady ones [quick: 0.3].
    #[arg(long, default_value_t = 3.0, value_name = "SECS")]
    steady_secs: f64,
}

impl Swaps {
    fn swaps(&self) -> usize {
        self.common.or_quick(self.swaps, 4)
    }

    /// Swaps before those that are measured: one of each model.
    fn early(&self) -> usize {
        self.common.or_quick(LANGUAGE_EVERY, 1)
    }

    fn steady(&self) -> Duration {
        Duration::from_secs_f64(self.common.or_quick(self.steady_secs, 0.3))
    }
}

impl Experiment for Swaps {
    const NAME: &'static str = "swaps";
    const TITLE: &'static str = "Swaps under saturating mixed load";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "{} swaps, one of {LANGUAGE_EVERY} of the language model, under the load of {}, each of which sends its next \
             call when it has its answer and tries nothing again. Half of the swaps are LoadVersion, SetLabel and \
             UnloadVersion, half a version published into the folder that the server watches. All weights differ between \
             versions; every score is compared bit for bit with what the version that the answer names gives to a caller \
             who is alone, and that version has to be the one that was meant while the call ran. A call counts as during \
             a swap if any part of it lies between the request for the new version and the end of the old one, as steady \
             if none does. {} swaps come first and are checked too, but their times are not counted: what a second \
             version takes in memory is taken once. Memory and descriptors are those of the idle server.",
            self.swaps(),
            self.common.mix().in_words(),
            self.early(),
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(3, 2).await?;
        let ways = [(Way::Rpc, String::new()), publishing(context, &cast)?];
        let mut measures = Vec::new();
        let each = self.swaps().div_ceil(ways.len());
        for (way, flags) in ways {
            let name = if way == Way::Rpc { "by rpc" } else { "by publishing" };
            let phase = self.phase(context, &cast, way, &flags, each).await?;
            measures.extend(phase.measures(name)?);
            context.show(&Tally::of(&phase.calls));
        }
        Ok(measures)
    }
}

/// What one server went through.
struct Phase {
    /// Of the first swaps.
    early: Vec<Call>,
    calls: Vec<Call>,
    windows: Vec<Window>,
    seconds: f64,
    /// Before the first swap, after the first ones, and after all.
    fresh: Held,
    before: Held,
    after: Held,
    busy: f64,
}

impl Swaps {
    async fn phase(&self, context: &Context, cast: &Cast, way: Way, flags: &str, swaps: usize) -> Result<Phase> {
        let flags = format!("{flags} {}", surface::ROOMY);
        let (mut rollout, server) = Rollout::start(context, cast, way, &flags, None).await?;
        let log = Arc::new(Log::default());
        // Connected before and after.
        let client = server.client()?;
        client.list_models().await?;
        let load = Load::of(server.url(), &cast.judge, log.clone(), context.seed);
        // Memory that the load takes, and that a second version takes, is taken once.
        let warming = load.start(self.common.mix());
        context.pause(self.steady() * 2).await;
        warming.stop().await?;
        let fresh = idle(context, &server).await?;
        let warming = load.start(self.common.mix());
        for swap in 1..=self.early() {
            rollout.swap(&client, model_of(swap)).await?;
        }
        warming.stop().await?;
        let before = idle(context, &server).await?;
        let early = log.drain();

        let (began, busy) = (Instant::now(), busy_seconds(&server).await?);
        let running = load.start(self.common.mix());
        context.begin(swaps as u64, "swaps");
        let mut windows = Vec::new();
        for swap in 1..=swaps {
            context.pause(self.steady()).await;
            windows.push(rollout.swap(&client, model_of(swap)).await?);
            context.step();
        }
        context.pause(self.steady()).await;
        let seconds = began.elapsed().as_secs_f64();
        let busy = (busy_seconds(&server).await? - busy) / seconds;
        running.stop().await?;
        let after = idle(context, &server).await?;
        Ok(Phase { early, calls: log.drain(), windows, seconds, fresh, before, after, busy })
    }
}

/// The model that is swapped.
fn model_of(swap: usize) -> usize {
    usize::from(swap.is_multiple_of(LANGUAGE_EVERY))
}

/// What the server holds once nobody calls, closed connections included.
async fn idle(context: &Context, server: &Server) -> Result<Held> {
    context.pause(context.or_quick(Duration::from_secs(3), Duration::from_millis(300))).await;
    server.held()
}

async fn busy_seconds(server: &Server) -> Result<f64> {
    Ok(server.metrics().await?.value(surface::BATCH_SECONDS, &[]))
}

impl Phase {
    fn measures(&self, name: &str) -> Result<Vec<Measure>> {
        let named = |what: &str| format!("{name}: {what}");
        let (early, tally) = (Tally::of(&self.early), Tally::of(&self.calls));
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut took: Vec<f64> = self.windows.iter().map(|w| (w.to - w.from).as_secs_f64()).collect();
        took.sort_by(f64::total_cmp);
        let mut measures = vec![
            Measure::never(named("calls that failed"), early.failures() + tally.failures()),
            Measure::never(named("wrong scores, or of a version that was not meant"), early.wrong + tally.wrong),
            Measure::new(named("calls answered right"), tally.right as f64, ""),
            Measure::new(named("swaps"), self.windows.len() as f64, ""),
            Measure::new(named("a swap takes, median"), took[took.len() / 2], "s"),
            Measure::new(named("share of the time in which the engine computed"), self.busy * 100.0, "%"),
            Measure::new(named("calls a second"), tally.all() as f64 / self.seconds, ""),
        ];
        measures.extend(self.latencies(named)?);
        let growth = |of: fn(&Held) -> u64| (of(&self.after) as f64 / of(&self.before) as f64 - 1.0) * 100.0;
        let (resident, anonymous) = (growth(|held| held.resident), growth(|held| held.anonymous));
        let more = self.after.descriptors as f64 - self.before.descriptors as f64;
        measures.extend([
            Measure::new(named("resident memory before the first swap"), mib(self.fresh.resident), "MiB"),
            Measure::new(named("resident memory after the first swaps"), mib(self.before.resident), "MiB"),
            Measure::new(named("resident memory after the last swap"), mib(self.after.resident), "MiB"),
            Measure::new(named("growth from the first swaps to the last"), resident, "%").at_most(5.0),
            Measure::new(named("growth of the part of it that was allocated"), anonymous, "%"),
            Measure::new(named("descriptors more than before"), more, "").at_most(0.0),
        ]);
        Ok(measures)
    }

    /// p99 of every kind of call, and the largest ratio of those of which there are enough.
    fn latencies(&self, named: impl Fn(&str) -> String) -> Result<Vec<Measure>> {
        let mut measures = Vec::new();
        let mut ratios = Vec::new();
        for kind in Kind::ALL {
            let split = Split::of(&self.calls, kind, &self.windows)?;
            let Some(ratio) = split.ratio() else { continue };
            for (when, histogram) in [("steady", &split.steady), ("during swaps", &split.during)] {
                measures.push(Measure::new(named(&format!("{kind}, p99 {when}")), milliseconds(histogram, 0.99), "ms"));
            }
            measures.push(Measure::new(named(&format!("{kind}, calls during swaps")), split.during.len() as f64, ""));
            if split.during.len() >= ENOUGH_FOR_P99 {
                ratios.push(ratio);
            }
        }
        let enough = format!("kinds of calls with {ENOUGH_FOR_P99} during swaps");
        measures.insert(0, Measure::new(named(&enough), ratios.len() as f64, "").at_least(1.0));
        if let Some(worst) = ratios.into_iter().reduce(f64::max) {
            let what = "p99 during swaps over steady p99, largest of those kinds";
            measures.insert(0, Measure::new(named(what), worst, "").at_most(1.5));
        }
        Ok(measures)
    }
}
