//! Ten times more is asked for than the server can do, by many clients.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use plumb_client::Code;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::context::{Cast, Context, Experiment};
use crate::dialogues::RESPONSES;
use crate::expected::PM;
use crate::latency::{milliseconds, record};
use crate::load::{Call, End, Kind, Tally};
use crate::options::Common;
use crate::report::Measure;
use crate::server::Server;
use crate::surface::Caller;

/// Calls in flight at a time that are tried to find the capacity.
const CONCURRENCY: [usize; 3] = [8, 32, 128];
/// Of all clients, those that ask for half of all there is in the unequal phase.
const GREEDY: usize = 10;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Overload {
    #[command(flatten)]
    common: Common,
    /// Clients, each with a connection and an id [quick: 20].
    #[arg(long, default_value_t = 200, value_name = "N")]
    clients: usize,
    /// What is offered, over what the server can do [quick: 3].
    #[arg(long, default_value_t = 10.0, value_name = "X")]
    times: f64,
    /// Items of a call; the more, the less of the machine goes into calls rather than into scores [quick: 4].
    #[arg(long, default_value_t = 16, value_name = "N")]
    items: usize,
    /// How long each phase takes; fairness needs some forty answers for each client [quick: 1.5].
    #[arg(long, default_value_t = 60.0, value_name = "SECS")]
    seconds: f64,
    /// How long a client waits for an answer.
    #[arg(long, default_value_t = 10.0, value_name = "SECS")]
    deadline_secs: f64,
}

impl Overload {
    fn clients(&self) -> usize {
        self.common.or_quick(self.clients, 20)
    }

    fn times(&self) -> f64 {
        self.common.or_quick(self.times, 3.0)
    }

    fn items(&self) -> usize {
        self.common.or_quick(self.items, 4)
    }

    fn phase(&self) -> Duration {
        Duration::from_secs_f64(self.common.or_quick(self.seconds, 1.5))
    }
}

impl Experiment for Overload {
    const NAME: &'static str = "overload";
    const TITLE: &'static str = "Offered load of ten times the capacity";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        let cores = Cores::of_machine();
        let place = match &cores {
            Some(cores) => {
                format!("The server has cores {}, the clients {}.", cores.server_list(), cores.clients_list())
            }
            None => "There is one core for the server and the clients.".to_owned(),
        };
        format!(
            "Calls of Score with {} texts. The capacity is the most that is answered right in a second with {CONCURRENCY:?} \
             calls in flight. Then {} clients, each with a connection and an id of its own, begin {:.0} times as many calls, \
             at times of a Poisson process that does not wait for answers; then the same with half of the calls by {GREEDY} \
             of the clients; then every client has one call at a time and, refused, waits as long as it is told before it \
             tries again. Goodput counts what is answered right within {:.0} s. Times are taken at the client. {place}",
            self.items(),
            self.clients(),
            self.times(),
            self.deadline_secs
        )
    }

    fn before_threads(&self) -> Result<()> {
        match Cores::of_machine() {
            Some(cores) => cores.take_clients(),
            None => Ok(()),
        }
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(1, 0).await?;
        cast.judge.begins(PM, 1, 0);
        let cores = Cores::of_machine().map(|cores| cores.server_list());
        let launch = context.launch().model(PM, &cast.preference[0]).flags("--kv-cache-mib 64").cores(cores);
        let server = launch.start(context.folder()).await?;
        let crowd = Crowd::gather(&server, &cast, self).await?;

        let levels = context.or_quick(&CONCURRENCY[..], &CONCURRENCY[..1]);
        context.begin(levels.len() as u64 + 3, "phases");
        let mut capacity = 0f64;
        for &level in levels {
            let mut time = self.phase() / 3;
            let outcome = loop {
                let outcome = crowd.closed(level, time, context.seed).await?;
                // A slow or busy machine may take longer for a call.
                if outcome.goodput() > 0.0 || time > crowd.deadline {
                    break outcome;
                }
                time *= 2;
            };
            context.note(&format!("  {level} calls in flight: {:.1} answered a second", outcome.goodput()));
            capacity = capacity.max(outcome.goodput());
            context.step();
        }
        ensure!(capacity > 0.0, "nothing is answered right: {}", server.log_tail());
        let before = server.held()?;
        let rate = capacity * self.times();
        let even = crowd.open(&|_| rate / self.clients() as f64, self.phase(), context.seed).await?;
        context.show(&even.tally);
        context.step();
        let during = server.held()?;
        let of_few = rate / 2.0 / GREEDY.min(self.clients() / 2) as f64;
        let of_many = rate / 2.0 / (self.clients() - GREEDY.min(self.clients() / 2)) as f64;
        let greedy = GREEDY.min(self.clients() / 2);
        let unequal =
            crowd.open(&|i| if i < greedy { of_few } else { of_many }, self.phase(), context.seed + 1).await?;
        context.step();
        let patient = crowd.patient(self.phase(), context.seed).await?;
        context.step();

        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut measures = vec![
            Measure::new("capacity", capacity, "calls/s"),
            Measure::new("offered, over the capacity", even.offered() / capacity, "").at_least(self.times() * 0.95),
        ];
        measures.extend(even.measures("", capacity)?);
        measures.extend([
            Measure::new("resident memory at the capacity, most so far", mib(before.peak), "MiB"),
            Measure::new(
                "growth of the most resident memory",
                (mib(during.peak) / mib(before.peak) - 1.0) * 100.0,
                "%",
            )
            .at_most(25.0),
        ]);
        measures.extend(unequal.measures("half of it by a few: ", capacity)?);
        measures.extend(patient.measures_of_patience(capacity));
        Ok(measures)
    }
}

