//! Networks of `hull run`: the default one and others, ports, filters, traffic.
#![allow(clippy::unwrap_used)]

mod bridge;
mod cni;
mod compose;
mod container;
mod created;
mod filter;
mod joining;
mod loopback;
mod ports;
mod traffic;
