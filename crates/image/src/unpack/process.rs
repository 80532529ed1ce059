//! Unpacking in a process of its own, which parses what a registry sent so that this one does not.
//!
//! The store hands an archive, as it came, to an [`Unpacker`]: the caller's way to start the
//! process, jailed. That calls [`run`] with what it was given. Without an unpacker the store
//! unpacks by itself.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use super::attributes::failed;
use super::skeleton::Skeleton;
use super::{LayerError, TarError, Unpacked, compression, unpack_recorded};
use crate::digest::{Digest, HashingReader};
use crate::limits::{Budget, Disk, Low, Used};

/// Longest answer of the process, bytes: what the smallest pipe holds (PIPE_BUF), so that it can be
/// written before anybody reads it.
const ANSWER: usize = 4096;

/// Size of the pipe for the archive, bytes: what any user may ask for (fs.pipe-max-size).
const ARCHIVE_PIPE: usize = 1 << 20;

/// Longest message in an answer, characters: those of JSON have up to six bytes.
const MESSAGE: usize = 512;

/// Most layers below one that the process is given: overlayfs takes 500 (OVL_MAX_STACK).
pub const MAX_LOWER: usize = 500;

/// What a process that unpacks a layer is given.
#[derive(Debug)]
pub struct Job<'a> {
    /// What it is to do, for [`run`].
    pub task: String,
    /// Where it reads the archive from, to the end.
    pub archive: BorrowedFd<'a>,
    /// Where its answer goes.
    pub answer: BorrowedFd<'a>,
    /// The empty file that it writes the archive's skeleton to.
    pub skeleton: BorrowedFd<'a>,
    /// The empty directory that it fills.
    pub root: BorrowedFd<'a>,
    /// The directories of the layers below, topmost first. It only reads them.
    pub lower: Vec<BorrowedFd<'a>>,
}

/// Starts processes that unpack layers.
pub trait Unpacker: fmt::Debug + Send + Sync {
    /// Starts one. It may not outlive this process.
    ///
    /// # Errors
    /// It cannot be started.
    fn start(&self, job: Job<'_>) -> io::Result<Box<dyn Running>>;
}

/// A process that unpacks a layer.
pub trait Running {
    /// Waits until it has ended; how it ended, for people.
    fn wait(self: Box<Self>) -> String;
}

/// An unpacked layer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Content {
    #[serde(flatten)]
    pub unpacked: Unpacked,
    /// Digest of the uncompressed archive.
    pub digest: Digest,
    /// Its length, bytes.
    pub length: u64,
    /// Whether the archive can be created again from its skeleton.
    pub recorded: bool,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Done {
        content: Content,
        used: Used,
    },
    Failed {
        message: String,
        full: bool,
        of_host: bool,
        low: Option<(bool, u64, u64)>,
    },
}

/// Unpacks an archive, compressed or not, into `root`, and writes its skeleton; in a process of its
/// own where there is an unpacker.
pub(crate) fn apply(
    archive: &mut impl BufRead,
    skeleton: File,
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
    unpacker: Option<&dyn Unpacker>,
) -> Result<Content, LayerError> {
    let Some(unpacker) = unpacker else {
        return here(archive, skeleton, root, lower, budget);
    };
    let failed = |error: io::Error| LayerError::Process(error.to_string());
    let task = serde_json::to_string(&budget.state()).map_err(|error| failed(error.into()))?;
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno: Errno| failed(errno.into()));
    let (archive_out, archive_in) = pipe()?;
    let (answer_out, answer_in) = pipe()?;
    // Fewer switches between the two; the host may allow less.
    let _ = rustix::pipe::fcntl_setpipe_size(&archive_in, ARCHIVE_PIPE);
    let running = unpacker
        .start(Job {
            task,
            archive: archive_out.as_fd(),
            answer: answer_in.as_fd(),
            skeleton: skeleton.as_fd(),
            root: root.as_fd(),
            lower: lower.iter().take(MAX_LOWER).map(AsFd::as_fd).collect(),
        })
        .map_err(failed)?;
    drop((archive_out, answer_in));
    let sent = send(archive, archive_in);
    let mut text = Vec::new();
    let read = File::from(answer_out)
        .take(ANSWER as u64)
        .read_to_end(&mut text);
    let ended = running.wait();
    // What keeps the archive from being read is the cause of all that follows.
    sent?;
    read.map_err(failed)?;
    match serde_json::from_slice(&text) {
        Ok(Answer::Done { content, used }) => {
            budget.set(used);
            Ok(content)
        }
        Ok(Answer::Failed { low: Some(low), .. }) => {
            let (inodes, free, reserve) = low;
            let unit = if inodes { "inodes" } else { "bytes" };
            Err(LayerError::Reserve(Low {
                unit,
                free,
                reserve,
            }))
        }
        Ok(Answer::Failed {
            message,
            full,
            of_host,
            ..
        }) => Err(LayerError::Reported {
            message,
            full,
            of_host,
        }),
        Err(_) => Err(LayerError::Process(ended)),
    }
}

/// Sends the archive until its end, or until the process does not want more.
fn send(archive: &mut impl BufRead, to: OwnedFd) -> Result<(), LayerError> {
    let mut to = File::from(to);
    loop {
        let bytes = match archive.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(TarError::from)?,
        };
        if bytes.is_empty() {
            return Ok(());
        }
        match to.write(bytes) {
            Ok(written) => archive.consume(written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It says why it has ended.
            Err(_) => return Ok(()),
        }
    }
}

fn here(
    archive: &mut impl BufRead,
    skeleton: File,
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
) -> Result<Content, LayerError> {
    let mut content = HashingReader::new(compression::uncompress(archive)?);
    let disk = rustix::io::fcntl_dupfd_cloexec(&root, 0).map_err(failed("open", b"/"))?;
    let skeleton = Skeleton::write_to(skeleton, Disk::new(disk, budget.reserve()));
    let (unpacked, recorded) = unpack_recorded(&mut content, root, lower, budget, skeleton)?;
    Ok(Content {
        unpacked,
        length: content.length(),
        digest: content.finish(),
        recorded,
    })
}

/// Does what the process is for: called in it, with what its [`Job`] had.
///
/// # Errors
/// The task cannot be read, or the answer not be written. That the archive is damaged is an answer.
pub fn run(
    task: &str,
    archive: impl Read,
    mut answer: impl Write,
    skeleton: File,
    root: OwnedFd,
    lower: &[OwnedFd],
) -> io::Result<()> {
    let mut budget = Budget::restore(serde_json::from_str(task)?);
    let mut archive = BufReader::with_capacity(256 * 1024, archive);
    let said = match here(&mut archive, skeleton, root, lower, &mut budget) {
        Ok(content) => Answer::Done {
            content,
            used: budget.used(),
        },
        Err(error) => Answer::Failed {
            message: error.to_string().chars().take(MESSAGE).collect(),
            full: error.is_full(),
            of_host: error.is_of_host(),
            low: match error {
                LayerError::Reserve(low) => Some((low.unit == "inodes", low.free, low.reserve)),
                _ => None,
            },
        },
    };
    let text = serde_json::to_vec(&said)?;
    answer.write_all(&text)?;
    answer.flush()
}
