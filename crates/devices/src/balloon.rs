//! virtio-balloon: memory that the guest does not use goes back to the host (free page reporting,
//! virtio 1.2, 5.5.6.7).
//!
//! The driver reports blocks of free memory, some seconds after they became free, and does not use
//! one until the device has returned it. The device drops what backs them; the guest gets zeros
//! when it uses them again. For guest memory that is private and anonymous: what a file backs comes
//! back as it is in the file.
//!
//! The host never asks the guest for memory, so the balloon itself stays empty.

use hull_device_control::DeviceType;
use serde::{Deserialize, Serialize};

use crate::buffers::Buffers;
use crate::device::{Device, DeviceError, Queues};
use crate::state::{RestoreError, SaveError, SavedState};

/// Pages for the balloon, pages back from it, reports.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];
const REPORTS: usize = 2;

/// VIRTIO_BALLOON_F_REPORTING (linux/virtio_balloon.h).
const F_REPORTING: u64 = 1 << 5;

/// Version of [`State`].
const VERSION: u32 = 1;

/// The saved state.
#[derive(Debug, Serialize, Deserialize)]
struct State {}

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {}

impl Device for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_REPORTING
    }

    /// No pages are wanted, and none are in the balloon.
    fn config(&self) -> Vec<u8> {
        vec![0; 8]
    }

    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        let mut used = false;
        while let Some(chain) = queues.pop_or_rearm(queue)? {
            let head = chain.head_index();
            // What is put into the balloon all the same stays where it is.
            if queue == REPORTS {
                let memory = queues.memory().clone();
                let buffers =
                    Buffers::new(&memory, chain).map_err(|error| DeviceError::Request {
                        queue,
                        reason: error.to_string(),
                    })?;
                if let Err(errno) = buffers.writable.discard() {
                    tracing::debug!(%errno, "cannot give memory back to the host");
                }
            }
            queues.add_used(queue, head, 0)?;
            used = true;
        }
        match used {
            true => queues.notify(queue),
            false => Ok(()),
        }
    }

    /// A request is finished in the event in which it arrived.
    fn quiesce(&mut self, _queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self) -> Result<SavedState, SaveError> {
        SavedState::new(DeviceType::Balloon, VERSION, State {})
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.read::<State>(DeviceType::Balloon, VERSION)?;
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::testing::{Driver, WRITE, hostile_chains};

    const FREE: u64 = 0x20_0000;

    fn byte(driver: &Driver<Balloon>, at: u64) -> u8 {
        driver.memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn reported_memory_is_given_back_and_nothing_beside_it() {
        let mut driver = Driver::new(Balloon::default());
        driver
            .memory
            .write_slice(&[7; 0x5000], GuestAddress(FREE))
            .unwrap();
        driver.offer(REPORTS, &[(FREE + 0x1000, 0x2000, WRITE, 0)]);
        driver.run(REPORTS).unwrap();
        assert_eq!(driver.used(REPORTS), Some(0));
        let found = [0, 0x1000, 0x2fff, 0x3000].map(|offset| byte(&driver, FREE + offset));
        assert_eq!(found, [7, 0, 0, 7]);
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        let mut driver = Driver::new(Balloon::default());
        driver
            .memory
            .write_slice(&[7; 0x3000], GuestAddress(FREE))
            .unwrap();
        driver.offer(REPORTS, &[(FREE + 1, 0x2ffe, WRITE, 0)]);
        driver.run(REPORTS).unwrap();
        let found = [1, 0xfff, 0x1000, 0x1fff, 0x2000].map(|offset| byte(&driver, FREE + offset));
        assert_eq!(found, [7, 7, 0, 0, 7]);
    }

    #[test]
    fn the_balloon_itself_stays_empty() {
        let mut driver = Driver::new(Balloon::default());
        driver
            .memory
            .write_slice(&[7; 0x1000], GuestAddress(0))
            .unwrap();
        driver.offer(0, &[(FREE, 4, 0, 0)]);
        driver.run(0).unwrap();
        assert_eq!(driver.used(0), Some(0));
        assert_eq!(byte(&driver, 0x10), 7);
        assert_eq!(driver.device.config(), [0; 8]);
    }

    #[test]
    fn hostile_chains_end_the_device_at_worst() {
        for chain in hostile_chains() {
            for queue in 0..QUEUE_SIZES.len() {
                let mut driver = Driver::new(Balloon::default());
                driver.offer(queue, &chain);
                let _ = driver.run(queue);
            }
        }
    }
}
