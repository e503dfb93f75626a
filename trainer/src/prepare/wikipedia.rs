//! Wikipedia: a section before and after a revert of suspected vandalism (Askell et al. 2021, section 4.1 and appendix
//! C.1), from a dump with the history of every page.

use std::collections::HashMap;
use std::io::{BufRead, Read};
use std::path::Path;

use quick_xml::Reader;
use quick_xml::events::Event;
use serde::Deserialize;

use super::wikitext::{Section, sections, text, without_comments};
use super::{Body, Record, Sink};
use crate::input::open;
use crate::{Error, Result};

/// Most bytes between two tags, and of a revision: Wikipedia allows 2 MiB.
const MAX_TEXT: usize = 16 << 20;
/// What the part above the first heading is called.
const LEAD: &str = "Introduction";
/// How reverts begin to be called.
const REVERTS: [&str; 6] = ["revert", "undid", "undo", "rollback", "restor", "rv"];

/// Whether the comment of an edit says that it takes vandalism back: "suspected vandalism", as the paper has it, and the
/// words of people and programs for the same: "Reverted edits by ... identified as vandalism", "Reverting possible
/// vandalism", "rvv".
fn reverts_vandalism(comment: &str) -> bool {
    let comment = comment.to_lowercase();
    if ["not vandal", "n't vandal", "no vandal", "non-vandal", "not necessarily vandal"]
        .iter()
        .any(|denied| comment.contains(denied))
    {
        return false;
    }
    let words: Vec<&str> = comment.split(|c: char| !c.is_alphanumeric()).collect();
    let reverts = || words.iter().any(|word| REVERTS.iter().any(|revert| word.starts_with(revert)));
    words.contains(&"rvv")
        || comment.contains("suspected vandalism")
        || comment.contains("possible vandalism")
        || comment.contains("vandal") && reverts()
}

/// What is known of a page, while it is read.
#[derive(Default)]
struct Page {
    title: String,
    space: String,
    /// The revision before, unless it cannot be used.
    before: Option<Revision>,
}

#[derive(Default)]
struct Revision {
    id: String,
    parent: String,
    comment: String,
    text: String,
    /// Its text was taken away, or is longer than one is.
    unusable: bool,
}

/// Reads a dump of pages with all their revisions: no more than two of them are ever in memory.
pub(super) fn read_history(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let mut reader = Reader::from_reader(Bounded { inner: open(path)?, left: 0 });
    let mut buffer = Vec::new();
    let (mut page, mut revision) = (Page::default(), Revision::default());
    // Names of the elements that are open.
    let mut open: Vec<Vec<u8>> = Vec::new();
    let malformed = |position: u64, reason: String| Error::Malformed {
        path: path.to_owned(),
        reason: format!("byte {position}: {reason}"),
    };
    loop {
        buffer.clear();
        reader.get_mut().left = MAX_TEXT;
        let event = reader.read_event_into(&mut buffer);
        let event = event.map_err(|error| malformed(reader.error_position(), error.to_string()))?;
        match &event {
            Event::Eof if open.is_empty() => return Ok(()),
            Event::Eof => return Err(malformed(reader.buffer_position(), "it ends within an element".into())),
            Event::Start(element) => {
                match element.name().as_ref() {
                    b"page" => page = Page::default(),
                    b"revision" => revision = Revision::default(),
                    b"text" | b"comment" if is_deleted(element) => revision.unusable = true,
                    _ => {}
                }
                open.push(element.name().as_ref().to_vec());
            }
            Event::End(_) => {
                let ended = open.pop();
                if ended.as_deref() == Some(b"revision") {
                    end_revision(&mut page, std::mem::take(&mut revision), sink)?;
                }
            }
            Event::Empty(element) if matches!(element.name().as_ref(), b"text" | b"comment") => {
                revision.unusable |= is_deleted(element);
            }
            Event::Text(_) | Event::CData(_) | Event::GeneralRef(_) => {
                if let Some(field) = field(&open, &mut page, &mut revision) {
                    let part = content(&event).map_err(|reason| malformed(reader.buffer_position(), reason))?;
                    field.push_str(&part);
                }
                if revision.text.len() > MAX_TEXT {
                    revision.unusable = true;
                    revision.text.clear();
                }
            }
            _ => {}
        }
    }
}

/// Where the text in an element goes to.
fn field<'a>(open: &[Vec<u8>], page: &'a mut Page, revision: &'a mut Revision) -> Option<&'a mut String> {
    let [.., parent, name] = open else { return None };
    match (&parent[..], &name[..]) {
        (b"page", b"title") => Some(&mut page.title),
        (b"page", b"ns") => Some(&mut page.space),
        (b"revision", b"id") => Some(&mut revision.id),
        (b"revision", b"parentid") => Some(&mut revision.parent),
        (b"revision", b"comment") => Some(&mut revision.comment),
        (b"revision", b"text") => Some(&mut revision.text),
        _ => None,
    }
}

fn is_deleted(element: &quick_xml::events::BytesStart<'_>) -> bool {
    element.attributes().flatten().any(|attribute| attribute.key.as_ref() == b"deleted")
}

fn content(event: &Event<'_>) -> std::result::Result<String, String> {
    let text = match event {
        Event::Text(text) => text.xml10_content().map_err(|error| error.to_string())?,
        Event::CData(text) => text.xml10_content().map_err(|error| error.to_string())?,
        Event::GeneralRef(reference) => {
            let name = reference.decode().map_err(|error| error.to_string())?;
            if let Some(character) = reference.resolve_char_ref().map_err(|error| error.to_string())? {
                return Ok(character.to_string());
            }
            let Some(text) = quick_xml::escape::resolve_xml_entity(&name) else {
                return Err(format!("unknown entity &{name};"));
            };
            text.into()
        }
        _ => return Ok(String::new()),
    };
    Ok(text.into_owned())
}

