//! What a registry says of an image without pulling it.
//!
//! Called by the API.

use super::http::Access;
use super::registry::Session;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::error::Result;
use crate::manifest::Platform;
use crate::reference::RegistryReference;

/// An image, or a list of images by platform, in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteImage {
    /// Media type of the manifest or list.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The platforms that it has images for.
    pub platforms: Vec<Platform>,
}

/// Asks the registry of `name` for it.
///
/// # Errors
/// `NotInRegistry`, `Unauthorized`, `Unreachable`, `Registry`, `Invalid` and `Unsupported` for what
/// the registry answers.
pub fn remote_image(name: &RegistryReference, credentials: &Credentials) -> Result<RemoteImage> {
    let found = credentials.find(&name.registry)?;
    let session = Session::new(name, found, Access::Pull, "")?;
    session.runtime()?.block_on(session.describe())
}
