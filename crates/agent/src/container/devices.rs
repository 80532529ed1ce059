//! The device nodes of a container: the standard ones, those of the spec, and the links that
//! programs expect.
//!
//! Planned by the agent, created by the child after the spec's mounts. A user namespace cannot
//! create nodes, so the guest's own are bound there instead.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::error::{Context, CreateError, Result};
use super::paths::{self, Missing};
use super::{mounts, rootfs, sys};

/// Name in /dev, major and minor of the nodes that every container has.
const STANDARD: [(&CStr, u32, u32); 6] = [
    (c"null", 1, 3),
    (c"zero", 1, 5),
    (c"full", 1, 7),
    (c"random", 1, 8),
    (c"urandom", 1, 9),
    (c"tty", 5, 0),
];

const LINKS: [(&CStr, &CStr); 5] = [
    (c"fd", c"/proc/self/fd"),
    (c"stdin", c"/proc/self/fd/0"),
    (c"stdout", c"/proc/self/fd/1"),
    (c"stderr", c"/proc/self/fd/2"),
    (c"ptmx", c"pts/ptmx"),
];

/// Nodes and links to create in a container.
#[derive(Debug)]
pub(super) struct Devices {
    /// False if /dev comes from outside and is complete.
    standard: bool,
    /// Bind the guest's nodes instead of creating nodes.
    bind: bool,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    /// Relative to the container's root.
    path: CString,
    kind: FileType,
    number: u64,
    mode: Mode,
    uid: u32,
    gid: u32,
    /// The guest's node, likewise without the leading slash.
    guest: CString,
}

impl Devices {
    pub(super) fn new(
        devices: &[LinuxDevice],
        bound_dev: bool,
        user_namespace: bool,
    ) -> Result<Devices> {
        let nodes = devices.iter().map(Node::new).collect::<Result<_>>()?;
        Ok(Devices {
            standard: !bound_dev,
            bind: user_namespace,
            nodes,
        })
    }

    /// Creates them all. Runs in the child, as the agent's root and without umask.
    pub(super) fn make(&self, root: BorrowedFd<'_>) -> Result<()> {
        if self.standard {
            let dev = paths::find_or_make(root, c"dev", || Ok(Missing::Directory))
                .context(|| "cannot open /dev")?;
            for (name, major, minor) in STANDARD {
                if self
                    .nodes
                    .iter()
                    .any(|node| node.path.to_bytes().strip_prefix(b"dev/") == Some(name.to_bytes()))
                {
                    continue;
                }
                let mode = Mode::from_raw_mode(0o666);
                let number = rustix::fs::makedev(major, minor);
                self.node(dev.as_fd(), name, FileType::CharacterDevice, number, mode)
                    .context(|| format!("cannot make /dev/{}", name.to_string_lossy()))?;
            }
            links(dev.as_fd())?;
        }
        self.nodes.iter().try_for_each(|node| {
            self.spec_node(root, node)
                .context(|| format!("cannot make device /{}", node.path.to_string_lossy()))
        })
    }

