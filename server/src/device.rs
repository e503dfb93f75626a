//! The device on which models compute.

use plumb_model::decoder::Device;

use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::telemetry::events::Computing;

/// Opens it, to be invariant or not.
///
/// # Errors
/// If a GPU was named that is not there, or that this program was not built for.
pub(crate) fn open(choice: DeviceChoice, invariant: bool) -> Result<Device> {
    let (device, reason) = match choice {
        DeviceChoice::Cpu => (Device::Cpu, None),
        DeviceChoice::Cuda(number) => (gpu(number).map_err(Error::failed_precondition)?, None),
        DeviceChoice::Auto => match gpu(0) {
            Ok(device) => (device, None),
            Err(reason) => (Device::Cpu, Some(reason)),
        },
    };
    Computing { device: &device, reason }.emit();
    Ok(if invariant { device.invariant() } else { device })
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> std::result::Result<Device, String> {
    Device::cuda(number).map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> std::result::Result<Device, String> {
    Err("this plumb-server was built without CUDA (cargo build --features plumb-server/cuda)".to_owned())
}
