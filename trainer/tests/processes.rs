//! Runs in shards, and by several processes: the same recipe comes to the same bits.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with 45 pairs to learn from and 7 to measure on.
struct Work(TempDir);

impl Work {
    fn new() -> Self {
        let work = Self(tempfile::tempdir().unwrap());
        let pair = |i: usize| {
            let words = "a few more words than the others ".repeat(i % 4);
            let side = |answer: &str| format!("\n\nHuman: Is {i} {words}odd?\n\nAssistant: {answer}, I think.");
            json!({"chosen": side("Yes"), "rejected": side("No")}).to_string()
        };
        let lines = |range: std::ops::Range<usize>| range.map(pair).collect::<Vec<_>>().join("\n");
        fs::write(work.path("train.jsonl"), lines(0..45)).unwrap();
        fs::write(work.path("dev.jsonl"), lines(45..52)).unwrap();
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program and its arguments; where an option is given again, the last one counts.
    fn arguments(&self, output: &str, options: &[&str]) -> Vec<String> {
        let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama-lm-sharded");
        let [init, train, dev, output] = [init, self.path("train.jsonl"), self.path("dev.jsonl"), self.path(output)]
            .map(|path| path.to_str().unwrap().to_owned());
        let defaults = [
            ("--objective", "preference"),
            ("--init", &init),
            ("--train", &train),
            ("--dev", &dev),
            ("--output", &output),
            ("--dtype", "f32"),
            ("--lr", "3e-3"),
            // The last of five steps has five pairs.
            ("--batch", "10"),
            ("--micro-batch-tokens", "200"),
            ("--save-every", "1"),
            ("--evaluate-every", "2"),
        ];
        let given = |name: &str| options.contains(&name);
        let defaults = defaults.iter().filter(|(name, _)| !given(name)).flat_map(|(name, value)| [*name, *value]);
        [env!("CARGO_BIN_EXE_plumb-train"), "run"]
            .into_iter()
            .chain(defaults)
            .chain(options.iter().copied())
            .map(str::to_owned)
            .collect()
    }

    fn run(&self, output: &str, options: &[&str]) {
        let arguments = self.arguments(output, options);
        succeeded(&Command::new(&arguments[0]).args(&arguments[1..]).output().unwrap());
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("checkpoint/model.safetensors")).unwrap()
    }

    /// Without times.
    fn metrics(&self, output: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        let line = |line: &str| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            value.as_object_mut().unwrap().remove("seconds").unwrap();
            value
        };
        text.lines().map(line).collect()
    }
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn failed(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.stdout.is_empty(), "{error}");
    error
}

#[test]
fn shards_sum_up_to_the_whole_batch() {
    let work = Work::new();
    work.run("whole", &[]);
    let whole = work.metrics("whole");
    // Five steps, and the dev data after the second, the fourth and the last.
    assert_eq!(whole.len(), 8);
    for shards in ["1", "3", "10"] {
        work.run(shards, &["--shards", shards]);
        for (ours, whole) in work.metrics(shards).iter().zip(&whole) {
            for (key, value) in whole.as_object().unwrap() {
                match (ours[key].as_f64(), value.as_f64()) {
                    // What rounding differs by, AdamW makes larger.
                    (Some(ours), Some(value)) => {
                        assert!((ours - value).abs() <= 2e-3 * value.abs(), "{key}: {ours} {value}");
                    }
                    _ => assert_eq!(ours[key], *value),
                }
            }
        }
        let first = |output: &str| work.metrics(output)[0]["gradient_norm"].as_f64().unwrap();
        assert!((first(shards) - first("whole")).abs() < 1e-6 * first("whole"), "{shards} shards");
    }
    assert!(work.weights("1") == work.weights("whole"));

    let arguments = work.arguments("none", &["--shards", "11"]);
    let output = Command::new(&arguments[0]).args(&arguments[1..]).output().unwrap();
    assert!(failed(&output).contains("shards is 11; it has to be from 1 to the batch, 10"));
}

