//! What an experiment found: figures, the bars that some have to meet, and the file that both go into.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tabled::builder::Builder;
use tabled::settings::Style;

use crate::machine::Machine;

/// A figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measure {
    /// What was measured.
    pub(crate) name: String,
    /// The figure.
    pub(crate) value: f64,
    /// Its unit.
    pub(crate) unit: String,
    /// What it has to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bar: Option<Bar>,
    /// Whether it depends on how fast the machine is or how long the run took, so that a quick run says nothing.
    #[serde(default)]
    pub(crate) of_speed: bool,
}

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    /// Not more.
    AtMost(f64),
    /// Not less.
    AtLeast(f64),
}

impl Measure {
    /// A figure without a bar.
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &str) -> Self {
        Self { name: name.into(), value, unit: unit.to_owned(), bar: None, of_speed: false }
    }

    /// A count of what must not happen.
    pub(crate) fn never(name: impl Into<String>, count: usize) -> Self {
        Self { bar: Some(Bar::AtMost(0.0)), ..Self::new(name, count as f64, "") }
    }

    /// A count of what has to happen so often.
    pub(crate) fn all(name: impl Into<String>, count: usize, of: usize) -> Self {
        Self { bar: Some(Bar::AtLeast(of as f64)), ..Self::new(name, count as f64, "") }
    }

    /// With a bar that only a run of full length can be held to.
    pub(crate) fn at_most(self, most: f64) -> Self {
        Self { bar: Some(Bar::AtMost(most)), of_speed: true, ..self }
    }

    /// With a bar that only a run of full length can be held to.
    pub(crate) fn at_least(self, least: f64) -> Self {
        Self { bar: Some(Bar::AtLeast(least)), of_speed: true, ..self }
    }

    /// By how much the bar is missed, in the figure's unit; `None` if it is met. What is not a number misses it.
    pub(crate) fn missed(&self) -> Option<f64> {
        let by = match self.bar? {
            Bar::AtMost(most) => self.value - most,
            Bar::AtLeast(least) => least - self.value,
        };
        (by > 0.0 || by.is_nan()).then_some(by)
    }

    /// Of the same figure in several runs: the worst of what must or must not happen, the median of all else.
    fn of_runs(runs: &[Self]) -> Option<Self> {
        let mut sorted = runs.to_vec();
        sorted.sort_by(|a, b| a.value.total_cmp(&b.value));
        let first = sorted.first()?;
        let index = match first.bar {
            Some(Bar::AtMost(_)) if !first.of_speed => sorted.len() - 1,
            Some(Bar::AtLeast(_)) if !first.of_speed => 0,
            _ => sorted.len() / 2,
        };
        sorted.get(index).cloned()
    }

    /// The figure with its unit.
    pub(crate) fn figure(&self) -> String {
        let space = if self.unit.is_empty() || self.unit == "%" { "" } else { " " };
        format!("{}{space}{}", number(self.value), self.unit)
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(0.0) => write!(f, "none"),
            Self::AtMost(most) => write!(f, "at most {}", number(*most)),
            Self::AtLeast(least) => write!(f, "at least {}", number(*least)),
        }
    }
}

/// Three significant digits, and no fewer than the integer part has; thousands apart.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        _ if value.fract() == 0.0 => 0,
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let (integer, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, digits) = integer.split_at(usize::from(integer.starts_with('-')));
    let grouped = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group)).collect::<Vec<_>>();
    format!("{sign}{}{rest}", grouped.join(","))
}

/// All that is known of an experiment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Name of the subcommand.
    pub(crate) experiment: String,
    /// What the experiment shows, in words.
    pub(crate) title: String,
    /// What was done, in words.
    pub(crate) what: String,
    /// The command line.
    pub(crate) command: String,
    /// Models and dialogues, in words; empty where there are none.
    #[serde(default)]
    pub(crate) material: String,
    /// What it ran on.
    pub(crate) machine: Machine,
    /// Seed of the first run; the others count on from it.
    pub(crate) seed: u64,
    /// How long all runs took.
    pub(crate) seconds: f64,
    /// The figures of every run.
    pub(crate) runs: Vec<Vec<Measure>>,
}

