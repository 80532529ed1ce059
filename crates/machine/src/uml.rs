//! Machine kind `uml`: a Linux kernel built for user mode, an ordinary process that traces the
//! processes of its guest. Needs no virtualization; it is not hardware isolation, so the jail
//! around it matters most here.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};

use crate::{Error, Kind, MIN_MEMORY, Machine, MachineSpec, NET, Started, device_sockets, open};
use hull_jail::{self as jail, Bind, CapabilitySet, Confinement, JailSpec, Role, Root, Tmp};

/// Loops per tick of a processor at 5 GHz. Told, the kernel does not measure them, which takes 60
/// ms. They matter only to its busy waits, which drivers of hardware use: on a slower processor
/// those last longer than asked, which is allowed; never shorter.
const LOOPS_PER_JIFFY: u64 = 50_000_000;

/// What the jail's `/tmp` holds beside the guest's memory: the kernel's pid file and what it tests.
const TMP_SLACK: u64 = 1 << 20;

/// The user-mode kernel.
pub struct Uml;

impl Machine for Uml {
    fn kind(&self) -> Kind {
        Kind::Uml
    }

    fn start(&self, spec: &MachineSpec, console: OwnedFd) -> Result<Started, Error> {
        if spec.memory < MIN_MEMORY {
            return Err(Error::Memory {
                memory: spec.memory,
            });
        }
        if spec.cpus > 1 {
            let why = "a traced guest runs on one processor";
            return Err(Error::Cpus {
                kind: Kind::Uml,
                cpus: spec.cpus,
                why,
            });
        }
        let kernel = open("guest kernel", &spec.kernel)?;
        open("initramfs", &spec.initramfs)?;
        let sockets = device_sockets(spec)?;
        let argv = command_line(spec, &sockets);
        Ok(spawn(&kernel, argv, root(spec), spec.jail_uid, &console)?)
    }
}

fn spawn(
    kernel: &OwnedFd,
    argv: Vec<OsString>,
    root: Root,
    uid: u32,
    console: &OwnedFd,
) -> Result<Started, jail::Error> {
    jail::spawn(JailSpec {
        name: "the guest kernel",
        executable: kernel.as_fd(),
        argv,
        // Where it puts the guest's memory, and where it keeps its pid file.
        env: vec![
            ("TMPDIR".into(), "/tmp".into()),
            ("HOME".into(), "/tmp".into()),
        ],
        fds: vec![(console.as_fd(), 1), (console.as_fd(), 2)],
        fixed_addresses: true,
        confinement: Some(Confinement {
            role: Role::Uml,
            uid,
            gid: uid,
            capabilities: CapabilitySet::empty(),
            root,
            open_files: 1024,
        }),
    })
}

/// The version that a kernel says it is. It says so in a jail like a guest's, so this is also a
/// trial of the jail.
pub fn version(kernel: &Path) -> Result<String, String> {
    /// Nobody, by convention.
    const NOBODY: u32 = 65534;
    let file = open("guest kernel", kernel).map_err(|error| error.to_string())?;
    let root = Root {
        tmp: Some(Tmp {
            size: TMP_SLACK,
            huge_pages: false,
        }),
        ..Root::default()
    };
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| format!("cannot create a pipe: {errno}"))?;
    let argv = vec!["linux".into(), "--version".into()];
    let started = spawn(&file, argv, root, NOBODY, &write).map_err(|error| error.to_string())?;
    drop(write);
    let mut said = String::new();
    // Bounded: what is there may be anything.
    let _ = std::fs::File::from(read)
        .take(1024)
        .read_to_string(&mut said);
    let mut ended = [PollFd::from_borrowed_fd(
        started.pidfd.as_fd(),
        PollFlags::IN,
    )];
    let patience = Timespec {
        tv_sec: 2,
        tv_nsec: 0,
    };
    if !matches!(rustix::event::poll(&mut ended, Some(&patience)), Ok(1)) {
        let _ = rustix::process::pidfd_send_signal(&started.pidfd, Signal::KILL);
    }
    let id = WaitId::PidFd(started.pidfd.as_fd());
    let status = waitid(id, WaitIdOptions::EXITED)
        .ok()
        .flatten()
        .and_then(|status| status.exit_status());
    match (status, said.trim()) {
        (Some(0), version)
            if version.starts_with(|c: char| c.is_ascii_digit()) && !version.contains('\n') =>
        {
            Ok(version.to_owned())
        }
        _ => Err(format!("{} is not a user-mode kernel", kernel.display())),
    }
}

fn root(spec: &MachineSpec) -> Root {
    let bind = |source: &Path, target: &str| Bind {
        source: source.to_owned(),
        target: target.into(),
        executable: false,
    };
    Root {
        tmp: Some(Tmp {
            size: spec.memory + TMP_SLACK,
            // They would make a start some milliseconds quicker and an idle guest 6 MB larger.
            huge_pages: false,
        }),
        binds: vec![
            bind(&spec.sockets, "/sockets"),
            bind(&spec.initramfs, "/initramfs"),
            // Where it finds the features of the processor, to show them to the guest.
            bind(Path::new("/proc/cpuinfo"), "/proc/cpuinfo"),
        ],
        ..Root::default()
    }
}

/// A device as the kernel's parameter `virtio_uml.device` names it.
pub fn device(socket: &str, device_type: u32) -> String {
    format!("/sockets/{socket}:{device_type}")
}

fn command_line(spec: &MachineSpec, sockets: &[(String, u32)]) -> Vec<OsString> {
    let mut line = vec![
        "linux".to_owned(),
        format!("mem={}K", spec.memory >> 10),
        "initrd=/initramfs".into(),
        format!("lpj={LOOPS_PER_JIFFY}"),
        // The console reads nothing and prints to the pipe; other terminal lines lead nowhere.
        "con=null".into(),
        "ssl=null".into(),
        "con0=fd:0,fd:1".into(),
        // hull's guest kernel then leaves out its own tests of ptrace, which take 3 ms (probing is
        // for `hull check`).
        "ptrace=known-good".into(),
        // Warnings and what is worse: each line costs two system calls and a wake-up of the sandbox
        // process.
        "quiet".into(),
        "loglevel=5".into(),
        // No network interface that nobody asked for.
        "dummy.numdummies=0".into(),
        // A guest that cannot go on ends at once.
        "panic=-1".into(),
        "umid=hull".into(),
    ];
    for (name, device_type) in sockets {
        // Net devices come when there is something that they lead to (`Kind::plug`).
        if *device_type != NET {
            line.push(format!("virtio_uml.device={}", device(name, *device_type)));
        }
    }
    line.into_iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            memory: 256 << 20,
            cpus: 1,
            sockets: "/s".into(),
            nets: Vec::new(),
            disks: 0,
            jail_uid: 1000,
        }
    }

    #[test]
    fn the_command_line_names_memory_and_devices() {
        let sockets = [("fs.sock".into(), 26), ("net0.sock".into(), NET)];
        let line = command_line(&spec(), &sockets);
        assert!(line.contains(&"mem=262144K".into()));
        assert!(line.contains(&"virtio_uml.device=/sockets/fs.sock:26".into()));
        let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        assert!(!line.iter().any(|word| word.contains("net0")));
        assert_eq!(
            crate::Kind::Uml.plug(0).as_deref(),
            Some("/sockets/net0.sock:1")
        );
    }

    #[test]
    fn the_guests_memory_fits_into_tmp() {
        let tmp = root(&spec()).tmp;
        assert!(tmp.is_some_and(|tmp| tmp.size > 256 << 20 && tmp.size < 260 << 20));
    }
}
