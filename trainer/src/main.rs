//! `plumb-train`: see `plumb-train --help`.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand};
use plumb_model::checkpoint::Source;
use plumb_trainer::evaluate;
use plumb_trainer::prepare::{Dataset, Options, prepare};
use plumb_trainer::recipe::with_file;
use plumb_trainer::sandbox::{Confinement, Limits, Sandbox};
use plumb_trainer::{Error, Measures, Probes, Recipe, Sampling, Shape, TeachOptions};

const EXAMPLES: &str = "\
Examples:
  plumb-train prepare hh-rlhf helpful-base/train.jsonl.gz --output data/helpful
  plumb-train prepare code HumanEval.jsonl.gz samples.jsonl --output data/code
  plumb-train run --config recipe.toml --seed 1
  plumb-train sample data/reddit/train.jsonl --output human-model.jsonl --model lm
  plumb-train evaluate pairs dev.jsonl --model run/checkpoint --output run/evaluation
  plumb-train report ./run
  plumb-train inspect tests/fixtures/llama-pm
  plumb-train publish ./run/checkpoint /checkpoints --name pm
  plumb-server --model-id /checkpoints/pm/1
  plumb-train --generate bash > ~/.local/share/bash-completion/completions/plumb-train
  plumb-train --generate man ~/.local/share/man/man1

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
    /// Train as a recipe says, or go on with a run that was interrupted
    Run {
        /// TOML file with any of the options below, by their names; an option on the command line counts more
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        recipe: Box<Recipe>,
    },
    /// Write report.html into the folder of a run, from what it holds now; a run that ends does so too
    Report {
        /// Folder of the run
        #[arg(value_name = "FOLDER")]
        run: PathBuf,
    },
    /// Learn a tokenizer from text, and write a language model of random weights to begin with
    Scratch {
        /// JSONL files whose strings the tokenizer is learned from
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// Folder for the checkpoint
        #[arg(long, value_name = "FOLDER")]
        output: PathBuf,
        /// Of the weights
        #[arg(long, value_name = "N", default_value_t = 0)]
        seed: u64,
        #[command(flatten)]
        shape: Shape,
    },
    /// Write down what a language model expects behind the HHH prompt, for a student that is to do without: see --objective
    /// distillation
    Teach {
        /// JSONL files of texts, or of pairs, whose chosen sides are taken
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// The teacher: a folder, a .gguf file or a Hugging Face repository
        #[arg(long, value_name = "SOURCE")]
        model: String,
        /// LoRA adapter to merge into it
        #[arg(long, value_name = "SOURCE")]
        adapter: Option<String>,
        /// File for the result: eight bytes for each likely token
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        options: TeachOptions,
    },
    /// Turn a data set into train.jsonl and dev.jsonl: shuffled, without duplicates, split by question
    Prepare {
        /// What the files are
        #[arg(value_enum)]
        dataset: Dataset,
        /// Files, plain or packed by gzip, bzip2 or zstd; Parquet wherever JSONL is read
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// Folder for the result
        #[arg(long, value_name = "FOLDER")]
        output: PathBuf,
        /// Share of the questions that goes to dev.jsonl
        #[arg(long, value_name = "X", default_value_t = 0.01)]
        dev_share: f64,
        /// Of the order, the split and what is drawn
        #[arg(long, value_name = "N", default_value_t = 0)]
        seed: u64,
        /// Make two pairs of each, GOOD:A over BAD:A and BAD:B over GOOD:B, as for preference-model pretraining
        #[arg(long)]
        binarise: bool,
        /// Bad lines after which to stop
        #[arg(long, value_name = "N", default_value_t = 100)]
        max_bad_lines: u64,
        #[command(flatten)]
        programs: Programs,
    },
    /// Sample from prompts: pairs with a language model's samples as rejected sides, or samples to be ranked
    Sample {
        /// JSONL with prompt and chosen, or with prompt alone and --samples
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
        /// File for the result; what was interrupted is gone on with
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        sampling: Sampling,
    },
    /// Run samples of programs with the tests of their problems, and mark them as correct or not
    Grade {
        /// Problems: JSONL of HumanEval, MBPP or QuixBugs
        #[arg(value_name = "FILE", required = true)]
        problems: Vec<PathBuf>,
        /// Samples: JSONL with response, and prompt or id
        #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
        samples: Vec<PathBuf>,
        /// File for the samples with `correct` and `outcome`
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Bad lines after which to stop
        #[arg(long, value_name = "N", default_value_t = 100)]
        max_bad_lines: u64,
        #[command(flatten)]
        programs: Programs,
    },
    /// Measure a checkpoint, or a model of a running server
    Evaluate {
        #[command(flatten)]
        options: Box<evaluate::Options>,
    },
    /// Load a checkpoint, then copy it to ROOT/NAME/VERSION with a model card and a manifest: whole, or not at all
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
        /// results.json files of `plumb-train evaluate`, for the model card
        #[arg(long, value_name = "FILE", num_args = 1.., action = ArgAction::Append)]
        results: Vec<PathBuf>,
        /// JSON lines as `plumb score` reads them, whose scores go into the manifest, for servers to compare with their
        /// own before they switch to this version [default: four short dialogues]
        #[arg(long, value_name = "FILE")]
        probes: Option<PathBuf>,
        /// Write no scores into the manifest
        #[arg(long, conflicts_with = "probes")]
        no_probes: bool,
    },
    /// Become a program that may do next to nothing: what the sandbox starts
    #[command(hide = true)]
    Confined {
        #[command(flatten)]
        confinement: Confinement,
        /// The program with its arguments
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Load a checkpoint and tell what it is
    Inspect {
        /// A folder, a .gguf file or a Hugging Face repository
        source: String,
    },
}

