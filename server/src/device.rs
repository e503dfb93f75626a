//! The device on which models compute.

use plumb_model::decoder::{Device, DeviceChoice};

use crate::error::{Error, Result};
use crate::telemetry::events::Computing;

/// Opens it.
///
/// # Errors
/// If a GPU was named that is not there, or that this program was not built for.
pub(crate) fn open(choice: DeviceChoice) -> Result<Device> {
    let opened = choice.open(0, env!("CARGO_PKG_NAME"));
    let (device, reason) = opened.map_err(|error| Error::failed_precondition(error.to_string()))?;
    Computing { device: &device, reason }.emit();
    Ok(device)
}
