//! Every input of the corpus, those that have found a bug among them, without a fuzzer.

use std::io::Write;
use std::path::Path;

use libtest_mimic::{Arguments, Failed, Trial};
use plumb_fuzz::{TARGETS, Target, run, start};

fn main() {
    start();
    let trials = TARGETS
        .map(|target| Trial::test(format!("{}_is_taken_within_its_bounds", target.name), move || every_input(target)));
    // One at a time: the bound on memory is that of the process.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn every_input(target: &Target) -> Result<(), Failed> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut inputs: Vec<_> =
        std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    for input in inputs {
        // An input that ends the process takes the test's own output with it.
        let _ = writeln!(std::io::stderr(), "{}", input.display());
        run(target, &std::fs::read(&input)?);
    }
    Ok(())
}
