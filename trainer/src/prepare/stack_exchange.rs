//! Stack Exchange: two answers of different score to a question (Askell et al. 2021, section 4.1 and appendix C.1).

use std::collections::HashMap;
use std::path::Path;

use quick_xml::events::Event;
use quick_xml::{Reader, XmlVersion};
use serde::{Deserialize, Serialize};

use super::html;
use super::parts::Parts;
use super::sets::pick;
use super::{Body, Record, Sink};
use crate::input::open;
use crate::{Error, Result};

/// A question with its answers.
#[derive(Deserialize)]
pub(super) struct Question {
    #[serde(default)]
    site: String,
    id: String,
    title: String,
    body_html: String,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    id: String,
    score: i64,
    accepted: bool,
    body_html: String,
}

/// `round(log2(1 + votes))`, one more if the asker accepted it; -1, accepted or not, for less than no votes.
fn score(votes: i64, accepted: bool) -> i64 {
    match votes {
        ..0 => -1,
        _ => ((votes + 1) as f64).log2().round() as i64 + i64::from(accepted),
    }
}

/// A pair of answers with different scores, drawn from all of them.
pub(super) fn question(question: Question, sink: &Sink<'_>) -> std::result::Result<Record, String> {
    let Question { site, id, title, body_html, answers } = question;
    let scored: Vec<(i64, &Answer)> =
        answers.iter().map(|answer| (score(answer.score, answer.accepted), answer)).collect();
    let mut pairs = Vec::new();
    for (better, chosen) in &scored {
        pairs.extend(scored.iter().filter(|(worse, _)| worse < better).map(|(_, rejected)| (*chosen, *rejected)));
    }
    // Their order in a file says which is better.
    pairs.sort_by_key(|(chosen, rejected)| (&chosen.id, &rejected.id));
    let group = format!("{site}/{id}");
    let Some((chosen, rejected)) = pick(&pairs, sink.draw("answers", &group)) else {
        return Err("no two answers of different score".to_owned());
    };
    let body = Body::Pair {
        prompt: format!("Question: {}\n\n{}\nAnswer: ", html::text(&title), html::text(&body_html)),
        chosen: html::text(&chosen.body_html),
        rejected: html::text(&rejected.body_html),
    };
    Ok(Record { group, body })
}

/// A row of Posts.xml that is a question or an answer.
#[derive(Default, Serialize, Deserialize)]
struct Post {
    id: u64,
    /// Of the question; its own if it is one.
    question: u64,
    /// Of a question: the answer that was accepted.
    accepted: Option<u64>,
    score: i64,
    title: Option<String>,
    body: String,
}

/// Reads Posts.xml.
pub(super) fn read_dump(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let mut parts = Parts::new(sink.scratch()?)?;
    let mut reader = Reader::from_reader(open(path)?);
    let mut buffer = Vec::new();
    let malformed = |position: u64, reason: String| Error::Malformed {
        path: path.to_owned(),
        reason: format!("byte {position}: {reason}"),
    };
    for row in 1.. {
        buffer.clear();
        let event = reader.read_event_into(&mut buffer);
        let event = event.map_err(|error| malformed(reader.error_position(), error.to_string()))?;
        let element = match &event {
            Event::Eof => break,
            Event::Empty(element) | Event::Start(element) if element.name().as_ref() == b"row" => element,
            _ => continue,
        };
        match post(element) {
            Ok(Some(post)) => parts.put(post.question, &post)?,
            Ok(None) => {}
            Err(reason) => sink.bad(path, row, &reason)?,
        }
    }
    let site = path.display().to_string();
    parts.for_each(|posts: Vec<Post>| {
        let mut questions: HashMap<u64, (Option<Post>, Vec<Post>)> = HashMap::new();
        for post in posts {
            let entry = questions.entry(post.question).or_default();
            if post.id == post.question { entry.0 = Some(post) } else { entry.1.push(post) }
        }
        for (asked, answers) in questions.into_values() {
            let Some(asked) = asked else {
                sink.drop("answers without their question");
                continue;
            };
            sink.read();
            let answer = |answer: Post| Answer {
                accepted: asked.accepted == Some(answer.id),
                id: answer.id.to_string(),
                score: answer.score,
                body_html: answer.body,
            };
            let found = Question {
                site: site.clone(),
                id: asked.id.to_string(),
                answers: answers.into_iter().map(answer).collect(),
                title: asked.title.unwrap_or_default(),
                body_html: asked.body,
            };
            match question(found, sink) {
                Ok(record) => sink.record(record)?,
                Err(reason) => sink.drop(&reason),
            }
        }
        Ok(())
    })
}

/// The row, if it is a question (type 1) or an answer (type 2).
fn post(element: &quick_xml::events::BytesStart<'_>) -> std::result::Result<Option<Post>, String> {
    let mut post = Post::default();
    let (mut kind, mut parent) = (0, None);
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| error.to_string())?;
        let number = || value.parse::<u64>().map_err(|_| format!("`{value}` is not a number"));
        match attribute.key.as_ref() {
            b"Id" => post.id = number()?,
            b"PostTypeId" => kind = number()?,
            b"ParentId" => parent = Some(number()?),
            b"AcceptedAnswerId" => post.accepted = Some(number()?),
            b"Score" => post.score = value.parse().map_err(|_| format!("score `{value}`"))?,
            b"Title" => post.title = Some(value.into_owned()),
            b"Body" => post.body = value.into_owned(),
            _ => {}
        }
    }
    match (kind, parent) {
        (1, _) => post.question = post.id,
        (2, Some(parent)) => post.question = parent,
        (2, None) => return Err(format!("the answer {} has no ParentId", post.id)),
        _ => return Ok(None),
    }
    Ok(Some(post))
}

#[cfg(test)]
mod tests {
    use super::score;

    #[test]
    fn scores_are_those_of_the_paper() {
        for (votes, accepted, expected) in [
            (0, false, 0),
            (1, false, 1),
            (2, false, 2),
            (4, false, 2),
            (5, false, 3),
            (0, true, 1),
            (7, true, 4),
            (-1, false, -1),
            (-5, true, -1),
        ] {
            assert_eq!(score(votes, accepted), expected, "{votes} {accepted}");
        }
    }
}
