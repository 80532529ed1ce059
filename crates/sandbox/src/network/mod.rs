//! The network of a sandbox: at most one network namespace of the host, which the guest's own
//! network is made of.
//!
//! It is connected as soon as a front end names it, while the guest boots; the guest is told before
//! the first container is created, and from then on the namespace is followed, and relays carry
//! what concerns its loopback interface.
//!
//! | module | what |
//! | --- | --- |
//! | `attachment` | a namespace of hull's own, attached by plugins or pasta |
//! | `change` | networks that it joins and leaves while its container runs |
//! | `mirror` | interfaces of the namespace, brought into the guest |
//! | `names` | names of containers in a network of hull's own |
//! | `published` | published ports at ::1 |
//! | `loopback` | what engines have and expect on the namespace's loopback interface |

mod attachment;
mod change;
mod loopback;
mod messages;
mod mirror;
mod names;
mod published;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_network::Namespace;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub(crate) use attachment::is_attached;
pub use attachment::{records, undo};
#[cfg(fuzzing)]
pub use loopback::relay_names;
pub(crate) use mirror::Nets;

use crate::config::{CniConfig, CniNetwork, NetworkAddresses, NetworkConfig, NetworkSource};
use crate::error::{Error, Result};
use crate::events::EventKind;
use crate::guest::Agent;
use crate::sandbox::{Ready, Sandbox};
use crate::store::Directory;
use attachment::{Attached, Joined};
use loopback::{Forwarder, NameServer, Resolver, bring};
use mirror::Network;
use names::{Named, Names};

/// How far the network of a sandbox is.
#[derive(Debug, Default)]
pub(crate) enum Stage {
    /// No namespace was named.
    #[default]
    None,
    /// Connected; the guest does not know yet.
    Connected(Connected),
    /// The guest has it, and gets what changes.
    Followed(Followed),
}

/// A namespace that is connected with the machine.
#[derive(Debug)]
pub(crate) struct Connected {
    network: Box<Network>,
    forwarder: Option<Forwarder>,
    /// hull's own attachment; absent where an engine has set up the namespace.
    attached: Option<Attached>,
    owner: Option<String>,
    names: Option<Arc<Names>>,
    /// An engine may set it up further.
    of_engine: bool,
}

/// A task that follows a namespace.
#[derive(Debug)]
pub(crate) struct Followed {
    namespace: Namespace,
    task: JoinHandle<()>,
    end: oneshot::Sender<()>,
    /// Takes requests to look at the namespace.
    requests: mpsc::Sender<oneshot::Sender<Result<()>>>,
    /// An engine may set it up further.
    of_engine: bool,
    forwarder: Option<Forwarder>,
    attached: Option<Attached>,
    owner: Option<String>,
    names: Option<Arc<Names>>,
    resolving: Option<JoinHandle<()>>,
}

