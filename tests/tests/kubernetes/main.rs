//! A real Kubernetes of one node whose pods have machines of their own: `scripts/kubernetes`.
#![allow(clippy::unwrap_used)]

mod access;
mod lifecycle;
mod node;
mod security;
mod sharing;
mod volumes;
mod workloads;
