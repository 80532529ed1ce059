//! A writable layer of a limited size: an ext4 file system in a sparse file, behind a loop device
//! that the kernel frees with the last mount.
//!
//! Not project quotas: few file systems are mounted with them, and they take numbers that somebody
//! has to hand out.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, mount};

use crate::error::{Context, Error, Result};

/// Smallest size, bytes: ext4 and its journal have to fit in.
const LEAST: u64 = 8 << 20;

/// Attempts to get a loop device that another process has not taken meanwhile.
const ATTEMPTS: u32 = 32;

// linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_config` with the `struct loop_info64` in it.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
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
    reserved: [u64; 8],
}

/// Where a writable layer with a size is.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The file, created when it is not there.
    pub file: PathBuf,
    /// Where it is mounted, in a mount namespace that ends at once; created when it is not there.
    pub place: PathBuf,
    /// Its size, bytes.
    pub size: u64,
}

impl Disk {
    /// Makes the file with its file system, unless it is there. Nothing of it has to survive a
    /// power failure when it is `volatile`.
    pub(super) fn prepare(&self, volatile: bool) -> Result<()> {
        let doing = || format!("create {}", self.file.display());
        if self.size < LEAST {
            return Err(Error::invalid(format!(
                "a writable layer of {} bytes is too small: at least {} MiB",
                self.size,
                LEAST >> 20
            )));
        }
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
                return Err(Error::new(
                    "a writable layer with a size needs mke2fs, which is not there",
                )
                .hint("apt-get install e2fsprogs"));
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

    /// Mounts it at its place. Called in a mount namespace that nobody else is in.
    pub(super) fn mount(&self) -> io::Result<()> {
        let (device, path) = attach(&self.file)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
        mount(&path, &self.place, "ext4", flags, None)?;
        // The mount holds it from here on.
        drop(device);
        Ok(())
    }
}

/// Attaches a file to a free loop device, which the kernel frees when nobody has it open.
fn attach(file: &Path) -> io::Result<(File, PathBuf)> {
    let open = |path: &Path| {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    };
    let backing = open(file)?;
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

fn configure(device: &File, backing: RawFd) -> io::Result<()> {
    let config = LoopConfig {
        fd: u32::try_from(backing).map_err(io::Error::other)?,
        block_size: 0,
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        // What is written is cached once, not also for the file.
        flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads one `struct loop_config`, which this is, and keeps no reference.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
