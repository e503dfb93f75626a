//! Samples of a model, marked as right or wrong.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::problem::{Problems, Sample};
use crate::input::{BadLines, Lines};
use crate::output::Whole;
use crate::progress;
use crate::sandbox::{Outcome, Sandbox};
use crate::{Error, Result};

/// What was marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Graded {
    /// Samples.
    pub samples: u64,
    /// Of those, right ones.
    pub correct: u64,
}

/// Runs samples with the tests of their problems and writes them with `correct` and `outcome`, in the order in which they
/// came. A sample is a line with `response` (or `completion`, `generation`) and the `prompt`, or the problem's `id`.
///
/// # Errors
/// If a file cannot be read, more lines are bad than allowed, the output is there already, or programs cannot be run.
pub fn grade(
    problems: &[PathBuf],
    samples: &[PathBuf],
    output: &Path,
    sandbox: &Sandbox,
    max_bad_lines: u64,
    warn: &mut dyn FnMut(&str),
) -> Result<Graded> {
    if output.exists() {
        return Err(Error::Recipe(format!("{} exists: name another file", output.display())));
    }
    let mut bad = BadLines::at_most(max_bad_lines);
    let problems = Problems::read(problems, |path, line, reason| bad.skip(path, line, reason, warn))?;
    let mut found = Vec::new();
    for path in samples {
        let mut lines = Lines::open(path)?;
        while let Some((number, line)) = lines.next()? {
            match sample(&line, &problems) {
                Ok(sample) => found.push(sample),
                Err(reason) => bad.skip(path, number, &reason, warn)?,
            }
        }
    }
    let bar = progress::bar(found.len() as u64, "programs");
    let run = |(_, problem, response): &(_, usize, String)| {
        let outcome = problems.list[*problem].run(response, sandbox);
        bar.inc(1);
        outcome
    };
    let outcomes = found.par_iter().map(run).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    let counts = Graded {
        samples: outcomes.len() as u64,
        correct: outcomes.iter().filter(|outcome| **outcome == Outcome::Passed).count() as u64,
    };
    let mut file = Whole::create(output)?;
    for ((mut line, ..), outcome) in found.into_iter().zip(outcomes) {
        line.insert("correct".to_owned(), json!(outcome == Outcome::Passed));
        line.insert("outcome".to_owned(), json!(outcome.to_string()));
        file.line(&Value::Object(line).to_string())?;
    }
    file.written()?.publish()?;
    Ok(counts)
}

/// The line, the place of its problem, and what stands below the prompt.
fn sample(line: &[u8], problems: &Problems) -> std::result::Result<(Map<String, Value>, usize, String), String> {
    let text = |error: serde_json::Error| error.to_string();
    let sample: Sample = serde_json::from_slice(line).map_err(text)?;
    let Some(problem) = problems.of(&sample) else {
        return Err("neither its prompt nor its id is that of a problem".to_owned());
    };
    Ok((serde_json::from_slice(line).map_err(text)?, problem, sample.response))
}
