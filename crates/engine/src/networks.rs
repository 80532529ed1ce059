//! Networks that people create: bridges of hull's own, on which containers find each other by their
//! names.
//!
//! `DATA/networks/NAME` has what is known of one in `network.json`, and the names of its containers
//! beside that. Bridge and packet filter are made with the first container and stay until the
//! network is removed. A network is created and removed under one lock.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use hull_network::bridge;
use hull_network::cni::{self, Address, BridgeNetwork, List};
use hull_sandbox::config::OwnNetwork;
use hull_sandbox::store::{Directory, ProcessId, read_versioned, remove_all, unix_time_ns};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::container;
use crate::entries::{self, Lock};
use crate::error::{Context, Error, Result};
use crate::listing::PruneFilter;
use crate::names;
use crate::paths::Paths;
use crate::values::Network;

/// Version of [`NetworkRecord`].
const VERSION: u32 = 1;

/// Name of the file with what is known of a network.
const FILE: &str = "network.json";

/// Where leases of addresses are kept: with the bridges, which are the host's, and not below
/// `run_dir`.
pub(crate) const LEASES: &str = "/run/hull/networks";

/// Subnets are given out of these: 10.88.0.0/24 to 10.95.255.0/24, and one of IPv6 with the same
/// number below the prefix of hull's own (RFC 4193).
const FIRST_IPV4: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 0);
const SUBNETS: u32 = 8 << 8;
const IPV6_PREFIX: [u16; 3] = [0xfd68, 0x756c, 0x6c01];

/// Names that mean something else.
const RESERVED: [&str; 4] = ["default", "bridge", "none", "host"];

/// What is known of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Format of the file: [`VERSION`].
    pub version: u32,
    /// Its name.
    pub name: String,
    /// 64 hexadecimal digits.
    pub id: String,
    /// When it was created, nanoseconds since 1970 UTC.
    pub created_ns: u64,
    /// Its IPv4 subnet.
    pub ipv4: Address,
    /// Its IPv6 subnet.
    #[serde(default)]
    pub ipv6: Option<Address>,
    /// Its gateways, where they are not the first addresses of the subnets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<IpAddr>,
    /// The parts of its subnets that containers get addresses of, where that is not all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Address>,
    /// Its bridge.
    pub bridge: String,
    /// Nothing leaves it.
    #[serde(default)]
    pub internal: bool,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What a user asks for.
#[derive(Debug, Clone, Default)]
pub struct NetworkRequest {
    /// Its name.
    pub name: String,
    /// Its subnets; chosen when absent.
    pub subnets: Vec<Address>,
    /// The host's addresses in these subnets.
    pub gateways: Vec<IpAddr>,
    /// Parts of these subnets that containers get addresses of.
    pub ranges: Vec<Address>,
    /// Nothing leaves it.
    pub internal: bool,
    /// Without IPv6, also where the host has it.
    pub without_ipv6: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl NetworkRecord {
    /// The host's address in a subnet of it.
    pub fn gateway(&self, subnet: &Address) -> Option<IpAddr> {
        let mut given = self.gateways.iter();
        let given = given.find(|gateway| gateway.is_ipv4() == subnet.ip.is_ipv4());
        given.copied().or_else(|| cni::first_address(subnet))
    }

    /// Its subnets.
    pub fn subnets(&self) -> Vec<Address> {
        std::iter::once(self.ipv4).chain(self.ipv6).collect()
    }

    /// Its plugins.
    ///
    /// # Errors
    /// What is written down makes no network.
    pub fn list(&self, published: bool) -> Result<List> {
        Ok(cni::bridge_network(&BridgeNetwork {
            name: &self.name,
            bridge: &self.bridge,
            ipv4: self.ipv4,
            ipv6: self.ipv6,
            gateways: &self.gateways,
            ranges: &self.ranges,
            internal: self.internal,
            data_dir: Path::new(LEASES),
            published,
        })?)
    }

    /// What the host's packet filter has to know.
    pub fn own(&self) -> OwnNetwork {
        OwnNetwork {
            bridge: self.bridge.clone(),
            subnets: self.subnets(),
            internal: self.internal,
        }
    }
}

/// Refuses what needs root.
///
/// # Errors
/// `Unsupported` without root.
pub fn need_root(config: &Config) -> Result<()> {
    match config.without_root {
        false => Ok(()),
        true => Err(
            Error::unsupported("networks without root: they are bridges of the host")
                .hint("--network default, or container:NAME"),
        ),
    }
}

fn lock(paths: &Paths) -> Result<Lock> {
    Lock::take(&paths.networks())
}

/// The directory with the names of a network's containers.
pub(crate) fn names_directory(paths: &Paths, name: &str) -> PathBuf {
    paths.networks().join(name).join("names")
}

/// The network of this name, or with an id that begins so.
///
/// # Errors
/// `NotFound`; what is written down is damaged, or a newer hull's.
pub fn find(paths: &Paths, name: &str) -> Result<NetworkRecord> {
    if let Some(found) = load(paths, name)? {
        return Ok(found);
    }
    let mut found = list(paths)?;
    found.retain(|network| name.len() >= 4 && network.id.starts_with(name));
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(Error::not_found(format!("no such network: {name}"))
            .hint("hull network ls lists all networks")),
    }
}

