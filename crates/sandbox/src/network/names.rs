//! Names in a network of hull's own: containers find each other by them.
//!
//! Each such network has a directory with a directory for each name, and in it a file for each
//! container that has the name, with its addresses; and one for each address, by the name that it
//! has in the domain of addresses (`in-addr.arpa`), with the container's name. A sandbox writes
//! those of its container when that is attached, and removes them when it is detached; what a
//! killed sandbox left is told by its lock and counts for nothing. A question costs one look into
//! one directory.
//!
//! ```text
//! NAMES/<name>/<container>      {"sandbox": …, "addresses": […], "name": …}
//! NAMES/<address>/<container>   the same
//! ```
//!
//! What is no such name is asked of the host's name servers, from the host's network, as Docker
//! does. Of what a guest sends, only a query of one question is looked into
//! ([`hull_network::names`]); everything else is passed on as it is.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use hull_network::names::{Wanted, answer, answer_pointer, question, refuse, reverse};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::messages::{by_stream, datagram};
use crate::config::NamesConfig;
use crate::error::Result;
use crate::store::{Directory, SandboxPath};

/// Port of name servers.
const PORT: u16 = 53;

/// How long one name server may take before the next one is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(4);

/// Containers of one name that are answered.
const MOST_OF_A_NAME: usize = 64;

/// What a container wrote.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    sandbox: SandboxPath,
    addresses: Vec<IpAddr>,
    /// The container's own name.
    #[serde(default)]
    name: String,
}

/// A network with the addresses of a container in it.
pub type Named = (NamesConfig, Vec<IpAddr>);

/// The names of a container's networks, with its own among them.
#[derive(Debug)]
pub struct Names {
    networks: RwLock<Vec<Named>>,
    container: String,
    sandbox: SandboxPath,
}

