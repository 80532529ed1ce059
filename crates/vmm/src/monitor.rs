//! Answers crate machine: pauses, resumes and saves the guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hull_device_control::monitor::{Answer, Command, LIMITS};
use hull_devices::ended::Ended;
use hull_devices::transport::mmio::SavedSlot;
use hull_ipc::Received;
use kvm_bindings::{CpuId, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};

use crate::memory::GuestRam;
use crate::state::{SavedBus, SavedMachine};
use crate::vcpu::{Surroundings, Vcpus};
use crate::{Error, sys};

/// How long a device may take to finish its requests, or to take over a state.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(10);

/// The guest's time when it was paused.
#[derive(Debug, Clone, Copy)]
pub struct Paused {
    /// Nanoseconds of its clock.
    clock: u64,
    /// The host's time stamp counter.
    tsc: u64,
}

impl Paused {
    /// A guest whose clock stands at `clock`, and whose time stamp counters are as of now.
    pub fn now(clock: u64) -> Self {
        Self {
            clock,
            tsc: sys::host_tsc(),
        }
    }

    /// Cycles since then.
    fn cycles(self) -> u64 {
        sys::host_tsc().wrapping_sub(self.tsc)
    }
}

/// What a machine is to continue from.
pub struct Restored {
    /// The guest's time.
    pub paused: Paused,
    /// The devices, by slot.
    pub slots: BTreeMap<u32, SavedSlot>,
}

impl Restored {
    /// Gives new virtual CPUs their saved states. What is left is done when the guest is resumed;
    /// the bus is to be created with the first part of the result.
    ///
    /// # Errors
    /// This host's processor or KVM differs from that of the saved machine.
    pub fn of(
        saved: SavedMachine,
        vcpus: &[VcpuFd],
        cpuid: &CpuId,
    ) -> Result<(SavedBus, Self), Error> {
        if saved.cpuid != cpuid.as_slice() {
            return Err(Error::Snapshot(
                "this host has another processor, or another version of KVM".into(),
            ));
        }
        for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
            let frequency = tsc_khz(vcpu)?;
            if !is_close(frequency, saved.tsc_khz) {
                return Err(Error::Snapshot(format!(
                    "the time stamp counter runs at {frequency} kHz here, and did at {} kHz",
                    saved.tsc_khz
                )));
            }
            state.restore(vcpu)?;
        }
        let paused = Paused::now(saved.clock);
        align_tsc(vcpus);
        let slots = saved.slots;
        Ok((saved.bus, Self { paused, slots }))
    }
}

/// Whether frequencies differ by no more than a host's own measurements of it do.
fn is_close(one: u32, other: u32) -> bool {
    // 250 ppm, as in KVM (tsc_tolerance_ppm).
    u64::from(one.abs_diff(other)) * 4000 <= u64::from(other)
}

/// Frequency of a virtual CPU's time stamp counter.
///
/// # Errors
/// KVM's.
pub fn tsc_khz(vcpu: &VcpuFd) -> Result<u32, Error> {
    vcpu.get_tsc_khz()
        .map_err(Error::kvm("read the frequency of the time stamp counter"))
}

/// Makes all virtual CPUs count the same: they were set one after the other.
fn align_tsc(vcpus: &[VcpuFd]) {
    let Some((first, others)) = vcpus.split_first() else {
        return;
    };
    let aligned = sys::tsc_offset(first)
        .and_then(|offset| (others.iter()).try_for_each(|vcpu| sys::set_tsc_offset(vcpu, offset)));
    // Before Linux 5.16. KVM takes values within a second for the same.
    if let Err(error) = aligned {
        tracing::debug!(%error, "cannot align time stamp counters");
    }
}

/// A running machine, as crate machine sees it.
pub struct Monitor {
    /// The connection to it.
    pub socket: OwnedFd,
    /// The virtual machine.
    pub vm: Arc<VmFd>,
    /// Guest memory.
    pub ram: GuestRam,
    /// The threads of virtual CPUs.
    pub vcpus: Vcpus,
    /// Features of the first virtual CPU.
    pub cpuid: CpuId,
    /// Frequency of the virtual CPUs' time stamp counters.
    pub tsc_khz: u32,
    /// The bus.
    pub surroundings: Arc<Surroundings>,
    /// Of a guest that is paused.
    pub paused: Option<Paused>,
    /// Devices that have not taken over their states yet.
    pub unrestored: Option<BTreeMap<u32, SavedSlot>>,
}

