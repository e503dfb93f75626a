//! A checkpoint's chat template, rendered as Transformers' `apply_chat_template` renders it.
//!
//! The environment is that of `transformers/utils/chat_template_utils.py`: `trim_blocks`, `lstrip_blocks`, loop
//! controls, Python's methods on strings and dictionaries, `raise_exception`, `strftime_now`, a `tojson` without HTML
//! escapes, and `{% generation %}` blocks, which only mark text and so are transparent here.
//!
//! A template is code from a checkpoint: its steps, its output and its recursion are counted here, which stops what runs
//! away by mistake. What means harm is stopped by a process's limits, see `renderer`.

use std::borrow::Cow;
use std::fmt;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error as JinjaError, ErrorKind, State, Value};
use sha2::{Digest, Sha256};

use super::Message;
#[cfg(target_os = "linux")]
use super::renderer::Renderers;
use crate::checkpoint::SpecialTokens;
use crate::{Error, Result};

/// Most bytes that a template may write.
pub(super) const MAX_RENDERED_BYTES: usize = 4 << 20;

/// Bytes of a template's source; the longest published ones have some 30,000.
pub(crate) const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Most instructions: some for any conversation, some for every turn, and one for four bytes. A piece of 64 bytes that is
/// written or read counts as one, so a text can be gone over sixteen times. Templates in use take some hundred, and 40
/// for a turn.
const FUEL: u64 = 50_000;
const FUEL_FOR_A_TURN: u64 = 200;
const BYTES_FOR_FUEL: u64 = 4;

/// Nested macros, loops and conditions.
const MAX_RECURSION: usize = 200;

const NAME: &str = "chat_template";

/// A checkpoint's chat template, wherever it is rendered.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    sha256: String,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    /// By who asks.
    Here(Template),
    #[cfg(target_os = "linux")]
    Apart(Renderers),
}

/// Why there is no text.
#[derive(Debug)]
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "nothing is rendered apart"))]
pub(super) enum Failure {
    /// The template's own doing: it fails again.
    Refused(String),
    /// It took too much.
    Exceeded(String),
    /// Not its doing: a process that renders is needed, and is not there.
    Lost(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(reason) => Self::InvalidInput(reason),
            Failure::Exceeded(reason) => Self::InvalidInput(format!("the chat template {reason}")),
            Failure::Lost(reason) => Self::Renderer(reason),
        }
    }
}

impl ChatTemplate {
    /// Parses a template. An error names the line.
    pub(super) fn new(source: &str, special: &SpecialTokens) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let bytes = source.len();
            return Err(Error::Unsupported(format!(
                "a chat template of {bytes} bytes, {MAX_TEMPLATE_BYTES} are allowed"
            )));
        }
        let engine = Engine::new(source, special).map_err(|failure| match Error::from(failure) {
            Error::InvalidInput(reason) => Error::Unsupported(reason),
            lost => lost,
        })?;
        Ok(Self { sha256: hex::encode(Sha256::digest(source)), engine })
    }

    /// sha256 of the template's source in hexadecimal.
    pub(super) fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant's next turn begins.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Failure> {
        match &self.engine {
            Engine::Here(template) => template.render(messages, add_generation_prompt).map_err(Failure::Refused),
            #[cfg(target_os = "linux")]
            Engine::Apart(renderers) => renderers.render(messages, add_generation_prompt),
        }
    }
}

impl Engine {
    fn new(source: &str, special: &SpecialTokens) -> Result<Self, Failure> {
        #[cfg(target_os = "linux")]
        if super::renderer::apart() {
            return Renderers::new(source, special).map(Self::Apart);
        }
        Template::parse(source, special).map(Self::Here).map_err(Failure::Refused)
    }
}

/// A parsed chat template. Errors are sentences.
#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Parses a template. An error names the line.
    pub(super) fn parse(source: &str, special: &SpecialTokens) -> Result<Self, String> {
        let environment = environment(source, special).map_err(|error| {
            let line = error.line().map_or_else(String::new, |line| format!(", line {line}"));
            format!("the chat template does not parse{line}: {}", describe(&error))
        })?;
        Ok(Self { environment })
    }

    /// The text of a conversation.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let fuel = FUEL + FUEL_FOR_A_TURN * messages.len() as u64 + bytes as u64 / BYTES_FOR_FUEL;
        render(&self.environment, values(messages), add_generation_prompt, fuel).map_err(|error| refusal(&error))
    }
}

fn values(messages: &[Message]) -> Value {
    let message =
        |message: &Message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]);
    messages.iter().map(message).collect()
}

fn render(
    environment: &Environment<'static>,
    messages: Value,
    add_generation_prompt: bool,
    fuel: u64,
) -> Result<String, JinjaError> {
    let context = Value::from_pairs([
        ("messages", messages),
        ("tools", Value::from(())),
        ("documents", Value::from(())),
        ("add_generation_prompt", Value::from(add_generation_prompt)),
    ]);
    // Cheap: what is parsed is shared.
    let mut environment = environment.clone();
    environment.set_fuel(Some(fuel));
    let mut output = Bounded(Vec::new());
    environment.get_template(NAME)?.render_captured_to(context, &mut output)?;
    String::from_utf8(output.0).map_err(|_| JinjaError::new(ErrorKind::InvalidOperation, "it wrote no UTF-8"))
}

