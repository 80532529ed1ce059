//! Networking without root: *pasta* (package passt), a process that gives a network namespace an
//! interface with the host's own addresses, and turns each connection through it into one of its
//! own sockets on the host. To the host it is an ordinary program of the user.
//!
//! [`Pasta::start`] starts it for a namespace, [`Pasta::ready`] waits until it is set up. It ends
//! when the [`Pasta`] is dropped, and with the thread that started it, however that ends. For a
//! guest the namespace is like any other: it is described and mirrored.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cni::{PortMapping, Protocol};
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::sys;

/// The interface's name in the namespace.
const INTERFACE: &str = "eth0";

/// Most bytes read of its output.
const MOST_SAID: u64 = 4 << 10;

/// A running pasta.
#[derive(Debug)]
pub struct Pasta {
    child: Child,
    /// pasta writes its pid here when it is ready, and closes it when it ends.
    ready: AsyncFd<OwnedFd>,
    said: OwnedFd,
}

impl Pasta {
    /// Starts pasta for a namespace. Host ports are forwarded to its interface; connections from
    /// the host itself, to its loopback interface. The calling thread must live as long as the
    /// network.
    ///
    /// # Errors
    /// `Pasta` if it is not installed or cannot be started, or cannot forward a port.
    pub fn start(
        namespace: &Namespace,
        ports: &[PortMapping],
        mac: Option<[u8; 6]>,
    ) -> Result<Self> {
        let at = |why: io::Error| Error::Pasta {
            why: match why.kind() {
                io::ErrorKind::NotFound => "pasta is not installed".to_owned(),
                _ => format!("cannot start pasta: {why}"),
            },
        };
        let (ready, ready_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|why| at(why.into()))?;
        let (said, said_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|why| at(why.into()))?;
        // pasta must not block on output that is no longer read.
        for fd in [said.as_fd(), said_write.as_fd(), ready.as_fd()] {
            fcntl_getfl(fd)
                .and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK))
                .map_err(|why| at(why.into()))?;
        }
        let mut command = Command::new("pasta");
        command
            .args(["--foreground", "--quiet", "--config-net", "--no-map-gw"])
            .args(["--ns-ifname", INTERFACE])
            // The host's own loopback interface must not be reachable from the namespace.
            .args(["--tcp-ns", "none", "--udp-ns", "none"])
            .args(["--netns", "/proc/self/fd/0", "--pid", "/proc/self/fd/1"])
            .args(port_options(ports)?)
            .current_dir("/")
            .stdin(namespace.as_fd().try_clone_to_owned().map_err(at)?)
            .stdout(Stdio::from(ready_write))
            .stderr(Stdio::from(said_write));
        if let Some(mac) = mac {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            command.args(["--ns-mac-addr", &mac]);
        }
        sys::die_with_thread(&mut command);
        let child = command.spawn().map_err(at)?;
        // Closes the child's ends.
        drop(command);
        let ready = sys::when_readable(ready).map_err(at)?;
        Ok(Self { child, ready, said })
    }

    /// Waits until the namespace's interface is set up and ports are bound.
    ///
    /// # Errors
    /// `Pasta` with its output if it ended.
    pub async fn ready(&self) -> Result<()> {
        match self.heard().await {
            Ok(length) if length > 0 => Ok(()),
            _ => Err(Error::Pasta {
                why: format!("pasta: {}", self.last_words()),
            }),
        }
    }

    /// Waits for its end; returns its output.
    pub async fn ended(&self) -> String {
        // It writes no more after its pid.
        let _ = self.heard().await;
        self.last_words()
    }

    /// Waits for its pid, or its end; returns the number of bytes read.
    async fn heard(&self) -> io::Result<usize> {
        let read = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut [0; 64])?);
        self.ready.async_io(Interest::READABLE, read).await
    }

    /// Its last output, without messages about the system log.
    fn last_words(&self) -> String {
        let mut said = Vec::new();
        if let Ok(copy) = self.said.try_clone() {
            // The pipe does not block.
            let _ = std::fs::File::from(copy)
                .take(MOST_SAID)
                .read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        said.lines()
            .rfind(|line| !line.trim().is_empty() && !line.contains("syslog"))
            .unwrap_or("it ended without a word")
            .trim()
            .to_owned()
    }
}

impl Drop for Pasta {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        if let Ok(ended) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) {
            let _ = poll(&mut [PollFd::new(&ended, PollFlags::IN)], None);
        }
        let _ = self.child.wait();
    }
}

/// The options that publish ports.
fn port_options(ports: &[PortMapping]) -> Result<Vec<String>> {
    let mut options = Vec::new();
    for (protocol, name, option) in [
        (Protocol::Tcp, "tcp", "--tcp-ports"),
        (Protocol::Udp, "udp", "--udp-ports"),
    ] {
        let mut some = false;
        for port in ports.iter().filter(|port| port.protocol == protocol) {
            let mut value = String::new();
            if let Some(address) = port.host_ip.filter(|address| !address.is_unspecified()) {
                if matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some()) {
                    return Err(Error::Pasta {
                        why: format!("not supported: {name} on address {address}"),
                    });
                }
                // Writing to a string cannot fail.
                let _ = write!(value, "{address}/");
            }
            let _ = write!(value, "{}:{}", port.host_port, port.container_port);
            options.extend([option.to_owned(), value]);
            some = true;
        }
        if !some {
            options.extend([option.to_owned(), "none".to_owned()]);
        }
    }
    match ports.iter().find(|port| port.protocol == Protocol::Sctp) {
        Some(port) => Err(Error::Pasta {
            why: format!(
                "not supported without root: port {}/sctp",
                port.container_port
            ),
        }),
        None => Ok(options),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn port(host_ip: Option<&str>, host_port: u16, protocol: Protocol) -> PortMapping {
        PortMapping {
            host_ip: host_ip.map(|address| address.parse().unwrap()),
            host_port,
            container_port: 80,
            protocol,
        }
    }

    #[test]
    fn ports_are_options() {
        let ports = [
            port(None, 8080, Protocol::Tcp),
            port(Some("127.0.0.1"), 8081, Protocol::Tcp),
            port(Some("::1"), 8082, Protocol::Tcp),
            port(Some("0.0.0.0"), 8083, Protocol::Tcp),
        ];
        let options = port_options(&ports).unwrap().join(" ");
        assert_eq!(
            options,
            "--tcp-ports 8080:80 --tcp-ports 127.0.0.1/8081:80 --tcp-ports ::1/8082:80 \
             --tcp-ports 8083:80 --udp-ports none"
        );
        let options = port_options(&[port(None, 53, Protocol::Udp)]).unwrap();
        assert_eq!(options.join(" "), "--tcp-ports none --udp-ports 53:80");
    }

    #[test]
    fn what_pasta_does_not_know_is_refused() {
        let error = port_options(&[port(None, 1, Protocol::Sctp)]).unwrap_err();
        assert!(error.to_string().contains("80/sctp"), "{error}");
    }
}
