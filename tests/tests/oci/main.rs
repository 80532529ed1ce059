//! `hull-oci` with bundles, without an engine.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod crash;
mod disks;
mod exec;
mod hooks;
mod lifecycle;
mod limits;
mod network;
mod network_crash;
mod people;
mod pods;
mod spec;
mod validation;
