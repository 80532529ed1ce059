//! The saved form of a device: its own state, what the driver negotiated, and its queues.
//!
//! All of it is `serde` and versioned. The rule for versions: an older one is read, a newer one is
//! refused by name ([`RestoreError::Version`]). Each device's own state is next to the device
//! (`fs/state.rs`, `vsock/state.rs`, …) and has a version of its own; [`VERSION`] is that of the
//! types here.
//!
//! A saved state comes from a file of the host, which is trusted but may be damaged: restoring
//! never panics and rejects what is invalid.

use std::io;

use hull_device_control::DeviceType;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use virtio_queue::Queue;

/// Version of [`SavedDevice`].
pub const VERSION: u32 = 1;

/// A quiesced device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// [`VERSION`] at the time.
    pub version: u32,
    /// The device's own state.
    pub state: SavedState,
    /// What the driver has set up; `None` when there was no driver yet.
    pub driver: Option<SavedDriver>,
}

/// What a driver has negotiated and set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDriver {
    /// The accepted features.
    pub features: u64,
    /// The queues, in order.
    pub queues: QueueStates,
}

/// The queues of a device, in order.
pub type QueueStates = Vec<QueueState>;

/// Where a queue is in guest memory, and how far it was processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// Whether RING_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Guest address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest address of the available ring.
    pub available_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
    /// Index of the next available entry to pop.
    pub next_available: u16,
    /// Index of the next used entry to write.
    pub next_used: u16,
}

impl QueueState {
    /// A queue that no driver has set up.
    pub fn unused() -> Self {
        Self {
            max_size: 0,
            size: 0,
            ready: false,
            event_idx: false,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
            next_available: 0,
            next_used: 0,
        }
    }
}

impl From<&Queue> for QueueState {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            descriptor_table: state.desc_table,
            available_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }
}

impl TryFrom<QueueState> for Queue {
    type Error = virtio_queue::Error;

    /// A queue that continues where the saved one stopped.
    fn try_from(state: QueueState) -> Result<Self, Self::Error> {
        Self::try_from(virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptor_table,
            avail_ring: state.available_ring,
            used_ring: state.used_ring,
        })
    }
}

/// Most bytes of a device's state. What the fs device knows of a file takes some 150.
const MAX_SIZE: usize = 24 << 20;

/// The state of one device, in the device's own form.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedState {
    device: DeviceType,
    version: u32,
    content: Box<RawValue>,
}

impl PartialEq for SavedState {
    fn eq(&self, other: &Self) -> bool {
        (self.device, self.version, self.content.get())
            == (other.device, other.version, other.content.get())
    }
}

/// Keeps no more than [`MAX_SIZE`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_SIZE.saturating_sub(self.0.len()) {
            return Err(io::Error::other(format!(
                "it has more than {} MiB",
                MAX_SIZE >> 20
            )));
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SavedState {
    /// Encodes `content`, the state of a device of this type, of the given version.
    ///
    /// # Errors
    /// [`SaveError::Encode`] if it has no JSON form, or a longer one than is kept.
    pub fn new(
        device: DeviceType,
        version: u32,
        content: impl Serialize,
    ) -> Result<Self, SaveError> {
        let encode = |error: &dyn std::fmt::Display| SaveError::Encode {
            device,
            reason: error.to_string(),
        };
        let mut text = Bounded(Vec::new());
        serde_json::to_writer(&mut text, &content).map_err(|error| encode(&error))?;
        let text = String::from_utf8(text.0).map_err(|error| encode(&error))?;
        let content = RawValue::from_string(text).map_err(|error| encode(&error))?;
        Ok(Self {
            device,
            version,
            content,
        })
    }

    /// The type of the device.
    pub fn device(&self) -> DeviceType {
        self.device
    }

    /// Decodes the state of a device of this type, whose code reads versions up to `supported`;
    /// also returns its version.
    ///
    /// # Errors
    /// [`RestoreError`]: it is of another type of device, of a newer version, or damaged.
    pub fn read<T: DeserializeOwned>(
        &self,
        device: DeviceType,
        supported: u32,
    ) -> Result<(u32, T), RestoreError> {
        if self.device != device {
            return Err(RestoreError::Type {
                device,
                saved: self.device,
            });
        }
        if self.version > supported {
            return Err(RestoreError::Version {
                what: device.name(),
                version: self.version,
                supported,
            });
        }
        let content = serde_json::from_str(self.content.get())
            .map_err(|error| RestoreError::mismatch(device, error.to_string()))?;
        Ok((self.version, content))
    }
}

