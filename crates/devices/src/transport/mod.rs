//! Transports, which drive a [`Device`](crate::device::Device): one module per way of reaching a
//! guest's queues.

pub mod early_enable;
mod load;
mod placement;
mod ring;
pub mod vhost_user;
mod vring;
