//! The saved state of a vsock device.
//!
//! Connections are not part of it: their host ends are sockets of processes that are gone when the
//! device is restored. A restored device has none, and notifies the driver with a transport reset
//! event, on which it closes every connected socket; sockets that listen stay. Packets of old
//! connections that are still in the tx queue are answered with RST.

use hull_device_control::DeviceType;
use serde::{Deserialize, Serialize};

use super::Vsock;
use crate::state::{RestoreError, SaveError, SavedState};

/// Version of [`State`].
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Ports of the host that the guest can connect to.
    listening: Vec<u32>,
}

pub fn save(device: &Vsock) -> Result<SavedState, SaveError> {
    let state = State {
        listening: device.muxer.listening(),
    };
    SavedState::new(DeviceType::Vsock, VERSION, state)
}

pub fn restore(device: &mut Vsock, state: &SavedState) -> Result<(), RestoreError> {
    let (_, State { listening }) = state.read(DeviceType::Vsock, VERSION)?;
    for port in listening {
        device.muxer.listen(port);
    }
    device.reset_event_pending = true;
    Ok(())
}
