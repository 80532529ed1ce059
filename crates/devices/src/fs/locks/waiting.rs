//! Requests that wait for a lock.
//!
//! The host's calls that wait would hold a thread each, so the device tries again and again: at
//! once when the guest itself has released a lock on the file, otherwise after a pause that grows.
//! After [`HOLD`] the request is answered with `EAGAIN`, and the guest's kernel asks again unless
//! its process has got a signal meanwhile (the driver cannot interrupt requests).
//!
//! Owners that wait for each other would wait forever: the last one gets `EDEADLK`. As in Linux,
//! that is for locks of processes only.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::{Locks, Request};
use crate::fs::server::Server;
use crate::fs::work::Pending;

/// The most requests that wait; others are answered with `EAGAIN` at once.
const MAX_WAITING: usize = 256;
/// How long a request waits.
const HOLD: Duration = Duration::from_millis(200);
/// Pauses between two attempts.
const PAUSES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_millis(50);
/// Owners looked at to find a circle.
const MAX_CIRCLE: usize = 64;

struct Entry {
    request: Pending,
    lock: Request,
    until: Instant,
    next: Instant,
    pause: Duration,
}

/// The requests, in the order in which they came.
pub struct Waiting {
    entries: Vec<Entry>,
    /// Readable when an entry is due.
    pub timer: OwnedFd,
}

impl Waiting {
    pub fn new() -> Result<Self, Errno> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            entries: Vec::new(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// A request for a lock that was not to be had.
    pub fn add(&mut self, request: Pending, lock: Request, server: &mut Server) {
        if self.is_circle(&lock, &server.locks) {
            request.finish(Err(Errno::DEADLK));
            return;
        }
        if self.entries.len() >= MAX_WAITING {
            request.finish(Err(Errno::AGAIN));
            return;
        }
        let now = Instant::now();
        self.entries.push(Entry {
            request,
            lock,
            until: now + HOLD,
            next: now + *PAUSES.start(),
            pause: *PAUSES.start(),
        });
        server.locks.waiting = self.entries.len();
        self.set_timer(now);
    }

    /// Whether somebody for whom `lock` waits waits for its owner.
    fn is_circle(&self, lock: &Request, locks: &Locks) -> bool {
        if lock.is_flock || lock.is_ofd {
            return false;
        }
        let owners = |lock: &Request| -> Vec<u64> {
            locks
                .blockers(lock)
                .filter_map(|(owner, holder, _)| (!holder.is_ofd).then_some(owner))
                .take(MAX_CIRCLE)
                .collect()
        };
        let mut found = owners(lock);
        let mut at = 0;
        while let Some(&owner) = found.get(at) {
            if owner == lock.owner {
                return true;
            }
            at += 1;
            let waits_for = (self.entries.iter())
                .filter(|entry| entry.lock.owner == owner)
                .filter(|entry| !entry.lock.is_flock && !entry.lock.is_ofd)
                .flat_map(|entry| owners(&entry.lock));
            for next in waits_for {
                if found.len() < MAX_CIRCLE && !found.contains(&next) {
                    found.push(next);
                }
            }
        }
        false
    }

    /// Tries the locks on files of which the guest has released some.
    pub fn try_released(&mut self, server: &mut Server) {
        while !server.locks.released.is_empty() {
            let files = std::mem::take(&mut server.locks.released);
            self.retry(server, |entry| files.contains(&entry.lock.file));
        }
    }

    /// Tries those that are due, and gives up those that have waited long enough.
    pub fn try_due(&mut self, server: &mut Server) {
        let mut count = [0; 8];
        // On failure the event was spurious.
        let _ = rustix::io::read(&self.timer, &mut count);
        let now = Instant::now();
        self.retry(server, |entry| entry.next <= now);
        let now = Instant::now();
        for entry in self.entries.extract_if(.., |entry| entry.until <= now) {
            entry.request.finish(Err(Errno::AGAIN));
        }
        server.locks.waiting = self.entries.len();
        self.set_timer(now);
    }

    fn retry(&mut self, server: &mut Server, choose: impl Fn(&Entry) -> bool) {
        let mut at = 0;
        while let Some(entry) = self.entries.get_mut(at) {
            if !choose(entry) {
                at += 1;
                continue;
            }
            match server.lock(&entry.lock) {
                Err(Errno::AGAIN) => {
                    entry.next = Instant::now() + entry.pause;
                    entry.pause = (entry.pause * 2).min(*PAUSES.end());
                    at += 1;
                }
                result => self.entries.remove(at).request.finish(result),
            }
        }
        server.locks.waiting = self.entries.len();
    }

    fn set_timer(&self, now: Instant) {
        let due = self.entries.iter().map(|entry| entry.next.min(entry.until));
        // Zero would turn it off.
        let pause = due.min().map_or(Duration::ZERO, |due| {
            due.saturating_duration_since(now)
                .max(Duration::from_nanos(1))
        });
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                // At most the pause of an entry.
                tv_sec: pause.as_secs().cast_signed(),
                tv_nsec: pause.subsec_nanos().into(),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(%error, "cannot set the timer of locks");
        }
    }

    /// Answers all: the guest asks again.
    pub fn finish(&mut self) {
        for entry in self.entries.drain(..) {
            entry.request.finish(Err(Errno::AGAIN));
        }
    }

    /// Drops all without an answer.
    pub fn discard(&mut self) {
        self.entries.clear();
    }
}
