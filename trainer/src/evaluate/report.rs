//! What an evaluation leaves: a table for people, JSON for programs.

use std::fs;
use std::path::Path;

use tabled::builder::Builder;
use tabled::settings::{Padding, Style};

use super::plots;
use super::{Evaluation, Measurement, Task};
use crate::output::write_file;
use crate::{Error, Result};

/// Files of a result.
pub(super) const OUTPUTS: [&str; 2] = ["results.json", "items.jsonl"];

/// Writes a result into a folder; `results.json` last, so that where it is, everything is.
pub(super) fn write(folder: &Path, evaluation: &Evaluation) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let lines: String = evaluation.lines.iter().map(|line| format!("{line}\n")).collect();
    let [results, items] = OUTPUTS;
    write_file(&folder.join(items), &lines)?;
    for (name, plot) in plots::draw(evaluation)? {
        write_file(&folder.join(name), &plot)?;
    }
    write_file(&folder.join(results), &format!("{:#}\n", evaluation.to_json()))
}

/// The numbers, and what was left out.
pub(super) fn table(evaluation: &Evaluation) -> String {
    let mut builder = Builder::default();
    builder.push_record(["name", "metric", "score", "value", "95% interval", "n", "KL bound (nats)"]);
    for measured in &evaluation.results {
        let Measurement { name, metric, score, n, .. } = measured;
        let [value, interval] = cells(evaluation.task, measured);
        let kl_bound = measured.kl_bound.map_or_else(String::new, |nats| format!("{nats:.3}"));
        let score = score.as_deref().unwrap_or_default();
        builder.push_record([name, metric, score, &value, &interval, &n.to_string(), &kl_bound]);
    }
    if evaluation.task != Task::BestOfN {
        builder.remove_column(6);
    }
    if evaluation.task == Task::Elo {
        builder.remove_column(2);
    }
    let table = builder.build().with(Style::empty()).with(Padding::new(0, 2, 0, 0)).to_string();
    let mut text: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    if let Some(model) = &evaluation.model {
        let name = match (&model.name, model.version) {
            (Some(name), Some(version)) => format!("{name} version {version} of {}", model.source),
            _ => model.source.clone(),
        };
        let digest: String = model.weights_digest.chars().take(12).collect();
        text += &format!("\n{} model {name} ({digest}, {})\n", model.kind, model.dtype);
    }
    if evaluation.bad_lines > 0 {
        text += &format!("{} bad lines are not counted\n", evaluation.bad_lines);
    }
    if let Some(first) = evaluation.failures.first() {
        text += &format!(
            "{} items have no score and are not counted; the first is {} line {}: {}\n",
            evaluation.failed, first.file, first.line, first.reason
        );
    }
    text
}

/// Value and interval as they are read best.
fn cells(task: Task, measured: &Measurement) -> [String; 2] {
    let digits = if task == Task::Elo { 1 } else { 4 };
    let interval = match (measured.low, measured.high) {
        (Some(low), Some(high)) => format!("{low:.digits$} to {high:.digits$}"),
        _ => String::new(),
    };
    [format!("{:.digits$}", measured.value), interval]
}
