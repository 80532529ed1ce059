//! Changes what was asked for of a container that is there: its limits, and whether it is started
//! again. They hold at once when it runs, and from its next start on.

use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::State;
use serde_json::value::to_raw_value;

use crate::config::Config;
use crate::container::{self, Container};
use crate::error::{Context, Error, Result};
use crate::options::{check_cpus, check_swap};
use crate::spec;
use crate::supervise;
use crate::values::{CpuList, Restart};

/// What is to change; the rest stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// Memory limit, bytes; 0 for none.
    pub memory: Option<u64>,
    /// Processors, in thousandths; 0 for no limit.
    pub cpus_milli: Option<u64>,
    /// Most processes.
    pub pids_limit: Option<i64>,
    /// Its weight among others, Docker's number.
    pub cpu_shares: Option<u64>,
    /// What memory may be together with swap of the host, bytes; -1 for all that there is, 0 for
    /// none. From the next start on.
    pub memory_swap: Option<i64>,
    /// Processors of the host that it is to stay on. From the next start on.
    pub host_cpus: Option<CpuList>,
    /// When it is started again.
    pub restart: Option<Restart>,
}

impl Update {
    fn changes_limits(&self) -> bool {
        self.limits() != spec::Limits::default()
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
        let memory_swap = match self.memory_swap {
            Some(both) => Some(both).filter(|both| *both != 0),
            None => options.memory_swap,
        };
        let host_cpus = self.host_cpus.as_ref().unwrap_or(&options.host_cpus);
        let host_bounds = [
            ("--memory-swap", memory_swap != options.memory_swap),
            ("--cpuset-cpus", *host_cpus != options.host_cpus),
        ];
        if let Some((option, _)) = host_bounds.iter().find(|(_, changes)| *changes) {
            let refused = |why: &str| {
                Error::unsupported(format_args!("{option} of container {}{why}", details.name))
            };
            if joined {
                return Err(refused(", which is in the machine of another one"));
            }
            if runs {
                let name = &details.name;
                return Err(refused(" while its machine runs")
                    .hint(format!("hull stop {name}; hull update; hull start {name}")));
            }
        }
        host_cpus.check()?;
        options.host_cpus = host_cpus.clone();
        options.memory_swap = memory_swap;
        options.memory = self.memory.or(options.memory);
        check_swap(options.memory, options.memory_swap)?;
        options.cpu_shares = self
            .cpu_shares
            .or(options.cpu_shares)
            .filter(|shares| *shares > 0);
        check_cpus(self.cpus_milli)?;
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

    fn limits(&self) -> spec::Limits {
        spec::Limits {
            memory: self.memory,
            cpus_milli: self.cpus_milli,
            cpu_shares: self.cpu_shares,
            pids_limit: self.pids_limit,
        }
    }

    fn tell(&self, container: &Container) -> Result<()> {
        let resources = to_raw_value(&self.limits().changed()).context(|| "encode the limits")?;
        container::connect(container)?.do_(&Request::Update {
            container: container.record.id.clone(),
            resources,
        })
    }
}
