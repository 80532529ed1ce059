//! Computes the steps from one network to another, in their order. Called by `mod`.
//!
//! Pure. Side effects of steps in the kernel are taken into account:
//! - A link that goes down loses its routes, neighbours and IPv6 addresses.
//! - With an IPv4 address go the later ones of the same network, and with an address of either
//!   family, routes.
//! - With a link's hardware address go its neighbours.

use std::collections::HashMap;

use hull_protocol::net_device_mac;

use super::Device;
use super::step::{Step, What};
use super::wanted::{Address, IPV6_MIN_MTU, Interface, Route, Wanted};

/// Input of a plan.
pub struct Situation<'a> {
    /// All devices of the machine that are known.
    pub devices: &'a [Device],
    /// Result, or possible result, of earlier calls.
    pub old: &'a Wanted,
    pub new: &'a Wanted,
    /// All addresses of links that are no longer wanted.
    pub leftover_addresses: &'a [(u32, Address)],
    /// `old` is up to date. Otherwise everything is configured anew.
    pub settled: bool,
    /// Links are renamed, and get another hardware address, only while they are down.
    pub careful: bool,
    /// The kernel knows IPv6.
    pub ipv6: bool,
}

/// Change of an interface that stays or comes.
struct Change<'a> {
    device: &'a Device,
    old: Option<&'a Interface>,
    new: &'a Interface,
    /// The link goes down for a moment, and loses what a link loses then.
    restarted: bool,
}

impl Change<'_> {
    /// Nothing of it can be assumed to be there.
    fn is_anew(&self, settled: bool) -> bool {
        self.old.is_none() || self.restarted || !settled
    }
}

/// The steps, in their order.
pub fn plan<'a>(situation: &Situation<'a>) -> Vec<Step<'a>> {
    let Situation { devices, new, .. } = *situation;
    let changes: Vec<Change> = devices
        .iter()
        .filter_map(|device| {
            let new = new.interface(device.number)?;
            Some(Change {
                device,
                old: situation.old.interface(device.number),
                new,
                restarted: device.up && situation.needs_restart(device, new),
            })
        })
        .collect();
    let leaving: Vec<&Device> = devices
        .iter()
        .filter(|device| situation.is_leaving(device))
        .collect();

    let mut steps = Vec::new();
    situation.remove(&changes, &mut steps);
    for device in &leaving {
        situation.remove_interface(device, &mut steps);
    }
    for change in changes.iter().filter(|change| change.restarted) {
        steps.push(of(change.device, What::Down));
    }
    situation.rename(&leaving, &mut steps);
    for change in &changes {
        situation.set_up(change, &mut steps);
    }
    situation.add(&changes, &mut steps);
    steps
}

/// A step with a link that is wanted, or idle.
fn of<'a>(device: &'a Device, what: What<'a>) -> Step<'a> {
    Step {
        link: device.index,
        name: &device.name,
        leaving: false,
        what,
    }
}

impl<'a> Situation<'a> {
    fn is_leaving(&self, device: &Device) -> bool {
        let number = device.number;
        self.old.interface(number).is_some() && self.new.interface(number).is_none()
    }

    fn needs_restart(&self, device: &Device, new: &Interface) -> bool {
        // Only a link that is down can be kept from generating an address when IPv6 is enabled on
        // it.
        let ipv6_comes = self.ipv6 && device.mtu < IPV6_MIN_MTU && new.mtu >= IPV6_MIN_MTU;
        ipv6_comes || self.careful && (device.name != new.name || device.mac != new.mac)
    }