impl Sandbox {
    /// Connects the sandbox with a network, while its guest boots. A namespace that is connected
    /// already is fine. `fds` are those that the source asks for.
    ///
    /// # Errors
    /// `Unsupported` when another namespace is connected, or this one is another sandbox's; a
    /// plugin fails; the sandbox ends.
    pub async fn connect_network(
        &self,
        config: NetworkConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<NetworkAddresses> {
        let mut stage = self.0.network.lock().await;
        let mut fds = fds.into_iter();
        let missing = || Error::invalid("a descriptor of the network did not come");
        let mut networks = Vec::new();
        let attached = match config.source {
            NetworkSource::Namespace => {
                let namespace = Namespace::try_from(fds.next().ok_or_else(missing)?)?;
                let same = match &*stage {
                    Stage::None => {
                        *stage = Stage::Connected(Connected {
                            forwarder: Forwarder::open(&namespace),
                            network: self.open_network(namespace, config.limits).await?,
                            attached: None,
                            owner: config.owner,
                            names: None,
                            of_engine: true,
                        });
                        true
                    }
                    Stage::Connected(connected) => connected.network.is_of(&namespace)?,
                    Stage::Followed(followed) => followed.namespace.is_same(&namespace)?,
                };
                return match same {
                    true => Ok(NetworkAddresses::default()),
                    false => Err(Error::unsupported(
                        "two network namespaces for containers of one machine",
                    )
                    .hint("let the container join the network of another one in its pod")),
                };
            }
            _ if !matches!(*stage, Stage::None) => {
                return Err(Error::wrong_state("the sandbox has a network already"));
            }
            NetworkSource::Cni(cni) => {
                let directory = Directory::from_fd(fds.next().ok_or_else(missing)?, "");
                networks.clone_from(&cni.networks);
                attachment::by_plugins(cni, fds.collect(), directory, self.is_down()).await?
            }
            NetworkSource::Pasta(pasta) => {
                let attached = attachment::by_pasta(&pasta).await?;
                let addresses = attached.addresses();
                // What the host sends to itself comes by the namespace's loopback interface.
                let forwarder = match pasta.ports.is_empty() {
                    true => None,
                    false => Forwarder::open(&attached.namespace),
                };
                let network = self
                    .open_network(attached.namespace.clone(), config.limits)
                    .await;
                return self
                    .attached(
                        &mut stage,
                        network,
                        attached,
                        forwarder,
                        config.owner,
                        &networks,
                    )
                    .await
                    .map(|()| addresses);
            }
        };
        let addresses = attached.addresses();
        let network = self
            .open_network(attached.namespace.clone(), config.limits)
            .await;
        self.attached(&mut stage, network, attached, None, config.owner, &networks)
            .await
            .map(|()| addresses)
    }

    async fn attached(
        &self,
        stage: &mut Stage,
        network: Result<Box<Network>>,
        attached: Attached,
        forwarder: Option<Forwarder>,
        owner: Option<String>,
        networks: &[CniNetwork],
    ) -> Result<()> {
        let addresses = attached.addresses().addresses;
        let names = attached.named(networks);
        let published = network.and_then(|network| {
            let names = match &owner {
                Some(owner) if !names.is_empty() => {
                    Some(Names::publish(names, owner, self.path())?)
                }
                _ => None,
            };
            Ok((network, names.map(Arc::new)))
        });
        let (network, names) = match published {
            Ok(published) => published,
            Err(error) => {
                attached.detach().await;
                return Err(error);
            }
        };
        self.set_addresses(addresses);
        self.emit_networks(owner.as_deref(), &[], &attached.networks);
        *stage = Stage::Connected(Connected {
            network,
            forwarder,
            attached: Some(attached),
            owner,
            names,
            of_engine: false,
        });
        Ok(())
    }

    /// Tells about the networks of a container that have names.
    fn emit_networks(&self, container: Option<&str>, before: &[Joined], now: &[Joined]) {
        let Some(container) = container else { return };
        let missing = |among: &[Joined], one: &Joined| {
            let mut others = among.iter();
            !one.name.is_empty() && others.all(|other| other.name != one.name)
        };
        for left in before.iter().filter(|one| missing(now, one)) {
            self.emit(EventKind::Disconnected {
                container: container.to_owned(),
                network: left.name.clone(),
            });
        }
        for joined in now.iter().filter(|one| missing(before, one)) {
            self.emit(EventKind::Connected {
                container: container.to_owned(),
                network: joined.name.clone(),
            });
        }
    }

    async fn open_network(
        &self,
        namespace: Namespace,
        limits: crate::config::NetworkLimits,
    ) -> Result<Box<Network>> {
        let network = Network::open(namespace, self.0.nets.clone(), limits).await?;
        Ok(Box::new(network))
    }

    /// Tells the guest about the network, before its first container.
    ///
    /// # Errors
    /// The agent cannot set it up.
    pub(crate) async fn configure_network(&self, ready: &Ready) -> Result<()> {
        let mut stage = self.0.network.lock().await;
        let Stage::Connected(connected) = &mut *stage else {
            return Ok(());
        };
        connected.network.configure(&ready.agent).await?;
        if let Stage::Connected(connected) = std::mem::take(&mut *stage) {
            *stage = Stage::Followed(connected.follow(ready).await);
        }
        Ok(())
    }

    /// Brings into the guest what an engine has set up since its last look: before a container
    /// starts.
    ///
    /// # Errors
    /// The namespace has more interfaces than the machine, or cannot be connected.
    pub(crate) async fn refresh_network(&self) -> Result<()> {
        let requests = match &*self.0.network.lock().await {
            Stage::Followed(followed) if followed.of_engine => followed.requests.clone(),
            _ => return Ok(()),
        };
        look(requests).await
    }

    /// Makes the networks of a running container those of a configuration, of which the published
    /// ports stay what they were; its addresses then.
    ///
    /// # Errors
    /// `Unsupported` when the machine has no room for as many interfaces, or the container no
    /// network of plugins; `WrongState` when it is another container's; a plugin fails. Then no
    /// network was joined.
    pub(crate) async fn change_networks(&self, config: &CniConfig) -> Result<NetworkAddresses> {
        let ready = self.ready().await?;
        let mut stage = self.0.network.lock().await;
        let followed = match &mut *stage {
            Stage::Followed(followed) => followed,
            Stage::Connected(_) => {
                return Err(Error::wrong_state("the container is being created"));
            }
            Stage::None => {
                return Err(Error::unsupported(
                    "a network for a running container that was started without one",
                ));
            }
        };
        let (Some(attached), Some(owner)) = (&mut followed.attached, &followed.owner) else {
            return Err(Error::unsupported(
                "other networks for containers of an engine",
            ));
        };
        if *owner != config.id {
            return Err(Error::wrong_state(format!(
                "the network is that of container {owner}"
            )));
        }
        let most = usize::from(self.0.nets.count);
        if config.networks.len() > most {
            return Err(Error::unsupported(format_args!(
                "{} networks for a running container whose machine was started for {most}",
                config.networks.len()
            )));
        }
        let before = attached.networks.clone();
        let mut changed = attached.change(config, self.is_down()).await;
        let looked = look(followed.requests.clone()).await;
        let was_there = |name: &str| before.iter().any(|one| one.name == name);
        let joined = attached.networks.iter().any(|one| !was_there(&one.name));
        match (&changed, looked) {
            (Ok(()), Ok(())) => {}
            // What was joined is left again.
            (_, looked) if joined => {
                let mut old = config.clone();
                old.networks
                    .retain(|network| was_there(network.list.name()));
                if let Err(error) = attached.change(&old, self.is_down()).await {
                    tracing::error!("{error}");
                }
                changed = changed.and(looked);
                if let Err(error) = look(followed.requests.clone()).await {
                    tracing::error!("{error}");
                }
            }
            // What was left stays left.
            (_, looked) => {
                if let Err(error) = looked {
                    tracing::error!("a change of the network does not reach the guest: {error}");
                }
            }
        }
        self.emit_networks(Some(owner), &before, &attached.networks);
        let addresses = attached.addresses();
        self.set_addresses(addresses.addresses.clone());
        for container in self.containers() {
            if let Err(error) = container.refresh_status() {
                tracing::warn!("{error}");
            }
        }
        let named = attached.named(&config.networks);
        let published = match &followed.names {
            Some(names) => names.change(named),
            None if named.is_empty() => Ok(()),
            None => match Names::publish(named, owner, self.path()) {
                Ok(names) => {
                    let names = Arc::new(names);
                    followed.resolving = names.bring(&ready).await;
                    followed.names = Some(names);
                    Ok(())
                }
                Err(error) => Err(error),
            },
        };
        if let Err(error) = published {
            tracing::error!("the container is not found by its names: {error}");
        }
        changed?;
        Ok(addresses)
    }

    /// Takes the network down when the container has ended that it is for. Containers that are left
    /// have loopback only, as Docker's.
    pub(crate) async fn release_network_of(&self, container: &str, agent: &Agent) {
        let owner = match &*self.0.network.lock().await {
            Stage::None => return,
            Stage::Connected(Connected { owner, .. }) | Stage::Followed(Followed { owner, .. }) => {
                owner.clone()
            }
        };
        if owner.as_deref() != Some(container) {
            return;
        }
        self.disconnect_network().await;
        if let Err(error) = agent.set_network(&Default::default()).await {
            tracing::warn!("the guest keeps its interfaces: {error}");
        }
    }

    /// Leaves the namespace as it was before, and detaches it if hull has attached it.
    pub(crate) async fn disconnect_network(&self) {
        let stage = std::mem::take(&mut *self.0.network.lock().await);
        let (attached, owner) = match stage {
            Stage::None => (None, None),
            Stage::Connected(mut connected) => {
                withdraw(connected.names);
                end_forwarding(connected.forwarder);
                connected.network.disconnect().await;
                (connected.attached, connected.owner)
            }
            Stage::Followed(followed) => {
                withdraw(followed.names);
                if let Some(resolving) = followed.resolving {
                    resolving.abort();
                }
                end_forwarding(followed.forwarder);
                // It may have ended by itself.
                let _ = followed.end.send(());
                let _ = followed.task.await;
                (followed.attached, followed.owner)
            }
        };
        if let Some(attached) = attached {
            self.emit_networks(owner.as_deref(), &attached.networks, &[]);
            attached.detach().await;
        }
    }
}

impl Connected {
    /// Follows the namespace from now on.
    async fn follow(self, ready: &Ready) -> Followed {
        let Self {
            mut network,
            forwarder,
            attached,
            owner,
            names,
            of_engine,
        } = self;
        let namespace = network.namespace().clone();
        let (devices, agent) = (&ready.devices, &ready.agent);
        let resolver =
            of_engine.then(|| Resolver::new(namespace.clone(), devices.clone(), agent.clone()));
        let (requests, receiver) = mpsc::channel(1);
        network.expect_changes(resolver, receiver).await;
        if let Some(forwarder) = &forwarder {
            forwarder.start(devices, agent);
        }
        let resolving = match &names {
            Some(names) => names.bring(ready).await,
            None => None,
        };
        let (end, ended) = oneshot::channel();
        let ended = async {
            // Also when the sender is dropped.
            let _ = ended.await;
        };
        Followed {
            namespace,
            task: tokio::spawn(network.follow(agent.clone(), ended)),
            end,
            requests,
            of_engine,
            forwarder,
            attached,
            owner,
            names,
            resolving,
        }
    }
}

impl Attached {
    /// The networks of a configuration in which the container has names, with its addresses there.
    fn named(&self, networks: &[CniNetwork]) -> Vec<Named> {
        let named = networks.iter().filter_map(|network| {
            let joined = self.joined(network)?;
            Some((network.names.clone()?, joined.addresses.addresses.clone()))
        });
        named.collect()
    }
}

impl Names {
    /// Answers the guest's questions.
    async fn bring(self: &Arc<Self>, ready: &Ready) -> Option<JoinHandle<()>> {
        let server = NameServer::Own(self.clone());
        bring(server, &ready.devices, &ready.agent)
            .await
            .inspect_err(|error| tracing::warn!("names of the network are not resolved: {error}"))
            .ok()
    }
}

/// Has a namespace that is followed looked at.
async fn look(requests: mpsc::Sender<oneshot::Sender<Result<()>>>) -> Result<()> {
    let (request, answer) = oneshot::channel();
    // A namespace that is not followed any more has nothing new.
    match requests.send(request).await {
        Ok(()) => answer.await.unwrap_or(Ok(())),
        Err(_) => Ok(()),
    }
}

fn withdraw(names: Option<Arc<Names>>) {
    if let Some(names) = names {
        names.withdraw();
    }
}

fn end_forwarding(forwarder: Option<Forwarder>) {
    if let Some(forwarder) = forwarder {
        forwarder.end();
    }
}
