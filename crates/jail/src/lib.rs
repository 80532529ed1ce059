//! The jail: what every process that parses guest-written bytes runs in.
//!
//! A jailed process has mount, pid, network, ipc, uts and cgroup namespaces of its own, an empty
//! read-only root directory with nothing but what its [`Root`] names, a user of its own and no
//! capabilities (the device process: the few that an fs device needs), no new privileges, no loads
//! that speculate past stores, Landlock, and a system call filter for its role. It dies with the
//! process that started it, and every process that it started dies with it, because it is PID 1 of
//! its namespace.
//!
//! Three ways in:
//! - [`spawn`] starts a foreign executable (a guest kernel, QEMU) inside. With no [`Confinement`]
//!   it starts hull's own executable in fresh namespaces, with nothing but the descriptors named;
//! - [`enter`] is then the first call of hull's own executable there. It needs no interpreter and
//!   no libraries in its empty root, because they are mapped by then;
//! - [`restrict_thread`] narrows one thread of such a process further: a virtual CPU, device I/O.
//!
//! The process that starts jails is not in one; [`restrict_supervisor`] takes from it what it does
//! not need any more.
//!
//! Called by the machines (crate machine) and by the sandbox for its device process. It never uses
//! data of a container or a guest: all its input comes from the sandbox.

mod calls;
mod executable;
mod filter;
mod privileges;
mod restrict;
mod root;
mod status;
mod supervisor;
mod sys;
mod thread;

use std::ffi::{CString, OsString};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Resource, Rlimit, Signal};

pub use filter::Role;
pub use root::{Bind, Directory, Root, Source, Tmp};
pub use rustix::thread::CapabilitySet;
pub use status::{SignalName, Status};
pub use supervisor::restrict_supervisor;
pub use sys::landlock_version;
pub use thread::{ThreadRole, drop_thread_capabilities, restrict_thread};

/// Inherited descriptors get numbers below this, enough for the layers of an image; what the set-up
/// itself needs lies above, below the usual limit of 1024.
const FIRST_PRIVATE_FD: RawFd = 576;

/// Open files that a process may have at least which starts another one.
const OPEN_FILES: u64 = FIRST_PRIVATE_FD as u64 + 64;

/// The capabilities that the fs device needs to act for a guest that has users of its own.
pub const FS_DEVICE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// The capabilities that unpacking a layer needs: to give files to other users, with device nodes,
/// file capabilities, and attributes of overlayfs (`trusted.*`, for which it takes SYS_ADMIN).
pub const UNPACK_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN);

/// A process to start in a jail.
pub struct JailSpec<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// The executable, opened (`O_PATH` is enough).
    pub executable: BorrowedFd<'a>,
    /// Its arguments, including the zeroth.
    pub argv: Vec<OsString>,
    /// Its environment, complete.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors it inherits, with the numbers they get there (below 576). Standard streams that
    /// are not named are `/dev/null`; everything else is closed.
    pub fds: Vec<(BorrowedFd<'a>, RawFd)>,
    /// Whether addresses are laid out the same at each start. A user-mode kernel wants it and would
    /// execute itself again to get it.
    pub fixed_addresses: bool,
    /// What it is confined to. `None`: the executable is hull's own and calls [`enter`] itself.
    pub confinement: Option<Confinement>,
}

/// What a jailed process may use, beside its namespaces.
pub struct Confinement {
    /// Which system calls it may make.
    pub role: Role,
    /// Its user.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
    /// The capabilities that it keeps. Used by [`enter`] only: none survives an exec.
    pub capabilities: CapabilitySet,
    /// Its root directory.
    pub root: Root,
    /// Its resource limits.
    pub limits: Limits,
    /// The processor does not predict its branches by those of other processes, nor theirs by its
    /// own. Costs each switch to or from it, some microseconds.
    pub isolate_branches: bool,
}

