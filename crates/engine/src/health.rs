//! Health checks: a command that is executed in a container again and again, and what came of it
//! (`--health-cmd`, HEALTHCHECK of images). The container's supervisor does it; what it found is in
//! `health.json` of the container's directory.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hull_image::HealthCheck;
use hull_sandbox::control::client::{Client, unexpected};
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::{State, read_versioned, unix_time_ns};
use hull_sandbox::{Event, EventKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::container::{self, Any, Container};
use crate::error::{Context, Error, Result};
use crate::exec::{self, ExecOptions};
use crate::paths::Paths;

/// Version of [`Health`].
const VERSION: u32 = 1;

/// Name of the file.
pub(crate) const FILE: &str = "health.json";

/// Docker's defaults.
const INTERVAL: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(30);
const START_INTERVAL: Duration = Duration::from_secs(5);
const RETRIES: u32 = 3;

/// Docker's: results that are kept, and bytes of the output of each.
const KEPT: usize = 5;
const MOST_OUTPUT: usize = 4096;

const SIGKILL: u32 = 9;

/// How a container is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// It was not found healthy yet.
    #[default]
    Starting,
    /// The last check was good, or too few have failed since.
    Healthy,
    /// Checks have failed, one after the other.
    Unhealthy,
}

impl HealthStatus {
    /// Docker's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Nanoseconds since 1970 UTC.
    pub start_ns: u64,
    /// Nanoseconds since 1970 UTC.
    pub end_ns: u64,
    /// Exit status; -1 when it took too long, or could not be executed.
    pub exit: i32,
    /// What it printed, at most 4096 bytes.
    pub output: String,
}

/// What is known of a container's health.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Format of the file: [`VERSION`].
    pub version: u32,
    /// How it is.
    pub status: HealthStatus,
    /// Checks that failed, one after the other.
    pub failing_streak: u32,
    /// The last checks, the latest at the end.
    pub log: Vec<Probe>,
}

impl Health {
    /// What is known of a container that has health checks and runs.
    pub fn of(container: &Container) -> Option<Self> {
        check_of(container)?;
        let runs = matches!(container.status.state, State::Running | State::Paused);
        let read = read_versioned(&container.directory, FILE, VERSION);
        runs.then(|| read.ok().flatten().unwrap_or_default())
    }

    fn write(&self, container: &Container) -> Result<()> {
        let text = serde_json::to_vec(self).context(|| "encode the state of health")?;
        container.directory.write(FILE, &text)
    }

    /// Takes a result in; `is_new`: the container may still be starting.
    fn add(&mut self, probe: Probe, retries: u32, is_new: bool) {
        match probe.exit {
            0 => (self.status, self.failing_streak) = (HealthStatus::Healthy, 0),
            _ if is_new && self.status == HealthStatus::Starting => {}
            _ => {
                self.failing_streak += 1;
                if self.failing_streak >= retries {
                    self.status = HealthStatus::Unhealthy;
                }
            }
        }
        self.log.push(probe);
        let excess = self.log.len().saturating_sub(KEPT);
        self.log.drain(..excess);
    }
}

/// The check of a container, if it has one.
pub(crate) fn check_of(container: &Container) -> Option<&HealthCheck> {
    let options = container.record.details.options.as_ref()?;
    options.health.as_ref().filter(|check| check.is_some())
}

/// Checks a container until this is dropped.
pub(crate) struct Checking {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checking {
    /// Begins, if the container has a check.
    pub fn begin(paths: &Paths, container: &Container) -> Option<Self> {
        let check = check_of(container)?.clone();
        let (stop, stopped) = channel();
        let checker = Checker {
            paths: paths.clone(),
            id: container.record.id.clone(),
            check,
        };
        let thread = std::thread::Builder::new()
            .name("health".to_owned())
            .spawn(move || checker.work(&stopped));
        Some(Self {
            stop: Some(stop),
            thread: thread.ok(),
        })
    }
}

impl Drop for Checking {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A check under way ends with its container.
            let _ = thread.join();
        }
    }
}

struct Checker {
    paths: Paths,
    id: String,
    check: HealthCheck,
}

