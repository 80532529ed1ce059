//! The bench's own network namespaces: one that stands for the host, with a bridge, and one for
//! each container, attached to the bridge by a veth pair, as engines do. The machine's own network
//! is not changed.
//!
//! A namespace lives as long as the process that holds it, which dies with the bench, however that
//! ends; its interfaces, addresses and so on go with it.

use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::contestants::run;

/// A namespace.
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    /// A new namespace with only a loopback interface.
    pub fn new() -> Result<Self> {
        let mut holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--"])
            .args(["sh", "-c", "echo; exec sleep 86400"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("setpriv")?;
        let output = holder.stdout.take();
        let namespace = Self { holder };
        let mut line = String::new();
        BufReader::new(output.context("a pipe")?).read_line(&mut line)?;
        if line.is_empty() {
            bail!("cannot make a network namespace");
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Path of the namespace.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// Wraps a command to run inside the namespace.
    pub fn enter(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside
            .arg(format!("--net={}", self.path().display()))
            .arg("--")
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::null());
        inside
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        run(&mut self.enter(Command::new("ip").args(arguments.split(' '))))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Stands for the host: a namespace with a bridge.
pub struct Host {
    /// Namespace of the clients.
    pub namespace: Namespace,
    pods: Cell<u8>,
}

/// A namespace for a container, with an interface on the host's bridge.
pub struct Pod {
    /// The namespace.
    pub namespace: Namespace,
    /// Its IP address.
    pub address: String,
}

impl Host {
    /// A new namespace with a bridge.
    pub fn new() -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.ip("link add br0 type bridge")?;
        namespace.ip("address add 10.99.0.1/24 dev br0")?;
        namespace.ip("link set br0 up")?;
        Ok(Self {
            namespace,
            pods: Cell::new(1),
        })
    }

    /// A new namespace for a container: at most 250 for one host.
    pub fn pod(&self) -> Result<Pod> {
        let number = self.pods.get() + 1;
        self.pods.set(number);
        let namespace = Namespace::new()?;
        let address = format!("10.99.0.{number}");
        self.namespace.ip(&format!(
            "link add veth{number} type veth peer name eth0 netns {}",
            namespace.holder.id()
        ))?;
        self.namespace
            .ip(&format!("link set veth{number} master br0 up"))?;
        namespace.ip(&format!("address add {address}/24 dev eth0"))?;
        namespace.ip("link set eth0 up")?;
        namespace.ip("route add default via 10.99.0.1")?;
        Ok(Pod { namespace, address })
    }
}
