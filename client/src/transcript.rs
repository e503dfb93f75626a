//! Transcripts with `Human:` and `Assistant:` markers, read into turns.

use plumb_proto::v1;

const MARKERS: [(&str, &str); 4] =
    [("Human:", "user"), ("HUMAN:", "user"), ("Assistant:", "assistant"), ("ASSISTANT:", "assistant")];

/// Turns of a transcript, oldest first, with white space around each turn removed.
///
/// A marker counts at the start of the text or after a blank line, as in hh-rlhf and in BIG-bench's hhh_alignment; the
/// same word inside a paragraph is text. What stands before the first marker is the user's.
pub fn turns(transcript: &str) -> Vec<v1::Message> {
    let mut turns: Vec<(&str, &str)> = Vec::new();
    let mut role = "user";
    let mut start = 0;
    let mut at = 0;
    loop {
        let rest = &transcript[at..];
        if let Some((marker, next)) = MARKERS.iter().find(|(marker, _)| rest.starts_with(marker)) {
            turns.push((role, &transcript[start..at]));
            role = next;
            at += marker.len();
            start = at;
        }
        match transcript[at..].find("\n\n") {
            // A third newline belongs to the blank space too.
            Some(blank) => at += blank + 2 + transcript[at + blank + 2..].bytes().take_while(|b| *b == b'\n').count(),
            None => break,
        }
    }
    turns.push((role, &transcript[start..]));
    turns
        .into_iter()
        .enumerate()
        // Nothing stands before a leading marker; an empty turn elsewhere is the data's.
        .filter(|(i, (_, content))| *i > 0 || !content.trim().is_empty())
        .map(|(_, (role, content))| v1::Message { role: role.into(), content: content.trim().into() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(transcript: &str, expect: &[(&str, &str)]) {
        let turns = turns(transcript);
        let turns: Vec<_> = turns.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(turns, expect, "{transcript:?}");
    }

    #[test]
    fn transcripts() {
        check("hello", &[("user", "hello")]);
        check("Human: hi\n\nAssistant: ho", &[("user", "hi"), ("assistant", "ho")]);
        check("\n\nHuman: hi\n\nAssistant: ho\n\nHuman: ha", &[("user", "hi"), ("assistant", "ho"), ("user", "ha")]);
        check("hi\n\nASSISTANT:  ho \n\nHUMAN:  ha", &[("user", "hi"), ("assistant", "ho"), ("user", "ha")]);
        check("hi\n\n\nAssistant: ho", &[("user", "hi"), ("assistant", "ho")]);
        // Paragraphs of a turn stay together, and a marker in running text is text.
        check(
            "a\n\nb\n\nAssistant: c\nHuman: d\n\nsays Human: e",
            &[("user", "a\n\nb"), ("assistant", "c\nHuman: d\n\nsays Human: e")],
        );
        // Turns of the data stay as they are, empty and repeated ones too.
        check("\n\nHuman: a\n\nHuman: b\n\nAssistant:", &[("user", "a"), ("user", "b"), ("assistant", "")]);
        check("naïve — ça\n\nAssistant: é", &[("user", "naïve — ça"), ("assistant", "é")]);
    }
}
