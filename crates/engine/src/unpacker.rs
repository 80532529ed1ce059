//! Unpacks layers of images in a process of its own, jailed: it parses what a registry sent.
//!
//! The process is this executable in the hidden role [`ROLE`]. Its archive is standard input, its
//! answer standard output; the file for the archive's skeleton and the directories follow as
//! descriptors.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use hull_image::Store;
use hull_image::unpack::process::{Job, Running, Unpacker, run};
use hull_jail::{
    self as jail, Confinement, Directory, JailSpec, Limits, Role, Root, Started, Status,
    UNPACK_CAPABILITIES,
};
use hull_sandbox::shares;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;

use crate::config::Config;
use crate::error::{Context, Error, Result, of_image};

/// The hidden subcommand of the process.
pub const ROLE: &str = "unpack-process";

/// Number of the file that the skeleton of the archive goes to.
const SKELETON: RawFd = 3;

/// Number of the first directory, that of the layer; those of the layers below follow.
const FIRST_DIRECTORY: RawFd = 4;

/// Files that the process may have open, beside the directories.
const OPEN_FILES: u64 = 1024;

/// The image store of a configuration, which unpacks so.
///
/// # Errors
/// Its directory cannot be created.
pub fn store(config: &Config) -> Result<Store> {
    let limits = hull_image::Limits::with(config.image_max_size, config.image_max_inodes);
    let store = Store::open(config.data_dir.join("images")).map_err(of_image)?;
    Ok(store.with_limits(limits).with_unpacker(Arc::new(Jailed)))
}

/// Starts jailed processes.
#[derive(Debug)]
pub struct Jailed;

impl Unpacker for Jailed {
    fn start(&self, job: Job<'_>) -> io::Result<Box<dyn Running>> {
        let detached = |directory, read_only| {
            shares::directory(directory, read_only).map_err(|error| {
                io::Error::other(format!(
                    "cannot make a mount of the layer's directory (Linux 5.12, CAP_SYS_ADMIN): \
                     {error}"
                ))
            })
        };
        let root = detached(job.root, false)?;
        let lower = job
            .lower
            .iter()
            .map(|lower| detached(*lower, true))
            .collect::<io::Result<Vec<_>>>()?;
        let executable = File::open("/proc/self/exe")?;
        // Not standard error: a terminal can be read from and written to.
        let mut fds = vec![(job.archive, 0), (job.answer, 1), (job.skeleton, SKELETON)];
        let directories = [&root].into_iter().chain(&lower);
        fds.extend(directories.map(AsFd::as_fd).zip(FIRST_DIRECTORY..));
        let started = jail::spawn(JailSpec {
            name: "the process that unpacks a layer",
            executable: executable.as_fd(),
            argv: vec![
                "hull".into(),
                ROLE.into(),
                lower.len().to_string().into(),
                job.task.into(),
            ],
            env: Vec::new(),
            fds,
            fixed_addresses: false,
            // The executable is our own: it confines itself, first thing.
            confinement: None,
        })
        .map_err(io::Error::other)?;
        Ok(Box::new(Process(started)))
    }
}

struct Process(Started);

impl Running for Process {
    fn wait(self: Box<Self>) -> String {
        let pidfd = self.0.pidfd.as_fd();
        let mut events = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
        let waited = rustix::io::retry_on_intr(|| rustix::event::poll(&mut events, None));
        match waited.and_then(|_| Status::reap(pidfd)) {
            Ok(Some(status)) => format!("it ended with {status}"),
            Ok(None) => "it does not end".to_owned(),
            Err(errno) => format!("how it ended is not known: {errno}"),
        }
    }
}

/// The process: confines itself, and unpacks. `arguments` are the number of layers below and the
/// task.
///
/// # Errors
/// It was not started as [`Jailed`] does, or cannot be confined, or its answer not be written.
pub fn main(arguments: &[String]) -> Result<()> {
    let [lower, task] = arguments else {
        return Err(Error::new("internal command: two arguments are needed"));
    };
    let lower: RawFd = lower
        .parse()
        .context(|| "read the number of lower directories")?;
    let skeleton = File::from(take(SKELETON, FileType::RegularFile)?);
    let directories = take_directories(lower)?;
    let open_files = OPEN_FILES.saturating_add(directories.len() as u64);
    let confinement = Confinement {
        role: Role::Unpack,
        // What is unpacked belongs to the users that the archive names.
        uid: 0,
        gid: 0,
        capabilities: UNPACK_CAPABILITIES,
        root: Root {
            proc: true,
            directories,
            ..Root::default()
        },
        limits: Limits::open_files(open_files),
        isolate_branches: false,
    };
    jail::enter("the process that unpacks a layer", &confinement)
        .context(|| "confine the process that unpacks a layer")?;
    let directories = confinement.root.directories.into_iter();
    let mut directories = directories.map(|one| one.directory);
    let root = directories
        .next()
        .ok_or_else(|| Error::new("internal command: the layer's directory is needed"))?;
    let lower: Vec<OwnedFd> = directories.collect();
    let (archive, answer) = (io::stdin().lock(), io::stdout());
    run(task, archive, answer, skeleton, root, &lower).context(|| "unpack a layer")
}

/// The directories that this process has inherited: the layer's, and those of the layers below.
fn take_directories(lower: RawFd) -> Result<Vec<Directory>> {
    let directory = |fd: RawFd| {
        Ok(Directory {
            directory: take(fd, FileType::Directory)?,
            writable: fd == FIRST_DIRECTORY,
        })
    };
    let end = FIRST_DIRECTORY.saturating_add(lower).saturating_add(1);
    (FIRST_DIRECTORY..end).map(directory).collect()
}

/// Takes over an inherited descriptor of this type.
#[allow(unsafe_code)]
fn take(fd: RawFd, expected: FileType) -> Result<OwnedFd> {
    // SAFETY: only looked at.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let found = rustix::fs::fstat(borrowed).context(|| "take over the descriptors")?;
    if FileType::from_raw_mode(found.st_mode) != expected {
        return Err(Error::new(format!(
            "internal command: descriptor {fd} is of another type"
        )));
    }
    // SAFETY: it is open, and was inherited for this: nobody else in this process has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
