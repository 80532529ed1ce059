//! A network namespace of hull's own, attached to a network: by CNI plugins, which make things
//! outside of it that have to be undone, or by pasta, of which nothing remains.
//!
//! The sandbox keeps the namespace, which nothing else holds: it is gone with the sandbox process.
//! What plugins made outside of it, leases and rules of packet filters, is written down before it
//! is made, in the directory of the container that it is for, and [`undo`] takes it back: the
//! sandbox when that container ends, or, when its process was killed, who removes the container.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use hull_network::cni::{Attachment, List, Record, Runner};
use hull_network::pasta::Pasta;
use hull_network::{Namespace, Netlink, forwarding, guard, masquerade};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, flock};
use tokio::task::JoinHandle;

use super::published::Published;
use crate::config::{CniConfig, MAX_NETS, NetworkAddresses, OwnNetwork, PastaConfig};
use crate::error::{Context, Error, Result};
use crate::store::Directory;

/// The name of the interface in a network, in the namespace and in the guest.
fn interface(index: usize) -> String {
    format!("eth{index}")
}

/// The file with what plugins of a network made, or are about to make, as long as it is not undone.
fn file(index: usize) -> String {
    match index {
        0 => "network.json".to_owned(),
        further => format!("network-{further}.json"),
    }
}

/// Networks of one namespace.
const MOST: usize = MAX_NETS as usize;

/// A namespace that is attached to a network. Dropping it detaches nothing: see
/// [`Attached::detach`].
#[derive(Debug)]
pub struct Attached {
    /// The namespace. It lives as long as something holds it.
    pub namespace: Namespace,
    /// What each network gave it; the first one leads outside.
    pub networks: Vec<NetworkAddresses>,
    /// Sockets that keep others from the published ports.
    ports: Published,
    /// Where it is written down what plugins are to undo.
    undo: Option<Directory>,
    /// Holds pasta until it is aborted.
    pasta: Option<JoinHandle<()>>,
}

/// Attaches a new namespace by plugins, which are stopped when `cancelled` is done.
///
/// # Errors
/// A plugin fails: then everything is undone, or what is not stays written down for [`undo`].
pub async fn by_plugins(
    config: CniConfig,
    ports: Vec<OwnedFd>,
    directory: Directory,
    cancelled: impl Future<Output = ()>,
) -> Result<Attached> {
    let cancel = eventfd(0, EventfdFlags::CLOEXEC).context(|| "create an event")?;
    let cancel = Arc::new(cancel);
    let undo = directory.try_clone()?;
    let mut task = {
        let (cancel, config) = (cancel.clone(), config.clone());
        tokio::task::spawn_blocking(move || run_plugins(&config, &directory, cancel))
    };
    let done = tokio::select! {
        done = &mut task => done,
        () = cancelled => {
            if let Err(error) = rustix::io::write(&*cancel, &1u64.to_ne_bytes()) {
                tracing::error!("cannot end network plugins: {error}");
            }
            task.await
        }
    };
    let (namespace, networks) = done.context(|| "attach the network")??;
    let own: &[IpAddr] = networks.first().map_or(&[], |first| &first.addresses);
    Ok(Attached {
        namespace,
        ports: Published::new(ports, &config.ports, own),
        networks,
        undo: Some(undo),
        pasta: None,
    })
}

/// Blocks as long as plugins take, or until `cancel` is readable.
fn run_plugins(
    config: &CniConfig,
    directory: &Directory,
    cancel: Arc<OwnedFd>,
) -> Result<(Namespace, Vec<NetworkAddresses>)> {
    let namespace = Namespace::new()?;
    let netns = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        namespace.as_fd().as_raw_fd()
    );
    let runner = Runner {
        cancel: Some(cancel),
        held: Some(Arc::new(hold(directory)?)),
        ..Runner::default()
    };
    let first = Attachment {
        container_id: config.id.clone(),
        netns: netns.clone().into(),
        ifname: interface(0),
        port_mappings: config.ports.clone(),
        ips: config.ips.clone(),
        mac: config.mac,
        ..Attachment::default()
    };
    let mut networks = vec![(&config.list, &config.own, first)];
    for (index, further) in config.further.iter().enumerate() {
        let attachment = Attachment {
            container_id: config.id.clone(),
            netns: netns.clone().into(),
            ifname: interface(index + 1),
            ips: further.ips.clone(),
            mac: further.mac,
            ..Attachment::default()
        };
        networks.push((&further.list, &further.own, attachment));
    }
    let mut given = Vec::new();
    for (index, (list, own, attachment)) in networks.into_iter().enumerate() {
        let attached = attach(list, own.as_ref(), attachment, &runner, |record| {
            let text = serde_json::to_vec(record).context(|| "encode the network's record")?;
            directory.write(&file(index), &text)
        });
        match attached {
            Ok(addresses) => given.push(addresses),
            Err(error) => {
                for done in (0..index).rev() {
                    if let Err(error) = undo_one(directory, done) {
                        tracing::error!("{error}");
                    }
                }
                return Err(error);
            }
        }
    }
    Ok((namespace, given))
}

