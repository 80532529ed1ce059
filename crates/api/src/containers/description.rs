//! Docker's description of a container, as it comes; and what of it is refused.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use hull_engine::endpoint::{self, Endpoint};
use hull_engine::publish;
use hull_engine::values;
use hull_engine::volumes::{self, Mount};
use hull_image::HealthCheck;
use serde::Deserialize;
use serde_json::Value;

use crate::failure::{Failure, Result};

/// `ContainerConfig`, with what comes beside it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Asked {
    pub(super) hostname: String,
    pub(super) domainname: String,
    pub(super) user: String,
    pub(super) tty: bool,
    pub(super) open_stdin: bool,
    pub(super) stdin_once: bool,
    pub(super) env: Vec<String>,
    pub(super) cmd: Words,
    pub(super) image: String,
    pub(super) volumes: BTreeMap<String, Value>,
    pub(super) working_dir: String,
    pub(super) entrypoint: Option<Words>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) stop_signal: String,
    pub(super) stop_timeout: Option<i64>,
    pub(super) healthcheck: Option<HealthCheck>,
    pub(super) exposed_ports: BTreeMap<String, Value>,
    pub(super) mac_address: String,
    pub(super) network_disabled: bool,
    pub(super) host_config: HostConfig,
    pub(super) networking_config: Networking,
}

/// One word, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Words {
    One(String),
    Several(Vec<String>),
}

