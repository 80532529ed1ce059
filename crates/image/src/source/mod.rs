//! Sources of images. Each finds manifest, configuration and layers, and leaves the rest to the
//! store.

pub(crate) mod docker_archive;
mod download;
mod manifest_request;
pub(crate) mod oci_layout;
pub(crate) mod registry;
pub(crate) mod rootfs;
