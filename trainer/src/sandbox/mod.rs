//! Programs that nobody has read, run to see whether they pass their tests.
//!
//! A program is Python that a model wrote. It runs in a process of its own, which begins as this program, takes every
//! right from itself ([`Confinement`]) and then becomes Python: it can read the interpreter's own library and compute, and
//! nothing else. It has no files of its own, no network, no other processes, little memory and little time.
//!
//! A program shares its interpreter with its tests. What it does by accident, such as ending early, does not pass; one
//! that is written to deceive the tests it is judged by can still find out how.

mod confine;

use std::io::{Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::json;

pub use confine::Confinement;

use crate::{Error, Result};

/// What the confined process says before it becomes Python; what went wrong before is no fault of the program's.
pub(crate) const READY: &[u8] = b"\x01ready\x02";
/// Bytes of output after which a program is ended.
const MAX_OUTPUT: usize = 1 << 20;
/// Bytes of its end that are kept.
const TAIL: usize = 4096;
/// Wall-clock seconds for each second of processor time: a machine may be busy, and a program may sleep.
const PATIENCE: u32 = 4;
/// How long the output of a process that has ended may take.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Runs the program and then its tests, as one module, and says so at the end. What says so is read before the program
/// can change anything.
const DRIVER: &str = r#"
import builtins, json, os, sys, types
builtins.exit = builtins.quit = sys.exit
work, write, stop = json.load(sys.stdin), os.write, os._exit
module = types.ModuleType("program")
sys.modules["program"] = module
for name in ("program", "tests"):
    exec(compile(work[name], name + ".py", "exec"), module.__dict__)
write(1, work["passed"].encode())
stop(0)
"#;

/// What a program may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Processor time; on the clock it may take four times as long.
    pub cpu_seconds: u32,
    /// Address space, the interpreter's included.
    pub memory_mib: u32,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All tests ran, and passed.
    Passed,
    /// An error, its last line; or another end than that of the tests.
    Failed(String),
    /// It used up its time.
    TimedOut,
    /// It used up its memory.
    OutOfMemory,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
            Self::TimedOut => f.write_str("timed out"),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

/// Runs programs, any number at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    launcher: PathBuf,
    python: PathBuf,
    confinement: Confinement,
}

impl Sandbox {
    /// With an interpreter, and tries it out. `launcher` is `plumb-train`, which runs itself. Where the kernel cannot take
    /// away files and network, this is an error, unless `weak` is accepted.
    ///
    /// # Errors
    /// If there is no such interpreter, or it cannot be confined.
    pub fn new(launcher: PathBuf, python: &Path, limits: Limits, weak: bool) -> Result<Self> {
        let (python, readable) = interpreter(python)?;
        let Limits { cpu_seconds, memory_mib } = limits;
        let sandbox = Self { launcher, python, confinement: Confinement { cpu_seconds, memory_mib, weak, readable } };
        match sandbox.run("import collections, math, re\nx = 1", "assert x == 1")? {
            Outcome::Passed => Ok(sandbox),
            other => Err(Error::Recipe(format!("a program that is right cannot be run: {other}"))),
        }
    }

