//! A network namespace of the host, mirrored into the guest and kept so.
//!
//! Each interface of the namespace is *mirrored*: a tap in the same namespace gets everything that
//! the interface receives, and the other way round (crate network), and is attached to one of the
//! machine's net devices. Addresses and routes go to the agent. [`Network::open`] does what needs
//! no guest, while that boots; [`Network::configure`] tells the agent; [`Network::follow`] does
//! both again whenever something has changed in the namespace, and before a container starts: since
//! version 28, Docker sets up a network between `create` and `start`. Nothing here reads what a
//! guest sent.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use hull_device_control::{NetOptions, Policy};
use hull_machine::NetDevices;
use hull_network::{
    Description, Interface, Monitor, Namespace, Netlink, Tap, TapOptions, mirror as tc_mirror, tap,
};
use hull_protocol::agent as proto;
use tokio::sync::{mpsc, oneshot};

use super::loopback::Resolver;
use crate::config::NetworkLimits;
use crate::error::{Error, Result};
use crate::guest::{Agent, Devices, address_bytes};

/// The net devices of a machine.
#[derive(Debug, Clone)]
pub struct Nets {
    /// Attaches taps to them.
    pub control: Arc<Devices>,
    /// How many there are.
    pub count: u8,
    /// How the guest gets them.
    pub devices: NetDevices,
    /// The user that taps belong to.
    pub owner: u32,
}

/// A namespace that is connected to a guest.
#[derive(Debug)]
pub struct Network {
    namespace: Namespace,
    netlink: Netlink,
    monitor: Monitor,
    nets: Nets,
    limits: NetworkLimits,
    /// By the interface's index.
    mirrors: BTreeMap<u32, MirroredInterface>,
    /// As it was found last.
    description: Description,
    /// Interfaces that the machine has no devices for.
    left_out: Vec<String>,
    /// What the agent was told last.
    told: Option<proto::SetNetworkRequest>,
    /// For a name server that may be in the namespace.
    resolver: Option<Resolver>,
    requests: Option<Requests>,
}

/// Requests to bring into the guest what the namespace has by now; each is answered.
pub type Requests = mpsc::Receiver<oneshot::Sender<Result<()>>>;

/// What connects an interface with the guest.
#[derive(Debug)]
struct MirroredInterface {
    device: u8,
    tap: Tap,
    interface: Interface,
    options: NetOptions,
}

impl Network {
    /// Connects the interfaces of a namespace with the machine's net devices.
    ///
    /// # Errors
    /// The namespace is the host's own, has more interfaces than the machine, or cannot be
    /// connected.
    pub async fn open(namespace: Namespace, nets: Nets, limits: NetworkLimits) -> Result<Self> {
        if namespace.is_callers_own()? {
            return Err(Error::unsupported(
                "the host's own network: its interfaces cannot be a guest's",
            )
            .hint("give the container a network of its own, or none"));
        }
        if namespace.is_in_use()? {
            return Err(Error::unsupported(
                "a network namespace for two machines: another one is connected with it",
            )
            .hint("containers of one pod share a machine and its network"));
        }
        // Before the first look: what changes after it is noticed.
        let monitor = Monitor::open(&namespace)?;
        let netlink = Netlink::open(&namespace)?;
        let mut network = Self {
            namespace,
            netlink,
            monitor,
            nets,
            limits,
            mirrors: BTreeMap::new(),
            description: Description::default(),
            left_out: Vec::new(),
            told: None,
            resolver: None,
            requests: None,
        };
        network.connect().await?;
        Ok(network)
    }

    /// Takes requests from now on. With a resolver, an engine may set up the namespace at any time:
    /// a name server is looked for now and whenever something has changed.
    pub async fn expect_changes(&mut self, resolver: Option<Resolver>, requests: Requests) {
        (self.resolver, self.requests) = (resolver, Some(requests));
        self.look().await;
    }

