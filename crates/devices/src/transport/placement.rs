//! The host CPU that a device's thread runs on.
//!
//! A guest that waits for a device, and the device, never run at the same time. On one CPU the
//! switches between them are context switches; on two, each is an interrupt to a CPU that is often
//! idle, which takes several times as long. The host's scheduler cannot know that and wakes the
//! thread on an idle CPU. So hull's user-mode kernel names its CPU in its kicks ([`cpu_of_kick`]),
//! and the thread is pinned there. A kick without a CPU, because other processes of the guest could
//! run meanwhile, unpins it.
//!
//! A device with bulk traffic ([`Load`]) is not pinned: it and the guest run in parallel.
//!
//! A kick is a hint from the guest: a CPU outside the thread's own set is ignored.
//!
//! [`Load`]: super::load::Load

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The CPU that a kick names, if any. The value that was added to the event counter is 1 for the
/// kick itself, and above 16 bits the number of the CPU, plus 1.
pub fn cpu_of_kick(value: u64) -> Option<usize> {
    let (kicks, sum) = (value & 0xffff, value >> 16);
    // Several kicks add up; they mostly come from one CPU.
    if kicks == 0 || sum % kicks != 0 {
        return None;
    }
    usize::try_from((sum / kicks).checked_sub(1)?).ok()
}

/// The calling thread's CPU; always used by the same thread.
pub struct Placement {
    /// The thread's CPU set before it was first pinned.
    anywhere: Option<CpuSet>,
    /// The CPU that the thread is pinned to.
    at: Option<usize>,
}

impl Placement {
    /// A thread that is not pinned.
    pub fn new() -> Self {
        Self {
            anywhere: None,
            at: None,
        }
    }

    /// Pins the calling thread to `cpu`, or unpins it. Does nothing if that is not possible.
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
            Err(error) => tracing::debug!(%error, "cannot choose a CPU"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_kick_names_a_cpu_or_none() {
        assert_eq!(cpu_of_kick(1), None);
        assert_eq!(cpu_of_kick(1 + (1 << 16)), Some(0));
        assert_eq!(cpu_of_kick(1 + (8 << 16)), Some(7));
        // Two kicks from one CPU, and from two.
        assert_eq!(cpu_of_kick(2 + (6 << 16)), Some(2));
        assert_eq!(cpu_of_kick(2 + (5 << 16)), None);
        for absurd in [0, 1 << 16, u64::MAX] {
            assert_eq!(cpu_of_kick(absurd).filter(|cpu| *cpu < 1 << 16), None);
        }
    }

    #[test]
    fn a_thread_is_pinned_and_unpinned() {
        std::thread::spawn(|| {
            let before = sched_getaffinity(None).unwrap();
            let cpu = (0..CpuSet::MAX_CPU)
                .find(|cpu| before.is_set(*cpu))
                .unwrap();
            let mut placement = Placement::new();
            placement.follow(Some(cpu));
            let now = sched_getaffinity(None).unwrap();
            assert!(now.is_set(cpu) && now.count() == 1);
            // A CPU that does not exist, and one that does not fit into a set.
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
