//! The saved form of a machine, beside its memory.
//!
//! It is JSON in a file of the host, which is trusted but may be damaged. The rule for versions: an
//! older one is read, a newer one is refused by name. The devices' parts have versions of their
//! own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use hull_devices::transport::mmio::SavedSlot;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use crate::Error;
use crate::x86_64::ioapic;
use crate::x86_64::vcpu_state::VcpuState;

/// Version of [`SavedMachine`].
const VERSION: u32 = 1;

/// Most bytes of a state file. The largest part is the fs device's, which has a limit of its own.
const MAX_SIZE: u64 = 64 << 20;

/// What is in a state file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Versioned<T> {
    version: u32,
    machine: T,
}

/// A machine that does not run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// Guest memory in bytes.
    pub memory: u64,
    /// The features of its first virtual CPU, which a host must have to restore it.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time stamp counters.
    pub tsc_khz: u32,
    /// One for each virtual CPU.
    pub vcpus: Vec<VcpuState>,
    /// Nanoseconds of the guest's clock (kvm-clock).
    pub clock: u64,
    /// Serial port and interrupts.
    pub bus: SavedBus,
    /// The devices, by the numbers of their slots.
    pub slots: BTreeMap<u32, SavedSlot>,
}

/// What the bus has besides slots. By default as after a reset.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedBus {
    /// The serial port.
    pub serial: SavedSerial,
    /// The interrupt controller.
    pub ioapic: ioapic::Registers,
}

/// The registers of the serial port.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSerial {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

impl From<SerialState> for SavedSerial {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }
}

impl From<SavedSerial> for SerialState {
    fn from(saved: SavedSerial) -> Self {
        let [baud_divisor_low, baud_divisor_high] = saved.baud_divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received,
        }
    }
}

impl Default for SavedSerial {
    fn default() -> Self {
        SerialState::default().into()
    }
}

/// What is read first of a state file.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

impl SavedMachine {
    /// Writes it to a file that is empty.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &File) -> Result<(), Error> {
        let mut out = BufWriter::new(file);
        let machine = Versioned {
            version: VERSION,
            machine: self,
        };
        serde_json::to_writer(&mut out, &machine)
            .map_err(io::Error::from)
            .and_then(|()| out.flush())
            .map_err(Error::host("write the state of the machine"))
    }

    /// Reads a machine from a file, whose position others may use.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or is of a newer hull.
    pub fn read(file: &File) -> Result<Self, Error> {
        let failed = || Error::host("read the state of the machine");
        let size = file.metadata().map_err(failed())?.len();
        if size > MAX_SIZE {
            return Err(Error::Snapshot("its state is too large".into()));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0).map_err(failed())?;
        Self::parse(&bytes)
    }

    /// See [`SavedMachine::read`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let damaged = |error| Error::Snapshot(format!("its state is damaged: {error}"));
        let Head { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version > VERSION {
            return Err(Error::Snapshot(format!(
                "its state has version {version}; versions up to {VERSION} can be read"
            )));
        }
        let Versioned { machine, .. } = serde_json::from_slice(bytes).map_err(damaged)?;
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn machine() -> SavedMachine {
        SavedMachine {
            memory: 1 << 20,
            cpuid: vec![kvm_cpuid_entry2::default()],
            tsc_khz: 2_000_000,
            vcpus: Vec::new(),
            clock: 5,
            bus: SavedBus::default(),
            slots: BTreeMap::new(),
        }
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_written_machine_is_read_and_a_newer_one_is_refused_by_name() {
        let file = tempfile::tempfile().unwrap();
        machine().write(&file).unwrap();
        let read = SavedMachine::read(&file).unwrap();
        assert_eq!((read.memory, read.clock), (1 << 20, 5));
        assert_eq!(read.bus.ioapic, ioapic::Registers::default());
        let text = String::from_utf8(content(&file)).unwrap();
        let newer = text.replacen("\"version\":1", "\"version\":2,\"more\":[]", 1);
        let error = SavedMachine::parse(newer.as_bytes()).unwrap_err();
        let why = "its state has version 2; versions up to 1 can be read";
        assert_eq!(error.to_string(), format!("cannot use the snapshot: {why}"));
    }

    proptest! {
        #[test]
        fn a_damaged_state_is_an_error_and_never_a_panic(
            position in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()
        ) {
            let file = tempfile::tempfile().unwrap();
            machine().write(&file).unwrap();
            let mut bytes = content(&file);
            let position = position.index(bytes.len());
            bytes[position] = byte;
            if cut {
                bytes.truncate(position);
            }
            let parsed = SavedMachine::parse(&bytes);
            prop_assert!(!cut || parsed.is_err());
        }
    }
}
