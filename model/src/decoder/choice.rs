//! Where to compute, as options say it.

use std::fmt;
use std::str::FromStr;

use super::Device;
#[cfg(not(feature = "cuda"))]
use crate::Error;
use crate::Result;

/// `auto`, `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, or the CPU where there is none.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// A GPU that the CPU plays.
    #[cfg(feature = "emulated")]
    Emulated,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            #[cfg(feature = "emulated")]
            ("emulated", _) => Ok(Self::Emulated),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err("not auto, cpu or cuda:N".to_owned()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(number) => write!(formatter, "cuda:{number}"),
            #[cfg(feature = "emulated")]
            Self::Emulated => formatter.write_str("emulated"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device; where nobody chose one, the GPU of the number `preferred`, or else the CPU, and why. `package` is
    /// the program's, which has a feature `cuda`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if a GPU was named that is not there, or that the program was not built for.
    pub fn open(self, preferred: usize, package: &str) -> Result<(Device, Option<String>)> {
        match self {
            Self::Cpu => Ok((Device::Cpu, None)),
            Self::Cuda(number) => Ok((gpu(number, package)?, None)),
            Self::Auto => Ok(match gpu(preferred, package) {
                Ok(device) => (device, None),
                Err(error) => (Device::Cpu, Some(error.to_string())),
            }),
            #[cfg(feature = "emulated")]
            Self::Emulated => Ok((Device::Gpu(plumb_kernels::gpu::Gpu::emulated()), None)),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize, _: &str) -> Result<Device> {
    Device::cuda(number)
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize, package: &str) -> Result<Device> {
    Err(Error::Device(format!("this program was built without CUDA (cargo build --features {package}/cuda)")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:12"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }
}
