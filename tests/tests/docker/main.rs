//! Docker, with `hull-oci` as its runtime.
#![allow(clippy::unwrap_used)]

mod api;
mod containers;
mod names;
mod network;
