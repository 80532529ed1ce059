//! Network configuration lists: the files of `/etc/cni/net.d`, and hull's own network.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::attachment::{Address, is_identifier, is_interface_name};
use super::error::{Error, Result, one_line};

/// Where administrators and other programs put configurations.
pub const CONFIGURATION_DIRECTORY: &str = "/etc/cni/net.d";
/// Name of hull's own network.
pub const DEFAULT_NAME: &str = "default";
/// Bridge of hull's own network.
pub const DEFAULT_BRIDGE: &str = "hull0";
/// Addresses of hull's own network. Below podman's (10.88.0.0/16 and above), far from Docker's
/// (172.17.0.0/16 and above).
pub const DEFAULT_IPV4: &str = "10.87.0.0/16";
/// Unique local addresses of hull's own network: `fd`, and `hul` in ASCII.
pub const DEFAULT_IPV6: &str = "fd68:756c:6c00::/64";

/// A configuration is some kilobytes.
const MOST_BYTES: u64 = 1 << 20;

/// A version of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    const ALL: [Version; 4] = [
        Version::V0_3_1,
        Version::V0_4_0,
        Version::V1_0_0,
        Version::V1_1_0,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    pub fn read(text: &str) -> Result<Version, String> {
        Version::ALL
            .into_iter()
            .find(|version| version.name() == text)
            .ok_or_else(|| {
                format!(
                    "cniVersion {text:?} is not supported: {}",
                    Version::ALL.map(Version::name).join(", ")
                )
            })
    }
}

/// The plugins of one network, in order. As JSON it is the configuration list itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct List {
    name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// The configuration of one plugin.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plugin {
    /// File name of the executable.
    pub kind: String,
    /// As written.
    pub config: Map<String, Value>,
}

impl List {
    /// Has plugin `portmap` leave out connections to ::1, which it would lead to an address to
    /// which nothing can come from ::1: they would hang. Conditions that are written stay as they
    /// are.
    pub fn leave_out_ipv6_loopback(&mut self) {
        for plugin in &mut self.plugins {
            if plugin.kind == "portmap" && !plugin.config.contains_key("conditionsV6") {
                let condition = json!(["!", "-d", "::1"]);
                plugin.config.insert("conditionsV6".to_owned(), condition);
            }
        }
    }

    /// Has `host-local` give out these addresses also when they are outside of the parts of subnets
    /// that it chooses from.
    pub fn admit_addresses(&mut self, addresses: &[IpAddr]) {
        let ranges = self.plugins.iter_mut().filter_map(|plugin| {
            plugin
                .config
                .get_mut("ipam")?
                .get_mut("ranges")?
                .as_array_mut()
        });
        let ranges = ranges.flatten().filter_map(Value::as_array_mut).flatten();
        for range in ranges {
            let subnet = range["subnet"]
                .as_str()
                .and_then(|text| text.parse::<Address>().ok());
            let asked = |subnet: &Address| addresses.iter().any(|address| subnet.holds(*address));
            if let (Some(range), true) = (range.as_object_mut(), subnet.as_ref().is_some_and(asked))
            {
                range.remove("rangeStart");
                range.remove("rangeEnd");
            }
        }
    }

    /// Finds a network by name in directories, of which some may not exist. Files are read in the
    /// order of their names, `*.conflist`, `*.conf` and `*.json`; the first of a name counts. Files
    /// of other networks may be broken.
    pub fn load(directories: &[impl AsRef<Path>], name: &str) -> Result<List> {
        let mut known = Vec::new();
        let mut unreadable = Vec::new();
        for path in files(directories, &["conflist", "conf", "json"])? {
            match read(&path).and_then(|value| Ok((name_in(&value, &place(&path))?, value))) {
                Ok((found, value)) if found == name => return List::from_file(value, &path),
                Ok((found, _)) if known.contains(&found) => {}
                Ok((found, _)) => known.push(found),
                Err(error) => unreadable.push(error.to_string()),
            }
        }
        Err(Error::NotFound {
            name: name.to_owned(),
            known,
            unreadable,
        })
    }