    /// Addresses that an interface had and must not have any more.
    fn removed_addresses(&self, change: &Change<'a>) -> impl Iterator<Item = &'a Address> {
        let new = change.new;
        change
            .old
            .into_iter()
            .flat_map(|old| &old.addresses)
            .filter(|address| !new.addresses.contains(address))
    }

    /// A step for a route or a neighbour; `None` if its device is unknown.
    fn with(&self, number: Option<u8>, what: What<'a>) -> Option<Step<'a>> {
        let (mut link, mut name) = (0, "");
        if let Some(number) = number {
            let device = self.devices.iter().find(|device| device.number == number)?;
            link = device.index;
            name = self
                .new
                .interface(number)
                .map_or(&device.name, |interface| &interface.name);
        }
        Some(Step {
            link,
            name,
            leaving: false,
            what,
        })
    }

    /// Removes what goes from interfaces that stay, in the reverse order of adding.
    fn remove(&self, changes: &[Change<'a>], steps: &mut Vec<Step<'a>>) {
        // A link that is set down loses its routes and neighbours by itself.
        let stays = |device: u8| self.new.interface(device).is_some();
        if self.old.neighbours != self.new.neighbours {
            for old in &self.old.neighbours {
                let mut new = self.new.neighbours.iter();
                let replaced =
                    new.any(|new| (new.device, new.address) == (old.device, old.address));
                if stays(old.device) && !replaced {
                    steps.extend(self.with(Some(old.device), What::RemoveNeighbour(old)));
                }
            }
        }
        if self.old.routes != self.new.routes {
            for old in self.old.routes.iter().rev() {
                if old.device.is_none_or(stays) && !self.new.routes.contains(old) {
                    steps.extend(self.with(old.device, What::RemoveRoute(old)));
                }
            }
        }
        for change in changes {
            for address in self.removed_addresses(change) {
                steps.push(of(change.device, What::RemoveAddress(address)));
            }
        }
    }

    /// Takes everything from a device, so that another interface can have it. The name comes later.
    fn remove_interface(&self, device: &'a Device, steps: &mut Vec<Step<'a>>) {
        let mut push = |what| {
            steps.push(Step {
                leaving: true,
                ..of(device, what)
            });
        };
        for (link, address) in self.leftover_addresses {
            if *link == device.index {
                push(What::RemoveAddress(address));
            }
        }
        push(What::Down);
        let mac = net_device_mac(device.number);
        if device.mac != mac {
            push(What::Mac(mac));
        }
        if device.mtu != device.first_mtu {
            push(What::Mtu(device.first_mtu));
        }
    }

    /// Gives every device its name: those in the way of others get a spare one first.
    fn rename(&self, leaving: &[&Device], steps: &mut Vec<Step<'a>>) {
        let mut targets: Vec<String> = Vec::with_capacity(self.devices.len());
        for device in self.devices {
            let target = match self.new.interface(device.number) {
                Some(interface) => interface.name.clone(),
                None => self.idle_name(device, &targets),
            };
            targets.push(target);
        }
        let step = |device: &'a Device, name: String| Step {
            leaving: leaving
                .iter()
                .any(|leaving| leaving.number == device.number),
            ..of(device, What::Rename(name))
        };
        let mut late = Vec::new();
        for (device, target) in self.devices.iter().zip(&targets) {
            if device.name == *target {
                continue;
            }
            let in_the_way = targets.contains(&device.name);
            let spare = match in_the_way {
                true => self.spare_name(device),
                false => String::new(),
            };
            if in_the_way {
                steps.push(step(device, spare.clone()));
            }
            if spare != *target {
                late.push(step(device, target.clone()));
            }
        }
        steps.append(&mut late);
    }

    /// Name of a device without an interface: its first one after an interface has left it, else
    /// its current one. But never that of an interface, or of another idle device.
    fn idle_name(&self, device: &Device, others: &[String]) -> String {
        let is_free = |name: &String| {
            !self
                .new
                .interfaces
                .iter()
                .any(|wanted| wanted.name == *name)
                && !others.contains(name)
                && !self.devices.iter().any(|other| {
                    let idle = self.new.interface(other.number).is_none();
                    other.number != device.number && idle && other.name == *name
                })
        };
        let first = self.is_leaving(device).then_some(&device.first_name);
        first
            .into_iter()
            .chain([&device.name])
            .find(|name| is_free(name))
            .map_or_else(|| self.spare_name(device), String::clone)
    }

    /// An unused name, the same each time.
    fn spare_name(&self, device: &Device) -> String {
        let number = device.number;
        let is_taken = |name: &String| {
            let wanted = &self.new.interfaces;
            wanted.iter().any(|wanted| wanted.name == *name)
                || self.devices.iter().any(|other| other.name == *name)
        };
        let mut name = format!("hull{number}");
        let mut attempt = 0u16;
        while is_taken(&name) {
            attempt += 1;
            name = format!("hull{number}-{attempt}");
        }
        name
    }

    /// Sets hardware address and MTU, and brings the link up.
    fn set_up(&self, change: &Change<'a>, steps: &mut Vec<Step<'a>>) {
        let Change { device, new, .. } = *change;
        let mut push = |what| {
            steps.push(Step {
                name: &new.name,
                ..of(device, what)
            });
        };
        if device.mac != new.mac {
            push(What::Mac(new.mac));
        }
        if device.mtu != new.mtu {
            push(What::Mtu(new.mtu));
        }
        // The kernel drops the setting when IPv6 goes from the link.
        let ipv6_comes = change.is_anew(self.settled) || device.mtu < IPV6_MIN_MTU;
        if self.ipv6 && new.mtu >= IPV6_MIN_MTU && ipv6_comes {
            push(What::NoLinkLocal);
        }
        if !device.up || change.restarted {
            push(What::Up);
        }
    }

    /// Adds what is new, and what was lost as a side effect.
    fn add(&self, changes: &[Change<'a>], steps: &mut Vec<Step<'a>>) {
        // By family: IPv4, IPv6.
        let mut addresses_go = [false; 2];
        for change in changes {
            let mut ipv4_goes = false;
            for address in self.removed_addresses(change) {
                ipv4_goes |= address.address.is_ipv4();
                addresses_go[usize::from(address.address.is_ipv6())] = true;
            }
            for address in &change.new.addresses {
                let had = change
                    .old
                    .is_some_and(|old| old.addresses.contains(address));
                let lost = ipv4_goes && address.address.is_ipv4();
                if !had || lost || change.is_anew(self.settled) {
                    steps.push(Step {
                        name: &change.new.name,
                        ..of(change.device, What::AddAddress(address))
                    });
                }
            }
        }
        for (link, address) in self.leftover_addresses {
            let leaving = |device: &Device| device.index == *link && self.is_leaving(device);
            if self.devices.iter().any(leaving) {
                addresses_go[usize::from(address.address.is_ipv6())] = true;
            }
        }
        let change_of = |device: u8| changes.iter().find(|change| change.device.number == device);
        let is_anew =
            |device: u8| change_of(device).is_none_or(|change| change.is_anew(self.settled));

        let same_routes = self.old.routes == self.new.routes;
        let mut keys = HashMap::with_capacity(self.new.routes.len());
        for route in &self.new.routes {
            *keys.entry(route.key()).or_insert(0) += 1;
        }
        for route in &self.new.routes {
            let had = same_routes || self.old.routes.contains(route);
            let lost = addresses_go[usize::from(route.destination.is_ipv6())];
            if !had || lost || !self.settled || route.device.is_some_and(is_anew) {
                // Routes with one key coexist, and so do the routes of each link to the same
                // link-local or multicast destination.
                let replace = keys.get(&route.key()) == Some(&1) && !is_on_every_link(route);
                steps.extend(self.with(route.device, What::AddRoute { route, replace }));
            }
        }
        for neighbour in &self.new.neighbours {
            let had = self.old.neighbours.contains(neighbour);
            let lost = change_of(neighbour.device)
                .is_some_and(|change| change.device.mac != change.new.mac);
            if !had || lost || is_anew(neighbour.device) {
                steps.extend(self.with(Some(neighbour.device), What::AddNeighbour(neighbour)));
            }
        }
    }
}

/// Link-local or multicast IPv6: each link has a route to it.
fn is_on_every_link(route: &Route) -> bool {
    match route.destination {
        std::net::IpAddr::V4(_) => false,
        std::net::IpAddr::V6(address) => address.is_unicast_link_local() || address.is_multicast(),
    }
}

#[cfg(test)]
mod tests;
