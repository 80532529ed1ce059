//! The sandbox process: what owns a machine and the containers in it, from request to end.
//!
//! There are two kinds, which share everything but their life: [`single`] runs one container of hull's own, with its
//! log and its clients; [`pod`] runs containers for engines, one or more in one machine, and leaves their streams to
//! keepers. What is where:
//!
//! | module | what |
//! | --- | --- |
//! | `guest` | device process and machine, and their end |
//! | `supervise` | which of the two failed |
//! | `boot` | from a started machine to an agent that answers |
//! | `mounts` | root file systems and volumes on the host |
//! | `devices` | shares, net devices and vsock streams |
//! | `network` | a network namespace of the host, brought into the guest |
//! | `loopback` | what engines have and expect on the namespace's loopback interface |
//! | `agent` | calls into the guest |
//! | `single`, `container`, `server`, `output`, `etc` | one container of hull's own, its clients, its output, its names |
//! | `pod` | containers of engines |
//! | `streams` | the streams of one process |

pub mod agent;
mod boot;
mod container;
mod devices;
mod etc;
mod guest;
mod host_memory;
mod init;
mod loopback;
mod mounts;
mod network;
mod output;
pub mod pod;
mod server;
pub mod single;
mod streams;
mod supervise;
mod watch;