/// Compares a revision with the one before it, and keeps it in that one's place.
fn end_revision(page: &mut Page, revision: Revision, sink: &mut Sink<'_>) -> Result<()> {
    let before = page.before.take();
    if reverts_vandalism(&revision.comment) {
        sink.read();
        match before {
            _ if page.space != "0" && !page.space.is_empty() => sink.drop("not an article"),
            _ if revision.unusable => sink.drop("the text is not there"),
            Some(before) if revision.parent.is_empty() || revision.parent == before.id => {
                pairs(&page.title, &before.text, &revision.text, sink)?;
            }
            _ => sink.drop("the revision before is not there"),
        }
    }
    page.before = Some(revision).filter(|revision| !revision.unusable);
    Ok(())
}

/// A pair for every section that an edit changed.
fn pairs(title: &str, before: &str, after: &str, sink: &mut Sink<'_>) -> Result<()> {
    let [before, after] = [before, after].map(without_comments);
    let before: HashMap<_, _> = numbered(sections(&before)).into_iter().collect();
    let mut changed = 0;
    for (name, body) in numbered(sections(&after)) {
        match before.get(&name) {
            Some(old) if *old != body => {
                changed += 1;
                let [chosen, rejected] = [body, old].map(text);
                if chosen == rejected {
                    sink.drop("only markup differs");
                    continue;
                }
                let section = text(name.0);
                let section = if section.is_empty() { LEAD } else { &section };
                let prompt = format!("PAGE TITLE: {title}\nSECTION TITLE: {section}\nSECTION BODY: ");
                sink.record(Record { group: title.to_owned(), body: Body::Pair { prompt, chosen, rejected } })?;
            }
            _ => {}
        }
    }
    if changed == 0 {
        sink.drop("no section is in both and differs");
    }
    Ok(())
}

/// Sections by title, and by which of that title they are.
fn numbered(sections: Vec<Section<'_>>) -> Vec<((&str, usize), &str)> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut numbered = Vec::new();
    for Section { title, body } in sections {
        let number = seen.entry(title).or_default();
        *number += 1;
        numbered.push(((title, *number), body));
    }
    numbered
}

/// An edit by itself, with the text around it.
#[derive(Deserialize)]
pub(super) struct Edit {
    before: String,
    after: String,
    #[serde(default)]
    comment: String,
    is_revert: Option<bool>,
    title: Option<String>,
}

pub(super) fn edit(edit: Edit) -> std::result::Result<Record, String> {
    let Edit { before, after, comment, is_revert, title } = edit;
    if !is_revert.unwrap_or_else(|| reverts_vandalism(&comment)) {
        return Err("no revert".to_owned());
    }
    let [chosen, rejected] = [&after, &before].map(|side| text(&without_comments(side)));
    if chosen == rejected {
        return Err("only markup differs".to_owned());
    }
    // MediaWiki's own words in the comment of an edit to one section.
    let section = comment.strip_prefix("/*").and_then(|rest| rest.split_once("*/")).map(|(section, _)| section.trim());
    let line = |label: &str, value: Option<&str>| {
        value.filter(|value| !value.is_empty()).map(|value| format!("{label}: {value}\n")).unwrap_or_default()
    };
    let head = line("PAGE TITLE", title.as_deref()) + &line("SECTION TITLE", section);
    let group = title.unwrap_or_else(|| after.clone());
    Ok(Record { group, body: Body::Pair { prompt: head + "SECTION BODY: ", chosen, rejected } })
}

/// A reader that reads so much and no more, until it is told to go on: a text without an end must not fill the memory.
struct Bounded<R> {
    inner: R,
    left: usize,
}

impl<R: BufRead> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Bounded<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        let (left, content) = (self.left, self.inner.fill_buf()?);
        if left == 0 && !content.is_empty() {
            return Err(std::io::Error::other(format!("more than {MAX_TEXT} bytes without a tag")));
        }
        Ok(&content[..content.len().min(left)])
    }

    fn consume(&mut self, count: usize) {
        self.left -= count;
        self.inner.consume(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_say_what_was_taken_back() {
        for (comment, expected) in [
            ("Reverted suspected Vandalism", true),
            ("Reverting possible vandalism by [[User:A]] to version by B", true),
            ("Reverted 1 edit by [[User:A]] identified as [[WP:VAND|vandalism]] to last revision by B", true),
            ("rvv", true),
            ("rv vandalism", true),
            ("Undid revision 1: vandalism", true),
            ("rv, this isn't vandalism but wrong", false),
            ("Wrote about vandalism in Rome", false),
            ("Reverted to revision 5", false),
            ("", false),
        ] {
            assert_eq!(reverts_vandalism(comment), expected, "{comment}");
        }
    }

    #[test]
    fn a_text_without_end_is_refused() {
        let mut reader = Bounded { inner: &b"abc"[..], left: 2 };
        assert!(std::io::read_to_string(&mut reader).unwrap_err().to_string().contains("without a tag"));
        let mut reader = Bounded { inner: &b"abc"[..], left: 3 };
        assert_eq!(std::io::read_to_string(&mut reader).unwrap(), "abc");
    }
}