    /// The names of all networks, in the order of their files; whether they are valid shows when
    /// they are loaded.
    pub fn names(directories: &[impl AsRef<Path>]) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for path in files(directories, &["conflist", "conf", "json"])? {
            let name = read(&path).and_then(|value| name_in(&value, &place(&path)));
            names.extend(name.ok().filter(|name| !names.contains(name)));
        }
        Ok(names)
    }

    /// A list, or the configuration of a single plugin, that comes from no file.
    pub fn from_value(value: Value) -> Result<List> {
        let place = value
            .get("name")
            .and_then(Value::as_str)
            .map_or("without a name".to_owned(), |name| format!("{name:?}"));
        List::parse(value, Vec::new(), &place)
    }

    /// The network's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether any plugin declares this capability.
    pub fn has_capability(&self, name: &str) -> bool {
        self.plugins
            .iter()
            .any(|plugin| plugin.has_capability(name))
    }

    fn from_file(value: Value, path: &Path) -> Result<List> {
        let place = place(path);
        let only_inlined =
            flag(&value, "loadOnlyInlinedPlugins").map_err(|why| invalid(&place, why))?;
        let mut further = Vec::new();
        // Since 1.1.0: further plugins of the network NAME in the files of the directory NAME.
        if let (false, Some(name), Some(directory)) =
            (only_inlined, value["name"].as_str(), path.parent())
            && value.get("type").is_none()
            && is_identifier(name)
        {
            for path in files(&[directory.join(name)], &["conf"])? {
                further.push(
                    Plugin::parse(read(&path)?).map_err(|why| invalid(&self::place(&path), why))?,
                );
            }
        }
        List::parse(value, further, &place)
    }

    fn parse(value: Value, further: Vec<Plugin>, place: &str) -> Result<List> {
        let name = name_in(&value, place)?;
        List::parse_named(name, value, further).map_err(|why| invalid(place, why))
    }

    fn parse_named(name: String, mut value: Value, further: Vec<Plugin>) -> Result<List, String> {
        if !is_identifier(&name) {
            return Err(format!(
                "the name {name:?} is not made of letters, digits, _ . and -"
            ));
        }
        let version = version_in(&value)?;
        let disable_check = flag(&value, "disableCheck")?;
        let own = match value.get_mut("plugins").map(Value::take) {
            Some(Value::Array(plugins)) => plugins,
            None if value.get("type").is_some() => vec![value],
            None => Vec::new(),
            Some(_) => return Err("plugins is no list".to_owned()),
        };
        let mut plugins = Vec::with_capacity(own.len() + further.len());
        for (index, config) in own.into_iter().enumerate() {
            plugins
                .push(Plugin::parse(config).map_err(|why| format!("plugin {}: {why}", index + 1))?);
        }
        plugins.extend(further);
        if plugins.is_empty() {
            return Err("it has no plugins".to_owned());
        }
        Ok(List {
            name,
            version,
            disable_check,
            plugins,
        })
    }
}

impl TryFrom<Value> for List {
    type Error = Error;

    fn try_from(value: Value) -> Result<List> {
        List::from_value(value)
    }
}

impl From<List> for Value {
    fn from(list: List) -> Value {
        let plugins = list.plugins.into_iter();
        let plugins: Value = plugins.map(|plugin| Value::Object(plugin.config)).collect();
        json!({
            "cniVersion": list.version.name(),
            "name": list.name,
            "disableCheck": list.disable_check,
            "plugins": plugins,
        })
    }
}

impl Plugin {
    fn parse(config: Value) -> Result<Plugin, String> {
        let Value::Object(config) = config else {
            return Err("it is no JSON object".to_owned());
        };
        let kind = match config.get("type") {
            Some(Value::String(kind)) if !kind.is_empty() => kind.clone(),
            Some(Value::String(_)) | None => return Err("it has no type".to_owned()),
            Some(other) => return Err(format!("its type is {other}")),
        };
        // It names a file in the directories of plugins, and never another one.
        if kind.contains(['/', '\0']) || matches!(kind.as_str(), "." | "..") {
            return Err(format!("its type {kind:?} is no plain file name"));
        }
        let capabilities = config.get("capabilities").unwrap_or(&Value::Null);
        let valid = match capabilities {
            Value::Null => true,
            Value::Object(all) => all.values().all(Value::is_boolean),
            _ => false,
        };
        if !valid {
            return Err("its capabilities are not an object of true and false".to_owned());
        }
        Ok(Plugin { kind, config })
    }

