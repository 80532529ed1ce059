//! Creates OCI containers, and more processes in them, for one kind of guest: the caller is its
//! single-threaded PID 1, root, with cgroup v2 alone at /sys/fs/cgroup.
//!
//! The agent's service calls this. Because no other thread exists, the agent clones itself once per
//! container and the clone, still running this code, makes itself the container's init: no
//! re-execution, no helper process. The agent parses and checks the spec before the clone, into
//! plans ([`child::InitPlan`]): every page that the clone touches for the first time costs it a
//! page fault, and errors in a spec are found before anything is created.
//!
//! Between agent and clone there is the *gate*, a pair of SEQPACKET sockets:
//!
//! | direction | message | meaning |
//! | --- | --- | --- |
//! | → child | `m` | its ids are mapped (only with a new user namespace) |
//! | → agent | `T` and a descriptor | the terminal's master (only with a terminal) |
//! | → agent | `R` | all is prepared |
//! | → child | any byte | execute |
//! | → agent | end of file | `execve` succeeded (or the process died) |
//! | → agent, at any time | kind and text | failed; the child exits |
//!
//! The clone does not share the agent's memory (CLONE_VM), though that would save its page faults:
//! user-mode Linux 7.3 panicked when it was tried, and a container that may trace processes must
//! not find the agent behind one of its own.
//!
//! Nothing here touches the asynchronous runtime, and nothing here reads or writes the container's
//! streams.

mod capabilities;
mod cgroup;
mod child;
mod clone;
mod copy_up;
mod devices;
mod error;
mod hooks;
mod limits;
mod mount_options;
mod mounts;
mod namespaces;
pub(crate) mod paths;
mod process_plan;
mod rootfs;
mod seccomp;
mod sys;
mod terminal;
mod users;

pub use error::{CreateError, Result};

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxPersonality, LinuxResources, Process, Spec};
use rustix::fs::{FileType, Uid};

use self::cgroup::{Cgroup, CgroupPlan};
use self::child::{ExecPlan, InitPlan};
use self::clone::{CloneTarget, Spawned};
use self::error::Context;
use self::limits::Limits;
use self::namespaces::{Namespaces, outside_id};
use self::process_plan::ProcessPlan;
use self::rootfs::RootfsPlan;
use self::seccomp::Filter;

/// The child's ends of its streams: pipes, sockets, or /dev/null.
pub struct Stdio {
    /// Becomes descriptor 0.
    pub stdin: OwnedFd,
    /// Becomes descriptor 1.
    pub stdout: OwnedFd,
    /// Becomes descriptor 2.
    pub stderr: OwnedFd,
}

/// `argv` and `envp` that are not valid UTF-8, which JSON cannot hold: when not empty, they replace
/// the spec's.
#[derive(Clone, Debug, Default)]
pub struct RawArgs {
    /// Instead of `process.args`.
    pub arguments: Vec<Vec<u8>>,
    /// Instead of `process.env`.
    pub environment: Vec<Vec<u8>>,
}

/// Streams of a new process.
pub enum ChildIo {
    /// Three descriptors. The spec's `process.terminal` must be false.
    Pipes(Stdio),
    /// A terminal in the container's own devpts; its master comes back in [`Child::terminal`].
    Terminal,
}

/// A process that waits at its gate.
pub struct Child {
    /// In the agent's PID namespace.
    pub pid: u32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
    /// Master of the terminal, with [`ChildIo::Terminal`]. Non-blocking.
    pub terminal: Option<OwnedFd>,
    /// Write one byte to let the process execute its command, then read once: end of file means
    /// that it does, a message is an error for [`CreateError::decode`]. Closing it unused ends the
    /// process.
    pub gate: OwnedFd,
}

/// A process that is still preparing itself. Dropping it ends the process.
///
/// For callers that must not block (hooks and slow file systems take their time): wait until it is
/// readable, then call [`PendingChild::finish`].
#[derive(Debug)]
pub struct PendingChild {
    spawned: Spawned,
    limits: Limits,
}

impl AsFd for PendingChild {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.spawned.gate.as_fd()
    }
}

impl PendingChild {
    /// The process, ready to execute; blocks until it is. On failure the process is dead and
    /// reaped.
    pub fn finish(self) -> Result<Child> {
        let PendingChild { spawned, limits } = self;
        let ready = spawned
            .wait_until_ready()
            .and_then(|terminal| limits.apply(spawned.pid).map(|()| terminal))
            .inspect_err(|_| spawned.kill());
        ready.map(|terminal| Child {
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            terminal,
            gate: spawned.gate,
        })
    }
}

