//! Support for network tests: small clients and servers, networks in `/etc/cni/net.d`, and what
//! plugins leave on the host for a container of `hull run`.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, id};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Container, Invocation, Output, eventually};

/// The host's address in network `default`.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 1);
/// The host's IPv6 address in network `default`.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd68, 0x756c, 0x6c00, 0, 0, 0, 0, 1);
/// The bridge of network `default`.
pub const BRIDGE: &str = "hull0";

/// Timeout for a peer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the host supports IPv6.
pub fn has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

/// The number of one of `blocks` blocks of `what`, this process's own until it ends: a name in the
/// abstract namespace is in use as long as its socket, in the same network namespace as ports are.
fn block(what: &str, blocks: u32) -> u16 {
    let first = id() % blocks;
    let (number, socket) = (first..blocks)
        .chain(0..first)
        .find_map(|number| {
            let name = format!("hull-tests-{what}-{number}");
            let address = UnixAddr::from_abstract_name(name).unwrap();
            Some((number, UnixListener::bind_addr(&address).ok()?))
        })
        .expect("a free block");
    std::mem::forget(socket);
    number as u16
}

/// A number below 10,000 that is unique to this call among concurrent tests.
pub fn number() -> u16 {
    static BLOCK: LazyLock<u16> = LazyLock::new(|| block("numbers", 1000));
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(next < 10, "no test needs so many");
    *BLOCK * 10 + next
}

/// The first of `count` consecutive unused ports, outside of the kernel's ephemeral range.
pub fn free_ports(count: u16) -> u16 {
    static BLOCK: LazyLock<u16> = LazyLock::new(|| block("ports", 100));
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let next = NEXT.fetch_add(count, Ordering::Relaxed);
        assert!(next < 200, "no free port found");
        let first = 12_000 + *BLOCK * 200 + next;
        let free = |port| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
                && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        };
        if (first..first + count).all(free) {
            return first;
        }
    }
}

/// An unused port.
pub fn free_port() -> u16 {
    free_ports(1)
}

/// Connects within a second or two; reads and writes have a timeout.
pub fn connect(address: impl Into<SocketAddr>) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address.into(), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The body of an HTTP server's response.
pub fn get(address: impl Into<SocketAddr>) -> io::Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::other(format!("no HTTP: {answer:?}")))?;
    if head.starts_with("HTTP/1.") && head.contains(" 200 ") {
        Ok(body.trim_end().to_owned())
    } else {
        Err(io::Error::other(head.to_owned()))
    }
}