    pub fn has_capability(&self, name: &str) -> bool {
        self.config
            .get("capabilities")
            .and_then(|all| all.get(name))
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }
}

/// A bridge network of hull's own.
#[derive(Debug, Clone, Copy)]
pub struct BridgeNetwork<'a> {
    /// Its name.
    pub name: &'a str,
    /// The bridge.
    pub bridge: &'a str,
    /// Its IPv4 subnet.
    pub ipv4: Address,
    /// Its IPv6 subnet.
    pub ipv6: Option<Address>,
    /// The bridge's addresses, one for each family at most; the first of the subnet when absent.
    pub gateways: &'a [IpAddr],
    /// The parts of the subnets that containers get addresses of, one for each family at most.
    pub ranges: &'a [Address],
    /// Containers reach each other and the host, and nothing outside.
    pub internal: bool,
    /// Where leases of addresses are kept.
    pub data_dir: &'a Path,
    /// Ports of a container are published.
    pub published: bool,
}

/// hull's own network: a bridge, addresses given out by `host-local`, and published ports. What
/// gives containers the host's address outside, and lets them through a packet filter, is for the
/// network, not for each container: [`crate::masquerade`], [`crate::forwarding`].
///
/// Version 0.4.0: the oldest in which plugins get their result back when they undo, so that any
/// release of the plugins will do.
pub fn bridge_network(network: &BridgeNetwork<'_>) -> Result<List> {
    let BridgeNetwork {
        name,
        bridge,
        ipv4,
        ipv6,
        gateways,
        ranges,
        internal,
        data_dir,
        published,
    } = *network;
    let wrong = |why: String| invalid(&format!("{name:?}"), why);
    // A network needs its own address, the bridge's, one of a container, and that of broadcasts.
    let fits = |subnet: Address, most: u8| {
        subnet
            .prefix
            .is_some_and(|prefix| (1..=most - 2).contains(&prefix))
    };
    if !ipv4.ip.is_ipv4() || !fits(ipv4, 32) {
        return Err(wrong(format!(
            "{ipv4} is no IPv4 subnet like {DEFAULT_IPV4}"
        )));
    }
    if let Some(ipv6) = ipv6.filter(|subnet| !subnet.ip.is_ipv6() || !fits(*subnet, 128)) {
        return Err(wrong(format!(
            "{ipv6} is no IPv6 subnet like {DEFAULT_IPV6}"
        )));
    }
    if !is_interface_name(bridge) {
        return Err(wrong(format!("{bridge:?} is no name of an interface")));
    }
    let subnets = || std::iter::once(ipv4).chain(ipv6);
    let mut sets = Vec::new();
    for subnet in subnets() {
        let is_ipv4 = subnet.ip.is_ipv4();
        let mut set = json!({ "subnet": subnet });
        if let Some(gateway) = gateways.iter().find(|gateway| gateway.is_ipv4() == is_ipv4) {
            let (first, last) = subnet.ends();
            if !subnet.holds(*gateway) || *gateway == first || (is_ipv4 && *gateway == last) {
                return Err(wrong(format!(
                    "{gateway} is no address of a host in {subnet}"
                )));
            }
            set["gateway"] = json!(gateway);
        }
        if let Some(range) = ranges.iter().find(|range| range.ip.is_ipv4() == is_ipv4) {
            let (first, last) = range.ends();
            let (of_subnet, to_subnet) = subnet.ends();
            if !subnet.holds(first) || !subnet.holds(last) {
                return Err(wrong(format!("the range {range} is not in {subnet}")));
            }
            // Neither the network's own address nor that of broadcasts.
            let inner = |address: IpAddr, step: i8| neighbour(address, step).unwrap_or(address);
            let first = if first == of_subnet {
                inner(first, 1)
            } else {
                first
            };
            let last = if last == to_subnet {
                inner(last, -1)
            } else {
                last
            };
            let gateway = gateways.iter().find(|gateway| gateway.is_ipv4() == is_ipv4);
            let gateway = gateway.copied().or_else(|| first_address(&subnet));
            if first > last || (first == last && gateway == Some(first)) {
                return Err(wrong(format!("no container gets an address in {range}")));
            }
            set["rangeStart"] = json!(first);
            set["rangeEnd"] = json!(last);
        }
        sets.push(json!([set]));
    }
    let ranges = Value::Array(sets);
    let routes: Value = subnets()
        .filter(|_| !internal)
        .map(|subnet| json!({ "dst": if subnet.ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" } }))
        .collect();
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": bridge,
        "isGateway": true,
        "hairpinMode": true,
        "capabilities": { "ips": true, "mac": true },
        "ipam": { "type": "host-local", "dataDir": data_dir, "ranges": ranges, "routes": routes },
    })];
    if published {
        plugins.push(port_plugin());
    }
    List::from_value(json!({
        "cniVersion": Version::V0_4_0.name(),
        "name": name,
        // portmap (1.1.1) searches the ports of IPv4 among those of IPv6, and does not find them.
        "disableCheck": ipv6.is_some(),
        "plugins": plugins,
    }))
}

