//! `hull check --overhead`: what a pod costs this host beside its containers.

use std::time::Duration;

use hull_engine::config::Config;
use hull_sandbox::config::{MAX_NETS, MachineConfig};
use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::cost::HostMemory;
use serde::Serialize;

use super::with_machine;
use crate::error::{Error, Result};
use crate::oci;
use crate::output::{self, binary_size};

/// How long the guest is left alone before it is measured, and how long its processor time is
/// measured.
const IDLE: Duration = Duration::from_secs(2);

/// Memory limit of the containers that the machine is made for, bytes. What is reserved does not
/// depend on it.
const LIMIT: u64 = 64 << 20;

/// What a RuntimeClass says is a multiple of this, bytes.
const MEMORY_STEP: u64 = 8 << 20;

/// Thousandths of a processor, likewise.
const CPU_STEP: u64 = 10;

/// What was measured, and what follows for a RuntimeClass.
#[derive(Serialize)]
struct Overhead {
    machine: hull_machine::Kind,
    /// Of an idle pod, PSS in bytes.
    idle: HostMemory,
    /// Of an idle pod, thousandths of a processor.
    idle_cpu: u64,
    /// `podFixed.memory`, bytes.
    memory: u64,
    /// `podFixed.cpu`, thousandths of a processor.
    cpu: u64,
}

/// Measures, and prints.
pub fn execute(config: &Config, json: bool) -> Result<()> {
    let privileges = super::privileges();
    if privileges.level == super::Level::Error {
        let error = Error::new(format!("cannot start a machine: {}", privileges.found));
        return Err(error.hint(privileges.remedy.unwrap_or_default()));
    }
    let mut machine = oci::machine(&Ok(config.clone()), Some(LIMIT), None)?;
    machine.nets = MAX_NETS;
    machine.spare_disks = MachineConfig::POD_SPARE_DISKS;
    let kind = machine.choice.kind;
    let reserved = machine.clone();
    let (idle, idle_cpu) = with_machine(config, machine, |client| {
        std::thread::sleep(IDLE);
        let (_, before) = cost(client)?;
        std::thread::sleep(IDLE);
        let (memory, after) = cost(client)?;
        let ns = u128::from(after.saturating_sub(before));
        let thousandths = (ns * 1000).div_ceil(IDLE.as_nanos());
        Ok((memory, u64::try_from(thousandths).unwrap_or(u64::MAX)))
    })?;
    let memory = reserved.reserve(idle.sandbox + idle.devices);
    let overhead = Overhead {
        machine: kind,
        idle,
        idle_cpu,
        memory: memory.next_multiple_of(MEMORY_STEP),
        cpu: idle_cpu.max(1).next_multiple_of(CPU_STEP),
    };
    match json {
        true => output::print_json(&overhead),
        false => output::print(render(&overhead)),
    }
}

fn cost(client: &Client) -> Result<(HostMemory, u64)> {
    match client.ask(&Request::Cost, &[])?.message {
        Reply::Cost(memory, cpu_ns) => Ok((memory, cpu_ns)),
        _ => Err(Error::new("the sandbox has another answer than its cost")),
    }
}

fn render(overhead: &Overhead) -> String {
    let Overhead { idle, .. } = overhead;
    format!(
        "# An idle pod on this host, machine {}: {} ({} of them the machine, {} the device process, \
         {} the shim).\n\
         # Reserved are the guest's own share beside the limits of its containers, and these \
         processes.\n\
         overhead:\n  podFixed:\n    memory: {}Mi\n    cpu: {}m\n",
        overhead.machine,
        binary_size(idle.total()),
        binary_size(idle.machine),
        binary_size(idle.devices),
        binary_size(idle.sandbox),
        overhead.memory >> 20,
        overhead.cpu,
    )
}
