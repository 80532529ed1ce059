//! Configures the guest's network as it is on the host: `SetNetwork` of `agent.proto`. Called by
//! `service`, which holds one [`Network`].
//!
//! A request is checked whole (`wanted`), compared with the result of earlier calls (`plan`), and
//! the differences are sent to the kernel in as few system calls as possible (`step`, `netlink`).
//! It changes nothing that it did not configure, and never the loopback interface.
//!
//! After a failure the state is unknown: the next call reads the links again, removes all that may
//! be there, and configures everything anew. So a call can be repeated.

mod netlink;
mod parking;
mod plan;
mod step;
#[cfg(test)]
mod tests;
mod wanted;

use std::io;

use hull_protocol::agent::SetNetworkRequest;
use hull_protocol::net_device_mac;
use ttrpc::Code;

use crate::rpc::status::{Failure, Result};
pub use netlink::address as ip_address;
use netlink::{Link, Requests, Socket};
use parking::Parking;
use plan::{Situation, plan};
use step::{Step, What};
use wanted::{Address, Interface, Wanted};

/// Requests per batch. If all fail, the answers must fit into the socket's buffer.
const PIECE: usize = 64;

/// A net device of the machine, and the state of its link.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    number: u8,
    index: u32,
    first_name: String,
    first_mtu: u32,
    name: String,
    mac: [u8; 6],
    mtu: u32,
    up: bool,
}

/// Result of earlier calls. `Default` is nothing.
#[derive(Default)]
pub struct Network {
    devices: Vec<Device>,
    brought: Wanted,
    /// `devices` and `brought` are up to date.
    settled: bool,
    /// Devices without an interface are hidden.
    hides: bool,
    /// Where they are hidden, once there are some.
    parking: Option<Parking>,
    /// The kernel knows IPv6.
    ipv6: bool,
    /// This kernel renames links, or changes their hardware address, only while they are down:
    /// those before 6.2, and some drivers.
    careful: bool,
}

/// Why a plan was not carried out.
enum Stopped {
    /// A link must be down first.
    Busy(Failure),
    Failed(Failure),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn cannot<'a>(what: &'a str) -> impl Fn(io::Error) -> Failure + 'a {
    move |error| Failure::internal(what, &error)
}

impl Network {
    /// A network that hides devices while no interface of the host is behind them.
    pub fn hiding() -> Self {
        Self {
            hides: true,
            ..Self::default()
        }
    }

    /// Applies a request.
    pub fn apply(&mut self, request: &SetNetworkRequest) -> Result<()> {
        let wanted = Wanted::check(request)?;
        if self.settled && self.brought == wanted {
            return Ok(());
        }
        let socket = Socket::open().map_err(cannot("speak with the kernel of the network"))?;
        let mut outcome = self.change(&socket, &wanted);
        if matches!(outcome, Err(Stopped::Busy(_))) && !self.careful {
            self.careful = true;
            outcome = self.change(&socket, &wanted);
        }
        match outcome {
            Ok(complete) => {
                self.brought = wanted;
                self.settled = complete;
                if self.hides
                    && let Err(error) = self.hide(&socket)
                {
                    crate::log::error!("cannot hide idle network devices: {error}");
                }
                Ok(())
            }
            Err(Stopped::Busy(failure) | Stopped::Failed(failure)) => Err(failure),
        }
    }

    /// Plans and carries out. Returns whether all is as planned: a device that is no longer wanted
    /// may not be.
    fn change(&mut self, socket: &Socket, wanted: &Wanted) -> std::result::Result<bool, Stopped> {
        let knows = |devices: &[Device], number| {
            devices
                .iter()
                .any(|device: &Device| device.number == number)
        };
        let mut numbers = wanted.interfaces.iter().map(|interface| interface.device);
        if !self.settled || !numbers.all(|number| knows(&self.devices, number)) {
            let links = socket.links().map_err(cannot("list network links"))?;
            self.look(links);
        }
        let missing: Vec<&Interface> = wanted
            .interfaces
            .iter()
            .filter(|interface| !knows(&self.devices, interface.device))
            .collect();
        if !missing.is_empty() {
            self.fetch(&missing)?;
            let links = socket.links().map_err(cannot("list network links"))?;
            self.look(links);
        }
        for interface in &wanted.interfaces {
            if !knows(&self.devices, interface.device) {
                return Err(wanted::no_device(interface.device.into()).into());
            }
        }
        if !self.ipv6
            && let Some(what) = wanted.first_ipv6()
        {
            let message = format!("cannot add {what}: the guest's kernel has no IPv6");
            return Err(Failure::new(Code::FAILED_PRECONDITION, message).into());
        }
        let mut leaving = self.brought.interfaces.iter();
        let leftover_addresses: Vec<(u32, Address)> =
            match leaving.any(|old| wanted.interface(old.device).is_none()) {
                // IPv6 addresses go when the link goes down, unless a sysctl keeps them.
                true => socket
                    .addresses(libc::AF_UNSPEC as u8)
                    .map_err(cannot("list network addresses"))?
                    .into_iter()
                    .map(|(link, address, _)| (link, address))
                    .collect(),
                false => Vec::new(),
            };

        let devices = self.devices.clone();
        let old = std::mem::take(&mut self.brought);
        let steps = plan(&Situation {
            devices: &devices,
            old: &old,
            new: wanted,
            leftover_addresses: &leftover_addresses,
            settled: self.settled,
            careful: self.careful,
            ipv6: self.ipv6,
        });
        let outcome = run(socket, &steps);
        match &outcome {
            Ok(_) => self.note(&steps),
            Err(_) => {
                self.brought = old;
                self.brought.join(wanted);
                self.settled = false;
            }
        }
        outcome
    }

