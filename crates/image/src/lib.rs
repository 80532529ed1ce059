//! Images: the sources of containers' root file systems.
//!
//! Called by the command line (`hull image …`, `hull login`) and by the engine (to start a
//! container). Parses references as Docker does, pulls from registries, reads OCI layouts and
//! docker archives, unpacks each layer once into a directory that can be a lower directory of an
//! overlay, and removes unused ones. Saves images to archives, and pushes them to registries. Safe
//! to use from several processes at once; a kill at any moment leaves nothing half usable behind.
//!
//! Never mounts anything, never changes an image, and never runs anything from an image.
//!
//! ```no_run
//! # fn main() -> Result<(), hull_image::Error> {
//! use hull_image::{Credentials, Pull, Store};
//! let store = Store::open("/var/lib/hull")?;
//! let image = store.resolve(&"busybox".parse()?, Pull::Missing, &Credentials::docker(), &())?;
//! let hold = store.hold(&image, "container-1")?;
//! println!("{:?} on {:?}", image.config.cmd, image.layers);
//! # drop(hold);
//! # Ok(()) }
//! ```

mod config;
mod credentials;
mod digest;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod import;
mod limits;
mod login;
mod manifest;
mod pattern;
mod progress;
mod reference;
mod save;
mod source;
mod store;
pub mod unpack;

pub use config::{HealthCheck, ImageConfig};
pub use credentials::Credentials;
pub use digest::{Digest, DigestError};
pub use error::{Error, Result, Transfer};
pub use import::{Import, Source as ImportSource, is_opaque, is_whiteout, pack_changes};
pub use limits::{Limits, Low, Reserve, SEARCH_RESULTS};
pub use login::{Account, StoredIn};
pub use manifest::Platform;
pub use pattern::Pattern;
pub use progress::{Event, LayerState, Progress};
pub use reference::{Reference, RegistryReference, Version};
pub use source::{Loaded, Pushed, RemoteImage, SearchResult, remote_image, remote_tags, search};
pub use store::{HistoryEntry, Hold, Image, Listed, Pull, Removed, Store};
