//! Machine kind `uml`: a Linux kernel built for user mode, an ordinary process that traces its
//! guest's processes. Needs no virtualization; it is not hardware isolation, so the jail matters
//! most here.

mod clock;
mod pause;

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use hull_device_control::DeviceType;
use hull_jail::{
    self as jail, Bind, CapabilitySet, Confinement, JailSpec, Limits, Role, Root, Started, Tmp,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};

use crate::probe::{self, State, Works};
use crate::process::{Jailed, Process};
use crate::wiring::{Placed, place, socket_path};
use crate::{
    Backend, DeviceConfig, Disks, Error, Exit, Features, Host, Kind, Machine, MachineConfig,
    NetDevices, Wiring, check, open,
};
use clock::PausedTime;

/// Loops per jiffy of a 5 GHz processor. With this parameter the kernel skips the calibration,
/// which takes 60 ms. It affects only busy waits of hardware drivers: on a slower processor those
/// take longer than requested, which is allowed, but never shorter.
const LOOPS_PER_JIFFY: u64 = 50_000_000;

/// Capacity of the jail's `/tmp` in addition to the guest's memory, for the kernel's pid file and
/// test files.
const TMP_SLACK: u64 = 1 << 20;

/// Guest memory that a process takes in the guest's kernel at least, bytes: its stack, its
/// `task_struct`, and the first page tables. Each is a process of the host.
const MEMORY_PER_PROCESS: u64 = 32 << 10;

/// Processes and threads of a kernel beside those of its guest's programs.
const KERNEL_PROCESSES: u64 = 256;

/// Exit code of a kernel that panicked. Its abort has no effect in the jail, because PID 1 of a
/// namespace ignores SIGABRT, so it exits (arch/um/os-Linux/util.c, uml_abort).
const PANICKED: i32 = 127;

/// The descriptor of the paused-time file.
const PAUSED_TIME_FD: i32 = 3;

/// The backend.
pub struct Uml;

impl Backend for Uml {
    fn kind(&self) -> Kind {
        Kind::Uml
    }

    fn features(&self) -> Features {
        Features {
            // Ptrace mode supports one.
            max_vcpus: Some(1),
            max_devices: None,
            net: NetDevices::HotPlug {
                parameter: |number| hotplug_parameter(DeviceType::Net, number),
            },
            disks: Disks::HotPlug {
                parameter: |number| hotplug_parameter(DeviceType::Disk, number),
            },
            pause: true,
            snapshot: false,
            host_clock: true,
            compat32: false,
            own_devices: false,
            place: |_, _| None,
            fixed: &[],
        }
    }

    fn max_processes(&self, memory: u64, _vcpus: u32) -> u64 {
        max_processes(memory)
    }

    /// The guest's kernel is in the guest's memory.
    fn own_memory(&self) -> u64 {
        0
    }

    fn probe(&self, host: &Host) -> Result<Works, Error> {
        let kernel = host.kernel(Kind::Uml)?;
        if let Some(why) = probe::tracing_forbidden() {
            return Err(Error::DoesNotWork {
                kind: Kind::Uml,
                why,
            });
        }
        Ok(Works {
            hardware: false,
            kernel,
            why: "the fastest that needs no virtualization".into(),
        })
    }

    fn diagnose(&self, host: &Host) -> State {
        let missing = |why: String, hint: Option<&str>| State::Missing {
            why,
            hint: hint.map(str::to_owned),
        };
        if let Some(why) = probe::tracing_forbidden() {
            return missing(why, Some("sysctl -w kernel.yama.ptrace_scope=1"));
        }
        if !probe::tracing_works() {
            return missing(
                "processes cannot be traced here (a system call filter of the host forbids ptrace)"
                    .into(),
                None,
            );
        }
        let build = Some("guest/kernel/build um");
        match &host.uml_kernel {
            Some(kernel) if !kernel.is_file() => missing(
                format!("its guest kernel {} does not exist", kernel.display()),
                build,
            ),
            // The test needs root.
            Some(kernel) if rustix::process::geteuid().is_root() => match version(kernel) {
                Ok(version) => State::Works {
                    how: format!("Linux {version}, no virtualization needed"),
                },
                Err(why) => missing(why, None),
            },
            Some(_) => State::Works {
                how: "no virtualization needed".into(),
            },
            None => missing("there is no guest kernel for um".into(), build),
        }
    }