/// Why a device was not saved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// Devices of this type cannot be saved.
    #[error("the {} device cannot be saved", .0.name())]
    NotSupported(DeviceType),
    /// Something in its state cannot be saved.
    #[error("the {} device cannot be saved: {reason}", .device.name())]
    State {
        /// The device.
        device: DeviceType,
        /// The part that cannot be saved.
        reason: String,
    },
    /// Its state cannot be encoded.
    #[error("cannot encode the state of the {} device: {reason}", .device.name())]
    Encode {
        /// The device.
        device: DeviceType,
        /// The encoder's error.
        reason: String,
    },
    /// The device is not quiesced.
    #[error("a device must be quiesced before it is saved")]
    NotQuiesced,
}

/// Why a device was not restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Devices of this type cannot be restored.
    #[error("the {} device cannot be restored", .0.name())]
    NotSupported(DeviceType),
    /// The state is that of another type of device.
    #[error(
        "cannot restore the {} device from the state of a {} device", .device.name(), .saved.name()
    )]
    Type {
        /// The device.
        device: DeviceType,
        /// Type of the saved device.
        saved: DeviceType,
    },
    /// The state was saved by a newer hull.
    #[error(
        "the saved state of the {what} device has version {version}; versions up to {supported} \
         can be read"
    )]
    Version {
        /// What has that version.
        what: &'static str,
        /// The version.
        version: u32,
        /// The newest that is read.
        supported: u32,
    },
    /// The state is damaged, or does not fit the device or the host.
    #[error("cannot restore the {} device: {reason}", .device.name())]
    Mismatch {
        /// The device.
        device: DeviceType,
        /// What is wrong.
        reason: String,
    },
    /// The device has been activated already.
    #[error("only a device that has not been activated can be restored")]
    NotFresh,
}

impl RestoreError {
    /// A [`RestoreError::Mismatch`].
    pub fn mismatch(device: DeviceType, reason: impl Into<String>) -> Self {
        Self::Mismatch {
            device,
            reason: reason.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_state_is_read_by_its_own_device_and_no_older_code() {
        let saved = SavedState::new(DeviceType::Net, 2, [1, 2]).unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        let saved: SavedState = serde_json::from_str(&text).unwrap();
        for supported in [2, 3] {
            let read = saved.read::<[u8; 2]>(DeviceType::Net, supported).unwrap();
            assert_eq!(read, (2, [1, 2]));
        }
        assert!(matches!(
            saved.read::<[u8; 2]>(DeviceType::Net, 1),
            Err(RestoreError::Version { version: 2, .. })
        ));
        assert!(matches!(
            saved.read::<[u8; 2]>(DeviceType::Disk, 2),
            Err(RestoreError::Type { .. })
        ));
        assert!(matches!(
            saved.read::<String>(DeviceType::Net, 2),
            Err(RestoreError::Mismatch { .. })
        ));
    }

    #[test]
    fn types_have_the_ids_of_the_specification() {
        use virtio_bindings::virtio_ids::*;
        let ids = [
            (DeviceType::Fs, VIRTIO_ID_FS),
            (DeviceType::Vsock, VIRTIO_ID_VSOCK),
            (DeviceType::Entropy, VIRTIO_ID_RNG),
            (DeviceType::Net, VIRTIO_ID_NET),
            (DeviceType::Disk, VIRTIO_ID_BLOCK),
            (DeviceType::Balloon, VIRTIO_ID_BALLOON),
        ];
        for (device, id) in ids {
            assert_eq!(device.virtio_id(), id, "{}", device.name());
        }
    }
}
