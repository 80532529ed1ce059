//! Machine kind `kvm`: hull's own virtual machine monitor (crate vmm), on hardware virtualization.
//!
//! The machine process is hull's executable in the role [`ROLE`]. It has the devices in itself, so
//! there is no device process.

mod monitor;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use hull_device_control::monitor::{
    Command, INITRAMFS_FD, IOAPIC, IOAPIC_SIZE, KERNEL_FD, KVM_FD, LOCAL_APIC, MAX_VCPUS,
    MEMORY_FD, MONITOR_FD, RESET, SERIAL, SERIAL_PORTS, SLOT_SIZE, STATE_FD, SlotAddress,
    VCPU_THREADS,
};
use hull_device_control::{CONTROL_FD, DeviceType};
use hull_jail::{self as jail, JailSpec};
use rustix::fs::OFlags;

use crate::probe::{self, KvmState, State, Works};
use crate::process::{Jailed, Process};
use crate::wiring::Devices;
use crate::{
    Backend, Disks, Error, Exit, Features, FixedDevice, Host, Kind, Machine, MachineConfig,
    NetDevices, Place, Snapshot, Wiring, check, open_for,
};
use monitor::{Failure, Monitor};

/// First argument of the machine process. It is followed by guest memory in bytes and the number
/// of virtual CPUs, or by [`RESTORE`].
pub const ROLE: &str = "machine-process";

/// The argument that makes it continue from a snapshot.
pub const RESTORE: &str = "restore";

/// The backend.
pub struct Kvm;

/// Granularity of guest memory.
const PAGE: u64 = 4096;

/// Memory of the machine process itself, bytes, with what its devices keep of a busy guest.
const OWN_MEMORY: u64 = 32 << 20;

/// How long a machine process may take to end after it has closed the monitor socket.
const END_GRACE: Duration = Duration::from_secs(5);

/// Threads beside those of virtual CPUs: control, one for each device, and workers of the fs
/// device.
const THREADS: u64 = 64;

impl Backend for Kvm {
    fn kind(&self) -> Kind {
        Kind::Kvm
    }

    fn features(&self) -> Features {
        Features {
            max_vcpus: Some(MAX_VCPUS),
            max_devices: None,
            net: NetDevices::HotPlug {
                parameter: |number| hotplug_parameter(DeviceType::Net, number),
            },
            disks: Disks::HotPlug {
                parameter: |number| hotplug_parameter(DeviceType::Disk, number),
            },
            pause: true,
            snapshot: true,
            host_clock: true,
            compat32: true,
            own_devices: true,
            place,
            fixed: &FIXED,
        }
    }

    fn max_processes(&self, _memory: u64, vcpus: u32) -> u64 {
        THREADS + u64::from(vcpus)
    }

    fn own_memory(&self) -> u64 {
        OWN_MEMORY
    }

    fn probe(&self, host: &Host) -> Result<Works, Error> {
        if let Some(why) = unsuitable(&probe::kvm_cached(&host.data_directory)) {
            return Err(Error::DoesNotWork {
                kind: Kind::Kvm,
                why,
            });
        }
        Ok(Works {
            hardware: true,
            kernel: host.kernel(Kind::Kvm)?,
            why: "KVM works".into(),
        })
    }

    fn diagnose(&self, host: &Host) -> State {
        let kvm = probe::kvm_cached(&host.data_directory);
        match (unsuitable(&kvm), host.kernel(Kind::Kvm)) {
            (None, Ok(_)) => State::Works {
                how: kvm.to_string(),
            },
            (Some(why), _) => State::Missing {
                why,
                hint: probe::remedy(&kvm),
            },
            (None, Err(error)) => State::Missing {
                why: error.to_string(),
                hint: error.hint(),
            },
        }
    }

    fn start(&self, config: &MachineConfig, wiring: Wiring) -> Result<Box<dyn Machine>, Error> {
        check(Kind::Kvm, &self.features(), config)?;
        let kernel = open_for(OFlags::RDONLY, "guest kernel", &config.kernel)?;
        let initramfs = open_for(OFlags::RDONLY, "initramfs", &config.initramfs)?;
        let files = [
            (kernel.as_fd(), KERNEL_FD),
            (initramfs.as_fd(), INITRAMFS_FD),
        ];
        spawn(wiring, arguments(config), files, false)
    }

    fn restore(&self, snapshot: &Snapshot, wiring: Wiring) -> Result<Box<dyn Machine>, Error> {
        let files = [
            (snapshot.state.as_fd(), STATE_FD),
            (snapshot.memory.as_fd(), MEMORY_FD),
        ];
        spawn(wiring, vec![RESTORE.into()], files, true)
    }
}

