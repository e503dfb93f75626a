//! The experiments, in the order of the table in `RELIABILITY.md`.

pub(crate) mod drain;
pub(crate) mod failed_loads;
pub(crate) mod fuzz;
pub(crate) mod overload;
pub(crate) mod poison;
pub(crate) mod publish_kill;
pub(crate) mod replicas;
pub(crate) mod server_kill;
pub(crate) mod soak;
pub(crate) mod swaps;
