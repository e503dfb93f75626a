//! What a page of a wiki says, without its markup.
//!
//! No parser of the language, which has no grammar: one pass that never fails, on pages that vandals have broken too.

use std::collections::HashSet;

use super::html::tidy;

/// A heading and what stands below it, to the next heading.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Section<'a> {
    /// As it is written; empty above the first heading.
    pub(super) title: &'a str,
    pub(super) body: &'a str,
}

/// Sections that list what a page rests on; those below them go with them.
const REFERENCES: [&str; 13] = [
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "notes",
    "notes and references",
    "references",
    "references and notes",
    "sources",
    "works cited",
    "notes and citations",
    "citations and references",
];
/// Tags whose content is no text.
const OPAQUE: [&str; 12] = [
    "ref",
    "references",
    "gallery",
    "math",
    "chem",
    "score",
    "timeline",
    "imagemap",
    "mapframe",
    "templatestyles",
    "style",
    "graph",
];
/// Deeper than MediaWiki itself goes into templates; whatever stands deeper is taken as text.
const MAX_DEPTH: usize = 40;
/// Most bytes of a tag, or of a link to another site.
const MAX_TAG: usize = 2000;

/// The sections of a page without those of references.
pub(super) fn sections(page: &str) -> Vec<Section<'_>> {
    let mut all = vec![(0, Section { title: "", body: "" })];
    let (mut start, mut position) = (0, 0);
    for line in page.split_inclusive('\n') {
        if let Some((level, title)) = heading(line) {
            start = position + line.len();
            all.push((level, Section { title, body: "" }));
        }
        position += line.len();
        if let Some((_, section)) = all.last_mut() {
            section.body = &page[start..position];
        }
    }
    // The level of the references above, while below them.
    let mut references = None;
    all.retain(|(level, section)| {
        references = references.filter(|above| level > above);
        if references.is_none() && REFERENCES.contains(&&text(section.title).to_lowercase()[..]) {
            references = Some(*level);
        }
        references.is_none()
    });
    all.into_iter().map(|(_, section)| section).collect()
}

/// Level and title, if a line is a heading.
fn heading(line: &str) -> Option<(usize, &str)> {
    let line = line.trim_end();
    let [left, right] = [line.trim_start_matches('='), line.trim_end_matches('=')].map(|rest| line.len() - rest.len());
    let level = left.min(right).min(6);
    // A line of nothing but signs is none.
    let title = line.get(level..line.len().checked_sub(level)?)?.trim();
    (level > 0 && !title.is_empty()).then_some((level, title))
}

/// A page without its comments, which may hold what looks like headings.
pub(super) fn without_comments(page: &str) -> String {
    let mut kept = String::with_capacity(page.len());
    let mut rest = page;
    while let Some((before, comment)) = rest.split_once("<!--") {
        kept += before;
        // One without an end hides all that follows.
        rest = comment.split_once("-->").map_or("", |(_, after)| after);
    }
    kept + rest
}

/// The words of a section or a title: links, lists and emphasis without their marks, images, tables, templates and
/// references not at all.
pub(super) fn text(markup: &str) -> String {
    let plain = Stripper::new(markup).run();
    let decoded = html_escape::decode_html_entities(&plain).replace('\u{a0}', " ");
    let lines: Vec<String> = decoded.lines().map(line).collect();
    tidy(&lines.join("\n"))
}

/// A line without the marks of lists, rules and emphasis.
fn line(line: &str) -> String {
    let line = line.replace("'''", "").replace("''", "");
    let content = line.trim_start_matches(['*', '#', ':', ';']);
    let marks = &line[..line.len() - content.len()];
    let content = content.split_whitespace().collect::<Vec<_>>().join(" ");
    match marks.contains(['*', '#']) && !content.is_empty() {
        true => format!("- {content}"),
        false if content.starts_with("----") => String::new(),
        false => content,
    }
}

/// What has begun and not ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Template,
    Table,
    Link,
}

struct Stripper<'a> {
    markup: &'a str,
    position: usize,
    /// What was found in each of those that are open, the text itself first.
    open: Vec<(Kind, String)>,
    text: String,
    /// Tags that no end follows.
    unended: HashSet<&'static str>,
    /// Same length as the markup.
    lower: String,
}

