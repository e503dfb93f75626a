//! Small changes to Python programs, token by token: everything that is not changed stays as it was written.

use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Space,
    LineEnd,
    Comment,
    Text,
    Word,
    Number,
    Sign,
}

/// Signs of more than one character, the longest first.
const SIGNS: [&str; 24] = [
    "**=", "//=", ">>=", "<<=", "...", "**", "//", ">>", "<<", "<=", ">=", "==", "!=", "->", "+=", "-=", "*=", "/=",
    "%=", "&=", "|=", "^=", ":=", "@=",
];
/// What a token becomes in a program that is a little wrong.
const CHANGES: [(&str, &str); 32] = [
    ("<", "<="),
    ("<=", "<"),
    (">", ">="),
    (">=", ">"),
    ("==", "!="),
    ("!=", "=="),
    ("+", "-"),
    ("-", "+"),
    ("*", "+"),
    ("/", "*"),
    ("//", "/"),
    ("%", "//"),
    ("**", "*"),
    ("&", "|"),
    ("|", "&"),
    ("^", "&"),
    ("<<", ">>"),
    (">>", "<<"),
    ("+=", "-="),
    ("-=", "+="),
    ("*=", "+="),
    ("and", "or"),
    ("or", "and"),
    ("if", "if not"),
    ("elif", "elif not"),
    ("while", "while not"),
    ("True", "False"),
    ("False", "True"),
    ("min", "max"),
    ("max", "min"),
    ("any", "all"),
    ("all", "any"),
];

/// All programs that differ from this one in a token: a comparison, an operator, a condition, a number one higher or
/// lower; or by two names around a comma that have changed places.
pub(crate) fn mutants(program: &str) -> Vec<String> {
    let tokens = tokens(program);
    let mut changes = Vec::new();
    for (kind, range) in &tokens {
        let token = &program[range.clone()];
        let changed = match kind {
            Kind::Sign | Kind::Word => {
                CHANGES.iter().filter(|(from, _)| *from == token).map(|(_, to)| (*to).to_owned()).collect()
            }
            Kind::Number => token.parse().map(neighbours).unwrap_or_default(),
            _ => Vec::new(),
        };
        changes.extend(changed.into_iter().map(|token| (range.clone(), token)));
    }
    let written: Vec<&(Kind, Range<usize>)> = tokens.iter().filter(|(kind, _)| *kind != Kind::Space).collect();
    for names in written.windows(3) {
        let [first, comma, second] = [0, 1, 2].map(|i| &program[names[i].1.clone()]);
        if names[0].0 == Kind::Word && comma == "," && names[2].0 == Kind::Word && first != second {
            changes.push((names[0].1.start..names[2].1.end, format!("{second}, {first}")));
        }
    }
    let put = |(at, token): (Range<usize>, String)| format!("{}{token}{}", &program[..at.start], &program[at.end..]);
    changes.into_iter().map(put).collect()
}

fn neighbours(number: u32) -> Vec<String> {
    [number.checked_add(1), number.checked_sub(1)].iter().flatten().map(u32::to_string).collect()
}

/// A program without comments and docstrings, and the docstrings.
pub(super) fn without_comments(program: &str) -> (String, Vec<String>) {
    let tokens = tokens(program);
    let (mut kept, mut docstrings) = (String::new(), Vec::new());
    // Brackets that are open; whether a statement may begin here.
    let (mut depth, mut begins) = (0usize, true);
    for (i, (kind, range)) in tokens.iter().enumerate() {
        let token = &program[range.clone()];
        match kind {
            Kind::Comment => continue,
            Kind::Text if begins && depth == 0 => {
                let after = tokens[i + 1..].iter().find(|(kind, _)| !matches!(kind, Kind::Space | Kind::Comment));
                if after.is_none_or(|(kind, _)| *kind == Kind::LineEnd) {
                    docstrings.push(token.to_owned());
                    continue;
                }
            }
            Kind::Sign if ["(", "[", "{"].contains(&token) => depth += 1,
            Kind::Sign if [")", "]", "}"].contains(&token) => depth = depth.saturating_sub(1),
            _ => {}
        }
        begins = *kind == Kind::LineEnd || begins && *kind == Kind::Space;
        kept.push_str(token);
    }
    let mut lines: Vec<&str> = Vec::new();
    for line in kept.lines().map(str::trim_end) {
        if !line.is_empty() || lines.last().is_some_and(|last| !last.is_empty()) {
            lines.push(line);
        }
    }
    (lines.join("\n").trim_end().to_owned() + "\n", docstrings)
}

