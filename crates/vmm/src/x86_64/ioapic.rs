//! The IOAPIC, which turns the interrupts of devices into messages to local APICs (82093AA I/O
//! Advanced Programmable Interrupt Controller, Intel 290566).
//!
//! KVM has the local APICs only. Devices raise an interrupt by an eventfd (irqfd), which KVM turns
//! into the message that the guest wrote here: nothing of this runs when an interrupt comes. All
//! interrupts are edges; a guest that asks for levels gets edges.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::x86_64::layout::{FIRST_INTERRUPT, MAX_SLOTS};

/// Number of pins.
pub const PINS: usize = (FIRST_INTERRUPT + MAX_SLOTS) as usize;

// Offsets in the window.
const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;

// Indirect registers.
const ID: u32 = 0;
const VERSION: u32 = 1;
const FIRST_ENTRY: u32 = 0x10;

/// Version of the 82093AA.
const VERSION_VALUE: u32 = 0x11;

// Bits of a redirection entry.
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are the hardware's.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const LOGICAL: u64 = 1 << 11;
const LOWEST_PRIORITY: u64 = 1;

/// A message that raises an interrupt (MSI).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Its address.
    pub address: u32,
    /// Its data.
    pub data: u32,
}

/// The messages of all pins; `None` for a masked one.
pub type Routes = [Option<Message>; PINS];

/// The controller.
pub struct Ioapic(Mutex<Registers>);

/// The controller's registers, also in their saved form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    selected: u32,
    id: u32,
    /// One for each pin.
    entries: Vec<u64>,
}

/// As after a reset.
impl Default for Registers {
    fn default() -> Self {
        Self {
            selected: 0,
            id: 0,
            entries: vec![MASKED; PINS],
        }
    }
}

impl Ioapic {
    /// A controller with these registers. Pins that they lack are masked.
    pub fn new(mut registers: Registers) -> Self {
        registers.entries.resize(PINS, MASKED);
        Self(Mutex::new(registers))
    }

    /// Its registers.
    pub fn save(&self) -> Registers {
        self.lock().clone()
    }

    /// The messages of all pins.
    pub fn routes(&self) -> Routes {
        self.lock().routes()
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A virtual CPU reads at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let registers = self.lock();
        let value = match offset {
            SELECT => registers.selected,
            DATA => registers.read(),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A virtual CPU writes at `offset` of the window. `changed` is called with all messages when
    /// one has changed; no other write comes between.
    pub fn write(&self, offset: u64, data: &[u8], changed: impl FnOnce(&Routes)) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(value);
        let mut registers = self.lock();
        if offset == SELECT {
            registers.selected = value & 0xff;
        } else if offset == DATA && registers.write(value) {
            changed(&registers.routes());
        }
    }
}

impl Registers {
    /// The pin whose entry is selected, and whether its upper half is.
    fn entry(&self) -> Option<(usize, bool)> {
        let index = self.selected.checked_sub(FIRST_ENTRY)?;
        let pin = (index / 2) as usize;
        (pin < PINS).then_some((pin, index % 2 == 1))
    }

    fn read(&self) -> u32 {
        match (self.selected, self.entry()) {
            (ID, _) => self.id,
            (VERSION, _) => VERSION_VALUE | (PINS as u32 - 1) << 16,
            (_, Some((pin, upper))) => {
                let entry = self.entries.get(pin).copied().unwrap_or(MASKED);
                match upper {
                    true => (entry >> 32) as u32,
                    false => entry as u32,
                }
            }
            _ => 0,
        }
    }

    /// Whether a message has changed.
    fn write(&mut self, value: u32) -> bool {
        match (self.selected, self.entry()) {
            (ID, _) => {
                self.id = value & 0x0f00_0000;
                false
            }
            (_, Some((pin, upper))) => {
                let Some(entry) = self.entries.get_mut(pin) else {
                    return false;
                };
                let before = message(*entry);
                *entry = match upper {
                    true => *entry & 0xffff_ffff | u64::from(value) << 32,
                    false => *entry & !0xffff_ffff | u64::from(value) & !READ_ONLY,
                };
                message(*entry) != before
            }
            _ => false,
        }
    }

    fn routes(&self) -> Routes {
        let mut routes = [None; PINS];
        for (route, entry) in routes.iter_mut().zip(&self.entries) {
            *route = message(*entry);
        }
        routes
    }
}

/// The message of a redirection entry.
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let delivery = entry >> 8 & 7;
    let logical = entry & LOGICAL != 0;
    let hint = delivery == LOWEST_PRIORITY;
    Some(Message {
        address: 0xfee0_0000 | destination << 12 | u32::from(hint) << 3 | u32::from(logical) << 2,
        // Vector and delivery mode; an edge.
        data: (entry & 0x7ff) as u32,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn select(ioapic: &Ioapic, register: u32) {
        ioapic.write(SELECT, &register.to_le_bytes(), |_| {
            panic!("no message changes")
        });
    }

    fn write(ioapic: &Ioapic, register: u32, value: u32) -> Option<Routes> {
        select(ioapic, register);
        let mut routes = None;
        ioapic.write(DATA, &value.to_le_bytes(), |changed| {
            routes = Some(*changed)
        });
        routes
    }

    fn read(ioapic: &Ioapic, register: u32) -> u32 {
        select(ioapic, register);
        let mut value = [0; 4];
        ioapic.read(DATA, &mut value);
        u32::from_le_bytes(value)
    }

    #[test]
    fn an_unmasked_pin_has_the_message_that_the_guest_wrote() {
        let ioapic = Ioapic::new(Registers::default());
        assert_eq!(read(&ioapic, VERSION) >> 16, PINS as u32 - 1);
        let pin = FIRST_ENTRY + 2 * 5;
        // Masked: nothing changes.
        assert!(write(&ioapic, pin + 1, 3 << 24).is_none());
        let routes = write(&ioapic, pin, 0x31).unwrap();
        let message = Message {
            address: 0xfee0_3000,
            data: 0x31,
        };
        assert_eq!(routes[5], Some(message));
        assert_eq!(routes.iter().flatten().count(), 1);
        assert_eq!(read(&ioapic, pin), 0x31);
        // To the processor of the lowest priority of a logical set.
        let routes = write(&ioapic, pin, 0x31 | 1 << 8 | 1 << 11).unwrap();
        assert_eq!(routes[5].unwrap().address, 0xfee0_300c);
        assert_eq!(routes[5].unwrap().data, 0x131);
        assert_eq!(write(&ioapic, pin, MASKED as u32).unwrap()[5], None);
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(
            accesses in prop::collection::vec(
                (any::<bool>(), 0u64..0x1000, prop::collection::vec(any::<u8>(), 0..9)), 0..100)
        ) {
            let ioapic = Ioapic::new(Registers::default());
            for (writes, offset, mut data) in accesses {
                match writes {
                    true => ioapic.write(offset, &data, |_| {}),
                    false => ioapic.read(offset, &mut data),
                }
            }
        }
    }
}