    fn spec_node(&self, root: BorrowedFd<'_>, node: &Node) -> rustix::io::Result<()> {
        let (directory, name) = paths::parent(root, &node.path)?;
        if self.bind && node.kind != FileType::Fifo {
            return bind(directory.as_fd(), &name, &node.guest);
        }
        self.node(directory.as_fd(), &name, node.kind, node.number, node.mode)?;
        if node.uid != 0 || node.gid != 0 {
            let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
            rustix::fs::chownat(
                &directory,
                &*name,
                Some(uid),
                Some(gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        Ok(())
    }

    fn node(
        &self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        kind: FileType,
        number: u64,
        mode: Mode,
    ) -> rustix::io::Result<()> {
        if self.bind {
            let mut path = b"dev/".to_vec();
            path.extend(name.to_bytes());
            return bind(
                directory,
                name,
                &CString::new(path).map_err(|_| Errno::INVAL)?,
            );
        }
        match rustix::fs::mknodat(directory, name, kind, mode, number) {
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                let same = FileType::from_raw_mode(stat.st_mode) == kind
                    && (kind == FileType::Fifo || stat.st_rdev == number);
                if same { Ok(()) } else { Err(Errno::EXIST) }
            }
            made => made,
        }
    }
}

/// Binds a node of the guest (its path without the leading slash) to `name` in a directory of the
/// container.
fn bind(directory: BorrowedFd<'_>, name: &CStr, guest: &CStr) -> rustix::io::Result<()> {
    let mut source = b"/".to_vec();
    source.extend(guest.to_bytes());
    let source = CString::new(source).map_err(|_| Errno::INVAL)?;
    let node = mounts::detached(CWD, &source, false)?;
    let target = file(directory, name)?;
    mounts::attach(node.as_fd(), target)
}

/// Creates a file to mount something on.
fn file(directory: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<BorrowedFd<'static>> {
    match rustix::fs::mknodat(
        directory,
        name,
        FileType::RegularFile,
        Mode::from_raw_mode(0o644),
        0,
    ) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags =
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty()).map(sys::leak)
}

fn links(dev: BorrowedFd<'_>) -> Result<()> {
    for (name, target) in LINKS {
        let made = match rustix::fs::symlinkat(target, dev, name) {
            // A terminal must come from the container's own devpts, whatever the image has there.
            Err(Errno::EXIST) if name == c"ptmx" => {
                rustix::fs::unlinkat(dev, name, AtFlags::empty())
                    .and_then(|()| rustix::fs::symlinkat(target, dev, name))
            }
            Err(Errno::EXIST) => Ok(()),
            made => made,
        };
        made.context(|| format!("cannot make /dev/{}", name.to_string_lossy()))?;
    }
    Ok(())
}

/// Binds the terminal `slave` at /dev/console, too.
pub(super) fn bind_console(root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<()> {
    let what = || "cannot make /dev/console";
    let dev = paths::find_or_make(root, c"dev", || Ok(Missing::Directory)).context(what)?;
    let target = file(dev.as_fd(), c"console").context(what)?;
    let node = mounts::detached(slave, c"", false).context(what)?;
    mounts::attach(node.as_fd(), target).context(what)
}

impl Node {
    fn new(device: &LinuxDevice) -> Result<Node> {
        const FIELD: &str = "linux.devices";
        let shown = device.path().display();
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(CreateError::invalid(
                    FIELD,
                    format_args!("{shown}: a node cannot be of type a"),
                ));
            }
        };
        let half = |number: i64| {
            u32::try_from(number).map_err(|_| {
                CreateError::invalid(
                    FIELD,
                    format_args!("{shown}: number {number} is out of range"),
                )
            })
        };
        let number = if kind == FileType::Fifo {
            0
        } else {
            rustix::fs::makedev(half(device.major())?, half(device.minor())?)
        };
        let path = rootfs::inside(FIELD, device.path())?;
        let guest = match kind {
            FileType::BlockDevice => disk_node(number),
            _ => None,
        };
        Ok(Node {
            guest: guest.unwrap_or_else(|| path.clone()),
            path,
            kind,
            number,
            mode: Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        })
    }
}

/// Path of a disk's node in the guest, which may differ from that in the container.
fn disk_node(number: u64) -> Option<CString> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let mut node = b"dev/".to_vec();
    node.extend(link.file_name()?.as_bytes());
    CString::new(node).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(json: &str) -> Result<Node> {
        Node::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn nodes_of_the_spec() {
        let fuse = node(r#"{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":438}"#)
            .unwrap();
        assert_eq!(
            (fuse.path.as_c_str(), fuse.number),
            (c"dev/fuse", rustix::fs::makedev(10, 229))
        );
        assert_eq!(fuse.mode, Mode::from_raw_mode(0o666));
    }

    #[test]
    fn wrong_ones_are_named() {
        for (json, words) in [
            (
                r#"{"path":"/dev/x","type":"a","major":1,"minor":1}"#,
                "type a",
            ),
            (r#"{"path":"/dev/x","type":"c","major":-1,"minor":1}"#, "-1"),
            (
                r#"{"path":"/","type":"c","major":1,"minor":1}"#,
                "linux.devices",
            ),
        ] {
            let message = node(json).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