impl Monitor {
    /// Serves until the machine has ended, or crate machine has closed the socket.
    ///
    /// # Errors
    /// What ended the machine, or the host's.
    pub fn serve(mut self, ended: &Ended<Result<(), Error>>) -> Result<(), Error> {
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
                Ok(Some(Received { message, fds })) => {
                    let error = self.execute(message, fds).err();
                    let error = error.map(|error| error.to_string());
                    hull_ipc::send(&self.socket, &Answer { error }, &[])
                        .map_err(Error::host("answer on the monitor socket"))?;
                }
                Ok(None) => return Ok(()),
                Err(error) => return Err(Error::host("read the monitor socket")(error)),
            }
        }
    }

    fn execute(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<(), Error> {
        match (command, self.paused) {
            (Command::Pause, Some(_)) | (Command::Resume, None) => Ok(()),
            (Command::Pause, None) => self.pause(),
            (Command::Resume, Some(paused)) => self.resume(paused),
            (Command::Save, Some(paused)) => match <[OwnedFd; 2]>::try_from(fds) {
                Ok([state, memory]) => self.save(paused, &state.into(), &memory.into()),
                Err(_) => Err(Error::Snapshot("no files came with the command".into())),
            },
            (Command::Save, None) => Err(Error::Snapshot("the guest is not paused".into())),
        }
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.vcpus.pause()?;
        let clock = self.vm.get_clock().map_err(|error| {
            self.vcpus.resume(0);
            Error::kvm("read the guest's clock")(error)
        })?;
        self.paused = Some(Paused::now(clock.clock));
        Ok(())
    }

    fn resume(&mut self, paused: Paused) -> Result<(), Error> {
        if let Some(slots) = &self.unrestored {
            self.restore_slots(slots)?;
            self.unrestored = None;
            self.resume_slots();
        }
        self.paused = None;
        let set = self.vm.set_clock(&kvm_clock_data {
            clock: paused.clock,
            ..Default::default()
        });
        self.vcpus.resume(paused.cycles());
        set.map_err(Error::kvm("set the guest's clock"))
    }

    fn restore_slots(&self, slots: &BTreeMap<u32, SavedSlot>) -> Result<(), Error> {
        for (number, saved) in slots {
            let registers = self.surroundings.bus.slots();
            let registers = registers.into_iter().find(|(slot, _)| slot == number);
            let (_, registers) = registers.ok_or_else(|| {
                Error::Snapshot(format!("the machine has no slot {number} for a device"))
            })?;
            registers
                .restore(saved, DEVICE_TIMEOUT)
                .map_err(|error| Error::Snapshot(error.to_string()))?;
        }
        Ok(())
    }

    fn resume_slots(&self) {
        for (_, registers) in self.surroundings.bus.slots() {
            registers.resume();
        }
    }

    fn save(&self, paused: Paused, state: &File, memory: &File) -> Result<(), Error> {
        if self.unrestored.is_some() {
            return Err(Error::Snapshot(
                "the machine has not been resumed since it was restored".into(),
            ));
        }
        // Interrupts of devices are in the local APICs before those are saved.
        let saved = self.save_slots().and_then(|slots| {
            let saved = SavedMachine {
                memory: self.ram.size(),
                cpuid: self.cpuid.as_slice().to_vec(),
                tsc_khz: self.tsc_khz,
                vcpus: self.vcpus.save(paused.cycles())?,
                clock: paused.clock,
                bus: self.surroundings.bus.save(),
                slots,
            };
            self.ram.save(memory)?;
            saved.write(state)
        });
        self.resume_slots();
        saved
    }

    fn save_slots(&self) -> Result<BTreeMap<u32, SavedSlot>, Error> {
        let mut slots = BTreeMap::new();
        for (number, registers) in self.surroundings.bus.slots() {
            let saved = registers.save(DEVICE_TIMEOUT);
            let saved = saved.map_err(|error| Error::Snapshot(error.to_string()))?;
            slots.extend(saved.map(|saved| (number, saved)));
        }
        Ok(slots)
    }
}
