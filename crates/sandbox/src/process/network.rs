//! The network of a guest: what is in a network namespace of the host, brought into the guest and kept so.
//!
//! For each interface of the namespace there is a *cable*: a tap in the same namespace, which gets everything that the
//! interface receives, and the other way round (crate network), attached to one of the machine's net devices. Addresses
//! and routes go to the agent. [`Network::open`] does what needs no guest, while that boots; [`Network::configure`] tells
//! the agent; [`Network::follow`] does both again whenever something has changed in the namespace.
//!
//! Called by the lives of sandbox processes. Nothing here reads what a guest sent.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use hull_devices::net::NetOptions;
use hull_devices::net::filter::Policy;
use hull_machine::NetDevices;
use hull_network::{
    Description, Interface, Monitor, Namespace, Netlink, Tap, TapOptions, mirror, tap,
};
use hull_protocol::agent as proto;
use tokio::sync::{mpsc, oneshot};

use super::agent::Agent;
use super::devices::Devices;
use super::loopback::Resolver;
use crate::error::{Failure, Result};
use crate::request::NetworkLimits;

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
    cables: BTreeMap<u32, Cable>,
    /// As it was found last.
    description: Description,
    /// Interfaces that the machine has no devices for.
    left_out: Vec<String>,
    /// What the agent was told last.
    told: Option<proto::SetNetworkRequest>,
    /// For a name server that may be in the namespace.
    resolver: Option<Resolver>,
    looks: Option<Looks>,
}

/// Wishes that a name server be looked for; each is told when that is done.
pub type Looks = mpsc::Receiver<oneshot::Sender<()>>;

/// What connects an interface with the guest.
#[derive(Debug)]
struct Cable {
    device: u8,
    tap: Tap,
    interface: Interface,
    options: NetOptions,
}

