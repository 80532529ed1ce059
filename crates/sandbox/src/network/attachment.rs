//! A network namespace of hull's own, attached to a network: by CNI plugins, which make things
//! outside of it that have to be undone, or by pasta, of which nothing remains.
//!
//! The sandbox keeps the namespace, which nothing else holds: it is gone with the sandbox process.
//! What plugins made outside of it, leases and rules of packet filters, is written down before it
//! is made, in the directory of the container that it is for, and [`undo`] takes it back: the
//! sandbox when that container ends, or, when its process was killed, who removes the container.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use hull_network::cni::{Attachment, CniResult, PortMapping, Record, Runner};
use hull_network::pasta::Pasta;
use hull_network::{Namespace, Netlink, forwarding, guard, masquerade};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FlockOperation, flock};
use tokio::task::JoinHandle;

use super::published::Published;
use crate::config::{CniConfig, CniNetwork, MAX_NETS, NetworkAddresses, OwnNetwork, PastaConfig};
use crate::error::{Context, Error, Result};
use crate::store::Directory;

/// The name of the interface in a network, in the namespace and in the guest.
pub(super) fn interface(index: usize) -> String {
    format!("eth{index}")
}

/// The file with what plugins of a network made, or are about to make, as long as it is not undone.
pub(super) fn file(index: usize) -> String {
    match index {
        0 => "network.json".to_owned(),
        further => format!("network-{further}.json"),
    }
}

/// The same of published ports that lead to another network than the one they were published with.
pub(super) const PORTS_FILE: &str = "network-ports.json";

/// Networks of one namespace.
pub(super) const MOST: usize = MAX_NETS as usize;

/// All files, in the order in which what they say is undone.
fn files() -> impl Iterator<Item = String> {
    let networks = (0..MOST).rev().map(file);
    std::iter::once(PORTS_FILE.to_owned()).chain(networks)
}

/// A namespace that is attached to networks. Dropping it detaches nothing: see
/// [`Attached::detach`].
#[derive(Debug)]
pub struct Attached {
    /// The namespace. It lives as long as something holds it.
    pub namespace: Namespace,
    /// Its networks, as their configuration lists them.
    pub(super) networks: Vec<Joined>,
    /// Sockets that keep others from the published ports.
    pub(super) ports: Published,
    /// The interface that published ports lead to.
    pub(super) published_on: Option<usize>,
    /// Where it is written down what plugins are to undo.
    pub(super) undo: Option<Directory>,
    /// Holds pasta until it is aborted.
    pasta: Option<JoinHandle<()>>,
}

/// A network of a namespace.
#[derive(Debug, Clone)]
pub struct Joined {
    /// The number of its interface.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// What it gave the namespace.
    pub addresses: NetworkAddresses,
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
    let namespace = Namespace::new()?;
    let undo = directory.try_clone()?;
    let (config, networks) = {
        let namespace = namespace.clone();
        let work = move |cancel| {
            let plugins = Plugins::new(&namespace, &config.id, &directory, cancel)?;
            let joined = plugins.attach_all(&config)?;
            Ok((config, joined))
        };
        cancellable(cancelled, work).await?
    };
    let published_on = config.publishes();
    let on = published_on.and_then(|index| networks.get(index));
    let own: &[IpAddr] = on.map_or(&[], |on| &on.addresses.addresses);
    let attached = Attached {
        ports: Published::new(ports, &config.ports, own),
        published_on,
        namespace,
        networks,
        undo: Some(undo),
        pasta: None,
    };
    if config.networks.len() > 1
        && let Err(error) = attached.lead_outside(&config.networks).await
    {
        attached.detach().await;
        return Err(error);
    }
    Ok(attached)
}

