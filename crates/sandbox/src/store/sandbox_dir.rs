//! The run-time directory of a sandbox: what says that it lives, and how it is reached.
//!
//! A sandbox is born with its lock held and its socket listening: both travel to the sandbox
//! process in its first message, so that from the moment of its launch it is alive to all others,
//! and gone when the launcher is killed before.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::Directory;
use super::directory::{remove_all, unless_missing};
use crate::cgroup;
use crate::error::{Context, Result};

/// Longest id of a sandbox, bytes: sockets below its directory have 107 bytes for their whole path.
pub const MAX_ID: usize = 64;

/// Name of the ring buffer of a guest's console; of a copy of it in a container's directory when
/// the guest broke down.
pub const CONSOLE_FILE: &str = "console";

/// Name of the file with messages of a sandbox's host processes; of its copy as well.
pub const MESSAGES_FILE: &str = "sandbox.log";

/// Where a sandbox is, whether or not it lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxPath {
    /// The directory of all sandboxes.
    pub sandboxes: PathBuf,
    /// Name of this one.
    pub id: String,
}

impl SandboxPath {
    /// The sandbox `id` below hull's directory of run-time state.
    pub fn new(run: &Path, id: &str) -> Self {
        Self {
            sandboxes: sandboxes(run),
            id: id.to_owned(),
        }
    }

    /// Its directory.
    pub fn directory(&self) -> PathBuf {
        self.sandboxes.join(&self.id)
    }

    /// Held (flock) by the sandbox process while it lives; holds its process id.
    pub fn lock(&self) -> PathBuf {
        self.directory().join("lock")
    }

    /// The socket of the control protocol.
    pub fn socket(&self) -> PathBuf {
        self.directory().join("control.sock")
    }

    /// Ring buffer of the guest's console.
    pub fn console(&self) -> PathBuf {
        self.directory().join(CONSOLE_FILE)
    }

    /// Messages of the sandbox's host processes.
    pub fn diagnostics(&self) -> PathBuf {
        self.directory().join(MESSAGES_FILE)
    }

    /// Sockets between machine and device process.
    pub fn devices(&self) -> PathBuf {
        self.directory().join("devices")
    }

    /// Where files that are shared alone are mounted for a moment.
    pub fn mounts(&self) -> PathBuf {
        self.directory().join("mounts")
    }

    fn launch_lock(&self) -> PathBuf {
        self.sandboxes.join(format!("{}.launch", self.id))
    }

    /// Whether the sandbox process lives: it holds its lock until nothing is left of the sandbox.
    pub fn is_alive(&self) -> bool {
        let Ok(file) = File::open(self.lock()) else {
            return false;
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => false,
            Err(error) => error == rustix::io::Errno::WOULDBLOCK,
        }
    }

    /// Waits for the end of the sandbox process.
    ///
    /// # Errors
    /// The lock cannot be waited for.
    pub fn wait_for_end(&self) -> Result<()> {
        match File::open(self.lock()) {
            Ok(file) => rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))
                .context(|| "wait for the end of the sandbox process"),
            Err(_) => Ok(()),
        }
    }

    /// Process id of the sandbox process, living or not; `None` before it has said it.
    pub fn pid(&self) -> Option<i32> {
        let text = fs::read_to_string(self.lock()).ok()?;
        text.trim().parse().ok()
    }

    /// Kills the sandbox process, if it lives. Its children die with it.
    ///
    /// # Errors
    /// It is not permitted.
    pub fn kill(&self) -> Result<()> {
        // Written by the process itself. One that has not come to that yet ends when it finds that
        // nobody is connected.
        let Some(pid) = self.pid().and_then(Pid::from_raw) else {
            return Ok(());
        };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(());
        };
        // As long as it lives nobody else has its id: what was opened is the process.
        match self.is_alive() {
            true => pidfd_send_signal(&pidfd, Signal::KILL)
                .context(|| format!("kill the sandbox process of {}", self.id)),
            false => Ok(()),
        }
    }

    /// Removes what a killed sandbox process left. Does nothing when it lives.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub fn sweep(&self) -> Result<()> {
        if !self.directory().exists() && !self.launch_lock().exists() {
            return Ok(());
        }
        // Nobody starts it meanwhile.
        let _lock = LaunchLock::take(self)?;
        self.sweep_locked()
    }

    /// Removes its control groups and its directory, which says what those are. The lock goes last:
    /// as long as it is there, who wants a sandbox of this name waits for who holds it.
    fn remove(&self) -> Result<()> {
        let directory = self.directory();
        cgroup::machine::remove(&directory)?;
        let doing = || format!("remove {}", directory.display());
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries.context(doing)?,
        };
        for entry in entries {
            let entry = entry.context(doing)?;
            match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => remove_all(&entry.path())?,
                false if entry.path() == self.lock() => {}
                false => unless_missing(fs::remove_file(entry.path())).context(doing)?,
            }
        }
        unless_missing(fs::remove_file(self.lock())).context(doing)?;
        match fs::remove_dir(&directory) {
            // The next one has it already.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => unless_missing(removed).context(doing),
        }
    }

    pub(crate) fn sweep_locked(&self) -> Result<()> {
        match self.is_alive() {
            true => Ok(()),
            false => self.remove(),
        }
    }
}

