//! Operations that may take long, on threads of their own: the device answers other requests
//! meanwhile.
//!
//! Workers are started when there is work and none is free, up to [`MAX_WORKERS`], and stay. A
//! worker does not know the file system: it gets descriptors and completes the request itself. The
//! device waits for all of them when it is quiesced ([`Workers::finish`]) or reset
//! ([`Workers::discard`]).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::credentials::{Credentials, Ordinary};
use super::wire::{HEADER_OUT, header_out};
use crate::buffers::Buffers;
use crate::device::{Chain, Memory, Ring};

const MAX_WORKERS: usize = 4;
/// Bytes that one copy moves at most; the guest asks again for the rest.
const MAX_COPY: u64 = 128 << 20;

/// Something that may take long.
pub enum Work {
    Read {
        file: Arc<OwnedFd>,
        offset: u64,
        count: usize,
    },
    Sync {
        file: Arc<OwnedFd>,
        data_only: bool,
    },
    SyncFileSystems {
        directories: Vec<OwnedFd>,
    },
    Allocate {
        file: Arc<OwnedFd>,
        mode: u32,
        offset: u64,
        length: u64,
        /// Clear set-id bits as for an unprivileged user of this group.
        ordinary: Option<u32>,
    },
    Copy {
        from: Arc<OwnedFd>,
        from_offset: u64,
        to: Arc<OwnedFd>,
        to_offset: u64,
        length: u64,
        /// Clear set-id bits as for an unprivileged user of this group.
        ordinary: Option<u32>,
    },
    /// Runs until the other end sends or is dropped.
    #[cfg(test)]
    Wait(std::sync::mpsc::Receiver<()>),
}

/// A request that is answered later.
pub struct Pending {
    pub ring: Arc<dyn Ring>,
    pub memory: Memory,
    pub chain: Chain,
    pub unique: u64,
}

