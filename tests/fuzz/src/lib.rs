//! What comes from outside, as fuzz targets: what a caller may send, and what a checkpoint may hold.
//!
//! A [`Target`] takes any bytes and has to come back, in bounded time and memory. Targets use what everybody may use, on
//! the way that a server takes: a checkpoint is a folder, opened from its path; a request goes through the wire. So a
//! reader that is written anew is fuzzed anew, and nothing is public for the fuzzer's sake.
//!
//! `run.sh` makes programs of them with libFuzzer inside; `tests/corpus.rs` feeds them every input of `corpus/`, without
//! a fuzzer and on every change. An input that consists of several files has a NUL byte between them.

#![expect(clippy::expect_used, reason = "as in a test: what is set up may stop where it stands")]

mod checkpoint;
mod folder;
mod gateway;
mod options;
mod request;
mod template;

use std::alloc::System;
use std::backtrace::Backtrace;
use std::io::{self, Write};
use std::panic;

use cap::Cap;

pub use self::checkpoint::{CONFIG, GGUF, MANIFEST, SAFETENSORS, TOKENIZER};
pub use self::gateway::GATEWAY;
pub use self::options::OPTIONS;
pub use self::request::PROTO;
pub use self::template::TEMPLATE;

/// All targets.
pub const TARGETS: [&Target; 9] =
    [&CONFIG, &GATEWAY, &GGUF, &MANIFEST, &OPTIONS, &PROTO, &SAFETENSORS, &TEMPLATE, &TOKENIZER];

/// Something that takes bytes from outside.
pub struct Target {
    /// Name of its program, and of its folder in `corpus/`.
    pub name: &'static str,
    /// Takes an input. That it is refused is not worth a word; that it panics is a bug.
    take: fn(&[u8]),
    /// Most bytes on the heap, whatever the input.
    fixed: usize,
    /// Most bytes on the heap for each byte of the input.
    per_byte: usize,
}

/// The heap, with a limit.
#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, usize::MAX);

/// Feeds a target. More memory than it may have ends the process, as does a panic that nobody caught.
pub fn run(target: &Target, data: &[u8]) {
    // What threads of a server that runs free at this moment is not worth an error.
    let limit = HEAP.allocated() + target.fixed + target.per_byte * data.len();
    let _ = HEAP.set_limit(limit);
    (target.take)(data);
    let _ = HEAP.set_limit(usize::MAX);
}

/// Bytes on the heap.
pub fn allocated() -> usize {
    HEAP.allocated()
}

/// To be called first thing in a program of targets.
pub fn start() {
    // There too, a panic of our own is not one more refusal.
    panic::set_hook(Box::new(report));
    #[cfg(target_os = "linux")]
    plumb_model::text::render_templates_apart();
}

/// A panic of a crate that reads for us is caught, and its input refused; one of our own code is a bug, caught or not.
fn report(panic: &panic::PanicHookInfo<'_>) {
    let own = panic.location().is_none_or(|at| !at.file().starts_with('/'));
    // Not by a macro, whose output a test would keep to itself.
    if own {
        let _ = writeln!(io::stderr(), "{panic}\n{}", Backtrace::capture());
        // Not by a signal, which from a process that renders would say that it had no memory.
        std::process::exit(1);
    }
    let _ = writeln!(io::stderr(), "in a dependency: {panic}");
}
