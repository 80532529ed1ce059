//! Where hull keeps things on the host. Called by everything that opens a file of hull's; creates nothing itself.

use std::path::{Path, PathBuf};

/// The two directories everything lives under.
///
/// ```text
/// RUN/<id>/           state of one container, gone after a reboot
///     lock            held (flock) by the sandbox process until the container has ended
///     request.json    what was asked for, as the sandbox process received it
///     state.json      the record: what `ps` and `inspect` show
///     spec.json       the OCI spec that the agent received
///     sandbox.sock    calls and attachments
///     console         ring buffer of the guest's console
///     sandbox.log     what the host processes of this container had to say
///     devices/        sockets between the machine and the device process
///     etc/            hosts, hostname, resolv.conf of the container
///     network.json    what network plugins are to undo
/// RUN/names/<name>    symbolic link to the id that owns the name
/// DATA/containers/<id>/{upper,work,log}
///                     writable layer and output of one container
/// DATA/…              images and layers, see crate image
/// ```
#[derive(Debug, Clone)]
pub struct Paths {
    run: PathBuf,
    data: PathBuf,
}

impl Paths {
    /// `run` is for state (default `/run/hull`), `data` for images and writable layers (default `/var/lib/hull`).
    pub fn new(run: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Self {
            run: run.into(),
            data: data.into(),
        }
    }

    /// The directory of run-time state.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The directory of images and writable layers.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Directory of links from names to ids.
    pub fn names(&self) -> PathBuf {
        self.run.join("names")
    }

    /// State directory of one container.
    pub fn container(&self, id: &str) -> ContainerPaths {
        ContainerPaths {
            run: self.run.join(id),
            data: self.data.join("containers").join(id),
        }
    }
}

/// The files of one container: see [`Paths`].
#[derive(Debug, Clone)]
pub struct ContainerPaths {
    /// Its directory of run-time state.
    pub run: PathBuf,
    /// Its directory of writable layer and log.
    pub data: PathBuf,
}

impl ContainerPaths {
    /// Held (flock) by the sandbox process while it lives.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// The request, as written by the command that made the container.
    pub fn request(&self) -> PathBuf {
        self.run.join("request.json")
    }

    /// The record.
    pub fn state(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// The OCI spec that the agent received.
    pub fn spec(&self) -> PathBuf {
        self.run.join("spec.json")
    }

    /// Socket for calls and attachments.
    pub fn socket(&self) -> PathBuf {
        self.run.join("sandbox.sock")
    }

    /// Ring buffer of the guest's console.
    pub fn console(&self) -> PathBuf {
        self.run.join("console")
    }

    /// Messages of the host processes.
    pub fn diagnostics(&self) -> PathBuf {
        self.run.join("sandbox.log")
    }

    /// Sockets between machine and device process.
    pub fn devices(&self) -> PathBuf {
        self.run.join("devices")
    }

    /// What network plugins made, or are about to make, as long as it is not undone.
    pub fn network(&self) -> PathBuf {
        self.run.join("network.json")
    }

    /// hosts, hostname, resolv.conf.
    pub fn etc(&self) -> PathBuf {
        self.run.join("etc")
    }

    /// Where the sandbox process mounts, in a mount namespace of its own.
    pub fn mounts(&self) -> PathBuf {
        self.run.join("mounts")
    }

    /// Upper directory of the container's overlay.
    pub fn upper(&self) -> PathBuf {
        self.data.join("upper")
    }

    /// Work directory of the container's overlay.
    pub fn work(&self) -> PathBuf {
        self.data.join("work")
    }

    /// Output of the container.
    pub fn log(&self) -> PathBuf {
        self.data.join("log")
    }
}
