//! Descriptors: sockets to the host, the pipes and terminals of processes, and what moves bytes
//! between them. Called by `rpc::service`, `loopback` and `host_sockets`. Knows nothing of
//! containers.

pub mod carry;
pub mod pipes;
pub mod reactor;
pub mod relay;
mod replay;
pub mod streams;
pub mod vsock;
