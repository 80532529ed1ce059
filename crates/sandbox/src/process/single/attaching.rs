//! The container's network beside the boot of its guest: plugins at work on a thread of their own, or pasta; and in the end, what
//! plugins made is undone.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_network::pasta::Pasta;
use rustix::event::{EventfdFlags, eventfd};
use tokio::task::JoinHandle;

use crate::attachment::{self, Attached};
use crate::error::{Context, Failure, Result};
use crate::process::container::Container;
use crate::request::AttachRequest;

/// Whoever is at work on the container's network: plugins, on a thread of their own, or pasta.
pub struct Attaching {
    task: JoinHandle<Result<Attached>>,
    /// Ends plugins. Pasta ends with the task.
    cancel: Option<Arc<OwnedFd>>,
}

/// Has the container's network attached, if it has one.
pub fn attach(container: &Arc<Container>) -> Result<Option<Attaching>> {
    let cni = match container.request().network.attach.clone() {
        None => return Ok(None),
        Some(AttachRequest::Container { id }) => {
            return Err(Failure::new(format!(
                "container {id} has a machine, which has to be asked for its network"
            )));
        }
        Some(AttachRequest::Pasta(request)) => {
            return Ok(Some(Attaching {
                task: tokio::spawn(attachment::attach_by_pasta(&request)?),
                cancel: None,
            }));
        }
        Some(AttachRequest::Cni(cni)) => cni,
    };
    let cancel = eventfd(0, EventfdFlags::CLOEXEC).context(|| "make an event".into())?;
    let cancel = Arc::new(cancel);
    let (container, cancelled) = (container.clone(), cancel.clone());
    let task = tokio::task::spawn_blocking(move || {
        attachment::attach(&container.paths(), container.id(), &cni, cancelled)
    });
    Ok(Some(Attaching {
        task,
        cancel: Some(cancel),
    }))
}

/// Waits until the network is attached.
///
/// # Errors
/// A plugin's, or pasta's.
pub async fn finished(attaching: &mut Attaching) -> Result<Attached> {
    let attached = (&mut attaching.task)
        .await
        .map_err(|error| Failure::new(format!("cannot attach the network: {error}")));
    attached.flatten().map_err(Failure::of_no_guest)
}

/// Ends whoever is at work on a network that nobody needs any more, so that what plugins made can be undone.
pub async fn settle(attaching: Option<Attaching>) {
    if let Some(Attaching { task, cancel }) = attaching
        && !task.is_finished()
    {
        match cancel {
            Some(cancel) => {
                if let Err(error) = rustix::io::write(&*cancel, &1u64.to_ne_bytes()) {
                    tracing::error!("cannot end network plugins: {error}");
                }
            }
            None => task.abort(),
        }
        // Its failure is not the one to be told.
        let _ = task.await;
    }
}

/// Keeps the carrier of a container's connections until this process ends, and says so if it ends before.
pub async fn keep(pasta: Pasta) {
    let said = pasta.ended().await;
    tracing::error!("the container has no network any more: pasta has ended: {said}");
}

/// Lets plugins undo what they made of the container's network.
pub fn undo_network(container: &Container) -> JoinHandle<Result<()>> {
    let files = container.paths();
    tokio::task::spawn_blocking(move || attachment::undo(&files))
}

/// Waits until that is done. What plugins cannot is tried again by the container's removal.
pub async fn undone(undoing: JoinHandle<Result<()>>) {
    if let Ok(Err(failure)) = undoing.await {
        tracing::error!("{failure}");
    }
}