/// The clients.
#[derive(Clone)]
struct Crowd {
    callers: Vec<Caller>,
    cast: Arc<Cast>,
    items: usize,
    deadline: Duration,
}

impl Crowd {
    async fn gather(server: &Server, cast: &Cast, options: &Overload) -> Result<Self> {
        let mut callers = Vec::new();
        for i in 0..options.clients() {
            let channel: Channel = Endpoint::from_shared(server.url())?.tcp_nodelay(true).connect().await?;
            callers.push(Caller::new(channel, &format!("client-{i}"))?);
        }
        let cast = Arc::new(Cast {
            judge: Arc::clone(&cast.judge),
            preference: cast.preference.clone(),
            language: Vec::new(),
        });
        let deadline = Duration::from_secs_f64(options.deadline_secs);
        Ok(Self { callers, cast, items: options.items(), deadline })
    }

    fn items(&self, rng: &mut ChaCha8Rng) -> Vec<(usize, usize)> {
        let dialogues = self.cast.judge.expected().dialogues.len();
        (0..self.items).map(|_| (rng.random_range(0..dialogues), rng.random_range(0..RESPONSES))).collect()
    }

    /// One call of a client.
    async fn call(&self, client: usize, items: Vec<(usize, usize)>) -> Ended {
        let began = Instant::now();
        let end = self.callers[client].score(&self.cast.judge, items, self.deadline).await;
        Ended { client, call: Call { kind: Kind::Batch, began, ended: Instant::now(), end } }
    }

    /// So many calls at a time, for a while.
    async fn closed(&self, level: usize, time: Duration, seed: u64) -> Result<Outcome> {
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for worker in 0..level {
            let crowd = self.clone();
            workers.spawn(async move {
                let mut rng = ChaCha8Rng::seed_from_u64(seed << 16 | worker as u64);
                let mut ended = Vec::new();
                while began.elapsed() < time {
                    ended.push(crowd.call(worker % crowd.callers.len(), crowd.items(&mut rng)).await);
                }
                ended
            });
        }
        self.gathered(workers, began, time).await
    }

    /// Calls begin at times of their own, whatever becomes of those before.
    async fn open(&self, rate_of: &dyn Fn(usize) -> f64, time: Duration, seed: u64) -> Result<Outcome> {
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for client in 0..self.callers.len() {
            let (crowd, rate) = (self.clone(), rate_of(client));
            workers.spawn(async move {
                let mut rng = ChaCha8Rng::seed_from_u64(seed << 16 | client as u64);
                let (mut calls, mut ended, mut at) = (JoinSet::new(), Vec::new(), Duration::ZERO);
                loop {
                    // Gaps of a Poisson process; 1 - u is never 0.
                    at += Duration::from_secs_f64(-(1.0 - rng.random::<f64>()).ln() / rate);
                    if at >= time {
                        break;
                    }
                    tokio::time::sleep_until((began + at).into()).await;
                    let (crowd, items) = (crowd.clone(), crowd.items(&mut rng));
                    calls.spawn(async move { crowd.call(client, items).await });
                    while let Some(call) = calls.try_join_next() {
                        ended.extend(call.ok());
                    }
                }
                while let Some(call) = calls.join_next().await {
                    ended.extend(call.ok());
                }
                ended
            });
        }
        self.gathered(workers, began, time).await
    }

