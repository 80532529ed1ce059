//! What virtual CPUs reach by ports and memory addresses without memory.
//!
//! There are few devices at fixed addresses, so this is a match, not a search. What is not there
//! reads as all ones from a port and as zero from memory, and takes every write.

use std::fs::File;
use std::sync::{Mutex, PoisonError};

use hull_devices::transport::mmio::Registers;
use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::state::{SavedBus, SavedSerial};
use crate::x86_64::ioapic::{Ioapic, Routes};
use crate::x86_64::layout::{
    FIRST_SLOT, IOAPIC, IOAPIC_SIZE, MAX_SLOTS, RESET, RESET_COMMAND, SERIAL, SERIAL_PORTS,
    SLOT_SIZE,
};

/// The time of day and settings of a PC, which the kernel of this machine does not use. Zero says
/// that the clock is not being updated, for which a kernel would wait.
const REAL_TIME_CLOCK_DATA: u16 = 0x71;

/// Raises the interrupt of the serial port.
pub struct SerialInterrupt(pub EventFd);

impl vm_superio::Trigger for SerialInterrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

/// What happens beyond the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest has ended its machine.
    Reset,
}

/// The devices of a machine.
pub struct Bus {
    /// By slot; `None` where there can be no device.
    slots: Vec<Option<Registers>>,
    ioapic: Ioapic,
    serial: Mutex<Serial<SerialInterrupt, NoEvents, File>>,
    /// Tells KVM the messages of interrupts.
    route: Box<dyn Fn(&Routes) + Send + Sync>,
}

impl Bus {
    /// A bus with these devices; the serial port writes to `console`. Interrupts come as in
    /// `state` from now on.
    ///
    /// # Errors
    /// The state of the serial port is invalid.
    pub fn new(
        slots: Vec<Option<Registers>>,
        console: File,
        interrupt: SerialInterrupt,
        route: Box<dyn Fn(&Routes) + Send + Sync>,
        state: SavedBus,
    ) -> Result<Self, &'static str> {
        let ioapic = Ioapic::new(state.ioapic);
        let routes = ioapic.routes();
        if routes.iter().any(Option::is_some) {
            route(&routes);
        }
        let serial = Serial::from_state(&state.serial.into(), interrupt, NoEvents, console)
            .map_err(|_| "the state of the serial port is invalid")?;
        Ok(Self {
            slots,
            ioapic,
            serial: Mutex::new(serial),
            route,
        })
    }

    /// The state of everything but the slots. No virtual CPU may run.
    pub fn save(&self) -> SavedBus {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        SavedBus {
            serial: SavedSerial::from(serial.state()),
            ioapic: self.ioapic.save(),
        }
    }

    /// The slots where there can be a device, with their numbers.
    pub fn slots(&self) -> impl Iterator<Item = (u32, &Registers)> {
        let numbered = (0..).zip(&self.slots);
        numbered.filter_map(|(number, registers)| Some((number, registers.as_ref()?)))
    }

    fn slot(&self, address: u64) -> Option<(&Registers, u64)> {
        let offset = address.checked_sub(FIRST_SLOT)?;
        let slot = usize::try_from(offset / SLOT_SIZE).ok()?;
        let registers = self.slots.get(slot)?.as_ref()?;
        Some((registers, offset % SLOT_SIZE))
    }

    /// A virtual CPU reads from an address.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        if let Some((registers, offset)) = self.slot(address) {
            registers.read(offset, data);
        } else if (IOAPIC..IOAPIC + IOAPIC_SIZE).contains(&address) {
            self.ioapic.read(address - IOAPIC, data);
        } else {
            data.fill(0);
        }
    }

    /// A virtual CPU writes to an address.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((registers, offset)) = self.slot(address) {
            registers.write(offset, data);
        } else if (IOAPIC..IOAPIC + IOAPIC_SIZE).contains(&address) {
            self.ioapic.write(address - IOAPIC, data, &self.route);
        }
    }

    /// A virtual CPU reads from a port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        let value = match port {
            SERIAL..SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                serial.read((port - SERIAL) as u8)
            }
            // Ready for a command.
            RESET | REAL_TIME_CLOCK_DATA => 0,
            _ => 0xff,
        };
        data.fill(value);
    }

    /// A virtual CPU writes to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Effect {
        match (port, data) {
            (SERIAL..SERIAL_END, [value, ..]) => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                // Output that nothing reads any more is lost.
                if let Err(error) = serial.write((port - SERIAL) as u8, *value) {
                    tracing::debug!(?error, "cannot write to the console");
                }
                Effect::None
            }
            (RESET, [RESET_COMMAND]) => Effect::Reset,
            _ => Effect::None,
        }
    }
}

const SERIAL_END: u16 = SERIAL + SERIAL_PORTS;

const _: () = assert!(FIRST_SLOT + MAX_SLOTS as u64 * SLOT_SIZE <= IOAPIC);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Seek};

    use super::*;

    fn bus() -> (Bus, File) {
        let console = tempfile::tempfile().unwrap();
        let interrupt = SerialInterrupt(EventFd::new(0).unwrap());
        let bus = Bus::new(
            vec![None, None],
            console.try_clone().unwrap(),
            interrupt,
            Box::new(|_| {}),
            SavedBus::default(),
        );
        (bus.unwrap(), console)
    }

    #[test]
    fn what_is_not_there_is_harmless() {
        let (bus, _) = bus();
        for address in [0, FIRST_SLOT, FIRST_SLOT + 0x1004, 0xffff_fff8, u64::MAX] {
            let mut data = [7; 8];
            bus.read(address, &mut data);
            assert_eq!(data, [0; 8]);
            bus.write(address, &data);
        }
        for port in [0x21, 0x60, 0xcf8, u16::MAX] {
            let mut data = [0; 4];
            bus.read_port(port, &mut data);
            assert_eq!(data, [0xff; 4]);
            assert_eq!(bus.write_port(port, &data), Effect::None);
        }
        assert_eq!(bus.write_port(RESET, &[]), Effect::None);
    }

    #[test]
    fn the_serial_port_writes_to_the_console() {
        let (bus, mut console) = bus();
        for byte in b"hello" {
            bus.write_port(SERIAL, &[*byte]);
        }
        let mut text = String::new();
        console.rewind().unwrap();
        console.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn one_command_resets_the_machine() {
        let (bus, _) = bus();
        assert_eq!(bus.write_port(RESET, &[RESET_COMMAND]), Effect::Reset);
        assert_eq!(bus.write_port(RESET, &[0xd1]), Effect::None);
        let mut status = [0xff];
        bus.read_port(RESET, &mut status);
        assert_eq!(status, [0]);
    }
}
