//! What there is on this host: containers, images, machines, the host itself, in Docker's words
//! (`docker info`), with hull's own keys beside them.

use hull_image::Store;
use hull_machine::Kind;
use hull_machine::probe::{Report, State as Probed};
use hull_sandbox::store::State;
use rustix::system::{sysinfo, uname};
use serde_json::{Value, json};

use crate::config::Config;
use crate::container;
use crate::error::{Result, of_image};
use crate::guest_files::GuestFiles;
use crate::values::enum_name;
use crate::volumes::store;

/// Collects all of it. Probing machines takes a few tenths of a second once per boot of the host.
///
/// # Errors
/// Containers, volumes or images cannot be listed.
pub fn info(config: &Config, images: &Store, version: &str) -> Result<Value> {
    let paths = config.paths();
    let (mut running, mut paused, mut stopped, mut warnings) = (0, 0, 0, Vec::new());
    let containers = container::list(&paths)?;
    for container in &containers {
        match container {
            Ok(container) => match container.status.state {
                State::Running => running += 1,
                State::Paused => paused += 1,
                State::Creating | State::Created | State::Stopped => stopped += 1,
            },
            Err((id, error)) => warnings.push(format!("container {id}: {error}")),
        }
    }
    let (listed, damages) = images.list_with_damages().map_err(of_image)?;
    warnings.extend(damages.iter().map(ToString::to_string));
    let mut ids: Vec<String> = listed.iter().map(|image| image.id.to_string()).collect();
    ids.sort();
    ids.dedup();
    let report = GuestFiles::locate(config)
        .map(|guest| hull_machine::probe(&guest.requirements(config, None)));
    if let Err(error) = &report {
        warnings.push(error.to_string());
    }
    let report = report.ok();
    let host = uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let memory = sysinfo();
    // Of a type that depends on the architecture.
    #[allow(clippy::useless_conversion)]
    let memory = u64::from(memory.totalram).saturating_mul(u64::from(memory.mem_unit.max(1)));
    let has_groups_v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    Ok(json!({
        "ID": machine_id(),
        "Containers": containers.len(),
        "ContainersRunning": running,
        "ContainersPaused": paused,
        "ContainersStopped": stopped,
        "Images": ids.len(),
        "Volumes": store::list(&paths)?.len(),
        "Driver": "overlayfs",
        "DriverStatus": [["Backing Filesystem", file_system(&config.data_dir)]],
        "MemoryLimit": true,
        "SwapLimit": false,
        "PidsLimit": true,
        "IPv4Forwarding": sysctl_is_set("net/ipv4/ip_forward"),
        "LoggingDriver": "json-file",
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": if has_groups_v2 { "2" } else { "1" },
        "KernelVersion": text(host.release()),
        "OperatingSystem": operating_system(),
        "OSType": std::env::consts::OS,
        "Architecture": text(host.machine()),
        "NCPU": std::thread::available_parallelism().map_or(1, usize::from),
        "MemTotal": memory,
        "DockerRootDir": config.data_dir,
        "Name": text(host.nodename()),
        "Labels": [],
        "ServerVersion": version,
        "DefaultRuntime": "hull",
        "Rootless": config.without_root,
        "DefaultNetwork": config.network.to_string(),
        "RunDir": config.run_dir,
        "Machine": enum_name(config.machine),
        "DefaultMachine": report.as_ref().and_then(default_machine),
        "Machines": machines(report.as_ref()),
        "Warnings": warnings,
    }))
}

/// The kind of machine that `auto` takes.
fn default_machine(report: &Report) -> Option<String> {
    report
        .auto
        .as_ref()
        .ok()
        .map(|choice| choice.kind.to_string())
}

/// Each kind of machine, and whether it works here.
fn machines(report: Option<&Report>) -> Vec<Value> {
    let of_kind = |kind: Kind| {
        let (works, why) = match report?.state(kind) {
            Probed::Works { how } => (true, how),
            Probed::Missing { why, .. } => (false, why),
        };
        Some(json!({"Kind": kind.name(), "Works": works, "Details": why}))
    };
    Kind::ALL.into_iter().filter_map(of_kind).collect()
}

fn first_line(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// An id of this host for hull, not systemd's own: that is to be kept to oneself (machine-id(5)).
fn machine_id() -> String {
    match first_line("/etc/machine-id") {
        id if id.is_empty() => id,
        id => hull_image::Digest::of(format!("hull {id}").as_bytes())
            .hex()
            .chars()
            .take(32)
            .collect(),
    }
}

fn sysctl_is_set(name: &str) -> bool {
    first_line(&format!("/proc/sys/{name}")) == "1"
}

/// The name of the host's distribution.
fn operating_system() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(
        || std::env::consts::OS.to_owned(),
        |name| name.trim_matches(['"', '\'']).to_owned(),
    )
}

/// The type of the file system that a directory is on, as its mount says it.
fn file_system(directory: &std::path::Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(directory).map_or(0, |found| found.dev());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("{major}:{minor}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let kind = mounts.lines().find_map(|line| {
        let is_it = line.split(' ').nth(2) == Some(&device);
        let (_, about) = line.split_once(" - ").filter(|_| is_it)?;
        about.split(' ').next().map(str::to_owned)
    });
    kind.unwrap_or_else(|| "unknown".to_owned())
}