/// All of a program, cut into tokens.
fn tokens(program: &str) -> Vec<(Kind, Range<usize>)> {
    let mut tokens = Vec::new();
    let mut start = 0;
    while let Some(first) = program[start..].chars().next() {
        let rest = &program[start..];
        let run = |of: fn(char) -> bool| rest.find(|c| !of(c)).unwrap_or(rest.len());
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let (kind, len) = match first {
            '\n' => (Kind::LineEnd, 1),
            '#' => (Kind::Comment, run(|c| c != '\n')),
            '"' | '\'' => (Kind::Text, text_len(rest, first)),
            '0'..='9' => (Kind::Number, run(|c| c.is_alphanumeric() || c == '_' || c == '.')),
            _ if first.is_whitespace() => (Kind::Space, run(|c| c.is_whitespace() && c != '\n')),
            _ if word(first) => (Kind::Word, run(|c| c.is_alphanumeric() || c == '_')),
            _ => {
                let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign));
                (Kind::Sign, sign.map_or(first.len_utf8(), |sign| sign.len()))
            }
        };
        tokens.push((kind, start..start + len));
        start += len;
    }
    tokens
}

/// Bytes of a string, its quotes included; one that does not end goes to the end of the line, or of the program.
fn text_len(rest: &str, quote: char) -> usize {
    let triple = quote.to_string().repeat(3);
    let long = rest.starts_with(&triple);
    let close = if long { &triple[..] } else { &triple[..1] };
    let mut position = close.len();
    while let Some(c) = rest[position..].chars().next() {
        if rest[position..].starts_with(close) {
            return position + close.len();
        }
        if c == '\n' && !long {
            return position;
        }
        position += c.len_utf8();
        // Whatever stands behind a backslash ends nothing.
        if c == '\\' {
            position += rest[position..].chars().next().map_or(0, char::len_utf8);
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mutant_differs_in_one_token() {
        let program = "def f(a):  # a + b, c\n    return a+1 if a <= 'x<y' else \"\"\"a\n-\"\"\"\n";
        let expected = [
            program.replace("a+1", "a-1"),
            program.replace("a+1", "a+2"),
            program.replace("a+1", "a+0"),
            program.replace("if", "if not"),
            program.replace("a <= ", "a < "),
        ];
        assert_eq!(mutants(program), expected);
        assert_eq!(mutants("x **= 2.5; y = a2 and 0x10\n"), ["x **= 2.5; y = a2 or 0x10\n"]);
        assert_eq!(mutants("f(a , b,c(d))\n"), ["f(b, a,c(d))\n", "f(a , c, b(d))\n"]);
        for broken in ["'", "'''a", "\"\\", "é + ", "", "\\"] {
            mutants(broken);
        }
    }

    #[test]
    fn comments_go_and_strings_stay() {
        let program = "\"\"\"About.\"\"\"\ndef f():\n    '''Doc'''  # why\n    x = ('a'\n         'b')  # no\n\n\n    return \
                       \"# c\"\n\n\n\"\"\"\nMore\n\"\"\"\n";
        let (kept, docstrings) = without_comments(program);
        assert_eq!(kept, "def f():\n\n    x = ('a'\n         'b')\n\n    return \"# c\"\n");
        assert_eq!(docstrings, ["\"\"\"About.\"\"\"", "'''Doc'''", "\"\"\"\nMore\n\"\"\""]);
    }
}
