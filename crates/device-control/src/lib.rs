//! What a sandbox says to the process that holds its devices.
//!
//! The sandbox uses [`DeviceControl`] (feature `client`); the `devices` crate serves the other end.
//! This crate has the types of both and knows nothing of virtio queues or guest memory, so a
//! sandbox does not link the devices themselves.
//!
//! # Protocol
//!
//! Both processes come from one executable, so the protocol has no versions. They share one socket
//! pair of [`hull_ipc`]. The sandbox's first message is [`Setup`], with the descriptors that the
//! devices need beside it. It is not answered: a device process that cannot set its devices up ends
//! with an error. Each later message is a [`Request`], answered by [`Event::Reply`] in any
//! order. The device process reports connections that the guest makes with [`Event::Incoming`].
//!
//! The device process parses what a guest wrote. The sandbox accepts no more from it than
//! [`EVENT_LIMITS`] and the type [`Event`] say.

mod call;
#[cfg(feature = "client")]
mod client;
mod net;
mod setup;

use hull_ipc::Limits;

pub use call::{Cache, Call, Event, Request};
#[cfg(feature = "client")]
pub use client::{DeviceControl, Error, Incoming};
pub use net::{LinkLocal, NetOptions, Policy};
pub use setup::{
    DeviceConfig, DeviceType, InvalidSetup, MAX_DISKS, MAX_NETS, Resources, Setup, disk_serial,
};

/// Descriptor of the control socket in the device process.
pub const CONTROL_FD: i32 = 3;

/// What the device process accepts as a [`Setup`].
pub const SETUP_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: setup::MAX_DESCRIPTORS,
};

/// What the device process accepts as a [`Request`].
pub const REQUEST_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: 1,
};

/// What the sandbox accepts as an [`Event`].
pub const EVENT_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: 1,
};
