//! Which namespaces a container gets: new, existing, or the agent's.
//!
//! Where each is created depends on the kernel's rules:
//! - most new ones come with `clone3`;
//! - a new cgroup namespace is rooted at the *caller's* control group, and a new time namespace
//!   takes its offsets before anything is in it: the child creates both with `unshare` (it enters
//!   the time namespace when it executes);
//! - existing ones are joined by the agent before it clones, which then returns to its own: only
//!   the agent has the rights in both, and a PID namespace applies to new children only;
//! - no process returns from a joined user namespace, so that needs a process in between
//!   ([`super::clone`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags};

use super::error::{Context, CreateError, Result};
use super::{clone, sys};

/// The namespaces of one container.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    /// CLONE_NEW* flags of the new ones.
    pub(super) new: u64,
    /// Those joined by path, with their CLONE_NEW* flags.
    joined: Vec<(u64, OwnedFd)>,
    pub(super) uid_map: Vec<LinuxIdMapping>,
    pub(super) gid_map: Vec<LinuxIdMapping>,
    /// Lines for timens_offsets.
    pub(super) time_offsets: String,
}

fn clone_flag(kind: LinuxNamespaceType) -> u64 {
    match kind {
        LinuxNamespaceType::Mount => sys::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => sys::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => sys::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => sys::CLONE_NEWIPC,
        LinuxNamespaceType::User => sys::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => sys::CLONE_NEWPID,
        LinuxNamespaceType::Network => sys::CLONE_NEWNET,
        LinuxNamespaceType::Time => sys::CLONE_NEWTIME,
    }
}

/// Name of a namespace in /proc/PID/ns.
fn file_name(flag: u64) -> &'static str {
    match flag {
        sys::CLONE_NEWNS => "mnt",
        sys::CLONE_NEWCGROUP => "cgroup",
        sys::CLONE_NEWUTS => "uts",
        sys::CLONE_NEWIPC => "ipc",
        sys::CLONE_NEWUSER => "user",
        sys::CLONE_NEWPID => "pid",
        sys::CLONE_NEWNET => "net",
        _ => "time",
    }
}

/// Opens one of the agent's own namespaces.
fn own(flag: u64) -> Result<OwnedFd> {
    let path = format!("/proc/self/ns/{}", file_name(flag));
    rustix::fs::openat(
        CWD,
        path.as_str(),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| format!("cannot open {path}"))
}

impl Namespaces {
    /// Reads the spec and opens the namespaces that it names by path.
    pub(super) fn new(linux: &Linux) -> Result<Namespaces> {
        let mut namespaces = Namespaces::default();
        let mut seen = 0;
        for namespace in linux.namespaces().iter().flatten() {
            let flag = clone_flag(namespace.typ());
            let name = format!("linux.namespaces: {}", file_name(flag));
            if seen & flag != 0 {
                return Err(CreateError::invalid(name, "named twice"));
            }
            seen |= flag;
            match namespace
                .path()
                .as_deref()
                .filter(|path| !path.as_os_str().is_empty())
            {
                None => namespaces.new |= flag,
                Some(_) if flag == sys::CLONE_NEWNS => {
                    return Err(CreateError::unsupported(name, "joining by path"));
                }
                Some(path) => {
                    let fd = rustix::fs::openat(
                        CWD,
                        path,
                        OFlags::RDONLY | OFlags::CLOEXEC,
                        Mode::empty(),
                    )
                    .context(|| format!("cannot open {} for {name}", path.display()))?;
                    namespaces.joined.push((flag, fd));
                }
            }
        }
        // The user namespace comes last: after it, the right to join the others may be gone.
        namespaces
            .joined
            .sort_by_key(|(flag, _)| *flag == sys::CLONE_NEWUSER);
        if !namespaces.creates(sys::CLONE_NEWNS) {
            return Err(CreateError::unsupported(
                "linux.namespaces",
                "a container without a new mount namespace",
            ));
        }
        namespaces.read_maps(linux)?;
        namespaces.read_time_offsets(linux)?;
        Ok(namespaces)
    }

    fn read_maps(&mut self, linux: &Linux) -> Result<()> {
        for (field, mappings, map) in [
            ("linux.uidMappings", linux.uid_mappings(), &mut self.uid_map),
            ("linux.gidMappings", linux.gid_mappings(), &mut self.gid_map),
        ] {
            *map = mappings.clone().unwrap_or_default();
            if self.new & sys::CLONE_NEWUSER != 0
                && !map.iter().any(|range| range.container_id() == 0)
            {
                return Err(CreateError::invalid(
                    field,
                    "a new user namespace needs a mapping of container id 0",
                ));
            }
        }
        let mapped = !self.uid_map.is_empty() || !self.gid_map.is_empty();
        if mapped && !self.has(sys::CLONE_NEWUSER) {
            return Err(CreateError::invalid(
                "linux.uidMappings",
                "given without a user namespace",
            ));
        }
        Ok(())
    }

