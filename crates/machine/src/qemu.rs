//! Machine kind `qemu`: QEMU's `microvm`, with KVM where it works, else emulating (TCG).

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, Kind, MIN_MEMORY, Machine, MachineSpec, Started, device_sockets, open};
use hull_jail::{self as jail, Bind, CapabilitySet, Confinement, JailSpec, Role, Root};

/// The oldest version whose `microvm` takes vhost-user devices as used here.
const OLDEST: (u32, u32) = (6, 2);

/// Where distributions put QEMU's firmware, beside its own directory.
const FIRMWARE: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// Where its shared libraries are.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];

/// Where its modules may be: it would look for them beside its executable, which the jail does not
/// show.
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

/// QEMU, found.
pub struct Qemu {
    program: PathBuf,
    kvm: bool,
}

impl Qemu {
    /// Finds it. `kvm`: whether to use KVM, which then has been probed.
    pub fn find(kvm: bool) -> Result<Self, Error> {
        Ok(Self {
            program: find_program()?,
            kvm,
        })
    }
}

/// The emulator's name for this architecture.
fn program_name() -> String {
    format!("qemu-system-{}", std::env::consts::ARCH)
}

/// Where the emulator for this architecture is.
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

impl Machine for Qemu {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn start(&self, spec: &MachineSpec, console: OwnedFd) -> Result<Started, Error> {
        if spec.memory < MIN_MEMORY {
            return Err(Error::Memory {
                memory: spec.memory,
            });
        }
        let program = open("emulator", &self.program)?;
        open("guest kernel", &spec.kernel)?;
        open("initramfs", &spec.initramfs)?;
        let sockets = device_sockets(spec)?;
        if let Some(most) = Kind::Qemu.most_devices()
            && sockets.len() > most
        {
            return Err(Error::Devices {
                kind: Kind::Qemu,
                disks: spec.disks,
                count: sockets.len(),
                most,
            });
        }
        Ok(jail::spawn(JailSpec {
            name: "qemu",
            executable: program.as_fd(),
            argv: self.command_line(spec, &sockets),
            env: MODULES
                .into_iter()
                .find(|directory| Path::new(directory).is_dir())
                .map(|directory| ("QEMU_MODULE_DIR".into(), directory.into()))
                .into_iter()
                .collect(),
            fds: vec![(console.as_fd(), 1), (console.as_fd(), 2)],
            fixed_addresses: false,
            confinement: Some(Confinement {
                role: Role::Qemu,
                uid: spec.jail_uid,
                gid: spec.jail_uid,
                capabilities: CapabilitySet::empty(),
                root: self.root(spec),
                open_files: 1024,
            }),
        })?)
    }
}

impl Qemu {
    fn root(&self, spec: &MachineSpec) -> Root {
        let bind = |source: &Path, target: &Path, executable| Bind {
            source: source.to_owned(),
            target: target.to_owned(),
            executable,
        };
        let mut root = Root {
            binds: vec![
                bind(&spec.sockets, Path::new("/sockets"), false),
                bind(&spec.kernel, Path::new("/kernel"), false),
                bind(&spec.initramfs, Path::new("/initramfs"), false),
            ],
            ..Root::default()
        };
        for library in LIBRARIES.map(Path::new) {
            // With one /usr these are links, which have to be there too: the interpreter's path
            // begins with one.
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
        if self.kvm {
            root.devices
                .push(("/dev/kvm".into(), rustix::fs::makedev(10, 232)));
        }
        root
    }

    fn command_line(&self, spec: &MachineSpec, sockets: &[(String, u32)]) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec![self.program.file_name().unwrap_or_default().into()];
        let mut add = |arguments: &[&str]| line.extend(arguments.iter().map(OsString::from));
        add(&["-no-user-config", "-nodefaults", "-nographic", "-no-reboot"]);
        for firmware in FIRMWARE {
            add(&["-L", firmware]);
        }
        add(&[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]);
        let (accelerator, processor) = if self.kvm {
            ("kvm", "host")
        } else {
            ("tcg,thread=multi", "max")
        };
        add(&["-accel", accelerator, "-cpu", processor]);
        // The firmware starts the kernel itself, without option ROMs, which takes 30 ms less.
        add(&[
            "-M",
            "microvm,acpi=off,x-option-roms=off,memory-backend=memory",
        ]);
        let (cpus, memory) = (spec.cpus.to_string(), format!("{}K", spec.memory >> 10));
        add(&["-smp", &cpus, "-m", &memory]);
        // Shared with the device process.
        let backend = format!(
            "memory-backend-memfd,id=memory,size={},share=on",
            spec.memory
        );
        add(&["-object", &backend]);
        add(&["-kernel", "/kernel", "-initrd", "/initramfs"]);
        add(&["-append", &self.kernel_command_line(spec.cpus)]);
        add(&[
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ]);
        for (name, device_type) in sockets {
            let id = name.trim_end_matches(".sock");
            let connection = format!("{id}-socket");
            add(&[
                "-chardev",
                &format!("socket,id={connection},path=/sockets/{name}"),
            ]);
            if let Some(number) = id.strip_prefix("net") {
                // QEMU keeps the address by itself. It must be the one that the agent looks for.
                let number = number.parse::<usize>().ok();
                let mac = number.and_then(|number| spec.nets.get(number));
                let mac = mac.copied().unwrap_or_default();
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                add(&[
                    "-netdev",
                    &format!("vhost-user,id={id},chardev={connection}"),
                ]);
                add(&[
                    "-device",
                    &format!("virtio-net-device,netdev={id},mac={mac}"),
                ]);
                continue;
            }
            let device = device(*device_type);
            add(&["-device", &format!("{device},chardev={connection}")]);
        }
        line
    }

    fn kernel_command_line(&self, cpus: u32) -> String {
        // Warnings and what is worse. Restarting is how a guest without ACPI ends itself (see
        // `-no-reboot`).
        let mut line = String::from(
            "console=ttyS0 quiet loglevel=5 panic=-1 reboot=t no_timer_check acpi=off pci=off \
             dummy.numdummies=0",
        );
        if !self.kvm {
            // An emulated guest reads the host's time stamp counter, but has no reference to
            // measure it by that a busy host does not falsify: then it would be left with a clock
            // of ten milliseconds.
            if let Some(frequency) =
                tsc_khz(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
            {
                line.push_str(&format!(" tsc=reliable tsc_early_khz={frequency}"));
            }
            if cpus == 1 {
                // Measuring the local timer takes a tenth of a second; the other one needs no
                // measuring.
                line.push_str(" nolapic_timer");
            }
        }
        line
    }
}

/// Frequency of the host's time stamp counter. Its kernel shows it only as the speed of a delay
/// loop, which is made from it: two loops per cycle.
fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("bogomips"))?;
    let bogomips: f64 = line.split_once(':')?.1.trim().parse().ok()?;
    (bogomips > 0.0).then_some((bogomips * 500.0).round() as u64)
}

/// QEMU's name for a vhost-user device on the microvm's bus.
fn device(device_type: u32) -> &'static str {
    match device_type {
        26 => "vhost-user-fs-device,tag=hull",
        19 => "vhost-user-vsock-device",
        4 => "vhost-user-rng",
        _ => "vhost-user-blk,num-queues=1",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_of_the_time_stamp_counter_is_half_the_bogomips() {
        assert_eq!(
            tsc_khz("processor\t: 0\nbogomips\t: 5192.24\n"),
            Some(2_596_120)
        );
        assert_eq!(tsc_khz("processor\t: 0\n"), None);
    }

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
