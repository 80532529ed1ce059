//! The network of a pod: at most one network namespace of the host, which the guest's own network is made of.
//!
//! It is connected as soon as an engine's side names it, while the guest boots; the guest is told before the first
//! container is created, and from then on the namespace is followed, and relays carry what concerns its loopback interface.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_network::Namespace;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::{Pod, Ready};
use crate::error::{Failure, Result};
use crate::process::loopback::{Forwarder, Resolver};
use crate::process::network::Network;
use crate::request::NetworkLimits;

/// How far it is.
#[derive(Debug, Default)]
pub enum Stage {
    /// Nobody has named a namespace.
    #[default]
    None,
    /// Connected; the guest does not know yet.
    Connected(Box<Network>, Option<Forwarder>),
    /// The guest has it, and gets what changes.
    Followed(Namespace, Following),
}

/// A task that follows a namespace.
#[derive(Debug)]
pub struct Following {
    task: JoinHandle<()>,
    end: oneshot::Sender<()>,
    /// Lets it look for a name server.
    looks: mpsc::Sender<oneshot::Sender<()>>,
    forwarder: Option<Forwarder>,
}

impl Pod {
    /// Connects a namespace; one that is connected already is fine.
    ///
    /// # Errors
    /// It cannot be connected, or another one is.
    pub async fn connect_network(&self, namespace: OwnedFd, limits: NetworkLimits) -> Result<()> {
        let namespace = Namespace::try_from(namespace)?;
        let mut stage = self.network.lock().await;
        let same = match &*stage {
            Stage::None => {
                let network = Network::open(namespace, self.nets.clone(), limits).await?;
                let forwarder = Forwarder::open(network.namespace());
                *stage = Stage::Connected(Box::new(network), forwarder);
                return Ok(());
            }
            Stage::Connected(network, _) => network.is_of(&namespace)?,
            Stage::Followed(other, ..) => other.is_same(&namespace)?,
        };
        match same {
            true => Ok(()),
            false => Err(Failure::new(
                "not supported: two network namespaces for containers of one machine",
            )
            .hint("let the container join the network of another one in its pod")),
        }
    }

    /// Tells the guest about the network, before its first container.
    ///
    /// # Errors
    /// The agent's.
    pub async fn configure_network(self: &Arc<Self>, ready: &Ready) -> Result<()> {
        let mut stage = self.network.lock().await;
        if let Stage::Connected(network, _) = &mut *stage {
            network.configure(&ready.agent).await?;
            if let Stage::Connected(mut network, forwarder) = std::mem::take(&mut *stage) {
                let (devices, agent) = (&ready.devices, &ready.agent);
                let namespace = network.namespace().clone();
                let resolver = Resolver::new(namespace.clone(), devices.clone(), agent.clone());
                let (looks, wishes) = mpsc::channel(1);
                network.look_for(resolver, wishes).await;
                if let Some(forwarder) = &forwarder {
                    forwarder.start(devices, agent);
                }
                let (end, ended) = oneshot::channel();
                let ended = async {
                    // Also when whoever could say so is gone.
                    let _ = ended.await;
                };
                let task = tokio::spawn(network.follow(ready.agent.clone(), ended));
                let following = Following {
                    task,
                    end,
                    looks,
                    forwarder,
                };
                *stage = Stage::Followed(namespace, following);
            }
        }
        Ok(())
    }

    /// Looks once more for a name server in the namespace: before a container starts.
    pub async fn look_for_resolver(&self) {
        let looks = match &*self.network.lock().await {
            Stage::Followed(_, following) => following.looks.clone(),
            _ => return,
        };
        let (look, looked) = oneshot::channel();
        // A namespace that is not followed any more has none.
        if looks.send(look).await.is_ok() {
            let _ = looked.await;
        }
    }

    /// Leaves the namespace as it was before.
    pub async fn disconnect_network(&self) {
        match std::mem::take(&mut *self.network.lock().await) {
            Stage::None => {}
            Stage::Connected(mut network, forwarder) => {
                end_forwarding(forwarder);
                network.disconnect().await;
            }
            Stage::Followed(_, following) => {
                end_forwarding(following.forwarder);
                // It may have ended by itself.
                let _ = following.end.send(());
                let _ = following.task.await;
            }
        }
    }
}

fn end_forwarding(forwarder: Option<Forwarder>) {
    if let Some(forwarder) = forwarder {
        forwarder.end();
    }
}