impl Checker {
    fn work(&self, stopped: &Receiver<()>) {
        let or = |nanoseconds: Option<u64>, default| {
            let given = nanoseconds.filter(|nanoseconds| *nanoseconds > 0);
            given.map_or(default, Duration::from_nanos)
        };
        let check = &self.check;
        let interval = or(check.interval, INTERVAL);
        let timeout = or(check.timeout, TIMEOUT);
        let start_period = or(check.start_period, Duration::ZERO);
        let start_interval = or(check.start_interval, START_INTERVAL);
        let retries = check.retries.filter(|retries| *retries > 0);
        let retries = retries.unwrap_or(RETRIES);
        let begin = Instant::now();
        let mut health = Health {
            version: VERSION,
            ..Health::default()
        };
        self.keep(&health, true);
        loop {
            let is_new = begin.elapsed() < start_period;
            let pause = match is_new && health.status == HealthStatus::Starting {
                true => start_interval,
                false => interval,
            };
            if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let Ok(Some(container)) = container::load(&self.paths, &self.id) else {
                return;
            };
            match container.status.state {
                State::Running => {}
                // Nothing can be executed in it, which says nothing about its health.
                State::Paused | State::Creating => continue,
                State::Created | State::Stopped => return,
            }
            let start_ns = unix_time_ns();
            let (exit, output) = match probe(container, check, timeout) {
                Ok(found) => found,
                Err(error) => (-1, error.message),
            };
            // One that ends with its container found nothing out.
            if stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Empty) {
                return;
            }
            let before = health.status;
            let probe = Probe {
                start_ns,
                end_ns: unix_time_ns(),
                exit,
                output,
            };
            health.add(probe, retries, begin.elapsed() < start_period);
            self.keep(&health, health.status != before);
        }
    }

    /// Writes down what is known, and tells those who follow events when it is another state.
    fn keep(&self, health: &Health, is_other: bool) {
        let Ok(Some(container)) = container::load(&self.paths, &self.id) else {
            return;
        };
        if let Err(error) = health.write(&container) {
            tracing::warn!("{error}");
        }
        if let Some(sandbox) = container.record.sandbox.filter(|_| is_other) {
            let kind = EventKind::HealthStatus {
                container: self.id.clone(),
                status: health.status.name().to_owned(),
            };
            let appended = hull_sandbox::append_event(&sandbox, &Event::now(&sandbox.id, kind));
            if let Err(error) = appended {
                tracing::warn!("cannot log an event: {error}");
            }
        }
    }
}

/// Executes the check once: exit status and output.
fn probe(container: Container, check: &HealthCheck, timeout: Duration) -> Result<(i32, String)> {
    let options = ExecOptions {
        command: check.command().iter().map(OsString::from).collect(),
        ..ExecOptions::default()
    };
    let container = Any::Own(Box::new(container));
    let process = exec::process(&container, &options)?;
    let client = container.connect()?;
    let streams = client.streams(&Request::Exec(Box::new(process)))?;
    let mut output = Vec::new();
    let exit = follow(&client, streams, &mut output, Instant::now() + timeout)?;
    let output = String::from_utf8_lossy(&output).into_owned();
    Ok(match exit {
        Some(status) => (status, output),
        None => {
            // What it left is the guest's to end; the connection ends with us.
            client.tell(&Request::Forward(SIGKILL), &[])?;
            (-1, format!("Health check exceeded timeout ({timeout:?})"))
        }
    })
}

/// Reads what a process prints until it has ended; `None` when it takes too long.
fn follow(
    client: &Client,
    mut streams: Vec<OwnedFd>,
    output: &mut Vec<u8>,
    end: Instant,
) -> Result<Option<i32>> {
    let mut buffer = [0; 4096];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let mut descriptors = vec![PollFd::new(client, PollFlags::IN)];
        descriptors.extend(
            streams
                .iter()
                .map(|stream| PollFd::new(stream, PollFlags::IN)),
        );
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "wait for a health check"),
        }
        let ready: Vec<bool> = descriptors
            .iter()
            .map(|descriptor| !descriptor.revents().is_empty())
            .collect();
        drop(descriptors);
        for index in (0..streams.len()).rev() {
            if !ready[index + 1] {
                continue;
            }
            match rustix::io::read(streams[index].as_fd(), &mut buffer) {
                Ok(0) => drop(streams.remove(index)),
                Ok(length) => {
                    let room = MOST_OUTPUT.saturating_sub(output.len()).min(length);
                    output.extend_from_slice(&buffer[..room]);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => drop(streams.remove(index)),
            }
        }
        // All that it wrote is in the streams by then.
        if ready[0] && streams.is_empty() {
            return match client.receive()?.message {
                Reply::Exited(exit) => Ok(Some(exit.status)),
                Reply::Failed(error) => Err(error),
                other => Err(unexpected(&other)),
            };
        }
        if ready[0] && !ready[1..].iter().any(|ready| *ready) {
            // A child of it keeps them open.
            streams.clear();
        }
    }
}

