//! An attachment from the moment before it is made until it is undone.

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

/// What must be known to undo an attachment. The caller keeps it (it is serializable) before
/// [`Record::add`] and after; whichever of them survives a crash is enough for [`Record::del`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The network, as it was when the attachment was made.
    pub list: List,
    /// What is attached.
    pub attachment: Attachment,
    /// The namespace's device and inode: its path may since have become another's, like that of a
    /// process.
    netns_identity: Option<(u64, u64)>,
    /// What came of it, or of the plugins that have run so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<CniResult>,
}

impl Record {
    /// An attachment that is to be made. Nothing is done yet, but what can be known to be wrong is
    /// refused.
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
            result: None,
        })
    }

    /// Attaches: runs the plugins in order. When one fails, all are asked to undo, and the first
    /// error is returned.
    pub fn add(&mut self, runner: &Runner) -> Result<&CniResult> {
        self.add_and_keep(runner, &mut |_| Ok(()))
    }

    /// As [`Record::add`]; `keep` is called with the record after each plugin. Who keeps it each
    /// time, and not only before and after, gives plugins that undo by addresses (`firewall`) what
    /// they need after a crash in between.
    pub fn add_and_keep(
        &mut self,
        runner: &Runner,
        keep: &mut dyn FnMut(&Record) -> Result<(), String>,
    ) -> Result<&CniResult> {
        // What is not installed shows before anything is done.
        runner.require(&self.list)?;
        self.result = None;
        if let Err(error) = self.add_each(runner, keep) {
            // What nobody waits for any more is undone all the same.
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
            keep(self).map_err(|why| self.refused(why))?;
        }
        Ok(())
    }

    /// Asks the plugins whether all is as they made it; those that cannot say are not asked.
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

    /// Detaches, whatever of the attachment there is: nothing, a part, all; with the namespace or
    /// without it; once or again. Unlike libcni it goes on when a plugin fails, so that as little
    /// as possible is left, and returns the first error.
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

    /// What takes the place of a namespace that is gone, if it had addresses. Without one (no
    /// permission to make it, say) plugins do what they do without a namespace.
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

    /// The namespace, while it is the same: plugins must not clean up in another container's, nor
    /// in the host's.
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
