//! Every input of the corpus, those that have found a bug among them, without a fuzzer.

use std::io::Write;
use std::path::Path;

use plumb_fuzz::{TARGETS, run, start};

/// One test for all: the bound on memory is that of the process.
#[test]
fn every_input_of_the_corpus_is_taken_within_its_bounds() {
    start();
    for target in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        let mut inputs: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{} is empty", folder.display());
        for input in inputs {
            // An input that ends the process takes the test's own output with it.
            let _ = writeln!(std::io::stderr(), "{}", input.display());
            run(target, &std::fs::read(&input).unwrap());
        }
    }
}