    fn read_time_offsets(&mut self, linux: &Linux) -> Result<()> {
        let Some(offsets) = linux.time_offsets() else {
            return Ok(());
        };
        for (clock, offset) in offsets {
            if clock != "monotonic" && clock != "boottime" {
                return Err(CreateError::invalid(
                    "linux.timeOffsets",
                    format_args!("unknown clock {clock:?}"),
                ));
            }
            let (seconds, nanoseconds) =
                (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
            self.time_offsets
                .push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
        }
        if !offsets.is_empty() && !self.creates(sys::CLONE_NEWTIME) {
            return Err(CreateError::invalid(
                "linux.timeOffsets",
                "given without a new time namespace",
            ));
        }
        Ok(())
    }

    /// Whether the container gets a new one of this kind.
    pub(super) fn creates(&self, flag: u64) -> bool {
        self.new & flag != 0
    }

    /// Whether the container has one of its own, new or joined.
    pub(super) fn has(&self, flag: u64) -> bool {
        self.all() & flag != 0
    }

    /// All that differ from the agent's.
    pub(super) fn all(&self) -> u64 {
        self.joined
            .iter()
            .fold(self.new, |all, (flag, _)| all | flag)
    }

    /// Those created by `clone3`.
    pub(super) fn at_clone(&self) -> u64 {
        self.new & !(sys::CLONE_NEWCGROUP | sys::CLONE_NEWTIME)
    }

    /// Whether the clone must be created inside a joined user namespace.
    pub(super) fn joins_user(&self) -> bool {
        self.joined
            .last()
            .is_some_and(|(flag, _)| *flag == sys::CLONE_NEWUSER)
    }

    /// Joins those given by path, permanently.
    pub(super) fn join(&self) -> Result<()> {
        for (flag, fd) in &self.joined {
            sys::setns(fd.as_fd(), *flag)
                .context(|| format!("cannot join the {} namespace", file_name(*flag)))?;
        }
        Ok(())
    }

    /// Joins those given by path until the result is dropped.
    pub(super) fn visit(&self) -> Result<Visit> {
        let mut visit = Visit {
            own: Vec::with_capacity(self.joined.len()),
        };
        for (flag, fd) in &self.joined {
            visit.enter(fd.as_fd(), *flag)?;
        }
        Ok(visit)
    }

    /// Creates those that `clone3` cannot. Runs in the child, still with the agent's /proc.
    pub(super) fn make_rest(&self) -> Result<()> {
        if self.creates(sys::CLONE_NEWCGROUP) {
            sys::unshare(sys::CLONE_NEWCGROUP).context(|| "cannot make a cgroup namespace")?;
        }
        if self.creates(sys::CLONE_NEWTIME) {
            sys::unshare(sys::CLONE_NEWTIME).context(|| "cannot make a time namespace")?;
            if !self.time_offsets.is_empty() {
                sys::write_file(
                    CWD,
                    c"/proc/self/timens_offsets",
                    self.time_offsets.as_bytes(),
                )
                .context(|| "cannot set linux.timeOffsets")?;
            }
        }
        Ok(())
    }

    /// Maps the ids of the new user namespace of `pid`.
    pub(super) fn write_maps(&self, pid: u32) -> Result<()> {
        write_maps(pid, &self.uid_map, &self.gid_map)
    }
}

fn write_maps(pid: u32, uid_map: &[LinuxIdMapping], gid_map: &[LinuxIdMapping]) -> Result<()> {
    for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
        sys::write_file(
            CWD,
            format!("/proc/{pid}/{file}").as_str(),
            lines(map).as_bytes(),
        )
        .context(|| format!("cannot write the {file} of the new user namespace"))?;
    }
    Ok(())
}

/// A map as `uid_map` takes it.
fn lines(map: &[LinuxIdMapping]) -> String {
    map.iter()
        .map(|range| {
            format!(
                "{} {} {}\n",
                range.container_id(),
                range.host_id(),
                range.size()
            )
        })
        .collect()
}

/// User namespaces that stand for the mapped ids of mounts, each made once. No process is in them.
#[derive(Debug, Default)]
pub(super) struct IdMaps(RefCell<HashMap<String, Rc<OwnedFd>>>);

