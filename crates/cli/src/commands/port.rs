//! `hull port`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use hull_engine::container;
use hull_network::cni::PortMapping;

use super::config_for_existing;
use crate::error::{Error, Result};
use crate::output;

/// Arguments of `port`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Show only what leads to this port
    #[arg(value_name = "PORT[/PROTOCOL]")]
    port: Option<String>,
}

/// Where a port of the host is.
pub fn outside(port: &PortMapping) -> SocketAddr {
    let address = port.host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    SocketAddr::new(address, port.host_port)
}

/// Prints which ports of the host lead to which of a running container.
pub fn execute(args: Args) -> Result<u8> {
    let container = container::find(&config_for_existing()?.paths(), &args.container)?;
    let details = &container.record.details;
    if container::is_idle(&container) {
        return Err(container::not_running(
            &details.name,
            container.status.state,
        ));
    }
    let inside = |port: &PortMapping| format!("{}/{}", port.container_port, port.protocol.name());
    let Some(wanted) = &args.port else {
        let lines = details
            .ports
            .iter()
            .map(|port| format!("{} -> {}\n", inside(port), outside(port)));
        output::print(lines.collect::<String>())?;
        return Ok(0);
    };
    let wanted = match wanted.contains('/') {
        true => wanted.clone(),
        false => format!("{wanted}/tcp"),
    };
    let lines: Vec<String> = details
        .ports
        .iter()
        .filter(|port| inside(port) == wanted)
        .map(|port| format!("{}\n", outside(port)))
        .collect();
    if lines.is_empty() {
        return Err(Error::not_found(format!(
            "no port of the host leads to {wanted} of container {}",
            details.name
        ))
        .hint(format!("hull port {} lists all", args.container)));
    }
    output::print(lines.concat())?;
    Ok(0)
}
