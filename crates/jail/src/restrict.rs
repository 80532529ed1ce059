//! Landlock: a second layer, in case that something of the host is reachable in a jail after all.
//!
//! All access rights that the host's kernel supports are handled; a kernel without Landlock runs
//! the jail without this layer.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset as Builder, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::filter::Role;
use crate::root::Root;

/// Rules prepared for [`Ruleset::restrict_self`].
pub struct Ruleset {
    created: RulesetCreated,
    /// Access rights of paths below the new root directory, which are opened there.
    paths: Vec<(PathBuf, BitFlags<AccessFs>)>,
}

impl Ruleset {
    /// The rules for a process of this role. `None` on a kernel without Landlock.
    pub fn new(role: Role, root: &Root, executable: Option<BorrowedFd<'_>>) -> Option<Self> {
        let abi = ABI::V6;
        let builder = Builder::default()
            .handle_access(AccessNet::from_all(abi))
            .and_then(|builder| builder.scope(Scope::from_all(abi)))
            .ok()?;
        if matches!(role, Role::Device | Role::Vmm) {
            // It works below directories that arrive later, so no rule can name them. Its root
            // directory holds nothing but /proc.
            return Some(Self {
                created: builder.create().ok()?,
                paths: Vec::new(),
            });
        }
        let mut created = builder
            .handle_access(AccessFs::from_all(abi))
            .ok()?
            .create()
            .ok()?;
        if let Some(executable) = executable {
            let access = AccessFs::Execute | AccessFs::ReadFile;
            created = created
                .add_rule(PathBeneath::new(executable, access))
                .ok()?;
        }
        for one in &root.directories {
            let access = if one.writable {
                AccessFs::from_all(abi) & !AccessFs::Execute & !AccessFs::IoctlDev
            } else {
                AccessFs::ReadFile | AccessFs::ReadDir
            };
            let rule = PathBeneath::new(&one.directory, access);
            created = created.add_rule(rule).ok()?;
        }
        let mut paths = Vec::new();
        if root.tmp.is_some() {
            paths.push((
                "/tmp".into(),
                AccessFs::from_all(abi) & !AccessFs::MakeChar & !AccessFs::MakeBlock,
            ));
        }
        if root.proc {
            paths.push(("/proc".into(), AccessFs::ReadFile | AccessFs::ReadDir));
        }
        for bind in &root.binds {
            let mut access = AccessFs::ReadFile | AccessFs::ReadDir;
            if bind.executable {
                access |= AccessFs::Execute;
            }
            if bind.file_type() != Ok(FileType::Directory) {
                access &= AccessFs::from_file(abi);
            }
            paths.push((bind.target.clone(), access));
        }
        for (path, _) in &root.devices {
            paths.push((
                path.clone(),
                AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            ));
        }
        Some(Self { created, paths })
    }

    /// Restricts the calling thread, which is in its new root directory already.
    pub fn restrict_self(self) -> Result<(), Errno> {
        let mut created = self.created;
        for (path, access) in self.paths {
            let rule = rustix::fs::open(
                path,
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .map(|fd: OwnedFd| PathBeneath::new(fd, access))?;
            created = created.add_rule(rule).map_err(|_| Errno::INVAL)?;
        }
        created.restrict_self().map(drop).map_err(|_| Errno::INVAL)
    }
}
