//! The network of `hull run`: from options to what the sandbox is asked for.

mod plugins;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use hull_network::cni::{self, List, PortMapping};
use hull_network::ports::{self, Published, Reservation};
use hull_sandbox::LinkLocal;
use hull_sandbox::config::{
    CniConfig, CniNetwork, MAX_NETS, NamesConfig, NetworkLimits, NetworkSource, PastaConfig,
};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::container;
use crate::dns::{self, DnsConfig};
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::networks::{self, NetworkRecord};
use crate::paths::Paths;
use crate::publish::{HostAddress, Ports};
use crate::values::Network;
use plugins::{beside, own_network};

pub use plugins::list;

/// What a user asks for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkOptions {
    /// The network; the configuration's when absent.
    pub network: Option<Network>,
    /// Networks beside it, each with an interface of its own.
    pub further: Vec<Endpoint>,
    /// Further names in the network.
    pub aliases: Vec<String>,
    /// Further names of others in the network, for this container alone.
    pub links: Vec<(String, String)>,
    /// Published ports.
    pub publish: Vec<Ports>,
    /// Most bytes per second in each direction.
    pub rate: Option<u64>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Domains to search.
    pub dns_search: Vec<String>,
    /// Options of the resolver.
    pub dns_option: Vec<String>,
    /// Further names.
    pub add_host: Vec<(String, HostAddress)>,
    /// Hardware address.
    pub mac_address: Option<[u8; 6]>,
    /// IPv4 address.
    pub ip: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ip6: Option<Ipv6Addr>,
}

/// A network of a container, as the container's names are kept in it.
#[derive(Debug)]
pub struct Joined {
    /// What is known of it, if it is one that a person created.
    pub created: Option<NetworkRecord>,
    /// Further names of the container in the network.
    pub aliases: Vec<String>,
    /// Further names of others.
    pub links: Vec<(String, String)>,
}

impl Joined {
    /// Whether packets leave it.
    fn leads_outside(&self) -> bool {
        let created = self.created.as_ref();
        created.is_none_or(|created| !created.internal)
    }
}

/// What the sandbox is asked for.
#[derive(Debug)]
pub struct Plan {
    /// Name of the network, for people: `none`, `container:ID`, or a network's.
    pub name: String,
    /// All networks, in the order of interfaces.
    pub networks: Vec<Joined>,
    /// How it is attached.
    pub attach: Attach,
    /// Limits on its frames.
    pub limits: NetworkLimits,
}

/// How a container is attached to a network.
#[derive(Debug)]
pub enum Attach {
    /// Not at all: loopback only.
    None,
    /// The sandbox attaches it. With the sockets that hold published ports.
    Source(Box<NetworkSource>, Vec<OwnedFd>),
    /// It is in the sandbox of another container, which is this one.
    Container(String),
}

impl Plan {
    /// Ports of the host that lead to ports of the container.
    pub fn ports(&self) -> &[PortMapping] {
        match &self.attach {
            Attach::Source(source, _) => match &**source {
                NetworkSource::Cni(cni) => &cni.ports,
                NetworkSource::Pasta(pasta) => &pasta.ports,
                NetworkSource::Namespace => &[],
            },
            Attach::None | Attach::Container(_) => &[],
        }
    }
}

impl NetworkOptions {
    /// The network that is asked for of a new container, checked as far as can be before anything
    /// is made.
    ///
    /// # Errors
    /// As [`check`](Self::check); options that mean nothing in these networks.
    pub fn check_new(&self, config: &Config) -> Result<Network> {
        let network = self.check(config)?;
        match &network {
            Network::None => self.refuse_without_network()?,
            Network::Named(first) => {
                let joined = self.joined(&network, &config.paths())?;
                if !self.publish.is_empty() && !joined.iter().any(Joined::leads_outside) {
                    return Err(Error::invalid(format!(
                        "--publish: network {first} is internal: nothing enters it"
                    )));
                }
            }
            Network::Container(_) => {}
        }
        Ok(network)
    }

    /// The network that is asked for, checked as far as can be before anything is made. What means
    /// nothing in it is left out: a container may have left the networks that it was created for.
    ///
    /// # Errors
    /// Options that contradict each other or the network; there is no such network or container.
    pub fn check(&self, config: &Config) -> Result<Network> {
        let network = self.network.as_ref().unwrap_or(&config.network);
        match network {
            Network::None => {}
            Network::Container(other) => {
                self.refuse_of_another_container(other)?;
                let other = container::find(&config.paths(), other)?;
                // A name may become another container's.
                return Ok(Network::Container(other.record.id));
            }
            Network::Named(named) if config.without_root => self.refuse_without_root(named)?,
            Network::Named(named) => {
                self.check_named(config, named)?;
                self.check_further(config, named)?;
                return Ok(network.clone());
            }
        }
        match self.further.first() {
            Some(further) => Err(Error::invalid(format!(
                "--network {network} and --network {}: they contradict each other",
                further.network
            ))),
            None => Ok(network.clone()),
        }
    }

