//! Chat templates that mean harm, rendered apart.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use plumb_model::Error;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::text::{
    HhhPrompts, Message, RenderMode, RenderOptions, TextConfig, TextInput, TextPipeline, render_templates_apart,
};

const GOOD: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}";

fn main() {
    render_templates_apart();
    let trials = vec![
        Trial::test("time_is_bounded", time_is_bounded),
        Trial::test("time_is_bounded_where_its_signal_is_blocked", time_is_bounded_where_its_signal_is_blocked),
        Trial::test("memory_is_bounded", memory_is_bounded),
        Trial::test("what_one_rendering_leaves_is_not_there_for_the_next", what_one_rendering_leaves),
        Trial::test("a_deep_value_is_taken_apart_elsewhere", a_deep_value_is_taken_apart_elsewhere),
        Trial::test("a_process_that_was_ended_is_replaced", a_process_that_was_ended_is_replaced),
        Trial::test("callers_share_a_few_processes", callers_share_a_few_processes),
        Trial::test("what_does_not_parse_is_refused", what_does_not_parse_is_refused),
    ];
    // One at a time: they count processes.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn pipeline(template: &str) -> Result<TextPipeline, Error> {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/llama-lm").to_owned();
    let Checkpoint { config, tokenizer, special, .. } = Checkpoint::open(&Source { model, ..Source::default() })?;
    TextPipeline::new(TextConfig {
        tokenizer,
        chat_template: Some(template.to_owned()),
        special,
        vocab_size: config.vocab_size,
        max_tokens: 1 << 20,
        hhh: Arc::new(HhhPrompts::default()),
    })
}

fn render(pipeline: &TextPipeline, content: &str) -> Result<String, Error> {
    let conversation = TextInput::Conversation(vec![Message::new("user", content)]);
    Ok(pipeline.render(&conversation, &RenderOptions::default(), RenderMode::Score)?.text)
}

/// A template that is good for the content `ok` alone is refused for another, or, if its harm needs no content, at all.
fn check(body: &str, reason: &str) -> Result<(), Failed> {
    let template = format!("{{% if messages[0].content == 'ok' %}}fine{{% else %}}{body}{{% endif %}}");
    let error = match pipeline(&template) {
        Ok(pipeline) => {
            let error = render(&pipeline, "hello").unwrap_err();
            assert!(matches!(error, Error::InvalidInput(_)), "{body}: {error:?}");
            assert_eq!(render(&pipeline, "ok")?, "fine", "{body}");
            error
        }
        Err(error) => {
            assert!(matches!(error, Error::Unsupported(_)), "{body}: {error:?}");
            error
        }
    };
    assert!(error.to_string().contains(reason), "{body}: {error}");
    assert!(children().is_empty(), "{body}");
    Ok(())
}

/// Processes that this one has started.
fn children() -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let of = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
    let lists: Vec<String> = tasks.map(|task| of(task.unwrap())).collect();
    lists.iter().flat_map(|list| list.split_whitespace()).map(|id| id.parse().unwrap()).collect()
}

/// Few steps, each of them long: lists that are compared and written out as if they were trees.
fn time_is_bounded() -> Result<(), Failed> {
    let set = "{% set n = namespace(x=[0]) %}";
    let doubled = format!("{set}{}", "{% set n.x = n.x + n.x %}".repeat(40));
    let nested = format!("{set}{}", "{% set n.x = [n.x, n.x] %}".repeat(60));
    let twice = format!("{nested}{{% set other = n.x %}}{nested}");
    for body in [
        "{{ ([0] * 100000000) ~ bos_token }}".to_owned(),
        "{{ ([messages] * 100000000) | string }}".to_owned(),
        "{{ ([0] * 99999999) == ([0] * 99999999) }}".to_owned(),
        format!("{doubled}{{{{ n.x ~ '' }}}}"),
        format!("{nested}{{{{ n.x | pprint }}}}"),
        format!("{nested}{{{{ raise_exception(n.x) }}}}"),
        format!("{twice}{{{{ n.x == other }}}}"),
        format!("{twice}{{{{ n.x in [other] }}}}"),
    ] {
        check(&body, "the chat template takes more")?;
    }
    Ok(())
}

/// Masks are inherited, by this program and by its processes.
fn time_is_bounded_where_its_signal_is_blocked() -> Result<(), Failed> {
    let mut again = std::process::Command::new("env");
    again.arg("--block-signal=ALRM").arg(std::env::current_exe()?).args(["--exact", "time_is_bounded"]);
    let output = again.output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
    Ok(())
}

/// Values that hold one another in a circle are never freed.
fn what_one_rendering_leaves() -> Result<(), Failed> {
    let pipeline = pipeline(
        "{% set n = namespace() %}{% set n.own = n %}{% set n.text = 'x' * 2000000 %}{{ messages[0].content }}",
    )?;
    for i in 0..200 {
        assert_eq!(render(&pipeline, &i.to_string())?, i.to_string());
    }
    Ok(())
}

fn memory_is_bounded() -> Result<(), Failed> {
    let _pipeline = pipeline(GOOD)?;
    let [process] = children()[..] else { return Err("a template is parsed by one process".into()) };
    let limits = fs::read_to_string(format!("/proc/{process}/limits"))?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max address space"));
    let bytes: u64 = limit.and_then(|line| line.split_whitespace().next()).unwrap().parse()?;
    assert!(bytes < 1 << 30, "{bytes}");
    Ok(())
}

fn a_deep_value_is_taken_apart_elsewhere() -> Result<(), Failed> {
    let deep = |times: &str| format!("{{% for i in range({times}) %}}{{% set n.x = [n.x] %}}{{% endfor %}}");
    let set = "{% set n = namespace(x=[]) %}";
    let pipeline = pipeline(&format!("{set}{}ok", deep("5000")))?;
    assert_eq!(render(&pipeline, "hello")?, "ok");
    drop(pipeline);
    check(&format!("{set}{{% for j in range(9999) %}}{}{{% endfor %}}", deep("9999")), "too many steps")
}

fn a_process_that_was_ended_is_replaced() -> Result<(), Failed> {
    let pipeline = pipeline(GOOD)?;
    let [first] = children()[..] else { return Err("a template is parsed by one process".into()) };
    for signal in ["-TERM", "-INT", "-KILL"] {
        assert!(std::process::Command::new("kill").args([signal, &first.to_string()]).status()?.success());
        assert_eq!(render(&pipeline, " hello ")?, "[user] hello\n");
        let [now] = children()[..] else { return Err("there is one process".into()) };
        assert_eq!(now == first, signal != "-KILL", "{signal}");
    }
    Ok(())
}

fn callers_share_a_few_processes() -> Result<(), Failed> {
    let pipeline = pipeline(GOOD)?;
    std::thread::scope(|scope| {
        for caller in 0..16 {
            let pipeline = &pipeline;
            scope.spawn(move || {
                for i in 0..100 {
                    let content = format!("{caller} {i}").repeat(if i == 50 { 100_000 } else { 1 });
                    assert_eq!(render(pipeline, &content).unwrap(), format!("[user] {content}\n"));
                }
            });
        }
    });
    assert!((1..=4).contains(&children().len()), "{:?}", children());
    drop(pipeline);
    assert!(children().is_empty());
    Ok(())
}

fn what_does_not_parse_is_refused() -> Result<(), Failed> {
    let Err(Error::Unsupported(reason)) = pipeline("\n{% for %}") else { return Err("it parses".into()) };
    assert!(reason.contains("does not parse, line 2"), "{reason}");
    assert!(children().is_empty());
    Ok(())
}
