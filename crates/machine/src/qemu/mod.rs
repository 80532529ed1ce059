//! Machine kind `qemu`: QEMU's `microvm`, with KVM where it works, otherwise with emulation (TCG).

mod command_line;
mod qmp;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_jail::{self as jail, Bind, CapabilitySet, Confinement, JailSpec, Limits, Role, Root};

use crate::probe::{self, KvmState, State, Works};
use crate::process::{Jailed, Process};
use crate::wiring::place;
use crate::{
    Backend, Disks, Error, Exit, Features, Host, Kind, Machine, MachineConfig, NetDevices, Wiring,
    check, open,
};
use command_line::{FIRMWARE, MONITOR_FD, command_line};
use qmp::Monitor;

/// The oldest version whose `microvm` supports vhost-user devices as used here.
const OLDEST: (u32, u32) = (6, 2);

/// Threads of QEMU beside those of virtual processors: its pool for files has 64 at most
/// (util/thread-pool.c), and each device few.
const QEMU_THREADS: u64 = 128;

/// Directories of its shared libraries.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];

/// Candidate directories of its modules: it would look for them beside its executable, which is not
/// visible in the jail.
#[cfg(target_arch = "x86_64")]
const MODULES: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/qemu",
    "/usr/lib64/qemu",
    "/usr/lib/qemu",
];
#[cfg(target_arch = "aarch64")]
const MODULES: [&str; 3] = [
    "/usr/lib/aarch64-linux-gnu/qemu",
    "/usr/lib64/qemu",
    "/usr/lib/qemu",
];

/// The backend.
pub struct Qemu;

/// Memory of QEMU itself, with what it keeps of translated code beside that, bytes: some 60 MiB
/// were seen.
const QEMU_MEMORY: u64 = 96 << 20;

impl Backend for Qemu {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn features(&self) -> Features {
        Features {
            max_vcpus: None,
            // The number of virtio-mmio transports of microvm without ACPI (hw/i386/microvm.c).
            max_devices: Some(8),
            net: NetDevices::AtBoot {
                enables_rings_early: true,
            },
            disks: Disks::AtBoot,
            pause: true,
            snapshot: false,
            host_clock: false,
            compat32: true,
            own_devices: false,
            place: |_, _| None,
            fixed: &[],
        }
    }

    fn max_processes(&self, _memory: u64, vcpus: u32) -> u64 {
        QEMU_THREADS + u64::from(vcpus)
    }

    fn own_memory(&self) -> u64 {
        QEMU_MEMORY + command_line::TRANSLATED_CODE
    }

    fn probe(&self, host: &Host) -> Result<Works, Error> {
        find_program()?;
        let kernel = host.kernel(Kind::Qemu)?;
        let kvm = probe::kvm_cached(&host.data_directory);
        let hardware = matches!(kvm, KvmState::Works { .. });
        let why = match hardware {
            true => "KVM works",
            false => "it can emulate, which needs no virtualization",
        };
        Ok(Works {
            hardware,
            kernel,
            why: why.into(),
        })
    }

    fn diagnose(&self, _host: &Host) -> State {
        match find_program().and_then(|program| version(&program)) {
            Ok(version) => State::Works {
                how: format!("QEMU {version}"),
            },
            Err(error) => State::Missing {
                why: error.to_string(),
                hint: error.hint(),
            },
        }
    }

    fn start(&self, config: &MachineConfig, wiring: Wiring) -> Result<Box<dyn Machine>, Error> {
        let features = self.features();
        check(Kind::Qemu, &features, config)?;
        let path = find_program()?;
        let program = open("emulator", &path)?;
        open("guest kernel", &config.kernel)?;
        open("initramfs", &config.initramfs)?;
        let Wiring {
            console,
            devices,
            uid,
        } = wiring;
        let devices = devices.sockets(Kind::Qemu)?;
        let (devices, sockets) = place(Kind::Qemu, &features, devices, uid)?;
        let (monitor, qemus_end) = Monitor::new().map_err(|error| Error::Operation {
            operation: "start",
            why: format!("a socket for its monitor: {error}"),
        })?;
        let started = jail::spawn(JailSpec {
            name: "qemu",
            executable: program.as_fd(),
            argv: command_line(&program_name(), config, &devices),
            env: MODULES
                .into_iter()
                .find(|directory| Path::new(directory).is_dir())
                .map(|directory| ("QEMU_MODULE_DIR".into(), directory.into()))
                .into_iter()
                .collect(),
            fds: vec![
                (console.as_fd(), 1),
                (console.as_fd(), 2),
                (qemus_end.as_fd(), MONITOR_FD),
            ],
            fixed_addresses: false,
            confinement: Some(Confinement {
                role: Role::Qemu,
                uid,
                gid: uid,
                capabilities: CapabilitySet::empty(),
                root: root(config, sockets),
                limits: Limits {
                    open_files: 1024,
                    processes: Some(self.max_processes(config.memory, config.vcpus)),
                    // What it writes goes through its devices.
                    file_size: Some(config.memory),
                },
                isolate_branches: config.isolate_branches,
            }),
        })?;
        Ok(Box::new(QemuMachine {
            jailed: Jailed::new(started),
            monitor,
            paused: false,
        }))
    }
}

