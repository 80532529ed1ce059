//! Networks of machines. An engine or a CNI plugin supplies a configured network namespace:
//! interfaces with addresses and routes. A guest's kernel cannot see it, so each interface gets a
//! *tap* beside it in the same namespace, and the host's kernel redirects every packet from one to
//! the other ([`mirror`]). The tap's descriptor goes to the device process; addresses and routes go
//! to the guest's agent ([`Description`]).
//!
//! ```text
//!             network namespace                          machine
//!  peer ══ eth0 ─┐ tc redirects ┌─ hulltap0 ══ device process ══ eth0
//!                └──────────────┘                        same address, same name
//! ```
//!
//! Called by crate `sandbox`, in the sandbox process: [`Namespace`] is opened, [`Monitor`] watches
//! it, [`Netlink`] describes it; for each [`Interface`] there is a [`Tap`] and a
//! [`mirror::connect`]. When the monitor reports a change, the namespace is described again and the
//! differences are applied. Loopback interfaces are not mirrored: [`redirect`] and [`sockets`]
//! serve the relays between the namespace's loopback interface and the guest's.
//!
//! Never sees a packet, never calls `ip` or `tc`, never changes the namespace of the caller's
//! threads. The caller checks that a namespace is not the host's own, which must not be changed
//! ([`Namespace::is_callers_own`]).

pub mod bridge;
pub mod cni;
pub mod description;
mod error;
pub mod forwarding;
pub mod hosts;
pub mod mirror;
mod monitor;
pub mod names;
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
