use std::io::Write as _;

use super::*;

fn parse(arguments: &[&str]) -> Result<Config, ConfigError> {
    Config::parse(["plumb-server"].iter().chain(arguments).copied())
}

fn wrong(arguments: &[&str]) -> String {
    match parse(arguments) {
        Ok(_) => panic!("{arguments:?} is accepted"),
        Err(ConfigError::Wrong(message)) => message,
        Err(ConfigError::Flags(error)) => error.to_string(),
        Err(ConfigError::Printed(_)) => panic!("{arguments:?} prints"),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Value and origin of an option in `--print-config`.
fn origin(arguments: &[&str], option: &str) -> (String, &'static str) {
    let mut arguments = arguments.to_vec();
    arguments.push("--print-config");
    let Err(ConfigError::Printed(origins)) = parse(&arguments) else { panic!("nothing is printed") };
    let found = origins.into_iter().find(|origin| origin.option == option).unwrap();
    (found.value, found.origin)
}

#[test]
fn flags_come_before_the_file_and_the_file_before_defaults() {
    let file =
        file("max-batch-tokens = 100\nmax_queue_tokens = 200\nauto-truncate = true\nmodel = [\"a=x\", \"b=y\"]\n");
    let path = file.path().to_str().unwrap();
    let config = parse(&["--config", path, "--max-batch-tokens", "7"]).unwrap();
    assert_eq!(config.engine.max_batch_tokens, 7);
    assert_eq!(config.limits.max_queue_tokens, Some(200));
    assert_eq!(config.limits.max_client_batch_size, 256);
    assert!(config.limits.auto_truncate);
    assert_eq!(config.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(!parse(&["--config", path, "--auto-truncate=false"]).unwrap().limits.auto_truncate);
    let given = ["--config", path, "--max-batch-tokens", "7"];
    assert_eq!(origin(&given, "max-batch-tokens"), ("7".to_owned(), "flag"));
    assert_eq!(origin(&given, "max-queue-tokens"), ("200".to_owned(), "file"));
    assert_eq!(origin(&given, "max-client-batch-size"), ("256".to_owned(), "default"));
}

#[test]
fn a_wrong_file_is_named_with_what_is_wrong_in_it() {
    let check = |text: &str, message: &str| {
        let file = file(text);
        let path = file.path().to_str().unwrap();
        let error = wrong(&["--model-id", "x", "--config", path]);
        assert!(error.contains(message), "{:.100} gives {error}", text);
    };
    check("max-batch-toknes = 1", "unknown option `max-batch-toknes`");
    check("config = \"other.toml\"", "unknown option `config`");
    check("port = 1\nport = 2", "duplicate key");
    check("max-queue-tokens = 1\nmax_queue_tokens = 2", "is given twice");
    check("[port]\nx = 1", "is not a string, number");
    check("max-batch-tokens = \"many\"", "max-batch-tokens");
    check(&"#".repeat((1 << 20) + 1), "more than 1048576 bytes");
    assert!(wrong(&["--config", "/nowhere/plumb.toml"]).contains("/nowhere/plumb.toml"));
}

#[test]
fn values_out_of_range_are_refused() {
    let check = |arguments: &[&str], message: &str| {
        let error = wrong(&[&["--model-id", "x"], arguments].concat());
        assert!(error.contains(message), "{arguments:?} gives {error}");
    };
    check(&["--max-batch-tokens", "0"], "0 is not in 1..");
    check(&["--port", "65536"], "not a port");
    check(&["--port", "tcp://10.0.0.1:50051"], "enableServiceLinks");
    check(&["--drain-timeout-secs=-1"], "negative");
    check(&["--dtype", "f16"], "possible values: auto, f32, bf16, fp8");
    check(&["--default-max-new-tokens", "9", "--max-new-tokens-limit", "8"], "is above --max-new-tokens-limit 8");
    check(&["--default-language-model", "lm"], "no model has this name");
    check(&["--record-sample", "0"], "not a share above 0");
    check(&["--record-sample", "NaN"], "not a share above 0");
    check(&["--record-max-age-secs", "0.5"], "must be 1 or more");
    check(&["--record-keep", "0"], "0 is not in 1..");
    check(&["--max-request-memory-mib", "127"], "less than two messages of --max-message-bytes 67108864");
    check(&["--api-key", ""], "a key is empty");
    check(&["--api-key-file", file("\n \n").path().to_str().unwrap()], "there is no key in it");
    check(&["--auth-tokens-file", file("").path().to_str().unwrap()], "neither a [[token]] nor a [[certificate]]");
    check(&["--tls-cert", "tls.crt"], "--tls-key");
    check(&["--config", file("tls-key = \"tls.key\"").path().to_str().unwrap()], "--tls-key needs --tls-cert");
    check(&["--tls-client-ca", "ca.crt"], "--tls-cert");
    check(&["--tls-client-auth", "optional"], "--tls-client-ca");
    check(&["--admin-hostname", "0.0.0.0"], "--admin-port");
    check(&["--max-header-bytes", "1"], "1024..");
}

#[test]
fn keys_are_read_from_options_and_files_and_never_printed() {
    let file = file("from-file\n\n");
    let path = file.path().to_str().unwrap();
    let arguments = ["--model-id", "x", "--api-key", "first,second", "--admin-api-key-file", path];
    let config = parse(&arguments).unwrap();
    assert_eq!(config.access.api_keys.iter().map(Secret::reveal).collect::<Vec<_>>(), ["first", "second"]);
    assert_eq!(Table::read(&config.access).unwrap().len(), 3);
    let printed = format!("{config:?}");
    assert!(!printed.contains("first") && !printed.contains("from-file"), "{printed}");
    assert_eq!(origin(&arguments, "api-key"), ("***".to_owned(), "flag"));
}

#[test]
fn every_option_has_an_environment_variable() {
    for argument in Flags::command().get_arguments() {
        let id = argument.get_id().as_str();
        let variable = argument.get_env().map(|name| name.to_string_lossy().into_owned());
        let expected = match id {
            "help" | "version" | "print_config" => None,
            "log" => Some("RUST_LOG".to_owned()),
            _ => Some(format!("PLUMB_{}", id.to_uppercase())),
        };
        assert_eq!(variable, expected, "{id}");
    }
}

#[test]
fn the_command_line_is_consistent() {
    Flags::command().debug_assert();
}
