//! Files of a limited size, writable layers and volumes: an ext4 file system in a sparse file,
//! behind a loop device that the kernel frees with the last mount. A file has one loop device at a
//! time, so that all its mounts are of one file system.
//!
//! Not project quotas: few file systems are mounted with them, and they take numbers that somebody
//! has to hand out.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Context, Error, Result};

/// Smallest size, bytes: ext4 and its journal have to fit in.
const LEAST: u64 = 8 << 20;

/// Attempts to get a loop device that another process has not taken meanwhile.
const ATTEMPTS: u32 = 32;

// linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    fn new(flags: u32) -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// Checks the size of a file system.
///
/// # Errors
/// `InvalidArgument` for one that is too small.
pub fn check_size(size: u64) -> Result<()> {
    match size < LEAST {
        true => Err(Error::invalid(format!(
            "a file system of {size} bytes is too small: at least {} MiB",
            LEAST >> 20
        ))),
        false => Ok(()),
    }
}

/// Where a file system of a limited size is.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The file, created when it is not there.
    pub file: PathBuf,
    /// Where it is mounted; created when it is not there.
    pub place: PathBuf,
    /// Its size, bytes.
    pub size: u64,
}

impl Disk {
    /// Makes the file with its file system, unless it is there. Nothing of it has to survive a
    /// power failure when it is `volatile`.
    pub(super) fn prepare(&self, volatile: bool) -> Result<()> {
        let doing = || format!("create {}", self.file.display());
        check_size(self.size)?;
        fs::create_dir_all(&self.place).context(doing)?;
        if self.file.exists() {
            return Ok(());
        }
        // It has its name when it is complete.
        let unfinished = self.file.with_extension("new");
        let made = self.make(&unfinished, volatile);
        let named = made.and_then(|()| fs::rename(&unfinished, &self.file).context(doing));
        if named.is_err() {
            // The error that is reported is the one that made this necessary.
            let _ = fs::remove_file(&unfinished);
        }
        named
    }

    fn make(&self, path: &Path, volatile: bool) -> Result<()> {
        let doing = || format!("create {}", path.display());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .context(doing)?;
        file.set_len(self.size).context(doing)?;
        let features = match volatile {
            true => "^has_journal,^resize_inode",
            false => "^resize_inode",
        };
        let search = std::env::var("PATH").unwrap_or_default();
        let made = Command::new("mke2fs")
            // Not in the path of everybody who may run it.
            .env("PATH", format!("{search}:/usr/sbin:/sbin"))
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", features])
            .args(["-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"])
            .arg(path)
            .stdin(Stdio::null())
            .output();
        let output = match made {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(
                    Error::new("a limited size needs mke2fs, which is not there")
                        .hint("apt-get install e2fsprogs"),
                );
            }
            made => made.context(|| "run mke2fs")?,
        };
        match output.status.success() {
            true => Ok(()),
            false => Err(Error::new(format!(
                "cannot make a file system in {}: {}",
                path.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            ))),
        }
    }

    /// Mounts it at its place.
    pub(super) fn mount(&self) -> io::Result<()> {
        let (device, path) = attach(&self.file)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
        mount(&path, &self.place, "ext4", flags, None)?;
        // The mount holds it from here on.
        drop(device);
        Ok(())
    }
}

/// Mounts a file system of a limited size in the caller's mount namespace, unless its place is one
/// already. It is empty at first.
///
/// # Errors
/// `InvalidArgument` for a size that is too small; `Host` when it cannot be made or mounted.
pub fn mount_at(disk: &Disk) -> Result<()> {
    let doing = || format!("mount {}", disk.file.display());
    disk.prepare(false)?;
    if is_mounted(&disk.place).context(doing)? {
        return Ok(());
    }
    disk.mount().context(doing)?;
    // Programs such as databases want an empty directory. It is gone but the first time.
    let _ = fs::remove_dir(disk.place.join("lost+found"));
    Ok(())
}

/// Unmounts what [`mount_at`] has mounted at a place.
///
/// # Errors
/// The kernel's: EBUSY while a process of the host uses it.
pub fn unmount_from(place: &Path) -> Result<()> {
    let doing = || format!("unmount {}", place.display());
    while is_mounted(place).context(doing)? {
        unmount(place, UnmountFlags::NOFOLLOW).context(doing)?;
    }
    Ok(())
}

/// Whether another file system is mounted at a place.
fn is_mounted(place: &Path) -> io::Result<bool> {
    let parent = place.parent().unwrap_or(place);
    Ok(fs::symlink_metadata(place)?.dev() != fs::symlink_metadata(parent)?.dev())
}

fn open(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The loop device of a file: that which it has, or a free one, which the kernel frees when nobody
/// has it open.
fn attach(file: &Path) -> io::Result<(File, PathBuf)> {
    let backing = open(file)?;
    if let Some(found) = attached(&backing)? {
        return Ok(found);
    }
    let control = open(Path::new("/dev/loop-control"))?;
    let mut attempt = 0;
    loop {
        // SAFETY: takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path)?;
        match configure(&device, backing.as_raw_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {
                attempt += 1;
            }
            configured => return configured.map(|()| (device, path)),
        }
    }
}

/// The loop device that a file has, which it keeps as long as the result is open.
fn attached(backing: &File) -> io::Result<Option<(File, PathBuf)>> {
    let of_file = backing.metadata()?;
    for entry in fs::read_dir("/sys/block")?.flatten() {
        // Only one that is in use has this directory.
        if !entry.path().join("loop").exists() {
            continue;
        }
        let path = Path::new("/dev").join(entry.file_name());
        // It may be gone by now, or another's that cannot be written.
        let Ok(device) = open(&path) else { continue };
        let mut info = LoopInfo::new(0);
        // SAFETY: the kernel writes one `struct loop_info64`, which this is, and keeps no
        // reference.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
        if result == 0 && (info.device, info.inode) == (of_file.dev(), of_file.ino()) {
            return Ok(Some((device, path)));
        }
    }
    Ok(None)
}

fn configure(device: &File, backing: RawFd) -> io::Result<()> {
    let config = LoopConfig {
        fd: u32::try_from(backing).map_err(io::Error::other)?,
        block_size: 0,
        // What is written is cached once, not also for the file.
        info: LoopInfo::new(LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO),
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one `struct loop_config`, which this is, and keeps no reference.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
