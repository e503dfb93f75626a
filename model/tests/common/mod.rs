//! What tests of whole models share.

use std::path::PathBuf;

use plumb_model::decoder::Device;

/// Beside the sources, or where `PLUMB_FIXTURES` says, as on a machine that has only the program.
pub(crate) fn fixtures() -> PathBuf {
    let there = std::env::var_os("PLUMB_FIXTURES").map(PathBuf::from);
    there.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures"))
}

/// The CPU, and every GPU that there is, the emulated one among them.
pub(crate) fn devices() -> Vec<Device> {
    #[cfg_attr(not(feature = "gpu"), expect(unused_mut, reason = "there is only one"))]
    let mut devices = vec![Device::Cpu];
    #[cfg(feature = "emulated")]
    devices.push(Device::Gpu(plumb_kernels::gpu::Gpu::emulated()));
    #[cfg(feature = "cuda")]
    match plumb_kernels::gpu::Gpu::cuda(0) {
        Ok(gpu) => devices.push(Device::Gpu(gpu)),
        Err(error) => {
            assert!(std::env::var_os("PLUMB_REQUIRE_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
        }
    }
    devices
}