/// Resource limits of a jailed process (setrlimit(2)). Beside these, none has core dumps, POSIX
/// message queues, or more locked memory and queued signals than any of them needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open files (RLIMIT_NOFILE), or what the host allows if that is less.
    pub open_files: u64,
    /// Processes and threads of its user (RLIMIT_NPROC). For one that has its user to itself: the
    /// kernel does not limit root.
    pub processes: Option<u64>,
    /// Size of a file that it writes, bytes (RLIMIT_FSIZE).
    pub file_size: Option<u64>,
}

impl Limits {
    /// A number of open files, and no further limit.
    pub fn open_files(open_files: u64) -> Self {
        Self {
            open_files,
            processes: None,
            file_size: None,
        }
    }

    /// What is set: resource and limit.
    fn all(self) -> [(Resource, Option<u64>); 7] {
        [
            // 1 and not 0: a core dump into a pipe ignores 0, and 1 forbids both.
            (Resource::Core, Some(1)),
            (Resource::Nofile, Some(self.open_files)),
            (Resource::Nproc, self.processes),
            (Resource::Fsize, self.file_size),
            (Resource::Msgqueue, Some(0)),
            (Resource::Memlock, Some(MAX_LOCKED)),
            (Resource::Sigpending, Some(MAX_QUEUED_SIGNALS)),
        ]
    }

    fn apply(self) -> Result<(), Errno> {
        for (resource, limit) in self.all() {
            let Some(limit) = limit else { continue };
            let most = rustix::process::getrlimit(resource)
                .maximum
                .unwrap_or(u64::MAX);
            let limit = Some(limit.min(most));
            rustix::process::setrlimit(
                resource,
                Rlimit {
                    current: limit,
                    maximum: limit,
                },
            )?;
        }
        Ok(())
    }
}

/// Locked memory of a jailed process, bytes: the kernel's default before 5.16
/// (include/uapi/linux/resource.h).
const MAX_LOCKED: u64 = 64 << 10;

/// Queued signals of a jailed process's user: user-mode kernels have a timer each, which takes one.
const MAX_QUEUED_SIGNALS: u64 = 1024;

/// A started process. Dropping it does not end the process.
#[derive(Debug)]
pub struct Started {
    /// Its pid, in the caller's pid namespace.
    pub pid: i32,
    /// Readable when it has ended; used to wait for it and to signal it.
    pub pidfd: OwnedFd,
}

/// Why a process could not be jailed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument, an environment variable or a path cannot be passed on.
    #[error("cannot start {name}: {what} contains a zero byte")]
    ZeroByte {
        /// Name of the process.
        name: String,
        /// What contains the zero byte.
        what: &'static str,
    },
    /// A file for the jail's root directory cannot be used.
    #[error("cannot start {name}: cannot put {} into its jail: {errno}", path.display())]
    Content {
        /// Name of the process.
        name: String,
        /// The path.
        path: PathBuf,
        /// The error of the system call.
        errno: Errno,
    },
    /// The caller may have too few open files.
    #[error("cannot start {name}: {OPEN_FILES} open files are needed, and {allowed} are allowed")]
    OpenFiles {
        /// Name of the process.
        name: String,
        /// The limit.
        allowed: u64,
    },
    /// A step of the set-up failed.
    #[error("cannot start {name}: {step}: {errno}")]
    Step {
        /// Name of the process.
        name: String,
        /// The step.
        step: Step,
        /// The error of the system call.
        errno: Errno,
    },
    /// [`enter`] was called in a process with threads, which it would leave unconfined.
    #[error("cannot enter the jail of {name}: the process already has {threads} threads")]
    Threads {
        /// Name of the process.
        name: String,
        /// Number of threads.
        threads: usize,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::OpenFiles { .. } => Some("ulimit -n 1024".into()),
            _ => None,
        }
    }
}

/// Allows this process as many open files as it may have: the usual limit is less.
///
/// # Errors
/// The kernel's.
pub fn raise_open_files() -> Result<(), Errno> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )
}

