//! Changes of the networks of a namespace while its container runs: it joins networks and leaves
//! them by plugins, as at the start; published ports and the way outside go over to another network
//! when theirs is left. The namespace is followed, so that the guest gets what comes of it.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_network::Netlink;

use super::attachment::{
    Attached, Joined, MOST, PORTS_FILE, Plugins, cancellable, file, interface, undo_one,
};
use crate::config::{CniConfig, CniNetwork};
use crate::error::{Error, Result};
use crate::store::Directory;

impl Attached {
    /// Makes its networks those of a configuration, whose ports stay as they are: leaves those that
    /// are not among them, and joins those that it is not in. Plugins are stopped when `cancelled`
    /// is done.
    ///
    /// # Errors
    /// A plugin fails. Then the networks are what [`Attached::networks`] says; what cannot be
    /// undone stays written down.
    pub async fn change(
        &mut self,
        config: &CniConfig,
        cancelled: impl Future<Output = ()>,
    ) -> Result<()> {
        let Some(directory) = &self.undo else {
            return Err(Error::unsupported(
                "other networks for a container whose network needs no root",
            ));
        };
        let directory = directory.try_clone()?;
        let mut networks = Networks {
            joined: self.networks.clone(),
            published_on: self.published_on,
        };
        let (namespace, wanted) = (self.namespace.clone(), config.clone());
        let work = move |cancel: Arc<OwnedFd>| {
            let left = networks.leave(&wanted, &directory);
            let changed = left.and_then(|()| {
                let plugins = Plugins::new(&namespace, &wanted.id, &directory, cancel)?;
                networks.join(&wanted, plugins)
            });
            Ok((networks, changed))
        };
        let (networks, changed) = cancellable(cancelled, work).await?;
        let published_before = std::mem::replace(&mut self.published_on, networks.published_on);
        self.networks = networks.joined;
        if self.published_on != published_before {
            let on = |one: &&Joined| Some(one.index) == self.published_on;
            let own = self.networks.iter().find(on);
            let own: &[IpAddr] = own.map_or(&[], |one| &one.addresses.addresses);
            self.ports.lead_to(&config.ports, own).await;
        }
        let outside = self.lead_outside(&config.networks).await;
        changed.and(outside)
    }

    /// Gives the namespace a way outside if it has none: by the first of these networks that leads
    /// there.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn lead_outside(&self, networks: &[CniNetwork]) -> Result<()> {
        let netlink = Netlink::open(&self.namespace)?;
        let description = netlink.describe().await?;
        for is_ipv4 in [true, false] {
            let mut routes = description.routes.iter();
            if routes.any(|route| route.is_default() && route.destination.is_ipv4() == is_ipv4) {
                continue;
            }
            let outside = networks.iter().filter(|network| network.leads_outside());
            let way = outside
                .filter_map(|network| self.joined(network))
                .find_map(|one| {
                    let mut gateways = one.addresses.gateways.iter();
                    let gateway = gateways.find(|gateway| gateway.is_ipv4() == is_ipv4)?;
                    let name = interface(one.index);
                    let mut interfaces = description.interfaces.iter();
                    Some((interfaces.find(|found| found.name == name)?, *gateway))
                });
            if let Some((interface, gateway)) = way {
                netlink.add_default_route(interface, gateway).await?;
            }
        }
        Ok(())
    }

    /// The network of this configuration, if the namespace is in it.
    pub(super) fn joined(&self, network: &CniNetwork) -> Option<&Joined> {
        let name = network.list.name();
        self.networks.iter().find(|one| one.name == name)
    }
}

/// The networks of a namespace, as they are changed.
#[derive(Debug)]
struct Networks {
    joined: Vec<Joined>,
    published_on: Option<usize>,
}

impl Networks {
    fn leave(&mut self, config: &CniConfig, directory: &Directory) -> Result<()> {
        let is_wanted = |one: &Joined| {
            let mut networks = config.networks.iter();
            networks.any(|network| network.list.name() == one.name)
        };
        while let Some(place) = self.joined.iter().position(|one| !is_wanted(one)) {
            let index = self.joined[place].index;
            if self.published_on == Some(index) {
                undo_one(directory, PORTS_FILE)?;
                self.published_on = None;
            }
            undo_one(directory, &file(index))?;
            self.joined.remove(place);
        }
        Ok(())
    }

    fn join(&mut self, config: &CniConfig, plugins: Plugins<'_>) -> Result<()> {
        for network in &config.networks {
            let name = network.list.name();
            if self.joined.iter().any(|one| one.name == name) {
                continue;
            }
            let is_free = |index: &usize| self.joined.iter().all(|one| one.index != *index);
            let index = (0..MOST).find(is_free).ok_or_else(|| {
                Error::unsupported(format_args!("a container in more than {MOST} networks"))
            })?;
            match plugins.attach(index, network, &[]) {
                Ok(joined) => self.joined.push(joined),
                Err(error) => return Err(plugins.fail(&file(index), error)),
            }
        }
        if self.published_on.is_some() || config.ports.is_empty() {
            return Ok(());
        }
        let mut outside = config
            .networks
            .iter()
            .filter(|network| network.leads_outside());
        let on = outside.find_map(|network| {
            let name = network.list.name();
            self.joined.iter().find(|one| one.name == name)
        });
        let Some(on) = on else { return Ok(()) };
        if let Err(error) = plugins.publish(on, &config.ports) {
            return Err(plugins.fail(PORTS_FILE, error));
        }
        self.published_on = Some(on.index);
        Ok(())
    }
}