/// A container whose init has been created.
#[derive(Debug)]
pub struct Container {
    /// pidfd of its init.
    init: OwnedFd,
    init_pid: u32,
    /// CLONE_NEW* flags of the namespaces that it has of its own.
    namespaces: u64,
    uid_map: Vec<LinuxIdMapping>,
    cgroup: Cgroup,
    frozen: AtomicBool,
    personality: Option<LinuxPersonality>,
    seccomp: Option<Arc<Filter>>,
}

impl Container {
    /// Starts to create a container, up to the point where its init waits at the gate. If
    /// [`PendingChild::finish`] fails, the container must be given to [`Container::destroy`]; an
    /// error from here leaves nothing behind.
    pub fn begin_create(
        id: &str,
        spec: &Spec,
        raw: &RawArgs,
        io: ChildIo,
    ) -> Result<(Container, PendingChild)> {
        let linux = spec
            .linux()
            .as_ref()
            .ok_or_else(|| CreateError::invalid("linux", "is missing"))?;
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| CreateError::invalid("process", "is missing"))?;
        refuse_foreign(spec, linux)?;
        check_terminal(process, &io)?;
        let group = CgroupPlan::new(
            id,
            linux.cgroups_path().as_deref(),
            linux.resources().as_ref(),
        )?;
        let namespaces = Namespaces::new(linux)?;
        let seccomp = linux
            .seccomp()
            .as_ref()
            .map(Filter::new)
            .transpose()?
            .map(Arc::new);
        let plan = InitPlan {
            rootfs: RootfsPlan::new(spec, &namespaces, &group.path())?,
            process: ProcessPlan::new(process, raw, linux.personality().as_ref(), seccomp.clone())?,
            hooks: hooks::Hooks::new(id, spec)?,
            hostname: own_name("hostname", spec.hostname(), &namespaces)?,
            domainname: own_name("domainname", spec.domainname(), &namespaces)?,
            namespaces,
        };
        let limits = Limits::new(process, false)?;
        own_streams(&io, outside_id(&plan.namespaces.uid_map, plan.process.uid));
        plan.rootfs.set_guest_sysctls()?;
        let cgroup = group.create()?;
        let started = start_init(&plan, &io, &cgroup).and_then(|spawned| {
            // The new process sets up its file system meanwhile, which is mostly waiting.
            let limited = cgroup.apply(&group).inspect_err(|_| spawned.kill());
            limited.map(|()| spawned)
        });
        let spawned = match started {
            Ok(spawned) => spawned,
            Err(error) => {
                // The first error is the one to report.
                let _ = cgroup.destroy();
                return Err(error);
            }
        };
        let init = match spawned.pidfd.try_clone() {
            Ok(init) => init,
            Err(error) => {
                spawned.kill();
                let _ = cgroup.destroy();
                return Err(error).context(|| "cannot keep a descriptor of the container's init");
            }
        };
        let container = Container {
            init,
            init_pid: spawned.pid,
            namespaces: plan.namespaces.all(),
            uid_map: plan.namespaces.uid_map,
            cgroup,
            frozen: AtomicBool::new(false),
            personality: linux.personality().clone(),
            seccomp,
        };
        Ok((container, PendingChild { spawned, limits }))
    }

    /// Starts to create another process in the running container, up to its gate.
    pub fn begin_exec(
        &self,
        process: &Process,
        raw: &RawArgs,
        io: ChildIo,
    ) -> Result<PendingChild> {
        if self.frozen.load(Ordering::Relaxed) {
            // A clone would start frozen.
            return Err(CreateError::NotRunning("container is paused".into()));
        }
        check_terminal(process, &io)?;
        let plan = ExecPlan {
            process: ProcessPlan::new(
                process,
                raw,
                self.personality.as_ref(),
                self.seccomp.clone(),
            )?,
            init: self.init.as_fd(),
            namespaces: self.namespaces,
        };
        let limits = Limits::new(process, true)?;
        own_streams(&io, outside_id(&self.uid_map, plan.process.uid));
        let spawn = |cgroup: BorrowedFd<'_>| {
            clone::spawn(
                &CloneTarget::NamespacesOf(self.init.as_fd()),
                cgroup,
                |gate| child::run_exec(&plan, &io, gate),
            )
        };
        let spawned = match spawn(self.cgroup.directory()) {
            Ok(spawned) => spawned,
            // A container that has divided its group into subgroups cannot have processes in the
            // group itself.
            Err(error) => match self.cgroup.group_of(self.init_pid) {
                Some(group) => spawn(group.as_fd())?,
                None => return Err(error),
            },
        };
        Ok(PendingChild { spawned, limits })
    }

    /// Changes limits while the container runs. What `resources` does not name stays unchanged.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        self.cgroup.update(resources)
    }

    /// Freezes or thaws every process of the container; returns when the kernel has confirmed it.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.cgroup.freeze(frozen)?;
        self.frozen.store(frozen, Ordering::Relaxed);
        Ok(())
    }

    /// Sends a signal to every process of the container.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        self.cgroup.signal(signal)
    }

    /// Directory of the container's control group.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Kills what still runs and removes the control group. The container's mounts end with its
    /// last process.
    pub fn destroy(self) -> Result<()> {
        self.cgroup.destroy()
    }
}

