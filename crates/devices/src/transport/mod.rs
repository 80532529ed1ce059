//! What drives a [`Device`](crate::device::Device): one module per way of reaching a guest's queues.

pub mod vhost_user;
