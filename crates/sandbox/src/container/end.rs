//! The end of a container: awaited from its creation on, written down, and cleaned up after.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Container, Stage};
use crate::config::Removal;
use crate::error::Error;
use crate::guest::hub::Carriers;
use crate::network;
use crate::sandbox::Ready;
use crate::store::{Exit, State, remove_all};

/// From creation to the end of the init, and of what is left then.
pub(super) async fn live(ready: Ready, container: Arc<Container>, mut carriers: Option<Carriers>) {
    let sandbox = &container.sandbox;
    let exit = tokio::select! {
        biased;
        down = sandbox.down() => Exit::because(down.status, down.reason),
        exit = ended_in_guest(&ready, &container) => exit,
    };
    if let Some(carriers) = &mut carriers {
        let mut unread = container.unread.subscribe();
        tokio::select! {
            () = carriers.done() => {}
            _ = sandbox.down() => {}
            // Output that nobody reads must not keep a container that is removed.
            _ = unread.wait_for(|unread| *unread) => {}
        }
        // Finished, or stuck with a client that does not read from a container that is no more.
        carriers.abort();
    }
    let last = sandbox.change(|containers| {
        containers.alive -= 1;
        containers.alive == 0
    });
    if last && sandbox.ends_with_last_container() {
        // The machine ends with it, and with that everything.
        sandbox.down().await;
    } else {
        let leaving = async {
            sandbox
                .release_network_of(&container.id, &ready.agent)
                .await;
            if let Err(error) = ready.agent.delete(&container.id).await {
                tracing::debug!("{error}");
            }
            sandbox.remove_shares(&container.shares).await;
        };
        tokio::select! {
            () = leaving => {}
            _ = sandbox.down() => {}
        }
    }
    container.emit_exit("", &exit);
    container.conclude(&exit);
    if container.removal.is_some() || container.deleted.load(Ordering::Relaxed) {
        container.forget();
    }
    container.stage.send_replace(Stage::Ending(exit.clone()));
    sandbox.change(|containers| containers.unconcluded -= 1);
    if sandbox.is_down_now() {
        // Who learns of the end finds nothing of the sandbox left.
        sandbox.gone().await;
    }
    if let Some(hub) = &container.hub {
        hub.finish().await;
    }
    container.stage.send_replace(Stage::Stopped(exit));
}

async fn ended_in_guest(ready: &Ready, container: &Container) -> Exit {
    match ready.agent.wait(&container.id, "").await {
        Ok(exit) => exit,
        Err(error) => container.sandbox.exit_without_answer(error).await,
    }
}

impl Container {
    /// Leaves of a container that has ended what is to be left.
    fn conclude(&self, exit: &Exit) {
        if let Some(removal) = &self.removal {
            // Its removal by hand undoes what plugins could not.
            if !network::is_attached(&self.directory) {
                return remove(&self.id, removal);
            }
        }
        let mut status = self.status();
        status.state = State::Stopped;
        status.exit = Some(exit.clone());
        status.processes = Default::default();
        // An engine that has removed the container does not want to know.
        if let Err(error) = status.write(&self.directory)
            && self.directory.is_there()
        {
            tracing::error!("{error}");
        }
    }
}

/// Removes what is left of a container.
fn remove(id: &str, removal: &Removal) {
    let mut errors = Vec::new();
    errors.extend(remove_all(&removal.directory).err());
    for link in &removal.links {
        let leads_to_it = std::fs::read_link(link).is_ok_and(|to| to == Path::new(id));
        if leads_to_it && let Err(error) = std::fs::remove_file(link) {
            errors.push(Error::new(format!(
                "cannot remove {}: {error}",
                link.display()
            )));
        }
    }
    for error in errors {
        tracing::error!("{error}");
    }
}
