//! What a run leaves behind as it goes: a line of `metrics.jsonl` for every step and every measurement on the dev data,
//! the same as events for TensorBoard, and `dev.jsonl` with what each dev pair got last.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::events::Events;
use crate::objective::Measures;
use crate::output::write_file;
use crate::recipe::Objective;
use crate::{Error, Result};

pub(crate) const METRICS: &str = "metrics.jsonl";
pub(crate) const DEV: &str = "dev.jsonl";

/// A line of `metrics.jsonl`.
#[derive(Serialize)]
pub(crate) struct Record {
    /// `train` or `dev`.
    pub(crate) split: &'static str,
    pub(crate) step: u64,
    #[serde(flatten)]
    pub(crate) measures: Measures,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lr: Option<f32>,
    /// Before it is scaled down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gradient_norm: Option<f64>,
    pub(crate) tokens: u64,
    pub(crate) seconds: f64,
}

/// A line of `dev.jsonl`: rewards of a pair's sides, or their mean log-likelihoods.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pair {
    pub(crate) chosen: f64,
    pub(crate) rejected: f64,
}

/// The files of a run that grow.
pub(crate) struct Recorder {
    folder: PathBuf,
    metrics: fs::File,
    events: Events,
    /// The last step with a measurement on the dev data.
    measured: Option<u64>,
}

impl Recorder {
    /// Goes on after a step: what the folder says about later ones, which are taken again, is forgotten.
    pub(crate) fn open(folder: &Path, step: u64) -> Result<Self> {
        let mut measured = None;
        let metrics = reopen(&folder.join(METRICS), |line| {
            let before = line["step"].as_u64().filter(|number| *number <= step);
            if line["split"] == "dev" {
                measured = measured.max(before);
            }
            before.is_some()
        })?;
        Ok(Self { folder: folder.to_owned(), metrics, events: Events::create(folder, step)?, measured })
    }

    /// Writes a step or a measurement down. A measurement that is made again, at the end of a run that had ended before,
    /// takes the place of the first.
    pub(crate) fn record(&mut self, record: &Record) -> Result<()> {
        let path = self.folder.join(METRICS);
        let wrong = |error: serde_json::Error| Error::Malformed { path: path.clone(), reason: error.to_string() };
        let text = serde_json::to_string(record).map_err(wrong)?;
        let again = record.split == "dev" && self.measured == Some(record.step);
        if again {
            self.metrics = reopen(&path, |line| line["split"] != "dev" || line["step"] != record.step)?;
        }
        writeln!(self.metrics, "{text}").map_err(Error::io(&path))?;
        if record.split == "dev" {
            self.measured = Some(record.step);
        }
        match again {
            true => Ok(()),
            false => self.events.scalars(record.step, &scalars(&serde_json::from_str(&text).map_err(wrong)?)),
        }
    }

    /// Keeps what the pairs of the dev data got, in the order of the data.
    pub(crate) fn pairs(&mut self, step: u64, objective: Objective, pairs: &[Pair]) -> Result<()> {
        if pairs.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(DEV);
        let lines: std::result::Result<Vec<String>, _> = pairs.iter().map(serde_json::to_string).collect();
        let lines = lines.map_err(|error| Error::Malformed { path: path.clone(), reason: error.to_string() })?;
        write_file(&path, &(lines.join("\n") + "\n"))?;
        if self.measured == Some(step) {
            return Ok(());
        }
        let what = if objective == Objective::Preference { "reward" } else { "log_likelihood" };
        let [chosen, rejected]: [Vec<f64>; 2] =
            [pairs.iter().map(|pair| pair.chosen).collect(), pairs.iter().map(|pair| pair.rejected).collect()];
        self.events.histogram(step, &format!("dev/{what}/chosen"), &chosen)?;
        self.events.histogram(step, &format!("dev/{what}/rejected"), &rejected)
    }
}

/// What a line of `metrics.jsonl` measured, by the tags that TensorBoard sorts by: `train/loss`, `dev/accuracy`.
pub(crate) fn scalars(line: &Value) -> Vec<(String, f64)> {
    let split = line["split"].as_str().unwrap_or("train");
    let per_second = line["tokens"].as_f64().zip(line["seconds"].as_f64()).filter(|(_, seconds)| *seconds > 0.0);
    let measured = line.as_object().into_iter().flatten();
    measured
        .filter(|(name, _)| !matches!(&name[..], "step" | "tokens" | "seconds"))
        .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
        .chain(per_second.map(|(tokens, seconds)| ("tokens_per_second".to_owned(), tokens / seconds)))
        .map(|(name, value)| (format!("{split}/{name}"), value))
        .collect()
}

/// A file of JSON lines, to be appended to, with those that are to be kept. Half a line, which a process that was killed
/// may leave, is not.
fn reopen(path: &Path, mut keep: impl FnMut(&Value) -> bool) -> Result<fs::File> {
    let mut kept = String::new();
    if path.exists() {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let known = |line: &&str| serde_json::from_str(line).is_ok_and(|value| keep(&value));
        text.lines().filter(known).for_each(|line| kept += &format!("{line}\n"));
    }
    write_file(path, &kept)?;
    fs::OpenOptions::new().append(true).open(path).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(split: &'static str, step: u64, loss: f64) -> Record {
        let measures = Measures { loss, ..Measures::default() };
        Record { split, step, measures, lr: Some(1e-3), gradient_norm: None, tokens: 30, seconds: 2.0 }
    }

    fn lines(folder: &Path) -> Vec<(String, u64, f64)> {
        let text = fs::read_to_string(folder.join(METRICS)).unwrap();
        let line = |line: &str| {
            let value: Value = serde_json::from_str(line).unwrap();
            (
                value["split"].as_str().unwrap().to_owned(),
                value["step"].as_u64().unwrap(),
                value["loss"].as_f64().unwrap(),
            )
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn steps_that_are_taken_again_stand_there_once() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let mut recorder = Recorder::open(folder, 0).unwrap();
        for step in 1..=3 {
            recorder.record(&record("train", step, 9.0)).unwrap();
        }
        recorder.record(&record("dev", 3, 9.0)).unwrap();
        drop(recorder);
        // Killed while it wrote, and the last state is that of step 2.
        fs::OpenOptions::new().append(true).open(folder.join(METRICS)).unwrap().write_all(b"{\"split\":\"tr").unwrap();
        let mut recorder = Recorder::open(folder, 2).unwrap();
        recorder.record(&record("train", 3, 8.0)).unwrap();
        recorder.record(&record("dev", 3, 8.0)).unwrap();
        drop(recorder);
        // The same command once more: there is nothing to train, but the dev data is measured.
        Recorder::open(folder, 3).unwrap().record(&record("dev", 3, 7.0)).unwrap();
        let train = |step, loss| ("train".to_owned(), step, loss);
        let expected = vec![train(1, 9.0), train(2, 9.0), train(3, 8.0), ("dev".to_owned(), 3, 7.0)];
        assert_eq!(lines(folder), expected);
    }

    #[test]
    fn tags_name_the_split_and_what_was_measured() {
        let line = serde_json::to_value(record("dev", 3, 0.5)).unwrap();
        let mut found = scalars(&line);
        found.retain(|(name, _)| name != "dev/lr");
        assert_eq!(found, [("dev/loss".to_owned(), 0.5), ("dev/tokens_per_second".to_owned(), 15.0)]);
        // JSON has no NaN: what is none is left out.
        assert!(scalars(&serde_json::json!({"split": "train", "step": 1, "loss": null})).is_empty());
    }
}