macro_rules! steps {
    ($($name:ident = $text:literal,)*) => {
        /// The steps of the set-up, for messages.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Step {
            $(#[doc = $text] $name,)*
        }

        impl Step {
            const ALL: &[Step] = &[$(Step::$name,)*];
        }

        impl std::fmt::Display for Step {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Step::$name => $text,)* })
            }
        }
    };
}

steps! {
    Prepare = "preparing the jail",
    Seal = "mounting the executable read-only",
    Clone = "creating a process in new namespaces",
    Session = "starting a session",
    Limits = "setting resource limits",
    Descriptors = "placing the inherited descriptors",
    HostName = "setting the host name",
    PrivateMounts = "making the mounts private",
    Root = "mounting the root directory",
    Directory = "making a directory in the root directory",
    Bind = "binding a file or directory",
    Proc = "mounting /proc",
    Tmp = "mounting /tmp",
    Device = "making a device node",
    ReadOnlyRoot = "making the root directory read-only",
    PivotRoot = "changing the root directory",
    OldRoot = "detaching the old root directory",
    BoundingSet = "limiting capabilities",
    User = "changing the user",
    Capabilities = "dropping capabilities",
    DeathSignal = "setting the parent death signal",
    Orphaned = "the parent has ended",
    Personality = "fixing the address layout",
    Speculation = "limiting the processor's speculation",
    NoNewPrivileges = "forbidding new privileges",
    Landlock = "restricting itself with landlock",
    Filter = "installing the system call filter",
    Execute = "executing it",
}

/// Starts a process in a jail and waits until it executes (about a millisecond).
///
/// # Errors
/// [`Error::OpenFiles`], [`Error::ZeroByte`] and [`Error::Content`] before a process exists;
/// [`Error::Step`] with the step that failed, after the process has been killed and collected.
///
/// The process dies with the thread that calls this, not only with the calling process.
pub fn spawn(spec: JailSpec<'_>) -> Result<Started, Error> {
    let name = spec.name.to_owned();
    let failed = |step| {
        let name = name.clone();
        move |errno| Error::Step { name, step, errno }
    };
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    if let Some(allowed) = limit.filter(|allowed| *allowed < OPEN_FILES) {
        return Err(Error::OpenFiles { name, allowed });
    }
    let argv = strings(&name, "an argument", spec.argv)?;
    let env = spec.env.into_iter().map(|(mut key, value)| {
        key.push("=");
        key.push(value);
        key
    });
    let env = strings(&name, "an environment variable", env.collect())?;
    let confinement = match &spec.confinement {
        Some(confinement) => Some(Prepared::new(&name, confinement, Some(spec.executable))?),
        None => None,
    };

    let null = rustix::fs::open(
        c"/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(failed(Step::Prepare))?;
    let mut fds: Vec<(RawFd, RawFd)> = Vec::new();
    for standard in 0..3 {
        if !spec.fds.iter().any(|(_, target)| *target == standard) {
            fds.push((null.as_raw_fd(), standard));
        }
    }
    for (fd, target) in &spec.fds {
        if !(0..FIRST_PRIVATE_FD).contains(target) {
            return Err(failed(Step::Descriptors)(Errno::BADF));
        }
        fds.push((fd.as_raw_fd(), *target));
    }

    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    let (parent, (report_in, report_out)) = own
        .and_then(|own| {
            Ok((
                above(own)?,
                rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?,
            ))
        })
        .map_err(failed(Step::Prepare))?;
    let report_out = above(report_out).map_err(failed(Step::Prepare))?;
    // A foreign executable runs as a user who owns nothing.
    let sealed = match spec.confinement {
        Some(_) => None,
        // Without a name on the host, there is nothing to protect.
        None if is_removed(spec.executable) => None,
        None => match executable::sealed(spec.executable) {
            Ok(sealed) => Some(sealed),
            // Root of a user namespace is not the owner of an installed file, and may lack the
            // rights over its mount.
            Err(_) if in_user_namespace() => None,
            Err(errno) => return Err(failed(Step::Seal)(errno)),
        },
    };
    let executable = sealed
        .as_ref()
        .map_or(spec.executable, |sealed| sealed.as_fd());
    let executable = rustix::io::fcntl_dupfd_cloexec(executable, FIRST_PRIVATE_FD)
        .map_err(failed(Step::Prepare))?;

    let child = Child {
        executable: executable.as_fd(),
        argv: sys::Strings::new(argv),
        env: sys::Strings::new(env),
        fds,
        fixed_addresses: spec.fixed_addresses,
        parent: parent.as_fd(),
        confinement,
    };
    let (pid, pidfd) = match sys::clone_into_namespaces().map_err(failed(Step::Clone))? {
        sys::Clone::Parent(pid, pidfd) => (pid, pidfd),
        sys::Clone::Child => {
            let (step, errno) = child.run();
            let report = [step as u8, errno.raw_os_error() as u8];
            let _ = rustix::io::write(&report_out, &report);
            sys::exit_now(127)
        }
    };
    drop(report_out);

    // End of file without a byte: the executable runs, its exec closed the pipe.
    let mut report = Vec::new();
    let read = std::fs::File::from(report_in)
        .take(2)
        .read_to_end(&mut report);
    match (read, report.as_slice()) {
        (Ok(_), []) => Ok(Started { pid, pidfd }),
        (_, report) => {
            reap(pidfd.as_fd());
            let step = report
                .first()
                .and_then(|step| Step::ALL.get(usize::from(*step)));
            let errno = Errno::from_raw_os_error(report.get(1).copied().unwrap_or_default().into());
            Err(failed(step.copied().unwrap_or(Step::Prepare))(errno))
        }
    }
}

/// Whether not all users of the host are users here.
pub fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    // The first namespace has all ids but the one that means none.
    map.split_whitespace().ne(["0", "0", "4294967295"])
}

