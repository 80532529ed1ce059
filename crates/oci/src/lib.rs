//! The OCI runtime that container engines call: from a bundle to a container in a machine, and
//! back.
//!
//! Each command of the OCI command line is a function of [`commands`]; the argument grammar and the
//! printing are `cli`'s. What the specification says of the host happens here (hooks, control
//! groups, the process that stands for the container); what it says of the container is handed to
//! the guest by [`guest_spec`], which refuses by name what can be honoured on neither side.
//! Machines are the business of `sandbox`.
//!
//! Called by `cli` under the name `hull-oci`. Never touches guest memory, and reads nothing that a
//! guest wrote.

pub mod bundle;
pub mod cgroup;
pub mod commands;
mod console;
pub mod container;
pub mod default_spec;
mod disks;
pub mod features;
pub mod guest_spec;
mod hooks;
pub mod keeper;
mod pod;
pub mod signal;
pub mod stats;
pub mod update;
