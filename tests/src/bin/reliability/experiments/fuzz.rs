//! What comes from outside is made up at random, by `tests/fuzz/run.sh`.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::context::{Context, Experiment};
use crate::options::{Common, root};
use crate::report::Measure;

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Fuzz {
    #[command(flatten)]
    common: Common,
    /// How long each target is fuzzed [quick: 0.1].
    #[arg(long, default_value_t = 10.0, value_name = "MINUTES")]
    minutes: f64,
    /// Targets that are fuzzed at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    jobs: u32,
}

impl Fuzz {
    fn seconds(&self) -> u64 {
        (self.common.or_quick(self.minutes, 0.1) * 60.0) as u64
    }
}

impl Experiment for Fuzz {
    const NAME: &'static str = "fuzz";
    const ASKS: bool = false;
    const TITLE: &'static str = "Fuzzing";

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        format!(
            "tests/fuzz/run.sh {} fuzzes every target with libFuzzer. An input that ends the program, takes longer than a \
             second or more memory than it may have is a finding; the script says how much that is.",
            self.seconds()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        context.begin(0, "targets");
        let mut command = Command::new("bash");
        command.arg(root().join("tests/fuzz/run.sh")).args(["--jobs", &self.jobs.to_string()]);
        command.arg(self.seconds().to_string()).stderr(Stdio::inherit());
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = String::from_utf8(output.stdout)?;
        let targets = text.lines().skip(1).map(Target::read).collect::<Result<Vec<_>>>()?;
        if targets.is_empty() {
            bail!("the script has fuzzed no target: {}", output.status);
        }
        let mut measures = Vec::new();
        for Target { name, inputs, slowest, mib, finding } in &targets {
            if finding != "-" {
                context.note(&format!("  {name}: {finding}"));
            }
            measures.push(Measure::never(format!("{name}: findings"), usize::from(finding != "-")));
            measures.push(Measure::new(format!("{name}: inputs"), *inputs, ""));
            // libFuzzer counts whole seconds.
            measures.push(Measure::new(format!("{name}: slowest input, in whole seconds"), *slowest, "s").at_most(1.0));
            measures.push(Measure::new(format!("{name}: most memory"), *mib, "MiB"));
        }
        Ok(measures)
    }
}

/// A line of the script's table.
#[derive(Debug, PartialEq)]
struct Target {
    name: String,
    inputs: f64,
    slowest: f64,
    mib: f64,
    finding: String,
}

impl Target {
    /// target, inputs, inputs/s, edges, features, slowest, `s`, RSS, `MiB`, findings.
    fn read(line: &str) -> Result<Self> {
        let read = || {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, inputs, _, _, _, slowest, "s", mib, "MiB", finding @ ..] = &words[..] else { return None };
            let number = |text: &str| text.parse::<f64>().ok();
            let (inputs, slowest, mib) = (number(inputs)?, number(slowest)?, number(mib)?);
            Some(Self { name: (*name).to_owned(), inputs, slowest, mib, finding: finding.join(" ") })
        };
        read().with_context(|| format!("`{line}` is no line of the script's table"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_table() {
        let check = |line: &str, finding: &str| {
            let target = Target::read(line).unwrap();
            assert_eq!((target.name.as_str(), target.inputs, target.mib), ("gguf", 1234.0, 96.0));
            assert_eq!(target.finding, finding);
        };
        check("gguf               1234     1000      900     2100        0 s   96 MiB        -", "-");
        check("gguf 1234 1000 900 2100 0 s 96 MiB exit code 77, see x.log", "exit code 77, see x.log");
        assert!(Target::read("error: no such target").is_err());
    }
}
