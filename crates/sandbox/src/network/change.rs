//! Changes of the networks of a namespace while its container runs: it joins networks and leaves
//! them by plugins, as at the start; published ports and the way outside go over to another network
//! when theirs is left. The namespace is followed, so that the guest gets what comes of it.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_network::{Namespace, Netlink};

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
    /// A plugin fails. Then the networks are what [`Attached::networks`] says: those that were
    /// joined for this are left again. What cannot be undone stays written down.
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
        let before: Vec<usize> = self.networks.iter().map(|one| one.index).collect();
        let mut networks = Networks {
            joined: self.networks.clone(),
            published_on: self.published_on,
            directory,
        };
        let (namespace, wanted) = (self.namespace.clone(), config.clone());
        let work = move |cancel: Arc<OwnedFd>| {
            let changed = networks.change(&wanted, &namespace, cancel);
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
        match outside {
            // What was left stays left.
            Err(error) if !self.networks.iter().any(|one| !before.contains(&one.index)) => {
                tracing::error!("nothing leads outside any more: {error}");
                changed
            }
            outside => changed.and(outside),
        }
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

/// The networks of a namespace, as they are changed. Its functions block.
#[derive(Debug)]
struct Networks {
    joined: Vec<Joined>,
    published_on: Option<usize>,
    directory: Directory,
}

impl Networks {
    fn change(
        &mut self,
        wanted: &CniConfig,
        namespace: &Namespace,
        cancel: Arc<OwnedFd>,
    ) -> Result<()> {
        self.leave(|one| {
            wanted
                .networks
                .iter()
                .all(|network| network.list.name() != one.name)
        })?;
        let free = self.free()?;
        let before: Vec<usize> = self.joined.iter().map(|one| one.index).collect();
        let plugins = Plugins::new(namespace, &wanted.id, &self.directory, cancel)?;
        let joined = join(&plugins, wanted, &mut self.joined, free);
        let is_new = |one: &Joined| !before.contains(&one.index);
        let published = joined.and_then(|()| match self.published_on {
            None => match publish(&plugins, wanted, &self.joined) {
                // What was left stays left.
                Err(error) if !self.joined.iter().any(is_new) => {
                    tracing::error!("published ports lead nowhere any more: {error}");
                    Ok(None)
                }
                published => published,
            },
            there => Ok(there),
        });
        // Lets go of the lock, which undoing takes.
        drop(plugins);
        match published {
            Ok(on) => {
                self.published_on = on;
                Ok(())
            }
            Err(error) => {
                // What failed is not among the networks, and is undone with what is not used.
                let undone = self.free().map(drop);
                let left = self.leave(is_new);
                if let Err(error) = undone.and(left) {
                    tracing::error!("{error}");
                }
                Err(error)
            }
        }
    }

    /// Leaves the networks that are not wanted.
    fn leave(&mut self, unwanted: impl Fn(&Joined) -> bool) -> Result<()> {
        while let Some(place) = self.joined.iter().position(&unwanted) {
            let index = self.joined[place].index;
            if self.published_on == Some(index) {
                undo_one(&self.directory, PORTS_FILE)?;
                self.published_on = None;
            }
            undo_one(&self.directory, &file(index))?;
            self.joined.remove(place);
        }
        Ok(())
    }

    /// Numbers of interfaces for networks to be joined. What failed before and could not be undone
    /// keeps its number, so that it stays written down.
    fn free(&self) -> Result<Vec<usize>> {
        if self.published_on.is_none() {
            undo_one(&self.directory, PORTS_FILE)?;
        }
        let unused = (0..MOST).filter(|index| self.joined.iter().all(|one| one.index != *index));
        let undone = |index: &usize| {
            undo_one(&self.directory, &file(*index))
                .inspect_err(|error| tracing::error!("{error}"))
                .is_ok()
        };
        Ok(unused.filter(undone).collect())
    }
}

/// Joins the networks that are wanted and not there yet, with numbers that are free.
fn join(
    plugins: &Plugins<'_>,
    wanted: &CniConfig,
    joined: &mut Vec<Joined>,
    free: Vec<usize>,
) -> Result<()> {
    let mut free = free.into_iter();
    for network in &wanted.networks {
        let name = network.list.name();
        if joined.iter().any(|one| one.name == name) {
            continue;
        }
        let index = free.next().ok_or_else(|| {
            Error::unsupported(format_args!("a container in more than {MOST} networks"))
        })?;
        joined.push(plugins.attach(index, network, &[])?);
    }
    Ok(())
}

/// Leads published ports, if there are any, to the first network that leads outside; which one.
fn publish(plugins: &Plugins<'_>, wanted: &CniConfig, joined: &[Joined]) -> Result<Option<usize>> {
    let outside = wanted
        .networks
        .iter()
        .filter(|network| network.leads_outside());
    let mut there = outside.filter_map(|network| {
        let name = network.list.name();
        joined.iter().find(|one| one.name == name)
    });
    let Some(on) = there.next().filter(|_| !wanted.ports.is_empty()) else {
        return Ok(None);
    };
    plugins.publish(on, &wanted.ports)?;
    Ok(Some(on.index))
}
