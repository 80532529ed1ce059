//! CNI: attaches network namespaces to networks by running plugins, as containerd, podman and
//! cnitool do.
//!
//! Called by owners of a network namespace that can store a small file: a [`List`] names the
//! plugins of a network, an [`Attachment`] has the parameters, and a [`Record`] is both together
//! with the result. It is stored before the first plugin runs, so that [`Record::del`] can remove
//! everything, also after a crash in between.
//!
//! Blocks the calling thread, at most for the [`Runner`]'s limit with each plugin. Never changes a
//! container's interface or a packet filter itself: plugins do. Stores nothing on disk; does not
//! read `/var/lib/cni`.
//!
//! Versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0 of the specification, <https://www.cni.dev/docs/spec/>; of the last one not GC and STATUS.

mod attachment;
mod error;
mod list;
mod outcome;
mod plugin;
pub(crate) mod process;
mod record;
mod stand_in;
#[cfg(test)]
mod tests;

pub use attachment::{Address, Attachment, Dns, PortMapping, Protocol};
pub use error::{Error, Fault, Result};
pub use list::{
    BridgeNetwork, CONFIGURATION_DIRECTORY, DEFAULT_BRIDGE, DEFAULT_IPV4, DEFAULT_IPV6,
    DEFAULT_NAME, List, bridge_network, first_address, published_ports,
};
pub use outcome::{AssignedIp, CniResult, Interface, Route};
pub use plugin::{Command, PLUGIN_DIRECTORIES, Runner};
pub use record::Record;