/// The network of this name, if there is one.
pub(crate) fn load(paths: &Paths, name: &str) -> Result<Option<NetworkRecord>> {
    if !names::is_valid(name) {
        return Ok(None);
    }
    let path = paths.networks().join(name);
    match Directory::open(&path) {
        Ok(directory) => read_versioned(&directory, FILE, VERSION),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("open {}", path.display())),
    }
}

/// All networks that people created, by name.
///
/// # Errors
/// Their directory cannot be read, or one is damaged.
pub fn list(paths: &Paths) -> Result<Vec<NetworkRecord>> {
    let names = entries::names(&paths.networks())?;
    let loaded = names
        .iter()
        .filter_map(|name| load(paths, name).transpose());
    loaded.collect()
}

/// Creates a network.
///
/// # Errors
/// `Exists`; its name or subnet is invalid, or its subnet is in use.
pub fn create(paths: &Paths, request: NetworkRequest) -> Result<NetworkRecord> {
    let name = &request.name;
    if !names::is_valid(name) || RESERVED.contains(&&name[..]) {
        return Err(Error::invalid(format!(
            "invalid network name {name:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]+ is allowed, and not {}",
            RESERVED.join(", ")
        )));
    }
    let _lock = lock(paths)?;
    let exists = |place: &str| {
        Error::exists(format!("network {name} exists{place}"))
            .hint("hull network ls lists all networks")
    };
    if load(paths, name)?.is_some() {
        return Err(exists(""));
    }
    if List::load(&[cni::CONFIGURATION_DIRECTORY], name).is_ok() {
        return Err(exists(" in /etc/cni/net.d"));
    }
    let asked = request.gateways.iter().copied();
    let asked = asked.chain(request.ranges.iter().map(|range| range.ip));
    for address in asked {
        if !request.subnets.iter().any(|subnet| subnet.holds(address)) {
            return Err(
                Error::invalid(format!("{address} is in no subnet of network {name}"))
                    .hint("--subnet gives it one"),
            );
        }
    }
    let families = |addresses: &[IpAddr]| {
        let is_ipv4 = |address: &&IpAddr| address.is_ipv4();
        let ipv4 = addresses.iter().filter(is_ipv4).count();
        ipv4 <= 1 && addresses.len() - ipv4 <= 1
    };
    let ranges: Vec<IpAddr> = request.ranges.iter().map(|range| range.ip).collect();
    if !families(&request.gateways) || !families(&ranges) {
        return Err(Error::unsupported(
            "two gateways or ranges of one family in a network",
        ));
    }
    let used = in_use(paths)?;
    let mut ipv4 = None;
    let mut ipv6 = None;
    for subnet in &request.subnets {
        let of_family = if subnet.ip.is_ipv4() {
            &mut ipv4
        } else {
            &mut ipv6
        };
        if of_family.replace(subnet.network()).is_some() {
            return Err(Error::unsupported("two subnets of one family in a network"));
        }
        if let Some(other) = used.iter().find(|other| other.overlaps(*subnet)) {
            return Err(Error::invalid(format!(
                "--subnet: {subnet} overlaps {other}, which is in use on this host"
            )));
        }
    }
    let (free_ipv4, free_ipv6) = choose(&used)?;
    let has_ipv6 = Path::new("/proc/net/if_inet6").exists() && !request.without_ipv6;
    let id = names::new_id()?;
    let record = NetworkRecord {
        version: VERSION,
        name: name.clone(),
        // An interface's name has at most 15 bytes.
        bridge: format!("hull-{}", id.get(..10).unwrap_or_default()),
        id,
        created_ns: unix_time_ns(),
        ipv4: ipv4.unwrap_or(free_ipv4),
        ipv6: ipv6.or(has_ipv6.then_some(free_ipv6)),
        gateways: request.gateways,
        ranges: request.ranges,
        internal: request.internal,
        labels: request.labels,
    };
    // Whether it makes a network is found out here.
    record.list(false)?;
    let ProcessId { pid, started } = ProcessId::own();
    let staging = paths.networks().join(format!(".{pid}-{started}"));
    let doing = || format!("create network {name}");
    remove_all(&staging)?;
    let created = Directory::create_new(&staging)
        .context(doing)
        .and_then(|directory| {
            let text = serde_json::to_vec_pretty(&record).context(doing)?;
            directory.write(FILE, &text)?;
            directory
                .rename_to(&paths.networks().join(name))
                .context(doing)
        });
    created.inspect_err(|_| drop(remove_all(&staging)))?;
    Ok(record)
}

