//! The contract between the host and the agent in the guest: messages, service, ports, paths.
//!
//! Called by `sandbox` (client) and `agent` (server). Holds no behaviour: what is here is either generated
//! from `proto/` or a constant that both sides must agree on.

#[allow(missing_docs, clippy::all, clippy::unwrap_used, unused, unsafe_code)]
#[rustfmt::skip]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};

/// vsock port of the host that the agent dials when it is ready. The connection is both the event "ready" and
/// the channel on which the agent then serves [`agent_ttrpc`]: no listener, no second round trip, and after a
/// restore from a snapshot the agent simply dials again.
pub const AGENT_PORT: u32 = 1024;

/// vsock port of the guest to which the host connects one stream each for stdin, stdout, stderr or a terminal.
pub const STREAM_PORT: u32 = 1025;

/// vsock context id of the host, as every guest sees it (`VMADDR_CID_HOST`, linux/vm_sockets.h).
pub const HOST_CID: u32 = 2;

/// vsock context id of the guest. Every machine has a vsock device to itself, so all can have the same one.
pub const GUEST_CID: u32 = 3;

/// Tag of the fs device that carries all shares of the pod.
pub const SHARES_TAG: &str = "hull";

/// Where the agent mounts the fs device. Each share is a directory in it, named as the host named it.
pub const SHARES_DIR: &str = "/run/hull/shares";
