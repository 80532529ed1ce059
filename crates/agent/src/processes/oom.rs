//! OOM kills of one container: watches memory.events of its control group. Called by
//! `rpc::service`, which starts the watch with the container, and by `reaper`, for which a kill
//! comes before the exit that it causes.
//!
//! The kernel reports with POLLPRI that the file has changed (`cgroup_file_notify`), and again only
//! after it has been read.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hull_protocol::agent::OomKill;
use hull_protocol::agent::event::What;
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use crate::events::Events;
use crate::io::reactor;

/// Longer than any memory.events.
const BUFFER: usize = 512;

/// OOM kills of a container.
pub struct OomWatch {
    container_id: String,
    /// memory.events; `None` when the kernel does not have it.
    file: Option<OwnedFd>,
    /// Kills that have been reported.
    reported: AtomicU64,
    events: Arc<Events>,
}

impl OomWatch {
    /// Opens memory.events of a group.
    pub fn new(container_id: &str, cgroup: &Path, events: Arc<Events>) -> Self {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Self {
            container_id: container_id.to_owned(),
            file: rustix::fs::open(cgroup.join("memory.events"), flags, Mode::empty()).ok(),
            reported: AtomicU64::new(0),
            events,
        }
    }

    /// The container's id.
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// Where events of this container go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Processes of the group, or of one below it, that the kernel has killed for lack of memory.
    /// Reports those that are new.
    pub fn check(&self) -> u64 {
        let reported = self.reported.load(Ordering::Relaxed);
        let total = self.read().unwrap_or(reported);
        if total > reported {
            self.reported.store(total, Ordering::Relaxed);
            let kill = OomKill {
                container_id: self.container_id.clone(),
                total,
                ..Default::default()
            };
            self.events.add(crate::time::now_ns(), What::Oom(kill));
        }
        total.max(reported)
    }

    fn read(&self) -> Option<u64> {
        let mut buffer = [0; BUFFER];
        // From the beginning: that also re-enables the notification.
        let length = rustix::io::pread(self.file.as_ref()?, &mut buffer, 0).ok()?;
        let text = std::str::from_utf8(&buffer[..length]).ok()?;
        text.lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
    }

    /// Reports kills as they happen. Runs until it is dropped.
    pub async fn run(self: Arc<Self>) {
        let Some(file) = &self.file else { return };
        let watched = reactor::watch_borrowed(file.as_fd(), Interest::PRIORITY);
        let watched = match watched {
            Ok(watched) => watched,
            Err(error) => {
                crate::log::error!(
                    "cannot watch {:?} for OOM kills: {error}",
                    self.container_id
                );
                return;
            }
        };
        loop {
            self.check();
            match watched.ready(Interest::PRIORITY).await {
                // The file is read after that: a change in between is an event of its own.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    crate::log::error!("cannot wait for OOM kills: {error}");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn written(directory: &Path, kills: u64) {
        let text = format!("low 0\nhigh 3\nmax 9\noom 5\noom_kill {kills}\noom_group_kill 1\n");
        std::fs::write(directory.join("memory.events"), text).unwrap();
    }

    #[tokio::test]
    async fn each_kill_is_reported_once() {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path(), 0);
        let events = Arc::new(Events::default());
        let watch = OomWatch::new("c1", directory.path(), events.clone());
        assert_eq!(watch.check(), 0);
        written(directory.path(), 2);
        assert_eq!((watch.check(), watch.check()), (2, 2));
        written(directory.path(), 3);
        assert_eq!(watch.check(), 3);
        let told: Vec<u64> = events
            .after(0)
            .await
            .unwrap()
            .events
            .iter()
            .map(|event| event.oom().total)
            .collect();
        assert_eq!(told, [2, 3]);
    }

    #[test]
    fn a_group_without_the_controller_has_no_kills() {
        let directory = tempfile::tempdir().unwrap();
        let watch = OomWatch::new("c1", directory.path(), Arc::default());
        assert_eq!(watch.check(), 0);
    }
}
