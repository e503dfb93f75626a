//! The command line of the real binary: precedence, exit codes, secrets.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::io::Write as _;
use std::process::{Command, Output};

/// Runs the binary with nothing in its environment but `env`.
fn run(arguments: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plumb-server"))
        .args(arguments)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn file(content: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

/// Value and origin of an option in the output of `--print-config`.
fn printed(output: &Output, option: &str) -> (String, String) {
    let text = text(&output.stdout);
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(option)).unwrap();
    let (value, origin) = line.strip_prefix(option).unwrap().split_once('#').unwrap();
    (value.trim().to_owned(), origin.trim().to_owned())
}

#[test]
fn flag_before_environment_before_file_before_default() {
    let file = file("max-batch-tokens = 3\nport = 3\njson-output = true\n");
    let path = file.path().to_str().unwrap();
    let check = |flags: &[&str], env: &[(&str, &str)], option: &str, value: &str, origin: &str| {
        let arguments = [flags, &["--print-config"]].concat();
        let output = run(&arguments, env);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(printed(&output, option), (value.to_owned(), origin.to_owned()), "{flags:?} {env:?}");
    };
    let from_file = [("PLUMB_CONFIG", path)];
    let from_both = [("PLUMB_CONFIG", path), ("PLUMB_MAX_BATCH_TOKENS", "2"), ("PLUMB_JSON_OUTPUT", "false")];
    let option = "max-batch-tokens";
    check(&[], &[], option, "4096", "default");
    check(&[], &from_file, option, "3", "file");
    check(&["--config", path], &[], option, "3", "file");
    check(&[], &from_both, option, "2", "environment");
    check(&["--max-batch-tokens", "1"], &from_both, option, "1", "flag");
    check(&[], &from_file, "json-output", "true", "file");
    check(&[], &from_both, "json-output", "false", "environment");
    check(&["--json-output"], &from_both, "json-output", "true", "flag");
    check(&["--port", "1"], &from_file, "port", "1", "flag");
    check(&[], &[("RUST_LOG", "plumb=debug")], "log", "plumb=debug", "environment");
    check(&[], &[("PLUMB_MODEL", "a=x,b=y")], "model", "a=x,b=y", "environment");
    check(&[], &[("PLUMB_API_KEY", "hidden")], "api-key", "***", "environment");
}

#[test]
fn a_wrong_configuration_ends_with_64_and_says_what_is_wrong() {
    let check = |arguments: &[&str], env: &[(&str, &str)], message: &str| {
        let output = run(arguments, env);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {stderr}");
        assert!(stderr.contains(message), "{arguments:?}: {stderr}");
    };
    check(&["--no-such-option"], &[], "--no-such-option");
    check(&["--model-id", "x", "--max-batch-tokens", "0"], &[], "--max-batch-tokens");
    check(&["--model-id", "x"], &[("PLUMB_PORT", "tcp://10.0.0.1:80")], "enableServiceLinks");
    check(&["--model-id", "x", "--config", "/nowhere.toml"], &[], "/nowhere.toml");
    check(&["--model-id", "x", "--log", "a=b=c"], &[], "--log");
    let prompt = file("no turns in here");
    let path = prompt.path().to_str().unwrap();
    let ports = ["--port", "0", "--prometheus-port", "0"];
    check(&[&["--model-id", "x", "--hhh-prompt-file", path], &ports[..]].concat(), &[], "an HHH prompt needs");
}

#[test]
fn a_model_that_does_not_load_ends_with_1() {
    let output =
        run(&["--model-id", "/no/such/folder", "--port", "0", "--prometheus-port", "0"], &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("/no/such/folder"), "{}", text(&output.stderr));
}

#[test]
fn help_and_version_go_to_standard_output() {
    let help = run(&["--help"], &[("PLUMB_API_KEY", "hidden")]);
    assert_eq!(help.status.code(), Some(0));
    let help = text(&help.stdout);
    assert!(
        help.contains("Examples:") && help.contains("PLUMB_MAX_BATCH_TOKENS") && !help.contains("hidden"),
        "{help}"
    );
    let version = run(&["--version"], &[]);
    assert_eq!(text(&version.stdout).trim(), concat!("plumb-server ", env!("CARGO_PKG_VERSION")));
}
