//! The executable as containerd's shim: what the shim takes from hull's configuration.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use hull_engine::config::Config;
use hull_engine::values::{self, Machine};
use hull_sandbox::config::MachineConfig;
use hull_sandbox::{Error, Result};
use hull_shim::{Settings, Size};

use crate::error::codes;
use crate::oci::machine;

/// The machine of a pod, as its annotations say where they do.
fn machine_of(loaded: &Result<Config>, size: &Size) -> Result<MachineConfig> {
    let mut config = loaded.clone()?;
    let wrong = |name: &str, why: String| Error::invalid(format!("annotation {name}: {why}"));
    let (mut cpus, mut memory) = (size.cpus, 0);
    for (name, value) in &size.annotations {
        match name.as_str() {
            "hull.dev/machine" => {
                config.machine = Machine::from_str(value, false)
                    .map_err(|_| wrong(name, format!("{value:?} is no kind of machine")))?;
            }
            "hull.dev/memory" => memory = values::memory(value).map_err(|why| wrong(name, why))?,
            "hull.dev/cpus" => {
                cpus = Some(values::cpus(value).map_err(|why| wrong(name, why))?);
            }
            "hull.dev/kernel" => {
                let kernel = PathBuf::from(value);
                if !config.pod_kernels.contains(&kernel) {
                    return Err(Error::unsupported(format_args!(
                        "annotation {name}: {value:?} is none of this host's kernels for pods"
                    ))
                    .hint("pod_kernels in hull's configuration lists them"));
                }
                config.kernel = Some(kernel);
            }
            // The configuration knows no other.
            _ => {}
        }
    }
    let mut machine = machine(&Ok(config), size.memory, cpus)?;
    if memory > 0 {
        machine.memory = memory;
    }
    Ok(machine)
}

/// Settings of the shim, of a file or of the configuration in force. As with `hull-oci`, a broken
/// configuration matters only for new machines.
pub fn settings(file: Option<&Path>) -> Result<Settings> {
    let loaded = match file {
        Some(file) => Config::load_file(file),
        None => Config::load(),
    };
    let config = match &loaded {
        Ok(config) => config.clone(),
        Err(_) => Config::defaults()?,
    };
    Ok(Settings {
        run_directory: config.run_dir.clone(),
        network: config.network_limits(false),
        core_scheduling: config.core_sched,
        annotations: config.pod_annotations.clone(),
        machine: Box::new(move |size| machine_of(&loaded, size)),
        grpc: |kind| codes(kind).grpc,
    })
}