impl Names {
    /// Writes down the names of a container, with its addresses in each network.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn publish(networks: Vec<Named>, container: &str, sandbox: &SandboxPath) -> Result<Self> {
        let names = Self {
            networks: RwLock::default(),
            container: container.to_owned(),
            sandbox: sandbox.clone(),
        };
        match names.change(networks.clone()) {
            Ok(()) => Ok(names),
            Err(error) => {
                networks.iter().for_each(|named| names.withdraw_from(named));
                Err(error)
            }
        }
    }

    /// Makes these the networks of the container.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn change(&self, networks: Vec<Named>) -> Result<()> {
        let before = self.networks().clone();
        let stays = |named: &Named| {
            let mut networks = networks.iter();
            networks.any(|(other, _)| other.directory == named.0.directory)
        };
        for named in before.iter().filter(|named| !stays(named)) {
            self.withdraw_from(named);
        }
        let (mut there, mut written) = (Vec::new(), Ok(()));
        for named in networks {
            let same = |(other, _): &&Named| {
                (&other.directory, &other.names) == (&named.0.directory, &named.0.names)
            };
            if before.iter().find(same).is_none()
                && let Err(error) = self.write(&named)
            {
                // It is written by the next change.
                written = Err(error);
                continue;
            }
            there.push(named);
        }
        *self.write_networks() = there;
        written
    }

    fn write(&self, named: &Named) -> Result<()> {
        let (network, addresses) = named;
        self.forget(network);
        let entry = Entry {
            sandbox: self.sandbox.clone(),
            addresses: addresses.clone(),
            name: network.names.first().cloned().unwrap_or_default(),
        };
        let text = serde_json::to_vec(&entry).unwrap_or_default();
        own(named).try_for_each(|directory| write(&directory, &self.container, &text))
    }

    /// Removes what an earlier sandbox of the container left that was killed: its path may be that
    /// of the present one, and the names others.
    fn forget(&self, network: &NamesConfig) {
        let directories = fs::read_dir(&network.directory).into_iter().flatten();
        for directory in directories.flatten().map(|entry| entry.path()) {
            if fs::remove_file(directory.join(&self.container)).is_ok() {
                let _ = fs::remove_dir(&directory);
            }
        }
    }

    /// Removes the names.
    pub fn withdraw(&self) {
        for named in self.networks().iter() {
            self.withdraw_from(named);
        }
    }

    fn withdraw_from(&self, named: &Named) {
        for directory in own(named) {
            // Gone already is as good; one that others have as well is not empty.
            let _ = fs::remove_file(directory.join(&self.container));
            let _ = fs::remove_dir(&directory);
        }
    }

    // A list is valid at any time.
    fn networks(&self) -> RwLockReadGuard<'_, Vec<Named>> {
        self.networks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_networks(&self) -> RwLockWriteGuard<'_, Vec<Named>> {
        self.networks
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of all containers that have a name; `None` when there is no such name.
    fn lookup(&self, name: &str) -> Option<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for (network, _) in self.networks().iter() {
            let name = network.links.get(name).map_or(name, String::as_str);
            let mut found = entries(network, name);
            if found.is_empty()
                && let Some(short) = without_network(name, &network.network)
            {
                found = entries(network, short);
            }
            addresses.extend(found.into_iter().flat_map(|entry| entry.addresses));
        }
        (!addresses.is_empty()).then_some(addresses)
    }

    /// The names of the container that has an address, with their network's as Docker says them;
    /// `None` when there is none.
    fn lookup_pointer(&self, address: IpAddr) -> Option<Vec<String>> {
        let reverse = reverse(address);
        let mut names = Vec::new();
        for (network, _) in self.networks().iter() {
            let found = entries(network, &reverse).into_iter();
            let found = found.filter(|entry| !entry.name.is_empty());
            names.extend(found.map(|entry| format!("{}.{}", entry.name, network.network)));
        }
        (!names.is_empty()).then_some(names)
    }

    /// Name servers for everything else.
    fn upstream(&self) -> Vec<IpAddr> {
        let networks = self.networks();
        let mut servers = networks.iter().map(|(network, _)| &network.upstream);
        let found = servers.find(|servers| !servers.is_empty());
        found.cloned().unwrap_or_default()
    }

    /// Answers a message of the guest.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn ask(&self, tcp: bool, query: &[u8]) -> io::Result<Vec<u8>> {
        let found = question(query).and_then(|asked| match asked.wanted {
            Wanted::Pointer(address) => answer_pointer(query, &self.lookup_pointer(address)?),
            // Addresses are no names of containers.
            _ if asked.name.ends_with(".arpa") => None,
            _ => answer(query, &self.lookup(&asked.name)?),
        });
        if let Some(answer) = found {
            return Ok(answer);
        }
        let mut failed = io::Error::from(io::ErrorKind::NotConnected);
        let upstream = self.upstream();
        for server in &upstream {
            let server = SocketAddr::new(*server, PORT);
            let asked = match tcp {
                true => timeout(SERVER_TIMEOUT, ask_by_tcp(server, query)).await,
                false => timeout(SERVER_TIMEOUT, ask_by_udp(server, query)).await,
            };
            match asked {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => failed = error,
                Err(elapsed) => failed = elapsed.into(),
            }
        }
        refuse(query, !upstream.is_empty()).ok_or(failed)
    }
}

/// The directories of a container's own names in a network, and of its addresses.
fn own((network, addresses): &Named) -> impl Iterator<Item = PathBuf> + '_ {
    let names = network.names.iter().map(|name| name.to_ascii_lowercase());
    let addresses = addresses.iter().map(|address| reverse(*address));
    let all = names.chain(addresses);
    all.filter_map(|name| directory(network, &name))
}

/// What living containers wrote below a name.
fn entries(network: &NamesConfig, name: &str) -> Vec<Entry> {
    let listed = directory(network, name).and_then(|path| fs::read_dir(path).ok());
    let alive = listed.into_iter().flatten().flatten();
    let alive = alive.filter_map(|entry| read(&entry.path()));
    alive.take(MOST_OF_A_NAME).collect()
}