    /// Every client has one call at a time, and waits as it is told.
    async fn patient(&self, time: Duration, seed: u64) -> Result<Outcome> {
        let (began, gave_up) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let mut workers = JoinSet::new();
        for client in 0..self.callers.len() {
            let (crowd, gave_up) = (self.clone(), Arc::clone(&gave_up));
            workers.spawn(async move {
                let mut rng = ChaCha8Rng::seed_from_u64(seed << 16 | client as u64);
                let (mut ended, mut items, mut since) = (Vec::new(), crowd.items(&mut rng), Instant::now());
                while began.elapsed() < time {
                    ended.push(crowd.call(client, items.clone()).await);
                    match ended.last().map(|ended| &ended.call.end) {
                        Some(End::Failed { retry_after: Some(after), .. }) => tokio::time::sleep(*after).await,
                        _ => (items, since) = (crowd.items(&mut rng), Instant::now()),
                    }
                    if since.elapsed() > crowd.deadline {
                        gave_up.fetch_add(1, Ordering::Relaxed);
                        since = Instant::now();
                    }
                }
                ended
            });
        }
        let mut outcome = self.gathered(workers, began, time).await?;
        outcome.gave_up = gave_up.load(Ordering::Relaxed);
        Ok(outcome)
    }

    /// What became of the calls of a phase. What is answered after its end was begun in it, and would make it look
    /// faster.
    async fn gathered(&self, mut workers: JoinSet<Vec<Ended>>, began: Instant, time: Duration) -> Result<Outcome> {
        let (end, mut ended) = (began + time, Vec::new());
        while let Some(worker) = workers.join_next().await {
            ended.extend(worker?);
        }
        let tally = Tally::of(ended.iter().map(|ended| &ended.call));
        let all = ended.len();
        ended.retain(|ended| ended.call.ended <= end || ended.call.end != End::Right);
        let (late, seconds) = (all - ended.len(), time.as_secs_f64());
        Ok(Outcome { ended, tally, seconds, clients: self.callers.len(), late, gave_up: 0 })
    }
}

struct Ended {
    client: usize,
    call: Call,
}

/// What became of the calls of a phase.
struct Outcome {
    ended: Vec<Ended>,
    tally: Tally,
    seconds: f64,
    clients: usize,
    /// Answered after the end of the phase, and counted as begun, not as answered.
    late: usize,
    /// Waits that were longer than a client's deadline.
    gave_up: usize,
}

impl Outcome {
    /// Calls answered right in a second.
    fn goodput(&self) -> f64 {
        self.right().count() as f64 / self.seconds
    }

    /// Calls begun in a second.
    fn offered(&self) -> f64 {
        self.tally.all() as f64 / self.seconds
    }

    fn right(&self) -> impl Iterator<Item = &Ended> {
        self.ended.iter().filter(|ended| ended.call.end == End::Right)
    }

    /// Jain's index of the calls that each client had answered right: 1 if all had as many, 1/n if one had all.
    fn fairness(&self) -> f64 {
        let mut answered = vec![0u64; self.clients];
        self.right().for_each(|ended| answered[ended.client] += 1);
        jain(&answered)
    }

