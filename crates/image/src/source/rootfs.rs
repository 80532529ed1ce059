//! `rootfs:DIR`: a directory as an image.
//!
//! Called by the store. The directory becomes a lower layer of an overlay, so it is never changed.

use std::path::Path;

use crate::config::ImageConfig;
use crate::error::{Error, Result};
use crate::store::Image;

/// The image for a directory.
pub(crate) fn image(reference: &str, dir: &Path) -> Result<Image> {
    let failed = |reason: String| Error::Source {
        reference: reference.to_owned(),
        reason,
    };
    let metadata =
        std::fs::metadata(dir).map_err(|error| failed(format!("{}: {error}", dir.display())))?;
    if !metadata.is_dir() {
        return Err(failed(format!("{} is no directory", dir.display())));
    }
    let dir = dir
        .canonicalize()
        .map_err(|error| failed(format!("{}: {error}", dir.display())))?;
    let name = format!("rootfs:{}", dir.display());
    Ok(Image {
        id: name.clone(),
        reference: name,
        digest: None,
        config: ImageConfig::default(),
        layers: vec![dir],
        created: None,
        size: 0,
    })
}
