//! Which regular expressions of a tokenizer are run.
//!
//! The engine backtracks. What makes it take time that grows exponentially with the text is a group that is repeated and
//! can match the same characters in several ways: because something in it is repeated too, or optional, or one of several
//! alternatives. The expressions that split text for the models that are served repeat characters and classes of
//! characters, and take groups at most once.

/// Bytes of an expression; those of published tokenizers have up to about 500.
const MOST_BYTES: usize = 4096;
/// Of a counted repetition. Those of published tokenizers count the three digits of a group.
const MOST_COUNT: usize = 256;

/// A group, or the expression as a whole, up to where it has been read.
#[derive(Clone, Copy, Default)]
struct Group {
    /// It matches in more than one way.
    varies: bool,
}

/// How often something may match.
struct Quantifier {
    least: usize,
    /// `None`: without bound.
    most: Option<usize>,
}

/// Refuses an expression that can take forever, whatever it is applied to. What is no expression at all, the engine
/// refuses.
pub(super) fn check(expression: &str) -> Result<(), String> {
    if expression.len() > MOST_BYTES {
        return Err(format!("it has {} bytes, {MOST_BYTES} are allowed", expression.len()));
    }
    let mut rest = expression;
    let mut groups = vec![Group::default()];
    while let Some(next) = rest.chars().next() {
        let mut inner = None;
        match next {
            '\\' => rest = escape(rest)?,
            '[' => rest = class(rest),
            '(' => {
                rest = opening(rest)?;
                groups.push(Group::default());
                continue;
            }
            ')' => {
                rest = &rest[1..];
                inner = groups.pop();
                if groups.is_empty() {
                    return Err("it closes a group that it does not open".to_owned());
                }
            }
            '|' => {
                rest = &rest[1..];
                groups.iter_mut().for_each(|group| group.varies = true);
                continue;
            }
            other => rest = &rest[other.len_utf8()..],
        }
        let varies = inner.is_some_and(|group| group.varies);
        let (repeated, after) = quantifiers(rest)?;
        if varies && repeated.most.is_none_or(|most| most > 1) {
            return Err("it repeats a group that itself repeats something or has alternatives".to_owned());
        }
        rest = after;
        if let Some(group) = groups.last_mut() {
            group.varies |= varies || repeated.most != Some(repeated.least);
        }
    }
    Ok(())
}

/// Behind an escape. References to groups are refused: with them, matching is hard whatever is repeated.
fn escape(text: &str) -> Result<&str, String> {
    let mut chars = text[1..].chars();
    match chars.next() {
        Some('1'..='9' | 'k' | 'g') => Err("it refers back to a group".to_owned()),
        // A run of characters that belong together: it repeats in itself.
        Some('X' | 'R') => Err("it has \\X or \\R".to_owned()),
        Some('p' | 'P' | 'x' | 'u') if chars.as_str().starts_with('{') => {
            let rest = chars.as_str();
            rest.find('}').map(|end| &rest[end + 1..]).ok_or_else(|| "it has an unclosed brace".to_owned())
        }
        _ => Ok(chars.as_str()),
    }
}

/// Behind a class of characters, which may hold others.
fn class(text: &str) -> &str {
    let mut depth = 0_usize;
    let mut chars = text.char_indices().peekable();
    let mut first = false;
    while let Some((at, next)) = chars.next() {
        match next {
            '\\' => {
                chars.next();
            }
            '[' => {
                depth += 1;
                chars.next_if(|(_, next)| *next == '^');
                // Right at the start it stands for itself.
                first = true;
                continue;
            }
            ']' if !first => {
                depth -= 1;
                if depth == 0 {
                    return &text[at + 1..];
                }
            }
            _ => {}
        }
        first = false;
    }
    ""
}

