//! All of it mixed, for a long time: swaps, failed loads, cancellations, reconnects, bursts, callers who do not read.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use plumb_client::{Client, Code, RetryPolicy, v1};
use plumb_proto::v1::generation_client::GenerationClient;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use tokio::task::{JoinHandle, JoinSet};

use crate::checkpoint::{Damage, damaged};
use crate::context::{Cast, Context, Experiment};
use crate::dialogues::RESPONSES;
use crate::expected::PM;
use crate::load::{BATCH, Call, Kind, Load, Tally, score_items};
use crate::options::Common;
use crate::process::Held;
use crate::report::Measure;
use crate::rollout::{Rollout, publish, publishing};
use crate::server::{Server, client_of};
use crate::surface;

/// Every worker connects anew after so many calls.
const RECONNECT_AFTER: usize = 200;
/// Versions that only fail are numbered from here on.
const FAILING_VERSIONS: u64 = 1_000_000;
/// What the server needs to come to its usual size is not growth.
const WARM_UP: f64 = 0.1;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Soak {
    #[command(flatten)]
    common: Common,
    /// How long [quick: 0.1].
    #[arg(long, default_value_t = 60.0, value_name = "MINUTES")]
    minutes: f64,
}

impl Soak {
    fn time(&self) -> Duration {
        Duration::from_secs_f64(self.common.or_quick(self.minutes, 0.1) * 60.0)
    }
}

impl Experiment for Soak {
    const NAME: &'static str = "soak";
    const TITLE: &'static str = "Everything mixed, for a long time";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "{} minutes under the load of {}, each connecting anew after {RECONNECT_AFTER} calls. Meanwhile, drawn from the \
             seed: a swap of a model, a load that fails, forty calls that are cancelled, fifty connections that come and \
             go, a burst of two hundred calls at once, a caller of Generate who does not read. Every score is compared bit \
             for bit. Memory, descriptors and threads are sampled; what they grow by is read from a straight line through \
             the samples and from the medians of their first and last quarter, the first tenth left out.",
            self.time().as_secs_f64() / 60.0,
            self.common.mix().in_words()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(3, 2).await?;
        let (way, flags) = publishing(context, &cast)?;
        let broken = broken(context, &cast)?;
        let (rollout, server) = Rollout::start(context, &cast, way, &flags, None).await?;
        let tally = Arc::new(Mutex::new(Tally::default()));
        let load = Load {
            reconnect_after: Some(RECONNECT_AFTER),
            ..Load::of(server.url(), &cast.judge, tally.clone(), context.seed)
        };
        let running = load.start(self.common.mix());
        let sampler = sample(server.pid(), context.or_quick(Duration::from_secs(5), Duration::from_millis(100)));
        let client = server.client()?;
        let mut story = Story { context, cast: &cast, server: &server, client, rollout, broken, load: load.clone() };
        let done = story.tell(self.time()).await;
        sampler.stop.abort();
        running.stop().await?;
        let done = done?;
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
        context.show(&tally);
        let samples = sampler.samples.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(measures(&tally, &done, &samples))
    }
}

/// Checkpoints that cannot be loaded.
fn broken(context: &Context, cast: &Cast) -> Result<Vec<PathBuf>> {
    let root = context.folder().join("sound");
    publish(context, &cast.preference[0], &root, PM)?;
    let damages =
        [Damage::CorruptByte, Damage::WrongDigest, Damage::Truncated, Damage::WrongShape, Damage::MissingTensor];
    let make = |damage: Damage| {
        let folder = context.folder().join(format!("damaged-{damage:?}"));
        damaged(&root.join(PM).join("1"), &folder, damage)?;
        Ok(folder)
    };
    damages.into_iter().map(make).collect()
}

/// What happens beside the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Swap,
    FailedLoad,
    Cancellations,
    Reconnects,
    Burst,
    UnreadCall,
}

impl Event {
    const ALL: [Self; 6] =
        [Self::Swap, Self::FailedLoad, Self::Cancellations, Self::Reconnects, Self::Burst, Self::UnreadCall];
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Swap => "swaps",
            Self::FailedLoad => "failed loads",
            Self::Cancellations => "times forty calls were cancelled",
            Self::Reconnects => "times fifty connections came and went",
            Self::Burst => "bursts of two hundred calls",
            Self::UnreadCall => "callers who did not read",
        })
    }
}

struct Story<'a> {
    context: &'a Context,
    cast: &'a Cast,
    server: &'a Server,
    client: Client,
    rollout: Rollout,
    broken: Vec<PathBuf>,
    load: Load,
}