impl Pending {
    /// Completes the request with what `answer` writes; it returns the number of bytes.
    pub fn complete(self, answer: impl FnOnce(&mut Buffers<'_>, u64) -> usize) {
        let head = self.chain.head_index();
        let written = match Buffers::new(&self.memory, self.chain) {
            Ok(mut buffers) => answer(&mut buffers, self.unique),
            // The guest changed its descriptors meanwhile.
            Err(_) => 0,
        };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let completed = self
            .ring
            .add_used(&self.memory, head, written)
            .and_then(|()| self.ring.notify(&self.memory));
        if let Err(error) = completed {
            tracing::error!(%error, "cannot complete a file system request");
        }
    }

    /// Completes the request with a result and no data.
    pub fn finish(self, result: Result<(), Errno>) {
        let error = result.map_or_else(Errno::raw_os_error, |()| 0);
        self.complete(|buffers, unique| {
            let header = header_out(HEADER_OUT, error, unique);
            buffers.writable.copy_from(&header)
        });
    }
}

/// One request to be completed.
pub struct Job {
    pub request: Pending,
    pub work: Work,
}

/// The threads, and the jobs that wait for them.
pub struct Workers {
    shared: Arc<Shared>,
    threads: usize,
}

/// What the threads share.
#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    /// There is a job, or no more will come.
    available: Condvar,
    /// No job waits or runs.
    idle: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    running: usize,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        // Nothing panics while it is held, and a list of jobs is valid at any time.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until_idle(&self, jobs: MutexGuard<'_, Jobs>) {
        let is_busy = |jobs: &mut Jobs| jobs.running > 0 || !jobs.waiting.is_empty();
        drop(
            self.idle
                .wait_while(jobs, is_busy)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Workers {
    /// No threads yet.
    pub fn new() -> Self {
        Self {
            shared: Arc::default(),
            threads: 0,
        }
    }

    /// Queues a job. There are at most as many at once as the queue that they come from has
    /// entries: see `InFlight::pop`.
    pub fn submit(&mut self, job: Job) {
        let pending = {
            let jobs = self.shared.lock();
            jobs.waiting.len() + jobs.running + 1
        };
        if pending > self.threads && self.threads < MAX_WORKERS {
            let shared = self.shared.clone();
            let spawned = std::thread::Builder::new()
                .name("fs-worker".into())
                .stack_size(128 << 10)
                .spawn(move || work(&shared));
            match spawned {
                Ok(_) => self.threads += 1,
                Err(error) => tracing::warn!(%error, "cannot start a file system worker"),
            }
        }
        if self.threads == 0 {
            finish(job);
            return;
        }
        self.shared.lock().waiting.push_back(job);
        self.shared.available.notify_one();
    }

    /// Waits until every job is done and its request completed. Takes as long as the system calls
    /// of the jobs.
    pub fn finish(&self) {
        self.shared.wait_until_idle(self.shared.lock());
    }

    /// Drops the jobs that wait, and waits for those that run, which write to guest memory.
    pub fn discard(&self) {
        let mut jobs = self.shared.lock();
        jobs.waiting.clear();
        self.shared.wait_until_idle(jobs);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.available.notify_all();
    }
}

/// A worker.
fn work(shared: &Shared) {
    let mut jobs = shared.lock();
    loop {
        jobs = shared
            .available
            .wait_while(jobs, |jobs| jobs.waiting.is_empty() && !jobs.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let Some(job) = jobs.waiting.pop_front() else {
            return;
        };
        jobs.running += 1;
        drop(jobs);
        finish(job);
        jobs = shared.lock();
        jobs.running -= 1;
        if jobs.running == 0 && jobs.waiting.is_empty() {
            shared.idle.notify_all();
        }
    }
}

/// Does the work and completes the request.
fn finish(job: Job) {
    let Job { request, work } = job;
    request.complete(|buffers, unique| execute(work, buffers, unique));
}

/// Does the work; the number of bytes written to the buffers.
pub fn execute(work: Work, buffers: &mut Buffers<'_>, unique: u64) -> usize {
    let writable = &mut buffers.writable;
    let mut data = writable.split_off(HEADER_OUT);
    // What follows the header: data that is in place already, or a few bytes.
    let result = match work {
        Work::Read {
            file,
            offset,
            count,
        } => data.read_from(file.as_fd(), count, offset),
        #[cfg(test)]
        Work::Wait(end) => {
            let _ = end.recv();
            Ok(0)
        }
        Work::Sync { file, data_only } => if data_only {
            rustix::fs::fdatasync(&file)
        } else {
            rustix::fs::fsync(&file)
        }
        .map(|()| 0),
        Work::SyncFileSystems { directories } => directories
            .iter()
            .try_for_each(rustix::fs::syncfs)
            .map(|()| 0),
        Work::Allocate {
            file,
            mode,
            offset,
            length,
            ordinary,
        } => as_ordinary(ordinary)
            .and_then(|_guard| allocate(&file, mode, offset, length).map(|()| 0)),
        Work::Copy {
            from,
            mut from_offset,
            to,
            mut to_offset,
            length,
            ordinary,
        } => {
            let length = usize::try_from(length.min(MAX_COPY)).unwrap_or(0);
            as_ordinary(ordinary)
                .and_then(|_guard| {
                    rustix::fs::copy_file_range(
                        &from,
                        Some(&mut from_offset),
                        &to,
                        Some(&mut to_offset),
                        length,
                    )
                })
                .map(|copied| {
                    let mut out = [0; 8];
                    // At most MAX_COPY.
                    out[..4].copy_from_slice(&(copied as u32).to_le_bytes());
                    data.copy_from(&out)
                })
        }
    };
    let header = match result {
        Ok(length) => header_out(HEADER_OUT + length, 0, unique),
        Err(error) => header_out(HEADER_OUT, error.raw_os_error(), unique),
    };
    writable.copy_from(&header) + result.unwrap_or(0)
}

/// Credentials are the thread's own, so a worker changes its own.
fn as_ordinary(gid: Option<u32>) -> Result<Option<Ordinary>, Errno> {
    match gid {
        Some(gid) => Credentials::new().ordinary(gid),
        None => Ok(None),
    }
}

/// `fallocate` with the guest's mode: the host kernel judges modes that this code does not know.
fn allocate(file: &OwnedFd, mode: u32, offset: u64, length: u64) -> Result<(), Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::FBIG)?;
    let length = i64::try_from(length).map_err(|_| Errno::FBIG)?;
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode.cast_signed(), offset, length) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::testing::{Guest, WRITE};

    /// A queue with as many requests, all popped, as jobs that run until their end is dropped.
    fn jobs(guest: &mut Guest, count: u16) -> (Vec<Job>, Vec<Sender<()>>) {
        (0..count)
            .map(|head| {
                guest.offer_at(0, head, &[(0x10_0000, 64, WRITE, 0)]);
                let (sender, receiver) = channel();
                let request = Pending {
                    ring: guest.rings()[0].clone(),
                    memory: guest.memory().clone(),
                    chain: guest.rings()[0].pop(guest.memory()).unwrap().unwrap(),
                    unique: 1,
                };
                let work = Work::Wait(receiver);
                let job = Job { request, work };
                (job, sender)
            })
            .unzip()
    }

    #[test]
    fn finishing_waits_for_every_job() {
        let mut guest = Guest::new(&[64]);
        let (jobs, ends) = jobs(&mut guest, 20);
        let mut workers = Workers::new();
        jobs.into_iter().for_each(|job| workers.submit(job));
        assert_eq!(guest.all_used(0).len(), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                drop(ends);
            });
            workers.finish();
        });
        let mut heads = guest.all_used(0);
        heads.sort_unstable();
        assert_eq!(heads, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn discarded_jobs_never_complete() {
        let mut guest = Guest::new(&[64]);
        let (jobs, ends) = jobs(&mut guest, 20);
        let mut workers = Workers::new();
        jobs.into_iter().for_each(|job| workers.submit(job));
        while workers.shared.lock().running < MAX_WORKERS {
            std::thread::yield_now();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                drop(ends);
            });
            workers.discard();
        });
        // Those that ran have completed before `discard` returned; the others never will.
        assert_eq!(guest.all_used(0).len(), MAX_WORKERS);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.all_used(0).len(), 0);
    }
}
