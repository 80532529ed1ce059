//! Network namespaces of a test: as an engine passes them to a runtime, with the network around it;
//! or as a host for an engine that changes interfaces and packet filters. They are deleted even if
//! the test fails.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, id};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::network::number;
use crate::{Invocation, Output, runtime};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A named network namespace, deleted on drop: declare it before its users.
pub struct Netns {
    /// Its name, as in `ip netns`.
    pub name: String,
}

impl Netns {
    /// A new namespace with only loopback, which is up.
    pub fn new() -> Netns {
        runtime::needs(&["ip", "tc"]);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let netns = Netns {
            name: format!("hullt{}-{number}", id()),
        };
        Invocation::new("ip")
            .args(["netns", "add", &netns.name])
            .run()
            .ok();
        netns.ip("link set lo up");
        netns
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip …` in it, which must succeed; returns its output.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        let output = Invocation::new("ip")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace())
            .run();
        output.ok().text()
    }

    /// Runs `tc …` in it; may fail.
    pub fn tc(&self, arguments: &str) -> Output {
        Invocation::new("tc")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace())
            .run()
    }

    /// A command in it, with the host's `/sys`.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path().display()))
            .arg(program);
        command
    }

    /// Calls a function in it; sockets that it creates stay there.
    pub fn enter<T: Send>(&self, function: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(self.path()).unwrap();
        let inside = || {
            use std::os::fd::AsFd;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            function()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A new namespace connected to the host, and the two addresses: the host's, and its own.
    pub fn beside_the_host() -> (Netns, Ipv4Addr, Ipv4Addr) {
        let netns = Netns::new();
        // From the range reserved for benchmarks (RFC 2544).
        let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + u32::from(number()) * 4;
        let [host, address] = [first + 1, first + 2].map(Ipv4Addr::from);
        let link = format!(
            "ht{}",
            netns.name.trim_start_matches("hullt").replace('-', "n")
        );
        let on_the_host =
            |arguments: String| Invocation::new("ip").args(arguments.split(' ')).run().ok();
        on_the_host(format!(
            "link add {link} type veth peer name eth0 netns {}",
            netns.name
        ));
        on_the_host(format!("address add {host}/30 dev {link}"));
        on_the_host(format!("link set {link} up"));
        netns.ip(&format!("address add {address}/30 dev eth0"));
        netns.ip("link set eth0 up");
        (netns, host, address)
    }

    /// Connects it to another one: a veth pair, `name` here and `peer` there, both up.
    pub fn join(&self, name: &str, other: &Netns, peer: &str) {
        self.ip(&format!(
            "link add {name} type veth peer name {peer} netns {}",
            other.name
        ));
        other.ip(&format!("link set {peer} up"));
        self.ip(&format!("link set {name} up"));
    }

    /// Deletes its name; it exists as long as it is in use.
    pub fn delete(&self) {
        Invocation::new("ip")
            .args(["netns", "delete", &self.name])
            .run()
            .ok();
    }

    /// Names of its interfaces.
    pub fn interfaces(&self) -> Vec<String> {
        let listed = self.ip("-o link show");
        let names = listed.lines().filter_map(|line| {
            let name = line.split(": ").nth(1)?;
            Some(name.split('@').next()?.to_owned())
        });
        names.collect()
    }

    /// What hull adds to interfaces of a test or an engine: taps, redirecting queueing disciplines,
    /// filters.
    pub fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        for line in self.ip("-o -d link show").lines() {
            if line.contains(" tun ") {
                found.push(line.to_owned());
            }
        }
        for line in self.tc("qdisc show").ok().text().lines() {
            if line.contains("ingress") || line.contains("clsact") {
                found.push(line.to_owned());
            }
        }
        for name in self.interfaces() {
            for side in ["ingress", "egress", "root"] {
                let filters = self.tc(&format!("filter show dev {name} {side}")).text();
                found.extend(filters.lines().map(|line| format!("{name}: {line}")));
            }
        }
        found
    }
}

impl Default for Netns {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A test may have deleted it already.
        if self.path().exists() {
            let deleted = Command::new("ip")
                .args(["netns", "delete", &self.name])
                .output();
            if !deleted.is_ok_and(|output| output.status.success()) {
                eprintln!("left behind: network namespace {}", self.name);
            }
        }
    }
}

/// A namespace for a container with one interface, and a namespace at the other end of it.
pub struct Link {
    /// The namespace that an engine would pass.
    pub pod: Netns,
    /// The namespace with its peers.
    pub world: Netns,
}

impl Link {
    /// 192.0.2.1 and 2001:db8::1 are `world`'s, 192.0.2.2 and 2001:db8::2 are the container's.
    pub fn new() -> Link {
        let (pod, world) = (Netns::new(), Netns::new());
        pod.join("eth0", &world, "eth0");
        for (netns, last) in [(&world, 1), (&pod, 2)] {
            netns.ip(&format!("address add 192.0.2.{last}/24 dev eth0"));
            netns.ip(&format!("address add 2001:db8::{last}/64 dev eth0 nodad"));
        }
        pod.ip("route add default via 192.0.2.1");
        Link { pod, world }
    }

    /// Adds an interface: `network` is the first three bytes of its addresses.
    pub fn add(&self, name: &str, network: &str) {
        self.pod.join(name, &self.world, name);
        self.world
            .ip(&format!("address add {network}.1/24 dev {name}"));
        self.pod
            .ip(&format!("address add {network}.2/24 dev {name}"));
    }
}

impl Default for Link {
    fn default() -> Self {
        Self::new()
    }
}
