//! Where the response stands in what a chat template wrote.
//!
//! A template may trim a content, put something before it and end the turn after it. So the same conversation is
//! rendered once more with a stand-in for the response: what stands around the stand-in stands around the response.

use std::ops::Range;

use super::Message;
use super::template::{ChatTemplate, Failure};

/// Private-use characters, which no text should have.
const STAND_IN: &str = "\u{f8ff}plumb response\u{f8ff}";

/// Bytes of `full`, the rendered `messages`, that are the last message's content. `None` if the template left it out or
/// wrote something else in its place.
pub(super) fn locate(
    template: &ChatTemplate,
    messages: &[Message],
    full: &str,
) -> Result<Option<Range<usize>>, Failure> {
    // What fails now and may not fail the next time must not decide where the response is.
    let render = |messages: &[Message], add_generation_prompt| match template.render(messages, add_generation_prompt) {
        Ok(text) => Ok(Some(text)),
        Err(Failure::Refused(_)) => Ok(None),
        Err(failure) => Err(failure),
    };
    let Some((last, history)) = messages.split_last() else { return Ok(None) };
    let stand_in = Message::new(last.role.as_str(), STAND_IN);
    if let Some(rendered) = render(&[history, &[stand_in]].concat(), false)?
        && let Some((before, after)) = rendered.rsplit_once(STAND_IN)
        && let Some(content) = full.strip_prefix(before).and_then(|rest| rest.strip_suffix(after))
    {
        return Ok(Some(before.len()..before.len() + content.len()));
    }
    // The template looks into the content, for instance for `</think>`: look for the content after the generation
    // prompt, or anywhere.
    let prompt = render(history, true)?.unwrap_or_default();
    let from = if full.starts_with(&prompt) { prompt.len() } else { 0 };
    let content = last.content.trim();
    let found = full[from..].rfind(content).filter(|_| !content.is_empty());
    Ok(found.map(|at| from + at..from + at + content.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::SpecialTokens;

    const TURNS: &str = "{% for m in messages %}[{{ m.role }}]";
    const END: &str = "<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

    #[track_caller]
    fn check(body: &str, content: &str, expected: Option<&str>) {
        let template = ChatTemplate::new(&format!("{TURNS}{body}{END}"), &SpecialTokens::default()).unwrap();
        let messages = [Message::new("user", "Is it an end or a think?"), Message::new("assistant", content)];
        let full = template.render(&messages, false).unwrap();
        let found = locate(&template, &messages, &full).unwrap().map(|range| (range.end, &full[range]));
        assert_eq!(found.map(|(_, text)| text), expected, "{full}");
        let end = full.len() - "<end>".len();
        assert!(found.is_none_or(|(stop, _)| stop == end || full[stop..end].trim().is_empty()), "{full}");
    }

    #[test]
    fn the_response_is_found_whatever_stands_around_it() {
        for content in ["a", "end", "think", "  spaces\n", "Is it an end or a think?", "[assistant]", ""] {
            check("{{ m.content }}", content, Some(content));
            check(" <think>\n</think> {{ m.content }}", content, Some(content));
            check("{{ m.content | trim }}", content, Some(content.trim()));
        }
    }

    #[test]
    fn templates_that_look_into_the_response() {
        let thinking =
            "{% if '</think>' in m.content %}{{ m.content }}{% else %}<think></think>{{ m.content }}{% endif %}";
        check(thinking, "<think>x</think>y", Some("<think>x</think>y"));
        check(thinking, "y", Some("y"));
        let stripping = "{{ m.content.split('</think>')[-1] }}";
        check(stripping, "<think>x</think>y", Some("y"));
        check("{{ m.content | upper }}", "shout", None);
        check("{% if m.role == 'user' %}{{ m.content }}{% endif %}", "gone", None);
    }
}