/// How programs are run to see whether they are right.
#[derive(Args)]
#[command(next_help_heading = "Programs")]
struct Programs {
    /// Python 3 that runs them, without its site packages
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Processor time of a program; on the clock it may take four times as long
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    cpu_seconds: u32,
    /// Memory of a program
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..))]
    memory_mib: u32,
    /// Run them even where the kernel cannot take files and network away from them
    #[arg(long)]
    weak_sandbox: bool,
}

impl Programs {
    fn sandbox(&self) -> anyhow::Result<Sandbox> {
        let limits = Limits { cpu_seconds: self.cpu_seconds, memory_mib: self.memory_mib };
        Ok(Sandbox::new(std::env::current_exe()?, &self.python, limits, self.weak_sandbox)?)
    }
}

fn main() -> ExitCode {
    if let Some(code) = plumb_usage::answer(Cli::command(), std::env::args_os()) {
        return code;
    }
    let arguments = match with_file(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("plumb-train: {error}");
            return ExitCode::from(64);
        }
    };
    let cli = match Cli::try_parse_from(arguments) {
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
            if !matches!(error.downcast_ref(), Some(Error::Reported)) {
                eprintln!("plumb-train: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let text = match command {
        Command::Run { recipe, .. } => {
            // Of several processes, one speaks.
            let Some(finished) = plumb_trainer::run(&recipe)? else { return Ok(()) };
            let dev = finished.dev.map(describe).unwrap_or_default();
            format!("steps      {}\n{dev}checkpoint {}\n", finished.steps, finished.checkpoint.display())
        }
        Command::Report { run } => format!("report     {}\n", plumb_trainer::report(&run)?.display()),
        Command::Scratch { files, output, seed, shape } => {
            plumb_trainer::scratch(&files, &output, shape, seed)?;
            format!("checkpoint {}\n", output.display())
        }
        Command::Teach { files, model, adapter, output, options } => {
            let source = Source { model, adapter, ..Source::default() };
            let counts = plumb_trainer::teach(&source, &files, &output, &options)?;
            format!("{counts}\ntaught    {}\n", output.display())
        }
        Command::Prepare { dataset, files, output, dev_share, seed, binarise, max_bad_lines, programs } => {
            let sandbox = if dataset == Dataset::Code { Some(programs.sandbox()?) } else { None };
            let options = Options { dev_share, seed, binarise, max_bad_lines, sandbox };
            let counts = prepare(dataset, &files, &output, &options, &mut |line| eprintln!("{line}"))?;
            let dropped = counts.dropped.iter().map(|(reason, count)| format!("left out  {count} {reason}\n"));
            format!(
                "read      {}\ntrain     {}\ndev       {}\n{}",
                counts.read,
                counts.train,
                counts.dev,
                dropped.collect::<String>()
            )
        }
        Command::Sample { files, output, sampling } => {
            let sampled = plumb_trainer::sample(&files, &output, &sampling, &mut |line| eprintln!("{line}"))?;
            format!("lines     {}\nkept      {}\n", sampled.lines, sampled.kept)
        }
        Command::Grade { problems, samples, output, max_bad_lines, programs } => {
            let sandbox = programs.sandbox()?;
            let mut warn = |line: &str| eprintln!("{line}");
            let graded = plumb_trainer::grade(&problems, &samples, &output, &sandbox, max_bad_lines, &mut warn)?;
            format!("samples   {}\ncorrect   {}\n", graded.samples, graded.correct)
        }
        Command::Evaluate { options } => {
            let evaluation = evaluate::evaluate(&options, &mut |line| eprintln!("{line}"))?;
            if options.json { format!("{:#}\n", evaluation.to_json()) } else { evaluation.table() }
        }
        Command::Publish { source, root, name, version, results, probes, no_probes } => {
            let probes = match probes {
                Some(file) => Probes::File(file),
                None if no_probes => Probes::None,
                None => Probes::Usual,
            };
            let published = plumb_trainer::publish(&source, &root, &name, version, &results, &probes)?;
            let folder = published.folder.display();
            format!("published {folder}\ndigest    {}\nprobes    {}\n", published.weights_digest, published.probes)
        }
        Command::Confined { confinement, command } => anyhow::bail!(confinement.become_program(&command)),
        Command::Inspect { source } => {
            plumb_trainer::inspect(&Source { model: source, ..Source::default() })?.to_string()
        }
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Measures on the dev data, a line each.
fn describe(measures: Measures) -> String {
    let rows = [("dev loss", Some(measures.loss)), ("accuracy", measures.accuracy), ("margin", measures.margin)];
    rows.iter().filter_map(|(name, value)| Some(format!("{name:<11}{:.4}\n", (*value)?))).collect()
}
