//! The command line: one subcommand a module, in the order in which one meets them.
//!
//! Exit codes: 0 all done; 1 some items failed (the others are answered); 2 the server, the way to it or a file
//! failed; 64 the command line makes no sense, nothing was sent.

mod score;

mod rank;

mod generate;

mod tokens;

mod models;

mod health;

mod eval;

mod replay;

mod bench;

// What the subcommands share: options, reading, scoring in order, writing.
mod args;
mod input;
mod output;
mod progress;
mod scoring;
mod source;
mod stats;

use std::fmt;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  plumb score --prompt 'What is 2 + 2?' --response '4.' --response 'Five.'
  plumb score --model pm --json pairs.jsonl.gz > rewards.jsonl
  plumb rank --prompt 'What is 2 + 2?' '4.' 'Five.' 'I am not sure.'
  plumb generate --hhh-prompt full 'How do I boil an egg?'
  plumb replay calls/ --label canary --fail-if-flips-over 0.02
  plumb --server http://gpu1:50051,http://gpu2:50051 models
  plumb --generate bash > ~/.local/share/bash-completion/completions/plumb
  plumb --generate man ~/.local/share/man/man1

Exit codes:
  0   done
  1   some items failed; the others are answered
  2   the server, the way to it or a file failed
  64  the command line makes no sense";

/// Scores, ranks and generates text with a Plumb server.
#[derive(Parser)]
#[command(name = "plumb", version, after_help = EXAMPLES, subcommand_required = true)]
struct Cli {
    #[command(flatten)]
    global: args::Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Score texts, dialogues or preference pairs
    Score(score::ScoreArgs),
    /// Order candidate responses to a prompt, best first
    Rank(rank::RankArgs),
    /// Sample text from a language model and print it as it comes
    Generate(generate::GenerateArgs),
    /// Show the tokens of texts
    Tokenize(tokens::TokenizeArgs),
    /// Show the exact text and tokens that a model would be fed
    Render(tokens::RenderArgs),
    /// List the served models, or load, unload, label and watch them
    Models(models::ModelsArgs),
    /// Tell which services answer; exit code 0 if all do, 1 if not
    Health,
    /// Measure the accuracy of a model's preferences, as a Markdown table
    Eval(eval::EvalArgs),
    /// Score recorded calls on another version and show what changes
    Replay(replay::ReplayArgs),
    /// Measure throughput and latency of a server
    Bench(bench::BenchArgs),
}

/// How a command ended, if it ran to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    SomeFailed,
}

/// A command line that parses but makes no sense.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

pub(crate) async fn run() -> ExitCode {
    if let Some(code) = plumb_usage::answer(Cli::command(), std::env::args_os()) {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // Nothing is left to be done if the terminal is gone.
            let _ = message.print();
            return ExitCode::from(if message.use_stderr() { 64 } else { 0 });
        }
    };
    match execute(cli).await {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::SomeFailed) => ExitCode::from(1),
        Err(error) => report(&error),
    }
}

async fn execute(cli: Cli) -> anyhow::Result<Outcome> {
    let global = &cli.global;
    match cli.command {
        Command::Score(args) => score::run(global, args).await,
        Command::Rank(args) => rank::run(global, args).await,
        Command::Generate(args) => generate::run(global, args).await,
        Command::Tokenize(args) => tokens::tokenize(global, args).await,
        Command::Render(args) => tokens::render(global, args).await,
        Command::Models(args) => models::run(global, args).await,
        Command::Health => health::run(global).await,
        Command::Eval(args) => eval::run(global, args).await,
        Command::Replay(args) => replay::run(global, args).await,
        Command::Bench(args) => bench::run(global, args).await,
    }
}

fn report(error: &anyhow::Error) -> ExitCode {
    let pipe_closed = |e: &std::io::Error| matches!(e.kind(), std::io::ErrorKind::BrokenPipe);
    if error.chain().any(|e| e.downcast_ref().is_some_and(pipe_closed)) {
        // `plumb ... | head` has seen enough.
        return ExitCode::SUCCESS;
    }
    eprintln!("plumb: {error:#}");
    let usage =
        error.chain().any(|e| e.is::<Usage>() || matches!(e.downcast_ref(), Some(plumb_client::Error::Options(_))));
    ExitCode::from(if usage { 64 } else { 2 })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::Cli;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_is_a_flag_and_files_are_positional() {
        let line = ["plumb", "--server", "http://h:1", "score", "--model", "pm", "--json", "a.jsonl", "-"];
        let cli = Cli::try_parse_from(line).unwrap();
        assert!(cli.global.json);
        let super::Command::Score(args) = cli.command else { panic!("not score") };
        assert_eq!(args.files, ["a.jsonl", "-"].map(std::path::PathBuf::from));
    }

    #[test]
    fn rejected_command_lines() {
        for line in [
            "plumb",
            "plumb score --version 1 --label stable x",
            "plumb score --objective loudness x",
            "plumb --timeout-secs -1 health",
            "plumb generate --best-of 4x hello",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
