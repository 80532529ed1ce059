//! Builds a machine, anew or from a snapshot, and runs it to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_device_control::monitor::{CAPABILITIES, MAX_VCPUS, SlotAddress};
use hull_device_control::{DeviceConfig, DeviceType, numbered};
use hull_devices::device::Memory;
use hull_devices::ended::Ended;
use hull_devices::served::{Served, receive_setup};
use hull_devices::transport::Connection;
use hull_devices::transport::mmio::{self, QUEUE_NOTIFY, Registers, Slot};
use hull_jail::{ThreadRole, drop_thread_capabilities, restrict_thread};
use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI,
    KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, Msrs, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_msr_entry,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Bus, SerialInterrupt};
use crate::memory::GuestRam;
use crate::monitor::{Devices, Monitor, Restored, tsc_khz};
use crate::state::{SavedBus, SavedMachine};
use crate::vcpu::{End, Surroundings, Vcpus};
use crate::x86_64::ioapic::Routes;
use crate::x86_64::kernel::Kernel;
use crate::x86_64::layout::{MAX_SLOTS, SERIAL_INTERRUPT, TASK_STATE};
use crate::x86_64::{boot, cpuid, mptable};
use crate::{Config, Error, Origin, sys};

/// The kernel's parameters beside those of devices: it prints only warnings and errors, a guest
/// without ACPI ends by the reset command, and free memory is given back in blocks of 64 KiB and
/// more. Memory of single CPUs is mapped by pages: with the usual units of 2 MiB, what accounts for
/// it takes 4 MiB.
const PARAMETERS: &str = "page_reporting.page_reporting_order=4 console=ttyS0 quiet loglevel=5 panic=-1 reboot=k \
    percpu_alloc=page dummy.numdummies=0 fb_tunnels=none";

// Model-specific registers, and what firmware would set them to.
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Enabled, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// A machine that is built, without threads.
struct Built {
    vm: Arc<VmFd>,
    ram: GuestRam,
    vcpus: Vec<VcpuFd>,
    /// Of the first virtual CPU.
    cpuid: CpuId,
    bus: Bus,
    served: Served,
    /// Those that have a place each.
    devices: Vec<Device>,
    tsc_khz: u32,
    /// Numbers of the model-specific registers that KVM saves.
    msrs: Vec<u32>,
    /// What it continues from, when it is resumed first.
    restored: Option<Restored>,
}

/// See [`crate::run`].
pub fn run(
    config: Config,
    confine: impl FnOnce() -> Result<(), hull_jail::Error>,
) -> Result<(), Error> {
    let ended = Arc::new(Ended::new().map_err(Error::host("create an eventfd"))?);
    let (built, monitor) = build(config, &ended)?;
    confine()?;
    let Built {
        vm,
        ram,
        vcpus,
        cpuid,
        bus,
        mut served,
        devices,
        tsc_khz,
        msrs,
        restored,
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
        msrs,
    });
    let vcpus = Vcpus::start(vcpus, surroundings.clone(), restored.is_some())?;
    drop_thread_capabilities("the machine process")?;
    let (paused, saved) = restored
        .map(|restored| (restored.paused, restored.slots))
        .unzip();
    Monitor {
        socket: monitor,
        vm,
        ram,
        vcpus,
        cpuid,
        tsc_khz,
        surroundings,
        paused,
        devices: saved.map_or(Devices::InUse, Devices::Saved),
    }
    .serve(&ended)
}

type Device = (DeviceConfig, Connection, Option<OwnedFd>);

/// What a machine is built from, besides what all have.
enum Source {
    Boot { kernel: File, initramfs: File },
    Snapshot(Box<SavedMachine>),
}

/// Guest memory, the number of virtual CPUs, and the source of both.
fn open(origin: Origin) -> Result<(GuestRam, u32, Source), Error> {
    let (ram, vcpus, source) = match origin {
        Origin::Boot {
            memory,
            vcpus,
            kernel,
            initramfs,
        } => {
            let source = Source::Boot {
                kernel: kernel.into(),
                initramfs: initramfs.into(),
            };
            (GuestRam::new(memory)?, vcpus, source)
        }
        Origin::Snapshot { state, memory } => {
            let saved = SavedMachine::read(&File::from(state))?;
            let ram = GuestRam::restored(saved.memory, &File::from(memory))?;
            let vcpus = u32::try_from(saved.vcpus.len()).unwrap_or(u32::MAX);
            (ram, vcpus, Source::Snapshot(Box::new(saved)))
        }
    };
    match (1..=MAX_VCPUS).contains(&vcpus) {
        true => Ok((ram, vcpus, source)),
        false => Err(Error::Vcpus { vcpus }),
    }
}