    async fn look(&mut self) {
        if let Some(resolver) = &mut self.resolver {
            let mirrors = self.mirrors.values();
            let mirrors: Vec<_> = mirrors
                .map(|mirrored| (&mirrored.interface, mirrored.tap.index))
                .collect();
            resolver.look(&self.netlink, &mirrors).await;
        }
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Whether this is the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_of(&self, namespace: &Namespace) -> Result<bool> {
        Ok(self.namespace.is_same(namespace)?)
    }

    /// Makes the mirrors what the namespace needs.
    async fn connect(&mut self) -> Result<()> {
        let description = self.netlink.describe().await?;
        let before = std::mem::replace(&mut self.description, description);
        for skipped in &self.description.skipped {
            if !before.skipped.contains(skipped) {
                tracing::warn!("{} is left out of the guest: {}", skipped.name, skipped.why);
            }
        }
        let wanted = self.description.interfaces.clone();
        let gone: Vec<u32> = self
            .mirrors
            .keys()
            .filter(|index| wanted.iter().all(|interface| interface.index != **index))
            .copied()
            .collect();
        for index in gone {
            if let Some(mirrored) = self.mirrors.remove(&index) {
                self.nets.control.detach_net(mirrored.device).await?;
            }
        }
        // What is there is adapted whatever there is no room for.
        let (there, new): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|interface| self.mirrors.contains_key(&interface.index));
        for interface in there {
            self.adapt(interface).await?;
        }
        let room = usize::from(self.nets.count).saturating_sub(self.mirrors.len());
        let excess: Vec<String> = new
            .iter()
            .skip(room)
            .map(|interface| interface.name.clone())
            .collect();
        for interface in new.into_iter().take(room) {
            self.add(interface).await?;
        }
        self.leave_out(excess)
    }

    /// Interfaces that the machine has no devices for: at the start an error, later a warning,
    /// once.
    fn leave_out(&mut self, excess: Vec<String>) -> Result<()> {
        let of = |route: &Option<String>| route.as_ref().is_some_and(|name| excess.contains(name));
        self.description
            .interfaces
            .retain(|interface| !excess.contains(&interface.name));
        self.description
            .routes
            .retain(|route| !of(&route.interface));
        self.description
            .neighbours
            .retain(|entry| !excess.contains(&entry.interface));
        let news = excess != self.left_out;
        self.left_out = excess;
        if self.left_out.is_empty() || !news {
            return Ok(());
        }
        let message = format!(
            "interface {}: the machine was started for {} at most",
            self.left_out.join(", "),
            self.nets.count
        );
        match self.told {
            None => Err(Error::unsupported(message)),
            Some(_) => {
                tracing::warn!("not supported: {message}");
                Ok(())
            }
        }
    }

    async fn add(&mut self, interface: Interface) -> Result<()> {
        let taken: Vec<u8> = self
            .mirrors
            .values()
            .map(|mirrored| mirrored.device)
            .collect();
        let Some(device) = (0..self.nets.count).find(|device| !taken.contains(device)) else {
            return Err(Error::new("all net devices of the machine are in use"));
        };
        let options = TapOptions {
            owner: Some(self.nets.owner),
            group: Some(self.nets.owner),
            ..TapOptions::default()
        };
        let tap = Tap::create(&self.namespace, &self.netlink, &interface, &options).await?;
        let options = self.options(&interface);
        self.nets
            .control
            .attach_net(device, tap.fd.as_fd(), options.clone())
            .await?;
        tc_mirror::connect(&self.netlink, &interface, tap.index).await?;
        let mirrored = MirroredInterface {
            device,
            tap,
            interface,
            options,
        };
        self.mirrors.insert(mirrored.interface.index, mirrored);
        Ok(())
    }

    /// Adapts a mirrored to an interface that has changed.
    async fn adapt(&mut self, interface: Interface) -> Result<()> {
        let options = self.options(&interface);
        let Some(mirrored) = self.mirrors.get_mut(&interface.index) else {
            return Ok(());
        };
        if mirrored.options != options {
            self.nets
                .control
                .change_net(mirrored.device, options.clone())
                .await?;
            mirrored.options = options;
        }
        if mirrored.interface.mtu != interface.mtu {
            tap::set_mtu(&self.netlink, mirrored.tap.index, &interface).await?;
        }
        mirrored.interface = interface;
        Ok(())
    }

    fn options(&self, interface: &Interface) -> NetOptions {
        let addresses = || {
            interface
                .addresses
                .iter()
                .map(|address| address.address)
                .collect()
        };
        NetOptions {
            policy: self.limits.filter.then(|| Policy {
                mac: interface.mac,
                addresses: addresses(),
                link_local: self.limits.link_local,
            }),
            rate: self.limits.rate,
        }
    }

    /// Tells the guest, if there is something to tell.
    ///
    /// # Errors
    /// The agent's.
    pub async fn configure(&mut self, agent: &Agent) -> Result<()> {
        let request = self.message();
        // A guest that has devices since it booted hides those that nothing leads to.
        let has_devices =
            self.nets.count > 0 && matches!(self.nets.devices, NetDevices::AtBoot { .. });
        let nothing = self.told.is_none() && request.interfaces.is_empty() && !has_devices;
        if nothing || self.told.as_ref() == Some(&request) {
            return Ok(());
        }
        agent.set_network(&request).await?;
        self.told = Some(request);
        Ok(())
    }

