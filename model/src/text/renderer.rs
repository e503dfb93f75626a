//! Chat templates in processes of their own.
//!
//! A template is code from a checkpoint, and counting its steps bounds neither its time nor its memory: `([0] *
//! 100000000) ~ x` is three. A thread cannot be stopped, a process can. So a program that takes checkpoints from others
//! calls [`render_templates_apart`]; from then on it starts itself again, as a process that does nothing but render,
//! with limits that the kernel holds it to. One that goes over them ends, and takes nothing with it but the rendering.
//!
//! Requests and replies go over a socket, which is the process's standard input: a tag, a length, and so many bytes. It
//! ends when the socket is closed, so it never outlives the program.

use std::borrow::Cow;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::available_parallelism;
use std::time::Duration;

use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getpriority_process, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::set_name;
use serde::{Deserialize, Serialize};

use super::Message;
use super::template::{Failure, MAX_RENDERED_BYTES, Template};
use crate::checkpoint::SpecialTokens;

/// The process's name, by which the program knows what it was started for.
const NAME: &CStr = c"plumb-template";

/// Processor time for any rendering, and for each byte of its request, as JSON. Usual ones take some 20 microseconds, and a
/// conversation of four megabytes a fifth of what it gets.
const TIME: Duration = Duration::from_millis(250);
const TIME_FOR_A_BYTE: Duration = Duration::from_nanos(500);
/// After which it ends even where the signal for that is ignored, as programs inherit it.
const GRACE: Duration = Duration::from_millis(250);
/// Memory beyond that with which the process begins.
const MEMORY: u64 = 256 << 20;
/// Memory that it may keep: with more it ends after its reply, so that nothing of what one rendering left, and be it by
/// a circle of values that hold one another, is there for the next one.
const KEPT: u64 = 32 << 20;
/// Longest wait for a process to take, or give, the next bytes, however little of the processor there is.
const PATIENCE: Duration = Duration::from_secs(20);
/// Processes for one template. Each renders ten megabytes a second, more than a model reads.
const MAX_PROCESSES: usize = 4;
/// Most bytes of a refusal.
const MAX_REASON_BYTES: usize = 4 << 10;
/// Sent by the kernel when the time is over; the default is to end.
const OUT_OF_TIME: Signal = Signal::SIGALRM;

/// The program's niceness, once it renders apart.
static NICENESS: OnceLock<i32> = OnceLock::new();

/// Makes this program render chat templates in processes of their own, bounded in time and memory. To be called first
/// thing in `main`, before there are threads: in those processes it does not return.
///
/// Without it they are rendered by who asks, on the stack that there is, bounded in steps and output only: good for
/// templates that are known.
pub fn render_templates_apart() {
    if std::env::args_os().next().as_deref() == Some(OsStr::from_bytes(NAME.to_bytes())) {
        std::process::exit(i32::from(serve().is_err()));
    }
    NICENESS.get_or_init(niceness);
}

/// Whether [`render_templates_apart`] was called.
pub(super) fn apart() -> bool {
    NICENESS.get().is_some()
}

/// That of the current thread, which its processes inherit.
fn niceness() -> i32 {
    getpriority_process(None).unwrap_or_default()
}

#[derive(Serialize, Deserialize)]
enum Request<'a> {
    /// The first.
    Parse { source: Cow<'a, str>, special: Cow<'a, SpecialTokens> },
    /// All others.
    Render { messages: Cow<'a, [Message]>, add_generation_prompt: bool },
}

impl Request<'_> {
    fn to_bytes(&self) -> Result<Vec<u8>, Failure> {
        serde_json::to_vec(self).map_err(|error| Failure::Lost(error.to_string()))
    }
}

/// The text of a rendering, nothing for a template that was parsed, or why not.
type Reply = Result<String, String>;

