//! Machines and the containers in them: life cycle, state on disk, shares, streams, clean-up.
//!
//! Two sides live here. The *sandbox process* owns a machine and everything that belongs to it, and outlives the
//! command that started it; there is one for each container of hull's own, and one for each [`pod`] of an engine. The
//! *client* is how commands find and ask sandbox processes. They meet in [`wire`] and in the files of [`paths`], and for
//! pods in [`pod::wire`].
//!
//! Called by `cli` and `oci` (and later by the containerd shim). This crate never touches guest
//! memory and never parses what a guest wrote, but for the agent's bounded protobuf answers.

mod attachment;
pub mod client;
pub mod detached;
pub mod error;
pub mod log;
pub mod names;
pub mod paths;
pub mod pod;
pub mod process;
pub mod record;
pub mod request;
pub mod rootless;
pub mod signals;
pub mod spec;
pub mod timings;
pub mod wire;

pub use error::{Failure, Result};
pub use hull_device_control::LinkLocal;
pub use paths::{ContainerPaths, Paths};
pub use record::{Exit, Record, State};
pub use request::{
    AttachRequest, CniRequest, MachineRequest, NameRequest, NetworkLimits, NetworkRequest,
    OwnNetwork, PastaRequest, RunRequest, Volume,
};
