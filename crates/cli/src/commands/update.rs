//! `hull update`.

use hull_engine::update::Update;
use hull_engine::values::{self, CpuList, Restart};

use super::{config_for_root, for_each};
use crate::error::{Error, Result};
use crate::output;

/// Arguments of `update`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Memory limit, like 512m
    #[arg(short, long, value_name = "SIZE", value_parser = values::memory, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// Number of CPUs, like 1.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus, allow_negative_numbers = true)]
    cpus: Option<u64>,
    /// Weight of its processors among other containers, from 2 to 262144
    #[arg(
        short,
        long,
        value_name = "NUMBER",
        value_parser = values::cpu_shares
    )]
    cpu_shares: Option<u64>,
    /// Most of --memory together with swap of the host; of a container that does not run
    #[arg(long, value_name = "SIZE", value_parser = values::memory_swap, allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// Processors of the host that the machine stays on, like 0-3; of a container that does not run
    #[arg(long, value_name = "CPUS", value_parser = values::cpu_list)]
    cpuset_cpus: Option<CpuList>,
    /// Most processes at a time; -1 for no limit
    #[arg(long, value_name = "NUMBER", value_parser = values::pids_limit, allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// When they are started again: no, on-failure, on-failure:MOST, always, unless-stopped
    #[arg(long, value_name = "POLICY", value_parser = values::restart)]
    restart: Option<Restart>,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Changes limits of containers, and whether they are started again.
pub fn execute(args: Args) -> Result<u8> {
    let update = Update {
        memory: args.memory,
        cpus_milli: args.cpus,
        cpu_shares: args.cpu_shares,
        memory_swap: args.memory_swap,
        host_cpus: args.cpuset_cpus,
        pids_limit: args.pids_limit,
        restart: args.restart,
    };
    if update == Update::default() {
        return Err(Error::invalid("nothing to change").hint("hull update --help"));
    }
    let config = config_for_root()?;
    for_each(&args.containers, |name| {
        update.apply(&config, name)?;
        output::print(format!("{name}\n"))
    })
}
