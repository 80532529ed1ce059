//! The error of this crate: one line that says what failed, on what, and why; and what to do about
//! it.

use std::io;
use std::net::{IpAddr, SocketAddrV4};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no network namespace to be had there.
    #[error("cannot open network namespace {what}: {why}")]
    Open {
        /// Its path.
        what: String,
        /// The kernel's.
        why: io::Error,
    },
    /// It is something else: a file, or a namespace of another kind.
    #[error("{what} is not a network namespace")]
    NotANetworkNamespace {
        /// Its path, or "a descriptor".
        what: String,
    },
    /// A new namespace could not be made.
    #[error("cannot make a network namespace: {0}")]
    NewNamespace(io::Error),
    /// A thread could not enter the namespace.
    #[error("cannot enter a network namespace: {0}")]
    Enter(io::Error),
    /// What is in the namespace could not be read.
    #[error("cannot read the {what} of a network namespace: {why}")]
    Read {
        /// "interfaces", "routes", …
        what: &'static str,
        /// The kernel's.
        why: io::Error,
    },
    /// Changes in the namespace cannot be seen.
    #[error("cannot watch a network namespace: {0}")]
    Watch(io::Error),
    /// A tap could not be made.
    #[error("cannot make a tap for interface {interface}: {step}: {why}")]
    Tap {
        /// The interface that it was for.
        interface: String,
        /// The call that failed.
        step: &'static str,
        /// The kernel's.
        why: io::Error,
    },
    /// An interface could not be changed.
    #[error("cannot set the {what} of interface {interface}: {why}")]
    Set {
        /// "MTU".
        what: &'static str,
        /// Its name.
        interface: String,
        /// The kernel's.
        why: io::Error,
    },
    /// Packets could not be redirected, or redirecting could not be ended.
    #[error("cannot redirect packets of interface {interface}: {step}: {why}")]
    Redirect {
        /// Its name.
        interface: String,
        /// What failed.
        step: &'static str,
        /// The kernel's.
        why: io::Error,
    },
    /// Somebody else decides about the packets that the interface receives.
    #[error(
        "cannot redirect packets of interface {interface}: its {qdisc} qdisc has filters of another program"
    )]
    Occupied {
        /// Its name.
        interface: String,
        /// "ingress" or "clsact".
        qdisc: String,
    },
    /// Connections to the loopback address cannot be redirected.
    #[error("cannot redirect connections to {address} of a network namespace: {why}")]
    Loopback {
        /// The address.
        address: IpAddr,
        /// The kernel's.
        why: io::Error,
    },
    /// Containers of a network cannot be given the host's address.
    #[error("cannot let network {network} out: {why}")]
    Masquerade {
        /// Its name.
        network: String,
        /// The kernel's.
        why: io::Error,
    },
    /// A packet filter cannot be told to let a network's packets pass.
    #[error("cannot let packets of {bridge} pass the packet filter: {why}")]
    Forward {
        /// The network's bridge.
        bridge: String,
        /// What iptables said.
        why: String,
    },
    /// The kernel cannot be told which ports to choose.
    #[error("cannot choose the ports of a network namespace: {why}")]
    Ports {
        /// The kernel's.
        why: io::Error,
    },
    /// There is no network without root.
    #[error("{why}")]
    Pasta {
        /// What pasta said, or why it was not asked.
        why: String,
    },
    /// There is no socket to be had in the namespace.
    #[error("cannot speak with {to} in a network namespace: {why}")]
    Socket {
        /// Whom it was for.
        to: SocketAddrV4,
        /// The kernel's.
        why: io::Error,
    },
}

/// Result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What to do about it. One line.
    pub fn hint(&self) -> Option<&'static str> {
        let errno = self.errno();
        if matches!(errno, Some(libc::EPERM | libc::EACCES)) {
            return Some(
                "hull needs CAP_SYS_ADMIN and CAP_NET_ADMIN over the namespace: run it as root",
            );
        }
        match self {
            Self::Pasta { why } if why.contains("not installed") => Some("apt-get install passt"),
            Self::Forward { why, .. } if why.contains("not installed") => {
                Some("apt-get install iptables")
            }
            Self::Pasta { why } if why.contains("tun") => {
                Some("who is not root needs access to /dev/net/tun: chmod 0666 /dev/net/tun")
            }
            Self::Pasta { .. } => Some("--network none does without a network"),
            Self::Occupied { .. } => {
                Some("tc filter show dev INTERFACE ingress, in the container's network namespace")
            }
            Self::Redirect { .. } if matches!(errno, Some(libc::ENOENT | libc::EOPNOTSUPP)) => {
                Some(
                    "the host's kernel needs sch_ingress, cls_u32 and act_mirred: modprobe -a them",
                )
            }
            Self::Tap { step, .. }
                if *step == crate::tap::OPEN
                    && matches!(errno, Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) =>
            {
                Some("the host's kernel needs the tun driver: modprobe tun")
            }
            Self::Masquerade { .. }
                if matches!(
                    errno,
                    Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
                ) =>
            {
                Some(
                    "the host's kernel needs nf_tables, nft_chain_nat and nft_masq: modprobe -a them",
                )
            }
            Self::Loopback { .. }
                if matches!(
                    errno,
                    Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
                ) =>
            {
                Some(
                    "the host's kernel needs nf_tables, nft_chain_nat and nft_redir: modprobe -a them",
                )
            }
            Self::NewNamespace(_) if errno == Some(libc::ENOSPC) => {
                Some("sysctl user.max_net_namespaces")
            }
            _ => None,
        }
    }

    /// The interface, or its tap, went away while something was done to it: whoever follows changes
    /// needs no other word.
    pub fn is_gone(&self) -> bool {
        matches!(
            self,
            Self::Tap { .. } | Self::Set { .. } | Self::Redirect { .. }
        ) && self.errno() == Some(libc::ENODEV)
    }

    fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { why, .. }
            | Self::NewNamespace(why)
            | Self::Enter(why)
            | Self::Read { why, .. }
            | Self::Watch(why)
            | Self::Tap { why, .. }
            | Self::Set { why, .. }
            | Self::Redirect { why, .. }
            | Self::Loopback { why, .. }
            | Self::Masquerade { why, .. }
            | Self::Ports { why }
            | Self::Socket { why, .. } => why.raw_os_error(),
            Self::NotANetworkNamespace { .. }
            | Self::Occupied { .. }
            | Self::Forward { .. }
            | Self::Pasta { .. } => None,
        }
    }
}
