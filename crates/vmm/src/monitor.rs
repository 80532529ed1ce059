//! Answers crate machine: pauses, resumes and saves the guest.
//!
//! A machine one of whose devices cannot take over its state stays paused, with the reason.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_device_control::monitor::{Answer, Command, LIMITS};
use hull_devices::ended::Ended;
use hull_devices::transport::mmio::SavedSlot;
use hull_ipc::Received;
use kvm_bindings::{CpuId, kvm_clock_data, kvm_cpuid_entry2};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};

use crate::memory::GuestRam;
use crate::state::{SavedBus, SavedMachine};
use crate::vcpu::{Surroundings, Vcpus};
use crate::x86_64::vcpu_state::VcpuState;
use crate::{Error, sys};

/// How long all devices together may take to finish their requests.
const SAVE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long all devices together may take to take over their states: the fs device looks every file
/// up that the guest knows, on a host whose caches may be cold.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(300);

/// Leaves of CPUID about caches. They are those of the core that reads them, and cores differ.
const CACHES: [u32; 5] = [2, 4, 0x8000_0005, 0x8000_0006, 0x8000_001d];

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
        let features = |cpuid: &[kvm_cpuid_entry2]| {
            let mut features = cpuid.to_vec();
            features.retain(|entry| !CACHES.contains(&entry.function));
            features
        };
        if features(&saved.cpuid) != features(cpuid.as_slice()) {
            return Err(Error::Snapshot(
                "this host has another processor, or another version of KVM".into(),
            ));
        }
        // All count the same, as if they had stood still until now.
        let paused = Paused::now(saved.clock);
        let counter = saved.vcpus.first().map_or(0, VcpuState::tsc);
        let offset = counter.wrapping_sub(paused.tsc);
        for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
            let frequency = tsc_khz(vcpu)?;
            if !is_close(frequency, saved.tsc_khz) {
                return Err(Error::Snapshot(format!(
                    "the time stamp counter runs at {frequency} kHz here, and did at {} kHz",
                    saved.tsc_khz
                )));
            }
            state.restore(vcpu, offset)?;
        }
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
    /// How far its devices are.
    pub devices: Devices,
}

/// How far the devices of a machine are.
pub enum Devices {
    /// The guest uses them.
    InUse,
    /// They have not taken over their states yet.
    Saved(BTreeMap<u32, SavedSlot>),
    /// One could not, for this reason.
    Unusable(String),
}

/// Time until then.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
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
        if let Devices::Saved(slots) = &mut self.devices {
            let slots = std::mem::take(slots);
            self.devices = match self.restore_slots(slots) {
                Ok(()) => Devices::InUse,
                Err(why) => Devices::Unusable(why),
            };
        }
        if let Devices::Unusable(why) = &self.devices {
            return Err(Error::Snapshot(why.clone()));
        }
        self.vm
            .set_clock(&kvm_clock_data {
                clock: paused.clock,
                ..Default::default()
            })
            .map_err(Error::kvm("set the guest's clock"))?;
        self.paused = None;
        self.vcpus.resume(paused.cycles());
        Ok(())
    }

    /// Gives all devices their states, and lets them go on.
    fn restore_slots(&self, slots: BTreeMap<u32, SavedSlot>) -> Result<(), String> {
        let deadline = Instant::now() + RESTORE_TIMEOUT;
        for (number, saved) in slots {
            let mut registers = self.surroundings.bus.slots();
            let registers = registers.find(|(slot, _)| *slot == number);
            let (_, registers) = registers
                .ok_or_else(|| format!("the machine has no slot {number} for a device"))?;
            registers
                .restore(saved, left(deadline))
                .map_err(|error| error.to_string())?;
        }
        self.resume_slots();
        Ok(())
    }

    fn resume_slots(&self) {
        for (_, registers) in self.surroundings.bus.slots() {
            registers.resume();
        }
    }

    fn save(&self, paused: Paused, state: &File, memory: &File) -> Result<(), Error> {
        if !matches!(self.devices, Devices::InUse) {
            return Err(Error::Snapshot(
                "the machine has not been resumed since it was restored".into(),
            ));
        }
        // Virtual CPUs do nothing to the devices any more. Interrupts of devices are in the local
        // APICs before those are saved.
        self.vcpus.settle()?;
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
        let deadline = Instant::now() + SAVE_TIMEOUT;
        let mut slots = BTreeMap::new();
        for (number, registers) in self.surroundings.bus.slots() {
            let saved = registers.save(left(deadline));
            let saved = saved.map_err(|error| Error::Snapshot(error.to_string()))?;
            slots.extend(saved.map(|saved| (number, saved)));
        }
        Ok(slots)
    }
}
