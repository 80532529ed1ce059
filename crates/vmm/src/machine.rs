//! Builds a machine, and runs it to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_device_control::monitor::{Answer, CAPABILITIES, Command, LIMITS, MAX_VCPUS, SlotAddress};
use hull_device_control::{DeviceConfig, DeviceType, numbered};
use hull_devices::device::Memory;
use hull_devices::ended::Ended;
use hull_devices::served::{Served, receive_setup};
use hull_devices::transport::Connection;
use hull_devices::transport::mmio::{self, QUEUE_NOTIFY, Registers, Slot};
use hull_ipc::Received;
use hull_jail::{ThreadRole, drop_thread_capabilities, restrict_thread};
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, Msrs, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_msr_entry,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Bus, SerialInterrupt};
use crate::memory::GuestRam;
use crate::vcpu::{End, Surroundings, Vcpus};
use crate::x86_64::ioapic::Routes;
use crate::x86_64::kernel::Kernel;
use crate::x86_64::layout::{MAX_SLOTS, SERIAL_INTERRUPT, TASK_STATE};
use crate::x86_64::{boot, cpuid, mptable};
use crate::{Config, Error, sys};

/// The kernel's parameters beside those of devices: it prints only warnings and errors, a guest
/// without ACPI ends by the reset command, and free memory is given back in blocks of 64 KiB and
/// more.
const PARAMETERS: &str = "page_reporting.page_reporting_order=4 console=ttyS0 quiet loglevel=5 panic=-1 reboot=k acpi=off pci=off \
    dummy.numdummies=0 fb_tunnels=none";

// Model-specific registers, and what firmware would set them to.
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Enabled, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// A machine that is built, without threads.
struct Built {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    bus: Bus,
    served: Served,
}

/// See [`crate::run`].
pub fn run(
    config: Config,
    confine: impl FnOnce() -> Result<(), hull_jail::Error>,
) -> Result<(), Error> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(Error::Vcpus {
            vcpus: config.vcpus,
        });
    }
    let ended = Arc::new(Ended::new().map_err(Error::host("create an eventfd"))?);
    let (built, monitor, devices) = build(config, &ended)?;
    confine()?;
    let Built {
        vm,
        vcpus,
        bus,
        mut served,
    } = built;
    for (device, connection, file) in devices {
        served.start(device, connection, file)?;
    }
    let report = ended.clone();
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let served = drop_thread_capabilities("the control thread")
                .map_err(Error::from)
                .and_then(|()| Ok(served.serve()?));
            report.set(served);
        })
        .map_err(Error::host("start a thread"))?;
    let report = ended.clone();
    let surroundings = Arc::new(Surroundings {
        bus,
        ended: Box::new(move |end: End| report.set(end.map_err(Error::from))),
    });
    let vcpus = Vcpus::start(vcpus, surroundings)?;
    drop_thread_capabilities("the machine process")?;
    Monitor {
        socket: monitor,
        vm,
        vcpus,
        paused: None,
    }
    .serve(&ended)
}

type Device = (DeviceConfig, Connection, Option<OwnedFd>);

