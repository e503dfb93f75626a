//! The server is told to stop under load.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use plumb_client::{Code, v1};
use plumb_proto::v1::generation_client::GenerationClient;
use rand::Rng;
use tokio::task::JoinHandle;
use tonic::Streaming;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::context::{Cast, Context, Experiment};
use crate::expected::{LM, PM};
use crate::load::{Call, End, Load, Log, score_items};
use crate::options::Common;
use crate::report::Measure;
use crate::server::{Launch, Server};
use crate::surface::{self, Faults};

/// After NOT_SERVING, the server goes on as before for so long.
const LAME_DUCK: Duration = Duration::from_secs(1);
/// After that, calls in flight may finish for so long.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same where a call is stuck.
const DEADLINE_STUCK: Duration = Duration::from_secs(2);
/// For failed calls to tell their callers, for connections to close and for the process to end.
const LAST: Duration = Duration::from_secs(3);
/// A call that begins so shortly before the end of the lame duck may reach the server after it.
const ON_THE_WAY: Duration = Duration::from_millis(200);

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    common: Common,
    /// Servers that are told to stop under load [quick: 1].
    #[arg(long, default_value_t = 20, value_name = "N")]
    stops: usize,
    /// Servers that are told to stop while a call is stuck, of each kind [quick: 1].
    #[arg(long, default_value_t = 5, value_name = "N")]
    stuck: usize,
}

impl Drain {
    fn stops(&self) -> usize {
        self.common.or_quick(self.stops, 1)
    }

    fn stuck(&self) -> usize {
        self.common.or_quick(self.stuck, 1)
    }
}

impl Experiment for Drain {
    const NAME: &'static str = "drain";
    const TITLE: &'static str = "SIGTERM under load";
    const FAULTY: bool = true;

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "{} servers with a lame duck of {LAME_DUCK:?} and a drain deadline of {DEADLINE:?} get SIGTERM at a random \
             moment under the load of {}; nothing is tried again. A call that begins before the lame duck ends has to be \
             answered right, a later one answered right or with UNAVAILABLE; a watcher of health has to see NOT_SERVING \
             before anybody is refused. Then {} servers each with a deadline of {DEADLINE_STUCK:?}: with a caller of \
             Generate who stops reading, and with an engine whose step never ends.",
            self.stops(),
            self.common.mix().in_words(),
            self.stuck()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(1, 1).await?;
        for name in [PM, LM] {
            cast.judge.begins(name, 1, 0);
        }
        context.begin((self.stops() + 2 * self.stuck()) as u64, "stops");
        let mut stops = Vec::new();
        for i in 0..self.stops() {
            stops.push(self.stop(context, &cast, i as u64).await?);
            context.step();
        }
        let (mut unread, mut stuck) = (Vec::new(), Vec::new());
        for _ in 0..self.stuck() {
            unread.push(with_unread_call(context, &cast).await?);
            context.step();
            stuck.push(with_stuck_engine(context, &cast).await?);
            context.step();
        }
        let mut measures = measures(&stops);
        measures.extend(measures_of_stuck("a caller who does not read", &unread));
        measures.extend(measures_of_stuck("a step that does not end", &stuck));
        Ok(measures)
    }
}

fn launch(launch: Launch, cast: &Cast, deadline: Duration, lame_duck: Duration) -> Launch {
    let launch = launch.model(PM, &cast.preference[0]).model(LM, &cast.language[0]);
    let launch = launch.flags("--kv-cache-mib 64").flags(surface::ROOMY);
    let (deadline, lame_duck) = (deadline.as_secs_f64(), lame_duck.as_secs_f64());
    launch.flags(&format!("--drain-timeout-secs {deadline} --lame-duck-secs {lame_duck}"))
}

/// A stop under load.
struct Stop {
    signal: Instant,
    not_serving: Option<Instant>,
    end: Ended,
    calls: Vec<Call>,
}

/// How a process ended.
struct Ended {
    took: Duration,
    code: Option<i32>,
}

impl Drain {
    async fn stop(&self, context: &Context, cast: &Cast, number: u64) -> Result<Stop> {
        let mut server = launch(context.launch(), cast, DEADLINE, LAME_DUCK).start(context.folder()).await?;
        let log = Arc::new(Log::default());
        let load = Load::of(server.url(), &cast.judge, log.clone(), context.seed << 8 | number);
        let watcher = watch(&server).await?;
        let running = load.start(self.common.mix());
        let busy = context.rng(number).random_range(0.5..context.or_quick(2.0, 0.8));
        context.pause(Duration::from_secs_f64(busy)).await;
        let signal = Instant::now();
        server.terminate()?;
        let end = ended(&mut server, signal).await?;
        running.stop().await?;
        Ok(Stop { signal, not_serving: watcher.await?, end, calls: log.drain() })
    }
}

async fn ended(server: &mut Server, signal: Instant) -> Result<Ended> {
    let code = server.exit_code(Duration::from_secs(60)).await?;
    Ok(Ended { took: signal.elapsed(), code })
}

