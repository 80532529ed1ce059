//! Tests in namespaces of their own, which need root.
#![allow(clippy::unwrap_used)]

mod describing;
mod mirroring;
mod namespaces;
mod redirecting;
mod support;