/// Whether a file has no name any more.
fn is_removed(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| stat.st_nlink == 0)
}

/// Confines the calling process, which [`spawn`] started without a confinement. Its open
/// descriptors stay open.
pub fn enter(name: &str, confinement: &Confinement) -> Result<(), Error> {
    check_single_thread(name)?;
    Prepared::new(name, confinement, None)?
        .apply(confinement.capabilities, None)
        .map_err(|(step, errno)| Error::Step {
            name: name.to_owned(),
            step,
            errno,
        })
}

/// Capabilities, Landlock and filters hold for the calling thread and those it starts later.
fn check_single_thread(name: &str) -> Result<(), Error> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map(Iterator::count)
        .unwrap_or(1);
    match threads {
        1 => Ok(()),
        _ => Err(Error::Threads {
            name: name.to_owned(),
            threads,
        }),
    }
}

/// A confinement, prepared so that applying it takes system calls only, no allocation.
struct Prepared {
    root: root::Plan,
    uid: u32,
    gid: u32,
    landlock: Option<restrict::Ruleset>,
    filter: filter::Filter,
    limits: Limits,
    isolate_branches: bool,
}

impl Prepared {
    fn new(
        name: &str,
        confinement: &Confinement,
        executable: Option<BorrowedFd<'_>>,
    ) -> Result<Self, Error> {
        let Confinement {
            role,
            uid,
            gid,
            root,
            limits,
            isolate_branches,
            ..
        } = confinement;
        let plan = root::Plan::new(root, *uid, *gid).map_err(|(path, errno)| Error::Content {
            name: name.to_owned(),
            path,
            errno,
        })?;
        Ok(Self {
            root: plan,
            uid: *uid,
            gid: *gid,
            landlock: restrict::Ruleset::new(*role, root, executable),
            filter: filter::Filter::of(*role),
            limits: *limits,
            isolate_branches: *isolate_branches,
        })
    }

