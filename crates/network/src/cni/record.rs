//! An attachment, from before it is created until it is removed.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attachment::Attachment;
use super::error::{Error, Fault, Result};
use super::list::{List, Version};
use super::outcome::CniResult;
use super::plugin::{Call, Command, Runner, failed};
use super::stand_in;
use crate::namespace::Namespace;

/// What is needed to remove an attachment. The caller stores it (it is serializable) before
/// [`Record::add`] and after; either version is enough for [`Record::del`] after a crash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The network, as it was when the attachment was created.
    pub list: List,
    /// Parameters of the attachment.
    pub attachment: Attachment,
    /// Device and inode of the namespace: its path (of a process, say) may since refer to
    /// another one.
    netns_identity: Option<(u64, u64)>,
    /// Result of another record's plugins, on which those of this one build: they are told of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upon: Option<CniResult>,
    /// Result of the plugins that have run so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<CniResult>,
    /// All plugins have run. While this is false some may be running.
    #[serde(default)]
    pub attached: bool,
}

impl Record {
    /// A new attachment. Runs no plugin yet, but validates what it can.
    pub fn new(list: List, attachment: Attachment) -> Result<Record> {
        let refused = |why| Error::Refused {
            network: list.name().to_owned(),
            why,
        };
        attachment.check().map_err(refused)?;
        for (capability, what) in attachment.needed_capabilities() {
            if !list.has_capability(capability) {
                return Err(refused(format!(
                    "cannot {what}: no plugin of it has the capability {capability:?}"
                )));
            }
        }
        let netns_identity = identity(&attachment.netns).map_err(|error| {
            refused(format!(
                "no network namespace {}: {error}",
                attachment.netns.display()
            ))
        })?;
        Ok(Record {
            list,
            attachment,
            netns_identity: Some(netns_identity),
            upon: None,
            result: None,
            attached: false,
        })
    }

    /// Has the plugins build on what those of another record made: further rules for its interface.
    pub fn upon(self, result: CniResult) -> Record {
        Record {
            upon: Some(result),
            ..self
        }
    }

    /// Attaches: runs the plugins in order. If one fails, runs all with DEL and returns the first
    /// error.
    pub fn add(&mut self, runner: &Runner) -> Result<&CniResult> {
        self.add_and_keep(runner, &mut |_| Ok(()))
    }

    /// Like [`Record::add`]; `keep` is called with the record after each plugin. Storing it each
    /// time gives plugins that clean up by address (`firewall`) what they need after a crash in
    /// between.
    pub fn add_and_keep(
        &mut self,
        runner: &Runner,
        keep: &mut dyn FnMut(&Record) -> Result<(), String>,
    ) -> Result<&CniResult> {
        // Report a missing plugin before doing anything.
        runner.require(&self.list)?;
        (self.result, self.attached) = (self.upon.clone(), false);
        if let Err(error) = self.add_each(runner, keep) {
            // The cleanup runs also after cancellation.
            let runner = Runner {
                cancel: None,
                ..runner.clone()
            };
            return Err(match self.del(&runner) {
                Ok(()) => {
                    self.result = None;
                    error
                }
                Err(undo) => Error::NotUndone {
                    error: Box::new(error),
                    undo: Box::new(undo),
                },
            });
        }
        self.result
            .as_ref()
            .ok_or_else(|| self.refused("it has no plugins".to_owned()))
    }

    fn add_each(
        &mut self,
        runner: &Runner,
        keep: &mut dyn FnMut(&Record) -> Result<(), String>,
    ) -> Result<()> {
        for index in 0..self.list.plugins.len() {
            let plugin = &self.list.plugins[index];
            let netns = Some(self.attachment.netns.as_path());
            let call = self.call(Command::Add, netns, self.result.as_ref());
            let output = runner.call(&call, plugin)?;
            let result = CniResult::read(&output, self.list.version)
                .map_err(|why| failed(&call, plugin, Fault::BadResult(why)))?;
            self.result = Some(result);
            self.attached = index + 1 == self.list.plugins.len();
            keep(self).map_err(|why| self.refused(why))?;
        }
        Ok(())
    }

    /// Runs CHECK of the plugins, unless the list's version or settings exclude it.
    pub fn check(&self, runner: &Runner) -> Result<()> {
        if self.list.version < Version::V0_4_0 || self.list.disable_check {
            return Ok(());
        }
        let call = self.call(
            Command::Check,
            Some(&self.attachment.netns),
            self.result.as_ref(),
        );
        for plugin in &self.list.plugins {
            runner.call(&call, plugin)?;
        }
        Ok(())
    }

    /// Detaches; works on a complete, partial or missing attachment, with or without the namespace,
    /// and repeatedly. Unlike libcni it continues when a plugin fails, so that as little as
    /// possible is left, and returns the first error.
    ///
    /// When the namespace is gone, plugins see a stand-in with the same addresses.
    pub fn del(&self, runner: &Runner) -> Result<()> {
        let previous = self
            .result
            .as_ref()
            .filter(|_| self.list.version >= Version::V0_4_0);
        let stand_in = self.stand_in();
        let path = stand_in.as_ref().map(|namespace| {
            let (pid, fd) = (std::process::id(), namespace.as_fd().as_raw_fd());
            PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
        });
        let netns = self.living_netns().or(path.as_deref());
        let call = self.call(Command::Del, netns, previous);
        let mut outcome = Ok(());
        for plugin in self.list.plugins.iter().rev() {
            let one = runner.call(&call, plugin).map(drop);
            outcome = outcome.and(one);
        }
        outcome
    }

    /// Replacement for a namespace that is gone, if it had addresses. If it cannot be created (for
    /// example without permission), plugins run without a namespace.
    fn stand_in(&self) -> Option<Namespace> {
        if self.living_netns().is_some() {
            return None;
        }
        let result = self.result.as_ref()?;
        let addresses: Vec<_> = result.ips.iter().map(|ip| ip.address).collect();
        if addresses.is_empty() {
            return None;
        }
        stand_in::make(&self.attachment.ifname, &addresses)
            .inspect_err(|error| tracing::debug!(%error, "no stand-in for a network namespace"))
            .ok()
    }

    fn call<'a>(
        &'a self,
        command: Command,
        netns: Option<&'a Path>,
        previous: Option<&'a CniResult>,
    ) -> Call<'a> {
        Call {
            list: &self.list,
            attachment: &self.attachment,
            command,
            netns,
            previous,
        }
    }

    /// The namespace, if its path still refers to it: plugins must not clean up in another
    /// container's, nor in the host's.
    fn living_netns(&self) -> Option<&Path> {
        let netns = self.attachment.netns.as_path();
        let found = identity(netns).ok()?;
        (Some(found) == self.netns_identity).then_some(netns)
    }

    fn refused(&self, why: String) -> Error {
        Error::Refused {
            network: self.list.name().to_owned(),
            why,
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
