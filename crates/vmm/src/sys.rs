//! The unsafe parts: mapping files over guest memory, and the page that KVM shares with the thread
//! of a virtual CPU.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::{MmapRegion, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// Reserves private anonymous memory of `size` bytes, whole pages, at a multiple of [`HUGE_PAGE`].
/// It is leaked on purpose: KVM, virtual CPUs and devices use it until the process exits. Addresses
/// of guest and host that are the same within a huge page let KVM map such a page at once.
///
/// # Errors
/// ENOMEM: no address space is left.
pub fn reserve(size: usize) -> Result<MmapRegion<()>, Errno> {
    let whole = size.checked_add(HUGE_PAGE).ok_or(Errno::NOMEM)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, wherever there is room.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            whole,
            protection,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let head = start.align_offset(HUGE_PAGE);
    let tail = HUGE_PAGE - head;
    // SAFETY: both parts are within the mapping just made, beside what is used, and nothing refers
    // to them. What is kept stays mapped: the region does not own it.
    unsafe {
        let used = start.cast::<u8>().add(head);
        if head > 0 {
            munmap(start, head)?;
        }
        if tail > 0 {
            munmap(used.add(size).cast(), tail)?;
        }
        MmapRegion::build_raw(
            used,
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|_| Errno::INVAL)
    }
}

/// Maps `file` from `offset` over a part of guest memory, privately. Both ends of the part are at
/// page boundaries.
pub fn map_over(part: &VolatileSlice<'_>, file: BorrowedFd<'_>, offset: u64) -> Result<(), Errno> {
    let pointer = part.ptr_guard_mut();
    // SAFETY: the range is within memory of `reserve`, which nothing refers to but through volatile
    // accesses; the new mapping replaces it with the same protection, and stays as long.
    unsafe {
        mmap(
            pointer.as_ptr().cast(),
            part.len(),
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file.as_fd(),
            offset,
        )?;
    }
    Ok(())
}

/// Size of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;

/// KVM behind an open `/dev/kvm`.
pub fn kvm(device: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is given up by its owner.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

/// A copy of an eventfd, as KVM's library wants it.
///
/// # Errors
/// There are too many open files.
pub fn event(fd: BorrowedFd<'_>) -> std::io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor is a new one, given up by its owner.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Gives guest memory to a virtual machine.
///
/// # Errors
/// KVM's.
pub fn set_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    for slot in ram.slots() {
        // SAFETY: memory of `reserve` is mapped until the process exits.
        unsafe { vm.set_user_memory_region(slot)? };
    }
    Ok(())
}

/// `immediate_exit` of a virtual CPU (kvm_run in linux/kvm.h), which other threads set before they
/// send the CPU's thread a signal: KVM_RUN returns at once then, also if the signal came before it.
#[derive(Debug)]
pub struct ImmediateExit(*const AtomicU8);

// SAFETY: it is an atomic byte in a shared mapping, which lives as long as the process (see `of`).
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Of this virtual CPU, which must not be dropped before the process exits.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        Self((&raw mut vcpu.get_kvm_run().immediate_exit).cast::<AtomicU8>())
    }

    /// Makes the next KVM_RUN return at once, or not.
    pub fn set(&self, value: bool) {
        // SAFETY: mapped (see `of`). KVM only reads it. The library that runs the CPU has a mutable
        // reference to the whole page meanwhile, but neither reads nor writes this byte of it.
        unsafe { (*self.0).store(u8::from(value), Ordering::SeqCst) };
    }
}

/// Suberror and data of the last KVM_EXIT_INTERNAL_ERROR.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = vcpu.get_kvm_run();
    // SAFETY: called after an exit with this reason, so that member of the union is set; it is
    // plain integers in any case.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let length = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
    let data = internal.data.into_iter().take(length).collect();
    (internal.suberror, data)
}

/// Gives a virtual CPU the state of its floating point and vector registers.
///
/// # Errors
/// KVM's: the state is invalid, or has features that the CPU lacks.
pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than this structure only of CPUs with features that take a permission
    // of the process (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM), which it does not ask for.
    unsafe { vcpu.set_xsave(xsave) }
}

/// The difference between a virtual CPU's time stamp counter and the host's, in cycles.
///
/// # Errors
/// ENXIO or ENOTTY: the host's kernel cannot (before Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
    let mut offset = 0;
    // _IOW(KVMIO, 0xe2, struct kvm_device_attr) (linux/kvm.h)
    tsc_attribute(vcpu, 0x4018_aee2, &mut offset)?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] reads.
///
/// # Errors
/// As [`tsc_offset`].
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    // _IOW(KVMIO, 0xe1, struct kvm_device_attr)
    tsc_attribute(vcpu, 0x4018_aee1, &mut offset)
}

fn tsc_attribute(
    vcpu: &VcpuFd,
    request: libc::c_ulong,
    offset: &mut u64,
) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(offset) as u64,
    };
    // SAFETY: the attribute points to `offset`, which KVM reads or writes before it returns.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), request, &raw const attribute) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// A leaf of the host's CPUID, which the processor has: EAX, EBX, ECX, EDX.
pub fn host_cpuid(leaf: u32) -> [u32; 4] {
    let found = std::arch::x86_64::__cpuid(leaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// The time stamp counter of the host's processor.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}