impl<'a> Stripper<'a> {
    fn new(markup: &'a str) -> Self {
        let lower = markup.to_ascii_lowercase();
        Self { markup, position: 0, open: Vec::new(), text: String::new(), unended: HashSet::new(), lower }
    }

    fn run(mut self) -> String {
        while let Some(next) = self.markup[self.position..].find(['{', '}', '|', '[', ']', '<', '_']) {
            self.copy(next);
            if !self.mark() {
                self.copy(1);
            }
        }
        self.copy(self.markup.len() - self.position);
        // What never ended was no markup.
        while let Some((_, content)) = self.open.pop() {
            self.out().push_str(&content);
        }
        self.text
    }

    fn out(&mut self) -> &mut String {
        self.open.last_mut().map_or(&mut self.text, |(_, content)| content)
    }

    fn copy(&mut self, len: usize) {
        let markup = self.markup;
        let from = self.position;
        self.out().push_str(&markup[from..from + len]);
        self.position += len;
    }

    /// Goes past a mark, if there is one.
    fn mark(&mut self) -> bool {
        let rest = &self.markup[self.position..];
        let table_ends = rest.starts_with("|}") && self.open.iter().any(|(kind, _)| *kind == Kind::Table);
        // `{{a|}}` ends a template, not a table.
        if table_ends && (!rest.starts_with("|}}") || self.open.last().is_some_and(|(kind, _)| *kind == Kind::Table)) {
            return self.end(Kind::Table);
        }
        match rest.as_bytes() {
            [b'{', b'{', ..] => self.begin(Kind::Template),
            [b'{', b'|', ..] => self.begin(Kind::Table),
            [b'[', b'[', ..] => self.begin(Kind::Link),
            [b'}', b'}', ..] => self.end(Kind::Template),
            [b']', b']', ..] => self.end(Kind::Link),
            [b'[', ..] => self.external_link(),
            [b'<', ..] => self.tag(),
            [b'_', b'_', ..] => self.switch(),
            _ => false,
        }
    }

    fn begin(&mut self, kind: Kind) -> bool {
        if self.open.len() == MAX_DEPTH {
            return false;
        }
        self.open.push((kind, String::new()));
        self.position += 2;
        true
    }

    /// Ends the innermost of a kind; what began in it and did not end was no markup.
    fn end(&mut self, kind: Kind) -> bool {
        let Some(depth) = self.open.iter().rposition(|(open, _)| *open == kind) else { return false };
        // A link ends where it began: one that was left open in a template does not end outside.
        if kind == Kind::Link && depth + 1 < self.open.len() {
            return false;
        }
        let mut content = String::new();
        for (_, part) in self.open.drain(depth..) {
            content.push_str(&part);
        }
        self.position += 2;
        if kind == Kind::Link {
            self.out().push_str(label(&content));
        }
        true
    }

    /// `[https://a.b label]`
    fn external_link(&mut self) -> bool {
        let rest = &self.markup[self.position + 1..];
        if !["http://", "https://", "//", "mailto:", "ftp://"].iter().any(|scheme| rest.starts_with(scheme)) {
            return false;
        }
        let Some(end) = rest.bytes().take(MAX_TAG).position(|byte| matches!(byte, b']' | b'\n')) else { return false };
        if rest.as_bytes()[end] == b'\n' {
            return false;
        }
        let label = rest[..end].split_once(' ').map_or("", |(_, label)| label).trim();
        self.out().push_str(label);
        self.position += end + 2;
        true
    }

