//! containerd, with hull's shim as its runtime `io.containerd.hull.v2`.
#![allow(clippy::unwrap_used)]

mod crash;
mod load;
mod pods;
mod task;
