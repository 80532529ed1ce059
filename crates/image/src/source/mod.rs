//! Sources of images. Each finds manifest, configuration and layers, and leaves the rest to the
//! store.

pub(crate) mod docker_archive;
mod download;
mod http;
pub(crate) mod oci_layout;
mod realm;
pub(crate) mod registry;
pub(crate) mod rootfs;
mod token;
