//! A sandbox as a library: one guest with one or more containers in it, from the start of its
//! machine to its end.
//!
//! [`Sandbox`] boots a machine, [`Container`] and [`Process`] are what runs in it, [`Event`]s tell
//! what happens. The front ends (`hull`, `hull-oci`, the containerd shim) make the same calls, in
//! this process or through [`control`] in that of [`role`]. What there is on disk is in [`store`].
//!
//! This crate prints nothing and has no effects on the process that uses it: no session, working
//! directory, umask or runtime of its own; only [`role`] and [`rootless`], which are processes of
//! hull's own, have. It never touches guest memory, and of what a guest wrote it parses only the
//! agent's bounded protobuf answers.

mod bounded_log;
pub mod cgroup;
pub mod config;
mod container;
pub mod control;
mod core_scheduling;
pub mod cost;
mod disks;
pub mod error;
pub mod events;
mod guest;
pub mod journal;
#[cfg(test)]
mod lifecycle_tests;
pub mod log;
pub mod metrics;
mod network;
mod process;
pub mod reach;
pub mod role;
pub mod rootless;
mod sandbox;
pub mod shares;
pub mod signals;
pub mod store;
pub mod timings;

pub use bounded_log::BoundedLog;
pub use container::Container;
pub use error::{Context, Error, ErrorKind, Result};
pub use events::{Event, EventKind, append_event};
#[cfg(fuzzing)]
pub use guest::agent::{Agent, printable};
pub use hull_device_control::LinkLocal;
pub use hull_protocol::RESOLVER;
#[cfg(fuzzing)]
pub use network::relay_names;
pub use network::{records as network_records, undo as undo_network};
pub use process::Process;
pub use sandbox::{Hold, Reason, Sandbox, SandboxExit};
