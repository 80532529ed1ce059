//! Which machine a container is in: one of its own, or another container's.

use std::path::PathBuf;

use hull_machine::{Choice, NetDevices};
use hull_sandbox::config::{MAX_NETS, MachineConfig};
use hull_sandbox::store::{Record, SandboxPath, State};

use super::{Place, Run};
use crate::config::Config;
use crate::container::{self, Container, Details};
use crate::error::{Error, Result};
use crate::guest_files::GuestFiles;
use crate::network::{Attach, Plan};
use crate::values::CpuList;

impl Run<'_> {
    /// The host name, unless it is in the machine of another container.
    pub(super) fn own_hostname(&self) -> String {
        let asked = self.options.hostname.clone();
        asked.unwrap_or_else(|| self.short_id().to_owned())
    }

    /// Decides about the machine.
    pub(super) fn place(&self, network: Plan) -> Result<Place> {
        let Attach::Container(id) = &network.attach else {
            return Ok(Place {
                machine: self.machine(&network)?,
                sandbox: SandboxPath::new(self.paths.run(), &self.sandbox),
                hostname: self.own_hostname(),
                files_of: self.id.clone(),
                host: None,
                network,
            });
        };
        let host = container::find(&self.paths, id)?;
        let details = &host.record.details;
        self.check_host(&host)?;
        Ok(Place {
            machine: self.machine_of(details)?,
            sandbox: host.record.sandbox()?.clone(),
            hostname: details.hostname.clone(),
            files_of: details.files_of.clone(),
            host: Some(host),
            network,
        })
    }

    fn machine(&self, network: &Plan) -> Result<MachineConfig> {
        let choice = self.choose()?;
        let limit = self.options.memory.filter(|limit| *limit > 0);
        Ok(MachineConfig {
            initramfs: GuestFiles::locate(self.config)?.initramfs()?,
            memory: limit.map_or(self.config.memory, |limit| {
                // A guest keeps a few bytes for each page that it is told it has.
                MachineConfig::memory_for(limit).min(host_memory().max(self.config.memory))
            }),
            cpus: cpus(&choice, self.options.cpus_milli, self.config),
            nets: match (&network.attach, choice.features().net) {
                (Attach::None | Attach::Container(_), _) => 0,
                // Those of networks that it joins later cost next to nothing.
                (Attach::Source(..), NetDevices::HotPlug { .. }) => MAX_NETS,
                (Attach::Source(..), NetDevices::AtBoot { .. }) => {
                    u8::try_from(network.networks.len().max(1)).unwrap_or(u8::MAX)
                }
            },
            spare_disks: 0,
            hull: None,
            choice,
        })
    }

    /// The machine of another container, as far as the record of this one says what it is.
    fn machine_of(&self, details: &Details) -> Result<MachineConfig> {
        let kind = details
            .machine
            .parse()
            .map_err(|_| Error::new(format!("unknown machine kind {:?}", details.machine)))?;
        Ok(MachineConfig {
            choice: Choice {
                kind,
                kernel: PathBuf::from(&details.kernel),
                hardware: details.hardware,
                why: String::new(),
            },
            initramfs: PathBuf::new(),
            memory: details.memory,
            cpus: details.cpus,
            nets: 0,
            spare_disks: 0,
            hull: None,
        })
    }

    /// Whether this container can be in the machine of another one.
    fn check_host(&self, host: &Container) -> Result<()> {
        let options = &self.options;
        let given = [
            (options.hostname.is_some(), "--hostname"),
            (options.machine.is_some(), "--machine"),
            (options.kernel.is_some(), "--kernel"),
            (options.memory_swap.is_some(), "--memory-swap"),
            (options.host_cpus != CpuList::default(), "--cpuset-cpus"),
            (
                options
                    .sysctl
                    .iter()
                    .any(|(name, _)| hull_sandbox::config::is_network_sysctl(name)),
                "--sysctl net.…",
            ),
        ];
        if let Some((_, option)) = given.into_iter().find(|(given, _)| *given) {
            return Err(Error::invalid(format!(
                "{option}: the container is in the machine of another one \
                 (--network container:…)"
            )));
        }
        let details = &host.record.details;
        if !matches!(host.status.state, State::Running | State::Paused) {
            return Err(container::not_running(&details.name, host.status.state));
        }
        if self.config.hardware_isolation && !details.hardware {
            let kind = self.machine_of(details)?.choice.kind;
            return Err(hull_machine::Error::NotHardware { kind }.into());
        }
        if options.memory.is_some_and(|memory| memory > details.memory) {
            return Err(Error::invalid(format!(
                "--memory: the machine of container {} has {} MiB",
                details.name,
                details.memory >> 20
            )));
        }
        Ok(())
    }
}

impl Place {
    /// Writes down where the container is.
    pub(super) fn describe(&self, record: &mut Record<Details>) {
        record.sandbox = Some(self.sandbox.clone());
        let choice = &self.machine.choice;
        record.details = Details {
            hostname: self.hostname.clone(),
            files_of: self.files_of.clone(),
            machine: choice.kind.to_string(),
            hardware: choice.hardware,
            kernel: choice.kernel.display().to_string(),
            memory: self.machine.memory,
            cpus: self.machine.cpus,
            network: self.network.name.clone(),
            ports: self.network.ports().to_vec(),
            ..std::mem::take(&mut record.details)
        };
    }
}

/// Memory of the host, bytes.
fn host_memory() -> u64 {
    let system = rustix::system::sysinfo();
    let page = u64::from(system.mem_unit.max(1));
    // Of a type that depends on the architecture.
    #[allow(clippy::useless_conversion)]
    u64::from(system.totalram).saturating_mul(page)
}

/// Virtual processors of a machine for a container with a limit, in thousandths. A limit above what
/// the kind of machine has is kept all the same.
pub fn cpus(choice: &Choice, milli: Option<u64>, config: &Config) -> u32 {
    let wanted = match milli.filter(|milli| *milli > 0) {
        Some(milli) => u32::try_from(milli.div_ceil(1000)).unwrap_or(1),
        None => config.cpus,
    };
    choice.features().vcpus(wanted)
}