fn build(
    config: Config,
    ended: &Arc<Ended<Result<(), Error>>>,
) -> Result<(Built, OwnedFd, Vec<Device>), Error> {
    let Config {
        memory,
        vcpus: count,
        kernel,
        initramfs,
        kvm,
        control,
        monitor,
    } = config;
    let devices = receive_setup(&control)?;

    let kvm = sys::kvm(kvm);
    for (capability, name) in CAPABILITIES {
        if kvm.check_extension_raw(capability.into()) <= 0 {
            return Err(Error::Capability(name));
        }
    }
    let vm = kvm
        .create_vm()
        .map_err(Error::kvm("create a virtual machine"))?;

    // Memory comes first: changing it waits for a grace period of everything on KVM's buses.
    let ram = GuestRam::new(memory)?;
    sys::set_memory(&vm, &ram).map_err(Error::kvm("give memory to the guest"))?;
    vm.set_tss_address(TASK_STATE)
        .map_err(Error::kvm("place the task state segment"))?;
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    })
    .map_err(Error::kvm("create the interrupt controllers"))?;
    forbid_performance_counters(&vm)?;

    let mut parameters = PARAMETERS.to_owned();
    let mut slots: Vec<Option<Registers>> = (0..MAX_SLOTS).map(|_| None).collect();
    let mut connected = Vec::new();
    for (number, (device, resources)) in numbered(devices, |(device, _)| device.device_type()) {
        // `receive_setup` has counted them.
        let address = SlotAddress::of(device.device_type(), number).ok_or(Error::Host {
            action: "place the devices",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        let (registers, slot) = slot(&vm, ram.memory(), address)?;
        if let Some(place) = slots.get_mut(address.slot as usize) {
            *place = Some(registers);
        }
        if is_there_at_boot(&device) {
            parameters.push_str(" virtio_mmio.device=");
            parameters.push_str(&address.parameter());
        }
        connected.push((device, Connection::Mmio(slot), resources.file));
    }

    let (kernel, initramfs) = (File::from(kernel), File::from(initramfs));
    let entry = load(&ram, &kernel, &initramfs, &parameters)?;
    mptable::write(&ram, count, MAX_SLOTS)?;

    let vcpus = create_vcpus(&kvm, &vm, count, entry)?;
    let serial = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(Error::host("create an eventfd"))?;
    vm.register_irqfd(&serial, SERIAL_INTERRUPT)
        .map_err(Error::kvm("connect an interrupt"))?;
    let console = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::host("use the console"))?;
    let vm = Arc::new(vm);
    let (routed, report) = (vm.clone(), ended.clone());
    let bus = Bus::new(
        slots,
        File::from(console),
        SerialInterrupt(serial),
        Box::new(move |routes| {
            if let Err(error) = route(&routed, routes) {
                report.set(Err(error));
            }
        }),
    );
    let built = Built {
        vm,
        vcpus,
        bus,
        served: Served::new(control, confine_device)?,
    };
    Ok((built, monitor, connected))
}

/// Takes the performance counters from the guest, where KVM can (Linux 5.18).
fn forbid_performance_counters(vm: &VmFd) -> Result<(), Error> {
    let can = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(can).is_ok_and(|can| can & KVM_PMU_CAP_DISABLE != 0) {
        let mut capability = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            ..Default::default()
        };
        capability.args[0] = KVM_PMU_CAP_DISABLE.into();
        vm.enable_cap(&capability)
            .map_err(Error::kvm("take the performance counters from the guest"))?;
    }
    Ok(())
}

/// Confines the thread of a device. The fs device acts for the guest's users, which takes the
/// capabilities of the process; no other does.
fn confine_device(device: DeviceType) -> Result<(), String> {
    match device {
        DeviceType::Fs => Ok(()),
        _ => restrict_thread(device.name(), ThreadRole::Io).map_err(|error| error.to_string()),
    }
}

/// Whether the kernel looks for a device when it boots. The others are added to the running kernel
/// by the agent.
fn is_there_at_boot(device: &DeviceConfig) -> bool {
    match device {
        DeviceConfig::Fs
        | DeviceConfig::Vsock
        | DeviceConfig::Entropy
        | DeviceConfig::Balloon
        | DeviceConfig::Disk { .. } => true,
        DeviceConfig::Net { .. } | DeviceConfig::SpareDisk => false,
    }
}

/// A slot that KVM knows: its notification and its interrupt.
fn slot(vm: &VmFd, memory: &Memory, address: SlotAddress) -> Result<(Registers, Slot), Error> {
    let (registers, slot, events) =
        mmio::slot(memory.clone()).map_err(Error::host("create an eventfd"))?;
    let event = |fd| sys::event(fd).map_err(Error::host("create an eventfd"));
    let notify = IoEventAddress::Mmio(address.registers() + QUEUE_NOTIFY);
    // Without a value to compare, KVM takes writes of any width and value.
    vm.register_ioevent(&event(events.kick())?, &notify, NoDatamatch)
        .map_err(Error::kvm("connect a notification"))?;
    vm.register_irqfd(&event(events.interrupt())?, address.interrupt())
        .map_err(Error::kvm("connect an interrupt"))?;
    Ok((registers, slot))
}