/// The directory of all sandboxes below hull's directory of run-time state.
pub fn sandboxes(run: &Path) -> PathBuf {
    run.join("sandboxes")
}

/// All sandboxes that live, in no order.
///
/// # Errors
/// The directory cannot be read.
pub fn living(run: &Path) -> Result<Vec<SandboxPath>> {
    let directory = sandboxes(run);
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("read {}", directory.display())),
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .map(|id| SandboxPath::new(run, &id))
        .filter(SandboxPath::is_alive)
        .collect())
}

/// The directory of a sandbox that lives, with its lock. Whoever owns it is the sandbox.
#[derive(Debug)]
pub struct SandboxDir {
    path: SandboxPath,
    lock: Mutex<Option<File>>,
}

impl SandboxDir {
    /// Creates the directory and takes its lock.
    ///
    /// # Errors
    /// It cannot be created. Waits for who only asks whether it lives.
    pub fn create(path: &SandboxPath) -> Result<Self> {
        let doing = || format!("lock {}", path.lock().display());
        let file = loop {
            Directory::create(&path.directory())?;
            match File::create(path.lock()) {
                // The one before has just removed its directory.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                file => break file.context(doing)?,
            }
        };
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive)).context(doing)?;
        Ok(Self {
            path: path.clone(),
            lock: Mutex::new(Some(file)),
        })
    }

    /// Takes over a directory whose lock this process was given, and writes down its process id.
    ///
    /// # Errors
    /// The lock cannot be written.
    pub fn adopt(path: &SandboxPath, mut lock: File) -> Result<Self> {
        // Who has to kill this process reads there which one it is.
        write!(lock, "{}", std::process::id()).context(|| "write the lock")?;
        Ok(Self {
            path: path.clone(),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &SandboxPath {
        &self.path
    }

    /// The lock, for the process that takes over the sandbox.
    pub(crate) fn into_lock(self) -> Option<File> {
        self.lock
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the directory and lets go of the lock: from then on the sandbox has ended to all.
    pub fn release(&self) {
        // While the lock is held nobody takes this directory for another sandbox's.
        if let Err(error) = self.path.remove() {
            tracing::error!("{error}");
        }
        let lock = &self.lock;
        drop(lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Decides between those who want to start the same sandbox.
pub(crate) struct LaunchLock {
    _file: File,
    path: PathBuf,
}

impl LaunchLock {
    pub(crate) fn take(sandbox: &SandboxPath) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let path = sandbox.launch_lock();
        let doing = || format!("lock {}", path.display());
        loop {
            let file = File::create(&path).context(doing)?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .context(doing)?;
            // Who had it before has removed it: then another file may have its name by now.
            let ours = file.metadata().context(doing)?;
            if fs::metadata(&path).is_ok_and(|there| there.ino() == ours.ino()) {
                return Ok(Self { _file: file, path });
            }
        }
    }
}

impl Drop for LaunchLock {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_sandbox_lives_as_long_as_its_lock_is_held() {
        let run = tempfile::tempdir().unwrap();
        let path = SandboxPath::new(run.path(), "one");
        assert!(!path.is_alive());
        let dir = SandboxDir::create(&path).unwrap();
        assert!(path.is_alive());
        assert_eq!(living(run.path()).unwrap(), std::slice::from_ref(&path));
        path.sweep().unwrap();
        assert!(path.directory().exists());
        dir.release();
        assert!(!path.is_alive() && !path.directory().exists());
        assert!(living(run.path()).unwrap().is_empty());
    }

    #[test]
    fn the_next_of_a_name_follows_at_once_on_one_that_ends() {
        let run = tempfile::tempdir().unwrap();
        let path = SandboxPath::new(run.path(), "one");
        let mut dir = SandboxDir::create(&path).unwrap();
        for _ in 0..300 {
            for name in ["console", "sandbox.log", "devices.json"] {
                fs::write(path.directory().join(name), "").unwrap();
            }
            fs::create_dir(path.devices()).unwrap();
            let next = std::thread::scope(|scope| {
                scope.spawn(|| dir.release());
                let next = scope.spawn(|| {
                    let _lock = LaunchLock::take(&path).unwrap();
                    path.wait_for_end().unwrap();
                    path.sweep_locked().unwrap();
                    SandboxDir::create(&path).unwrap()
                });
                next.join().unwrap()
            });
            assert!(path.is_alive());
            dir = next;
        }
    }

    #[test]
    fn what_a_killed_sandbox_left_is_swept() {
        let run = tempfile::tempdir().unwrap();
        let path = SandboxPath::new(run.path(), "one");
        drop(SandboxDir::create(&path).unwrap());
        assert!(path.directory().exists());
        path.sweep().unwrap();
        assert!(!path.directory().exists());
        // A launcher that was killed leaves its lock.
        File::create(path.launch_lock()).unwrap();
        path.sweep().unwrap();
        assert_eq!(fs::read_dir(sandboxes(run.path())).unwrap().count(), 0);
    }
}