    fn apply(
        self,
        capabilities: CapabilitySet,
        parent: Option<BorrowedFd<'_>>,
    ) -> Result<(), (Step, Errno)> {
        let at = |step| move |errno| (step, errno);
        self.limits.apply().map_err(at(Step::Limits))?;
        sys::set_host_name(c"hull").map_err(at(Step::HostName))?;
        self.root.build()?;
        privileges::drop_to(self.uid, self.gid, capabilities)?;
        die_with_parent(parent)?;
        let forbid = |kind| sys::forbid_speculation(kind).map_err(at(Step::Speculation));
        forbid(sys::Speculation::StoreBypass)?;
        if self.isolate_branches {
            forbid(sys::Speculation::IndirectBranches)?;
        }
        rustix::thread::set_no_new_privs(true).map_err(at(Step::NoNewPrivileges))?;
        if let Some(landlock) = self.landlock {
            landlock.restrict_self().map_err(at(Step::Landlock))?;
        }
        self.filter.install().map_err(at(Step::Filter))
    }
}

/// The data that the child uses between clone and exec.
struct Child<'a> {
    executable: BorrowedFd<'a>,
    argv: sys::Strings,
    env: sys::Strings,
    fds: Vec<(RawFd, RawFd)>,
    fixed_addresses: bool,
    parent: BorrowedFd<'a>,
    confinement: Option<Prepared>,
}

impl Child<'_> {
    /// Runs in the child: sets up and executes. Returns only on failure, with the step that failed.
    fn run(mut self) -> (Step, Errno) {
        match self.set_up() {
            Err(failure) => failure,
            Ok(()) => (
                Step::Execute,
                sys::execute(self.executable, &self.argv, &self.env),
            ),
        }
    }

    fn set_up(&mut self) -> Result<(), (Step, Errno)> {
        const ADDR_NO_RANDOMIZE: u64 = 0x0004_0000;
        let at = |step| move |errno| (step, errno);
        rustix::process::setsid().map_err(at(Step::Session))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        // Before anything that can block: from here on the parent's death ends this process.
        die_with_parent(Some(self.parent))?;
        sys::reset_signals();
        if self.fixed_addresses {
            sys::set_personality(ADDR_NO_RANDOMIZE).map_err(at(Step::Personality))?;
        }

        // The number of a source may be the target of another, so all sources move first.
        for (fd, _) in &mut self.fds {
            *fd = sys::duplicate_above(*fd, FIRST_PRIVATE_FD).map_err(at(Step::Descriptors))?;
        }
        sys::close_all_on_exec().map_err(at(Step::Descriptors))?;
        for (fd, target) in &self.fds {
            sys::place_descriptor(*fd, *target).map_err(at(Step::Descriptors))?;
        }
        match self.confinement.take() {
            Some(confinement) => confinement.apply(CapabilitySet::empty(), Some(self.parent)),
            None => Ok(()),
        }
    }
}

/// Sets the parent death signal. A change of user clears it, so it is set again after one. `parent`
/// is a pidfd of the parent, to detect that it ended before this call.
fn die_with_parent(parent: Option<BorrowedFd<'_>>) -> Result<(), (Step, Errno)> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| (Step::DeathSignal, errno))?;
    if let Some(parent) = parent {
        let mut events = [PollFd::from_borrowed_fd(parent, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut events, Some(&at_once)) {
            Ok(0) => {}
            Ok(_) => return Err((Step::Orphaned, Errno::SRCH)),
            Err(errno) => return Err((Step::DeathSignal, errno)),
        }
    }
    Ok(())
}

/// Collects a child that ended during set-up.
fn reap(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    let id = rustix::process::WaitId::PidFd(pidfd);
    let _ = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED);
}

/// Moves a descriptor out of the range of inherited ones.
fn above(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(&fd, FIRST_PRIVATE_FD)
}

fn strings(name: &str, what: &'static str, texts: Vec<OsString>) -> Result<Vec<CString>, Error> {
    texts
        .into_iter()
        .map(|text| CString::new(text.into_vec()))
        .collect::<Result<_, _>>()
        .map_err(|_| Error::ZeroByte {
            name: name.to_owned(),
            what,
        })
}