    fn check_named(&self, config: &Config, named: &str) -> Result<()> {
        let paths = config.paths();
        list(&paths, named, false)?;
        let created = networks::load(&paths, named)?;
        if created.is_none() {
            no_names(named, &self.aliases, &self.links)?;
        }
        check_inside_of(&paths, named, self.addresses())
    }

    fn check_further(&self, config: &Config, first: &str) -> Result<()> {
        let paths = config.paths();
        if self.further.len() >= usize::from(MAX_NETS) {
            return Err(Error::invalid(format!(
                "--network: a container is in at most {MAX_NETS} networks"
            )));
        }
        let mut known = vec![first];
        for further in &self.further {
            let name = &further.network;
            if known.contains(&name.as_str()) {
                return Err(Error::invalid(format!(
                    "--network {name}: it is given twice"
                )));
            }
            known.push(name);
            list(&paths, name, false)?;
            if own_network(&paths, name)?.is_none() {
                return Err(Error::unsupported(format_args!(
                    "network {name} beside another one: its plugins are the host's"
                ))
                .hint("give it as the first one, or use networks of hull network create"));
            }
            if networks::load(&paths, name)?.is_none() {
                no_names(name, &further.aliases, &further.links)?;
            }
            check_inside_of(&paths, name, further.addresses())?;
        }
        Ok(())
    }

    /// Name of the network, for people.
    pub fn name(&self) -> String {
        let network = self.network.as_ref().map(Network::to_string);
        network.unwrap_or_default()
    }