/// The processes that render one template. They are started as they are needed and kept until this goes.
#[derive(Debug)]
pub(super) struct Renderers {
    parse: Vec<u8>,
    most: usize,
    processes: Mutex<Processes>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Processes {
    idle: Vec<Renderer>,
    /// Those that are asked now.
    busy: usize,
}

impl Renderers {
    /// Starts the first, which parses the template.
    pub(super) fn new(source: &str, special: &SpecialTokens) -> Result<Self, Failure> {
        let parse = Request::Parse { source: source.into(), special: Cow::Borrowed(special) }.to_bytes()?;
        let renderers = Self {
            parse,
            most: available_parallelism().map_or(1, usize::from).min(MAX_PROCESSES),
            processes: Mutex::default(),
            freed: Condvar::new(),
        };
        let first = again_if_lost(|| Renderer::start(&renderers.parse))?;
        renderers.take().process = Some(first);
        Ok(renderers)
    }

    /// The text of a conversation. Waits while all processes are busy, each for a bounded time.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Failure> {
        let request = Request::Render { messages: messages.into(), add_generation_prompt }.to_bytes()?;
        let mut place = self.take();
        again_if_lost(|| place.ask(&request))
    }

    fn processes(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Place<'_> {
        let mut processes = self.processes();
        while processes.busy >= self.most {
            processes = self.freed.wait(processes).unwrap_or_else(PoisonError::into_inner);
        }
        processes.busy += 1;
        Place { renderers: self, process: processes.idle.pop() }
    }
}

/// Whoever ends processes that are not its own may have ended that one, even before it was asked.
fn again_if_lost<T>(mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    match ask() {
        Err(Failure::Lost(_)) => ask(),
        first => first,
    }
}

/// Leave to ask a process.
struct Place<'a> {
    renderers: &'a Renderers,
    process: Option<Renderer>,
}

impl Place<'_> {
    fn ask(&mut self, request: &[u8]) -> Result<String, Failure> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => Renderer::start(&self.renderers.parse)?,
        };
        match process.ask(request) {
            Ok(reply) => {
                self.process = Some(process);
                reply.map_err(Failure::Refused)
            }
            Err(error) => Err(process.end(&error)),
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut processes = self.renderers.processes();
        processes.busy -= 1;
        // Those that a load in the background has started would let callers wait.
        processes.idle.extend(self.process.take().filter(|process| !process.background));
        drop(processes);
        self.renderers.freed.notify_one();
    }
}

/// A process that renders.
#[derive(Debug)]
struct Renderer {
    process: Child,
    socket: UnixStream,
    /// It has less of the processor than the program.
    background: bool,
}

impl Renderer {
    fn start(parse: &[u8]) -> Result<Self, Failure> {
        let start = || {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_read_timeout(Some(PATIENCE))?;
            ours.set_write_timeout(Some(PATIENCE))?;
            // The program that runs, even if its file was replaced.
            let process = Command::new("/proc/self/exe")
                .arg0(OsStr::from_bytes(NAME.to_bytes()))
                .stdin(OwnedFd::from(theirs))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            let background = NICENESS.get().is_some_and(|of_program| niceness() > *of_program);
            Ok(Self { process, socket: ours, background })
        };
        let mut renderer =
            start().map_err(|error: io::Error| Failure::Lost(format!("/proc/self/exe does not start: {error}")))?;
        match renderer.ask(parse) {
            Ok(Ok(_)) => Ok(renderer),
            Ok(Err(reason)) => Err(Failure::Refused(reason)),
            Err(error) => Err(renderer.end(&error)),
        }
    }

