//! The experiments behind `RELIABILITY.md`, in small: that they run to their end, and that what they count is right.

use std::process::Command;

use plumb_tests::binary;

fn check(experiment: &str) {
    let server = binary("plumb-server");
    let folder = server.parent().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_reliability"));
    command.arg(experiment).args(["--quick", "--threads", "1"]);
    // The server of this build has faults on demand.
    command.arg("--binaries").arg(folder).arg("--faulty-binaries").arg(folder);
    command.env_remove("PLUMB_MODELS").env_remove("PLUMB_DATA");
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(output.status.success(), "{said}");
    // As in a run of full length, there is something that was judged.
    assert!(said.contains("│ yes"), "{said}");
}

#[test]
fn versions_are_swapped_under_load() {
    check("swaps");
}

#[test]
fn loads_fail_under_load() {
    check("failed-loads");
}

#[test]
fn publishing_is_killed() {
    check("publish-kill");
}

#[test]
fn more_is_offered_than_can_be_done() {
    check("overload");
}

#[test]
fn the_server_is_told_to_stop_under_load() {
    check("drain");
}

#[test]
fn every_batch_is_poisoned() {
    check("poison");
}

#[test]
fn a_replica_is_killed_under_load() {
    if Command::new("haproxy").arg("-v").output().is_err() {
        println!("skipped: haproxy is not installed");
        return;
    }
    check("replicas");
}

#[test]
fn the_server_is_killed_under_load() {
    check("server-kill");
}

#[test]
fn all_of_it_happens_at_once() {
    check("soak");
}
