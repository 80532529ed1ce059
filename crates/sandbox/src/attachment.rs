//! The attachment of a container of hull's own to a network: a network namespace that CNI plugins fill, from before
//! they begin until they have undone everything; or, without root, pasta ([`attach_by_pasta`]), of which nothing remains.
//!
//! The sandbox process attaches ([`attach`]) and keeps the namespace, which nothing else holds: it is gone with the process.
//! What plugins made outside of it, leases and rules of packet filters, is written down before it is made, in the
//! container's directory, and [`undo`] takes it back: the sandbox process at its end, or, when that was killed, whoever
//! removes the container.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use hull_network::cni::{Attachment, Record, Runner};
use hull_network::pasta::Pasta;
use hull_network::{Namespace, Netlink, forwarding, masquerade, ports};

use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;
use crate::record::write_by_rename;
use crate::request::{CniRequest, PastaRequest};

/// The interface's name, in the namespace and in the guest.
const INTERFACE: &str = "eth0";

/// A namespace that is attached to a network.
#[derive(Debug)]
pub struct Attached {
    /// The namespace. It lives as long as something holds it.
    pub namespace: Namespace,
    /// Sockets that keep others from the published ports, on which nothing is received.
    pub ports: Vec<OwnedFd>,
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// The ways out, which are the host's addresses in networks of its own.
    pub gateways: Vec<IpAddr>,
    /// What carries its connections, without root.
    pub pasta: Option<Pasta>,
}

/// Attaches a new namespace to a network. Blocks as long as plugins take, or until `cancel` is readable.
///
/// # Errors
/// A plugin's: then everything is undone, or what is not stays written down for [`undo`].
pub fn attach(
    files: &ContainerPaths,
    id: &str,
    request: &CniRequest,
    cancel: Arc<OwnedFd>,
) -> Result<Attached> {
    let ports = ports::hold(&request.ports).map_err(Failure::new)?;
    let namespace = Namespace::new()?;
    let attachment = Attachment {
        container_id: id.to_owned(),
        netns: format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            namespace.as_fd().as_raw_fd()
        )
        .into(),
        ifname: INTERFACE.into(),
        port_mappings: request.ports.clone(),
        ips: request.ips.clone(),
        mac: request.mac,
        ..Attachment::default()
    };
    let runner = Runner {
        cancel: Some(cancel),
        ..Runner::default()
    };
    let mut record = Record::new(request.list.clone(), attachment)?;
    // What is not there cannot undo anything either.
    runner.require(&request.list)?;
    if let Some(own) = &request.own {
        for subnet in &own.subnets {
            let all = if subnet.ip.is_ipv4() { 32 } else { 128 };
            let prefix = subnet.prefix.unwrap_or(all);
            masquerade::ensure(request.list.name(), &own.bridge, subnet.ip, prefix)?;
        }
        let ipv6 = own.subnets.iter().any(|subnet| subnet.ip.is_ipv6());
        forwarding::ensure(&own.bridge, ipv6)?;
    }
    let keep = |record: &Record| {
        let text = serde_json::to_vec(record).context(|| "encode the network's record".into())?;
        write_by_rename(&files.network(), &text)
    };
    keep(&record)?;
    let result = record.add_and_keep(&runner, &mut |record| {
        keep(record).map_err(|failure| failure.message)
    })?;
    Ok(Attached {
        namespace,
        ports,
        addresses: result.ips.iter().map(|ip| ip.address.ip).collect(),
        gateways: result.ips.iter().filter_map(|ip| ip.gateway).collect(),
        pasta: None,
    })
}

/// Attaches a new namespace to the host's network as an ordinary program is. Call it on a thread that stays; the network is
/// there when the future is done.
///
/// # Errors
/// There is no pasta, or what it says.
pub fn attach_by_pasta(
    request: &PastaRequest,
) -> Result<impl Future<Output = Result<Attached>> + Send + 'static> {
    let namespace = Namespace::new()?;
    let pasta = Pasta::start(&namespace, &request.ports, request.mac)?;
    Ok(async move {
        pasta.ready().await?;
        let netlink = Netlink::open(&namespace)?;
        let interfaces = netlink.describe().await?.interfaces;
        let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
        Ok(Attached {
            addresses: addresses
                .map(|address| address.address)
                .filter(|address| !is_link_local(address))
                .collect(),
            namespace,
            // Pasta has them.
            ports: Vec::new(),
            gateways: Vec::new(),
            pasta: Some(pasta),
        })
    })
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Undoes what is written down of an attachment, if anything is.
///
/// # Errors
/// A plugin's, or that the record cannot be read; it may be tried again.
pub fn undo(files: &ContainerPaths) -> Result<()> {
    let path = files.network();
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(|| format!("read {}", path.display())),
    };
    let record: Record =
        serde_json::from_slice(&text).context(|| format!("understand {}", path.display()))?;
    record.del(&Runner::default())?;
    fs::remove_file(&path).context(|| format!("remove {}", path.display()))
}
