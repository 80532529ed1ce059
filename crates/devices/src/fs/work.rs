//! Operations that may take long, on threads of their own: the device answers other requests meanwhile.
//!
//! Workers are started when there is work and none is free, up to [`MAX_WORKERS`], and stay. A worker knows nothing of
//! the file system: it gets descriptors and completes the request itself.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

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
        /// Take set-id bits away as for an ordinary user of this group.
        ordinary: Option<u32>,
    },
    Copy {
        from: Arc<OwnedFd>,
        from_offset: u64,
        to: Arc<OwnedFd>,
        to_offset: u64,
        length: u64,
        /// Take set-id bits away as for an ordinary user of this group.
        ordinary: Option<u32>,
    },
}

/// One request to be completed.
pub struct Job {
    pub ring: Arc<dyn Ring>,
    pub memory: Memory,
    pub chain: Chain,
    pub unique: u64,
    pub work: Work,
}

/// The threads, and what waits for them.
pub struct Workers {
    jobs: Sender<Job>,
    queue: Arc<Mutex<Receiver<Job>>>,
    /// Jobs that are waiting or being worked on.
    pending: Arc<AtomicUsize>,
    threads: usize,
}

impl Workers {
    /// No threads yet.
    pub fn new() -> Self {
        let (jobs, queue) = channel();
        Self {
            jobs,
            queue: Arc::new(Mutex::new(queue)),
            pending: Arc::default(),
            threads: 0,
        }
    }

    /// Has a job done. How many there are at once is bounded by the queue they come from.
    pub fn submit(&mut self, job: Job) {
        let pending = self.pending.fetch_add(1, Ordering::Relaxed) + 1;
        if pending > self.threads && self.threads < MAX_WORKERS {
            let queue = self.queue.clone();
            let pending = self.pending.clone();
            let spawned = std::thread::Builder::new()
                .name("fs-worker".into())
                .stack_size(128 << 10)
                .spawn(move || work(&queue, &pending));
            match spawned {
                Ok(_) => self.threads += 1,
                Err(error) => tracing::warn!(%error, "cannot start a file system worker"),
            }
        }
        if self.threads == 0 {
            finish(job);
            self.pending.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        // The receiving end lives as long as `self`.
        let _ = self.jobs.send(job);
    }
}

fn work(queue: &Mutex<Receiver<Job>>, pending: &AtomicUsize) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // The device has gone.
        let Ok(job) = job else { return };
        finish(job);
        pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Does the work and completes the request.
fn finish(job: Job) {
    let Job {
        ring,
        memory,
        chain,
        unique,
        work,
    } = job;
    let head = chain.head_index();
    let written = match Buffers::new(&memory, chain) {
        Ok(mut buffers) => execute(work, &mut buffers, unique),
        // The guest changed its descriptors meanwhile.
        Err(_) => 0,
    };
    let written = u32::try_from(written).unwrap_or(u32::MAX);
    let completed = ring
        .add_used(&memory, head, written)
        .and_then(|()| ring.notify(&memory));
    if let Err(error) = completed {
        tracing::error!(%error, "cannot complete a file system request");
    }
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

/// `fallocate` with the guest's mode: newer modes than this code knows are the host kernel's to judge.
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
