//! A container in one of its networks, and how it gets there: with its creation, or by a later
//! connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::Record;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::container::{self, Container};
use crate::dns;
use crate::error::{Error, ErrorKind, Result};
use crate::names;
use crate::network::NetworkOptions;
use crate::networks;
use crate::paths::Paths;
use crate::publish;
use crate::values::{self, Network};

/// A container in a network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// The network's name.
    pub network: String,
    /// Further names of the container in the network.
    pub aliases: Vec<String>,
    /// Further names by which it alone finds others there: another's name, and what it calls it.
    pub links: Vec<(String, String)>,
    /// Hardware address.
    pub mac_address: Option<[u8; 6]>,
    /// IPv4 address.
    pub ip: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ip6: Option<Ipv6Addr>,
}

impl Endpoint {
    /// The addresses that are asked for.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let addresses = [self.ip.map(IpAddr::V4), self.ip6.map(IpAddr::V6)];
        addresses.into_iter().flatten().collect()
    }
}

/// `NETWORK`, or `name=NETWORK,alias=NAME,ip=ADDRESS,ip6=ADDRESS,mac-address=ADDRESS`.
///
/// # Errors
/// A field that there is not, or a value that is none.
pub fn endpoint(text: &str) -> std::result::Result<(Network, Endpoint), String> {
    let mut endpoint = Endpoint::default();
    if !text.contains('=') {
        return Ok((values::network(text)?, endpoint));
    }
    let mut name = None;
    for field in text.split(',') {
        let wrong = || {
            format!(
                "invalid network {text:?}: give a name, or name=NETWORK with alias=, ip=, ip6= or \
                 mac-address="
            )
        };
        let (key, value) = field.split_once('=').ok_or_else(wrong)?;
        match key {
            "name" => name = Some(values::network(value)?),
            "alias" => endpoint.aliases.push(values::hostname(value)?),
            "ip" => endpoint.ip = Some(publish::ip(value)?),
            "ip6" => endpoint.ip6 = Some(publish::ip6(value)?),
            "mac-address" => endpoint.mac_address = Some(publish::mac_address(value)?),
            _ => return Err(wrong()),
        }
    }
    match name {
        Some(name) => Ok((name, endpoint)),
        None => Err(format!("invalid network {text:?}: it has no name=")),
    }
}

/// `CONTAINER[:NAME]`.
///
/// # Errors
/// One of them is no name.
pub fn link(text: &str) -> std::result::Result<(String, String), String> {
    let (other, name) = text.split_once(':').unwrap_or((text, text));
    let other = other.trim_start_matches('/');
    let name = name.trim_start_matches('/');
    match names::is_valid(other) && values::hostname(name).is_ok() {
        true => Ok((other.to_owned(), name.to_owned())),
        false => Err(format!(
            "invalid link {text:?}: give the name of a container, and another one for it"
        )),
    }
}

