//! virtio-rng: random bytes for the guest, from the host's generator.
//!
//! It gives at most [`MAX_REQUEST`] bytes per request and [`RATE`] bytes a second, so that a guest
//! cannot use host CPU time here without bound. A guest's own generator needs a few hundred bytes
//! in total.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hull_device_control::DeviceType;
use rustix::event::epoll::EventFlags as Interest;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::device::{Device, DeviceError, EventFlags, EventRegistry, Queues};
use crate::state::{RestoreError, SaveError, SavedState};

/// The most bytes that one request gets; a driver asks again for more.
const MAX_REQUEST: usize = 4096;
/// Bytes a second, on average.
const RATE: u64 = 1 << 20;
/// Bytes that may be given at once after a pause.
const BURST: u64 = 64 << 10;
const TIMER: u64 = 0;
const QUEUE: usize = 0;

/// Version of [`State`].
const VERSION: u32 = 1;

/// The saved state.
#[derive(Debug, Serialize, Deserialize)]
struct State {}

/// The device.
pub struct Entropy {
    timer: OwnedFd,
    budget: u64,
    refilled: Instant,
}

impl Entropy {
    /// A device with a full burst.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            budget: BURST,
            refilled: Instant::now(),
        })
    }

    fn refill(&mut self) {
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(self.refilled);
        let earned = u64::try_from(elapsed.as_micros())
            .unwrap_or(u64::MAX)
            .saturating_mul(RATE)
            / 1_000_000;
        if earned > 0 {
            self.budget = self.budget.saturating_add(earned).min(BURST);
            self.refilled = now;
        }
    }

    /// Sets the timer for when there is a budget again.
    fn sleep(&self) -> Result<(), DeviceError> {
        let pause = Duration::from_micros(MAX_REQUEST as u64 * 1_000_000 / RATE);
        let when = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: 0,
                tv_nsec: pause.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &when).map_err(|error| {
            DeviceError::Host {
                action: "set the entropy timer",
                source: error.into(),
            }
        })?;
        Ok(())
    }

    fn serve(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        let mut used = false;
        loop {
            self.refill();
            if self.budget < MAX_REQUEST as u64 {
                self.sleep()?;
                break;
            }
            let Some(chain) = queues.pop_or_rearm(QUEUE)? else {
                break;
            };
            let head = chain.head_index();
            let mut written = 0;
            let mut bytes = [0; MAX_REQUEST];
            for descriptor in chain.writable() {
                let want = (descriptor.len() as usize).min(MAX_REQUEST - written);
                if want == 0 {
                    break;
                }
                fill(&mut bytes[..want])?;
                queues
                    .memory()
                    .write_slice(&bytes[..want], descriptor.addr())
                    .map_err(|error| DeviceError::Request {
                        queue: QUEUE,
                        reason: error.to_string(),
                    })?;
                written += want;
            }
            self.budget = self.budget.saturating_sub(written.max(64) as u64);
            queues.add_used(QUEUE, head, u32::try_from(written).unwrap_or(0))?;
            used = true;
        }
        if used {
            queues.notify(QUEUE)?;
        }
        Ok(())
    }
}

fn fill(mut bytes: &mut [u8]) -> Result<(), DeviceError> {
    while !bytes.is_empty() {
        let count = rustix::io::retry_on_intr(|| {
            rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())
        })
        .map_err(|error| DeviceError::Host {
            action: "get random bytes",
            source: error.into(),
        })?;
        bytes = &mut bytes[count..];
    }
    Ok(())
}

impl Device for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn register(&mut self, events: EventRegistry) -> io::Result<()> {
        events.add(&self.timer, TIMER, Interest::IN)
    }

    fn queue_event(&mut self, _queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.serve(queues)
    }

    fn host_event(
        &mut self,
        _token: u64,
        _ready: EventFlags,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        let mut expirations = [0; 8];
        match rustix::io::read(&self.timer, &mut expirations) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => self.serve(queues),
            Err(error) => Err(DeviceError::Host {
                action: "read the entropy timer",
                source: error.into(),
            }),
        }
    }

    /// A request is finished in the event in which it arrived, or stays in its queue.
    fn quiesce(&mut self, _queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Saves no state: a restored device starts with a full burst.
    fn save(&mut self) -> Result<SavedState, SaveError> {
        SavedState::new(DeviceType::Entropy, VERSION, State {})
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.read::<State>(DeviceType::Entropy, VERSION)?;
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::{Driver, hostile_chains};

    #[test]
    fn a_request_is_filled() {
        let mut driver = Driver::new(Entropy::new().unwrap());
        let one = driver.request(QUEUE, &[], 100);
        let two = driver.request(QUEUE, &[], 100);
        assert_eq!((one.len(), two.len()), (100, 100));
        assert_ne!(one, two);
        assert_eq!(driver.request(QUEUE, &[], 100_000).len(), MAX_REQUEST);
        assert_eq!(driver.request(QUEUE, &[1; 10], 0).len(), 0);
    }

    #[test]
    fn a_greedy_guest_waits_and_is_served_in_the_end() {
        let mut driver = Driver::new(Entropy::new().unwrap());
        let start = Instant::now();
        let mut given = 0;
        while given < 2 * BURST {
            driver.offer(QUEUE, &[(0x10_0000, 4096, 2, 0)]);
            driver.run(QUEUE).unwrap();
            loop {
                if let Some(length) = driver.used(QUEUE) {
                    given += u64::from(length);
                    break;
                }
                driver.host_events().unwrap();
                std::thread::yield_now();
            }
        }
        let least = Duration::from_micros(BURST * 1_000_000 / RATE / 2);
        assert!(start.elapsed() > least, "{:?}", start.elapsed());
    }

    #[test]
    fn hostile_chains_end_the_device_at_worst() {
        for chain in hostile_chains() {
            let mut driver = Driver::new(Entropy::new().unwrap());
            driver.offer(QUEUE, &chain);
            let _ = driver.run(QUEUE);
        }
    }
}
