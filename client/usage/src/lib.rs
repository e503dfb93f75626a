//! What a program can tell of its own flags: man pages, completions for shells, its page of the reference.
//!
//! All three programs answer `--generate` in this way; their `--help` is the source of everything.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::builder::PossibleValue;
use clap::{Command, ValueEnum as _};
use clap_complete::Shell;

/// Answers `PROGRAM --generate FORM`, or is `None` if the arguments ask for something else.
///
/// The exit code is 64 where the form is none, 1 where it cannot be written.
pub fn answer(command: Command, arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1);
    if arguments.next()? != "--generate" {
        return None;
    }
    let rest: Vec<String> = arguments.map(|argument| argument.to_string_lossy().into_owned()).collect();
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    let name = command.get_name().to_owned();
    let written = match rest.as_slice() {
        ["man", folder] => clap_mangen::generate_to(plain(command), Path::new(folder)),
        ["markdown"] => markdown(command, &mut io::stdout().lock()),
        [form] if let Ok(shell) = Shell::from_str(form, false) => complete(shell, command),
        _ => {
            eprintln!("{name}: --generate takes `man FOLDER`, {} or markdown", shells().join(", "));
            return Some(ExitCode::from(64));
        }
    };
    Some(match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    })
}

fn shells() -> Vec<String> {
    let values = Shell::value_variants().iter().filter_map(Shell::to_possible_value);
    values.map(|value: PossibleValue| value.get_name().to_owned()).collect()
}

fn complete(shell: Shell, mut command: Command) -> io::Result<()> {
    let name = command.get_name().to_owned();
    // Into memory first: it panics where it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    io::stdout().lock().write_all(&script)
}

/// Every command with its help, as wide as a page of the guide, under a heading of its own.
fn markdown(command: Command, out: &mut dyn Write) -> io::Result<()> {
    let mut command = plain(command).term_width(84);
    command.build();
    section(&mut command, 2, out)
}

fn section(command: &mut Command, level: usize, out: &mut dyn Write) -> io::Result<()> {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
    writeln!(out, "{} {name}\n\n```text\n{}\n```\n", "#".repeat(level), lines.join("\n"))?;
    let visible = |command: &&mut Command| !command.is_hide_set() && command.get_name() != "help";
    command.get_subcommands_mut().filter(visible).try_for_each(|command| section(command, level + 1, out))
}

/// Without the values that the environment of this process happens to have.
fn plain(command: Command) -> Command {
    command.mut_args(|argument| argument.hide_env_values(true)).mut_subcommands(plain)
}
