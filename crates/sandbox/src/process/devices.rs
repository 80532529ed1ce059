//! The sandbox's end of the device process.

pub use hull_device_control::{DeviceControl as Devices, Incoming};

use crate::error::Failure;

impl From<hull_device_control::Error> for Failure {
    fn from(error: hull_device_control::Error) -> Self {
        Self::new(error.to_string())
    }
}