/// How often each event happened, and loads that did not fail.
#[derive(Default)]
struct Done {
    events: BTreeMap<Event, usize>,
    not_failed: usize,
}

impl Story<'_> {
    async fn tell(&mut self, time: Duration) -> Result<Done> {
        let (mut rng, mut done, began) = (self.context.rng(2), Done::default(), Instant::now());
        self.context.begin(time.as_secs(), "seconds");
        // Each event once, so that a short run has all of them; then as they are drawn.
        let mut first = Event::ALL.iter();
        while began.elapsed() < time || first.len() > 0 {
            let event = *first.next().or_else(|| Event::ALL.choose(&mut rng)).context("no event")?;
            let number = done.events.entry(event).or_default();
            *number += 1;
            let number = *number;
            self.context.message(event.to_string());
            match event {
                Event::Swap => drop(self.rollout.swap(&self.client, usize::from(rng.random_bool(0.2))).await?),
                Event::FailedLoad => done.not_failed += usize::from(!self.fail_to_load(number, &mut rng).await?),
                Event::Cancellations => self.cancel(&mut rng).await?,
                Event::Reconnects => self.reconnect().await?,
                Event::Burst => self.burst(&mut rng).await?,
                Event::UnreadCall => self.leave_unread(&mut rng).await?,
            }
            let pause = self.context.or_quick(rng.random_range(0.2..3.0), 0.05);
            self.context.pause(Duration::from_secs_f64(pause)).await;
            self.context.at(began.elapsed().as_secs());
        }
        Ok(done)
    }

    /// Answers whether the load failed, as it has to.
    async fn fail_to_load(&self, number: usize, rng: &mut ChaCha8Rng) -> Result<bool> {
        let folder = self.broken.choose(rng).context("no broken checkpoint")?;
        let request = surface::version_request(PM, FAILING_VERSIONS + number as u64, folder);
        Ok(surface::refused(&self.client, request).await?.is_some_and(|refused| refused.is_listed))
    }

    fn items(&self, rng: &mut ChaCha8Rng) -> Vec<(usize, usize)> {
        let dialogues = self.cast.judge.expected().dialogues.len();
        (0..BATCH).map(|_| (rng.random_range(0..dialogues), rng.random_range(0..RESPONSES))).collect()
    }

    /// Calls whose caller goes away.
    async fn cancel(&self, rng: &mut ChaCha8Rng) -> Result<()> {
        let client = client_of(&self.load.url, RetryPolicy::none())?;
        let mut calls = JoinSet::new();
        for _ in 0..40 {
            let (client, judge, items) = (client.clone(), Arc::clone(&self.load.judge), self.items(rng));
            let patience = Duration::from_millis(rng.random_range(0..30));
            calls.spawn(async move {
                // Dropped, it is cancelled on the server.
                let _ = tokio::time::timeout(patience, score_items(&client, &judge, items)).await;
            });
        }
        while let Some(call) = calls.join_next().await {
            call?;
        }
        Ok(())
    }

    /// Connections that are made, asked once and closed.
    async fn reconnect(&self) -> Result<()> {
        for _ in 0..50 {
            client_of(&self.load.url, RetryPolicy::none())?.list_models().await?;
        }
        Ok(())
    }

    /// More calls at once than the server has room for, perhaps.
    async fn burst(&self, rng: &mut ChaCha8Rng) -> Result<()> {
        let client = client_of(&self.load.url, RetryPolicy::none())?;
        let mut calls = JoinSet::new();
        for _ in 0..self.context.or_quick(200, 20) {
            let (client, judge, items) = (client.clone(), Arc::clone(&self.load.judge), self.items(rng));
            let sink = Arc::clone(&self.load.sink);
            calls.spawn(async move {
                let began = Instant::now();
                let end = score_items(&client, &judge, items).await;
                sink.take(Call { kind: Kind::Batch, began, ended: Instant::now(), end });
            });
        }
        while let Some(call) = calls.join_next().await {
            call?;
        }
        Ok(())
    }

    /// A long answer of which nobody reads more than the beginning.
    async fn leave_unread(&self, rng: &mut ChaCha8Rng) -> Result<()> {
        let dialogue = rng.random_range(0..self.cast.judge.expected().prompts());
        let request = v1::GenerateRequest {
            prompt: Some(self.cast.judge.expected().dialogues[dialogue].prompt()),
            stopping: Some(v1::Stopping { max_new_tokens: Some(500), ignore_eos: true, ..Default::default() }),
            n: Some(8),
            ..Default::default()
        };
        let mut client = GenerationClient::new(self.server.narrow_channel().await?);
        match client.generate(request).await {
            Ok(answer) => {
                let mut answers = answer.into_inner();
                answers.message().await?;
                let time = self.context.or_quick(rng.random_range(1.0..5.0), 0.2);
                self.context.pause(Duration::from_secs_f64(time)).await;
                Ok(())
            }
            Err(status) if status.code() == Code::ResourceExhausted => Ok(()),
            Err(status) => Err(status.into()),
        }
    }
}

