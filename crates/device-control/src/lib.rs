//! Protocol between a sandbox and the process that holds the devices of its guest: the device
//! process, or the machine process of a kind that has them in itself ([`monitor`]).
//!
//! The sandbox uses [`DeviceControl`] (feature `client`); the `devices` crate serves the other end.
//! This crate has the types of both and is independent of virtio queues and guest memory, so a
//! sandbox does not link the devices themselves.
//!
//! # Protocol
//!
//! Both processes run the same executable, so the protocol has no versions. They share one socket
//! pair of [`hull_ipc`]. The sandbox's first message is [`Setup`], with the descriptors that the
//! devices need. It is not answered: a device process that cannot set up its devices exits with an
//! error. Each later message is a [`Request`], answered by [`Event::Reply`] in any order. The
//! device process reports the guest's connections with [`Event::Incoming`].
//!
//! The device process parses guest input. The sandbox accepts from it only what [`EVENT_LIMITS`]
//! and the type [`Event`] allow.

mod call;
#[cfg(feature = "client")]
mod client;
pub mod monitor;
mod net;
mod setup;

use hull_ipc::Limits;

pub use call::{Cache, Call, Event, Request, ServedDevice};
#[cfg(feature = "client")]
pub use client::{DeviceControl, Error, Incoming};
pub use net::{LinkLocal, NetOptions, Policy};
pub use setup::{
    DeviceConfig, DeviceType, InvalidSetup, MAX_DISKS, MAX_NETS, Resources, Setup, Transport,
    disk_serial, numbered,
};

/// Descriptor of the control socket in the device process.
pub const CONTROL_FD: i32 = 3;

/// Limits of the device process for a [`Setup`].
pub const SETUP_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: setup::MAX_DESCRIPTORS,
};

/// Limits of the device process for a [`Request`].
pub const REQUEST_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: 1,
};

/// Limits of the sandbox for an [`Event`].
pub const EVENT_LIMITS: Limits = Limits {
    bytes: 8 << 10,
    fds: 1,
};
