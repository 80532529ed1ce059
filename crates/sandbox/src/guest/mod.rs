//! A guest from its start to its end: its processes on the host, its boot, its agent and its
//! devices, and the streams of processes in it.
//!
//! | module | what |
//! | --- | --- |
//! | `processes` | device process and machine: started, watched, paused |
//! | `supervise` | which of them failed, judged by how they ended |
//! | `boot` | from a started machine to an agent that answers |
//! | `agent` | calls into the guest |
//! | `connection` | the connection that they go over, which may break and come back |
//! | `answers` | what an answer may cost, and the client that looks |
//! | `events` | what the agent reports by itself |
//! | `streams` | the streams of one process |
//! | `hub` | the streams of an init that has a log and several clients |

pub(crate) mod agent;
mod answers;
pub(crate) mod boot;
mod connection;
pub(crate) mod events;
pub(crate) mod hub;
pub(crate) mod processes;
pub(crate) mod streams;
mod supervise;

pub(crate) use agent::{Agent, address_bytes};
pub(crate) use hull_device_control::{DeviceControl as Devices, Incoming};

/// The guest's connections to the host, by what they are for.
pub(crate) struct Dials {
    /// The agent's.
    pub agent: Incoming,
    /// Requests for sockets of the host.
    pub sockets: Incoming,
}

impl Dials {
    /// The ports, in the order of [`Dials::new`].
    pub const PORTS: [u32; 2] = [hull_protocol::AGENT_PORT, hull_protocol::SOCKETS_PORT];

    pub fn new([agent, sockets]: [Incoming; 2]) -> Self {
        Self { agent, sockets }
    }
}
