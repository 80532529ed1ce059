//! Changes what was asked for of a container that is there: its limits, and whether it is started
//! again. They hold at once when it runs, and from its next start on.

use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::State;
use serde_json::value::to_raw_value;

use crate::config::Config;
use crate::container::{self, Container};
use crate::error::{Context, Error, Result};
use crate::spec;
use crate::supervise;
use crate::values::Restart;

/// What is to change; the rest stays.
#[derive(Debug, Clone, Copy, Default)]
pub struct Update {
    /// Memory limit, bytes; 0 for none.
    pub memory: Option<u64>,
    /// Processors, in thousandths; 0 for no limit.
    pub cpus_milli: Option<u64>,
    /// Most processes.
    pub pids_limit: Option<i64>,
    /// When it is started again.
    pub restart: Option<Restart>,
}

impl Update {
    fn changes_limits(&self) -> bool {
        self.memory.is_some() || self.cpus_milli.is_some() || self.pids_limit.is_some()
    }

    /// Changes a container.
    ///
    /// # Errors
    /// There is no such container; its machine is too small; the guest refuses a limit.
    pub fn apply(&self, config: &Config, name: &str) -> Result<()> {
        let paths = config.paths();
        let found = container::find(&paths, name)?;
        let _lock = container::lock(&found)?;
        let mut container = container::find(&paths, &found.record.id)?;
        let details = &mut container.record.details;
        let Some(options) = &mut details.options else {
            return Err(Error::unsupported(format_args!(
                "updating container {}: an older hull created it",
                details.name
            )));
        };
        let runs = matches!(container.status.state, State::Running | State::Paused);
        let joined = details.files_of != container.record.id;
        if let Some(memory) = self
            .memory
            .filter(|memory| (runs || joined) && *memory > details.memory)
        {
            return Err(Error::invalid(format!(
                "--memory: {} MiB are asked for, and the machine of container {} has {} MiB",
                memory >> 20,
                details.name,
                details.memory >> 20
            ))
            .hint("a machine does not grow: stop the container first"));
        }
        if options.remove && self.restart.is_some_and(|restart| restart != Restart::No) {
            return Err(Error::invalid(format!(
                "--restart: container {} is removed when it ends (--rm)",
                details.name
            )));
        }
        options.memory = self.memory.or(options.memory);
        options.cpus_milli = self.cpus_milli.or(options.cpus_milli);
        options.pids_limit = self.pids_limit.or(options.pids_limit);
        options.restart = self.restart.unwrap_or(options.restart);
        if runs && self.changes_limits() {
            self.tell(&container)?;
        }
        container.record.write(&container.directory)?;
        match runs {
            true => supervise::ensure(config, &container),
            false => Ok(()),
        }
    }

    fn tell(&self, container: &Container) -> Result<()> {
        let limits = spec::Limits {
            memory: self.memory,
            cpus_milli: self.cpus_milli,
            pids_limit: self.pids_limit,
        };
        let resources = to_raw_value(&limits.changed()).context(|| "encode the limits")?;
        container::connect(container)?.do_(&Request::Update {
            container: container.record.id.clone(),
            resources,
        })
    }
}
