//! How the threads of a process tell its first thread that one of them has ended.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// A place for the first end, `T`, and an event.
#[derive(Debug)]
pub struct Ended<T> {
    event: OwnedFd,
    first: Mutex<Option<T>>,
}

impl<T> Ended<T> {
    /// Nothing has ended.
    ///
    /// # Errors
    /// There are too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
            first: Mutex::new(None),
        })
    }

    /// Readable when something has ended.
    pub fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Something has ended. Only the first one is kept.
    pub fn set(&self, end: T) {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(end);
        if let Err(error) = rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot end the process");
        }
    }

    /// What ended first.
    pub fn take(&self) -> Option<T> {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}
