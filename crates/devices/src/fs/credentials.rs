//! Acting for the guest's user on the host: file ownership, and the set-id bits that a write
//! clears.
//!
//! The guest's kernel has checked permissions already; the host must not check them again, because
//! it does not know supplementary groups and capabilities in user namespaces. So the thread keeps
//! its file capabilities while its file-system user and group, which new files get, are the
//! guest's.
//!
//! All of this is per thread. Each change is undone when its guard is dropped.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The thread's capabilities, read once.
pub struct Credentials {
    sets: Option<CapabilitySets>,
}

impl Credentials {
    pub fn new() -> Self {
        Self {
            sets: capabilities(None).ok(),
        }
    }

    /// Until the guard is dropped, new files belong to `uid` and `gid`.
    pub fn assume(&self, uid: u32, gid: u32) -> Result<Option<Assumed>, Errno> {
        if uid == 0 && gid == 0 {
            return Ok(None);
        }
        let guard = Assumed;
        set_fs_id(libc::SYS_setfsgid, gid)?;
        set_fs_id(libc::SYS_setfsuid, uid)?;
        // Becoming a user other than 0 has taken the file capabilities out of the effective set.
        if let Some(sets) = &self.sets {
            set_capabilities(None, *sets)?;
        }
        Ok(Some(guard))
    }

    /// Until the guard is dropped, the host clears set-user-ID and set-group-ID bits as for an
    /// unprivileged user of group `gid`.
    pub fn ordinary(&self, gid: u32) -> Result<Option<Ordinary>, Errno> {
        let Some(sets) = self.sets else {
            return Ok(None);
        };
        if !sets.effective.contains(CapabilitySet::FSETID) {
            return Ok(None);
        }
        let guard = Ordinary(sets);
        set_fs_id(libc::SYS_setfsgid, gid)?;
        let mut lesser = sets;
        lesser.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, lesser)?;
        Ok(Some(guard))
    }
}

/// See [`Credentials::assume`].
pub struct Assumed;

impl Drop for Assumed {
    fn drop(&mut self) {
        // Always allowed: 0 is the thread's real user and group. Capabilities come back with the
        // user.
        for call in [libc::SYS_setfsuid, libc::SYS_setfsgid] {
            if set_fs_id(call, 0).is_err() {
                tracing::error!("cannot return to user 0");
            }
        }
    }
}

/// See [`Credentials::ordinary`].
pub struct Ordinary(CapabilitySets);

impl Drop for Ordinary {
    fn drop(&mut self) {
        if let Err(error) = set_capabilities(None, self.0) {
            tracing::error!(%error, "cannot restore capabilities");
        }
        if set_fs_id(libc::SYS_setfsgid, 0).is_err() {
            tracing::error!("cannot return to group 0");
        }
    }
}

/// `setfsuid` or `setfsgid`, which report only on the next call whether they worked.
fn set_fs_id(call: libc::c_long, id: u32) -> Result<(), Errno> {
    if id == u32::MAX {
        return Err(Errno::INVAL);
    }
    // SAFETY: these calls take a number and touch no memory. They bypass libc because they
    // must change this thread only.
    let current = unsafe {
        libc::syscall(call, id);
        libc::syscall(call, u32::MAX)
    };
    if current as u32 == id {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}
