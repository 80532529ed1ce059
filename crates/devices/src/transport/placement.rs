//! On which processor of the host a device's thread runs.
//!
//! When a guest waits for a device, and the device for the guest, they never run at the same time. On one processor the
//! turns between them are context switches; on two, each is an interrupt to a processor that has often gone to sleep,
//! which takes several times as long. The host's scheduler cannot know that and wakes a thread where nothing runs.
//! So hull's user-mode kernel says in its kicks where it runs ([`cpu_of_kick`]), and the thread comes there; when it says
//! nothing, because others of its processes could run meanwhile, the thread may run anywhere again.
//!
//! A device to which much comes at once ([`Device::is_streaming`]) is not waited for: beside the guest, both get further.
//!
//! [`Device::is_streaming`]: crate::device::Device::is_streaming
//!
//! What the guest says is only a wish: a processor outside the thread's own set is ignored.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The processor that a kick names, if it names one: the value that was added to the event counter is 1 for the kick
/// itself, and above 16 bits the number of the processor, plus 1.
pub fn cpu_of_kick(value: u64) -> Option<usize> {
    let (kicks, sum) = (value & 0xffff, value >> 16);
    // Several kicks add up; from one place, mostly.
    if kicks == 0 || sum % kicks != 0 {
        return None;
    }
    usize::try_from((sum / kicks).checked_sub(1)?).ok()
}

/// Where the calling thread runs; always used by the same thread.
pub struct Placement {
    /// Where it may run, as it was found.
    anywhere: Option<CpuSet>,
    /// Where it is kept now.
    at: Option<usize>,
}

impl Placement {
    /// Of a thread that may run where it may run.
    pub fn new() -> Self {
        Self {
            anywhere: None,
            at: None,
        }
    }

    /// Keeps the calling thread on `cpu`, or lets it run anywhere. Where this is not possible it changes nothing.
    pub fn follow(&mut self, cpu: Option<usize>) {
        if cpu == self.at {
            return;
        }
        if self.anywhere.is_none() {
            self.anywhere = sched_getaffinity(None).ok();
        }
        let Some(anywhere) = &self.anywhere else {
            return;
        };
        let wanted = match cpu {
            None => *anywhere,
            Some(cpu) if cpu < CpuSet::MAX_CPU && anywhere.is_set(cpu) => {
                let mut one = CpuSet::new();
                one.set(cpu);
                one
            }
            Some(_) => return,
        };
        match sched_setaffinity(None, &wanted) {
            Ok(()) => self.at = cpu,
            Err(error) => tracing::debug!(%error, "cannot choose a processor"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_kick_names_a_processor_or_none() {
        assert_eq!(cpu_of_kick(1), None);
        assert_eq!(cpu_of_kick(1 + (1 << 16)), Some(0));
        assert_eq!(cpu_of_kick(1 + (8 << 16)), Some(7));
        // Two kicks from one processor, and from two.
        assert_eq!(cpu_of_kick(2 + (6 << 16)), Some(2));
        assert_eq!(cpu_of_kick(2 + (5 << 16)), None);
        for absurd in [0, 1 << 16, u64::MAX] {
            assert_eq!(cpu_of_kick(absurd).filter(|cpu| *cpu < 1 << 16), None);
        }
    }

    #[test]
    fn a_thread_follows_and_is_let_go() {
        std::thread::spawn(|| {
            let before = sched_getaffinity(None).unwrap();
            let cpu = (0..CpuSet::MAX_CPU)
                .find(|cpu| before.is_set(*cpu))
                .unwrap();
            let mut placement = Placement::new();
            placement.follow(Some(cpu));
            let now = sched_getaffinity(None).unwrap();
            assert!(now.is_set(cpu) && now.count() == 1);
            // Nothing that exists, and nothing that fits into a set.
            for absurd in [CpuSet::MAX_CPU - 1, usize::MAX] {
                placement.follow(Some(absurd));
                assert!(sched_getaffinity(None).unwrap() == now);
            }
            placement.follow(None);
            assert!(sched_getaffinity(None).unwrap() == before);
        })
        .join()
        .unwrap();
    }
}