struct Sampler {
    samples: Arc<Mutex<Vec<Held>>>,
    stop: JoinHandle<()>,
}

/// Looks at a process again and again.
fn sample(pid: u32, every: Duration) -> Sampler {
    let samples: Arc<Mutex<Vec<Held>>> = Arc::default();
    let into = Arc::clone(&samples);
    let stop = tokio::spawn(async move {
        while let Ok(held) = Held::by(pid) {
            into.lock().unwrap_or_else(PoisonError::into_inner).push(held);
            tokio::time::sleep(every).await;
        }
    });
    Sampler { samples, stop }
}

fn measures(tally: &Tally, done: &Done, samples: &[Held]) -> Vec<Measure> {
    let mut measures = vec![
        Measure::never("wrong scores", tally.wrong),
        Measure::never(
            "calls that failed, other than by being refused",
            tally.failures_other_than(&[Code::ResourceExhausted]),
        ),
        Measure::never("refusals without a time to come back", tally.without_retry_info),
        Measure::never("broken checkpoints that were loaded", done.not_failed),
        Measure::new("calls answered right", tally.right as f64, ""),
        Measure::new("calls refused", tally.with(Code::ResourceExhausted) as f64, ""),
    ];
    for event in Event::ALL {
        let count = done.events.get(&event).copied().unwrap_or_default();
        measures.push(Measure::new(event.to_string(), count as f64, ""));
    }
    let settled = &samples[(samples.len() as f64 * WARM_UP) as usize..];
    let mib = |held: &Held| held.resident as f64 / f64::from(1 << 20);
    type Read<'a> = &'a dyn Fn(&Held) -> f64;
    let kinds: [(&str, &str, Read<'_>); 3] = [
        ("resident memory", "MiB", &mib),
        ("descriptors", "", &|held| held.descriptors as f64),
        ("threads", "", &|held| held.threads as f64),
    ];
    for (name, unit, of) in kinds {
        let trend = Trend::of(&settled.iter().map(of).collect::<Vec<_>>());
        measures.extend([
            Measure::new(format!("{name}, median of the first quarter"), trend.first, unit),
            Measure::new(format!("{name}, median of the last quarter"), trend.last, unit),
            Measure::new(format!("{name}, growth from the first to the last quarter"), trend.growth(), "%")
                .at_most(5.0),
            Measure::new(format!("{name}, growth by a straight line"), trend.line, "%").at_most(5.0),
        ]);
    }
    measures
}

/// How values that were taken one after another, at equal distances, go on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Trend {
    first: f64,
    last: f64,
    /// From the beginning to the end of the line of least squares, in percent of the mean.
    line: f64,
}

impl Trend {
    fn of(values: &[f64]) -> Self {
        let quarter = values.len() / 4;
        if quarter == 0 {
            return Self::default();
        }
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let middle = (n - 1.0) / 2.0;
        let (mut products, mut squares) = (0.0, 0.0);
        for (i, value) in values.iter().enumerate() {
            let x = i as f64 - middle;
            products += x * (value - mean);
            squares += x * x;
        }
        let line = products / squares * (n - 1.0) / mean * 100.0;
        Self { first: median(&values[..quarter]), last: median(&values[values.len() - quarter..]), line }
    }

    fn growth(self) -> f64 {
        (self.last / self.first - 1.0) * 100.0
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trend_is_seen_through_noise_and_a_level_is_none() {
        let check = |values: Vec<f64>, line: f64, growth: f64| {
            let trend = Trend::of(&values);
            assert!((trend.line - line).abs() < 0.5 && (trend.growth() - growth).abs() < 0.5, "{trend:?}");
        };
        let noise = |i: usize| f64::from(u8::from(i.is_multiple_of(2)));
        check((0..1000).map(|i| 100.0 + noise(i)).collect(), 0.0, 0.0);
        check((0..=1000).map(|i| 100.0 + 10.0 * i as f64 / 1000.0).collect(), 9.5, 7.4);
        assert_eq!(Trend::of(&[1.0, 2.0]), Trend::default());
    }
}