/// The first address in a subnet: the bridge's, unless another one is asked for.
pub fn first_address(subnet: &Address) -> Option<IpAddr> {
    neighbour(subnet.ends().0, 1)
}

/// The next address, or the one before.
fn neighbour(address: IpAddr, step: i8) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => IpAddr::V4(Ipv4Addr::from_bits(
            address.to_bits().checked_add_signed(step.into())?,
        )),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(
            address.to_bits().checked_add_signed(step.into())?,
        )),
    })
}

/// The list that leads published ports to an interface of a network which is there already: its
/// record builds [upon](super::Record::upon) the network's.
///
/// # Errors
/// The name is none of a network.
pub fn published_ports(network: &str) -> Result<List> {
    List::from_value(json!({
        "cniVersion": Version::V0_4_0.name(),
        "name": network,
        "plugins": [port_plugin()],
    }))
}

fn port_plugin() -> Value {
    json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true })
}

fn invalid(place: &str, why: impl Into<String>) -> Error {
    Error::Invalid {
        place: place.to_owned(),
        why: why.into(),
    }
}

fn place(path: &Path) -> String {
    path.display().to_string()
}

/// The files of directories with one of these extensions, each directory's in the order of their
/// names.
fn files(directories: &[impl AsRef<Path>], extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for directory in directories {
        let directory = directory.as_ref();
        let unreadable = |source| Error::Unreadable {
            path: directory.to_owned(),
            source,
        };
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(unreadable)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if extension.is_some_and(|extension| extensions.contains(&extension)) && path.is_file()
            {
                paths.push(path);
            }
        }
        paths.sort();
        all.append(&mut paths);
    }
    Ok(all)
}

fn read(path: &Path) -> Result<Value> {
    let unreadable = |source| Error::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut text))
        .map_err(unreadable)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(invalid(&place(path), "it is larger than 1 MiB"));
    }
    serde_json::from_slice(&text)
        .map_err(|error| invalid(&place(path), format!("no JSON: {error}")))
}

fn name_in(value: &Value, place: &str) -> Result<String> {
    match value.get("name") {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => Err(invalid(
            place,
            format!("its name is {}", one_line(&other.to_string())),
        )),
        None if value.is_object() => Err(invalid(place, "it has no name")),
        None => Err(invalid(place, "it is no JSON object")),
    }
}

/// `cniVersion`, or the newest of `cniVersions` (since 1.1.0) that hull speaks.
fn version_in(value: &Value) -> Result<Version, String> {
    let newest = match value.get("cniVersions") {
        None | Some(Value::Null) => None,
        Some(Value::Array(versions)) => versions
            .iter()
            .filter_map(Value::as_str)
            .filter_map(|text| Version::read(text).ok())
            .max(),
        Some(_) => return Err("cniVersions is no list".to_owned()),
    };
    match (value.get("cniVersion"), newest) {
        (Some(Value::String(text)), None) => Version::read(text),
        (Some(Value::String(text)), Some(newest)) => {
            Ok(Version::read(text).map_or(newest, |own| own.max(newest)))
        }
        (None, Some(newest)) => Ok(newest),
        (None, None) => Err("it has no cniVersion".to_owned()),
        (Some(other), _) => Err(format!("its cniVersion is {other}")),
    }
}

/// A boolean, which the specification once called a string.
fn flag(value: &Value, key: &str) -> Result<bool, String> {
    match value.get(key) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} is {other}")),
    }
}
