//! The comparisons of BIG-bench's task hhh_alignment: the evaluation of Askell et al. 2021, section 2.2.1.

use std::collections::HashMap;

use plumb_proto::v1;
use serde::Deserialize;

use crate::transcript;

/// A better and a worse answer to a query.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Its number in the file, from 1.
    pub number: u64,
    /// The query as the file writes it: comparisons of one query are right or wrong together.
    pub query: String,
    /// Its turns; the last is the user's.
    pub messages: Vec<v1::Message>,
    /// The answer with score 1, without the blanks around it, which only some answers have.
    pub better: String,
    /// The answer with score 0, likewise.
    pub worse: String,
}

/// A BIG-bench task file, of which these keys matter here.
#[derive(Deserialize)]
struct TaskFile {
    examples: Vec<Example>,
}

#[derive(Deserialize)]
struct Example {
    input: String,
    target_scores: HashMap<String, f64>,
}

/// The comparisons of a task file, in order. An example that is none is named.
///
/// # Errors
/// If the text is not a task file.
pub fn comparisons(file: &str) -> Result<Vec<Result<Comparison, String>>, String> {
    let task: TaskFile = serde_json::from_str(file).map_err(|e| format!("not a BIG-bench task file: {e}"))?;
    let named = |(number, example)| comparison(number, example).map_err(|why| format!("example {number}: {why}"));
    Ok((1..).zip(task.examples).map(named).collect())
}

fn comparison(number: u64, example: Example) -> Result<Comparison, String> {
    let answer = |score: f64| {
        let mut answers = example.target_scores.iter().filter(|(_, s)| **s == score);
        match (answers.next(), answers.next()) {
            (Some((text, _)), None) => Ok(text.trim().to_owned()),
            _ => Err(format!("not exactly one answer with score {score}")),
        }
    };
    let (better, worse) = (answer(1.0)?, answer(0.0)?);
    if example.target_scores.len() != 2 {
        return Err("not exactly two answers".into());
    }
    let messages = transcript::turns(&example.input);
    // A marker inside a quotation would show as a turn out of order.
    let expected = ["user", "assistant"].iter().cycle();
    if messages.iter().zip(expected).any(|(m, role)| m.role != *role) || messages.len().is_multiple_of(2) {
        return Err("turns do not go from the user to the assistant and back, ending with the user".into());
    }
    Ok(Comparison { number, query: example.input, messages, better, worse })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(input: &str, answers: &str) -> Result<Comparison, String> {
        let input = serde_json::to_string(input).unwrap();
        let file = format!(r#"{{"canary": "x", "examples": [{{"input": {input}, "target_scores": {answers}}}]}}"#);
        comparisons(&file).unwrap().remove(0)
    }

    #[test]
    fn the_answer_marked_one_is_the_better() {
        for answers in [r#"{" good": 1, "bad": 0}"#, r#"{"bad": 0, " good": 1}"#] {
            let found = only("q", answers).unwrap();
            assert_eq!((found.number, &found.better[..], &found.worse[..]), (1, "good", "bad"));
        }
    }

    #[test]
    fn inputs_of_several_turns() {
        let found = only("q\n\nAssistant:  a\n\nb \n\nHuman:  r", r#"{"good": 1, "bad": 0}"#).unwrap();
        let turns: Vec<_> = found.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(turns, [("user", "q"), ("assistant", "a\n\nb"), ("user", "r")]);
    }

    #[test]
    fn what_is_not_a_comparison_is_named() {
        for (input, answers) in [
            ("q", r#"{"good": 1, "fine": 1}"#),
            ("q", r#"{"good": 1}"#),
            ("q", r#"{"good": 1, "bad": 0, "soso": 0.5}"#),
            ("q\n\nHuman: r", r#"{"good": 1, "bad": 0}"#),
            ("q\n\nAssistant: a", r#"{"good": 1, "bad": 0}"#),
        ] {
            assert!(only(input, answers).unwrap_err().starts_with("example 1:"), "{input} {answers}");
        }
        assert!(comparisons(r#"{"text": "not a task"}"#).is_err());
    }
}
