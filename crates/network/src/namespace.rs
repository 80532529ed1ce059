//! Network namespaces as descriptors: opening and making them, and doing something inside one.
//! Called by the sandbox process, and by everything in this crate that must be *in* a namespace for
//! a moment.
//!
//! A thread of its own enters the namespace and ends ([`Namespace::run_in`]): the namespace of the
//! calling thread never changes, whatever fails. What was opened inside, a socket or a tun device,
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

/// A network namespace, kept alive as long as this is. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<OwnedFd>);

/// Which namespace: two that are equal are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// Opens the namespace at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let what = || path.as_ref().display().to_string();
        // O_NONBLOCK: whatever is there, opening it does not wait.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open(path.as_ref(), flags, Mode::empty()).map_err(|errno| Error::Open {
            what: what(),
            why: errno.into(),
        })?;
        Self::checked(fd, what)
    }

    /// Opens the namespace of a process. Who needs to know that it is still that process holds a
    /// pidfd and looks at it afterwards.
    pub fn of_process(pid: i32) -> Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The calling thread's.
    pub fn own() -> Result<Self> {
        Self::open(OWN)
    }

    /// Makes a namespace with nothing in it but `lo`, which is up. It is mounted nowhere: it goes
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

    /// Runs `what` on a thread of its own that is in this namespace, and waits for it. The thread
    /// has no asynchronous runtime.
    pub fn run_in<T: Send>(&self, what: impl FnOnce() -> T + Send) -> Result<T> {
        let entered = on_a_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(what())
        });
        entered.and_then(|entered| entered).map_err(Error::Enter)
    }

    /// Whether another machine is connected with it: there are taps of one that lives.
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

    /// Which namespace it is.
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

    /// Whether it is the one that the calling thread is in: for a sandbox process, that of the
    /// host, which is not to be touched.
    pub fn is_callers_own(&self) -> Result<bool> {
        let own = stat(OWN).map_err(|errno| Error::Open {
            what: OWN.to_owned(),
            why: errno.into(),
        })?;
        Ok(self.identity()? == Identity::of(&own))
    }

    /// `fd`, if it is a network namespace. An ioctl is tried on nothing but a namespace.
    fn checked(fd: OwnedFd, what: impl Fn() -> String) -> Result<Self> {
        let is_namespace = fstatfs(&fd).is_ok_and(|fs| fs.f_type == libc::NSFS_MAGIC)
            && sys::namespace_kind(&fd).is_ok_and(|kind| kind == libc::CLONE_NEWNET);
        if !is_namespace {
            return Err(Error::NotANetworkNamespace { what: what() });
        }
        Ok(Self(Arc::new(fd)))
    }
}

/// The interfaces in a text of `/proc/net/dev`.
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

/// Runs `what` on a thread that ends with it. A panic there is one here.
fn on_a_thread<T: Send>(what: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("netns".to_owned());
        let thread = builder.spawn_scoped(scope, what)?;
        thread
            .join()
            .or_else(|panic| std::panic::resume_unwind(panic))
    })
}
