//! Virtio back ends of a sandbox, and the process they run in.
//!
//! A back end ([`fs`], [`vsock`], [`net`], [`entropy`], [`block`], [`balloon`]) implements
//! [`device::Device`] and knows no transport; a [`transport`] drives it through a [`runner`].
//! [`state`] is its saved form. [`served`] are all back ends of one guest, controlled over the
//! protocol of [`hull_device_control`]; [`device_process`] is the jailed process that holds them
//! where the machine is another process.
//!
//! The process parses data from the guest. It opens nothing but descriptors that it was given and
//! what is beneath them.

pub mod balloon;
pub mod block;
mod buffers;
pub mod device;
pub mod device_process;
pub mod ended;
pub mod entropy;
pub mod fs;
#[cfg(test)]
mod lifecycle_tests;
pub mod net;
pub mod runner;
pub mod served;
pub mod state;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
