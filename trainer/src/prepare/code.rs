//! Code correctness: a program that passes its tests and one that does not, for the same problem (Askell et al. 2021,
//! section 3.2).
//!
//! The paper pairs samples of models, so that nothing but being right tells them apart. Where a problem has no right
//! sample its own solution stands in, and where it has no wrong one, the right program with one token changed.

use std::path::PathBuf;

use rayon::prelude::*;

use super::{Body, Record, Sink, drawers};
use crate::code::{Line, Problem, Problems, mutants};
use crate::input::Lines;
use crate::progress;
use crate::sandbox::{Outcome, Sandbox};
use crate::{Error, Result};

/// Changed programs that are tried until one fails: most do.
const MAX_MUTANTS: usize = 10;

/// Reads problems and samples, which may lie in any of the files.
pub(super) fn read(files: &[PathBuf], sink: &mut Sink<'_>) -> Result<()> {
    let Some(sandbox) = sink.options.sandbox.clone() else {
        return Err(Error::Recipe("programs have to be run, and there is no sandbox".into()));
    };
    let (mut problems, mut samples) = (Problems::default(), Vec::new());
    for path in files {
        let mut lines = Lines::open(path)?;
        while let Some((number, line)) = lines.next()? {
            match serde_json::from_slice::<Line>(&line).map(Line::problem) {
                Ok(Ok(problem)) => {
                    sink.read();
                    match problem {
                        Ok(problem) => problems.add(problem),
                        Err(reason) => sink.drop(reason),
                    }
                }
                Ok(Err(sample)) => samples.push(sample),
                Err(error) => sink.bad(path, number, &error.to_string())?,
            }
        }
    }
    let mut of_problem = vec![Vec::new(); problems.list.len()];
    for sample in samples {
        match problems.of(&sample) {
            Some(place) => of_problem[place].push(sample.response),
            None => sink.drop("a sample of no problem"),
        }
    }
    let (seed, bar) = (sink.options.seed, progress::bar(problems.list.len() as u64, "problems"));
    let found = problems.list.par_iter().zip(of_problem).map(|(problem, samples)| {
        let found = pairs(problem, samples, seed, &sandbox);
        bar.inc(1);
        found
    });
    let found = found.collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    for (problem, found) in problems.list.into_iter().zip(found) {
        match found {
            Ok(pairs) => pairs.into_iter().try_for_each(|(chosen, rejected)| {
                let body = Body::Pair { prompt: problem.prompt.clone(), chosen, rejected };
                sink.record(Record { group: problem.id.clone(), body })
            })?,
            Err(reason) => sink.drop(reason),
        }
    }
    Ok(())
}

/// Chosen and rejected, or why there are none.
type Pairs = std::result::Result<Vec<(String, String)>, &'static str>;

/// As many pairs as there are right or wrong programs, whichever are fewer: each is in one at most.
fn pairs(problem: &Problem, mut samples: Vec<String>, seed: u64, sandbox: &Sandbox) -> Result<Pairs> {
    let place = |program: &String| drawers::number(seed, "program", &format!("{}\0{program}", problem.id));
    samples.sort_by_key(place);
    samples.dedup();
    let (mut right, mut wrong) = (Vec::new(), Vec::new());
    for sample in samples {
        match problem.run(&sample, sandbox)? {
            Outcome::Passed => right.push(sample),
            _ => wrong.push(sample),
        }
    }
    if right.is_empty() {
        if problem.run(&problem.right, sandbox)? != Outcome::Passed {
            return Ok(Err("its own solution fails"));
        }
        right.push(problem.right.clone());
    }
    if wrong.is_empty() {
        let given = problem.wrong.iter().cloned();
        let mut changed = mutants(&right[0]);
        changed.sort_by_key(place);
        for program in given.chain(changed).take(MAX_MUTANTS) {
            if fails(&problem.run(&program, sandbox)?) {
                wrong.push(program);
                break;
            }
        }
    }
    if wrong.is_empty() {
        return Ok(Err("no wrong program"));
    }
    Ok(Ok(right.into_iter().zip(wrong).collect()))
}

/// Whether a program is one, and wrong.
fn fails(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Passed => false,
        Outcome::Failed(reason) => !["SyntaxError", "IndentationError"].iter().any(|error| reason.starts_with(error)),
        Outcome::TimedOut | Outcome::OutOfMemory => true,
    }
}