    /// Runs a program, and then its tests, which see all its names.
    ///
    /// # Errors
    /// If it cannot be run. What is wrong with the program is no error.
    pub fn run(&self, program: &str, tests: &str) -> Result<Outcome> {
        // Not to be guessed, or printed by accident.
        let passed = format!("passed {:032x}", rand::random::<u128>());
        let work = json!({"program": program, "tests": tests, "passed": passed}).to_string();
        let mut child = self.command().spawn().map_err(Error::io(&self.launcher))?;
        let events = watch(&mut child, work);
        let clock = Duration::from_secs(u64::from(self.confinement.cpu_seconds * PATIENCE));
        let mut outputs = [None, None];
        let ended = first_end(&events, Instant::now() + clock, &mut outputs);
        // Whatever it started goes with it. It may be gone.
        if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let status = child.wait().map_err(Error::io(&self.launcher))?;
        let [output, errors] = rest(&events, outputs);
        if !output.begins_ready {
            return Err(Error::Recipe(format!("programs cannot be confined: {}", errors.text().trim())));
        }
        Ok(match ended {
            End::Clock => Outcome::TimedOut,
            End::TooMuchOutput => Outcome::Failed("prints without end".to_owned()),
            End::Exited if output.tail.ends_with(passed.as_bytes()) && status.success() => Outcome::Passed,
            End::Exited => failure(status, &errors.text()),
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.launcher);
        command.arg("confined").args(self.confinement.arguments()).arg("--").arg(&self.python);
        // No site packages, no bytecode, nothing of the user's.
        command.args(["-s", "-S", "-B", "-c", DRIVER]);
        command.env_clear().env("PYTHONHASHSEED", "0").env("PYTHONUTF8", "1");
        command.current_dir("/").process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// The interpreter itself, behind links and wrappers, and the folders that it reads.
fn interpreter(python: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    const ASK: &str = "import json, os, sys, sysconfig\n\
                       paths = sysconfig.get_paths()\n\
                       exe = os.path.realpath(getattr(sys, '_base_executable', None) or sys.executable)\n\
                       lib = os.path.join(sys.base_exec_prefix, 'lib')\n\
                       print(json.dumps([exe, paths['stdlib'], paths['platstdlib'], lib]))";
    let asked = Command::new(python).args(["-I", "-S", "-c", ASK]).stdin(Stdio::null()).output();
    let asked = asked.map_err(Error::io(python))?;
    let paths: Vec<PathBuf> = serde_json::from_slice(&asked.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&asked.stderr);
        Error::Recipe(format!("{} is no Python 3 that works: {}", python.display(), said.trim()))
    })?;
    let system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"];
    let executable = paths.first().cloned().unwrap_or_default();
    Ok((executable, paths.into_iter().chain(system.map(PathBuf::from)).collect()))
}

/// What is heard of a process.
enum Event {
    Exited,
    TooMuchOutput,
    /// All of standard output, or of standard error.
    Output(usize, Output),
}

enum End {
    Exited,
    TooMuchOutput,
    Clock,
}

#[derive(Default)]
struct Output {
    begins_ready: bool,
    tail: Vec<u8>,
}

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.tail).into_owned()
    }
}

/// Feeds a process, and listens to it, on threads that end when it does.
fn watch(child: &mut Child, work: String) -> Receiver<Event> {
    let (events, inbox) = mpsc::channel();
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends before it has read everything has failed anyway.
        thread::spawn(move || stdin.write_all(work.as_bytes()));
    }
    let streams: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>),
        child.stderr.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>),
    ];
    for (i, stream) in streams.into_iter().enumerate() {
        let events = events.clone();
        thread::spawn(move || {
            let output = stream.map(|stream| listen(stream, &events)).unwrap_or_default();
            events.send(Event::Output(i, output))
        });
    }
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        thread::spawn(move || {
            // Left to be waited for, so that its number stays its own until it has been killed.
            while waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
                .is_err_and(|error| error == rustix::io::Errno::INTR)
            {}
            events.send(Event::Exited)
        });
    }
    inbox
}

/// Reads to the end, and keeps the end.
fn listen(mut stream: impl Read, events: &Sender<Event>) -> Output {
    let mut output = Output::default();
    let (mut buffer, mut read) = ([0; 8192], 0);
    // A pipe that breaks has come to its end.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        output.tail.extend_from_slice(&buffer[..count]);
        // The first words are written at once, so they are not split.
        output.begins_ready |= read == 0 && output.tail.starts_with(READY);
        output.tail.drain(..output.tail.len().saturating_sub(TAIL));
        if read < MAX_OUTPUT && read + count >= MAX_OUTPUT {
            // Nobody listens once it was killed.
            let _ = events.send(Event::TooMuchOutput);
        }
        read += count;
    }
    output
}

/// Waits until a process ends, or has to; gathers what it has written by then.
fn first_end(events: &Receiver<Event>, deadline: Instant, outputs: &mut [Option<Output>; 2]) -> End {
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Exited) => return End::Exited,
            Ok(Event::TooMuchOutput) => return End::TooMuchOutput,
            Ok(Event::Output(i, output)) => outputs[i] = Some(output),
            Err(_) => return End::Clock,
        }
    }
}

/// Gathers the rest of it once the process is gone. Somebody else may hold a pipe only where the sandbox is weak.
fn rest(events: &Receiver<Event>, mut outputs: [Option<Output>; 2]) -> [Output; 2] {
    let deadline = Instant::now() + AFTERWARDS;
    while outputs.iter().any(Option::is_none) {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Output(i, output)) => outputs[i] = Some(output),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    outputs.map(Option::unwrap_or_default)
}

fn failure(status: ExitStatus, errors: &str) -> Outcome {
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    match status.signal() {
        // Its soft limit, or the hard one a second later.
        Some(signal) if [Signal::XCPU, Signal::KILL].iter().any(|limit| limit.as_raw() == signal) => Outcome::TimedOut,
        Some(signal) => Outcome::Failed(format!("signal {signal}")),
        None if last.starts_with("MemoryError") => Outcome::OutOfMemory,
        None if status.success() => Outcome::Failed("ended before its tests did".to_owned()),
        None => Outcome::Failed(last.chars().take(200).collect()),
    }
}
