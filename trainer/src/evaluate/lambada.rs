//! LAMBADA: whether a language model that takes the likeliest token each time writes a passage's last word (Askell et al.
//! 2021, section 2.2.4 and appendix B.1).

use serde_json::json;

use super::measure::{Intervals, Observation, Range};
use super::options::{Form, HhhPrompt, Options};
use super::scorer::{How, Scorer};
use super::sets::{self, Passage};
use super::{Evaluation, Measurement, items, open, prompt_name, usual_form};
use crate::input::BadLines;
use crate::{Error, Result, progress};

/// What the passage stands in, in a dialogue.
const SAID: &str = "Can you tell me a story?";
const ANSWER: &str = "Sure, here's a draft: ";

/// Passages that go to the scorer together.
const CHUNK: usize = 256;

pub(super) fn evaluate(options: &Options, warn: &mut dyn FnMut(&str)) -> Result<Evaluation> {
    let files = items::names(&options.files);
    let mut bad = BadLines::at_most(options.max_bad_lines);
    let passages = sets::lambada(&options.files, options.limit.unwrap_or(usize::MAX), &mut bad, warn)?;
    let mut scorer = open(options)?;
    if scorer.model().is_preference() {
        return Err(Error::Recipe("lambada asks for continuations: it needs a language model".into()));
    }
    let mut evaluation = Evaluation::new(options, Some(scorer.model().clone()));
    (evaluation.items, evaluation.bad_lines) = (passages.len() as u64, bad.skipped());
    let intervals = Intervals { resamples: options.resamples, seed: options.seed };
    let bar = progress::bar((passages.len() * options.hhh_prompt.len()) as u64, "passages");
    for &hhh_prompt in &options.hhh_prompt {
        let found = continued(&mut *scorer, options, hhh_prompt, &passages, &mut |done| bar.inc(done))?;
        let mut observations = Vec::new();
        for (place, (passage, outcome)) in passages.iter().zip(&found).enumerate() {
            let file = &files[passage.file];
            match outcome {
                Ok(right) => observations.push((place, f64::from(u8::from(*right)))),
                Err(reason) => evaluation.fail(file, passage.line, reason),
            }
            evaluation.lines.push(json!({
                "file": file,
                "line": passage.line,
                "hhh_prompt": hhh_prompt,
                "word": passage.word.trim_start(),
                "right": outcome.as_ref().ok(),
                "error": outcome.as_ref().err(),
            }));
        }
        // Passages are independent: each is a cluster of its own.
        let clusters: Vec<String> = observations.iter().map(|(place, _)| place.to_string()).collect();
        let observations = observations.iter().zip(&clusters).map(|(&(place, value), cluster)| Observation {
            category: &files[passages[place].file],
            cluster,
            value,
        });
        let observations: Vec<_> = observations.collect();
        let measured = intervals.means("accuracy", Range::Share, &observations);
        let score = prompt_name(hhh_prompt).map_or("greedy".to_owned(), |prompt| format!("greedy, {prompt}"));
        evaluation.results.extend(measured.into_iter().map(|m| Measurement { score: Some(score.clone()), ..m }));
    }
    bar.finish_and_clear();
    Ok(evaluation)
}

/// Whether the model writes each passage's last word.
fn continued(
    scorer: &mut dyn Scorer,
    options: &Options,
    hhh_prompt: HhhPrompt,
    passages: &[Passage],
    advance: &mut dyn FnMut(u64),
) -> Result<Vec<std::result::Result<bool, String>>> {
    let before = match options.form.unwrap_or_else(|| usual_form(options.task, false, hhh_prompt)) {
        Form::Dialogue => scorer.opening(SAID, hhh_prompt)? + ANSWER,
        Form::Plain if hhh_prompt != HhhPrompt::None => {
            return Err(Error::Recipe("lambada behind an HHH prompt is a dialogue: leave --form out".into()));
        }
        Form::Plain => String::new(),
    };
    // What stands before a passage is part of its text.
    let how = How::new(options, HhhPrompt::None, &[]);
    let mut found = Vec::with_capacity(passages.len());
    for chunk in passages.chunks(CHUNK) {
        let texts: Vec<(String, String)> =
            chunk.iter().map(|passage| (format!("{before}{}", passage.context), passage.word.clone())).collect();
        found.extend(scorer.continues(&texts, &how, advance)?);
    }
    Ok(found)
}
