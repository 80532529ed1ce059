//! The saved state of a net device.
//!
//! The connection to the host is not part of it: the tap, its options, and a frame that was read
//! from it and waits for the guest's buffers. A restored machine may be in another network, so its
//! owner attaches a new tap, and frames of the old network do not reach it; networks may lose
//! frames.

use hull_device_control::DeviceType;
use serde::{Deserialize, Serialize};

use super::Net;
use crate::state::{RestoreError, SaveError, SavedState};

/// Version of [`State`].
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Hardware address, which the driver has read.
    mac: [u8; 6],
}

pub fn save(device: &Net) -> Result<SavedState, SaveError> {
    let state = State { mac: device.mac };
    SavedState::new(DeviceType::Net, VERSION, state)
}

pub fn restore(device: &mut Net, state: &SavedState) -> Result<(), RestoreError> {
    let (_, State { mac }) = state.read(DeviceType::Net, VERSION)?;
    device.mac = mac;
    Ok(())
}
