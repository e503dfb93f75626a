//! One of two replicas behind HAProxy is killed under load.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use plumb_client::RetryPolicy;
use tokio::net::TcpStream;

use crate::context::{Context, Experiment};
use crate::expected::PM;
use crate::load::{Call, Load, Log, Mix, Tally};
use crate::options::{Common, root};
use crate::report::Measure;
use crate::server::{Server, client_of, free_ports};
use crate::surface;

/// What a user would keep in flight; only calls with one answer, which the client may try again.
const MIX: Mix = Mix { single: 8, batch: 4, rank: 4, stream: 0, generate: 0 };
/// Longest wait until HAProxy sends calls to a replica.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Replicas {
    #[command(flatten)]
    common: Common,
    /// Kills, of one replica and the other in turn [quick: 2].
    #[arg(long, default_value_t = 10, value_name = "N")]
    kills: usize,
}

impl Replicas {
    fn kills(&self) -> usize {
        self.common.or_quick(self.kills, 2)
    }
}

impl Experiment for Replicas {
    const NAME: &'static str = "replicas";
    const TITLE: &'static str = "A replica behind HAProxy killed under load";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "Two servers behind HAProxy with deploy/haproxy.cfg, under the load of {} of plumb-client with its default \
             retries. {} times one of them, in turn, is killed with SIGKILL, stays away for a while and is started again. \
             A call fails if the caller sees an error. Generate and ScoreStream are not among them: what has begun to \
             stream is not tried again by the client.",
            MIX.in_words(),
            self.kills()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let cast = context.cast(1, 0).await?;
        cast.judge.begins(PM, 1, 0);
        let mut replicas = Vec::new();
        for _ in 0..2 {
            let ports = free_ports()?;
            let launch = context.launch().model(PM, &cast.preference[0]).flags("--kv-cache-mib 64").ports(ports);
            let server = launch.start(context.folder()).await?;
            replicas.push((launch, ports, server));
        }
        let (bind, _) = free_ports()?;
        let proxy = Proxy::start(bind, [replicas[0].1, replicas[1].1], context.folder()).await?;

        let log = Arc::new(Log::default());
        let load = Load {
            retry: RetryPolicy::default(),
            ..Load::of(format!("http://127.0.0.1:{bind}"), &cast.judge, log.clone(), context.seed)
        };
        let running = load.start(MIX);
        for (.., server) in &replicas {
            until_asked(server).await.with_context(|| proxy.said())?;
        }
        context.begin(self.kills() as u64, "kills");
        for kill in 0..self.kills() {
            let (launch, _, server) = &mut replicas[kill % 2];
            server.kill()?;
            context.pause(context.or_quick(Duration::from_secs(2), Duration::from_millis(700))).await;
            *server = launch.start(context.folder()).await?;
            until_asked(server).await.with_context(|| proxy.said())?;
            context.step();
        }
        running.stop().await?;
        let calls = log.drain();
        let tally = Tally::of(&calls);
        context.show(&tally);
        Ok(vec![
            Measure::never("calls that failed", tally.failures()),
            Measure::never("wrong scores", tally.wrong),
            Measure::new("calls answered right", tally.right as f64, ""),
            Measure::new("kills", self.kills() as f64, ""),
            Measure::new("slowest call", slowest(&calls).as_secs_f64() * 1e3, "ms"),
            Measure::new("longest time without an answer", longest_gap(&calls).as_secs_f64() * 1e3, "ms"),
        ])
    }
}

/// Waits until a replica computes something for somebody.
async fn until_asked(server: &Server) -> Result<()> {
    let batches = async || anyhow::Ok(server.metrics().await?.value(surface::BATCHES, &[]));
    let (began, before) = (Instant::now(), batches().await?);
    while batches().await? <= before {
        if began.elapsed() > PATIENCE {
            bail!("HAProxy does not send calls to a replica that serves");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn slowest(calls: &[Call]) -> Duration {
    calls.iter().map(Call::took).max().unwrap_or_default()
}

fn longest_gap(calls: &[Call]) -> Duration {
    let mut ends: Vec<Instant> = calls.iter().map(|call| call.ended).collect();
    ends.sort();
    ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// HAProxy; it ends when dropped.
struct Proxy {
    child: Child,
    log: PathBuf,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    async fn start(bind: u16, replicas: [(u16, u16); 2], folder: &Path) -> Result<Self> {
        let path = folder.join("haproxy.log");
        let log = std::fs::File::create(&path)?;
        let mut command = Command::new("haproxy");
        // In the foreground, one process.
        command.arg("-db").arg("-f").arg(root().join("deploy/haproxy.cfg"));
        command.env("PLUMB_BIND", format!("127.0.0.1:{bind}"));
        for (name, (port, probes)) in ["PLUMB_A", "PLUMB_B"].into_iter().zip(replicas) {
            command.env(name, format!("127.0.0.1:{port}")).env(format!("{name}_PROBES"), probes.to_string());
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("haproxy is needed; Debian has it as `haproxy`")?;
        let proxy = Self { child, log: path };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", bind)).await.is_err() {
            if began.elapsed() > Duration::from_secs(10) {
                bail!("haproxy does not listen: {}", proxy.said());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Until it has looked at the replicas, it takes them to be there.
        client_of(&format!("http://127.0.0.1:{bind}"), RetryPolicy::default())?.list_models().await?;
        Ok(proxy)
    }

    /// What it has said: when it took a replica out, and why.
    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}
