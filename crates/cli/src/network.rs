//! The network of `hull run`: its options, and what the sandbox process is asked for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use hull_network::cni::{self, List, PortMapping};
use hull_network::ports::{self, Published};
use hull_sandbox::client;
use hull_sandbox::{
    AttachRequest, CniRequest, LinkLocal, NameRequest, NetworkRequest, OwnNetwork, PastaRequest,
};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::publish::{self, HostAddress, Ports};
use crate::values::{self, Network};

/// Where leases of hull's own network are kept: not below `run_dir`, because its bridge is the host's, whoever uses it.
const LEASES: &str = "/run/hull/networks";

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub struct NetworkArgs {
    /// Network: default, none, the name of one in /etc/cni/net.d, or container:NAME to be in another container's machine
    #[arg(long, alias = "net", value_name = "NETWORK", value_parser = values::network)]
    network: Option<Network>,
    /// Let a port of the host lead to a port of the container
    #[arg(short, long, value_name = "[[ADDRESS:]HOST_PORT:]PORT[/udp]", value_parser = publish::publish)]
    publish: Vec<Ports>,
    /// Most bytes per second that the container sends, and receives, like 10m
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    network_rate: Option<u64>,
    /// Name server, in place of the host's
    #[arg(long, value_name = "ADDRESS", value_parser = publish::dns)]
    dns: Vec<IpAddr>,
    /// Domain in which short names are searched, or . for none
    #[arg(long, value_name = "DOMAIN", value_parser = publish::dns_search)]
    dns_search: Vec<String>,
    /// Option of the resolver, like ndots:2
    #[arg(long, value_name = "OPTION", alias = "dns-opt", value_parser = publish::dns_option)]
    dns_option: Vec<String>,
    /// Give an address a name; host-gateway is the host's own
    #[arg(long, value_name = "NAME:ADDRESS", value_parser = publish::add_host)]
    add_host: Vec<(String, HostAddress)>,
    /// Hardware address of the network interface
    #[arg(long, value_name = "ADDRESS", value_parser = publish::mac_address)]
    mac_address: Option<[u8; 6]>,
    /// Address in the network
    #[arg(long, value_name = "ADDRESS", value_parser = publish::ip)]
    ip: Option<Ipv4Addr>,
    /// IPv6 address in the network
    #[arg(long, value_name = "ADDRESS", value_parser = publish::ip6)]
    ip6: Option<Ipv6Addr>,
}

impl NetworkArgs {
    /// The network that is asked for, checked as far as can be before it is made.
    pub fn request(&self, config: &Config) -> Result<NetworkRequest> {
        let network = self.network.as_ref().unwrap_or(&config.network);
        let mut limits = config.network_limits(true);
        limits.rate = self.network_rate.unwrap_or(0);
        // A name may become another container's.
        let mut full_name = None;
        let attach = match network {
            Network::None => {
                self.refuse_without_network()?;
                None
            }
            Network::Container(name) => {
                self.refuse_of_another_container(name)?;
                let (id, _) = client::machine_of(&config.paths(), name)?;
                full_name = Some(format!("container:{id}"));
                Some(AttachRequest::Container { id })
            }
            Network::Named(name) if config.without_root => {
                if limits.link_local == LinkLocal::None {
                    // Pasta speaks for the host from such an address.
                    limits.link_local = LinkLocal::Ipv6;
                }
                Some(AttachRequest::Pasta(self.pasta(name, config)?))
            }
            Network::Named(name) => Some(AttachRequest::Cni(self.cni(name, config)?)),
        };
        Ok(NetworkRequest {
            name: full_name.unwrap_or_else(|| network.to_string()),
            attach,
            limits,
        })
    }