    /// Adds devices that are hidden, or that the kernel does not know yet.
    fn fetch(&self, interfaces: &[&Interface]) -> Result<()> {
        let mut hidden = Vec::new();
        if let Some(parking) = &self.parking {
            let numbers: Vec<u8> = interfaces.iter().map(|missing| missing.device).collect();
            hidden = parking
                .give(&numbers)
                .map_err(cannot("fetch a hidden network device"))?;
        }
        for missing in interfaces {
            if let Some(plug) = &missing.plug
                && !hidden.contains(&missing.device)
            {
                crate::hotplug::add(plug).map_err(cannot("add a network device"))?;
            }
        }
        Ok(())
    }

    /// Hides devices that no interface needs.
    fn hide(&mut self, socket: &Socket) -> io::Result<()> {
        let brought = &self.brought;
        let idle = |device: &Device| brought.interface(device.number).is_none();
        if !self.devices.iter().any(idle) {
            return Ok(());
        }
        let parking = match self.parking.take() {
            Some(parking) => parking,
            None => Parking::new()?,
        };
        let devices = self.devices.iter().filter(|device| idle(device));
        let taken = parking.take(socket, devices.map(|device| (device.number, device.index)));
        self.parking = Some(parking);
        taken?;
        self.devices.retain(|device| !idle(device));
        Ok(())
    }

    /// Updates which link is which device, and the state of each.
    fn look(&mut self, links: Vec<Link>) {
        self.ipv6 = links.iter().any(|link| link.ipv6);
        self.devices.retain_mut(|device| {
            let link = links.iter().find(|link| link.index == device.index);
            if let Some(link) = link {
                device.name.clone_from(&link.name);
                device.mac = link.mac.unwrap_or_default();
                device.mtu = link.mtu;
                device.up = link.up;
            }
            link.is_some()
        });
        // Another link cannot take a permanent address, so those come first.
        let made = links.iter().map(|link| (link, link.permanent_mac));
        let has = links.iter().map(|link| (link, link.mac));
        for (link, mac) in made.chain(has) {
            let Some(mac) = mac.filter(|mac| *mac == net_device_mac(mac[5])) else {
                continue;
            };
            let number = mac[5];
            let known = |device: &Device| device.number == number || device.index == link.index;
            if !self.devices.iter().any(known) {
                self.devices.push(Device {
                    number,
                    index: link.index,
                    first_name: link.name.clone(),
                    first_mtu: link.mtu,
                    name: link.name.clone(),
                    mac: link.mac.unwrap_or_default(),
                    mtu: link.mtu,
                    up: link.up,
                });
            }
        }
    }

    /// Records the effect of steps on the devices.
    fn note(&mut self, steps: &[Step<'_>]) {
        for step in steps {
            let Some(device) = self
                .devices
                .iter_mut()
                .find(|device| device.index == step.link)
            else {
                continue;
            };
            match &step.what {
                What::Down => device.up = false,
                What::Up => device.up = true,
                What::Rename(name) => device.name.clone_from(name),
                What::Mac(mac) => device.mac = *mac,
                What::Mtu(mtu) => device.mtu = *mtu,
                _ => {}
            }
        }
    }
}

/// Carries out steps, up to the batch in which one fails. Returns whether all is as planned.
fn run(socket: &Socket, steps: &[Step<'_>]) -> std::result::Result<bool, Stopped> {
    let mut complete = true;
    for piece in steps.chunks(PIECE) {
        let mut requests = Requests::default();
        for step in piece {
            step.encode(&mut requests);
        }
        let failures = socket
            .change(requests)
            .map_err(cannot("speak with the kernel of the network"))?;
        for (number, error) in failures {
            let Some(step) = piece.get(number) else {
                continue;
            };
            if step.tolerates(error) {
                complete &= !step.leaving;
                continue;
            }
            let failure = Failure::internal(&step.to_string(), &error.into());
            return Err(match step.is_busy(error) {
                true => Stopped::Busy(failure),
                false => Stopped::Failed(failure),
            });
        }
    }
    Ok(complete)
}