    fn measures(&self, prefix: &str, capacity: f64) -> Result<Vec<Measure>> {
        let named = |what: &str| format!("{prefix}{what}");
        let mut refused: Histogram<u64> = Histogram::new(3)?;
        let mut answered: Histogram<u64> = Histogram::new(3)?;
        for ended in &self.ended {
            match &ended.call.end {
                End::Right => record(&mut answered, ended.call.took()),
                End::Failed { code: Code::ResourceExhausted, .. } => record(&mut refused, ended.call.took()),
                _ => {}
            }
        }
        let late = self.tally.with(Code::DeadlineExceeded);
        let other = self.tally.failures_other_than(&[Code::ResourceExhausted, Code::DeadlineExceeded]);
        let starved = self.clients - self.right().map(|ended| ended.client).collect::<HashSet<_>>().len();
        Ok(vec![
            Measure::new(named("goodput over the capacity"), self.goodput() / capacity * 100.0, "%").at_least(90.0),
            Measure::new(named("refusals answered, p50"), milliseconds(&refused, 0.5), "ms"),
            Measure::new(named("refusals answered, p99"), milliseconds(&refused, 0.99), "ms").at_most(50.0),
            Measure::new(named("refusals answered, slowest"), milliseconds(&refused, 1.0), "ms"),
            Measure::new(named("Jain's index of the clients' goodput"), self.fairness(), "").at_least(0.9),
            Measure::new(named("clients without any answer"), starved as f64, "").at_most(0.0),
            Measure::never(named("wrong scores"), self.tally.wrong),
            Measure::never(named("refusals without a time to come back"), self.tally.without_retry_info),
            Measure::never(named("calls that failed otherwise"), other),
            Measure::new(named("calls refused"), refused.len() as f64, ""),
            Measure::new(named("calls admitted that did not end within the deadline"), late as f64, ""),
            Measure::new(named("answers after the end of the phase, not counted"), self.late as f64, ""),
            Measure::new(named("calls answered right, p50"), milliseconds(&answered, 0.5), "ms"),
            Measure::new(named("calls answered right, p99"), milliseconds(&answered, 0.99), "ms"),
        ])
    }

    fn measures_of_patience(&self, capacity: f64) -> Vec<Measure> {
        let named = |what: &str| format!("clients that wait as they are told: {what}");
        let refused = self.tally.with(Code::ResourceExhausted) as f64;
        vec![
            Measure::new(named("goodput over the capacity"), self.goodput() / capacity * 100.0, "%").at_least(90.0),
            Measure::new(named("refusals for an answer"), refused / self.right().count() as f64, ""),
            Measure::new(named("Jain's index of the clients' goodput"), self.fairness(), "").at_least(0.9),
            Measure::new(named("waits longer than the deadline"), self.gave_up as f64, ""),
            Measure::never(named("wrong scores"), self.tally.wrong),
        ]
    }
}

fn jain(values: &[u64]) -> f64 {
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(sum, squares), &value| {
        let value = value as f64;
        (sum + value, squares + value * value)
    });
    if squares == 0.0 { 0.0 } else { sum * sum / (values.len() as f64 * squares) }
}

/// Cores apart for the server and for the clients, so that neither takes from the other.
struct Cores {
    server: Vec<usize>,
    clients: Vec<usize>,
}

impl Cores {
    /// The last quarter, and at least one, for the clients; `None` if there is only one core. From the machine's
    /// cores, not from this process's: those change.
    fn of_machine() -> Option<Self> {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
        let last: usize = text.trim().rsplit(['-', ',']).next()?.parse().ok()?;
        let all: Vec<usize> = (0..=last).collect();
        let clients = (all.len() / 4).max(1);
        let (server, clients) = all.split_at(all.len() - clients);
        (!server.is_empty()).then(|| Self { server: server.to_vec(), clients: clients.to_vec() })
    }

    fn server_list(&self) -> String {
        list(&self.server)
    }

    fn clients_list(&self) -> String {
        list(&self.clients)
    }

    /// This thread, and those that it starts from now on, run on the clients' cores.
    fn take_clients(&self) -> Result<()> {
        let mut set = CpuSet::new();
        self.clients.iter().for_each(|&core| set.set(core));
        sched_setaffinity(None, &set).context("cores for the clients")?;
        let taken = sched_getaffinity(None)?;
        anyhow::ensure!(taken.count() > 0, "no core for the clients");
        Ok(())
    }
}

fn list(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index_is_one_for_equals_and_one_in_n_for_one_of_n() {
        assert_eq!(jain(&[5, 5, 5, 5]), 1.0);
        assert_eq!(jain(&[20, 0, 0, 0]), 0.25);
        assert_eq!(jain(&[0, 0]), 0.0);
    }
}