/// Does blocking work that plugins take part in. They end when `cancelled` is done.
pub(super) async fn cancellable<T: Send + 'static>(
    cancelled: impl Future<Output = ()>,
    work: impl FnOnce(Arc<OwnedFd>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let cancel = eventfd(0, EventfdFlags::CLOEXEC).context(|| "create an event")?;
    let cancel = Arc::new(cancel);
    let mut task = {
        let cancel = cancel.clone();
        tokio::task::spawn_blocking(move || work(cancel))
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
    done.context(|| "attach the network")?
}

/// Runs plugins for a namespace. Its functions block.
#[derive(Debug)]
pub(super) struct Plugins<'a> {
    netns: PathBuf,
    container: &'a str,
    directory: &'a Directory,
    runner: Runner,
}

impl<'a> Plugins<'a> {
    /// Runs them for a container, in whose directory it is written down what they are to undo; they
    /// end when `cancel` is readable.
    ///
    /// # Errors
    /// The directory cannot be locked.
    pub(super) fn new(
        namespace: &Namespace,
        container: &'a str,
        directory: &'a Directory,
        cancel: Arc<OwnedFd>,
    ) -> Result<Self> {
        let fd = namespace.as_fd().as_raw_fd();
        // What earlier ones have left behind that stays is in nobody's way.
        let held = lock_of_plugins(directory)?;
        Ok(Self {
            netns: format!("/proc/{}/fd/{fd}", std::process::id()).into(),
            container,
            directory,
            runner: Runner {
                cancel: Some(cancel),
                held: held.map(Arc::new),
                ..Runner::default()
            },
        })
    }