impl Default for Words {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Words {
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Several(words) if words.is_empty())
    }

    /// All of them.
    pub fn list(self) -> Vec<String> {
        match self {
            Self::One(word) => vec![word],
            Self::Several(words) => words,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Networking {
    pub(super) endpoints_config: BTreeMap<String, EndpointConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EndpointConfig {
    pub(super) aliases: Vec<String>,
    pub(super) links: Vec<String>,
    pub(super) driver_opts: BTreeMap<String, String>,
    pub(super) mac_address: String,
    #[serde(rename = "IPAMConfig")]
    pub(super) ipam_config: Ipam,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ipam {
    #[serde(rename = "IPv4Address")]
    pub(super) ipv4: String,
    #[serde(rename = "IPv6Address")]
    pub(super) ipv6: String,
    #[serde(rename = "LinkLocalIPs")]
    pub(super) link_local: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct HostConfig {
    pub(super) binds: Vec<String>,
    pub(super) log_config: LogConfig,
    pub(super) network_mode: String,
    pub(super) port_bindings: BTreeMap<String, Vec<Binding>>,
    pub(super) restart_policy: RestartPolicy,
    pub(super) auto_remove: bool,
    pub(super) volumes_from: Vec<String>,
    pub(super) mounts: Vec<MountPoint>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) cap_add: Vec<String>,
    pub(super) cap_drop: Vec<String>,
    pub(super) cgroupns_mode: String,
    pub(super) dns: Vec<String>,
    pub(super) dns_options: Vec<String>,
    pub(super) dns_search: Vec<String>,
    pub(super) extra_hosts: Vec<String>,
    pub(super) group_add: Vec<String>,
    pub(super) ipc_mode: String,
    pub(super) oom_score_adj: i32,
    pub(super) pid_mode: String,
    pub(super) privileged: bool,
    pub(super) publish_all_ports: bool,
    pub(super) readonly_rootfs: bool,
    pub(super) security_opt: Vec<String>,
    pub(super) storage_opt: BTreeMap<String, String>,
    pub(super) tmpfs: BTreeMap<String, String>,
    #[serde(rename = "UTSMode")]
    pub(super) uts_mode: String,
    pub(super) userns_mode: String,
    pub(super) shm_size: u64,
    pub(super) sysctls: BTreeMap<String, String>,
    pub(super) init: bool,
    pub(super) links: Vec<String>,
    pub(super) volume_driver: String,
    pub(super) cgroup_parent: String,
    pub(super) runtime: String,
    pub(super) memory: i64,
    pub(super) memory_swap: i64,
    pub(super) nano_cpus: i64,
    pub(super) cpu_shares: i64,
    pub(super) cpu_period: i64,
    pub(super) cpu_quota: i64,
    pub(super) cpuset_cpus: String,
    pub(super) pids_limit: i64,
    pub(super) ulimits: Vec<Limit>,
    pub(super) console_size: Vec<u16>,
    pub(super) blkio_weight: u64,
    pub(super) blkio_weight_device: Vec<Value>,
    pub(super) blkio_device_read_bps: Vec<Value>,
    pub(super) blkio_device_write_bps: Vec<Value>,
    #[serde(rename = "BlkioDeviceReadIOps")]
    pub(super) blkio_device_read_iops: Vec<Value>,
    #[serde(rename = "BlkioDeviceWriteIOps")]
    pub(super) blkio_device_write_iops: Vec<Value>,
    pub(super) cpuset_mems: String,
    pub(super) cpu_realtime_period: i64,
    pub(super) cpu_realtime_runtime: i64,
    pub(super) memory_reservation: i64,
    pub(super) memory_swappiness: Option<i64>,
    pub(super) oom_kill_disable: bool,
    pub(super) masked_paths: Option<Vec<String>>,
    pub(super) readonly_paths: Option<Vec<String>>,
    pub(super) devices: Vec<Value>,
    pub(super) device_requests: Vec<Value>,
    pub(super) device_cgroup_rules: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct LogConfig {
    pub(super) r#type: String,
    pub(super) config: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Binding {
    pub(super) host_ip: String,
    pub(super) host_port: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct RestartPolicy {
    pub(super) name: String,
    pub(super) maximum_retry_count: u32,
}

impl RestartPolicy {
    /// In hull's words; `None` when there is none.
    pub(super) fn policy(&self) -> Result<Option<values::Restart>> {
        let text = match (self.name.as_str(), self.maximum_retry_count) {
            ("", _) => return Ok(None),
            ("on-failure", most @ 1..) => format!("on-failure:{most}"),
            (name, _) => name.to_owned(),
        };
        values::restart(&text).map(Some).map_err(Failure::bad)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct MountPoint {
    pub(super) r#type: String,
    pub(super) source: String,
    pub(super) target: String,
    pub(super) read_only: bool,
    pub(super) bind_options: BindOptions,
    pub(super) volume_options: VolumeOptions,
    pub(super) tmpfs_options: TmpfsOptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct BindOptions {
    pub(super) create_mountpoint: bool,
    pub(super) propagation: String,
    pub(super) non_recursive: bool,
    pub(super) read_only_force_recursive: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct VolumeOptions {
    pub(super) no_copy: bool,
    pub(super) subpath: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) driver_config: DriverConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct DriverConfig {
    pub(super) name: String,
    pub(super) options: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct TmpfsOptions {
    pub(super) size_bytes: u64,
    pub(super) mode: u32,
    pub(super) options: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Limit {
    pub(super) name: String,
    pub(super) soft: i64,
    pub(super) hard: i64,
}

/// Applies a parser of the command line.
pub(super) fn parse<T>(
    text: &str,
    parser: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<T> {
    parser(text).map_err(Failure::bad)
}

pub(super) fn parse_all<T>(
    texts: &[String],
    parser: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Vec<T>> {
    texts.iter().map(|text| parse(text, &parser)).collect()
}

pub(super) fn parse_given<T>(
    text: &str,
    parser: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Option<T>> {
    match text {
        "" => Ok(None),
        text => parse(text, parser).map(Some),
    }
}

impl EndpointConfig {
    /// In hull's words; the name comes beside.
    pub fn parse(&self) -> Result<Endpoint> {
        let options = self.driver_opts.keys();
        let addresses = self.ipam_config.link_local.iter();
        if let Some(asked) = options.chain(addresses).next() {
            return Err(Failure::unsupported(format_args!(
                "{asked} of a container's network"
            )));
        }
        Ok(Endpoint {
            network: String::new(),
            aliases: parse_all(&self.aliases, values::hostname)?,
            links: parse_all(&self.links, endpoint::link)?,
            mac_address: parse_given(&self.mac_address, publish::mac_address)?,
            ip: parse_given(&self.ipam_config.ipv4, publish::ip)?,
            ip6: parse_given(&self.ipam_config.ipv6, publish::ip6)?,
        })
    }
}

impl MountPoint {
    /// By way of the command line's notation, whose rules hold.
    pub(super) fn parse(&self) -> Result<Mount> {
        let options = &self.volume_options.driver_config.options;
        let options = options.iter().map(|(key, value)| format!("{key}={value}"));
        let options: Vec<String> = options.collect();
        let paths = [&self.source, &self.target, &self.volume_options.subpath];
        if let Some(text) = paths
            .into_iter()
            .chain(&options)
            .find(|text| text.contains(','))
        {
            return Err(Failure::unsupported(format_args!("a comma in {text:?}")));
        }
        let (bind, volume) = (&self.bind_options, &self.volume_options);
        for (what, asked) in [
            (
                "Propagation",
                !matches!(bind.propagation.as_str(), "" | "rprivate" | "private"),
            ),
            ("NonRecursive", bind.non_recursive),
            ("ReadOnlyForceRecursive", bind.read_only_force_recursive),
            ("Labels", !volume.labels.is_empty()),
            (
                "DriverConfig",
                !matches!(volume.driver_config.name.as_str(), "" | "local"),
            ),
            (
                "TmpfsOptions.Options",
                !self.tmpfs_options.options.is_empty(),
            ),
        ] {
            if asked {
                return Err(Failure::unsupported(format_args!("{what} of a mount")));
            }
        }
        let kind = self.r#type.as_str();
        let mut text = format!("type={kind},target={}", self.target);
        if !self.source.is_empty() {
            text.push_str(&format!(",source={}", self.source));
        }
        if self.read_only {
            text.push_str(",readonly");
        }
        if kind == "bind" && self.bind_options.create_mountpoint {
            volumes::create_missing(Path::new(&self.source))?;
        }
        if kind == "volume" {
            if self.volume_options.no_copy {
                text.push_str(",volume-nocopy");
            }
            if !self.volume_options.subpath.is_empty() {
                text.push_str(&format!(",volume-subpath={}", self.volume_options.subpath));
            }
            for option in options {
                text.push_str(&format!(",volume-opt={option}"));
            }
        }
        if kind == "tmpfs" {
            if self.tmpfs_options.size_bytes > 0 {
                text.push_str(&format!(",tmpfs-size={}", self.tmpfs_options.size_bytes));
            }
            if self.tmpfs_options.mode > 0 {
                text.push_str(&format!(",tmpfs-mode={:o}", self.tmpfs_options.mode));
            }
        }
        parse(&text, |text| volumes::mount(OsStr::new(text)))
    }
}

impl HostConfig {
    /// Refuses what containers in machines of their own cannot have.
    pub(super) fn refuse(&self) -> Result<()> {
        let mode = |what: &str, mode: &str| match mode {
            "" | "private" | "shareable" | "default" => Ok(()),
            mode => Err(Failure::unsupported(format_args!(
                "{what} {mode}: the kernel of a container is its machine's"
            ))),
        };
        mode("PidMode", &self.pid_mode)?;
        mode("IpcMode", &self.ipc_mode)?;
        mode("UTSMode", &self.uts_mode)?;
        mode("UsernsMode", &self.userns_mode)?;
        mode("CgroupnsMode", &self.cgroupns_mode)?;
        for (what, list) in [
            ("Devices", &self.devices),
            ("DeviceRequests", &self.device_requests),
            ("DeviceCgroupRules", &self.device_cgroup_rules),
            ("BlkioWeightDevice", &self.blkio_weight_device),
            ("BlkioDeviceReadBps", &self.blkio_device_read_bps),
            ("BlkioDeviceWriteBps", &self.blkio_device_write_bps),
            ("BlkioDeviceReadIOps", &self.blkio_device_read_iops),
            ("BlkioDeviceWriteIOps", &self.blkio_device_write_iops),
        ] {
            if !list.is_empty() {
                return Err(Failure::unsupported(format_args!(
                    "{what}: devices of the host do not reach its machine"
                )));
            }
        }
        for (what, asked) in [
            ("CpusetMems", !self.cpuset_mems.is_empty()),
            ("CpuRealtimePeriod", self.cpu_realtime_period != 0),
            ("CpuRealtimeRuntime", self.cpu_realtime_runtime != 0),
            ("OomKillDisable", self.oom_kill_disable),
            ("MaskedPaths", self.masked_paths.is_some()),
            ("ReadonlyPaths", self.readonly_paths.is_some()),
        ] {
            if asked {
                return Err(Failure::unsupported(what));
            }
        }
        // What Docker calls runc by.
        if !matches!(
            self.runtime.as_str(),
            "" | "hull" | "runc" | "io.containerd.runc.v2" | "io.containerd.hull.v2"
        ) {
            return Err(Failure::bad(format!(
                "unknown or invalid runtime name: {}",
                self.runtime
            )));
        }
        match (self.volume_driver.as_str(), self.cgroup_parent.as_str()) {
            ("" | "local", "") => Ok(()),
            ("" | "local", parent) => Err(Failure::unsupported(format_args!(
                "CgroupParent {parent}: the configuration's cgroup_parent is for all machines"
            ))),
            (driver, _) => Err(Failure::unsupported(format_args!(
                "volume driver {driver:?}: volumes are directories"
            ))),
        }
    }

    /// What is asked for gently and has no effect: Docker says so, too, where a kernel has it not.
    pub(super) fn warnings(&self) -> Vec<&'static str> {
        let given = [
            (self.memory_reservation > 0, "MemoryReservation"),
            (
                self.memory_swappiness.is_some_and(|much| much >= 0),
                "MemorySwappiness",
            ),
            (self.blkio_weight > 0, "BlkioWeight"),
        ];
        let discarded = given.into_iter().filter(|(given, _)| *given);
        discarded
            .map(|(_, what)| match what {
                "MemoryReservation" => "MemoryReservation has no effect: a machine has its memory",
                "MemorySwappiness" => "MemorySwappiness has no effect: it is the guest's",
                _ => "BlkioWeight has no effect",
            })
            .collect()
    }
}
