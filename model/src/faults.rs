//! Faults on demand, for tests: what a disk, an allocator or a device does once in a year.
//!
//! Without the feature `faults` there are none, and nothing is asked. With it, `PLUMB_FAULTS` names a file that is read
//! whenever a fault could happen, so that a test changes it while the program runs. Each line is a fault and its value,
//! as [`Fault`] says: `slow-read 50`.

/// What can go wrong on demand. The text is how a line begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every read of a checkpoint, of a MiB at most, takes so many milliseconds longer.
    SlowRead,
    /// Files of a checkpoint end after so many bytes.
    ShortRead,
    /// The byte at this offset of every file of a checkpoint is another one.
    CorruptByte,
    /// Memory for a model's weights is refused beyond so many bytes, and for its keys and values if they take more.
    FailedAllocation,
    /// A step that computes this token id answers an error.
    KernelError,
    /// A step that computes this token id panics.
    KernelPanic,
    /// Every step takes so many milliseconds longer.
    StuckEngine,
}

impl Fault {
    /// How the fault is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SlowRead => "slow-read",
            Self::ShortRead => "short-read",
            Self::CorruptByte => "corrupt-byte",
            Self::FailedAllocation => "failed-allocation",
            Self::KernelError => "kernel-error",
            Self::KernelPanic => "kernel-panic",
            Self::StuckEngine => "stuck-engine",
        }
    }
}

/// The value of a fault that is asked for: 0 where its line has none.
#[cfg(feature = "faults")]
#[must_use]
pub fn asked(fault: Fault) -> Option<u64> {
    let lines = std::fs::read_to_string(std::env::var_os("PLUMB_FAULTS")?).ok()?;
    lines.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == fault.name()).then(|| words.next().and_then(|value| value.parse().ok()).unwrap_or(0))
    })
}

/// No fault is ever asked for.
#[cfg(not(feature = "faults"))]
#[must_use]
#[inline(always)]
pub fn asked(_: Fault) -> Option<u64> {
    None
}
