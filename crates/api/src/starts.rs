//! What waits for containers to start, and to end: `docker run` attaches to a container, and waits
//! for its end, before it starts it.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hull_engine::Paths;
use hull_engine::attach::{Options, Remote};
use hull_engine::container::{self, Container};
use hull_engine::error::{Error, ErrorKind, Result};
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::{Exit, unix_time_ns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Shared;

/// How often it is looked whether somebody else has started a container.
const LOOK: Duration = Duration::from_millis(100);

/// How long a start waits for connections that are just being taken over.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection that waits for a container to start.
#[derive(Debug)]
pub struct Pending {
    pub options: Options,
    pub remote: Remote,
}

/// What is known of one container.
#[derive(Debug, Default)]
struct Known {
    pending: Vec<(u64, Pending)>,
    /// Connections that are just being taken over, and will be among those.
    coming: usize,
    waiters: usize,
    /// Threads that will tell how it ended, when it has.
    carriers: usize,
    /// How it ended, as long as somebody waits for that.
    exit: Option<Exit>,
    /// The other side of a connection that is there only because somebody waits.
    watched: Option<UnixStream>,
}

/// Connections and waiters, by the id of their container.
#[derive(Debug, Default)]
pub struct Starts {
    known: Mutex<HashMap<String, Known>>,
    changed: Condvar,
    /// The number of the next connection that waits.
    next: AtomicU64,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It does not run.
    NotRunning,
    /// It ends, after it has been started if it does not run.
    NextExit,
    /// It is gone.
    Removed,
}

impl Starts {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that a connection will wait for a container. A start waits for it: the caller goes on
    /// as soon as it has an answer.
    pub fn expect(&self, id: &str) -> Coming<'_> {
        self.lock().entry(id.to_owned()).or_default().coming += 1;
        Coming {
            starts: self,
            id: id.to_owned(),
        }
    }

    /// Whether a connection waits still. Returns at a change, or after a moment.
    fn still_waits(&self, id: &str, number: u64) -> bool {
        let known = self.lock();
        let waited = self.changed.wait_timeout(known, LOOK);
        let (known, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let of_container = known.get(id);
        of_container.is_some_and(|one| one.pending.iter().any(|(other, _)| *other == number))
    }

    /// Takes a connection back.
    fn give_up(&self, id: &str, number: u64) -> Option<Pending> {
        let mut known = self.lock();
        let pending = &mut known.get_mut(id)?.pending;
        let index = pending.iter().position(|(other, _)| *other == number)?;
        let (_, taken) = pending.remove(index);
        forget(&mut known, id);
        Some(taken)
    }

    /// Takes all connections that wait for a container, which is just being started, and tells
    /// whether somebody waits for its end.
    pub fn take(&self, id: &str) -> (Vec<Pending>, bool) {
        let mut known = self.lock();
        let begin = Instant::now();
        while known.get(id).is_some_and(|one| one.coming > 0) && begin.elapsed() < PATIENCE {
            let waited = self.changed.wait_timeout(known, LOOK);
            known = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let Some(one) = known.get_mut(id) else {
            return (Vec::new(), false);
        };
        let pending = std::mem::take(&mut one.pending);
        one.exit = None;
        let is_awaited = one.waiters > 0;
        forget(&mut known, id);
        self.changed.notify_all();
        (
            pending.into_iter().map(|(_, one)| one).collect(),
            is_awaited,
        )
    }

    /// Keeps the other side of a connection as long as somebody waits for a container's end.
    pub fn keep(&self, id: &str, stream: UnixStream) {
        if let Some(one) = self.lock().get_mut(id)
            && one.waiters > 0
        {
            one.watched = Some(stream);
        }
    }

    /// Begins to wait for the end of a container.
    pub fn wait_for(&self, container: &Container) -> Waiter<'_> {
        let id = container.record.id.clone();
        self.lock().entry(id.clone()).or_default().waiters += 1;
        Waiter {
            starts: self,
            id,
            ended_ns: exit_ns(container),
            since_ns: unix_time_ns(),
        }
    }
}

fn forget(known: &mut HashMap<String, Known>, id: &str) {
    if known
        .get(id)
        .is_some_and(|one| one.waiters + one.carriers + one.coming == 0 && one.pending.is_empty())
    {
        known.remove(id);
    }
}

/// What the sandbox of a container says that is just ending, or has ended.
fn has_ended(error: &Error) -> bool {
    let kinds = [ErrorKind::Gone, ErrorKind::WrongState, ErrorKind::NotFound];
    kinds.contains(&error.kind)
}

fn exit_ns(container: &Container) -> Option<u64> {
    container.status.exit.as_ref().map(|exit| exit.at_ns)
}

/// A connection that is just being taken over.
#[derive(Debug)]
pub struct Coming<'a> {
    starts: &'a Starts,
    id: String,
}

impl<'a> Coming<'a> {
    /// It is there, and waits until [`Starts::take`], or until what is returned is dropped.
    pub fn park(self, pending: Pending) -> Parked<'a> {
        let mut known = self.starts.lock();
        // Never that of another one, which may have been taken already.
        let number = self.starts.next.fetch_add(1, Ordering::Relaxed);
        let of_container = &mut known.entry(self.id.clone()).or_default().pending;
        of_container.push((number, pending));
        drop(known);
        Parked {
            starts: self.starts,
            id: self.id.clone(),
            number,
        }
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let mut known = self.starts.lock();
        if let Some(one) = known.get_mut(&self.id) {
            one.coming -= 1;
        }
        forget(&mut known, &self.id);
        self.starts.changed.notify_all();
    }
}

