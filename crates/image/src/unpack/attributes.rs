//! Owner, mode, time and extended attributes of a layer's files. Called by the writer.

use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;

use super::tar_reader::Entry;
use super::{LayerError, fs};

/// Owner, mode, time and extended attributes of a new file.
pub(super) struct Attributes<'e> {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub mtime: (i64, u32),
    pub xattrs: &'e [(Vec<u8>, Vec<u8>)],
}

/// Wraps an I/O error as an error of the layer, with entry and action.
pub(super) fn failed<'e>(
    doing: &'static str,
    entry: &'e [u8],
) -> impl Fn(Errno) -> LayerError + 'e {
    move |errno| LayerError::Write {
        entry: show(entry),
        doing,
        source: errno.into(),
    }
}

/// A name for messages: invalid UTF-8 and control characters are escaped.
pub(super) fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .take(300)
        .flat_map(char::escape_debug)
        .collect()
}

pub(super) fn mode_of(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

/// Whether an image may set this extended attribute; see the parent module.
fn xattr_allowed(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

impl<'e> Attributes<'e> {
    pub(super) fn of(entry: &'e Entry) -> Self {
        Self {
            uid: entry.uid,
            gid: entry.gid,
            mode: entry.mode,
            mtime: entry.mtime,
            xattrs: &entry.xattrs,
        }
    }
}

/// Sets the owner first, as that clears suid bits and capabilities.
pub(super) fn set_attributes(
    file: BorrowedFd<'_>,
    entry: &[u8],
    attributes: &Attributes<'_>,
) -> Result<(), LayerError> {
    let owner = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    rustix::fs::fchown(file, Some(owner.0), Some(owner.1))
        .map_err(failed("set the owner of", entry))?;
    rustix::fs::fchmod(file, mode_of(attributes.mode)).map_err(failed("set the mode of", entry))?;
    for (name, value) in attributes
        .xattrs
        .iter()
        .filter(|(name, _)| xattr_allowed(name))
    {
        match rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // The file system has no extended attributes: keep the file without, as Docker does.
            Err(Errno::NOTSUP) => {
                tracing::debug!(
                    entry = show(entry),
                    name = show(name),
                    "attribute not supported here"
                );
            }
            Err(error) => return Err(failed("set an attribute of", entry)(error)),
        }
    }
    Ok(())
}

pub(super) fn set_opaque(dir: BorrowedFd<'_>, entry: &[u8]) -> Result<(), LayerError> {
    fs::set_opaque(dir).map_err(failed("make opaque the directory of", entry))
}

pub(super) fn read_xattrs(file: BorrowedFd<'_>) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0u8; 64 * 1024];
    let length = match rustix::fs::flistxattr(file, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut xattrs = Vec::new();
    for name in names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| xattr_allowed(name))
    {
        let mut value = vec![0u8; 64 * 1024];
        let length = rustix::fs::fgetxattr(file, name, &mut value[..])?;
        value.truncate(length);
        xattrs.push((name.to_vec(), value));
    }
    Ok(xattrs)
}
