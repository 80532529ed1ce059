//! What the fuzz targets call (`fuzz/` of the project): parsers of bytes that a registry or an
//! archive sends.

use std::io::Read;
use std::os::fd::OwnedFd;

use crate::limits::{Budget, Limits};
use crate::unpack::{LayerError, Unpacked};
use crate::{ImageConfig, Result, config, manifest, unpack};

/// Unpacks the archive of a layer. See [`unpack::unpack`].
///
/// # Errors
/// The archive is damaged or hostile.
pub fn unpack_layer(
    archive: impl Read,
    root: OwnedFd,
    lower: &[OwnedFd],
) -> std::result::Result<Unpacked, LayerError> {
    unpack::unpack(archive, root, lower, &mut Budget::new(Limits::default()))
}

/// Parses a manifest or a list of them.
///
/// # Errors
/// It is neither.
pub fn parse_manifest(bytes: &[u8]) -> Result<()> {
    manifest::parse("fuzz", bytes).map(drop)
}

/// Parses the configuration of an image of `layers` layers.
///
/// # Errors
/// It is none.
pub fn parse_config(bytes: &[u8], layers: usize) -> Result<ImageConfig> {
    config::parse("fuzz", bytes, layers).map(|document| document.config)
}