/// Starts a machine process with arguments and files.
fn spawn(
    wiring: Wiring,
    arguments: Vec<OsString>,
    files: [(BorrowedFd<'_>, RawFd); 2],
    paused: bool,
) -> Result<Box<dyn Machine>, Error> {
    let Wiring {
        console, devices, ..
    } = wiring;
    let Devices::Own {
        control,
        executable,
    } = devices
    else {
        return Err(Error::Wiring { kind: Kind::Kvm });
    };
    let kvm = open_for(OFlags::RDWR, "device", Path::new("/dev/kvm"))?;
    let (monitor, theirs) = Monitor::new().map_err(|error| Error::Operation {
        operation: "start",
        why: format!("a socket for its monitor: {error}"),
    })?;
    let stderr = io::stderr();
    let mut fds = vec![
        (console.as_fd(), 1),
        (stderr.as_fd(), 2),
        (control.as_fd(), CONTROL_FD),
        (theirs.as_fd(), MONITOR_FD),
        (kvm.as_fd(), KVM_FD),
    ];
    fds.extend(files);
    let started = jail::spawn(JailSpec {
        name: "the machine process",
        executable: executable.as_fd(),
        argv: ["hull".into(), ROLE.into()]
            .into_iter()
            .chain(arguments)
            .collect(),
        env: Vec::new(),
        fds,
        fixed_addresses: false,
        // The executable is our own: it confines itself before guest code runs.
        confinement: None,
    })?;
    Ok(Box::new(KvmMachine {
        jailed: Jailed::new(started),
        monitor,
        paused,
    }))
}

/// What a guest reaches beside the devices in their slots. Every other port reads as ones, every
/// other address as zero, and takes every write.
const FIXED: [FixedDevice; 4] = [
    FixedDevice {
        name: "serial port",
        ports: Some(SERIAL..=SERIAL + SERIAL_PORTS - 1),
        memory: None,
        threads: Some(VCPU_THREADS),
    },
    FixedDevice {
        name: "reset",
        ports: Some(RESET..=RESET),
        memory: None,
        threads: Some(VCPU_THREADS),
    },
    FixedDevice {
        name: "IOAPIC",
        ports: None,
        memory: Some(IOAPIC..=IOAPIC + IOAPIC_SIZE - 1),
        threads: Some(VCPU_THREADS),
    },
    FixedDevice {
        name: "local APIC",
        ports: None,
        memory: Some(LOCAL_APIC..=LOCAL_APIC + PAGE - 1),
        threads: None,
    },
];

fn place(device: DeviceType, number: usize) -> Option<Place> {
    let address = SlotAddress::of(device, number)?;
    let first = address.registers();
    Some(Place {
        memory: first..=first + SLOT_SIZE - 1,
        interrupt: address.interrupt(),
    })
}

/// Parameter that makes a running guest probe a device.
fn hotplug_parameter(device: DeviceType, number: u8) -> String {
    SlotAddress::of(device, number.into())
        .map(SlotAddress::parameter)
        .unwrap_or_default()
}

fn arguments(config: &MachineConfig) -> Vec<OsString> {
    vec![
        // Whole pages: a size may be any number of bytes.
        config.memory.next_multiple_of(PAGE).to_string().into(),
        config.vcpus.to_string().into(),
    ]
}

/// Why this kind cannot be used with such a KVM.
fn unsuitable(kvm: &KvmState) -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some(format!(
            "not supported on {}: the monitor has no code for it",
            std::env::consts::ARCH
        ));
    }
    match kvm {
        KvmState::Works { .. } => None,
        KvmState::Pretends { .. } => Some("KVM only pretends: it interprets guest code".into()),
        other => Some(format!("KVM: {other}")),
    }
}

/// A running machine process.
#[derive(Debug)]
struct KvmMachine {
    jailed: Jailed,
    monitor: Monitor,
    paused: bool,
}

impl Machine for KvmMachine {
    fn kind(&self) -> Kind {
        Kind::Kvm
    }

    fn processes(&self) -> &[Process] {
        self.jailed.all()
    }

    fn pause(&mut self) -> Result<(), Error> {
        if !self.paused {
            self.execute("pause", Command::Pause, &[])?;
            self.paused = true;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        if self.paused {
            self.execute("resume", Command::Resume, &[])?;
            self.paused = false;
        }
        Ok(())
    }

    fn save(&mut self, to: &Snapshot) -> Result<(), Error> {
        let files = [to.state.as_fd(), to.memory.as_fd()];
        self.execute("save", Command::Save, &files)
    }

    fn exit(&mut self) -> Option<Exit> {
        // A guest ends by resetting its machine, as does its kernel after a panic: the status is
        // the same.
        Some(Exit::interpret(self.jailed.ended()?, None))
    }
}

impl KvmMachine {
    fn execute(
        &mut self,
        operation: &'static str,
        command: Command,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let failed = |why| Error::Operation { operation, why };
        if let Some(exit) = self.exit() {
            return Err(failed(exit.to_string()));
        }
        self.monitor.execute(command, files).map_err(|failure| {
            if failure == Failure::Ended {
                self.jailed.wait(END_GRACE);
            }
            let exit = self.exit().map(|exit| exit.to_string());
            failed(exit.unwrap_or_else(|| failure.to_string()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_does_not_work_is_refused_with_its_reason() {
        let works = KvmState::Works {
            million_per_second: 1000,
        };
        if cfg!(target_arch = "x86_64") {
            assert_eq!(unsuitable(&works), None);
        }
        for state in [
            KvmState::Absent,
            KvmState::NoPermission,
            KvmState::Pretends {
                million_per_second: 1,
            },
            KvmState::Fails { why: "it".into() },
        ] {
            assert!(unsuitable(&state).is_some(), "{state}");
        }
    }

    #[test]
    fn devices_are_added_where_the_machine_has_them() {
        let features = Kvm.features();
        let net = features.net.hotplug_parameter(0);
        assert_eq!(net.as_deref(), Some("4K@0xd0004000:9"));
        let disk = features.disks.hotplug_parameter(0);
        assert_eq!(disk.as_deref(), Some("4K@0xd0014000:25"));
    }
}