/// The name of a container before the name of its network.
fn without_network<'a>(name: &'a str, network: &str) -> Option<&'a str> {
    let at = name.len().checked_sub(network.len())?;
    let (short, rest) = name.split_at_checked(at)?;
    let short = short.strip_suffix('.')?;
    (!network.is_empty() && rest.eq_ignore_ascii_case(network)).then_some(short)
}

/// The directory of a name, which is one of a file, too.
fn directory(network: &NamesConfig, name: &str) -> Option<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let is_name = !name.is_empty() && !name.starts_with('.') && name.bytes().all(plain);
    is_name.then(|| network.directory.join(name))
}

/// Writes the file of a container below a name. A directory that is being removed as empty is made
/// again.
fn write(directory: &Path, container: &str, text: &[u8]) -> Result<()> {
    let mut written = Ok(());
    for _ in 0..8 {
        let opened = Directory::create(directory);
        written = opened.and_then(|opened| opened.write(container, text));
        if written.is_ok() {
            break;
        }
    }
    written
}

/// What is in a file, if the sandbox that wrote it lives.
fn read(path: &Path) -> Option<Entry> {
    let entry: Entry = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    entry.sandbox.is_alive().then_some(entry)
}

async fn ask_by_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server.is_ipv4() {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    loop {
        socket.readable().await?;
        let received = socket.try_io(tokio::io::Interest::READABLE, || datagram(&socket));
        match received {
            // An answer to another question, by who guesses.
            Ok(answer) if answer.get(..2) != query.get(..2) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

async fn ask_by_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    by_stream(TcpStream::connect(server).await?, query).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::SandboxDir;

    fn config(directory: &Path, names: &[&str]) -> NamesConfig {
        NamesConfig {
            directory: directory.to_owned(),
            network: "Backend".to_owned(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            links: BTreeMap::new(),
            upstream: Vec::new(),
        }
    }

    #[test]
    fn a_name_is_found_as_long_as_a_container_lives_that_has_it() {
        let parent = tempfile::tempdir().unwrap();
        let names = parent.path().join("names");
        let sandboxes = ["one", "two"].map(|id| SandboxPath::new(parent.path(), id));
        let mut living: Vec<_> = sandboxes
            .iter()
            .map(|path| SandboxDir::create(path).unwrap())
            .collect();
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let one = config(&names, &["Web", "alias"]);
        let one = Names::publish(vec![(one, vec![address(1)])], "c1", &sandboxes[0]).unwrap();
        let mut two = config(&names, &["db", "alias"]);
        two.links = [("linked".to_owned(), "web".to_owned())].into();
        let two = Names::publish(vec![(two, vec![address(2)])], "c2", &sandboxes[1]).unwrap();
        assert_eq!(one.lookup("db"), Some(vec![address(2)]));
        assert_eq!(two.lookup("web"), Some(vec![address(1)]));
        assert_eq!(two.lookup("linked"), Some(vec![address(1)]));
        assert_eq!(one.lookup("linked"), None);
        assert_eq!(one.lookup("db.backend"), Some(vec![address(2)]));
        for name in ["db.other", ".backend", "backend", "dbbackend"] {
            assert_eq!(one.lookup(name), None, "{name}");
        }
        let of_two = Some(vec!["db.Backend".to_owned()]);
        assert_eq!(one.lookup_pointer(address(2)), of_two);
        assert_eq!(one.lookup_pointer(address(3)), None);
        let mut both = one.lookup("alias").unwrap();
        both.sort();
        assert_eq!(both, [address(1), address(2)]);
        for name in ["nobody", "", "..", ".", "a/b", "../names/web"] {
            assert_eq!(one.lookup(name), None, "{name}");
        }
        // Killed.
        living.pop();
        assert_eq!(one.lookup("db"), None);
        assert_eq!(one.lookup_pointer(address(2)), None);
        two.withdraw();
        one.withdraw();
        assert_eq!(fs::read_dir(&names).unwrap().count(), 0);
    }
}