    /// A tag goes; what stands between two stays, if it is text.
    fn tag(&mut self) -> bool {
        let rest = &self.lower[self.position + 1..];
        let name = rest.strip_prefix('/').unwrap_or(rest);
        let name = &name[..name.bytes().take_while(u8::is_ascii_alphanumeric).count()];
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return false;
        }
        let Some(end) = rest.bytes().take(MAX_TAG).position(|byte| byte == b'>') else { return false };
        let (whole, begins) = (rest[..end].ends_with('/'), !rest.starts_with('/'));
        let opaque = OPAQUE.into_iter().find(|opaque| *opaque == name);
        let after = self.position + end + 2;
        if name == "br" {
            self.out().push('\n');
        }
        self.position = after;
        if let (Some(name), true, false) = (opaque, begins, whole)
            && !self.unended.contains(name)
        {
            let close = format!("</{name}");
            match self.lower[after..].find(&close) {
                Some(len) => self.position = after + len,
                None => _ = self.unended.insert(name),
            }
        }
        true
    }

    /// `__NOTOC__`
    fn switch(&mut self) -> bool {
        let rest = &self.markup[self.position + 2..];
        let len = rest.bytes().take(MAX_TAG).take_while(u8::is_ascii_uppercase).count();
        if len == 0 || !rest[len..].starts_with("__") {
            return false;
        }
        self.position += len + 4;
        true
    }
}

/// What a link shows: nothing, for an image, a category or the page of another language.
fn label(link: &str) -> &str {
    let (target, label) = link.split_once('|').unwrap_or((link, link));
    if let Some((space, _)) = target.split_once(':') {
        let space = space.trim();
        let language = (2..=3).contains(&space.len()) && space.bytes().all(|byte| byte.is_ascii_lowercase());
        if language || ["file", "image", "category", "media"].iter().any(|name| space.eq_ignore_ascii_case(name)) {
            return "";
        }
    }
    label.rsplit_once('|').map_or(label, |(_, last)| last).trim_start_matches(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_and_markup_goes() {
        for (markup, expected) in [
            ("'''Tea''' is ''hot''.", "Tea is hot."),
            ("A [[leaf|leaves]] of [[Camellia]] and [[:Category:Tea]].", "A leaves of Camellia and Category:Tea."),
            ("[[File:A.jpg|thumb|A [[cup]] of {{lang|en|tea}}]]Tea.", "Tea."),
            ("[[Category:Drinks]][[de:Tee]]Tea.", "Tea."),
            ("Tea<ref name=\"a\">{{cite|b}} c</ref> and<ref name=a /> milk.", "Tea and milk."),
            ("{{Infobox|a={{b|c}}\n|d=[[e]]}}\nTea.", "Tea."),
            ("One.\n{| class=wikitable\n|-\n| a || {{b|}}\n|}\nTwo.", "One.\n\nTwo."),
            ("* one\n** two\n# three\n: four\n----", "- one\n- two\n- three\nfour"),
            ("See [https://a.b the site], [https://a.b] and [1].", "See the site, and [1]."),
            ("1 &lt; 2&nbsp;&amp; 3 < 4<br>x<sup>2</sup> __NOTOC__", "1 < 2 & 3 < 4\nx2"),
            // Broken by a vandal.
            ("{{Infobox|a=b\nTea.", "Infobox|a=b\nTea."),
            ("[[Tea is }} hot.", "Tea is }} hot."),
            ("Tea <ref>a", "Tea a"),
            ("]] |} }} <", "]] |} }} <"),
            ("", ""),
        ] {
            assert_eq!(text(markup), expected, "{markup}");
        }
    }

    #[test]
    fn whatever_is_nested_ends() {
        for part in ["[[", "{{", "{|", "<ref>", "[[a|", "{{a|[[", "<", "[http://a", "__", "|}", "é[["] {
            let markup = part.repeat(20_000);
            assert!(text(&markup).len() <= markup.len(), "{part}");
            assert!(!sections(&markup).is_empty(), "{part}");
        }
    }

    #[test]
    fn sections_of_references_are_none() {
        let page = "Above.\n== History ==\nOld.\n=== Early ===\n== References ==\nA book.\n=== Notes on [[a]] ===\nb\n== End\
                    ==\nNo heading: = 1 =\n==";
        let found: Vec<_> = sections(page).into_iter().map(|section| (section.title, section.body)).collect();
        let expected = [("", "Above.\n"), ("History", "Old.\n"), ("Early", ""), ("End", "No heading: = 1 =\n==")];
        assert_eq!(found, expected);
        assert_eq!(without_comments("a<!-- == b == -->c<!--d"), "ac");
    }
}
