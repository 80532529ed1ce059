//! What the guest has open.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::nodes::ShareId;

/// File systems whose files have content whatever their size (linux/magic.h): procfs, sysfs,
/// control groups, debugfs, tracefs, securityfs, configfs, selinuxfs, smackfs, binfmt_misc, nfsd,
/// rpc_pipefs, resctrl.
const MADE: [u32; 14] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0xf97c_ff8c,
    0x4341_5d53,
    0x4249_4e4d,
    0x6e66_7364,
    0x6759_6969,
    0x0765_5821,
];

/// What the guest has open.
pub enum Handle {
    File(OpenFile),
    Directory {
        share: ShareId,
        node: u64,
        file: Arc<OwnedFd>,
    },
    /// The device's root.
    Root,
}

/// A file that the guest has open.
pub struct OpenFile {
    pub share: ShareId,
    pub node: u64,
    /// Flags with which it was opened, and would be opened again.
    pub flags: OFlags,
    pub file: Arc<OwnedFd>,
    /// Whether reads can be tried without waiting (`RWF_NOWAIT`).
    pub can_poll: bool,
    /// The host's kernel makes its content when it is read (procfs, sysfs): its size says nothing.
    pub is_made: bool,
}

impl OpenFile {
    /// `flags` are those with which `file` was opened.
    pub fn new(share: ShareId, node: u64, flags: OFlags, file: OwnedFd) -> Result<Self, Errno> {
        // The type has another width on each architecture.
        let kind = rustix::fs::fstatfs(&file)?.f_type as u32;
        let is_made = MADE.contains(&kind);
        if is_made {
            // Some wait for an event (kmsg, trace_pipe): nothing here may wait for long.
            let status = rustix::fs::fcntl_getfl(&file)?;
            rustix::fs::fcntl_setfl(&file, status | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            share,
            node,
            flags,
            file: file.into(),
            can_poll: !is_made,
            is_made,
        })
    }
}
