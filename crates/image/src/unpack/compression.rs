//! Detects an archive's compression from its first bytes, and uncompresses it.
//!
//! Called by the store and by `import`. Media types are not trusted here: Docker goes by content,
//! too.

use std::io::{BufRead, Read};

use super::{LayerError, TarError};

/// Largest window of a zstd archive, as a power of two: the limit of the format's own tools.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A compression that can be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// That of an archive with these first bytes.
    pub(crate) fn of(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            // A frame to be skipped, as pzstd writes it first (RFC 8878, 3.1.2).
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// The uncompressed content of `archive`, which may be one that is not compressed.
///
/// # Errors
/// `Unsupported` by another compression than gzip and zstd; it cannot be read.
pub fn uncompress<'a>(mut archive: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>, LayerError> {
    let start = loop {
        match archive.fill_buf() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => break other.map_err(TarError::from)?,
        }
    };
    let compression = Compression::of(start);
    if compression == Some(Compression::Gzip) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(archive)));
    }
    if compression == Some(Compression::Zstd) {
        let mut decoder =
            zstd::stream::read::Decoder::with_buffer(archive).map_err(TarError::from)?;
        decoder
            .window_log_max(ZSTD_WINDOW_LOG)
            .map_err(TarError::from)?;
        return Ok(Box::new(decoder));
    }
    let other = match start {
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x04, 0x22, 0x4d, 0x18, ..] => "lz4",
        _ => return Ok(Box::new(archive)),
    };
    Err(LayerError::Unsupported(format!(
        "archive compressed with {other} (tar, gzip and zstd are)"
    )))
}
