//! Sources of images: each finds manifest, configuration and layers, and leaves the rest to the
//! store. And the way back to a registry.

mod archive;
pub(crate) mod docker_archive;
mod download;
mod http;
mod list;
mod load;
pub(crate) mod oci_layout;
mod push;
mod realm;
pub(crate) mod registry;
mod remote;
pub(crate) mod rootfs;
mod search;
mod tags;
mod token;
mod upload;

pub use load::Loaded;
pub use push::Pushed;
pub use remote::{RemoteImage, remote_image};
pub use search::{SearchResult, search};
pub use tags::remote_tags;
