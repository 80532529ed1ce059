//! What a container is made of: its spec, its shares, and files of its own.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use hull_image::Image;
use hull_sandbox::config::{ContainerConfig, Removal, Share, Stdio, Writers, share_name};
use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::{MAX_SHARES, Request};
use hull_sandbox::shares::{self, Disk, Overlay, ReadOnly};
use hull_sandbox::store::Directory;
use serde_json::value::{RawValue, to_raw_value};

use super::{Place, Run};
use crate::container::Container;
use crate::error::{Context, Result};
use crate::spec::{self, ContainerOptions, Layout, VolumeLayout};
use crate::volumes::store::{self, Located};
use crate::volumes::{Source, Volume};

/// Volumes of a container that are filled when it is created.
#[derive(Debug, Default)]
pub(super) struct Fills {
    indices: Vec<usize>,
    /// Keeps others from filling volumes with names meanwhile.
    held: Vec<(String, File)>,
}

impl Fills {
    /// Whether the volume of this index is one.
    fn are(&self, index: usize) -> bool {
        self.indices.contains(&index)
    }
}

impl Run<'_> {
    /// The shares of the container, with their mounts: root, volumes.
    pub(super) fn shares(
        &self,
        image: &Image,
        directory: &Directory,
        fills: &Fills,
    ) -> Result<Vec<(Share, OwnedFd)>> {
        let size = self
            .options
            .storage_size
            .unwrap_or(self.config.storage_size);
        let disk = (size > 0).then(|| Disk {
            file: directory.path().join("layer.img"),
            place: directory.path().join("layer"),
            size,
        });
        let parent = disk.as_ref().map_or(directory.path(), |disk| &disk.place);
        let root = shares::root(&Overlay {
            layers: &image.layers,
            upper: parent.join("upper"),
            work: parent.join("work"),
            volatile: self.options.remove,
            disk: disk.clone(),
        })?;
        let mut shares = vec![(self.root(), root)];
        for (index, volume) in self.options.volumes.iter().enumerate() {
            let share = Share {
                // The guest fills it before it becomes read-only.
                sealed: volume.read_only && fills.are(index),
                ..self.volume(index, volume)?
            };
            let read_only = match volume.read_only && !share.sealed {
                true => ReadOnly::Recursive,
                false => ReadOnly::No,
            };
            let source = self.source(index, volume)?;
            let mount = shares::host(&source.path, true, read_only)?;
            shares.push((share, mount));
        }
        Ok(shares)
    }

    fn share(&self, what: &str, is_file: bool, writers: Writers) -> Share {
        Share {
            name: share_name(&self.id, what),
            is_file,
            writers,
            sealed: false,
        }
    }

    fn root(&self) -> Share {
        Share {
            sealed: self.options.read_only,
            ..self.share("root", false, Writers::Guest)
        }
    }

    fn source(&self, index: usize, volume: &Volume) -> Result<Located> {
        let container = self.paths.container(&self.id);
        store::source(&self.paths, &container, index, volume)
    }

    fn volume(&self, index: usize, volume: &Volume) -> Result<Share> {
        let source = self.source(index, volume)?;
        let metadata =
            std::fs::metadata(&source.path).context(|| format!("share volume {volume}"))?;
        let what = format!("volume{index}");
        let writers = match volume.source {
            Source::Anonymous => Writers::Guest,
            Source::Host(_) | Source::Named(_) => Writers::Anyone,
        };
        Ok(self.share(&what, !metadata.is_dir(), writers))
    }

    /// Makes volumes available, and decides which are filled with what the image has at their
    /// destinations: new ones. One that others fill just now is waited for.
    ///
    /// # Errors
    /// A volume is not there, or cannot be read.
    pub(super) fn fills(&self) -> Result<Fills> {
        let volumes = self.options.volumes.iter().enumerate();
        let mut volumes: Vec<(usize, &Volume)> = volumes.collect();
        // Those that start at once wait for each other in one order.
        volumes.sort_by_key(|(_, volume)| match &volume.source {
            Source::Named(name) => Some(name),
            Source::Host(_) | Source::Anonymous => None,
        });
        let mut fills = Fills::default();
        for (index, volume) in volumes {
            store::prepare(&self.paths, volume)?;
            if !self.is_to_be_filled(index, volume)? {
                continue;
            }
            if let Source::Named(name) = &volume.source {
                // At two places, it is filled from the first.
                if fills.held.iter().any(|(held, _)| held == name) {
                    continue;
                }
                let lock = store::hold(&self.paths, name)?;
                if !self.is_to_be_filled(index, volume)? {
                    continue;
                }
                fills.held.push((name.clone(), lock));
            }
            fills.indices.push(index);
        }
        Ok(fills)
    }

    fn is_to_be_filled(&self, index: usize, volume: &Volume) -> Result<bool> {
        let of_host = matches!(volume.source, Source::Host(_));
        if of_host || volume.no_copy || volume.subpath.is_some() {
            return Ok(false);
        }
        let source = self.source(index, volume)?;
        let mut entries =
            std::fs::read_dir(&source.path).context(|| format!("read volume {volume}"))?;
        Ok(entries.next().is_none())
    }

    /// A volume as the guest's share of it; an empty one is filled from the image.
    fn layout(&self, index: usize, volume: &Volume, fills: &Fills) -> Result<VolumeLayout> {
        Ok(VolumeLayout {
            path: self.volume(index, volume)?.path(),
            fill: fills.are(index),
        })
    }

    /// The spec, and the rest of the container's configuration.
    pub(super) fn spec(
        &self,
        image: &Image,
        place: &Place,
        fills: &Fills,
    ) -> Result<(Box<RawValue>, ContainerConfig)> {
        let options = &self.options;
        let layout = Layout {
            root: self.root().path(),
            files_of: place.files_of.clone(),
            volumes: options
                .volumes
                .iter()
                .enumerate()
                .map(|(index, volume)| self.layout(index, volume, fills))
                .collect::<Result<_>>()?,
        };
        let no_zero = |limit: u64| (limit > 0).then_some(limit);
        let pids_limit = options.pids_limit.unwrap_or(self.config.pids_limit);
        let container = ContainerOptions {
            command: options.command.clone(),
            entrypoint: options.entrypoint.clone(),
            environment: options.environment.clone(),
            directory: options.directory.clone(),
            user: options.user.clone(),
            groups: options.groups.clone(),
            privileged: options.privileged,
            oom_score_adj: options.oom_score_adj,
            cpu_shares: options.cpu_shares,
            annotations: options.annotations.clone(),
            hostname: place.hostname.clone(),
            terminal: options.terminal,
            read_only: options.read_only,
            tmpfs: options
                .tmpfs
                .iter()
                .map(|tmpfs| (tmpfs.destination.clone(), tmpfs.options.clone()))
                .collect(),
            volumes: options.volumes.clone(),
            capabilities_add: options.cap_add.clone(),
            capabilities_drop: options.cap_drop.clone(),
            sysctl: options.sysctl.iter().cloned().collect(),
            default_sysctl: place.host.is_none(),
            ulimits: options
                .ulimits
                .iter()
                .map(|limit| (limit.name.clone(), limit.soft, limit.hard))
                .collect(),
            shm_size: options
                .shm_size
                .and_then(no_zero)
                .unwrap_or(self.config.shm_size),
            init: options.init,
            memory: options.memory.and_then(no_zero),
            cpus_milli: options.cpus_milli.and_then(no_zero),
            pids_limit: (pids_limit > 0).then_some(pids_limit),
            seccomp: options.seccomp()?,
            has_32_bits: place.machine.choice.features().compat32,
            no_new_privileges: options.no_new_privileges(),
        };
        let built = spec::build(&container, &image.config, &layout)?;
        let text = to_raw_value(&built.spec).context(|| "encode the spec")?;
        let outlives = |volume: &Volume| !volume.read_only && volume.source != Source::Anonymous;
        let writes = options.volumes.iter().any(outlives);
        let config = ContainerConfig {
            id: self.id.clone(),
            spec: RawValue::NULL.to_owned(),
            raw: built.raw,
            stdio: Stdio::Hub {
                terminal: options.terminal,
                stdin: options.interactive,
                stdin_stays: options.stdin_stays,
                log_limit: match options.log.off {
                    true => 0,
                    false => options.log.max_size.unwrap_or(self.config.log_size),
                },
            },
            start: true,
            keeper: None,
            again: false,
            journal: self.journal(&spec::environment(&container, &image.config))?,
            sysctl: built.network_sysctl,
            // Known when the network is.
            files: Vec::new(),
            joins: Vec::new(),
            disks: Vec::new(),
            volatile: options.remove && !writes,
            removal: options.remove.then(|| Removal {
                directory: self.paths.container(&self.id),
                links: self.names(),
            }),
        };
        Ok((text, config))
    }

    /// What its lines in the host's journal have, if they go there.
    fn journal(&self, environment: &[OsString]) -> Result<Option<Vec<(String, String)>>> {
        let log = &self.options.log;
        let Some(known) = log.journal.then(|| self.paths.container(&self.id)) else {
            return Ok(None);
        };
        let details = Container::load(&known)?.map(|known| known.record.details);
        let environment: Vec<String> = environment
            .iter()
            .map(|variable| variable.to_string_lossy().into_owned())
            .collect();
        log.journal_fields(&self.id, &details.unwrap_or_default(), &environment)
    }

    /// The links that lead to the container.
    fn names(&self) -> Vec<PathBuf> {
        let record = Container::load(&self.paths.container(&self.id));
        record
            .ok()
            .flatten()
            .map(|container| self.paths.names().join(&container.record.details.name))
            .into_iter()
            .collect()
    }

    /// Writes down the exact environment, for further processes.
    pub(super) fn keep_raw_environment(&self, env: &[Vec<u8>]) -> Result<()> {
        if let Some(mut container) = Container::load(&self.paths.container(&self.id))? {
            container.record.details.raw_env = env.to_vec();
            container.record.write(&container.directory)?;
        }
        Ok(())
    }
}

/// Sends the shares, without waiting for the answers; how many there will be.
pub(super) fn send_shares(client: &Client, mut shares: Vec<(Share, OwnedFd)>) -> Result<usize> {
    let mut messages = 0;
    while !shares.is_empty() {
        let rest = shares.split_off(shares.len().min(MAX_SHARES));
        let (descriptions, mounts): (Vec<_>, Vec<_>) = shares.into_iter().unzip();
        let fds: Vec<_> = mounts.iter().map(AsFd::as_fd).collect();
        let request = Request::AddShares {
            shares: descriptions,
        };
        client.tell(&request, &fds)?;
        messages += 1;
        shares = rest;
    }
    Ok(messages)
}