impl NetworkOptions {
    /// Takes networks as a command line gives them: the first one leads outside. What the first one
    /// does not say itself stays as it is.
    ///
    /// # Errors
    /// One of several is no network that a container can be in with others.
    pub fn join(&mut self, networks: Vec<(Network, Endpoint)>) -> Result<()> {
        for (index, (network, endpoint)) in networks.into_iter().enumerate() {
            match network {
                network if index == 0 => {
                    self.network = Some(network);
                    self.take(endpoint);
                }
                Network::Named(name) => self.further.push(Endpoint {
                    network: name,
                    ..endpoint
                }),
                other => {
                    return Err(Error::invalid(format!(
                        "--network {other}: a container that is in it is in no other network"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Makes an endpoint that of the first network.
    fn take(&mut self, endpoint: Endpoint) {
        self.aliases.extend(endpoint.aliases);
        self.links.extend(endpoint.links);
        self.mac_address = endpoint.mac_address.or(self.mac_address);
        self.ip = endpoint.ip.or(self.ip);
        self.ip6 = endpoint.ip6.or(self.ip6);
    }

    fn connect(&mut self, endpoint: Endpoint) -> Result<()> {
        let name = endpoint.network.clone();
        match &self.network {
            None | Some(Network::None) => {
                self.network = Some(Network::Named(name));
                self.take(endpoint);
                Ok(())
            }
            Some(Network::Container(_)) => Err(Error::wrong_state(
                "the container is in the machine of another one, and has its networks",
            )),
            Some(Network::Named(first)) => {
                let mut further = self.further.iter();
                if *first == name || further.any(|known| known.network == name) {
                    return Err(Error::exists(format!(
                        "the container is in network {name} already"
                    )));
                }
                self.further.push(endpoint);
                Ok(())
            }
        }
    }

    fn disconnect(&mut self, name: &str) -> Result<()> {
        let missing = || Error::not_found(format!("the container is not in network {name}"));
        if self.network != Some(Network::Named(name.to_owned())) {
            let index = self.further.iter().position(|one| one.network == name);
            self.further.remove(index.ok_or_else(missing)?);
            return Ok(());
        }
        (self.aliases, self.links) = (Vec::new(), Vec::new());
        (self.mac_address, self.ip, self.ip6) = (None, None, None);
        match self.further.is_empty() {
            true => self.network = Some(Network::None),
            false => {
                let next = self.further.remove(0);
                self.network = Some(Network::Named(next.network.clone()));
                self.take(next);
            }
        }
        Ok(())
    }
}

/// Changes the networks of a container: at once when it runs, and from its next start on. `joins`:
/// it does not leave one.
fn change(
    config: &Config,
    name: &str,
    joins: bool,
    change: impl FnOnce(&mut NetworkOptions) -> Result<()>,
) -> Result<()> {
    let paths = config.paths();
    let found = container::find(&paths, name)?;
    let _lock = container::lock(&found)?;
    let Some(mut container) = Container::load(found.directory.path())? else {
        return Err(Error::not_found(format!("container {name} was removed")));
    };
    let before = container.record.details.clone();
    let details = &mut container.record.details;
    let Some(options) = &mut details.options else {
        return Err(Error::unsupported(format_args!(
            "another network for container {}: an older hull created it",
            before.name
        )));
    };
    change(&mut options.network)?;
    details.network = options.network.name();
    if container::is_idle(&container) {
        return container.record.write(&container.directory);
    }
    // A network that a container is in is not removed.
    if joins {
        container.record.write(&container.directory)?;
    }
    let Err(error) = tell(&container, &paths) else {
        return match joins {
            true => Ok(()),
            false => container.record.write(&container.directory),
        };
    };
    match container::load_settled(&paths, &container.record.id, &error)? {
        None => Err(Error::not_found(format!("container {name} was removed"))),
        // One that has ended meanwhile is in its networks from its next start on.
        Some(now) if container::is_idle(&now) => container.record.write(&container.directory),
        Some(_) => {
            let name = before.name.clone();
            container.record.details = before;
            container.record.write(&container.directory)?;
            Err(match error.kind {
                ErrorKind::Unsupported => error.hint(format!(
                    "it can be done while the container does not run: hull stop {name}"
                )),
                _ => error,
            })
        }
    }
}

/// Has the networks of a container that runs know it by its present name.
///
/// # Errors
/// Its sandbox does not do that.
pub(crate) fn renamed(container: &Container, paths: &Paths) -> Result<()> {
    let options = container.record.details.options.as_ref();
    let Some(asked) = options.map(|options| &options.network) else {
        return Ok(());
    };
    if container::is_idle(container) {
        return Ok(());
    }
    let joined = asked.joined(asked.network.as_ref().unwrap_or(&Network::None), paths)?;
    match joined.iter().any(|network| network.created.is_some()) {
        true => tell(container, paths),
        false => Ok(()),
    }
}

/// Has a running container's sandbox make its networks what is written down.
fn tell(container: &Container, paths: &Paths) -> Result<()> {
    let Record { id, details, .. } = &container.record;
    let Some(options) = &details.options else {
        return Ok(());
    };
    let asked = &options.network;
    let joined = asked.joined(asked.network.as_ref().unwrap_or(&Network::None), paths)?;
    let mut created = joined.iter().filter_map(|network| network.created.as_ref());
    created.try_for_each(|network| networks::check_there(paths, network))?;
    let own = details.names(id);
    let wanted = asked.wanted(id, &own, &details.ports, &joined, paths)?;
    let client = container::connect(container)?;
    let request = Request::ChangeNetworks(Box::new(wanted));
    let addresses = match client.ask(&request, &[])?.message {
        Reply::Network(addresses) => addresses,
        other => return Err(unexpected(&other)),
    };
    let network = (!joined.is_empty()).then_some(&addresses);
    let dns = asked.dns_in(&joined);
    let files = dns::files(&details.hostname, &dns, (&details.network, network));
    let updated = files.and_then(|files| {
        client.do_(&Request::UpdateFiles {
            container: id.clone(),
            files,
        })
    });
    // The networks are changed, whatever becomes of these.
    if let Err(error) = updated {
        tracing::warn!("hosts and resolv.conf of the container stay as they are: {error}");
    }
    Ok(())
}

/// The name of a network, which may be given by its id.
///
/// # Errors
/// It is no network that a container can be connected to.
pub fn name_of(config: &Config, text: &str) -> Result<String> {
    // It begins with a letter or a digit, as names do.
    match values::network(text) {
        Ok(Network::Named(name)) if networks::load(&config.paths(), &name)?.is_none() => {
            let found = networks::find(&config.paths(), text);
            Ok(found.map_or(name, |network| network.name))
        }
        Ok(Network::Named(name)) => Ok(name),
        _ => Err(Error::invalid(format!(
            "network {text} cannot be connected"
        ))),
    }
}

/// Puts a container into one more network.
///
/// # Errors
/// It is in the network already; there is no such network, or an address is not in it; it runs in a
/// machine that takes no further network.
pub fn connect(config: &Config, network: &str, name: &str, endpoint: Endpoint) -> Result<()> {
    let endpoint = Endpoint {
        network: name_of(config, network)?,
        ..endpoint
    };
    change(config, name, true, |options| {
        options.connect(endpoint)?;
        options.check(config).map(drop)
    })
}

/// Takes a container out of a network.
///
/// # Errors
/// It is not in the network.
pub fn disconnect(config: &Config, network: &str, name: &str) -> Result<()> {
    let network = name_of(config, network)?;
    change(config, name, false, |options| options.disconnect(&network))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn networks_of_a_command_line() {
        let (network, endpoint) = super::endpoint("name=a,alias=x,alias=y,ip=10.0.0.9").unwrap();
        assert_eq!(network, Network::Named("a".into()));
        assert_eq!(endpoint.aliases, ["x", "y"]);
        assert_eq!(endpoint.ip, Some([10, 0, 0, 9].into()));
        assert_eq!(
            super::endpoint("bridge").unwrap().0,
            Network::Named("default".into())
        );
        for wrong in ["alias=x", "name=a,x", "name=a,b=c", "name=a,ip=x", "host"] {
            assert!(super::endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_next_network_becomes_the_first_when_that_is_left() {
        let endpoint = |network: &str, alias: &str| Endpoint {
            network: network.into(),
            aliases: vec![alias.into()],
            ..Endpoint::default()
        };
        let mut options = NetworkOptions {
            network: Some(Network::None),
            ..NetworkOptions::default()
        };
        options.connect(endpoint("a", "x")).unwrap();
        options.connect(endpoint("b", "y")).unwrap();
        options.connect(endpoint("b", "z")).unwrap_err();
        options.disconnect("c").unwrap_err();
        options.disconnect("a").unwrap();
        assert_eq!(options.network, Some(Network::Named("b".into())));
        assert_eq!(
            (options.aliases.as_slice(), options.further.len()),
            (&["y".to_owned()][..], 0)
        );
        options.disconnect("b").unwrap();
        assert_eq!(
            options,
            NetworkOptions {
                network: Some(Network::None),
                ..<_>::default()
            }
        );
    }
}
