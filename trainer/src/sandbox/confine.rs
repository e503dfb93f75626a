//! What a process takes from itself before it becomes a program that nobody has read.
//!
//! Limits of time and memory; Landlock, which leaves it the files of the interpreter, to read; and a list of the system
//! calls that Python needs to compute, all others being unknown: no sockets, no processes, no signals to others.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};

/// What is left to a process.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Confinement {
    /// Processor time
    #[arg(long)]
    pub(super) cpu_seconds: u32,
    /// Address space
    #[arg(long)]
    pub(super) memory_mib: u32,
    /// Goes on where the kernel cannot take files and network away
    #[arg(long)]
    pub(super) weak: bool,
    /// What may be read, and run
    #[arg(long)]
    pub(super) readable: Vec<PathBuf>,
}

impl Confinement {
    /// As the command line that `plumb-train confined` reads.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec![
            format!("--cpu-seconds={}", self.cpu_seconds).into(),
            format!("--memory-mib={}", self.memory_mib).into(),
        ];
        if self.weak {
            arguments.push("--weak".into());
        }
        for path in &self.readable {
            arguments.extend(["--readable".into(), path.into()]);
        }
        arguments
    }

    /// Takes everything else away and becomes a program. Answers only if that failed, and why.
    pub fn become_program(&self, command: &[OsString]) -> String {
        let Some((program, arguments)) = command.split_first() else { return "no program".to_owned() };
        let confined = self.limit().and_then(|()| match kernel::confine(&self.readable) {
            Err(reason) if !self.weak => Err(format!(
                "{reason}; this takes Linux 5.13 or newer with Landlock and seccomp, which some containers switch off. \
                 Programs that nobody has read should not run here; --weak-sandbox runs them with limits of time and \
                 memory alone"
            )),
            _ => Ok(()),
        });
        if let Err(reason) = confined {
            return reason;
        }
        let mut output = std::io::stdout();
        if let Err(error) = output.write_all(super::READY).and_then(|()| output.flush()) {
            return error.to_string();
        }
        let error = Command::new(program).args(arguments).exec();
        format!("{}: {error}", program.display())
    }

    fn limit(&self) -> Result<(), String> {
        let cpu = u64::from(self.cpu_seconds);
        for (resource, soft, hard) in [
            (Resource::Cpu, cpu, cpu + 1),
            (Resource::As, u64::from(self.memory_mib) << 20, u64::from(self.memory_mib) << 20),
            // Pipes are no files.
            (Resource::Fsize, 0, 0),
            (Resource::Core, 0, 0),
            (Resource::Nofile, 64, 64),
        ] {
            let limit = Rlimit { current: Some(soft), maximum: Some(hard) };
            setrlimit(resource, limit).map_err(|error| format!("a limit of {resource:?}: {error}"))?;
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use landlock::{
        ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
        RulesetStatus, path_beneath_rules,
    };
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        apply_filter,
    };

    /// Files first: the list of system calls has none that sets up Landlock.
    pub(super) fn confine(readable: &[PathBuf]) -> Result<(), String> {
        files(readable).map_err(|error| format!("Landlock: {error}"))?;
        system_calls().map_err(|error| format!("seccomp: {error}"))
    }

    fn files(readable: &[PathBuf]) -> Result<(), String> {
        // What the first version cannot forbid takes system calls that are not on the list.
        let abi = ABI::V1;
        let rules = path_beneath_rules(readable, AccessFs::from_read(abi));
        let status = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(abi))
            .and_then(Ruleset::create)
            .and_then(|ruleset| ruleset.add_rules(rules))
            .and_then(|ruleset| ruleset.restrict_self())
            .map_err(|error| error.to_string())?;
        match (status.ruleset, status.no_new_privs) {
            (RulesetStatus::FullyEnforced, true) => Ok(()),
            _ => Err("the kernel does not enforce it".to_owned()),
        }
    }

    fn system_calls() -> Result<(), String> {
        let text = |error: seccompiler::BackendError| error.to_string();
        let only = |argument, operator, value| {
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value).map_err(text)?;
            Ok::<_, String>(vec![SeccompRule::new(vec![condition]).map_err(text)?])
        };
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
        // Threads, but no processes.
        let thread = libc::CLONE_THREAD as u64;
        rules.insert(libc::SYS_clone, only(0, SeccompCmpOp::MaskedEq(thread), thread)?);
        // To itself alone, which is how a process aborts.
        rules.insert(libc::SYS_tgkill, only(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?);
        // Limits are read, not set.
        rules.insert(libc::SYS_prlimit64, only(2, SeccompCmpOp::Eq, 0)?);
        let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let arch = std::env::consts::ARCH.try_into().map_err(text)?;
        let filter = SeccompFilter::new(rules, unknown, SeccompAction::Allow, arch).map_err(text)?;
        apply_filter(&BpfProgram::try_from(filter).map_err(text)?).map_err(|error| error.to_string())
    }

    /// Memory, time, threads, and reading what Landlock lets be read.
    const ALLOWED: &[i64] = &[
        libc::SYS_brk,
        libc::SYS_clock_getres,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_execve,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_fadvise64,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_futex,
        libc::SYS_getcwd,
        libc::SYS_getdents64,
        libc::SYS_getegid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getitimer,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_getrandom,
        libc::SYS_getrusage,
        libc::SYS_gettid,
        libc::SYS_gettimeofday,
        libc::SYS_getuid,
        libc::SYS_ioctl,
        libc::SYS_lseek,
        libc::SYS_madvise,
        libc::SYS_membarrier,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_newfstatat,
        libc::SYS_openat,
        libc::SYS_pipe2,
        libc::SYS_ppoll,
        libc::SYS_pread64,
        libc::SYS_pselect6,
        libc::SYS_read,
        libc::SYS_readlinkat,
        libc::SYS_readv,
        libc::SYS_restart_syscall,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_setitimer,
        libc::SYS_sigaltstack,
        libc::SYS_statx,
        libc::SYS_sysinfo,
        libc::SYS_times,
        libc::SYS_uname,
        libc::SYS_write,
        libc::SYS_writev,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_access,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_alarm,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_arch_prctl,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_getrlimit,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_lstat,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_readlink,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_select,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_stat,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_time,
    ];
}

#[cfg(not(target_os = "linux"))]
mod kernel {
    pub(super) fn confine(_: &[std::path::PathBuf]) -> Result<(), String> {
        Err("no Landlock on this system".to_owned())
    }
}