    /// The addresses that are asked for.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let addresses = [self.ip.map(IpAddr::V4), self.ip6.map(IpAddr::V6)];
        addresses.into_iter().flatten()
    }

    /// Plans the network of the container `id`; published ports are bound from here on.
    ///
    /// # Errors
    /// As [`check`](Self::check); a port is taken.
    pub fn plan(&self, id: &str, config: &Config) -> Result<Plan> {
        let network = self.check(config)?;
        let mut limits = config.network_limits(true);
        limits.rate = self.rate.unwrap_or(0);
        let name = network.to_string();
        let networks = self.joined(&network, &config.paths())?;
        let attach = match network {
            Network::None => Attach::None,
            Network::Container(other) => Attach::Container(other),
            Network::Named(_) if config.without_root => {
                if limits.link_local == LinkLocal::None {
                    // Pasta speaks for the host from such an address.
                    limits.link_local = LinkLocal::Ipv6;
                }
                // Pasta binds them itself.
                let ports = self.ports(config)?.mappings;
                let mac = self.mac_address;
                let pasta = NetworkSource::Pasta(PastaConfig { ports, mac });
                Attach::Source(Box::new(pasta), Vec::new())
            }
            Network::Named(named) => {
                let (cni, sockets) = self.cni(id, &named, &networks, config)?;
                Attach::Source(Box::new(NetworkSource::Cni(cni)), sockets)
            }
        };
        Ok(Plan {
            name,
            networks,
            attach,
            limits,
        })
    }

    /// The networks that it is in, of which `first` is the first one, if it is one.
    ///
    /// # Errors
    /// What is known of a network cannot be read.
    pub fn joined(&self, first: &Network, paths: &Paths) -> Result<Vec<Joined>> {
        let Network::Named(first) = first else {
            return Ok(Vec::new());
        };
        let first = Endpoint {
            network: first.clone(),
            aliases: self.aliases.clone(),
            links: self.links.clone(),
            ..Endpoint::default()
        };
        let all = std::iter::once(&first).chain(&self.further);
        all.map(|one| {
            Ok(Joined {
                created: networks::load(paths, &one.network)?,
                aliases: one.aliases.clone(),
                links: one.links.clone(),
            })
        })
        .collect()
    }

    /// How others find a container that has names of its `own`, in each of its networks where they
    /// do.
    pub fn names(
        &self,
        paths: &Paths,
        own: &[String],
        networks: &[Joined],
    ) -> Vec<Option<NamesConfig>> {
        // A name in one network may be looked up outside if another one leads there.
        let upstream = match networks.iter().any(Joined::leads_outside) {
            true => dns::upstream(&self.dns()),
            false => Vec::new(),
        };
        let of_network = |network: &Joined| {
            let created = network.created.as_ref()?;
            Some(NamesConfig {
                directory: networks::names_directory(paths, &created.name),
                network: created.name.clone(),
                names: own.iter().chain(&network.aliases).cloned().collect(),
                links: network
                    .links
                    .iter()
                    .map(|(other, name)| (name.to_ascii_lowercase(), other.to_ascii_lowercase()))
                    .collect(),
                upstream: upstream.clone(),
            })
        };
        networks.iter().map(of_network).collect()
    }

    /// The networks that a running container is to have, for its sandbox: those `joined`. It has
    /// these names of its `own`, and these ports.
    ///
    /// # Errors
    /// A network cannot be read.
    pub fn wanted(
        &self,
        id: &str,
        own: &[String],
        ports: &[PortMapping],
        joined: &[Joined],
        paths: &Paths,
    ) -> Result<CniConfig> {
        let mut networks = Vec::new();
        if let Some(Network::Named(first)) = &self.network {
            networks = self.networks(paths, first, &|name| match own_network(paths, name)? {
                // The sandbox sees to the way outside.
                Some(_) => beside(paths, name, false),
                None => list(paths, name, false),
            })?;
            for (network, names) in networks.iter_mut().zip(self.names(paths, own, joined)) {
                network.names = names;
            }
        }
        Ok(CniConfig {
            id: id.to_owned(),
            networks,
            ports: ports.to_vec(),
        })
    }

    /// What the container finds names by in these networks.
    pub fn dns_in(&self, networks: &[Joined]) -> DnsConfig {
        let asked = self.dns();
        match networks.iter().any(|network| network.created.is_some()) {
            true => asked.by_names(),
            false => asked,
        }
    }

    /// The first option that is given of those that are about a network of the container's own.
    fn about_own_network(&self) -> Option<&'static str> {
        first([
            (!self.publish.is_empty(), "--publish"),
            (!self.aliases.is_empty(), "--network-alias"),
            (!self.links.is_empty(), "--link"),
            (self.rate.is_some(), "--network-rate"),
            (self.mac_address.is_some(), "--mac-address"),
            (self.ip.is_some(), "--ip"),
            (self.ip6.is_some(), "--ip6"),
        ])
    }

    /// Options that mean nothing without a network.
    fn refuse_without_network(&self) -> Result<()> {
        match self.about_own_network() {
            Some(option) => Err(Error::invalid(format!(
                "{option}: the container has no network (--network none)"
            ))
            .hint("--network default gives it one")),
            None => Ok(()),
        }
    }

    /// Options that another container has decided about.
    fn refuse_of_another_container(&self, name: &str) -> Result<()> {
        let given = first([
            (!self.dns.is_empty(), "--dns"),
            (!self.dns_search.is_empty(), "--dns-search"),
            (!self.dns_option.is_empty(), "--dns-option"),
            (!self.add_host.is_empty(), "--add-host"),
        ]);
        match self.about_own_network().or(given) {
            Some(option) => Err(Error::invalid(format!(
                "{option}: the container has the network of container {name}"
            ))
            .hint(format!("{option} belongs to hull run of {name}"))),
            None => Ok(()),
        }
    }

    fn refuse_without_root(&self, name: &str) -> Result<()> {
        if name != cni::DEFAULT_NAME {
            let message = format!(
                "not supported without root: network {name}: its plugins change the host's network"
            );
            return Err(Error::with_kind(ErrorKind::Unsupported, message).hint("--network default"));
        }
        match first([(self.ip.is_some(), "--ip"), (self.ip6.is_some(), "--ip6")]) {
            Some(option) => Err(Error::with_kind(
                ErrorKind::Unsupported,
                format!(
                    "not supported without root: {option}: the container has the host's addresses"
                ),
            )),
            None => Ok(()),
        }
    }

    /// The ports to be published, bound.
    fn ports(&self, config: &Config) -> Result<Reservation> {
        let mut published: Vec<Published> = self
            .publish
            .iter()
            .flat_map(|ports| &ports.0)
            .cloned()
            .collect();
        if !config.publish_address.is_unspecified() {
            for port in &mut published {
                port.host_ip.get_or_insert(config.publish_address);
            }
        }
        ports::reserve(&published).map_err(|error| {
            let own = Error::new(error.to_string());
            match config.without_root && error.is_denied() {
                true => own.hint(
                    "ports from 1024 on are for everybody; others the administrator can allow: \
                     sysctl net.ipv4.ip_unprivileged_port_start=80",
                ),
                false => own,
            }
        })
    }

    fn cni(
        &self,
        id: &str,
        first: &str,
        joined: &[Joined],
        config: &Config,
    ) -> Result<(CniConfig, Vec<OwnedFd>)> {
        let paths = config.paths();
        // Ports lead to the first network that things can enter.
        let names = std::iter::once(first).chain(self.further.iter().map(|one| &*one.network));
        let mut named = names.zip(joined);
        let outside = named.find_map(|(name, one)| one.leads_outside().then_some(name));
        // Without one they wait for it.
        let reserved = self.ports(config)?;
        let published = |name: &str| outside == Some(name) && !reserved.mappings.is_empty();
        let networks = self.networks(&paths, first, &|name| match name == first {
            true => list(&paths, name, published(name)),
            false => beside(&paths, name, published(name)),
        })?;
        let cni = CniConfig {
            id: id.to_owned(),
            networks,
            ports: reserved.mappings,
        };
        Ok((cni, reserved.sockets))
    }

    /// The networks, of which the first one has this name, with their plugins.
    fn networks(
        &self,
        paths: &Paths,
        first: &str,
        plugins: &dyn Fn(&str) -> Result<List>,
    ) -> Result<Vec<CniNetwork>> {
        let network = |name: &str, ips: Vec<IpAddr>, mac| {
            let mut list = plugins(name)?;
            // The sandbox process serves these.
            list.leave_out_ipv6_loopback();
            list.admit_addresses(&ips);
            Ok::<_, Error>(CniNetwork {
                list,
                own: own_network(paths, name)?,
                ips: ips.into_iter().map(cni::Address::from).collect(),
                mac,
                names: None,
            })
        };
        let mut networks = vec![network(
            first,
            self.addresses().collect(),
            self.mac_address,
        )?];
        for further in &self.further {
            let mac = further.mac_address;
            networks.push(network(&further.network, further.addresses(), mac)?);
        }
        Ok(networks)
    }

    /// What the container finds names by, as asked for.
    pub fn dns(&self) -> DnsConfig {
        DnsConfig {
            servers: self.dns.clone(),
            search: self.dns_search.clone(),
            options: self.dns_option.clone(),
            hosts: self
                .add_host
                .iter()
                .map(|(name, address)| {
                    let address = match address {
                        HostAddress::Ip(address) => Some(*address),
                        HostAddress::Gateway => None,
                    };
                    (name.clone(), address)
                })
                .collect(),
        }
    }
}

