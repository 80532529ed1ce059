//! Files of JSON with a version: an older one is read, a newer one is a named error.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Directory;
use crate::error::{Error, Result};

#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    version: u32,
}

/// Reads a file; `None` when there is none.
///
/// # Errors
/// It cannot be read, is damaged, or its version is above `known`.
pub fn read<T: DeserializeOwned>(
    directory: &Directory,
    name: &str,
    known: u32,
) -> Result<Option<T>> {
    let Some(text) = directory.read(name)? else {
        return Ok(None);
    };
    let path = directory.path().join(name);
    let damaged = |error: serde_json::Error| {
        Error::new(format!("state file {} is damaged: {error}", path.display()))
            .hint("hull rm -f, or the engine's own way to remove the container, removes it too")
    };
    let head: Head = serde_json::from_slice(&text).map_err(damaged)?;
    if head.version > known {
        return Err(Error::unsupported(format_args!(
            "state file {} has version {}, this hull knows {known}",
            path.display(),
            head.version
        ))
        .hint("a newer hull wrote it: use that one"));
    }
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}