impl Network {
    /// Connects the interfaces of a namespace with the machine's net devices.
    ///
    /// # Errors
    /// The namespace is the host's own, has more interfaces than the machine, or cannot be connected.
    pub async fn open(namespace: Namespace, nets: Nets, limits: NetworkLimits) -> Result<Self> {
        if namespace.is_callers_own()? {
            return Err(Failure::new(
                "not supported: the host's own network: its interfaces cannot be a guest's",
            )
            .hint("give the container a network of its own, or none"));
        }
        if namespace.is_in_use()? {
            return Err(Failure::new(
                "not supported: a network namespace for two machines: another one is connected with it",
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
            cables: BTreeMap::new(),
            description: Description::default(),
            left_out: Vec::new(),
            told: None,
            resolver: None,
            looks: None,
        };
        network.connect().await?;
        Ok(network)
    }

    /// Looks for a name server now, whenever something has changed, and whenever it is wished.
    pub async fn look_for(&mut self, resolver: Resolver, looks: Looks) {
        (self.resolver, self.looks) = (Some(resolver), Some(looks));
        self.look().await;
    }

    async fn look(&mut self) {
        if let Some(resolver) = &mut self.resolver {
            let cables = self.cables.values();
            let cables: Vec<_> = cables
                .map(|cable| (&cable.interface, cable.tap.index))
                .collect();
            resolver.look(&self.netlink, &cables).await;
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

    /// Makes the cables what the namespace needs.
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
            .cables
            .keys()
            .filter(|index| wanted.iter().all(|interface| interface.index != **index))
            .copied()
            .collect();
        for index in gone {
            if let Some(cable) = self.cables.remove(&index) {
                self.nets.control.detach_net(cable.device).await?;
            }
        }
        // What is there is adapted whatever there is no room for.
        let (there, new): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|interface| self.cables.contains_key(&interface.index));
        for interface in there {
            self.adapt(interface).await?;
        }
        let room = usize::from(self.nets.count).saturating_sub(self.cables.len());
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

    /// Interfaces that the machine has no devices for: at the start an error, later a warning, once.
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
            "not supported: interface {}: the machine was started for {} at most",
            self.left_out.join(", "),
            self.nets.count
        );
        match self.told {
            None => Err(Failure::new(message)),
            Some(_) => {
                tracing::warn!("{message}");
                Ok(())
            }
        }
    }

    async fn add(&mut self, interface: Interface) -> Result<()> {
        let taken: Vec<u8> = self.cables.values().map(|cable| cable.device).collect();
        let Some(device) = (0..self.nets.count).find(|device| !taken.contains(device)) else {
            return Err(Failure::new("all net devices of the machine are in use"));
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
        mirror::connect(&self.netlink, &interface, tap.index).await?;
        let cable = Cable {
            device,
            tap,
            interface,
            options,
        };
        self.cables.insert(cable.interface.index, cable);
        Ok(())
    }

    /// Adapts a cable to an interface that has changed.
    async fn adapt(&mut self, interface: Interface) -> Result<()> {
        let options = self.options(&interface);
        let Some(cable) = self.cables.get_mut(&interface.index) else {
            return Ok(());
        };
        if cable.options != options {
            self.nets
                .control
                .change_net(cable.device, options.clone())
                .await?;
            cable.options = options;
        }
        if cable.interface.mtu != interface.mtu {
            tap::set_mtu(&self.netlink, cable.tap.index, &interface).await?;
        }
        cable.interface = interface;
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

    /// Keeps the guest's network what the namespace is, until `end`: then the namespace is as it was before.
    pub async fn follow(mut self: Box<Self>, agent: Agent, end: impl Future<Output = ()>) {
        tokio::select! {
            () = self.follow_changes(&agent) => {}
            () = end => {}
        }
        self.disconnect().await;
    }

    /// Leaves the namespace as it was before: taps are about to go when this is done.
    pub async fn disconnect(&mut self) {
        for cable in self.cables.values() {
            if let Err(error) = mirror::disconnect(&self.netlink, &cable.interface).await {
                tracing::warn!("{error}");
            }
            // A device process that has ended has let go of it.
            let _ = self.nets.control.detach_net(cable.device).await;
        }
        if let Some(resolver) = &self.resolver {
            resolver.leave();
        }
        // Whoever closes a tap waits until no processor of the host looks at it any more, 20 ms: others wait for us.
        let cables = std::mem::take(&mut self.cables);
        let closing = std::thread::Builder::new().spawn(move || drop(cables));
        if let Err(error) = closing {
            // Then they are closed, and it was waited for.
            tracing::debug!("no thread to close taps: {error}");
        }
    }

    async fn follow_changes(&mut self, agent: &Agent) {
        loop {
            let changed = tokio::select! {
                changed = self.monitor.changed() => changed,
                looked = wish(&mut self.looks) => {
                    self.look().await;
                    // Whoever wished it may have gone.
                    let _ = looked.send(());
                    continue;
                }
            };
            if let Err(error) = changed {
                tracing::error!("changes of the network are not followed any more: {error}");
                return std::future::pending().await;
            }
            let followed = match self.connect().await {
                Ok(()) => self.configure(agent).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = followed {
                tracing::error!("a change of the network does not reach the guest: {failure}");
            }
            self.look().await;
        }
    }

    fn message(&self) -> proto::SetNetworkRequest {
        let bytes = |address: &IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let optional = |address: &Option<IpAddr>| address.as_ref().map(bytes).unwrap_or_default();
        let interfaces = self.cables.values().map(|cable| proto::Interface {
            device: cable.device.into(),
            name: cable.interface.name.clone(),
            mac: cable.interface.mac.to_vec(),
            mtu: cable.interface.mtu,
            addresses: cable
                .interface
                .addresses
                .iter()
                .map(|address| proto::Address {
                    address: bytes(&address.address),
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
                .hotplug_parameter(cable.device)
                .unwrap_or_default(),
            ..Default::default()
        });
        let routes = self.description.routes.iter().map(|route| proto::Route {
            interface: route.interface.clone().unwrap_or_default(),
            destination: match route.is_default() {
                true => Vec::new(),
                false => bytes(&route.destination),
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
                address: bytes(&entry.address),
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

/// The next wish.
async fn wish(looks: &mut Option<Looks>) -> oneshot::Sender<()> {
    if let Some(looks) = looks
        && let Some(wish) = looks.recv().await
    {
        return wish;
    }
    std::future::pending().await
}
