//! Copies from and to a container that is in no guest. A thread whose root is the container's, with
//! its volumes, packs and unpacks as the agent does for one that runs.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use hull_sandbox::control::protocol::CopyRequest;
use hull_sandbox::shares::{Disk, Mounted, Overlay, enter};

use crate::container::{self, Container};
use crate::error::{Context, Error, Result};
use crate::paths::Paths;
use crate::volumes::store::{self, Located};
use crate::volumes::{self, Volume};

/// The thread; waited for when this is dropped.
pub(super) struct Worker(Option<JoinHandle<Result<()>>>);

impl Worker {
    /// Starts it: it reads from the stream, or writes to it.
    pub(super) fn start(
        paths: &Paths,
        container: &Container,
        request: CopyRequest,
        stream: UnixStream,
    ) -> Result<Self> {
        let job = Job::new(paths, container, request)?;
        let thread = thread::Builder::new().name("copy".to_owned());
        let started = thread.spawn(move || job.work(stream));
        started
            .map(|thread| Self(Some(thread)))
            .context(|| "start a thread")
    }

    /// Waits for its result.
    pub(super) fn result(&mut self) -> Result<()> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::new("the copying thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Who wanted to know its result has asked.
        let _ = self.result();
    }
}

/// The volumes of a container; an older hull wrote down only their notation.
fn volumes(container: &Container) -> Vec<Volume> {
    let details = &container.record.details;
    match &details.options {
        Some(options) => options.volumes.clone(),
        None => details
            .volumes
            .iter()
            .filter_map(|text| volumes::volume(text.as_ref()).ok())
            .collect(),
    }
}

struct Job {
    container: Container,
    request: CopyRequest,
    mounted: Vec<Mounted>,
    /// Volumes that cannot be had, by their places in the container, with the reason.
    unavailable: Vec<(PathBuf, Error)>,
    /// What some of their sources are paths of.
    _located: Vec<Located>,
    read_only: bool,
}

impl Job {
    fn new(paths: &Paths, container: &Container, request: CopyRequest) -> Result<Self> {
        let container = Container::load(container.directory.path())?
            .ok_or_else(|| Error::not_found("the container was removed"))?;
        let (mut mounted, mut located, mut unavailable) = (Vec::new(), Vec::new(), Vec::new());
        for (index, volume) in volumes(&container).into_iter().enumerate() {
            let source = store::prepare(paths, &volume)
                .and_then(|()| store::source(paths, container.directory.path(), index, &volume));
            match source {
                Ok(found) => {
                    mounted.push(Mounted {
                        source: found.path.clone(),
                        destination: volume.destination,
                        read_only: volume.read_only,
                    });
                    located.push(found);
                }
                Err(error) => unavailable.push((volume.destination, error)),
            }
        }
        mounted.sort_by_key(|mounted| mounted.destination.components().count());
        let read_only = request.into
            && match &container.record.details.options {
                Some(options) => options.read_only,
                None => container::config(&container.directory)?["root"]["readonly"] == true,
            };
        Ok(Self {
            container,
            request,
            mounted,
            unavailable,
            _located: located,
            read_only,
        })
    }

    fn work(&self, stream: UnixStream) -> Result<()> {
        let directory = &self.container.directory;
        // One at a time: an overlay is mounted once.
        let _lock = container::lock(&self.container)?;
        let now = Container::load(directory.path())?;
        if now.is_none_or(|now| now.record.sandbox_lives()) {
            return Err(Error::wrong_state(
                "the container was started or removed meanwhile",
            ));
        }
        let path = directory.path();
        let file = path.join("layer.img");
        let disk = file.exists().then(|| Disk {
            file,
            place: path.join("layer"),
            // It has its size.
            size: u64::MAX,
        });
        let parent = disk.as_ref().map_or(path, |disk| &disk.place);
        let details = &self.container.record.details;
        // That of an overlay which was volatile cannot be used again.
        let work = match details.auto_remove {
            true => "work.copy",
            false => "work",
        };
        let overlay = Overlay {
            layers: &details.layers,
            upper: parent.join("upper"),
            work: parent.join(work),
            volatile: false,
            disk: disk.clone(),
        };
        let missing = enter(&overlay, self.read_only, &self.mounted, path)?;
        let path = Path::new(&self.request.path);
        // What is elsewhere can be had without a volume that is no more.
        let unavailable = self.unavailable.iter().cloned();
        if let Some((_, error)) = missing
            .into_iter()
            .chain(unavailable)
            .find(|(place, _)| path.starts_with(place))
        {
            return Err(error);
        }
        let (copied, what) = match self.request.into {
            true => (hull_archive::unpack(path, stream), "copy to"),
            false => (
                hull_archive::pack(path, self.request.follow, stream),
                "copy from",
            ),
        };
        copied.map_err(|error: io::Error| {
            let told = Error::from_chain(&error);
            let why = told.message.split(" (os error").next().unwrap_or_default();
            let why = match error.kind() {
                io::ErrorKind::ReadOnlyFilesystem => "read-only file system",
                _ => why,
            };
            Error::with_kind(told.kind, format!("cannot {what} {path:?}: {why}"))
        })
    }
}