fn build(config: Config, ended: &Arc<Ended<Result<(), Error>>>) -> Result<(Built, OwnedFd), Error> {
    let Config {
        origin,
        kvm,
        control,
        monitor,
    } = config;
    let (ram, count, source) = open(origin)?;
    let setup = receive_setup(&control)?;

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
    let mut devices = Vec::new();
    for (number, (device, resources)) in numbered(setup, |(device, _)| device.device_type()) {
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
        devices.push((device, Connection::Mmio(slot), resources.file));
    }

    let supported = supported_cpuid(&kvm)?;
    let cpuid = cpuid::of_vcpu(&supported, 0, count);
    let vcpus = create_vcpus(&vm, count, &supported)?;
    let (state, restored) = match source {
        Source::Boot { kernel, initramfs } => {
            let entry = load(&ram, &kernel, &initramfs, &parameters)?;
            mptable::write(&ram, count, MAX_SLOTS)?;
            reset_vcpus(&vcpus, entry)?;
            (SavedBus::default(), None)
        }
        Source::Snapshot(saved) => {
            let (state, restored) = Restored::of(*saved, &vcpus, &cpuid)?;
            (state, Some(restored))
        }
    };
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
        state,
    )
    .map_err(|reason| Error::Snapshot(reason.into()))?;
    let msrs = kvm
        .get_msr_index_list()
        .map_err(Error::kvm("read the registers that it saves"))?;
    let tsc_khz = vcpus.first().map(tsc_khz).transpose()?.unwrap_or_default();
    let built = Built {
        vm,
        ram,
        vcpus,
        cpuid,
        bus,
        served: Served::new(control, confine_device)?,
        devices,
        tsc_khz,
        msrs: msrs.as_slice().iter().copied().chain(mtrrs()).collect(),
        restored,
    };
    Ok((built, monitor))
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

/// The features that virtual CPUs can have.
fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("read the features of the processor"))?;
    cpuid::completed(&supported).map_err(|_| Error::Host {
        action: "read the features of the processor",
        source: io::ErrorKind::OutOfMemory.into(),
    })
}

fn create_vcpus(vm: &VmFd, count: u32, supported: &CpuId) -> Result<Vec<VcpuFd>, Error> {
    (0..count)
        .map(|index| {
            let vcpu = vm
                .create_vcpu(index.into())
                .map_err(Error::kvm("create a virtual CPU"))?;
            vcpu.set_cpuid2(&cpuid::of_vcpu(supported, index, count))
                .map_err(Error::kvm("set the features of a virtual CPU"))?;
            Ok(vcpu)
        })
        .collect()
}

/// Sets virtual CPUs to the state in which the kernel is entered. All but the first wait for it to
/// start them.
fn reset_vcpus(vcpus: &[VcpuFd], entry: u32) -> Result<(), Error> {
    vcpus.iter().try_for_each(set_msrs)?;
    let Some(first) = vcpus.first() else {
        return Ok(());
    };
    let registers = "set the registers of a virtual CPU";
    let mut sregs = first.get_sregs().map_err(Error::kvm(registers))?;
    let mut regs = first.get_regs().map_err(Error::kvm(registers))?;
    boot::enter(entry, &mut regs, &mut sregs);
    first.set_sregs(&sregs).map_err(Error::kvm(registers))?;
    first.set_regs(&regs).map_err(Error::kvm(registers))
}

/// Registers of memory types: KVM has them, but does not list them among those to be saved.
fn mtrrs() -> impl Iterator<Item = u32> {
    // Variable ranges, then fixed ones of three sizes.
    (0x200..=0x20f)
        .chain([0x250, 0x258, 0x259])
        .chain(0x268..=0x26f)
        .chain([MSR_MTRR_DEFAULT_TYPE])
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

const _: () = assert!(QUEUE_NOTIFY < hull_device_control::monitor::SLOT_SIZE);
