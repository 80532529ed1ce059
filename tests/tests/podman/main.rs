//! podman, with `hull-oci` as its runtime.
#![allow(clippy::unwrap_used)]

mod containers;
mod network;
mod options;
mod pods;
