//! The duties of PID 1 before and after everything else: file systems, limits, the loopback
//! interface, power.
//!
//! Called by `main`. Forks nothing and reads little: all of this is on the way of every start, and
//! on user-mode Linux a system call costs 20 µs.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use hull_protocol::{SHARES_DIR, SHARES_TAG};
use rustix::fs::{FileType, Mode, OFlags, mknodat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::{RebootCommand, reboot};

/// Where control groups are.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

const NOSUID: MountFlags = MountFlags::NOSUID;

/// Flags of the kernel's own file systems.
const PLAIN: MountFlags = NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounted at boot, in this order: source, target, type, flags. `/dev` comes before, see
/// [`mount_dev`].
///
/// Few, because `/run` and `/tmp` are in memory anyway, and what only containers use (devpts, shm,
/// mqueue) they mount themselves. The share is mounted without restrictions: those of a container
/// come from its spec.
const MOUNTS: &[(&str, &str, &str, MountFlags)] = &[
    ("proc", "/proc", "proc", PLAIN),
    ("sysfs", "/sys", "sysfs", PLAIN),
    ("cgroup2", CGROUP_ROOT, "cgroup2", PLAIN),
    (SHARES_TAG, SHARES_DIR, "virtiofs", MountFlags::empty()),
];

/// Brings the guest from "the kernel started me" to "containers can be created".
pub fn set_up() -> io::Result<()> {
    // The mask that PID 1 gets from the kernel is not defined; files created here have the modes
    // that they are given.
    rustix::process::umask(Mode::empty());
    leave_initramfs().map_err(|error| named("switch the root file system", error))?;
    mount_dev().map_err(|error| named("mount /dev", error))?;
    for (source, target, fstype, flags) in MOUNTS {
        mount_at(source, target, fstype, *flags)
            .map_err(|error| named(&format!("mount {fstype} at {target}"), error))?;
    }
    enable_controllers();
    crate::hardening::apply();
    raise_limits();
    if let Err(error) = loopback_up() {
        crate::log::error!("cannot bring the loopback interface up: {error}");
    }
    Ok(())
}

fn named(what: &str, error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot {what}: {}", crate::rpc::status::plain_text(&error)),
    )
}

fn mount_at(source: &str, target: &str, fstype: &str, flags: MountFlags) -> io::Result<()> {
    let attempt = || mount(source, target, fstype, flags, None);
    match attempt() {
        // Creating the directory only when it is missing saves a call where the initramfs has it.
        Err(Errno::NOENT) => {
            fs::create_dir_all(target)?;
            Ok(attempt()?)
        }
        other => Ok(other?),
    }
}

/// pivot_root, which every container needs, works from an initramfs only if the kernel has mounted
/// it on something else, as kernels do from 7.0 on; on older ones the agent moves to a root of its
/// own first.
fn leave_initramfs() -> io::Result<()> {
    let kernel = rustix::system::uname();
    if kernel_major(kernel.release()) >= 7 {
        return Ok(());
    }
    const ROOT: &str = "/.root";
    fs::create_dir_all(ROOT)?;
    mount(
        "tmpfs",
        ROOT,
        "tmpfs",
        MountFlags::empty(),
        Some(c"mode=0755"),
    )?;
    rustix::process::chdir(ROOT)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn kernel_major(release: &CStr) -> u32 {
    release
        .to_bytes()
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0u32, |number, byte| {
            number
                .saturating_mul(10)
                .saturating_add(u32::from(byte - b'0'))
        })
}

