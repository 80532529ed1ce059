//! Transports, which drive a [`Device`](crate::device::Device): one module per way of reaching a
//! guest's queues.

pub mod early_enable;
mod load;
mod placement;
#[cfg(not(fuzzing))]
mod ring;
#[cfg(fuzzing)]
pub mod ring;
pub mod vhost_user;
#[cfg(not(fuzzing))]
mod vring;
#[cfg(fuzzing)]
pub mod vring;