    /// The first option that is given of those that are about a network of the container's own.
    fn about_own_network(&self) -> Option<&'static str> {
        let given = [
            (!self.publish.is_empty(), "--publish"),
            (self.network_rate.is_some(), "--network-rate"),
            (self.mac_address.is_some(), "--mac-address"),
            (self.ip.is_some(), "--ip"),
            (self.ip6.is_some(), "--ip6"),
        ];
        given
            .into_iter()
            .find_map(|(given, option)| given.then_some(option))
    }

    /// Options that mean nothing without a network.
    fn refuse_without_network(&self) -> Result<()> {
        match self.about_own_network() {
            Some(option) => Err(Error::new(format!(
                "{option}: the container has no network (--network none)"
            ))
            .hint("--network default gives it one")),
            None => Ok(()),
        }
    }

    /// Options that another container has decided about.
    fn refuse_of_another_container(&self, name: &str) -> Result<()> {
        let names = [
            (!self.dns.is_empty(), "--dns"),
            (!self.dns_search.is_empty(), "--dns-search"),
            (!self.dns_option.is_empty(), "--dns-option"),
            (!self.add_host.is_empty(), "--add-host"),
        ];
        let given = names
            .into_iter()
            .find_map(|(given, option)| given.then_some(option));
        match self.about_own_network().or(given) {
            Some(option) => Err(Error::new(format!(
                "{option}: the container has the network of container {name}"
            ))
            .hint(format!("{option} belongs to hull run of {name}"))),
            None => Ok(()),
        }
    }

    /// The network without root.
    fn pasta(&self, name: &str, config: &Config) -> Result<PastaRequest> {
        if name != cni::DEFAULT_NAME {
            return Err(Error::new(format!(
                "not supported without root: network {name}: its plugins change the host's network"
            ))
            .hint("--network default"));
        }
        let given = [(self.ip.is_some(), "--ip"), (self.ip6.is_some(), "--ip6")];
        if let Some((_, option)) = given.into_iter().find(|(given, _)| *given) {
            return Err(Error::new(format!(
                "not supported without root: {option}: the container has the host's addresses"
            )));
        }
        Ok(PastaRequest {
            ports: self.ports(config)?,
            mac: self.mac_address,
        })
    }

    /// The ports to be published, of which those of the host are free.
    fn ports(&self, config: &Config) -> Result<Vec<PortMapping>> {
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
        // Held again by the sandbox process, for as long as the container runs.
        match ports::reserve(&published) {
            Ok(reserved) => Ok(reserved.mappings),
            Err(why) if config.without_root && why.contains("ermission denied") => {
                Err(Error::new(why).hint(
                    "ports from 1024 on are for everybody; others the administrator can allow: \
                     sysctl net.ipv4.ip_unprivileged_port_start=80",
                ))
            }
            Err(why) => Err(Error::new(why)),
        }
    }

    fn cni(&self, name: &str, config: &Config) -> Result<CniRequest> {
        let ports = self.ports(config)?;
        let list = list(name, !ports.is_empty())?;
        let own = match name {
            cni::DEFAULT_NAME => Some(OwnNetwork {
                bridge: cni::DEFAULT_BRIDGE.to_owned(),
                subnets: subnets()?,
            }),
            _ => None,
        };
        let addresses = [self.ip.map(IpAddr::V4), self.ip6.map(IpAddr::V6)];
        Ok(CniRequest {
            list,
            own,
            ports,
            ips: addresses
                .into_iter()
                .flatten()
                .map(|ip| cni::Address { ip, prefix: None })
                .collect(),
            mac: self.mac_address,
        })
    }

    /// What the container finds names by.
    pub fn names(&self) -> NameRequest {
        NameRequest {
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

/// What went wrong, with what mends it.
pub fn failure(error: cni::Error) -> Error {
    let hint = error.hint();
    let error = Error::new(error.to_string());
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// The subnets of hull's own network: one of IPv4, and one of IPv6 where the host knows that.
fn subnets() -> Result<Vec<cni::Address>> {
    let mut subnets = vec![cni::DEFAULT_IPV4];
    if Path::new("/proc/net/if_inet6").exists() {
        subnets.push(cni::DEFAULT_IPV6);
    }
    let parse = |text: &str| {
        text.parse()
            .map_err(|why| Error::new(format!("{text}: {why}")))
    };
    subnets.into_iter().map(parse).collect()
}

/// The plugins of a network: the host's configuration of this name, or hull's own, with or without `published` ports.
pub fn list(name: &str, published: bool) -> Result<List> {
    if name != cni::DEFAULT_NAME {
        return List::load(&[cni::CONFIGURATION_DIRECTORY], name).map_err(failure);
    }
    let subnets = subnets()?;
    let [ipv4, ipv6 @ ..] = subnets.as_slice() else {
        return Err(Error::new("hull's own network has no subnet"));
    };
    let (ipv6, leases) = (ipv6.first().copied(), Path::new(LEASES));
    cni::default_network(*ipv4, ipv6, cni::DEFAULT_BRIDGE, leases, published).map_err(failure)
}