/// Loads kernel and initramfs; the kernel's entry.
fn load(ram: &GuestRam, kernel: &File, initramfs: &File, parameters: &str) -> Result<u32, Error> {
    let found = Kernel::read(kernel)?;
    found.load(kernel, ram)?;
    let size = initramfs
        .metadata()
        .map_err(Error::host("read the initramfs"))?
        .len();
    let at = boot::initramfs_address(ram, found.end(), size)?;
    ram.load("the initramfs", initramfs, 0, size, at)?;
    boot::write_start_info(ram, parameters, (at, size))?;
    Ok(found.entry)
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u32, entry: u32) -> Result<Vec<VcpuFd>, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("read the features of the processor"))?;
    let supported = cpuid::completed(&supported).map_err(|_| Error::Host {
        action: "read the features of the processor",
        source: io::ErrorKind::OutOfMemory.into(),
    })?;
    (0..count)
        .map(|index| {
            let vcpu = vm
                .create_vcpu(index.into())
                .map_err(Error::kvm("create a virtual CPU"))?;
            vcpu.set_cpuid2(&cpuid::of_vcpu(&supported, index, count))
                .map_err(Error::kvm("set the features of a virtual CPU"))?;
            set_msrs(&vcpu)?;
            // The others wait for the first one to start them.
            if index == 0 {
                let registers = "set the registers of a virtual CPU";
                let mut sregs = vcpu.get_sregs().map_err(Error::kvm(registers))?;
                let mut regs = vcpu.get_regs().map_err(Error::kvm(registers))?;
                boot::enter(entry, &mut regs, &mut sregs);
                vcpu.set_sregs(&sregs).map_err(Error::kvm(registers))?;
                vcpu.set_regs(&regs).map_err(Error::kvm(registers))?;
            }
            Ok(vcpu)
        })
        .collect()
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let action = "set the registers of a virtual CPU";
    for (index, data) in [
        (MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
        (MSR_MISC_ENABLE, FAST_STRINGS),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::Host {
            action,
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        // Zero are set where the processor has no such register (AMD: MISC_ENABLE).
        vcpu.set_msrs(&msrs).map_err(Error::kvm(action))?;
    }
    Ok(())
}

/// Tells KVM the messages of all interrupts.
fn route(vm: &VmFd, routes: &Routes) -> Result<(), Error> {
    let entries: Vec<kvm_irq_routing_entry> = (0..)
        .zip(routes)
        .filter_map(|(pin, message)| {
            let message = (*message)?;
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address;
            entry.u.msi.data = message.data;
            Some(entry)
        })
        .collect();
    let action = "route the guest's interrupts";
    let routing = kvm_bindings::KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Host {
        action,
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    vm.set_gsi_routing(&routing).map_err(Error::kvm(action))
}

/// The guest's time when it was paused.
struct Paused {
    clock: kvm_clock_data,
    tsc: u64,
}

/// Answers crate machine.
struct Monitor {
    socket: OwnedFd,
    vm: Arc<VmFd>,
    vcpus: Vcpus,
    paused: Option<Paused>,
}

impl Monitor {
    /// Serves until the machine has ended, or crate machine has closed the socket.
    fn serve(mut self, ended: &Ended<Result<(), Error>>) -> Result<(), Error> {
        loop {
            let mut ready = [
                PollFd::new(ended.event(), PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::errno("wait for the end of the machine")(error)),
            }
            if !ready[0].revents().is_empty() {
                return ended.take().unwrap_or(Ok(()));
            }
            if ready[1].revents().is_empty() {
                continue;
            }
            match hull_ipc::receive::<Command>(&self.socket, LIMITS) {
                Ok(Some(Received { message, .. })) => {
                    let error = self.execute(message).err().map(|error| error.to_string());
                    hull_ipc::send(&self.socket, &Answer { error }, &[])
                        .map_err(Error::host("answer on the monitor socket"))?;
                }
                Ok(None) => return Ok(()),
                Err(error) => return Err(Error::host("read the monitor socket")(error)),
            }
        }
    }

    fn execute(&mut self, command: Command) -> Result<(), Error> {
        match (command, self.paused.take()) {
            (Command::Pause, Some(paused)) => self.paused = Some(paused),
            (Command::Pause, None) => {
                self.vcpus.pause()?;
                let clock = self.vm.get_clock().map_err(|error| {
                    self.vcpus.resume(0);
                    Error::kvm("read the guest's clock")(error)
                })?;
                let tsc = sys::host_tsc();
                self.paused = Some(Paused { clock, tsc });
            }
            (Command::Resume, None) => {}
            (Command::Resume, Some(Paused { clock, tsc })) => {
                let slept = sys::host_tsc().wrapping_sub(tsc);
                let clock = kvm_clock_data {
                    clock: clock.clock,
                    ..Default::default()
                };
                let set = self.vm.set_clock(&clock);
                self.vcpus.resume(slept);
                set.map_err(Error::kvm("set the guest's clock"))?;
            }
        }
        Ok(())
    }
}

const _: () = assert!(QUEUE_NOTIFY < hull_device_control::monitor::SLOT_SIZE);
