//! The state of a virtual CPU, as it is saved and restored.
//!
//! KVM's own types, in the order that KVM wants: the mode of the processor and its features come
//! before the registers that depend on them, and pending events last (Documentation/virt/kvm/api).

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::{Error, sys};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Most registers that are read or written at once (KVM_MAX_MSR_ENTRIES is 256).
const CHUNK: usize = 64;

/// The state of a virtual CPU that does not run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_registers: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a virtual CPU that has no access to a device pending. `msrs` are the
    /// numbers of those that KVM saves. The time stamp counter is set back by `forget` cycles.
    ///
    /// # Errors
    /// KVM's.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32], forget: u64) -> Result<Self, Error> {
        let action = Error::kvm("read the state of a virtual CPU");
        let read = || -> Result<Self, kvm_ioctls::Error> {
            Ok(Self {
                // First: it lets the local APIC take pending events.
                mp_state: vcpu.get_mp_state()?,
                regs: vcpu.get_regs()?,
                sregs: vcpu.get_sregs()?,
                xsave: vcpu.get_xsave()?,
                xcrs: vcpu.get_xcrs()?,
                debug_registers: vcpu.get_debug_regs()?,
                lapic: vcpu.get_lapic()?,
                msrs: read_msrs(vcpu, msrs)?,
                events: vcpu.get_vcpu_events()?,
            })
        };
        let mut state = read().map_err(action)?;
        state.set_back(forget);
        Ok(state)
    }

    /// Sets the time stamp counter back, and orders the registers that belong to it.
    fn set_back(&mut self, forget: u64) {
        let counter = self.msrs.iter_mut().find(|msr| msr.index == MSR_TSC);
        let now = counter.map(|msr| {
            msr.data = msr.data.wrapping_sub(forget);
            msr.data
        });
        for msr in &mut self.msrs {
            // KVM has none when the timer has just run out and its interrupt is not there yet. One
            // that is over runs out at once.
            if let (MSR_TSC_DEADLINE, 0, Some(now)) = (msr.index, msr.data, now) {
                msr.data = now;
            }
        }
        // A deadline is counted from the counter as it is then.
        self.msrs.sort_by_key(|msr| match msr.index {
            MSR_TSC => 0,
            MSR_TSC_DEADLINE => 2,
            _ => 1,
        });
    }

    /// The time stamp counter.
    pub fn tsc(&self) -> u64 {
        let counter = self.msrs.iter().find(|msr| msr.index == MSR_TSC);
        counter.map_or(0, |msr| msr.data)
    }

    /// Gives the state to a new virtual CPU with the same features. Its time stamp counter differs
    /// from the host's by `tsc_offset`, on a host that can set that (Linux 5.16).
    ///
    /// # Errors
    /// KVM's, or a register that this KVM does not have.
    pub fn restore(&self, vcpu: &VcpuFd, tsc_offset: u64) -> Result<(), Error> {
        let action = || Error::kvm("set the state of a virtual CPU");
        vcpu.set_mp_state(self.mp_state).map_err(action())?;
        vcpu.set_regs(&self.regs).map_err(action())?;
        vcpu.set_sregs(&self.sregs).map_err(action())?;
        sys::set_xsave(vcpu, &self.xsave).map_err(action())?;
        vcpu.set_xcrs(&self.xcrs).map_err(action())?;
        vcpu.set_debug_regs(&self.debug_registers)
            .map_err(action())?;
        vcpu.set_lapic(&self.lapic).map_err(action())?;
        // A deadline is counted from the counter, which is the first of them. Linux before 6.8
        // takes a write to that of a new CPU for an attempt to synchronize it with others, and
        // ignores the value.
        let counters = usize::from(self.msrs.first().is_some_and(|msr| msr.index == MSR_TSC));
        let (counter, others) = self.msrs.split_at(counters);
        write_msrs(vcpu, counter)?;
        if let Err(error) = sys::set_tsc_offset(vcpu, tsc_offset) {
            tracing::debug!(%error, "cannot set the offset of a time stamp counter");
        }
        write_msrs(vcpu, others)?;
        vcpu.set_vcpu_events(&self.events).map_err(action())
    }
}

/// Reads registers. Those that KVM lists but this virtual CPU lacks are left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let entries: Vec<_> = chunk
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let (read, entries) = exchange(&entries, |msrs| vcpu.get_msrs(msrs))?;
        found.extend(entries.into_iter().take(read));
        // KVM stops at the first one that it cannot read.
        let skipped = usize::from(read < chunk.len());
        rest = rest.get(read + skipped..).unwrap_or_default();
    }
    Ok(found)
}

/// Writes registers. One that cannot be written must have the value already.
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let action = || Error::kvm("set the registers of a virtual CPU");
    let mut rest = entries;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let (written, _) = exchange(chunk, |msrs| vcpu.set_msrs(msrs)).map_err(action())?;
        let Some(refused) = chunk.get(written) else {
            rest = rest.get(chunk.len()..).unwrap_or_default();
            continue;
        };
        let (read, now) = exchange(&[*refused], |msrs| vcpu.get_msrs(msrs)).map_err(action())?;
        if read != 1 || now.first().map(|msr| msr.data) != Some(refused.data) {
            return Err(Error::Snapshot(format!(
                "this host does not take its register {:#x}",
                refused.index
            )));
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Calls KVM with registers: how many it took, and what they are afterwards.
fn exchange(
    entries: &[kvm_msr_entry],
    call: impl FnOnce(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<(usize, Vec<kvm_msr_entry>), kvm_ioctls::Error> {
    let mut msrs = Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    let count = call(&mut msrs)?;
    Ok((count, msrs.as_slice().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn the_counter_comes_before_a_deadline_and_one_that_is_over_is_now() {
        let mut state = VcpuState {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: kvm_xsave::default(),
            xcrs: kvm_xcrs::default(),
            debug_registers: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![entry(MSR_TSC_DEADLINE, 0), entry(7, 1), entry(MSR_TSC, 100)],
            events: kvm_vcpu_events::default(),
        };
        state.set_back(30);
        let found: Vec<_> = state.msrs.iter().map(|msr| (msr.index, msr.data)).collect();
        assert_eq!(found, [(MSR_TSC, 70), (7, 1), (MSR_TSC_DEADLINE, 70)]);
    }
}
