//! Sources of images. Each finds manifest, configuration and layers, and leaves the rest to the
//! store.

mod archive;
pub(crate) mod docker_archive;
mod download;
mod http;
mod load;
pub(crate) mod oci_layout;
mod realm;
pub(crate) mod registry;
pub(crate) mod rootfs;
mod token;

pub use load::Loaded;
