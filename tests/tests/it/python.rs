//! A client that is none of ours: Python's grpcio, which learns the API by reflection.

use std::process::Command;

use plumb_tests::Launch;
use plumb_tests::fixture::fixture;

/// A Python that has the packages, or `None` with a line that says so.
fn python() -> Option<String> {
    let python = std::env::var("PLUMB_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import grpc, grpc_reflection.v1alpha"]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    println!("skipped: {python} has no grpcio and grpcio-reflection; PLUMB_PYTHON names another");
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_learns_the_api_by_reflection() {
    let Some(python) = python() else { return };
    let server = Launch::of(["llama-pm", "llama-lm"]).start().await;
    let script = fixture("").parent().unwrap().join("python/check_reflection.py");
    let mut command = Command::new(python);
    command.arg(script).arg(server.address().to_string());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success() && said[0].contains("all calls answered"), "{said:?}");
}