/// Waits until an HTTP server responds with this.
#[track_caller]
pub fn answers(address: impl Into<SocketAddr>, wanted: &str) {
    let address = address.into();
    let mut last = String::new();
    let what = format!("{wanted:?} from {address}");
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        match get(address) {
            Ok(text) if text == wanted => return,
            other => last = format!("{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("not within {PATIENCE:?}: {what}: {last}");
}

/// A shell command that serves a text by HTTP on port 80 of all addresses.
pub fn http_server(text: &str) -> String {
    format!("mkdir -p /srv; echo {text} >/srv/index.html; exec httpd -f -h /srv")
}

/// The reply to a datagram, within half a second.
pub fn ask(address: impl Into<SocketAddr>, question: &[u8]) -> Option<Vec<u8>> {
    let address = address.into();
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    let patience = Some(Duration::from_millis(500));
    socket.set_read_timeout(patience).unwrap();
    socket.connect(address).unwrap();
    socket.send(question).ok()?;
    let mut answer = vec![0; 65536];
    let length = socket.recv(&mut answer).ok()?;
    answer.truncate(length);
    Some(answer)
}

/// Pseudo-random bytes.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(id());
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The first checksum printed by `sha256sum`, in the format of [`digest`](crate::digest).
pub fn digest_of(printed: &str) -> String {
    format!("sha256:{}", printed.split(' ').next().unwrap_or_default())
}

/// Sends bytes and end of file to a server that may not listen yet; waits until it has closed.
pub fn send(address: impl Into<SocketAddr>, bytes: &[u8]) {
    let address = address.into();
    let mut stream = None;
    eventually(&format!("{address} listens"), PATIENCE, || {
        stream = connect(address).ok();
        stream.is_some()
    });
    let mut stream = stream.unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

/// A server that accepts one connection and collects what it receives.
pub struct Receiver {
    /// Its port, on all addresses.
    pub port: u16,
    bytes: JoinHandle<Vec<u8>>,
}

impl Receiver {
    /// On any free port, for IPv4 and, if available, IPv6.
    pub fn new() -> Receiver {
        let any: IpAddr = if has_ipv6() {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        let listener = TcpListener::bind((any, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let bytes = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        });
        Receiver { port, bytes }
    }

    /// The received bytes, once the connection is closed.
    pub fn finish(self) -> Vec<u8> {
        eventually("the end of what is sent", PATIENCE, || {
            self.bytes.is_finished()
        });
        self.bytes.join().unwrap()
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

/// The global addresses of an interface in the output of `ip -o addr show`.
pub fn addresses(listed: &str) -> Vec<IpAddr> {
    let lines = listed.lines().filter(|line| line.contains("scope global"));
    let words = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| *word == "inet" || *word == "inet6")?;
        words.next()?.split('/').next()?.parse().ok()
    });
    words.collect()
}

/// Rules of all packet filters on the host that contain a text.
pub fn rules_with(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let rules = Invocation::new(program).run().ok().text();
        let lines = rules.lines().filter(|line| line.contains(text));
        found.extend(lines.map(|line| format!("{program}: {line}")));
    }
    found
}

/// Address leases of plugins that contain a text.
pub fn leases_with(text: &str) -> Vec<String> {
    leases_below(Path::new("/run/hull/networks"), text)
}

fn leases_below(directory: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(leases_below(&path, text));
        } else if fs::read_to_string(&path).is_ok_and(|content| content.contains(text)) {
            found.push(path.display().to_string());
        }
    }
    found
}

/// What a running container's network leaves on the host, to check later that it is gone.
#[derive(Debug)]
pub struct Traces {
    id: String,
    addresses: Vec<IpAddr>,
    veth: PathBuf,
    chains: Vec<String>,
}

impl Traces {
    /// The traces of a running container on this bridge.
    pub fn of(container: &Container<'_>, bridge: &str) -> Traces {
        let id = container.inspect()["Hull"]["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let mac = container.sh("cat /sys/class/net/eth0/address").ok().text();
        // Sends something, so that the bridge learns its address.
        container
            .sh("ping -c 1 -W 5 $(ip route | sed -n 's/^default via \\([^ ]*\\) .*/\\1/p')")
            .ok();
        let known = Invocation::new("bridge")
            .args(["fdb", "show", "br", bridge])
            .run()
            .ok()
            .text();
        let words = known
            .lines()
            .find(|line| line.starts_with(&mac))
            .unwrap_or_else(|| panic!("{bridge} has not seen {mac}: {known}"));
        let veth = words.split_whitespace().nth(2).unwrap();
        let mut chains: Vec<String> = rules_with(&id)
            .iter()
            .filter_map(|rule| rule.split(" -j ").nth(1))
            .filter(|target| target.starts_with("CNI-"))
            .map(str::to_owned)
            .collect();
        chains.sort();
        chains.dedup();
        let traces = Traces {
            id,
            addresses: container.addresses(),
            veth: Path::new("/sys/class/net").join(veth),
            chains,
        };
        assert!(traces.veth.exists(), "{traces:?}");
        assert!(!traces.left().is_empty(), "{traces:?}");
        traces
    }

    /// The traces that still exist.
    pub fn left(&self) -> Vec<String> {
        let mut found = leases_with(&self.id);
        found.extend(rules_with(&self.id));
        for address in &self.addresses {
            let length = if address.is_ipv4() { 32 } else { 128 };
            found.extend(rules_with(&format!("{address}/{length}")));
        }
        for chain in &self.chains {
            found.extend(rules_with(chain));
        }
        if self.veth.exists() {
            found.push(self.veth.display().to_string());
        }
        found.dedup();
        found
    }

    /// Asserts that no traces are left.
    #[track_caller]
    pub fn assert_gone(&self) {
        assert_none(|| self.left());
    }
}

impl Drop for Traces {
    /// Removes leftovers after a failed test: they would stay until the host reboots.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for program in ["iptables", "ip6tables"] {
            let script = format!(
                "{program}-save -t nat | grep -F {} | sed -n 's/^-A/{program} -t nat -D/p' | sh\n\
                 for chain in {}; do {program} -t nat -F $chain; {program} -t nat -X $chain; done",
                self.id,
                self.chains.join(" ")
            );
            let _ = Command::new("sh").args(["-c", &script]).output();
        }
    }
}

