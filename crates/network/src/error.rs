//! The error of this crate: one line that says what failed, on what, and why, and a hint.

use std::io;
use std::net::{IpAddr, SocketAddrV4};

/// Why an operation on a network failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network namespace cannot be opened.
    #[error("cannot open network namespace {what}: {why}")]
    Open {
        /// Its path.
        what: String,
        /// Error from the kernel.
        why: io::Error,
    },
    /// The file is not a network namespace: another file, or a namespace of another kind.
    #[error("{what} is not a network namespace")]
    NotANetworkNamespace {
        /// Its path, or "a descriptor".
        what: String,
    },
    /// A new namespace could not be created.
    #[error("cannot make a network namespace: {0}")]
    NewNamespace(io::Error),
    /// A thread could not enter the namespace.
    #[error("cannot enter a network namespace: {0}")]
    Enter(io::Error),
    /// The contents of the namespace could not be read.
    #[error("cannot read the {what} of a network namespace: {why}")]
    Read {
        /// "interfaces", "routes", …
        what: &'static str,
        /// Error from the kernel.
        why: io::Error,
    },
    /// The namespace cannot be watched for changes.
    #[error("cannot watch a network namespace: {0}")]
    Watch(io::Error),
    /// A tap could not be created.
    #[error("cannot make a tap for interface {interface}: {step}: {why}")]
    Tap {
        /// The interface it was for.
        interface: String,
        /// The call that failed.
        step: &'static str,
        /// Error from the kernel.
        why: io::Error,
    },
    /// An attribute of an interface could not be set.
    #[error("cannot set the {what} of interface {interface}: {why}")]
    Set {
        /// "MTU".
        what: &'static str,
        /// Name of the interface.
        interface: String,
        /// Error from the kernel.
        why: io::Error,
    },
    /// Redirecting packets could not be started or ended.
    #[error("cannot redirect packets of interface {interface}: {step}: {why}")]
    Redirect {
        /// Name of the interface.
        interface: String,
        /// The step that failed.
        step: &'static str,
        /// Error from the kernel.
        why: io::Error,
    },
    /// Another program filters the packets that the interface receives.
    #[error(
        "cannot redirect packets of interface {interface}: its {qdisc} qdisc has filters of another program"
    )]
    Occupied {
        /// Name of the interface.
        interface: String,
        /// "ingress" or "clsact".
        qdisc: String,
    },
    /// Connections to the loopback address cannot be redirected.
    #[error("cannot redirect connections to {address} of a network namespace: {why}")]
    Loopback {
        /// The address.
        address: IpAddr,
        /// Error from the kernel.
        why: io::Error,
    },
    /// Masquerading cannot be set up for a network.
    #[error("cannot let network {network} out: {why}")]
    Masquerade {
        /// Name of the network.
        network: String,
        /// Error from the kernel.
        why: io::Error,
    },
    /// A network's packets cannot be allowed through the packet filter.
    #[error("cannot let packets of {bridge} pass the packet filter: {why}")]
    Forward {
        /// The network's bridge.
        bridge: String,
        /// Error from iptables.
        why: String,
    },
    /// What a network has on the host cannot be taken away.
    #[error("cannot remove network {network}: {why}")]
    Remove {
        /// The network.
        network: String,
        /// Error from the kernel.
        why: io::Error,
    },
    /// The port range of a namespace cannot be set.
    #[error("cannot choose the ports of a network namespace: {why}")]
    Ports {
        /// Error from the kernel.
        why: io::Error,
    },
    /// The rootless network failed.
    #[error("{why}")]
    Pasta {
        /// Error from pasta, or why it was not started.
        why: String,
    },
    /// A socket cannot be opened in the namespace.
    #[error("cannot speak with {to} in a network namespace: {why}")]
    Socket {
        /// The address it was for.
        to: SocketAddrV4,
        /// Error from the kernel.
        why: io::Error,
    },
}

/// Result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What to do about it, in one line.
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

    /// The interface, or its tap, went away during the operation: the monitor reports that too.
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
            | Self::Remove { why, .. }
            | Self::Socket { why, .. } => why.raw_os_error(),
            Self::NotANetworkNamespace { .. }
            | Self::Occupied { .. }
            | Self::Forward { .. }
            | Self::Pasta { .. } => None,
        }
    }
}
