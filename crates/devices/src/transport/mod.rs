//! What drives a [`Device`](crate::device::Device): one module per way of reaching a guest's queues.

mod early_enable;
mod placement;
pub mod vhost_user;
mod vring;