impl IdMaps {
    /// The user namespace that maps ids so. Called by the agent, in its own namespaces.
    pub(super) fn get(
        &self,
        uid_map: &[LinuxIdMapping],
        gid_map: &[LinuxIdMapping],
    ) -> Result<Rc<OwnedFd>> {
        let key = format!("{}\n{}", lines(uid_map), lines(gid_map));
        if let Some(made) = self.0.borrow().get(&key) {
            return Ok(made.clone());
        }
        let made = Rc::new(clone::user_namespace(|pid| {
            write_maps(pid, uid_map, gid_map)
        })?);
        self.0.borrow_mut().insert(key, made.clone());
        Ok(made)
    }
}

/// Maps an id of the container to the one outside of its user namespace.
pub(super) fn outside_id(map: &[LinuxIdMapping], id: u32) -> u32 {
    map.iter()
        .find(|range| id >= range.container_id() && id - range.container_id() < range.size())
        .and_then(|range| range.host_id().checked_add(id - range.container_id()))
        .unwrap_or(id)
}

/// The agent is in other namespaces. Dropping this returns it to its own, and aborts if that fails.
pub(super) struct Visit {
    own: Vec<(u64, OwnedFd)>,
}

impl Visit {
    /// Enters the PID namespace of a process, for children created meanwhile.
    pub(super) fn pid_namespace_of(process: BorrowedFd<'_>) -> Result<Visit> {
        let mut visit = Visit {
            own: Vec::with_capacity(1),
        };
        visit.enter(process, sys::CLONE_NEWPID)?;
        Ok(visit)
    }

    fn enter(&mut self, namespace: BorrowedFd<'_>, flag: u64) -> Result<()> {
        let own = own(flag)?;
        sys::setns(namespace, flag).map_err(|error| {
            if error.raw_os_error() == Some(libc::ESRCH) {
                return CreateError::NotRunning("container is not running".into());
            }
            CreateError::other(
                format_args!("cannot join the {} namespace", file_name(flag)),
                super::error::reason(&error),
            )
        })?;
        self.own.push((flag, own));
        Ok(())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        for (flag, own) in self.own.drain(..).rev() {
            if sys::setns(own.as_fd(), flag).is_err() {
                // From here on the agent would act in the container's namespaces.
                std::process::abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    fn message(json: &str) -> String {
        Namespaces::new(&linux(json)).unwrap_err().to_string()
    }

    #[test]
    fn new_namespaces_become_flags() {
        let namespaces = Namespaces::new(&linux(
            r#"{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"cgroup"},{"type":"time"}],
                "timeOffsets":{"boottime":{"secs":5,"nanosecs":7}}}"#,
        ))
        .unwrap();
        assert_eq!(namespaces.at_clone(), sys::CLONE_NEWNS | sys::CLONE_NEWPID);
        assert!(namespaces.creates(sys::CLONE_NEWCGROUP));
        assert_eq!(namespaces.time_offsets, "boottime 5 7\n");
    }

    #[test]
    fn what_cannot_be_is_named() {
        assert!(message(r#"{"namespaces":[{"type":"pid"}]}"#).contains("mount namespace"));
        assert!(
            message(r#"{"namespaces":[{"type":"mount"},{"type":"mount"}]}"#)
                .contains("mnt: named twice")
        );
        assert!(
            message(r#"{"namespaces":[{"type":"mount","path":"/x"}]}"#).contains("not supported")
        );
        assert!(
            message(r#"{"namespaces":[{"type":"mount"},{"type":"user"}]}"#).contains("uidMappings")
        );
        assert!(
            message(r#"{"namespaces":[{"type":"mount"}],"timeOffsets":{"boottime":{"secs":1}}}"#)
                .contains("timeOffsets")
        );
        assert!(
            message(r#"{"namespaces":[{"type":"mount"},{"type":"network","path":"/nowhere"}]}"#)
                .contains("/nowhere")
        );
    }

    #[test]
    fn ids_are_mapped_outwards() {
        let namespaces = Namespaces::new(&linux(
            r#"{"namespaces":[{"type":"mount"},{"type":"user"}],
                "uidMappings":[{"containerID":0,"hostID":1000,"size":10},{"containerID":10,"hostID":5,"size":1}],
                "gidMappings":[{"containerID":0,"hostID":0,"size":1}]}"#,
        ))
        .unwrap();
        assert_eq!(outside_id(&namespaces.uid_map, 3), 1003);
        assert_eq!(outside_id(&namespaces.uid_map, 10), 5);
        assert_eq!(outside_id(&namespaces.uid_map, 99), 99);
    }
}
