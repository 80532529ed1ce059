//! What the guest's CPUID says: what KVM supports on this host, with these changes.
//!
//! | leaf | change | reason |
//! | --- | --- | --- |
//! | 1 | APIC id; hypervisor, x2APIC, TSC deadline timer | each CPU has its own id; the kernel looks for KVM only with the hypervisor bit; KVM has the other two whatever the host's processor has |
//! | 1, 0x8000_0001, 0x8000_000a | no virtualization | a guest has no guests of its own |
//! | 1 | no MONITOR, no debug store, no PDCM | a guest that waits exits to the host instead |
//! | 4, 0x8000_001d | caches are shared by one CPU | no topology is claimed that the host does not keep |
//! | 6 | the APIC timer always runs | there is no other timer; no frequencies or thermal sensors |
//! | 0xa, 0x8000_0001, 0x8000_0022 | no performance counters | they would count the host's work, too |
//! | 0xb, 0x8000_001e | one thread, as many cores as CPUs | as above |
//! | 0x1f, 0x8000_0026 | absent: leaf 0xb says it | as above |
//! | 0x8000_0002 to 4 | the processor's name | KVM does not report it, and programs show it |
//! | 0x8000_0008 | number of CPUs | as above |
//!
//! Bits of mitigations and of flaws that the processor does not have (leaf 7, MSR
//! ARCH_CAPABILITIES) pass as KVM reports them, so the guest's kernel protects itself as the
//! processor needs it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::sys;

const APIC_ID_SHIFT: u32 = 24;

// Leaf 1, ECX.
const MONITOR: u32 = 1 << 3;
const DEBUG_STORE_64: u32 = 1 << 2;
const DEBUG_STORE_CPL: u32 = 1 << 4;
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX.
const DEBUG_STORE: u32 = 1 << 21;
/// More than one logical processor: with their number in EBX.
const HYPER_THREADING: u32 = 1 << 28;
// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
/// Further performance counters: of the core, the northbridge, the last level cache.
const COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
// Leaf 6, EAX.
const ARAT: u32 = 1 << 2;

/// The leaves with the processor's name.
const NAME: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];

/// Leaves with the topology: the one that guests have, and newer forms.
const TOPOLOGY: [u32; 3] = [0xb, 0x1f, 0x8000_0026];

/// Types of levels in leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The CPUID of virtual CPU `index` of `count`.
pub fn of_vcpu(supported: &CpuId, index: u32, count: u32) -> CpuId {
    let mut cpuid = supported.clone();
    let shift = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        adjust(entry, index, count, shift);
    }
    cpuid
}

/// What KVM supports, with the name of the host's processor, and with leaves for the topology: KVM
/// reports the host's, or a part, depending on its version.
///
/// # Errors
/// There are too many leaves.
pub fn completed(supported: &CpuId) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !NAME.contains(&entry.function) && !TOPOLOGY.contains(&entry.function));
    entries.extend((0..3).map(|index| kvm_cpuid_entry2 {
        function: TOPOLOGY[0],
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..Default::default()
    }));
    entries.extend(NAME.map(|function| {
        let [eax, ebx, ecx, edx] = sys::host_cpuid(function);
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }));
    CpuId::from_entries(&entries)
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, count: u32, shift: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | index << APIC_ID_SHIFT;
            if count > 1 {
                entry.ebx |= count.next_power_of_two() << 16;
                entry.edx |= HYPER_THREADING;
            } else {
                entry.edx &= !HYPER_THREADING;
            }
            entry.ecx |= HYPERVISOR | X2APIC | TSC_DEADLINE;
            entry.ecx &= !(MONITOR | DEBUG_STORE_64 | DEBUG_STORE_CPL | VMX | PDCM);
            entry.edx &= !DEBUG_STORE;
        }
        // Bits 14 to 25: CPUs that share the cache, minus 1. Bits 26 to 31 of leaf 4: APIC ids of
        // cores in the package, minus 1.
        4 => {
            entry.eax &= 0x0000_3fff;
            entry.eax |= ((1 << shift) - 1) << 26;
        }
        0x8000_001d => entry.eax &= 0x0000_3fff,
        6 => {
            entry.eax = ARAT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        0xa | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0xb => {
            let (shift, number, kind) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (shift, count, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = number;
            entry.ecx = entry.index | kind << 8;
            entry.edx = index;
        }
        0x8000_0001 => entry.ecx &= !(SVM | COUNTERS),
        // Number of CPUs, minus 1; bits of an APIC id that number them.
        0x8000_0008 => {
            entry.ecx = entry.ecx & !0xf0ff | (count - 1) | shift << 12;
        }
        // Extended APIC id; core id and threads per core, minus 1; node id, of one node.
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = entry.ebx & !0xffff | index & 0xff;
            entry.ecx &= !0x7ff;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn the_guest_sees_the_name_of_the_processor() {
        let supported = CpuId::from_entries(&[entry(1, 0), entry(NAME[0], 0)]).unwrap();
        let cpuid = completed(&supported).unwrap();
        assert_eq!(cpuid.as_slice().len(), 7);
        for leaf in NAME {
            let found = find(&cpuid, leaf, 0);
            let registers = [found.eax, found.ebx, found.ecx, found.edx];
            assert_eq!(registers, sys::host_cpuid(leaf));
        }
    }

    #[test]
    fn every_cpu_has_an_id_of_its_own_and_all_are_cores() {
        let leaves = [
            (1, 0),
            (4, 0),
            (6, 0),
            (0x8000_0001, 0),
            // As KVM reports it: the guest needs more.
            (0xb, 0),
            (0x1f, 0),
            (0x8000_0008, 0),
            (0x8000_001e, 0),
        ];
        let entries: Vec<_> = leaves.map(|(leaf, index)| entry(leaf, index)).into();
        let supported = CpuId::from_entries(&entries).unwrap();
        let supported = completed(&supported).unwrap();
        let cpuid = of_vcpu(&supported, 2, 3);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, 2);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 4);
        assert_ne!(find(&cpuid, 1, 0).ecx & HYPERVISOR, 0);
        assert_eq!(find(&cpuid, 1, 0).ecx & MONITOR, 0);
        assert_eq!(find(&cpuid, 4, 0).eax >> 26, 3);
        assert_eq!(find(&cpuid, 6, 0).eax, ARAT);
        let cores = find(&cpuid, 0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xff, 2);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, 2);
        let one = of_vcpu(&supported, 0, 1);
        assert_eq!(find(&one, 1, 0).edx & HYPER_THREADING, 0);
        assert_eq!(find(&one, 4, 0).eax >> 26, 0);
    }
}
