//! Shows that the server's promises hold: each experiment drives real programs as a user would, over the wire and with
//! signals, checks every answer, and compares figures with bars.
//!
//! An experiment is a module of [`experiments`]; its figures go into `tests/reliability/results`, from which `render`
//! makes the tables of `RELIABILITY.md`. What scores have to be is computed beforehand ([`expected`]) by a server that
//! does nothing else. Nothing here knows how a server works inside; what is relied on beyond the wire contract is in
//! [`surface`].

mod checkpoint;
mod context;
mod dialogues;
mod expected;
mod experiments;
mod latency;
mod load;
mod machine;
mod options;
mod process;
mod programs;
mod render;
mod report;
mod rollout;
mod server;
mod surface;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::context::conduct;
use crate::experiments::{
    drain, failed_loads, fuzz, overload, poison, publish_kill, replicas, server_kill, soak, swaps,
};

/// Shows that the server's promises hold.
#[derive(Parser)]
#[command(
    name = "reliability",
    max_term_width = 110,
    after_help = "\
Exit codes: 0 all bars are met, 1 one is missed or the experiment could not be done, 2 the command line makes no sense.

Examples:
  cargo run --release -p plumb-tests --bin reliability -- swaps --runs 3
  cargo run --release -p plumb-tests --bin reliability -- soak --minutes 60
  cargo run --release -p plumb-tests --bin reliability -- render"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Versions are swapped under saturating mixed load
    Swaps(swaps::Swaps),
    /// Loads fail in every way while a version serves
    FailedLoads(failed_loads::FailedLoads),
    /// plumb-train publish is killed at random points
    PublishKill(publish_kill::PublishKill),
    /// Ten times more is asked for than the server can do
    Overload(overload::Overload),
    /// The server is told to stop under load
    Drain(drain::Drain),
    /// Every batch has a request that fails
    Poison(poison::Poison),
    /// What comes from outside is made up at random
    Fuzz(fuzz::Fuzz),
    /// One of two replicas behind HAProxy is killed under load
    Replicas(replicas::Replicas),
    /// The server is killed at random points and started again
    ServerKill(server_kill::ServerKill),
    /// All of it mixed, for a long time
    Soak(soak::Soak),
    /// Writes the tables of RELIABILITY.md from the results
    Render(render::Render),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Swaps(experiment) => conduct(&experiment),
        Command::FailedLoads(experiment) => conduct(&experiment),
        Command::PublishKill(experiment) => conduct(&experiment),
        Command::Overload(experiment) => conduct(&experiment),
        Command::Drain(experiment) => conduct(&experiment),
        Command::Poison(experiment) => conduct(&experiment),
        Command::Fuzz(experiment) => conduct(&experiment),
        Command::Replicas(experiment) => conduct(&experiment),
        Command::ServerKill(experiment) => conduct(&experiment),
        Command::Soak(experiment) => conduct(&experiment),
        Command::Render(render) => render.run().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
