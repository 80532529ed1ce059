//! Networks of machines. An engine, or a CNI plugin, hands over a network namespace that is set up:
//! interfaces with addresses and routes. A guest's kernel cannot see it, so each interface gets a
//! *tap* beside it in the same namespace, and the host's kernel redirects every packet from one to
//! the other ([`mirror`]). The tap's descriptor goes to the device process; what the guest has to
//! know, addresses and routes, goes to its agent ([`Description`]).
//!
//! ```text
//!             network namespace                          machine
//!  peer ══ eth0 ─┐ tc redirects ┌─ hulltap0 ══ device process ══ eth0
//!                └──────────────┘                        same address, same name
//! ```
//!
//! Called by crate `sandbox`, in the sandbox process: [`Namespace`] is opened, [`Monitor`] watches
//! it, [`Netlink`] describes it; for each [`Interface`] there is a [`Tap`] and a
//! [`mirror::connect`]. When the monitor says so, the namespace is described again, and what
//! differs is followed. Loopback interfaces are not mirrored: [`redirect`] and [`sockets`] are for
//! the relays between that of the namespace and that of the guest.
//!
//! Never sees a packet, never calls `ip` or `tc`, never changes the namespace of the caller's
//! threads. Whether a namespace is the host's own, where nothing is to be touched, is the caller's
//! question ([`Namespace::is_callers_own`]).

pub mod cni;
pub mod description;
mod error;
pub mod forwarding;
pub mod hosts;
pub mod mirror;
mod monitor;
mod namespace;
mod netlink;
mod nftables;
pub mod pasta;
pub mod ports;
pub mod redirect;
pub mod resolv;
pub mod sockets;
mod sys;
pub mod tap;

#[cfg(test)]
mod tests;

pub use description::{Address, Description, Interface, Neighbour, Route, RouteKind, Skipped};
pub use error::{Error, Result};
pub use monitor::Monitor;
pub use namespace::{Identity, Namespace};
pub use netlink::Netlink;
pub use nftables::{guard, masquerade};
pub use tap::{Tap, TapOptions};