/// The containers of a network, running or not, by name.
///
/// # Errors
/// A container cannot be read: it may be one of them.
pub fn users(paths: &Paths, name: &str) -> Result<Vec<String>> {
    let mut users = Vec::new();
    for container in container::list(paths)? {
        let details = container.map_err(|(_, error)| error)?.record.details;
        let asked = details.options.as_ref().and_then(|options| {
            let network = options.network.network.as_ref()?;
            let mut further = options.network.further.iter();
            let is_first = *network == Network::Named(name.to_owned());
            Some(is_first || further.any(|further| further.network == name))
        });
        if asked.unwrap_or(details.network == name) {
            users.push(details.name);
        }
    }
    Ok(users)
}

/// Finds out whether a network is there still: it may have been removed while an image was pulled.
/// From when a container that wants it has a record, it stays.
///
/// # Errors
/// `NotFound`, also when there is another one of that name.
pub(crate) fn check_there(paths: &Paths, network: &NetworkRecord) -> Result<()> {
    let _lock = lock(paths)?;
    match load(paths, &network.name)? {
        Some(now) if now.id == network.id => Ok(()),
        _ => Err(Error::not_found(format!(
            "network {} was removed meanwhile",
            network.name
        ))),
    }
}

/// Removes a network that no container is in, with its bridge and what is in the packet filter.
///
/// # Errors
/// `NotFound`; `WrongState` when a container is in it; the kernel refuses.
pub fn remove(paths: &Paths, name: &str) -> Result<()> {
    if RESERVED.contains(&name) {
        return Err(Error::invalid(format!(
            "network {name} cannot be removed: it is always there"
        )));
    }
    let found = find(paths, name)?;
    let _lock = lock(paths)?;
    let users = users(paths, &found.name)?;
    if !users.is_empty() {
        return Err(Error::wrong_state(format!(
            "network {} has containers: {}",
            found.name,
            users.join(", ")
        ))
        .hint("remove them first: hull rm"));
    }
    remove_locked(paths, &found)
}

fn remove_locked(paths: &Paths, network: &NetworkRecord) -> Result<()> {
    bridge::remove(&network.name, &network.bridge)?;
    remove_all(&Path::new(LEASES).join(&network.name))?;
    remove_all(&paths.networks().join(&network.name))
}

/// Removes all networks that no container is in, and that conditions select; their names.
///
/// # Errors
/// One cannot be removed.
pub fn prune(paths: &Paths, filters: &[PruneFilter]) -> Result<Vec<String>> {
    let _lock = lock(paths)?;
    let mut removed = Vec::new();
    for network in list(paths)? {
        if !PruneFilter::all_select(filters, network.created_ns, &network.labels) {
            continue;
        }
        if users(paths, &network.name)?.is_empty() {
            remove_locked(paths, &network)?;
            removed.push(network.name);
        }
    }
    Ok(removed)
}

/// Subnets of hull's networks, and those that the host has routes to.
fn in_use(paths: &Paths) -> Result<Vec<Address>> {
    let mut used: Vec<Address> = list(paths)?
        .iter()
        .flat_map(NetworkRecord::subnets)
        .collect();
    let own = [cni::DEFAULT_IPV4, cni::DEFAULT_IPV6];
    used.extend(own.iter().filter_map(|text| text.parse::<Address>().ok()));
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    used.extend(routes.lines().skip(1).filter_map(route));
    Ok(used)
}