/// A connection that waits.
#[derive(Debug)]
pub struct Parked<'a> {
    starts: &'a Starts,
    id: String,
    number: u64,
}

impl Parked<'_> {
    /// Whether it waits still. Returns at a change, or after a moment.
    pub fn still_waits(&self) -> bool {
        self.starts.still_waits(&self.id, self.number)
    }

    /// Takes it back.
    pub fn give_up(&self) -> Option<Pending> {
        self.starts.give_up(&self.id, self.number)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Somebody who will tell how a container has ended.
#[derive(Debug)]
pub struct Carrier {
    state: Shared,
    id: String,
}

impl Carrier {
    /// For as long as this is kept.
    pub fn new(state: &Shared, id: &str) -> Self {
        let mut known = state.starts.lock();
        known.entry(id.to_owned()).or_default().carriers += 1;
        drop(known);
        Self {
            state: state.clone(),
            id: id.to_owned(),
        }
    }

    /// Tells those who wait how it has ended.
    pub fn ended(&self, exit: Exit) {
        if let Some(one) = self.state.starts.lock().get_mut(&self.id) {
            one.exit = Some(exit);
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        let starts = &self.state.starts;
        let mut known = starts.lock();
        if let Some(one) = known.get_mut(&self.id) {
            one.carriers -= 1;
        }
        forget(&mut known, &self.id);
        starts.changed.notify_all();
    }
}

/// Somebody who waits for a container's end.
#[derive(Debug)]
pub struct Waiter<'a> {
    starts: &'a Starts,
    id: String,
    /// When it had ended last.
    ended_ns: Option<u64>,
    /// When the waiting began: nanoseconds since 1970.
    since_ns: u64,
}

impl Waiter<'_> {
    /// How the container ends; `None` when `caller` hangs up before that.
    ///
    /// # Errors
    /// Its end cannot be learned.
    pub fn wait(
        &self,
        paths: &Paths,
        condition: Condition,
        caller: BorrowedFd<'_>,
    ) -> Result<Option<Exit>> {
        let mut exit = None;
        loop {
            let (told, is_carried) = self.told();
            exit = told.or(exit);
            let container = container::load(paths, &self.id)?;
            let Some(container) = container else {
                if exit.is_some() || !is_carried {
                    // Nobody knows how it ended that was removed by others.
                    return Ok(Some(exit.unwrap_or_else(|| Exit::now(0))));
                }
                if hung_up(caller) {
                    return Ok(None);
                }
                self.rest();
                continue;
            };
            let idle = container::is_idle(&container);
            if condition != Condition::Removed && exit.is_some() {
                return Ok(exit);
            }
            if idle {
                let last = container.status.exit.clone();
                match condition {
                    Condition::NotRunning => {
                        return Ok(Some(last.unwrap_or_else(|| Exit::now(0))));
                    }
                    Condition::NextExit if exit_ns(&container) != self.ended_ns => {
                        return Ok(last);
                    }
                    _ => {}
                }
            } else if exit.is_none() {
                match self.follow(&container, caller) {
                    Ok(None) => return Ok(None),
                    Ok(ended) => exit = ended,
                    // It has ended, or its machine has.
                    Err(error) if has_ended(&error) => {}
                    Err(error) => return Err(error),
                }
                if exit.is_some() && condition != Condition::Removed {
                    return Ok(exit);
                }
            }
            if hung_up(caller) {
                return Ok(None);
            }
            self.rest();
        }
    }

    /// How it ended, if that was told; and whether somebody will tell.
    fn told(&self) -> (Option<Exit>, bool) {
        let known = self.starts.lock();
        let one = known.get(&self.id);
        let told = one.and_then(|one| one.exit.clone());
        // Not that of an earlier run, which others still wait after.
        let told = told.filter(|exit| exit.at_ns >= self.since_ns);
        (told, one.is_some_and(|one| one.carriers > 0))
    }

    /// Waits for a change, or for a moment.
    fn rest(&self) {
        let known = self.starts.lock();
        drop(self.starts.changed.wait_timeout(known, LOOK));
    }

    /// Waits for the end of a container that runs.
    fn follow(&self, container: &Container, caller: BorrowedFd<'_>) -> Result<Option<Exit>> {
        let client = container::connect(container)?;
        client.wait_for_greeting()?;
        client.tell(
            &Request::Wait {
                container: self.id.clone(),
            },
            &[],
        )?;
        loop {
            let mut descriptors = [
                PollFd::new(&client, PollFlags::IN),
                PollFd::new(&caller, PollFlags::empty()),
            ];
            match poll(&mut descriptors, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(Error::new(format!(
                        "wait for the end of a container: {error}"
                    )));
                }
            }
            if !descriptors[1].revents().is_empty() {
                return Ok(None);
            }
            if !descriptors[0].revents().is_empty() {
                return match client.receive()?.message {
                    Reply::Ended(exit) => Ok(Some(exit)),
                    other => Err(unexpected(&other)),
                };
            }
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut known = self.starts.lock();
        if let Some(one) = known.get_mut(&self.id) {
            one.waiters -= 1;
            if one.waiters == 0 {
                one.watched = None;
            }
        }
        forget(&mut known, &self.id);
    }
}

/// Whether the other end of a descriptor is closed.
pub fn hung_up(descriptor: BorrowedFd<'_>) -> bool {
    let mut descriptors = [PollFd::new(&descriptor, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut descriptors, Some(&now)).is_ok_and(|ready| ready > 0)
}