    fn ask(&mut self, request: &[u8]) -> io::Result<Reply> {
        send(&mut self.socket, 0, request)?;
        let (refused, bytes) = receive(&mut self.socket, MAX_RENDERED_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok(if refused == 0 { Ok(text) } else { Err(text) })
    }

    /// Why there was no reply.
    fn end(mut self, error: &io::Error) -> Failure {
        let closed =
            matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
        if !closed {
            let _ = self.process.kill();
        }
        match self.process.wait() {
            Ok(status) if closed => ended(status),
            _ => Failure::Lost(error.to_string()),
        }
    }
}

fn ended(status: ExitStatus) -> Failure {
    match status.signal().and_then(|signal| Signal::try_from(signal).ok()) {
        Some(OUT_OF_TIME) => Failure::Exceeded("takes more time than it may have".to_owned()),
        // So ends Rust where there is no memory, or no more stack.
        Some(Signal::SIGABRT | Signal::SIGSEGV) => {
            Failure::Exceeded(format!("takes more than {} MiB of memory, or nests too deeply", MEMORY >> 20))
        }
        _ => Failure::Lost(status.to_string()),
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the process does.
fn serve() -> io::Result<()> {
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let begins_with = address_space()?;
    confine(begins_with)?;
    let timer = |signal| {
        let event = SigEvent::new(SigevNotify::SigevSignal { signal, si_value: 0 });
        Timer::new(ClockId::CLOCK_PROCESS_CPUTIME_ID, event)
    };
    let (mut ends, mut kills) = (timer(OUT_OF_TIME)?, timer(Signal::SIGKILL)?);
    let once = |time: Duration| Expiration::OneShot(time.into());
    let mut template = None;
    loop {
        let (_, request) = match receive(&mut socket, usize::MAX) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            request => request?,
        };
        let time = TIME + TIME_FOR_A_BYTE * u32::try_from(request.len()).unwrap_or(u32::MAX);
        ends.set(once(time), TimerSetTimeFlags::empty())?;
        kills.set(once(time + GRACE), TimerSetTimeFlags::empty())?;
        let reply = catch_unwind(AssertUnwindSafe(|| reply(&mut template, &request)));
        // Off.
        ends.set(once(Duration::ZERO), TimerSetTimeFlags::empty())?;
        kills.set(once(Duration::ZERO), TimerSetTimeFlags::empty())?;
        match reply.unwrap_or_else(|_| Err("the chat template fails on this conversation".to_owned())) {
            Ok(text) => send(&mut socket, 0, text.as_bytes())?,
            Err(reason) => send(&mut socket, 1, &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON_BYTES)])?,
        }
        drop(request);
        if address_space()? > begins_with + KEPT {
            return Ok(());
        }
    }
}

fn reply(template: &mut Option<Template>, request: &[u8]) -> Reply {
    match (serde_json::from_slice(request).map_err(|error| error.to_string())?, template) {
        (Request::Parse { source, special }, template) => {
            *template = Some(Template::parse(&source, &special)?);
            Ok(String::new())
        }
        (Request::Render { messages, add_generation_prompt }, Some(template)) => {
            template.render(&messages, add_generation_prompt)
        }
        (Request::Render { .. }, None) => Err("there is no chat template".to_owned()),
    }
}

/// Bounds this process, which has so many bytes of addresses.
fn confine(begins_with: u64) -> io::Result<()> {
    set_name(NAME)?;
    // Who stops the program, and with it all its group, lets it finish what it has begun.
    SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]).thread_block()?;
    // Masks are inherited.
    SigSet::from(OUT_OF_TIME).thread_unblock()?;
    // Of the system's memory, too, it is the first to give.
    let _ = File::create("/proc/self/oom_score_adj").and_then(|mut file| file.write_all(b"1000"));
    // Not more than there may be anyway.
    let most = (begins_with + MEMORY).min(getrlimit(Resource::As).maximum.unwrap_or(u64::MAX));
    setrlimit(Resource::As, Rlimit { current: Some(most), maximum: Some(most) })?;
    // An end is no accident: no file of its memory.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Bytes of addresses of this process.
fn address_space() -> io::Result<u64> {
    let sizes = std::fs::read_to_string("/proc/self/statm")?;
    let pages: Option<u64> = sizes.split(' ').next().and_then(|pages| pages.parse().ok());
    Ok(pages.ok_or(ErrorKind::InvalidData)? * rustix::param::page_size() as u64)
}

fn send(socket: &mut UnixStream, tag: u8, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| ErrorKind::FileTooLarge)?;
    let mut head = [tag; 5];
    head[1..].copy_from_slice(&length.to_le_bytes());
    // Small ones in one piece.
    if bytes.len() <= 4096 {
        return socket.write_all(&[&head, bytes].concat());
    }
    socket.write_all(&head)?;
    socket.write_all(bytes)
}

fn receive(socket: &mut UnixStream, most: usize) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    socket.read_exact(&mut head)?;
    let [tag, length @ ..] = head;
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes)?;
    Ok((tag, bytes))
}