/// The destination of a line of /proc/net/route, unless it is everything.
fn route(line: &str) -> Option<Address> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let number = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
    // As they are in memory.
    let (destination, mask) = (number(1)?.to_ne_bytes(), number(7)?.to_ne_bytes());
    let prefix = u32::from_be_bytes(mask).count_ones();
    (prefix > 0).then_some(Address {
        ip: Ipv4Addr::from(destination).into(),
        prefix: u8::try_from(prefix).ok(),
    })
}

/// The first subnets that are free.
fn choose(used: &[Address]) -> Result<(Address, Address)> {
    let subnets = (0..SUBNETS).map(|number| {
        let ipv4 = Ipv4Addr::from(u32::from(FIRST_IPV4) + (number << 8));
        let [a, b, c] = IPV6_PREFIX;
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        let ipv6 = Ipv6Addr::new(a, b, c, number, 0, 0, 0, 0);
        let subnet = |ip, prefix| Address {
            ip,
            prefix: Some(prefix),
        };
        (subnet(ipv4.into(), 24), subnet(ipv6.into(), 64))
    });
    let is_free = |wanted: Address| !used.iter().any(|other| other.overlaps(wanted));
    let mut subnets = subnets.filter(|(ipv4, ipv6)| is_free(*ipv4) && is_free(*ipv6));
    subnets.next().ok_or_else(|| {
        Error::new("there is no free subnet for a network").hint("hull network create --subnet")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn subnet(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn subnets_overlap_when_one_is_in_the_other() {
        for (a, b, wanted) in [
            ("10.88.0.0/24", "10.88.0.128/25", true),
            ("10.88.0.0/24", "10.88.1.0/24", false),
            ("10.0.0.0/8", "10.88.1.0/24", true),
            ("0.0.0.0/0", "10.88.1.0/24", true),
            ("fd00::/8", "10.88.1.0/24", false),
            ("fd00::/8", "fd68:756c:6c01:1::/64", true),
        ] {
            assert_eq!(subnet(a).overlaps(subnet(b)), wanted, "{a} {b}");
            assert_eq!(subnet(b).overlaps(subnet(a)), wanted, "{b} {a}");
        }
        assert_eq!(subnet("10.1.2.3/16").network(), subnet("10.1.0.0/16"));
    }

    #[test]
    fn the_first_free_subnet_is_chosen() {
        let (ipv4, ipv6) = choose(&[]).unwrap();
        assert_eq!(
            (ipv4, ipv6),
            (subnet("10.88.0.0/24"), subnet("fd68:756c:6c01::/64"))
        );
        let (ipv4, ipv6) = choose(&[ipv4, subnet("10.88.1.7/32")]).unwrap();
        assert_eq!(
            (ipv4, ipv6),
            (subnet("10.88.2.0/24"), subnet("fd68:756c:6c01:2::/64"))
        );
        assert!(choose(&[subnet("10.0.0.0/8")]).is_err());
    }

    #[test]
    fn routes_of_the_host_are_understood() {
        let line = "hull0\t0000570A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0";
        assert_eq!(route(line), Some(subnet("10.87.0.0/16")));
        let line = "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0";
        assert_eq!(route(line), None);
    }

    #[test]
    fn a_network_is_there_once_it_was_created() {
        let (_directory, paths) = Paths::temporary();
        let request = |name: &str, subnets: &[&str]| NetworkRequest {
            name: name.to_owned(),
            subnets: subnets.iter().map(|text| subnet(text)).collect(),
            ..NetworkRequest::default()
        };
        let net = create(&paths, request("net", &["10.201.7.9/24"])).unwrap();
        assert_eq!(net.ipv4, subnet("10.201.7.0/24"));
        assert!(net.bridge.starts_with("hull-") && net.bridge.len() <= 15);
        assert_eq!(find(&paths, "net").unwrap(), net);
        assert_eq!(find(&paths, &net.id[..6]).unwrap(), net);
        let error = create(&paths, request("net", &[])).unwrap_err();
        assert!(error.message.contains("network net exists"), "{error}");
        let error = create(&paths, request("other", &["10.201.0.0/16"])).unwrap_err();
        assert!(error.message.contains("overlaps 10.201.7.0/24"), "{error}");
        for name in ["none", "a/b", "default"] {
            create(&paths, request(name, &[])).unwrap_err();
        }
        assert_eq!(list(&paths).unwrap(), [net]);
    }
}