    fn start(&self, config: &MachineConfig, wiring: Wiring) -> Result<Box<dyn Machine>, Error> {
        let features = self.features();
        check(Kind::Uml, &features, config)?;
        let kernel = open("guest kernel", &config.kernel)?;
        open("initramfs", &config.initramfs)?;
        let Wiring {
            console,
            devices,
            uid,
        } = wiring;
        let devices = devices.sockets(Kind::Uml)?;
        let (devices, sockets) = place(Kind::Uml, &features, devices, uid)?;
        let (paused_time, reader) = PausedTime::new().map_err(|errno| Error::File {
            what: "file of the paused time",
            path: "memfd".into(),
            errno,
        })?;
        let argv = command_line(config, &devices);
        let started = spawn(
            &kernel,
            argv,
            &console,
            Some(reader.as_fd()),
            Confinement {
                limits: limits(config.memory),
                isolate_branches: config.isolate_branches,
                ..confinement(root(config, sockets), uid)
            },
        )?;
        Ok(Box::new(UmlMachine {
            jailed: Jailed::new(started),
            paused_time,
            stage: Stage::Running,
        }))
    }
}

/// A running user-mode kernel.
#[derive(Debug)]
struct UmlMachine {
    jailed: Jailed,
    paused_time: PausedTime,
    stage: Stage,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Running,
    Paused(pause::Stopped),
}

impl Machine for UmlMachine {
    fn kind(&self) -> Kind {
        Kind::Uml
    }

    fn processes(&self) -> &[Process] {
        self.jailed.all()
    }

    fn pause(&mut self) -> Result<(), Error> {
        let Stage::Running = self.stage else {
            return Ok(());
        };
        let failed = |why| Error::Operation {
            operation: "pause",
            why,
        };
        if let Some(exit) = self.exit() {
            return Err(failed(exit.to_string()));
        }
        match pause::stop(self.jailed.process()) {
            Ok(stopped) => {
                self.stage = Stage::Paused(stopped);
                Ok(())
            }
            Err((stopped, why)) => {
                self.go_on(stopped)?;
                Err(failed(why))
            }
        }
    }

    fn resume(&mut self) -> Result<(), Error> {
        let Stage::Paused(stopped) = self.stage else {
            return Ok(());
        };
        self.go_on(stopped)
    }

    fn exit(&mut self) -> Option<Exit> {
        let status = self.jailed.ended()?;
        Some(Exit::interpret(status, Some(PANICKED)))
    }
}

impl UmlMachine {
    fn go_on(&mut self, stopped: pause::Stopped) -> Result<(), Error> {
        let failed = |errno: rustix::io::Errno| Error::Operation {
            operation: "resume",
            why: errno.to_string(),
        };
        self.paused_time.add(stopped.elapsed()).map_err(failed)?;
        pause::resume(self.jailed.process()).map_err(failed)?;
        self.stage = Stage::Running;
        Ok(())
    }
}

/// Parameter that makes a running guest probe a device.
fn hotplug_parameter(device_type: DeviceType, number: u8) -> String {
    let name = device_type.instance_name(number.into());
    device(&socket_path(&name), device_type)
}

/// A device as in the kernel parameter `virtio_uml.device`.
fn device(socket: &str, device_type: DeviceType) -> String {
    format!("{socket}:{}", device_type.virtio_id())
}

fn spawn(
    kernel: &OwnedFd,
    argv: Vec<OsString>,
    console: &OwnedFd,
    paused_time: Option<BorrowedFd<'_>>,
    confinement: Confinement,
) -> Result<Started, jail::Error> {
    let mut fds = vec![(console.as_fd(), 1), (console.as_fd(), 2)];
    fds.extend(paused_time.map(|file| (file, PAUSED_TIME_FD)));
    jail::spawn(JailSpec {
        name: "the guest kernel",
        executable: kernel.as_fd(),
        argv,
        // Directory for the guest's memory file and the kernel's pid file.
        env: vec![
            ("TMPDIR".into(), "/tmp".into()),
            ("HOME".into(), "/tmp".into()),
        ],
        fds,
        fixed_addresses: true,
        confinement: Some(confinement),
    })
}

/// What a guest kernel is confined to.
fn confinement(root: Root, uid: u32) -> Confinement {
    Confinement {
        role: Role::Uml,
        uid,
        gid: uid,
        capabilities: CapabilitySet::empty(),
        root,
        limits: Limits::open_files(64),
        isolate_branches: false,
    }
}

/// Each process of the guest is one of the host's.
fn max_processes(memory: u64) -> u64 {
    memory / MEMORY_PER_PROCESS + KERNEL_PROCESSES
}

/// What the host gives a machine at most, whatever its kernel asks for.
fn limits(memory: u64) -> Limits {
    Limits {
        open_files: 1024,
        processes: Some(max_processes(memory)),
        // Its largest file is the guest's memory.
        file_size: Some(memory.saturating_add(TMP_SLACK)),
    }
}

