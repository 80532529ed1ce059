//! Network namespaces as descriptors: opening and creating them, and running code inside one.
//! Called by the sandbox process, and by the parts of this crate that must be *in* a namespace for
//! a moment.
//!
//! A dedicated thread enters the namespace and ends ([`Namespace::run_in`]): the namespace of the
//! calling thread never changes, even on failure. A socket or tun device that was opened inside
//! stays in the namespace when it is used outside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustix::fs::{Mode, OFlags, fstat, fstatfs, open, stat};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{Error, Result};
use crate::sys;

/// The namespace of the thread that reads it.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, which lives at least as long as this. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<OwnedFd>);

/// Identifies a namespace: equal identities are the same namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// Opens the namespace at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let what = || path.as_ref().display().to_string();
        // O_NONBLOCK: opening never waits, whatever the path is.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open(path.as_ref(), flags, Mode::empty()).map_err(|errno| Error::Open {
            what: what(),
            why: errno.into(),
        })?;
        Self::checked(fd, what)
    }

    /// Opens the namespace of a process. To detect that the pid was reused, hold a pidfd and check
    /// it afterwards.
    pub fn of_process(pid: i32) -> Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// Opens the calling thread's namespace.
    pub fn own() -> Result<Self> {
        Self::open(OWN)
    }

    /// Creates a namespace that contains only `lo`, which is up. It is mounted nowhere: it goes
    /// away with its last descriptor, process and socket.
    pub fn new() -> Result<Self> {
        let made = on_a_thread(|| {
            sys::leave_network_namespace()?;
            sys::set_up("lo")?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            Ok(open(OWN, flags, Mode::empty())?)
        });
        let fd = made.and_then(|made| made).map_err(Error::NewNamespace)?;
        Self::checked(fd, || OWN.to_owned())
    }

    /// Runs `what` on a thread of its own in this namespace, and waits for it. The thread has no
    /// asynchronous runtime.
    pub fn run_in<T: Send>(&self, what: impl FnOnce() -> T + Send) -> Result<T> {
        let entered = on_a_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(what())
        });
        entered.and_then(|entered| entered).map_err(Error::Enter)
    }

    /// Whether another machine is connected to it: it contains taps of a live one.
    pub fn is_in_use(&self) -> Result<bool> {
        let text = self.devices()?;
        Ok(names(&text).any(|name| name.starts_with(crate::tap::PREFIX)))
    }

    fn devices(&self) -> Result<String> {
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
        self.run_in(read)?.map_err(|why| Error::Read {
            what: "interfaces",
            why,
        })
    }

    /// Identity of the namespace.
    pub fn identity(&self) -> Result<Identity> {
        let stat = fstat(&self.0).map_err(|errno| Error::Open {
            what: "by its descriptor".to_owned(),
            why: errno.into(),
        })?;
        Ok(Identity::of(&stat))
    }

    /// Whether both are the same namespace.
    pub fn is_same(&self, other: &Namespace) -> Result<bool> {
        Ok(self.identity()? == other.identity()?)
    }

    /// Whether it is the calling thread's namespace: for a sandbox process that of the host, which
    /// must not be changed.
    pub fn is_callers_own(&self) -> Result<bool> {
        let own = stat(OWN).map_err(|errno| Error::Open {
            what: OWN.to_owned(),
            why: errno.into(),
        })?;
        Ok(self.identity()? == Identity::of(&own))
    }

    /// Returns `fd` if it is a network namespace. The ioctl is tried on namespaces only.
    fn checked(fd: OwnedFd, what: impl Fn() -> String) -> Result<Self> {
        let is_namespace = fstatfs(&fd).is_ok_and(|fs| fs.f_type == libc::NSFS_MAGIC)
            && sys::namespace_kind(&fd).is_ok_and(|kind| kind == libc::CLONE_NEWNET);
        if !is_namespace {
            return Err(Error::NotANetworkNamespace { what: what() });
        }
        Ok(Self(Arc::new(fd)))
    }
}

/// The interface names in a text of `/proc/net/dev`.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
}

impl TryFrom<OwnedFd> for Namespace {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        Self::checked(fd, || "a descriptor".to_owned())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Identity {
    fn of(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// Runs `what` on a temporary thread. Its panic is propagated.
fn on_a_thread<T: Send>(what: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("netns".to_owned());
        let thread = builder.spawn_scoped(scope, what)?;
        thread
            .join()
            .or_else(|panic| std::panic::resume_unwind(panic))
    })
}