fn environment(source: &str, special: &SpecialTokens) -> Result<Environment<'static>, JinjaError> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", super::json::tojson);
    // What a tokenizer does not have is undefined, as in Transformers.
    let strings = [
        ("bos_token", &special.bos),
        ("eos_token", &special.eos),
        ("pad_token", &special.pad),
        ("unk_token", &special.unk),
    ];
    for (name, string) in strings {
        if let Some(string) = string {
            environment.add_global(name, string.as_str());
        }
    }
    environment.add_template_owned(NAME, transparent_generation(source).into_owned())?;
    Ok(environment)
}

/// Python's methods on strings, lists and dictionaries.
fn python_method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, JinjaError> {
    if let Some(text) = value.as_str() {
        state.consume_fuel(work(text, name, args) as u64)?;
    }
    match (name, value.as_str(), args) {
        // The general one knows only letters after whitespace, `(` and the like: `</think>` would stay as it is.
        ("title", Some(text), []) => Ok(Value::from(title(text))),
        ("format", Some(text), _) if has_large_number(text) => {
            Err(JinjaError::new(ErrorKind::InvalidOperation, "format: a width or precision is too large"))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Fuel for what a method of a text does beyond its result, for which the engine charges.
fn work(text: &str, name: &str, args: &[Value]) -> usize {
    let read = text.len() / 64;
    let pieces = match (name, args.first().and_then(Value::as_str)) {
        ("split" | "rsplit", Some("")) => 0,
        ("split" | "rsplit", Some(separator)) => text.matches(separator).count(),
        ("split" | "rsplit", None) => text.split_whitespace().count(),
        ("splitlines", _) => text.bytes().filter(|byte| *byte == b'\n').count(),
        // Characters one by one.
        ("title", _) => text.len() / 8,
        _ => 0,
    };
    read + pieces
}

/// Whether a format asks for more than 9999 of something.
fn has_large_number(format: &str) -> bool {
    format.split(|character: char| !character.is_ascii_digit()).any(|digits| digits.len() > 4)
}

/// Python's `str.title`: a letter after anything but a letter becomes a capital, all others become small.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for character in text.chars() {
        if inside {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        inside = character.is_lowercase() || character.is_uppercase();
    }
    out
}

/// Turns `{% generation %}` and `{% endgeneration %}` into a `with` block without variables: a scope that writes its
/// content, with the same whitespace around it and the same lines.
fn transparent_generation(source: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut done = 0;
    for (start, _) in source.match_indices("{%") {
        let inside = &source[start + 2..];
        let Some(length) = inside.find("%}") else { break };
        let name = inside[..length].trim_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        let Some(at) = inside.find(name) else { continue };
        out.push_str(&source[done..start + 2 + at]);
        out.push_str(replacement);
        done = start + 2 + at + name.len();
    }
    if done == 0 {
        return Cow::Borrowed(source);
    }
    out.push_str(&source[done..]);
    Cow::Owned(out)
}

/// What a template said with `raise_exception`: the only part of an error that is meant for the client.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, JinjaError> {
    let error = JinjaError::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Raised(message.to_string())))
}

/// The time of rendering, in UTC.
fn strftime_now(state: &State<'_, '_>, format: &str) -> Result<String, JinjaError> {
    state.consume_fuel(format.len() as u64)?;
    let invalid =
        |error: &dyn fmt::Display| JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let items = time::format_description::parse_strftime_borrowed(format).map_err(|error| invalid(&error))?;
    time::OffsetDateTime::now_utc().format(&items).map_err(|error| invalid(&error))
}

fn refusal(error: &JinjaError) -> String {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return format!("the chat template refuses the conversation: {message}");
        }
        cause = inner.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => "the chat template needs too many steps for this conversation".to_owned(),
        ErrorKind::WriteFailure => format!("the chat template writes more than {MAX_RENDERED_BYTES} bytes"),
        _ => {
            let line = error.line().map_or_else(String::new, |line| format!(" at line {line}"));
            format!("the chat template fails on this conversation{line}: {}", describe(error))
        }
    }
}

