//! Programs that nobody has read can compute, and nothing else.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::path::Path;

use plumb_trainer::sandbox::{Limits, Outcome, Sandbox};

/// Where there is Python, and a kernel that confines it; else says why not.
fn sandbox() -> Option<Sandbox> {
    let limits = Limits { cpu_seconds: 1, memory_mib: 256 };
    match Sandbox::new(env!("CARGO_BIN_EXE_plumb-train").into(), Path::new("python3"), limits, false) {
        Ok(sandbox) => Some(sandbox),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

#[track_caller]
fn check(sandbox: &Sandbox, program: &str, tests: &str, expected: &str) {
    let outcome = sandbox.run(program, tests).unwrap().to_string();
    assert!(outcome.starts_with(expected), "{program}\n{tests}\n{outcome}");
}

#[test]
fn right_programs_pass_and_wrong_ones_fail() {
    let Some(sandbox) = sandbox() else { return };
    let add = "def add(a, b):\n    return a + b\n";
    check(&sandbox, add, "assert add(1, 2) == 3\n", "passed");
    check(&sandbox, add, "assert add(1, 2) == 4\n", "failed: AssertionError");
    check(&sandbox, "def add(a, b:\n", "", "failed: SyntaxError");
    check(&sandbox, "x = 'é'\nprint(x)", "assert x == '\\u00e9' and __name__ == 'program'", "passed");
    check(&sandbox, "if __name__ == '__main__':\n    exit(1)", "", "passed");
    let uses = "import collections, dataclasses, datetime, functools, heapq, itertools, math, random, re, string, threading, typing\n\
                @dataclasses.dataclass\nclass P:\n    x: 'typing.List[int]'\n\
                t = threading.Thread(target=lambda: None)\nt.start()\nt.join()\n";
    check(&sandbox, uses, "assert P([1]).x == [1]", "passed");
    // The order of a set is the same in every run.
    let order = "assert list({'a', 'b', 'c', 'd', 'e'}) == ";
    let Outcome::Failed(found) = sandbox.run("raise Exception(list({'a', 'b', 'c', 'd', 'e'}))", "").unwrap() else {
        panic!("an exception is no success")
    };
    check(&sandbox, "", &format!("{order}{}", found.strip_prefix("Exception: ").unwrap()), "passed");
}

#[test]
fn an_early_end_is_no_success() {
    let Some(sandbox) = sandbox() else { return };
    for program in ["exit(0)", "import os\nos._exit(0)", "import sys\nsys.stdout.close()\nraise SystemExit"] {
        check(&sandbox, program, "assert False", "failed: ended before its tests did");
    }
    check(&sandbox, "print('passed')", "assert False", "failed: AssertionError");
    check(&sandbox, "import os\nos.abort()", "", "failed: signal 6");
}

#[test]
fn what_takes_too_much_is_ended() {
    let Some(sandbox) = sandbox() else { return };
    check(&sandbox, "while True: pass", "", "timed out");
    let stubborn = "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass";
    check(&sandbox, stubborn, "", "timed out");
    check(&sandbox, "import os\nos.close(1)\nos.close(2)\nimport time\ntime.sleep(1000)", "", "timed out");
    check(&sandbox, "x = bytearray(1 << 30)", "", "out of memory");
    check(&sandbox, "x = []\nwhile True: x.append('x' * 100000)", "", "out of memory");
    check(&sandbox, "while True: print('x' * 1000)", "", "failed: prints without end");
    check(&sandbox, "import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "", "failed: prints without end");
    check(&sandbox, "def f(n): return f(n + 1)\nf(0)", "", "failed: RecursionError");
}

#[test]
fn nothing_outside_is_reached() {
    let Some(sandbox) = sandbox() else { return };
    let folder = tempfile::tempdir().unwrap();
    let [written, read] = ["written", "read"].map(|name| folder.path().join(name));
    std::fs::write(&read, "secret").unwrap();
    let [written, read] = [written, read].map(|path| path.display().to_string());
    for (program, error) in [
        (format!("open('{written}', 'w')"), "PermissionError"),
        (format!("open('{read}')"), "PermissionError"),
        (format!("open('{read}', 'a')"), "PermissionError"),
        (format!("import os\nos.truncate('{read}', 0)"), "OSError: [Errno 38]"),
        (format!("import os\nos.unlink('{read}')"), "OSError: [Errno 38]"),
        (format!("import os\nos.chmod('{read}', 0)"), "OSError: [Errno 38]"),
        (format!("import os\nos.mkdir('{written}')"), "OSError: [Errno 38]"),
        ("open('/etc/passwd')".into(), "PermissionError"),
        ("open('/proc/self/environ')".into(), "PermissionError"),
        ("import os\nos.listdir('/')".into(), "PermissionError"),
        ("import os\nwhile True: os.fork()".into(), "OSError: [Errno 38]"),
        ("import subprocess\nsubprocess.run(['/bin/true'])".into(), ""),
        ("import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])".into(), "PermissionError"),
        ("import socket\nsocket.socket()".into(), "OSError: [Errno 38]"),
        ("import socket\nsocket.socket(socket.AF_UNIX)".into(), "OSError: [Errno 38]"),
        (format!("import os\nos.kill({}, 9)", std::process::id()), "OSError: [Errno 38]"),
        ("import os\nos.setsid()".into(), "OSError: [Errno 38]"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))".into(), "OSError: [Errno 38]"),
        (
            "import os\nassert 'HOME' not in os.environ and 'PATH' not in os.environ\nraise ValueError".into(),
            "ValueError",
        ),
        ("import sys\nassert not sys.stdin.read()\nraise ValueError".into(), "ValueError"),
    ] {
        check(&sandbox, &program, "", &format!("failed: {error}"));
    }
    assert_eq!(std::fs::read_to_string(&read).unwrap(), "secret");
    assert!(!Path::new(&written).exists());
    // Threads are bounded by memory.
    let threads =
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()";
    check(&sandbox, threads, "", "failed: RuntimeError");
}

#[test]
fn an_interpreter_that_is_none_is_said() {
    let limits = Limits { cpu_seconds: 1, memory_mib: 256 };
    let new = |python: &str, memory_mib| {
        let limits = Limits { memory_mib, ..limits };
        Sandbox::new(env!("CARGO_BIN_EXE_plumb-train").into(), Path::new(python), limits, true)
    };
    assert!(new("/nowhere/python", 256).unwrap_err().to_string().contains("/nowhere/python"));
    assert!(new("true", 256).unwrap_err().to_string().contains("no Python 3"));
}