/// Reads a duration of `--health-interval` and the like: 0, or at least a millisecond.
pub fn duration(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("invalid duration {text:?}: give 30s, 1m30s or the like");
    if text == "0" {
        return Ok(0);
    }
    let duration = crate::time::parse_duration(text).ok_or_else(wrong)?;
    match duration.is_zero() || duration >= Duration::from_millis(1) {
        true => u64::try_from(duration.as_nanos()).map_err(|_| wrong()),
        false => Err(format!("invalid duration {text:?}: at least 1ms")),
    }
}

/// The check that options and image make together; the options win.
pub(crate) fn settle(
    asked: Option<HealthCheck>,
    image: Option<&HealthCheck>,
) -> Option<HealthCheck> {
    // Said by either: there is none.
    let is_none = |check: &HealthCheck| check.test.first().is_some_and(|first| first == "NONE");
    let image = image.filter(|image| !is_none(image));
    let Some(asked) = asked else {
        return image.cloned();
    };
    if is_none(&asked) {
        return None;
    }
    let image = image.cloned().unwrap_or_default();
    Some(HealthCheck {
        test: match asked.test.is_empty() {
            true => image.test,
            false => asked.test,
        },
        interval: asked.interval.or(image.interval),
        timeout: asked.timeout.or(image.timeout),
        start_period: asked.start_period.or(image.start_period),
        start_interval: asked.start_interval.or(image.start_interval),
        retries: asked.retries.or(image.retries),
    })
}

/// Times that ask for a check of an image that has none.
///
/// # Errors
/// There is no command.
pub(crate) fn require(check: &Option<HealthCheck>) -> Result<()> {
    match check {
        Some(check) if !check.is_some() => Err(Error::invalid(
            "there is no health check: neither --health-cmd nor one of the image",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(exit: i32) -> Probe {
        Probe {
            start_ns: 1,
            end_ns: 2,
            exit,
            output: String::new(),
        }
    }

    #[test]
    fn so_many_failures_in_a_row_are_no_health_and_one_success_is() {
        let mut health = Health::default();
        for (exit, is_new, status, streak) in [
            (1, true, HealthStatus::Starting, 0),
            (1, false, HealthStatus::Starting, 1),
            (0, false, HealthStatus::Healthy, 0),
            (1, false, HealthStatus::Healthy, 1),
            (-1, false, HealthStatus::Unhealthy, 2),
            (1, true, HealthStatus::Unhealthy, 3),
            (0, true, HealthStatus::Healthy, 0),
        ] {
            health.add(probe(exit), 2, is_new);
            assert_eq!((health.status, health.failing_streak), (status, streak));
        }
        assert_eq!(health.log.len(), KEPT);
    }

    #[test]
    fn options_win_over_the_image() {
        let of = |test: &[&str], interval| HealthCheck {
            test: test.iter().map(|&word| word.to_owned()).collect(),
            interval,
            ..HealthCheck::default()
        };
        let image = of(&["CMD", "true"], Some(1));
        assert_eq!(settle(None, Some(&image)), Some(image.clone()));
        assert_eq!(settle(Some(of(&["NONE"], None)), Some(&image)), None);
        let asked = settle(Some(of(&[], Some(2))), Some(&image));
        assert_eq!(asked, Some(of(&["CMD", "true"], Some(2))));
        assert!(require(&settle(Some(of(&[], Some(2))), None)).is_err());
        assert_eq!(settle(None, Some(&of(&["NONE"], None))), None);
    }

    #[test]
    fn durations() {
        for (text, nanoseconds) in [("0", 0), ("1ms", 1_000_000), ("1m30s", 90_000_000_000)] {
            assert_eq!(duration(text), Ok(nanoseconds));
        }
        for text in ["", "x", "5", "1us", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