/// A bridge network in `/etc/cni/net.d`, removed on drop: declare it before its users.
pub struct CniNetwork {
    /// Its name.
    pub name: String,
    /// Name of its bridge.
    pub bridge: String,
    /// The host's address in it; a /24, unless a test changes that.
    pub gateway: Ipv4Addr,
    file: PathBuf,
    made_directory: bool,
    leases: tempfile::TempDir,
}

impl CniNetwork {
    /// A bridge with addresses from host-local, in a configuration modified by the test.
    pub fn new(change: impl FnOnce(&mut Value)) -> CniNetwork {
        let number = number();
        let gateway = Ipv4Addr::new(10, 130 + (number / 256) as u8, (number % 256) as u8, 1);
        let directory = Path::new("/etc/cni/net.d");
        let name = format!("hull-test-{}-{number}", id());
        let network = CniNetwork {
            bridge: format!("hullt{number}"),
            gateway,
            file: directory.join(format!("{name}.conflist")),
            made_directory: !directory.exists(),
            leases: tempfile::Builder::new()
                .prefix("n")
                .tempdir_in("/tmp")
                .unwrap(),
            name,
        };
        let subnet = format!("{}/24", Ipv4Addr::from(u32::from(gateway) - 1));
        let mut configuration = json!({
            "cniVersion": "1.0.0",
            "name": network.name,
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": network.bridge,
                    "isGateway": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": network.leases.path(),
                        "ranges": [[{"subnet": subnet}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
            ],
        });
        change(&mut configuration);
        fs::create_dir_all(directory).unwrap();
        // Readers of the directory must never see a partial file.
        let new = network.file.with_extension("new");
        fs::write(&new, configuration.to_string()).unwrap();
        fs::rename(&new, &network.file).unwrap();
        network
    }

    /// What remains of containers in it: leases, interfaces.
    pub fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        let leases = fs::read_dir(self.leases.path().join(&self.name));
        for entry in leases.into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.parse::<IpAddr>().is_ok() {
                found.push(format!("lease of {name}"));
            }
        }
        let ports = fs::read_dir(Path::new("/sys/class/net").join(&self.bridge).join("brif"));
        for entry in ports.into_iter().flatten().flatten() {
            found.push(format!("interface {}", entry.file_name().display()));
        }
        found
    }

    /// Asserts that nothing of containers remains.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_none(|| self.traces());
    }
}

impl Drop for CniNetwork {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
        if self.made_directory {
            let _ = fs::remove_dir("/etc/cni/net.d");
        }
        // There is no bridge if no container was ever in it.
        let _ = Command::new("ip")
            .args(["link", "delete", &self.bridge])
            .output();
    }
}

/// Asserts that nothing is left, after a while: the kernel removes interfaces of a namespace
/// asynchronously when its last process was killed.
#[track_caller]
fn assert_none(left: impl Fn() -> Vec<String>) {
    let begin = Instant::now();
    let mut found = left();
    while !found.is_empty() && begin.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(20));
        found = left();
    }
    assert!(found.is_empty(), "left behind:\n{}", found.join("\n"));
}

/// Asserts that no ping was answered.
#[track_caller]
pub fn unanswered(output: &Output) {
    assert!(
        output.status != 0 && output.text().contains(" 0 packets received"),
        "{}: {}{}",
        output.what,
        output.text(),
        output.error()
    );
}