/// Answers when a watcher of health saw that the server no longer serves.
async fn watch(server: &Server) -> Result<JoinHandle<Option<Instant>>> {
    let mut client = HealthClient::new(server.narrow_channel().await?);
    let mut changes: Streaming<HealthCheckResponse> = client.watch(HealthCheckRequest::default()).await?.into_inner();
    let first = changes.message().await?.context("the watch of health ended")?;
    anyhow::ensure!(first.status() == ServingStatus::Serving, "the server does not serve");
    Ok(tokio::spawn(async move {
        loop {
            match changes.message().await {
                Ok(Some(change)) if change.status() == ServingStatus::NotServing => return Some(Instant::now()),
                Ok(Some(_)) => {}
                _ => return None,
            }
        }
    }))
}

/// A caller of Generate takes one message and no more; meanwhile the server is told to stop.
async fn with_unread_call(context: &Context, cast: &Cast) -> Result<Ended> {
    let mut server = launch(context.launch(), cast, DEADLINE_STUCK, Duration::ZERO).start(context.folder()).await?;
    let request = v1::GenerateRequest {
        prompt: Some(cast.judge.expected().dialogues[0].prompt()),
        stopping: Some(v1::Stopping { max_new_tokens: Some(800), ignore_eos: true, ..Default::default() }),
        // Many samples: more than all buffers on the way hold.
        n: Some(256),
        ..Default::default()
    };
    let mut client = GenerationClient::new(server.narrow_channel().await?);
    let mut unread = client.generate(request).await?.into_inner();
    unread.message().await?.context("the stream ended")?;
    context.pause(Duration::from_millis(500)).await;
    let signal = Instant::now();
    server.terminate()?;
    let end = ended(&mut server, signal).await?;
    drop(unread);
    Ok(end)
}

/// A step takes longer than anybody waits; meanwhile the server is told to stop.
async fn with_stuck_engine(context: &Context, cast: &Cast) -> Result<Ended> {
    let faults = Faults::in_folder(context.folder())?;
    let launch = launch(context.launch_faulty(&faults)?, cast, DEADLINE_STUCK, Duration::ZERO);
    let mut server = launch.start(context.folder()).await?;
    let client = server.client()?;
    faults.ask("stuck-engine 60000")?;
    let judge = Arc::clone(&cast.judge);
    let call = tokio::spawn(async move { score_items(&client, &judge, vec![(0, 0)]).await });
    context.pause(Duration::from_millis(500)).await;
    let signal = Instant::now();
    server.terminate()?;
    let end = ended(&mut server, signal).await?;
    if call.await? == End::Right {
        context.note("  the engine was not stuck: the call was answered");
    }
    Ok(end)
}

fn measures(stops: &[Stop]) -> Vec<Measure> {
    let (mut accepted, mut lost, mut later, mut otherwise, mut disorder) = (0, 0, 0, 0, 0);
    for stop in stops {
        let open_until = stop.signal + LAME_DUCK - ON_THE_WAY;
        let unavailable = |call: &Call| matches!(call.end, End::Failed { code: Code::Unavailable, .. });
        for call in &stop.calls {
            let is_right = call.end == End::Right;
            if call.began < open_until {
                accepted += 1;
                lost += usize::from(!is_right);
            } else {
                later += 1;
                otherwise += usize::from(!is_right && !unavailable(call));
            }
        }
        let first_refusal = stop.calls.iter().filter(|call| unavailable(call)).map(|call| call.ended).min();
        let in_order = stop.not_serving.is_some_and(|seen| first_refusal.is_none_or(|refused| seen < refused));
        disorder += usize::from(!in_order);
    }
    let mut seen: Vec<f64> =
        stops.iter().filter_map(|stop| Some((stop.not_serving? - stop.signal).as_secs_f64() * 1e3)).collect();
    seen.sort_by(f64::total_cmp);
    let slowest = stops.iter().map(|stop| stop.end.took).max().unwrap_or_default();
    let zero = stops.iter().filter(|stop| stop.end.code == Some(0)).count();
    vec![
        Measure::never("accepted calls that were not answered right", lost),
        Measure::new("accepted calls", accepted as f64, ""),
        Measure::never("later calls that were neither answered right nor UNAVAILABLE", otherwise),
        Measure::new("later calls", later as f64, ""),
        Measure::never("servers of which NOT_SERVING was not seen before a refusal", disorder),
        Measure::new(
            "NOT_SERVING seen after the signal, median",
            seen.get(seen.len() / 2).copied().unwrap_or(-1.0),
            "ms",
        ),
        Measure::new("NOT_SERVING seen after the signal, slowest", seen.last().copied().unwrap_or(-1.0), "ms"),
        Measure::all("servers that ended with code 0", zero, stops.len()),
        Measure::new("slowest end after the signal", slowest.as_secs_f64(), "s")
            .at_most((LAME_DUCK + DEADLINE + LAST).as_secs_f64()),
    ]
}

fn measures_of_stuck(what: &str, ends: &[Ended]) -> Vec<Measure> {
    let zero = ends.iter().filter(|end| end.code == Some(0)).count();
    let held = ends.iter().filter(|end| end.took >= DEADLINE_STUCK).count();
    let slowest = ends.iter().map(|end| end.took).max().unwrap_or_default();
    vec![
        Measure::all(format!("{what}: servers that ended with code 0"), zero, ends.len()),
        Measure::all(format!("{what}: servers that it held until the deadline"), held, ends.len()),
        Measure::new(format!("{what}: slowest end after the signal"), slowest.as_secs_f64(), "s")
            .at_most((DEADLINE_STUCK + LAST).as_secs_f64()),
    ]
}