/// A running QEMU.
#[derive(Debug)]
struct QemuMachine {
    jailed: Jailed,
    monitor: Monitor,
    paused: bool,
}

impl Machine for QemuMachine {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn processes(&self) -> &[Process] {
        self.jailed.all()
    }

    fn pause(&mut self) -> Result<(), Error> {
        if self.paused {
            return Ok(());
        }
        // QEMU answers after the virtual CPUs and the guest's clocks have stopped.
        self.execute("pause", "stop")?;
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        if !self.paused {
            return Ok(());
        }
        self.execute("resume", "cont")?;
        self.paused = false;
        Ok(())
    }

    fn exit(&mut self) -> Option<Exit> {
        // A guest without ACPI ends by rebooting, as does its kernel after a panic: the status is
        // the same.
        Some(Exit::interpret(self.jailed.ended()?, None))
    }
}

impl QemuMachine {
    fn execute(&mut self, operation: &'static str, command: &str) -> Result<(), Error> {
        let failed = |why| Error::Operation { operation, why };
        match self.exit() {
            Some(exit) => Err(failed(exit.to_string())),
            None => self.monitor.execute(command).map_err(failed),
        }
    }
}

/// The emulator's name for this architecture.
fn program_name() -> String {
    format!("qemu-system-{}", std::env::consts::ARCH)
}

/// Path of the emulator for this architecture.
pub fn find_program() -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/usr/local/bin".into());
    std::env::split_paths(&path)
        .map(|directory| directory.join(program_name()))
        .find(|program| program.is_absolute() && program.is_file())
        .ok_or_else(|| Error::NoQemu {
            program: program_name(),
        })
}

/// Its version, or why it cannot be used.
pub fn version(program: &Path) -> Result<String, Error> {
    let bad = |why: String| Error::BadQemu {
        program: program.to_owned(),
        why,
    };
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| bad(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, number) =
        parse_version(&text).ok_or_else(|| bad("it does not say its version".into()))?;
    if number < OLDEST {
        return Err(bad(format!(
            "version {version} is older than {}.{}",
            OLDEST.0, OLDEST.1
        )));
    }
    Ok(version)
}

fn parse_version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text
        .split_once("version ")?
        .1
        .split([' ', '\n', '('])
        .next()?;
    let mut parts = version.split('.').map(str::parse);
    let number = (parts.next()?.ok()?, parts.next()?.ok()?);
    Some((version.to_owned(), number))
}

fn root(config: &MachineConfig, sockets: Vec<Bind>) -> Root {
    let bind = |source: &Path, target: &Path, executable| Bind {
        source: source.into(),
        target: target.to_owned(),
        executable,
    };
    let mut root = Root {
        binds: sockets,
        ..Root::default()
    };
    root.binds
        .push(bind(&config.kernel, Path::new("/kernel"), false));
    root.binds
        .push(bind(&config.initramfs, Path::new("/initramfs"), false));
    for library in LIBRARIES.map(Path::new) {
        // With a merged /usr these are links, which are also needed: the interpreter's path begins
        // with one.
        match std::fs::read_link(library) {
            Ok(to) => root.links.push((library.to_owned(), to)),
            Err(_) if library.is_dir() => root.binds.push(bind(library, library, true)),
            Err(_) => {}
        }
    }
    for firmware in FIRMWARE.map(Path::new) {
        if firmware.is_dir() {
            root.binds.push(bind(firmware, firmware, false));
        }
    }
    let cache = Path::new("/etc/ld.so.cache");
    if cache.is_file() {
        root.binds.push(bind(cache, cache, false));
    }
    if config.hardware {
        root.devices
            .push(("/dev/kvm".into(), rustix::fs::makedev(10, 232)));
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_understood() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian), Some(("7.2.22".into(), (7, 2))));
        assert_eq!(
            parse_version("QEMU emulator version 10.0\n"),
            Some(("10.0".into(), (10, 0)))
        );
        assert_eq!(parse_version("hello"), None);
    }
}