impl Report {
    /// The figures over all runs.
    pub(crate) fn measures(&self) -> Vec<Measure> {
        let Some(first) = self.runs.first() else { return Vec::new() };
        let same = |name: &str| -> Vec<Measure> {
            self.runs.iter().flatten().filter(|measure| measure.name == name).cloned().collect()
        };
        first.iter().filter_map(|measure| Measure::of_runs(&same(&measure.name))).collect()
    }

    /// A figure's smallest and largest value over all runs, where there were several and they differ.
    pub(crate) fn range(&self, name: &str) -> Option<(f64, f64)> {
        let values = self.runs.iter().flatten().filter(|measure| measure.name == name).map(|measure| measure.value);
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        (low < high).then_some((low, high))
    }

    /// A figure in words: with its range over the runs.
    pub(crate) fn in_words(&self, measure: &Measure) -> String {
        match self.range(&measure.name) {
            Some((low, high)) => format!("{} ({} to {})", measure.figure(), number(low), number(high)),
            None => measure.figure(),
        }
    }

    /// For people, on a terminal.
    pub(crate) fn table(&self, quick: bool) -> String {
        let mut table = Builder::default();
        table.push_record(["figure", "bar", "measured", "met"]);
        for measure in self.measures() {
            let met = match (measure.bar, measure.missed()) {
                (None, _) => "",
                (Some(_), _) if quick && measure.of_speed => "not judged",
                (Some(_), None) => "yes",
                (Some(_), Some(_)) => "NO",
            };
            let bar = measure.bar.map(|bar| bar.to_string()).unwrap_or_default();
            table.push_record([measure.name.clone(), bar, self.in_words(&measure), met.to_owned()]);
        }
        table.build().with(Style::sharp()).to_string()
    }

    /// What misses its bar, and by how much.
    pub(crate) fn missed(&self, quick: bool) -> Vec<String> {
        let judged = self.measures().into_iter().filter(|measure| !(quick && measure.of_speed));
        let missed = judged.filter_map(|measure| {
            let (by, bar) = (measure.missed()?, measure.bar?);
            Some(format!("{}: {}, the bar is {bar}: missed by {}", measure.name, measure.figure(), number(by)))
        });
        missed.collect()
    }

    /// Writes `<experiment>.json`, over that of an earlier run.
    pub(crate) fn write(&self, folder: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let path = folder.join(format!("{}.json", self.experiment));
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Reads what [`Report::write`] wrote.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no result of this program", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let check = |value, expected| assert_eq!(number(value), expected);
        check(0.0, "0");
        check(0.12345, "0.123");
        check(1.2345, "1.23");
        check(12.345, "12.3");
        check(12345.6, "12,346");
        check(-1234567.0, "-1,234,567");
        check(999.0, "999");
    }

    #[test]
    fn a_bar_is_met_or_missed_by_so_much() {
        let ratio = |value| Measure::new("ratio", value, "").at_most(1.5);
        assert_eq!(ratio(1.5).missed(), None);
        assert_eq!(ratio(2.0).missed(), Some(0.5));
        assert!(ratio(f64::NAN).missed().is_some());
        assert_eq!(Measure::new("share", 0.8, "").at_least(0.5).missed(), None);
        assert_eq!(Measure::all("kills", 99, 100).missed(), Some(1.0));
        assert_eq!(Measure::new("only shown", 1e9, "").missed(), None);
    }

    #[test]
    fn of_several_runs_the_worst_count_and_the_median_figure_stand() {
        let run = |failed, ratio| vec![Measure::never("failed", failed), Measure::new("p99", ratio, "").at_most(1.5)];
        let machine = Machine::default();
        let text = String::new;
        let runs = vec![run(0, 1.2), run(1, 1.9), run(0, 1.3)];
        let report = Report {
            experiment: text(),
            title: text(),
            what: text(),
            command: text(),
            material: text(),
            machine,
            seed: 1,
            seconds: 1.0,
            runs,
        };
        let values: Vec<f64> = report.measures().iter().map(|measure| measure.value).collect();
        assert_eq!(values, [1.0, 1.3]);
        assert_eq!(report.missed(false), ["failed: 1, the bar is none: missed by 1"]);
        assert_eq!(report.range("p99"), Some((1.2, 1.9)));
    }
}