fn start_init(plan: &InitPlan, io: &ChildIo, cgroup: &Cgroup) -> Result<Spawned> {
    let namespaces = &plan.namespaces;
    if namespaces.has(sys::CLONE_NEWUSER) && namespaces.has(sys::CLONE_NEWCGROUP) {
        cgroup.delegate(outside_id(&namespaces.uid_map, 0))?;
    }
    let spawned = clone::spawn(
        &CloneTarget::Planned(namespaces),
        cgroup.directory(),
        |gate| child::run_init(plan, io, gate),
    )?;
    if namespaces.creates(sys::CLONE_NEWUSER) {
        let mapped = namespaces
            .write_maps(spawned.pid)
            .and_then(|()| spawned.maps_written());
        mapped.inspect_err(|_| spawned.kill())?;
    }
    Ok(spawned)
}

/// Rejects what is for other systems, or for hardware and policies that no guest has.
fn refuse_foreign(spec: &Spec, linux: &Linux) -> Result<()> {
    let given = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    let refused = [
        (spec.windows().is_some(), "windows", "the guest is Linux"),
        (spec.solaris().is_some(), "solaris", "the guest is Linux"),
        (spec.zos().is_some(), "zos", "the guest is Linux"),
        (
            spec.vm().is_some(),
            "vm",
            "the guest is the machine already",
        ),
        (
            linux.intel_rdt().is_some(),
            "linux.intelRdt",
            "the guest has no resource control of the processor",
        ),
        (
            linux.memory_policy().is_some(),
            "linux.memoryPolicy",
            "the guest has one memory node",
        ),
        (
            linux
                .net_devices()
                .as_ref()
                .is_some_and(|devices| !devices.is_empty()),
            "linux.netDevices",
            "network devices are not moved into containers",
        ),
        (
            given(linux.mount_label()),
            "linux.mountLabel",
            "the guest kernel has no SELinux",
        ),
    ];
    refused
        .into_iter()
        .find(|(given, ..)| *given)
        .map_or(Ok(()), |(_, field, why)| {
            Err(CreateError::unsupported(field, why))
        })
}

fn check_terminal(process: &Process, io: &ChildIo) -> Result<()> {
    let wanted = process.terminal().unwrap_or(false);
    if wanted != matches!(io, ChildIo::Terminal) {
        let why = if wanted {
            "is true, and no terminal stream is given"
        } else {
            "is false, and one is given"
        };
        return Err(CreateError::invalid("process.terminal", why));
    }
    Ok(())
}

/// A host or domain name; without a UTS namespace it would be the whole guest's.
fn own_name(
    field: &'static str,
    name: &Option<String>,
    namespaces: &Namespaces,
) -> Result<Option<String>> {
    let name = name.clone().filter(|name| !name.is_empty());
    if name.is_some() && !namespaces.has(sys::CLONE_NEWUTS) {
        return Err(CreateError::invalid(field, "given without a UTS namespace"));
    }
    Ok(name)
}

/// Gives pipes to the container's user, so that it can open /dev/stdout.
fn own_streams(io: &ChildIo, uid: u32) {
    if let ChildIo::Pipes(stdio) = io {
        for stream in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
            give(stream.as_fd(), uid);
        }
    }
}

/// Makes `uid` the owner of a stream that belongs to the container alone: a pipe or a terminal, not
/// the guest's /dev/null. A stream whose owner cannot be changed still works.
fn give(stream: BorrowedFd<'_>, uid: u32) {
    const TERMINALS: u32 = 136;
    if uid == 0 {
        return;
    }
    let Ok(stat) = rustix::fs::fstat(stream) else {
        return;
    };
    let own = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => true,
        FileType::CharacterDevice => rustix::fs::major(stat.st_rdev) == TERMINALS,
        _ => false,
    };
    if own {
        let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None);
    }
}

#[cfg(test)]
mod tests;
