//! `plumb-train`: see `plumb-train --help`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use plumb_model::checkpoint::Source;

const EXAMPLES: &str = "\
Examples:
  plumb-train inspect tests/fixtures/llama-pm
  plumb-train publish ./run/best /checkpoints --name pm
  plumb-server --model-id /checkpoints/pm/1

Exit codes: 0 done, 1 failed, 64 the command line makes no sense.";

/// Makes the checkpoints that plumb-server loads.
#[derive(Parser)]
#[command(name = "plumb-train", version, after_help = EXAMPLES, max_term_width = 110, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load a checkpoint, then copy it to ROOT/NAME/VERSION with a manifest: whole, or not at all
    Publish {
        /// Folder of the checkpoint
        source: PathBuf,
        /// Folder of all models
        root: PathBuf,
        /// Name of the model
        #[arg(long, value_name = "NAME")]
        name: String,
        /// Its version; one that exists is refused [default: the highest plus one]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        version: Option<u64>,
    },
    /// Load a checkpoint and tell what it is
    Inspect {
        /// A folder, a .gguf file or a Hugging Face repository
        source: String,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // Nothing is left to be done if the terminal is gone.
            let _ = message.print();
            return ExitCode::from(if message.use_stderr() { 64 } else { 0 });
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plumb-train: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let text = match command {
        Command::Publish { source, root, name, version } => {
            let published = plumb_trainer::publish(&source, &root, &name, version)?;
            format!("published {}\ndigest    {}\n", published.folder.display(), published.weights_digest)
        }
        Command::Inspect { source } => {
            plumb_trainer::inspect(&Source { model: source, ..Source::default() })?.to_string()
        }
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