/// Behind the opening of a group.
fn opening(text: &str) -> Result<&str, String> {
    let Some(kind) = text.strip_prefix("(?") else { return Ok(&text[1..]) };
    if kind.starts_with(['(', '~', '#', '{', '&', 'R', 'P', '@']) {
        return Err("it has a conditional, an absence, a comment or a call".to_owned());
    }
    Ok(kind)
}

/// The quantifiers that stand here, together, and what is behind them.
fn quantifiers(text: &str) -> Result<(Quantifier, &str), String> {
    let mut all = Quantifier { least: 1, most: Some(1) };
    let mut rest = text;
    let mut found = 0;
    loop {
        let (one, after) = match rest.chars().next() {
            Some('*') => (Quantifier { least: 0, most: None }, &rest[1..]),
            Some('+') => (Quantifier { least: 1, most: None }, &rest[1..]),
            Some('?') => (Quantifier { least: 0, most: Some(1) }, &rest[1..]),
            Some('{') => match counted(rest) {
                Some(counted) => counted,
                None => return Ok((all, rest)),
            },
            _ => return Ok((all, rest)),
        };
        found += 1;
        if one.least.max(one.most.unwrap_or(0)) > MOST_COUNT {
            return Err(format!("it counts repetitions beyond {MOST_COUNT}"));
        }
        // A second one is usually `?` or `+`: a manner of repeating.
        if found > 2 || (found == 2 && !rest.starts_with(['?', '+'])) {
            return Err("it repeats a repetition".to_owned());
        }
        let manner = found == 2;
        all = if manner { Quantifier { least: all.least.min(one.least), ..all } } else { one };
        rest = after;
    }
}

/// `{n}`, `{n,}`, `{,m}` or `{n,m}`; anything else in braces stands for itself.
fn counted(text: &str) -> Option<(Quantifier, &str)> {
    let (inside, rest) = text[1..].split_once('}')?;
    let number =
        |text: &str| (text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().unwrap_or(usize::MAX));
    let quantifier = match inside.split_once(',') {
        None if inside.is_empty() => return None,
        None => Quantifier { least: number(inside)?, most: Some(number(inside)?) },
        Some(("", "")) => return None,
        Some((least, "")) => Quantifier { least: number(least)?, most: None },
        Some(("", most)) => Quantifier { least: 0, most: Some(number(most)?) },
        Some((least, most)) => Quantifier { least: number(least)?, most: Some(number(most)?) },
    };
    Some((quantifier, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expressions_of_published_tokenizers_are_run() {
        for expression in [
            "",
            // Llama 3, GPT-2, Tekken, GPT-4o, DeepSeek, Bloom, digits from the right.
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
            r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            r"\d{1,3}(?=(?:\d{3})*\b)",
            r"[^\]]+|[]^]|[^]]|\[|\)|\{x{,2}a{",
            "[\u{4e00}-\u{9fa5}]+?a++",
        ] {
            assert_eq!(check(expression), Ok(()), "{expression}");
        }
    }

    #[test]
    fn what_can_take_forever_is_refused() {
        for (expression, reason) in [
            ("(a+)+b", "repeats a group"),
            ("(a*)*", "repeats a group"),
            ("(a?){2,}", "repeats a group"),
            ("(?:a|a)*b", "repeats a group"),
            (r"((?:\w+)\s)+", "repeats a group"),
            (r"(?=(x|(y[)]*)))+", "repeats a group"),
            (r"(a)\1", "refers back"),
            (r"(?<n>a\g<n>?)", "refers back"),
            ("a**", "repetition"),
            ("a{2}{3}", "repetition"),
            ("a{257}", "beyond 256"),
            ("a{99999999999999999999999}", "beyond 256"),
            ("(?(1)a|b)", "conditional"),
            (r"\X+", r"\X"),
            ("a)", "does not open"),
            (&"a".repeat(5000), "4096"),
        ] {
            let error = check(expression).unwrap_err();
            assert!(error.contains(reason), "{expression}: {error}");
        }
    }
}
