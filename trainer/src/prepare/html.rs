//! What a page says, without its markup.

/// The text of a post: paragraphs and list items on lines of their own, code as it is, entities decoded.
pub(super) fn text(html: &str) -> String {
    let mut text = String::with_capacity(html.len());
    let mut rest = html;
    let mut code = false;
    while let Some(start) = rest.find('<') {
        push(&mut text, &rest[..start], code);
        let Some(len) = rest[start..].find('>') else {
            push(&mut text, &rest[start..], code);
            return tidy(&text);
        };
        let tag = &rest[start + 1..start + len];
        rest = &rest[start + len + 1..];
        let (closing, name) = match tag.strip_prefix('/') {
            Some(name) => (true, name),
            None => (false, tag),
        };
        let name: String =
            name.chars().take_while(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
        match name.as_str() {
            "pre" => {
                code = !closing;
                text.push('\n');
            }
            "li" if !closing => text.push_str("\n- "),
            "br" | "p" | "div" | "blockquote" | "ul" | "ol" | "li" | "h1" | "h2" | "h3" | "h4" | "h5" | "h6" | "hr"
            | "tr" => {
                text.push('\n');
            }
            _ => {}
        }
    }
    push(&mut text, rest, code);
    tidy(&text)
}

/// Outside of code, a line break is a space.
fn push(text: &mut String, html: &str, code: bool) {
    let decoded = html_escape::decode_html_entities(html);
    match code {
        true => text.push_str(&decoded),
        false => text.extend(decoded.chars().map(|c| if c == '\n' || c == '\r' { ' ' } else { c })),
    }
}

/// No spaces at the ends of lines, and no more than one empty line.
pub(super) fn tidy(text: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim_end) {
        let line = if line.trim().is_empty() { "" } else { line };
        if !(line.is_empty() && lines.last().is_none_or(|last| last.is_empty())) {
            lines.push(line);
        }
    }
    lines.join("\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_goes_and_code_stays() {
        for (html, expected) in [
            ("<p>One &amp; two,\nthree.</p>\n<p>Four&nbsp;&lt;5</p>", "One & two, three.\n\nFour\u{a0}<5"),
            ("<ul><li>a</li><li><em>b</em></li></ul>", "- a\n\n- b"),
            (
                "See <a href=\"x\">this</a>:<pre><code>if a &lt; b {\n    c\n}\n</code></pre>",
                "See this:\nif a < b {\n    c\n}",
            ),
            ("a < b", "a < b"),
            ("", ""),
        ] {
            assert_eq!(text(html), expected, "{html}");
        }
    }
}
