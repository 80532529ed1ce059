//! Docker, with `hull-oci` as its runtime.
#![allow(clippy::unwrap_used)]

mod containers;
mod names;
mod network;
