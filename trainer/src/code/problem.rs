//! Problems as they are published: HumanEval, MBPP, QuixBugs; and samples of models.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::edit::without_comments;
use crate::Result;
use crate::input::Lines;
use crate::sandbox::{Outcome, Sandbox};

/// What a solution has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) id: String,
    /// What a program begins with: a signature with its docstring, or the task as a docstring.
    pub(crate) prompt: String,
    tests: String,
    /// The rest of a program that solves it.
    pub(crate) right: String,
    /// The rest of one that does not, if there is one.
    pub(crate) wrong: Option<String>,
}

impl Problem {
    /// Runs what stands below the prompt with the tests.
    pub(crate) fn run(&self, rest: &str, sandbox: &Sandbox) -> Result<Outcome> {
        sandbox.run(&format!("{}{rest}", self.prompt), &self.tests)
    }
}

/// A line of a file of problems or of samples.
#[derive(Deserialize)]
#[serde(untagged, expecting = "neither a problem of HumanEval, MBPP or QuixBugs nor a sample")]
pub(crate) enum Line {
    HumanEval(HumanEval),
    Mbpp(Mbpp),
    QuixBugs(QuixBugs),
    Sample(Sample),
}

#[derive(Deserialize)]
pub(crate) struct HumanEval {
    task_id: Value,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    test: String,
}

#[derive(Deserialize)]
pub(crate) struct Mbpp {
    task_id: Value,
    #[serde(alias = "prompt")]
    text: String,
    code: String,
    test_list: Vec<String>,
    #[serde(default)]
    test_setup_code: String,
    #[serde(default)]
    test_imports: Vec<String>,
    #[serde(default)]
    challenge_test_list: Vec<String>,
}

#[derive(Deserialize)]
pub(crate) struct QuixBugs {
    name: String,
    buggy: String,
    correct: String,
    json_testcases: Option<String>,
}

/// What a model wrote, below the prompt of a problem.
#[derive(Deserialize)]
pub(crate) struct Sample {
    #[serde(alias = "task_id")]
    id: Option<Value>,
    prompt: Option<String>,
    #[serde(alias = "completion", alias = "generation")]
    pub(crate) response: String,
}

impl HumanEval {
    fn problem(self) -> Problem {
        let Self { task_id, prompt, entry_point, canonical_solution, test } = self;
        let tests = format!("{test}\ncheck({entry_point})\n");
        Problem { id: id(&task_id), prompt, tests, right: canonical_solution, wrong: None }
    }
}

impl Mbpp {
    /// The task with its first test, which is where the function's name stands.
    fn problem(self) -> Problem {
        let first = self.test_list.first().map(|test| format!("\n{test}")).unwrap_or_default();
        let docstring = format!("{}{first}", self.text.trim()).replace('\\', "\\\\").replace("\"\"\"", "'''");
        let setup = self.test_imports.iter().chain([&self.test_setup_code]);
        let tests: Vec<&str> =
            setup.chain(&self.test_list).chain(&self.challenge_test_list).map(String::as_str).collect();
        Problem {
            id: id(&self.task_id),
            prompt: format!("\"\"\"\n{}\n\"\"\"\n", docstring.replace("\r\n", "\n")),
            tests: tests.join("\n").replace("\r\n", "\n"),
            right: self.code.replace("\r\n", "\n"),
            wrong: None,
        }
    }
}

impl QuixBugs {
    /// Comments and docstrings differ between the two programs, and would tell which is which.
    fn problem(self) -> std::result::Result<Problem, &'static str> {
        // Those without are tested by a script around a class of nodes.
        let Some(cases) = self.json_testcases else { return Err("no test cases") };
        let (right, _) = without_comments(&self.correct);
        let (wrong, docstrings) = without_comments(&self.buggy);
        let docstring = docstrings.last().cloned().unwrap_or_else(|| format!("\"\"\"{}\"\"\"", self.name));
        let tests = QUIXBUGS_TESTS.replace("NAME", &self.name).replace("CASES", &Value::from(cases).to_string());
        Ok(Problem { id: self.name, prompt: format!("{docstring}\n\n"), tests, right, wrong: Some(wrong) })
    }
}

/// As the authors compare: what a generator gives is a list, an argument alone is one of one, and numbers are close.
const QUIXBUGS_TESTS: &str = "
import json as _json, types as _types

def _plain(value):
    return _json.loads(_json.dumps(list(value) if isinstance(value, _types.GeneratorType) else value))

def _equal(found, expected):
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(found, float) or isinstance(expected, float):
        return abs(found - expected) <= 1e-4 * max(1, abs(expected))
    return found == expected

for _line in CASES.splitlines():
    if _line.strip():
        _arguments, _expected = _json.loads(_line)
        _arguments = _arguments if isinstance(_arguments, list) else [_arguments]
        assert _equal(_plain(NAME(*_arguments)), _expected), _line
";

fn id(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Problems, found by what a sample says it solves.
#[derive(Default)]
pub(crate) struct Problems {
    pub(crate) list: Vec<Problem>,
    by_id: HashMap<String, usize>,
    by_prompt: HashMap<String, usize>,
}

impl Problems {
    /// Reads the problems of files, which hold no samples. Every line that is none is told to `bad`.
    pub(crate) fn read(files: &[PathBuf], mut bad: impl FnMut(&Path, u64, &str) -> Result<()>) -> Result<Self> {
        let mut problems = Self::default();
        for path in files {
            let mut lines = Lines::open(path)?;
            while let Some((number, line)) = lines.next()? {
                match serde_json::from_slice::<Line>(&line).map(Line::problem) {
                    Ok(Ok(Ok(problem))) => problems.add(problem),
                    Ok(Ok(Err(_))) => {}
                    Ok(Err(_)) => bad(path, number, "a sample, not a problem")?,
                    Err(error) => bad(path, number, &error.to_string())?,
                }
            }
        }
        Ok(problems)
    }

    pub(crate) fn add(&mut self, problem: Problem) {
        let place = self.list.len();
        self.by_id.insert(problem.id.clone(), place);
        self.by_prompt.insert(problem.prompt.clone(), place);
        self.list.push(problem);
    }

    /// The problem of a sample: by the prompt that it goes on with, or by the problem's id.
    pub(crate) fn of(&self, sample: &Sample) -> Option<usize> {
        let prompt = sample.prompt.as_ref().and_then(|prompt| self.by_prompt.get(prompt));
        prompt.or_else(|| self.by_id.get(&id(sample.id.as_ref()?))).copied()
    }
}

impl Line {
    /// The problem, or why it is of no use; or the sample.
    pub(crate) fn problem(self) -> std::result::Result<std::result::Result<Problem, &'static str>, Sample> {
        match self {
            Self::HumanEval(line) => Ok(Ok(line.problem())),
            Self::Mbpp(line) => Ok(Ok(line.problem())),
            Self::QuixBugs(line) => Ok(line.problem()),
            Self::Sample(sample) => Err(sample),
        }
    }
}
