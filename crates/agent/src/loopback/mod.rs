//! The guest's loopback interface, as far as it stands for that of the container's network
//! namespace on the host, on which engines have and expect servers: `Forward` and `Resolve` of
//! `agent.proto`. Called by `service`, which holds one [`Loopback`]; nothing here costs anything
//! before the host asks for it.
//!
//! | module | what |
//! | --- | --- |
//! | `port_forward` | a connection made on the host, to one of the guest's own addresses |
//! | `dns_proxy` | questions asked here, to Docker's name server on the host |
//! | `dns_redirect` | redirects these questions to `dns_proxy`; port 53 stays free for containers |

mod dns_proxy;
mod dns_redirect;
mod port_forward;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::MAX_FORWARDS;
use tokio::sync::Semaphore;
use ttrpc::Code;

use crate::io::carry::{HalfClosed, carry};
use crate::io::vsock::Connection;
use crate::network::ip_address;
use crate::rpc::status::{Failure, Result};

/// A forwarded connection may be idle for so long once one direction has ended.
const HALF_CLOSED: HalfClosed = HalfClosed::Idle(Duration::from_secs(300));

/// See the module. One per guest.
pub struct Loopback {
    forwards: Arc<Semaphore>,
}

impl Default for Loopback {
    fn default() -> Self {
        Self {
            forwards: Arc::new(Semaphore::new(MAX_FORWARDS)),
        }
    }
}

impl Loopback {
    /// Connects a stream to a port at an address here; returns when connected.
    pub async fn forward(&self, stream: OwnedFd, port: u32, address: &[u8]) -> Result<()> {
        let address =
            ip_address(address).ok_or_else(|| Failure::invalid("an address has 4 or 16 bytes"))?;
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Failure::invalid(format!("there is no port {port}")))?;
        let place = self.forwards.clone().try_acquire_owned().map_err(|_| {
            let message = format!("{MAX_FORWARDS} connections are forwarded already");
            Failure::new(Code::RESOURCE_EXHAUSTED, message)
        })?;
        let to = SocketAddr::new(address, port);
        let doing = format!("connect to {to} in the guest");
        let failed = |error| Failure::internal(&doing, &error);
        let server = port_forward::connect(to).await.map_err(failed)?;
        let host = connection(stream).map_err(failed)?;
        tokio::spawn(async move {
            carry(host, server, HALF_CLOSED).await;
            drop(place);
        });
        Ok(())
    }

    /// Starts answering questions over a stream.
    pub fn resolve(&self, stream: OwnedFd) -> Result<()> {
        let failed = |error| Failure::internal("stand for the name server of the host", &error);
        dns_proxy::start(connection(stream).map_err(failed)?).map_err(failed)
    }
}

/// A connected socket, ready for reading and writing.
fn connection(socket: OwnedFd) -> std::io::Result<Connection> {
    Connection::new(socket, Arc::default())
}