/// Attaches a namespace to one network. `keep` writes down what is to be undone.
fn attach(
    list: &List,
    own: Option<&OwnNetwork>,
    attachment: Attachment,
    runner: &Runner,
    keep: impl Fn(&Record) -> Result<()>,
) -> Result<NetworkAddresses> {
    let mut record = Record::new(list.clone(), attachment)?;
    // What is not there cannot undo anything either.
    runner.require(list)?;
    if let Some(own) = own {
        for subnet in own.subnets.iter().filter(|_| !own.internal) {
            let all = if subnet.ip.is_ipv4() { 32 } else { 128 };
            let prefix = subnet.prefix.unwrap_or(all);
            masquerade::ensure(list.name(), &own.bridge, subnet.ip, prefix)?;
        }
        guard::ensure(list.name(), &own.bridge)?;
        let ipv6 = own.subnets.iter().any(|subnet| subnet.ip.is_ipv6());
        forwarding::ensure(&own.bridge, ipv6, own.internal)?;
    }
    keep(&record)?;
    let result = record.add_and_keep(runner, &mut |record| {
        keep(record).map_err(|error| error.message)
    })?;
    Ok(NetworkAddresses {
        addresses: result.ips.iter().map(|ip| ip.address.ip).collect(),
        gateways: result.ips.iter().filter_map(|ip| ip.gateway).collect(),
    })
}

/// Takes the lock of a container's directory that its plugins inherit.
fn hold(directory: &Directory) -> Result<OwnedFd> {
    let doing = || format!("lock {}", directory.path().display());
    let lock = directory.reopen().context(doing)?;
    rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive)).context(doing)?;
    Ok(lock)
}

/// Waits until no process of plugins has the lock of a container's directory. Plugins die with the
/// sandbox process, but what they started, such as iptables, comes to its end.
fn wait_for_plugins(directory: &Directory) -> Result<()> {
    /// Some plugins start a process that stays.
    const TIMEOUT: Duration = Duration::from_secs(10);
    let doing = || format!("lock {}", directory.path().display());
    let lock = directory.reopen().context(doing)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(());
    }
    let (sender, free) = mpsc::channel();
    std::thread::spawn(move || {
        let taken = rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive));
        // Nobody waits any more after the timeout.
        let _ = sender.send(taken);
    });
    match free.recv_timeout(TIMEOUT) {
        Ok(taken) => taken.context(doing),
        Err(_) => {
            tracing::debug!("processes of network plugins still run");
            Ok(())
        }
    }
}

/// Attaches a new namespace to the host's network as an ordinary program is.
///
/// # Errors
/// There is no pasta, or it fails.
pub async fn by_pasta(config: &PastaConfig) -> Result<Attached> {
    let namespace = Namespace::new()?;
    let pasta = Pasta::start(&namespace, &config.ports, config.mac)?;
    pasta.ready().await?;
    let netlink = Netlink::open(&namespace)?;
    let interfaces = netlink.describe().await?.interfaces;
    let addresses = interfaces
        .iter()
        .flat_map(|interface| &interface.addresses)
        .map(|address| address.address)
        .filter(|address| !is_link_local(address))
        .collect();
    Ok(Attached {
        namespace,
        networks: vec![NetworkAddresses {
            addresses,
            gateways: Vec::new(),
        }],
        // Pasta has them.
        ports: Published::default(),
        undo: None,
        pasta: Some(tokio::spawn(keep(pasta))),
    })
}

/// Keeps pasta running, and says so if it ends by itself.
async fn keep(pasta: Pasta) {
    let said = pasta.ended().await;
    tracing::error!("the network is gone: pasta has ended: {said}");
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

impl Attached {
    /// What all networks gave it.
    pub fn addresses(&self) -> NetworkAddresses {
        let mut all = NetworkAddresses::default();
        for network in &self.networks {
            all.addresses.extend(&network.addresses);
            all.gateways.extend(&network.gateways);
        }
        all
    }

    /// Lets go of published ports, and has plugins undo what they made. What they cannot is tried
    /// again by the removal of the container.
    pub async fn detach(self) {
        self.ports.end().await;
        if let Some(pasta) = self.pasta {
            pasta.abort();
            // It was aborted.
            let _ = pasta.await;
        }
        if let Some(directory) = self.undo {
            match tokio::task::spawn_blocking(move || undo(&directory)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("{error}"),
                Err(error) => tracing::error!("cannot detach the network: {error}"),
            }
        }
        // Plugins know it by this process's descriptor.
        drop(self.namespace);
    }
}

/// Whether something is written down of an attachment that is to be undone.
pub fn is_attached(directory: &Directory) -> bool {
    // What cannot be read is not nothing.
    (0..MOST).any(|index| !matches!(directory.read(&file(index)), Ok(None)))
}

/// What is written down of the attachments in a container's directory, with the results of their
/// plugins: one for each network, in their order.
///
/// # Errors
/// One cannot be read.
pub fn records(directory: &Directory) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for index in 0..MOST {
        match record(directory, index)? {
            Some(record) => records.push(record),
            None => break,
        }
    }
    Ok(records)
}

fn record(directory: &Directory, index: usize) -> Result<Option<Record>> {
    let file = file(index);
    let Some(text) = directory.read(&file)? else {
        return Ok(None);
    };
    let record = serde_json::from_slice(&text).map_err(|error| {
        let path = directory.path().join(file);
        Error::new(format!("cannot understand {}: {error}", path.display()))
    })?;
    Ok(Some(record))
}

/// Undoes what is written down of attachments in a container's directory, if anything is.
///
/// # Errors
/// A plugin fails, or a record cannot be read; it may be tried again.
pub fn undo(directory: &Directory) -> Result<()> {
    let undone = (0..MOST).rev().map(|index| undo_one(directory, index));
    // One that fails does not keep the others.
    let failures: Vec<Error> = undone.filter_map(Result::err).collect();
    failures.into_iter().next().map_or(Ok(()), Err)
}

fn undo_one(directory: &Directory, index: usize) -> Result<()> {
    let Some(record) = record(directory, index)? else {
        return Ok(());
    };
    if !record.attached {
        // What they add after DEL would stay.
        wait_for_plugins(directory)?;
    }
    record.del(&Runner::default())?;
    directory.remove_file(&file(index))
}
