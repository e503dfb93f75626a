//! Programs in Python: grpcio, which learns the API by reflection, and the tests of the package in `client/python`.

use std::path::Path;
use std::process::{Command, Output};

use plumb_tests::fixture::fixture;
use plumb_tests::{Launch, binary};

/// A Python that has these modules, or `None` with a line that says so.
fn python(modules: &str) -> Option<Command> {
    let python = std::env::var("PLUMB_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(Command::new(python));
    }
    println!("skipped: {python} has not all of {modules}; PLUMB_PYTHON names another");
    None
}

/// Runs a command and answers its status and what it said.
async fn run(mut command: Command) -> (bool, String) {
    let Output { status, stdout, stderr } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (status.success(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_learns_the_api_by_reflection() {
    let Some(mut command) = python("grpc, grpc_reflection.v1alpha") else { return };
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let script = fixture("").parent().unwrap().join("python/check_reflection.py");
    command.arg(script).arg(server.address().to_string());
    let (success, said) = run(command).await;
    assert!(success && said.contains("all calls answered"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_package_passes_its_tests() {
    let Some(mut command) = python("grpc, pytest") else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/python");
    let binaries = tokio::task::spawn_blocking(|| binary("plumb-server")).await.unwrap();
    command
        // Nor does it leave files behind.
        .args(["-B", "-m", "pytest", "-rs", "-p", "no:cacheprovider"])
        .current_dir(folder)
        .env("PLUMB_TEST_BINARIES", binaries.parent().unwrap());
    let (success, said) = run(command).await;
    assert!(success, "{said}");
    for line in said.lines().filter(|line| line.starts_with("SKIPPED")) {
        println!("{line}");
    }
}