    /// Keeps the guest's network what the namespace is, until `end`: then the namespace is as it
    /// was before.
    pub async fn follow(mut self: Box<Self>, agent: Agent, end: impl Future<Output = ()>) {
        tokio::select! {
            () = self.follow_changes(&agent) => {}
            () = end => {}
        }
        self.disconnect().await;
    }

    /// Leaves the namespace as it was before: taps are about to go when this is done.
    pub async fn disconnect(&mut self) {
        for mirrored in self.mirrors.values() {
            if let Err(error) = tc_mirror::disconnect(&self.netlink, &mirrored.interface).await {
                tracing::warn!("{error}");
            }
            // A device process that has ended has let go of it.
            let _ = self.nets.control.detach_net(mirrored.device).await;
        }
        if let Some(resolver) = &self.resolver {
            resolver.leave();
        }
        // Closing a tap waits for a grace period of the host's kernel (RCU), 20 ms: others wait for
        // us.
        let mirrors = std::mem::take(&mut self.mirrors);
        let closing = std::thread::Builder::new().spawn(move || drop(mirrors));
        if let Err(error) = closing {
            // Then they are closed, and it was waited for.
            tracing::debug!("no thread to close taps: {error}");
        }
    }

    async fn follow_changes(&mut self, agent: &Agent) {
        let mut monitored = true;
        loop {
            let request = tokio::select! {
                changed = self.monitor.changed(), if monitored => {
                    if let Err(error) = changed {
                        tracing::error!("changes of the network are not followed any more: {error}");
                        monitored = false;
                    }
                    None
                }
                request = next_request(&mut self.requests) => Some(request),
            };
            let followed = match self.connect().await {
                Ok(()) => self.configure(agent).await,
                Err(failure) => Err(failure),
            };
            self.look().await;
            match (request, followed) {
                // The requester may have gone.
                (Some(request), followed) => drop(request.send(followed)),
                (None, Err(failure)) => {
                    tracing::error!("a change of the network does not reach the guest: {failure}");
                }
                (None, Ok(())) => {}
            }
        }
    }

    fn message(&self) -> proto::SetNetworkRequest {
        let optional =
            |address: &Option<IpAddr>| address.as_ref().map(address_bytes).unwrap_or_default();
        let interfaces = self.mirrors.values().map(|mirrored| proto::Interface {
            device: mirrored.device.into(),
            name: mirrored.interface.name.clone(),
            mac: mirrored.interface.mac.to_vec(),
            mtu: mirrored.interface.mtu,
            addresses: mirrored
                .interface
                .addresses
                .iter()
                .map(|address| proto::Address {
                    address: address_bytes(&address.address),
                    prefix_length: address.prefix_length.into(),
                    scope: address.scope.into(),
                    peer: optional(&address.peer),
                    no_prefix_route: address.no_prefix_route,
                    ..Default::default()
                })
                .collect(),
            plug: self
                .nets
                .devices
                .hotplug_parameter(mirrored.device)
                .unwrap_or_default(),
            ..Default::default()
        });
        let routes = self.description.routes.iter().map(|route| proto::Route {
            interface: route.interface.clone().unwrap_or_default(),
            destination: match route.is_default() {
                true => Vec::new(),
                false => address_bytes(&route.destination),
            },
            prefix_length: route.prefix_length.into(),
            gateway: optional(&route.gateway),
            source: optional(&route.source),
            metric: route.metric,
            scope: route.scope.into(),
            on_link: route.on_link,
            type_: u32::from(route.kind as u8),
            mtu: route.mtu,
            family: route.family().into(),
            ..Default::default()
        });
        let neighbours = self
            .description
            .neighbours
            .iter()
            .map(|entry| proto::Neighbour {
                interface: entry.interface.clone(),
                address: address_bytes(&entry.address),
                mac: entry.mac.to_vec(),
                ..Default::default()
            });
        proto::SetNetworkRequest {
            interfaces: interfaces.collect(),
            routes: routes.collect(),
            neighbours: neighbours.collect(),
            ..Default::default()
        }
    }
}

async fn next_request(requests: &mut Option<Requests>) -> oneshot::Sender<Result<()>> {
    if let Some(requests) = requests
        && let Some(request) = requests.recv().await
    {
        return request;
    }
    std::future::pending().await
}
