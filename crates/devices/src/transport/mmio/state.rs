//! The saved form of a slot.

use serde::{Deserialize, Serialize};

use crate::state::SavedDevice;

/// A slot with its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSlot {
    pub(super) registers: SavedRegisters,
    pub(super) device: SavedDevice,
}

/// What the driver has written, and what it has not acknowledged yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedRegisters {
    pub status: u8,
    pub device_features_select: u32,
    pub features_select: u32,
    pub features: u64,
    pub queue_select: u32,
    pub queues: Vec<QueueSetup>,
    pub interrupt_status: u32,
    pub config_generation: u32,
}

/// A queue as the driver sets it up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueSetup {
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}