/// devtmpfs where the kernel has it, else the few nodes that containers and the agent need.
fn mount_dev() -> io::Result<()> {
    let attempt = |fstype: &str| mount(fstype, "/dev", fstype, NOSUID, Some(c"mode=0755"));
    let mut mounted = attempt("devtmpfs");
    if mounted == Err(Errno::NOENT) {
        fs::create_dir_all("/dev")?;
        mounted = attempt("devtmpfs");
    }
    match mounted {
        Ok(()) => {}
        Err(Errno::NODEV) => {
            attempt("tmpfs")?;
            for (name, major, minor) in [
                ("null", 1, 3),
                ("zero", 1, 5),
                ("full", 1, 7),
                ("random", 1, 8),
                ("urandom", 1, 9),
                ("kmsg", 1, 11),
                ("tty", 5, 0),
                ("console", 5, 1),
                ("ptmx", 5, 2),
                ("fuse", 10, 229),
                ("net/tun", 10, 200),
            ] {
                let path = Path::new("/dev").join(name);
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent)?;
                }
                let device = rustix::fs::makedev(major, minor);
                mknodat(
                    rustix::fs::CWD,
                    &path,
                    FileType::CharacterDevice,
                    Mode::from_raw_mode(0o666),
                    device,
                )?;
            }
        }
        Err(error) => return Err(error.into()),
    }
    for (target, name) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        match symlinkat(target, rustix::fs::CWD, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Enables the controllers of containers' groups while nothing waits for it. Only a head start:
/// creating a group enables them again, and others that it needs.
fn enable_controllers() {
    let path = format!("{CGROUP_ROOT}/cgroup.subtree_control");
    let enabled = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::write(file, b"+cpu +io +memory +pids"));
    if let Err(error) = enabled {
        crate::log::info!("cannot enable control group controllers: {error}");
    }
}

/// The agent has descriptors for many streams, and containers inherit the limit unless their spec
/// has one. Best effort: the guest works without. (The OOM killer never takes PID 1, so that needs
/// no protection.)
fn raise_limits() {
    let limit = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        crate::log::error!("cannot raise the limit of open files: {error}");
    }
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is integers, byte arrays and unions of them, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives across the call, and SIOCSIFFLAGS only reads an ifreq.
    if unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    } < 0
    {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Kills every process, so that none can write any more, and syncs file systems.
pub fn quiesce() {
    // SAFETY: kill with -1 reaches every process but PID 1 itself and touches no memory.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    rustix::fs::sync();
}

/// Ends the machine.
pub fn power_off() -> ! {
    quiesce();
    let Ok(command_line) = fs::read_to_string("/proc/cmdline") else {
        // Too early for /proc: when PID 1 ends, the kernel panics, and that ends the machine too.
        std::process::exit(1);
    };
    let error = match reboot(how_to_end(&command_line)) {
        Ok(()) => "it returned".to_owned(),
        Err(error) => error.to_string(),
    };
    panic!("cannot power the machine off: {error}");
}

/// A machine that cannot be switched off is restarted, which its monitor takes as its end. Its
/// kernel command line says how to restart (`reboot=`).
fn how_to_end(command_line: &str) -> RebootCommand {
    let mut words = command_line.split_ascii_whitespace();
    match words.any(|word| word.starts_with("reboot=")) {
        true => RebootCommand::Restart,
        false => RebootCommand::PowerOff,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_kernel_s_major_number_is_read_from_its_release() {
        assert_eq!(kernel_major(c"7.3.4-hull"), 7);
        assert_eq!(kernel_major(c"6.1.0-18-cloud-amd64"), 6);
        assert_eq!(kernel_major(c"10.0"), 10);
        assert_eq!(kernel_major(c"odd"), 0);
    }

    #[test]
    fn a_machine_without_a_switch_is_restarted() {
        assert!(matches!(
            how_to_end("quiet reboot=t panic=-1\n"),
            RebootCommand::Restart
        ));
        assert!(matches!(
            how_to_end("quiet panic=-1 noreboot=t\n"),
            RebootCommand::PowerOff
        ));
    }

    #[test]
    fn every_mount_comes_after_the_one_it_is_in() {
        for (i, (_, target, ..)) in MOUNTS.iter().enumerate() {
            for (_, later, ..) in &MOUNTS[i + 1..] {
                assert!(!target.starts_with(&format!("{later}/")), "{target}");
            }
        }
    }
}