fn first<const N: usize>(given: [(bool, &'static str); N]) -> Option<&'static str> {
    given
        .into_iter()
        .find_map(|(given, option)| given.then_some(option))
}

/// Refuses names in a network that has none.
fn no_names(network: &str, aliases: &[String], links: &[(String, String)]) -> Result<()> {
    let option = match (aliases, links) {
        ([], []) => return Ok(()),
        ([], _) => "--link",
        _ => "--network-alias",
    };
    Err(Error::invalid(format!(
        "{option}: containers are not found by names in network {network}"
    ))
    .hint("hull network create NAME makes a network in which they are"))
}

/// Whether addresses are in a network, as far as its subnets are known.
fn check_inside_of(
    paths: &Paths,
    name: &str,
    addresses: impl IntoIterator<Item = IpAddr>,
) -> Result<()> {
    let Some(own) = own_network(paths, name)? else {
        return Ok(());
    };
    let mut addresses = addresses.into_iter();
    addresses.try_for_each(|address| check_inside(address, &own.subnets))
}

/// Whether an address is in one of the subnets, as far as one is of its family.
fn check_inside(address: IpAddr, subnets: &[cni::Address]) -> Result<()> {
    let Some(subnet) = subnets
        .iter()
        .find(|subnet| subnet.ip.is_ipv4() == address.is_ipv4())
    else {
        return Ok(());
    };
    let option = if address.is_ipv4() { "--ip" } else { "--ip6" };
    match subnet.holds(address) {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{option}: {address} is not in {subnet}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_address_is_in_its_subnet_or_refused_by_name() {
        let subnets = ["10.87.0.0/16", "fd68:756c:6c00::/64"].map(|text| text.parse().unwrap());
        for (address, inside) in [
            ("10.87.255.1", true),
            ("10.88.0.1", false),
            ("fd68:756c:6c00::9", true),
            ("fd68:756c:6c00:1::9", false),
        ] {
            let checked = check_inside(address.parse().unwrap(), &subnets);
            assert_eq!(checked.is_ok(), inside, "{address}: {checked:?}");
        }
        let error = check_inside("10.88.0.1".parse().unwrap(), &subnets).unwrap_err();
        assert_eq!(error.message, "--ip: 10.88.0.1 is not in 10.87.0.0/16");
    }
}
