//! Copies files between a stream and a container, as seen from inside it. Called by `service`.
//!
//! The work is done by a forked child that has entered the container's root: every path in it, and
//! every symbolic link on the way, means what it means to the container, volumes and all, and
//! cannot lead out. It is in no namespace of the container, so nothing in there can see or stop it.
//! The crate `hull-archive` handles the format.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hull_protocol::agent::CopyRequest;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use ttrpc::Code;

use crate::processes::reaper::Reaper;
use crate::rpc::status::{Failure, Result, plain_text};

/// Longest error that the child reports.
const REPORT_LIMIT: usize = 2048;

/// Direction of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the container to the stream.
    Out,
    /// From the stream into the container.
    In,
}

/// Copies, and returns when all is done. `pid` is a process of the container.
pub async fn run(
    reaper: &Reaper,
    pid: u32,
    direction: Direction,
    request: &CopyRequest,
    stream: OwnedFd,
) -> Result<()> {
    if !request.path.starts_with('/') || request.path.contains('\0') {
        return Err(Failure::invalid(format!(
            "invalid path {:?}: it is not absolute",
            request.path
        )));
    }
    let failed = |what: &str, error: io::Error| Failure::internal(what, &error);
    let root = open_directory(&format!("/proc/{pid}/root"))
        .map_err(|e| failed("open the container's root", e))?;
    let user_namespace = foreign_user_namespace(pid)
        .map_err(|e| failed("open the container's user namespace", e))?;
    let (report, reporter) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("make a pipe", e.into()))?;
    // The child uses blocking I/O.
    rustix::fs::fcntl_setfl(&stream, OFlags::empty())
        .map_err(|e| failed("set up a stream", e.into()))?;

    let guard = reaper.spawn_guard();
    // SAFETY: the agent has one thread, so the child is a complete copy in which all of Rust may be
    // used. It never returns into the event loop: it exits, without running destructors.
    let child = unsafe { libc::fork() };
    match child {
        -1 => return Err(failed("fork", io::Error::last_os_error())),
        0 => {
            // A host that no longer reads is an error like any other.
            // SAFETY: only a disposition of this process is changed.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
            let job = Job {
                root,
                user_namespace,
                stream,
                reporter,
                direction,
                request,
            };
            let status = match job.work() {
                Ok(()) => 0,
                Err(failure) => {
                    // If this fails, the exit status has to do.
                    let _ = File::from(job.reporter).write_all(&encode(&failure));
                    1
                }
            };
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(status) }
        }
        _ => {}
    }
    drop((stream, reporter, root, user_namespace));
    let mut exit = reaper.register(child.unsigned_abs(), None);
    drop(guard);
    let status = match exit.wait_for(Option::is_some).await {
        Ok(exit) => exit.map_or(255, |exit| exit.status),
        Err(_closed) => 255,
    };
    if status == 0 {
        return Ok(());
    }
    let mut message = Vec::new();
    let _ = File::from(report)
        .take(REPORT_LIMIT as u64)
        .read_to_end(&mut message);
    Err(decode(&message, status))
}

fn open_directory(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
}

/// The user namespace of a process, if it is not the agent's: ids in archives are then the
/// container's.
fn foreign_user_namespace(pid: u32) -> io::Result<Option<OwnedFd>> {
    let theirs = File::open(format!("/proc/{pid}/ns/user"))?;
    let ours = fs::metadata("/proc/self/ns/user")?;
    Ok((theirs.metadata()?.ino() != ours.ino()).then(|| theirs.into()))
}

/// The child's work.
struct Job<'a> {
    root: OwnedFd,
    user_namespace: Option<OwnedFd>,
    stream: OwnedFd,
    reporter: OwnedFd,
    direction: Direction,
    request: &'a CopyRequest,
}

impl Job<'_> {
    fn work(&self) -> Result<()> {
        let failed = |error: io::Error| Failure::internal("enter the container", &error);
        self.enter().map_err(failed)?;
        let path = Path::new(&self.request.path);
        let stream = File::from(self.stream.as_fd().try_clone_to_owned().map_err(failed)?);
        match self.direction {
            Direction::Out => hull_archive::pack(path, self.request.follow, stream),
            Direction::In => hull_archive::unpack(path, stream),
        }
        .map_err(|error| {
            let what = match self.direction {
                Direction::Out => "copy from",
                Direction::In => "copy to",
            };
            let code = match error.kind() {
                io::ErrorKind::NotFound => Code::NOT_FOUND,
                io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidData => Code::INVALID_ARGUMENT,
                _ => Code::INTERNAL,
            };
            Failure::new(
                code,
                format!("cannot {what} {path:?}: {}", plain_text(&error)),
            )
        })
    }

    fn enter(&self) -> io::Result<()> {
        self.close_others();
        rustix::process::fchdir(&self.root)?;
        if let Some(namespace) = &self.user_namespace {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None)?;
        }
        rustix::process::chroot(".")?;
        Ok(())
    }

    /// The agent's descriptors would keep other streams and pipes open.
    fn close_others(&self) {
        let mut kept: Vec<u32> = [
            Some(&self.root),
            self.user_namespace.as_ref(),
            Some(&self.stream),
            Some(&self.reporter),
        ]
        .into_iter()
        .flatten()
        .map(|fd| fd.as_raw_fd().unsigned_abs())
        .collect();
        kept.sort_unstable();
        let mut first = 3;
        for last in kept.iter().map(|fd| fd - 1).chain([u32::MAX]) {
            if first <= last {
                // SAFETY: what is closed is used by nothing that still runs in this process.
                unsafe { libc::close_range(first, last, 0) };
            }
            first = last.saturating_add(2);
        }
    }
}

fn encode(failure: &Failure) -> Vec<u8> {
    let mut bytes = vec![failure.code as i32 as u8];
    bytes.extend(failure.message.bytes().take(REPORT_LIMIT - 1));
    bytes
}

fn decode(bytes: &[u8], status: i32) -> Failure {
    let code = match bytes.first() {
        Some(&code) if i32::from(code) == Code::NOT_FOUND as i32 => Code::NOT_FOUND,
        Some(&code) if i32::from(code) == Code::INVALID_ARGUMENT as i32 => Code::INVALID_ARGUMENT,
        Some(_) => Code::INTERNAL,
        None => {
            return Failure::new(
                Code::INTERNAL,
                format!("copying ended with status {status}"),
            );
        }
    };
    Failure::new(code, String::from_utf8_lossy(&bytes[1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_cross_the_pipe() {
        for failure in [
            Failure::new(Code::NOT_FOUND, "a"),
            Failure::invalid("ü"),
            Failure::new(Code::INTERNAL, ""),
        ] {
            assert_eq!(decode(&encode(&failure), 1), failure);
        }
        assert_eq!(decode(b"", 137).code, Code::INTERNAL);
    }
}