/// The version that a kernel reports. It runs in a jail like a guest's, which tests the jail, too.
fn version(kernel: &Path) -> Result<String, String> {
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
    let started = spawn(&file, argv, &write, None, confinement(root, NOBODY))
        .map_err(|error| error.to_string())?;
    drop(write);
    let mut reported = String::new();
    // Bounded: the file could be any program.
    let _ = std::fs::File::from(read)
        .take(1024)
        .read_to_string(&mut reported);
    let mut ended = [PollFd::from_borrowed_fd(
        started.pidfd.as_fd(),
        PollFlags::IN,
    )];
    let timeout = Timespec {
        tv_sec: 2,
        tv_nsec: 0,
    };
    if !matches!(rustix::event::poll(&mut ended, Some(&timeout)), Ok(1)) {
        let _ = rustix::process::pidfd_send_signal(&started.pidfd, Signal::KILL);
    }
    let id = WaitId::PidFd(started.pidfd.as_fd());
    let status = waitid(id, WaitIdOptions::EXITED)
        .ok()
        .flatten()
        .and_then(|status| status.exit_status());
    match (status, reported.trim()) {
        (Some(0), version)
            if version.starts_with(|c: char| c.is_ascii_digit()) && !version.contains('\n') =>
        {
            Ok(version.to_owned())
        }
        _ => Err(format!("{} is not a user-mode kernel", kernel.display())),
    }
}

fn root(config: &MachineConfig, mut binds: Vec<Bind>) -> Root {
    let mut bind = |source: &Path, target: &str| {
        binds.push(Bind {
            source: source.into(),
            target: target.into(),
            executable: false,
        });
    };
    bind(&config.initramfs, "/initramfs");
    // The kernel reads the processor's features there, to show them to the guest.
    bind(Path::new("/proc/cpuinfo"), "/proc/cpuinfo");
    Root {
        tmp: Some(Tmp {
            size: config.memory.saturating_add(TMP_SLACK),
            // They would save some milliseconds of a start and make an idle guest 6 MB larger.
            huge_pages: false,
        }),
        binds,
        ..Root::default()
    }
}

fn command_line(config: &MachineConfig, devices: &[Placed]) -> Vec<OsString> {
    let mut line = vec![
        "linux".to_owned(),
        format!("mem={}K", config.memory >> 10),
        "initrd=/initramfs".into(),
        format!("lpj={LOOPS_PER_JIFFY}"),
        format!("paused-time={PAUSED_TIME_FD}"),
        // The console reads nothing and prints to the pipe; other terminal lines are disabled.
        "con=null".into(),
        "ssl=null".into(),
        "con0=fd:0,fd:1".into(),
        // hull's guest kernel then skips its own ptrace tests, which take 3 ms (`hull check` runs
        // them).
        "ptrace=known-good".into(),
        // Warnings and errors: each line costs two system calls and a wake-up of the sandbox
        // process.
        "quiet".into(),
        "loglevel=5".into(),
        // No network interfaces that nobody asked for.
        "dummy.numdummies=0".into(),
        "fb_tunnels=none".into(),
        // A panic ends the guest at once.
        "panic=-1".into(),
        "umid=hull".into(),
    ];
    // Net devices are added with their interfaces, spare disks with their files
    // ([`hotplug_parameter`]).
    let later = |config: &DeviceConfig| {
        matches!(config, DeviceConfig::Net { .. } | DeviceConfig::SpareDisk)
    };
    let at_boot = devices.iter().filter(|device| !later(&device.config));
    line.extend(at_boot.map(|placed| {
        format!(
            "virtio_uml.device={}",
            device(&placed.path(), placed.config.device_type())
        )
    }));
    line.into_iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wiring::names;

    fn config() -> MachineConfig {
        MachineConfig {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            memory: 256 << 20,
            vcpus: 1,
            hardware: false,
            isolate_branches: false,
        }
    }

    #[test]
    fn the_command_line_names_memory_and_devices() {
        let devices = names([
            DeviceConfig::Fs,
            DeviceConfig::Net {
                mac: [2; 6],
                early_enable: false,
            },
            DeviceConfig::SpareDisk,
        ]);
        let line = command_line(&config(), &devices);
        assert!(line.contains(&"mem=262144K".into()));
        assert!(line.contains(&"virtio_uml.device=/sockets/fs0:26".into()));
        let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        assert!(
            !line
                .iter()
                .any(|word| word.contains("net0") || word.contains("disk0"))
        );
        let parameter = Uml.features().net.hotplug_parameter(0);
        assert_eq!(parameter.as_deref(), Some("/sockets/net0:1"));
        let parameter = Uml.features().disks.hotplug_parameter(0);
        assert_eq!(parameter.as_deref(), Some("/sockets/disk0:2"));
        let paths: Vec<_> = devices[1..].iter().map(Placed::path).collect();
        assert_eq!(paths, ["/sockets/net0", "/sockets/disk0"]);
    }

    #[test]
    fn the_guests_memory_fits_into_tmp() {
        let tmp = root(&config(), Vec::new()).tmp;
        assert!(tmp.is_some_and(|tmp| tmp.size > 256 << 20 && tmp.size < 260 << 20));
    }
}