#[cfg(not(feature = "mpi"))]
#[test]
fn processes_that_cannot_be_several_do_not_train_beside_each_other() {
    let work = Work::new();
    let arguments = work.arguments("run", &[]);
    let output = Command::new(&arguments[0]).args(&arguments[1..]).env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    assert!(failed(&output).contains("2 processes were started, but this plumb-train can only be one"));
    assert!(!work.path("run").exists());
}

#[cfg(feature = "mpi")]
mod several {
    use super::*;

    /// `mpirun` with a process for each list of arguments, on any number of cores.
    fn mpirun(processes: &[Vec<String>]) -> Output {
        let mut command = Command::new("mpirun");
        // Open MPI 4 and 5; containers are often root's.
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
        command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
        for (i, arguments) in processes.iter().enumerate() {
            command.args([":"].iter().take(i.min(1))).args(["-n", "1"]).args(arguments);
        }
        command.output().unwrap()
    }

    #[test]
    fn any_number_of_processes_comes_to_the_same_bits() {
        let work = Work::new();
        // Its gradient is exchanged in several pieces.
        let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/models/lm");
        let options = ["--shards", "4", "--init", init.to_str().unwrap()];
        work.run("one", &options);
        let check = |output: &str, processes: usize| {
            let answer = mpirun(&vec![work.arguments(output, &options); processes]);
            succeeded(&answer);
            assert_eq!(String::from_utf8_lossy(&answer.stdout).matches("steps ").count(), 1);
            assert_eq!(work.metrics("one"), work.metrics(output), "{processes} processes");
            assert!(work.weights("one") == work.weights(output), "{processes} processes");
        };
        check("single", 1);
        check("two", 2);
        check("four", 4);
        // What one process began, two go on with.
        fs::create_dir_all(work.path("broken/states")).unwrap();
        for name in ["recipe.toml", "metrics.jsonl", "states/step-00000004.safetensors"] {
            fs::copy(work.path("one").join(name), work.path("broken").join(name)).unwrap();
        }
        check("broken", 2);
    }

    #[test]
    fn an_error_of_one_process_ends_all_and_is_told_once() {
        let work = Work::new();
        let check = |processes: &[Vec<String>], message: &str| {
            let error = failed(&mpirun(processes));
            assert_eq!(error.matches(message).count(), 1, "{message}: {error}");
            assert!(!work.path("run/checkpoint").exists());
        };
        let run = |options: &[&str]| work.arguments("run", &[&["--shards", "2"], options].concat());
        check(&vec![work.arguments("run", &["--shards", "3"]); 2], "2 processes cannot share 3 shards");
        check(&vec![run(&["--beta1", "1"]); 2], "beta1");
        check(&[run(&[]), run(&["--seed", "1"])], "process 1 has other options than process 0");
        assert!(!work.path("run").exists());

        // Machines whose folders differ, as far as one machine can show it.
        let elsewhere = work.path("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let place = |folder: &Path, arguments: &[String]| {
            [&["-wdir".to_owned(), folder.to_str().unwrap().to_owned()], arguments].concat()
        };
        let relative = run(&["--train", "train.jsonl"]);
        let apart = [place(work.0.path(), &relative), place(&elsewhere, &relative)];
        check(&apart, "process 1 on ");
        fs::write(elsewhere.join("train.jsonl"), fs::read(work.path("dev.jsonl")).unwrap()).unwrap();
        check(&apart, "process 1 has other training data than process 0");

        work.run("states", &["--shards", "2"]);
        let relative = run(&["--output", "states"]);
        let apart = [place(work.0.path(), &relative), place(&elsewhere, &relative)];
        check(&apart, "process 1 has other states to go on from than process 0: the output folder has to be one that");

        // Both find the same, and the first says it.
        check(
            &vec![work.arguments("nan", &["--shards", "2", "--lr", "1e30", "--clip", "0"]); 2],
            "gradient norm is NaN",
        );
        assert!(work.path("nan/bad-batch-2.jsonl").exists());

        // A folder that is in the way is noticed by the first process alone, while the other waits for it.
        fs::create_dir_all(work.path("blocked/states/step-00000001.unfinished")).unwrap();
        check(&vec![work.arguments("blocked", &["--shards", "2"]); 2], "blocked/states/step-00000001.unfinished");
    }
}
