//! Network namespaces of a test's own: what an engine hands a runtime, and the world around it; or
//! a whole host for an engine that changes interfaces and packet filters. Nothing of them is left,
//! whatever becomes of the test.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, id};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::network::number;
use crate::{Invocation, Output, runtime};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace with a name, gone when dropped: declare it before what uses it.
pub struct Netns {
    /// Its name, as `ip netns` says.
    pub name: String,
}

impl Netns {
    /// A new one, in which only loopback is, and up.
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

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ip …` in it, successful; what it prints.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        let output = Invocation::new("ip")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace())
            .run();
        output.ok().text()
    }

    /// `tc …` in it, however it ends.
    pub fn tc(&self, arguments: &str) -> Output {
        Invocation::new("tc")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace())
            .run()
    }

    /// A command in it, which sees the host's own `/sys`.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path().display()))
            .arg(program);
        command
    }

    /// Calls a function in it; sockets that it makes stay there.
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

    /// A new one on a link with the host, on which both have an address: the namespace, the host's
    /// address, and its own.
    pub fn beside_the_host() -> (Netns, Ipv4Addr, Ipv4Addr) {
        let netns = Netns::new();
        // Of networks that are for measurements, and nobody's (RFC 2544).
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

    /// Joins it with another one: a veth pair, `name` here and `peer` there, both up.
    pub fn join(&self, name: &str, other: &Netns, peer: &str) {
        self.ip(&format!(
            "link add {name} type veth peer name {peer} netns {}",
            other.name
        ));
        other.ip(&format!("link set {peer} up"));
        self.ip(&format!("link set {name} up"));
    }

    /// Deletes it; whoever has it open still uses it.
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

    /// What there is beside what a test or an engine has put there: taps, queueing disciplines that
    /// redirect, filters.
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
        // A test may have deleted it.
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

/// A namespace for a container, with one interface, and the world at the other end of it.
pub struct Link {
    /// What an engine would hand over.
    pub pod: Netns,
    /// Where others are.
    pub world: Netns,
}

impl Link {
    /// 192.0.2.1 and 2001:db8::1 are the world's, 192.0.2.2 and 2001:db8::2 the container's.
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

    /// One more interface: `network` is the first three bytes of its addresses.
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