    fn attach_all(&self, config: &CniConfig) -> Result<Vec<Joined>> {
        let mut joined = Vec::new();
        let publishes = config.publishes();
        for (index, network) in config.networks.iter().enumerate() {
            let ports = match publishes == Some(index) {
                true => &config.ports[..],
                false => &[],
            };
            match self.attach(index, network, ports) {
                Ok(one) => joined.push(one),
                Err(error) => {
                    for done in (0..index).rev() {
                        if let Err(error) = undo_one(self.directory, &file(done)) {
                            tracing::error!("{error}");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(joined)
    }

    /// Attaches the namespace to one network.
    ///
    /// # Errors
    /// A plugin fails: then it is undone, or what is not stays written down.
    pub(super) fn attach(
        &self,
        index: usize,
        network: &CniNetwork,
        ports: &[PortMapping],
    ) -> Result<Joined> {
        let CniNetwork { list, own, .. } = network;
        let attachment = Attachment {
            ips: network.ips.clone(),
            mac: network.mac,
            ..self.attachment(index, ports)
        };
        let record = Record::new(list.clone(), attachment)?;
        // What is not there cannot undo anything either.
        self.runner.require(list)?;
        if let Some(own) = own {
            admit(list.name(), own)?;
        }
        let result = self.add(record, &file(index))?;
        Ok(Joined {
            index,
            name: list.name().to_owned(),
            addresses: NetworkAddresses {
                addresses: result.ips.iter().map(|ip| ip.address.ip).collect(),
                gateways: result.ips.iter().filter_map(|ip| ip.gateway).collect(),
            },
        })
    }

    /// Leads published ports to a network that the namespace is in.
    ///
    /// # Errors
    /// A plugin fails: then it is undone, or what is not stays written down.
    pub(super) fn publish(&self, network: &Joined, ports: &[PortMapping]) -> Result<()> {
        let missing = || Error::new(format!("network {}: it has no record", network.name));
        let there = record(self.directory, &file(network.index))?.ok_or_else(missing)?;
        let mut list = hull_network::cni::published_ports(&network.name)?;
        // The sandbox process serves these.
        list.leave_out_ipv6_loopback();
        let record = Record::new(list, self.attachment(network.index, ports))?;
        let record = record.upon(there.result.ok_or_else(missing)?);
        self.add(record, PORTS_FILE).map(drop)
    }

    fn attachment(&self, index: usize, ports: &[PortMapping]) -> Attachment {
        Attachment {
            container_id: self.container.to_owned(),
            netns: self.netns.clone(),
            ifname: interface(index),
            port_mappings: ports.to_vec(),
            ..Attachment::default()
        }
    }

    /// Runs the plugins of a record, which is written down before and after each.
    fn add(&self, mut record: Record, file: &str) -> Result<CniResult> {
        let keep = |record: &Record| {
            let text = serde_json::to_vec(record).context(|| "encode the network's record")?;
            self.directory.write(file, &text)
        };
        keep(&record)?;
        let result = record.add_and_keep(&self.runner, &mut |record| {
            keep(record).map_err(|error| error.message)
        })?;
        Ok(result.clone())
    }
}

/// Makes the host's packet filter let through what a network of hull's own needs.
fn admit(name: &str, own: &OwnNetwork) -> Result<()> {
    for subnet in own.subnets.iter().filter(|_| !own.internal) {
        let all = if subnet.ip.is_ipv4() { 32 } else { 128 };
        let prefix = subnet.prefix.unwrap_or(all);
        masquerade::ensure(name, &own.bridge, subnet.ip, prefix)?;
    }
    guard::ensure(name, &own.bridge)?;
    let ipv6 = own.subnets.iter().any(|subnet| subnet.ip.is_ipv6());
    forwarding::ensure(&own.bridge, ipv6, own.internal)?;
    Ok(())
}

/// Takes the lock of a container's directory, which its plugins inherit. Plugins die with the
/// sandbox process, but what they started, such as iptables, comes to its end; that is waited for.
/// `None` when some of it stays.
fn lock_of_plugins(directory: &Directory) -> Result<Option<OwnedFd>> {
    /// Some plugins start a process that stays.
    const TIMEOUT: Duration = Duration::from_secs(10);
    let doing = || format!("lock {}", directory.path().display());
    let lock = directory.reopen().context(doing)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(Some(lock));
    }
    let (sender, free) = mpsc::channel();
    std::thread::spawn(move || {
        let taken = rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive));
        // Nobody waits any more after the timeout.
        let _ = sender.send(taken.map(|()| lock));
    });
    match free.recv_timeout(TIMEOUT) {
        Ok(taken) => taken.context(doing).map(Some),
        Err(_) => {
            tracing::debug!("processes of network plugins still run");
            Ok(None)
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
        networks: vec![Joined {
            index: 0,
            name: String::new(),
            addresses: NetworkAddresses {
                addresses,
                gateways: Vec::new(),
            },
        }],
        // Pasta has them.
        ports: Published::default(),
        published_on: None,
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
            all.addresses.extend(&network.addresses.addresses);
            all.gateways.extend(&network.addresses.gateways);
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
    files().any(|file| !matches!(directory.read(&file), Ok(None)))
}

/// What is written down of the attachments in a container's directory, with the results of their
/// plugins: one for each network, in the order of interfaces.
///
/// # Errors
/// One cannot be read.
pub fn records(directory: &Directory) -> Result<Vec<Record>> {
    let records = (0..MOST).map(|index| record(directory, &file(index)));
    records.filter_map(Result::transpose).collect()
}

fn record(directory: &Directory, file: &str) -> Result<Option<Record>> {
    let Some(text) = directory.read(file)? else {
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
    let undone = files().map(|file| undo_one(directory, &file));
    // One that fails does not keep the others.
    let failures: Vec<Error> = undone.filter_map(Result::err).collect();
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// Undoes what is written down in one file, if it is there.
///
/// # Errors
/// As [`undo`].
pub(super) fn undo_one(directory: &Directory, file: &str) -> Result<()> {
    let Some(record) = record(directory, file)? else {
        return Ok(());
    };
    if !record.attached {
        // What they add after DEL would stay.
        lock_of_plugins(directory)?;
    }
    record.del(&Runner::default())?;
    directory.remove_file(file)
}