fn describe(error: &JinjaError) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// A writer that refuses to grow over [`MAX_RENDERED_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &serde_json::Value) -> Value {
        match json {
            serde_json::Value::Null => Value::from(()),
            serde_json::Value::Bool(yes) => Value::from(*yes),
            serde_json::Value::Number(number) => match number.as_i64() {
                Some(integer) => Value::from(integer),
                None => Value::from(number.as_f64().unwrap()),
            },
            serde_json::Value::String(text) => Value::from(text.as_str()),
            serde_json::Value::Array(items) => items.iter().map(value).collect(),
            serde_json::Value::Object(fields) => Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), value(v)))),
        }
    }

    fn render_one(source: &str, content: &str) -> Result<String> {
        let special = SpecialTokens { bos: Some("<s>".into()), ..SpecialTokens::default() };
        Ok(ChatTemplate::new(source, &special)?.render(&[Message::new("user", content)], false)?)
    }

    #[track_caller]
    fn check(source: &str, expected: &str) {
        match render_one(source, "Köln & <Bonn>") {
            Ok(text) => assert_eq!(text, expected, "{source}"),
            Err(error) => assert!(error.to_string().contains(expected), "{source}: {error}"),
        }
    }

    #[test]
    fn transformers_renders_the_same() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/templates.json");
        let cases: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut failures = Vec::new();
        for case in &cases {
            let text = |name: &str| case[name].as_str().map(str::to_owned);
            let special = SpecialTokens { bos: text("bos_token"), eos: text("eos_token"), ..SpecialTokens::default() };
            let generate = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = Template::parse(case["template"].as_str().unwrap(), &special).and_then(|template| {
                render(&template.environment, value(&case["messages"]), generate, FUEL).map_err(|error| refusal(&error))
            });
            let right = match (&rendered, text("expected")) {
                (Ok(rendered), Some(expected)) => *rendered == expected,
                // The wording of errors other than raise_exception's is Jinja's own.
                (Err(error), None) => {
                    case["name"] == "error-undefined-attribute" || error.contains(&text("error").unwrap())
                }
                _ => false,
            };
            if !right {
                failures.push(format!("{}\n  got      {rendered:?}\n  expected {:?}", case["name"], text("expected")));
            }
        }
        assert!(cases.len() > 10);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn special_strings_and_missing_values() {
        check("{{ bos_token }}{{ eos_token }}{{ messages[0].content }}", "<s>Köln & <Bonn>");
        check("{{ tools }}|{{ nothing }}|{{ true }}", "None||True");
        check("{% for turn in nothing %}never{% endfor %}", "");
        check("{{ nothing.deeper }}", "at line 1");
        check("{{ 'a</b c'.title() }}", "A</B C");
    }

    #[test]
    fn json_is_python_s() {
        check("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Köln & <Bonn>"}"#);
        check("{{ [1, [], {}] | tojson(indent=1) }}", "[\n 1,\n [],\n {}\n]");
        check("{{ {'b': 1, 'a': none} | tojson(separators=(',', ':'), sort_keys=true) }}", r#"{"a":null,"b":1}"#);
        check("{{ 'ö🙂\\u0001' | tojson(ensure_ascii=true) }}", r#""\u00f6\ud83d\ude42\u0001""#);
        check("{{ nothing | tojson }}", "undefined is no JSON");
    }

    #[test]
    fn exceptions_reach_the_client() {
        check(
            "{% macro m() %}{{ raise_exception('no ' ~ 'way') }}{% endmacro %}{{ m() }}",
            "refuses the conversation: no way",
        );
        check("{{ 1 / 0 }}", "the chat template fails");
    }

    #[test]
    fn dates_are_of_now() {
        let year = render_one("{{ strftime_now('%Y') }}", "").unwrap();
        assert!(year.parse::<u32>().unwrap() >= 2025, "{year}");
        let parts = render_one("{{ strftime_now('%d %b %Y, %-d. %B %H:%M:%S %A') }}", "").unwrap();
        assert_eq!(parts.split(' ').count(), 7, "{parts}");
        check("{{ strftime_now('%') }}", "strftime_now");
    }

    #[test]
    fn generation_blocks_leave_no_trace() {
        for (source, expected) in [
            ("a\n  {% generation %}\nb{%- endgeneration +%}\nc", "a\nb\nc"),
            ("{%generation%}x{%-endgeneration-%} y", "xy"),
            ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ] {
            check(source, expected);
        }
        assert!(matches!(transparent_generation("{% if generation %}{% endif %} {%"), Cow::Borrowed(_)));
    }

    #[test]
    fn work_and_output_are_bounded() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% if a %}{% endif %}{% endfor %}{% endfor %}";
        check(loops, "too many steps");
        let half = "x".repeat(MAX_RENDERED_BYTES / 2);
        let thrice = render_one("{% for a in range(3) %}{{ messages[0].content }}{% endfor %}", &half).unwrap_err();
        assert!(thrice.to_string().contains("writes more than"), "{thrice}");
        check("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
        check(
            "{% set n = namespace(x=[]) %}{% for i in range(400) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}",
            "nested too deeply",
        );
        check("{{ ([0] * 99999999) | tojson }}", "too many steps");
        check("{{ '{:999999999}'.format(1) }}", "too large");
        check("{{ ('\\n' * 9999999).splitlines() | length }}", "too many steps");
        check("{% for i in range(9999) %}{% if ('x' * 99999).title() %}{% endif %}{% endfor %}", "too many steps");
        check("{{ ('%Y' * 999999) | length }}{{ strftime_now('%Y' * 999999) }}", "too many steps");
    }

    #[test]
    fn a_template_that_does_not_parse_is_named_with_its_line() {
        check("\n\n{% for %}", "does not parse, line 3");
        check("{{ x | unknown_filter }}", "unknown_filter");
    }
}
