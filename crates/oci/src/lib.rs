//! The OCI runtime that container engines call: runs a bundle as a container in a machine.
//!
//! Each command of the OCI command line is a function of [`commands`]; argument parsing and output
//! are in `cli`. What the specification requires on the host is done here (hooks, control groups,
//! the process that represents the container); the rest is passed to the guest by [`guest_spec`],
//! which refuses by name what neither side supports. `sandbox` manages the machines.
//!
//! Called by `cli` under the name `hull-oci`. Never accesses guest memory, and parses nothing that
//! a guest wrote.

pub mod bundle;
pub mod commands;
mod console;
pub mod container;
pub mod default_spec;
pub mod disks;
pub mod features;
pub mod guest_spec;
pub mod hooks;
pub mod keeper;
pub mod limits;
pub mod pod;
pub mod signal;
pub mod stats;
pub mod update;
