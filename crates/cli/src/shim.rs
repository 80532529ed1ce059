//! The executable as containerd's shim: what the shim takes from hull's configuration.

use hull_engine::config::Config;
use hull_sandbox::Result;
use hull_shim::Settings;

use crate::error::codes;
use crate::oci::machine;

/// Settings of the shim. As with `hull-oci`, a broken configuration matters only for new machines.
pub fn settings() -> Result<Settings> {
    let loaded = Config::load();
    let config = match &loaded {
        Ok(config) => config.clone(),
        Err(_) => Config::defaults()?,
    };
    Ok(Settings {
        run_directory: config.run_dir.clone(),
        network: config.network_limits(false),
        core_scheduling: config.core_sched,
        machine: Box::new(move |memory, cpus_milli| machine(&loaded, memory, cpus_milli)),
        grpc: |kind| codes(kind).grpc,
    })
}
