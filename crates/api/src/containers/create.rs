//! `POST /containers/create`: Docker's description of a container, as the options that `hull
//! create` takes. What would have an effect in Docker and has none here is refused by name.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use hull_engine::endpoint::{self, Endpoint};
use hull_engine::error::{Error, of_image};
use hull_engine::images::of_local;
use hull_engine::network::NetworkOptions;
use hull_engine::options::RunOptions;
use hull_engine::run::Run;
use hull_engine::values::{self, Network};
use hull_engine::volumes::{self, Mount, Source, Volume};
use hull_engine::{publish, unpacker};
use hull_image::{HealthCheck, Reference};
use hull_sandbox::config::TerminalSize;
use hull_sandbox::timings::{Timings, now_ns};
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};

/// `ContainerConfig`, with what comes beside it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Asked {
    hostname: String,
    domainname: String,
    user: String,
    tty: bool,
    open_stdin: bool,
    stdin_once: bool,
    env: Vec<String>,
    cmd: Words,
    image: String,
    volumes: BTreeMap<String, Value>,
    working_dir: String,
    entrypoint: Option<Words>,
    labels: BTreeMap<String, String>,
    stop_signal: String,
    stop_timeout: Option<i64>,
    healthcheck: Option<HealthCheck>,
    exposed_ports: BTreeMap<String, Value>,
    mac_address: String,
    network_disabled: bool,
    host_config: HostConfig,
    networking_config: Networking,
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
    fn is_empty(&self) -> bool {
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
struct Networking {
    endpoints_config: BTreeMap<String, EndpointConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EndpointConfig {
    aliases: Vec<String>,
    links: Vec<String>,
    driver_opts: BTreeMap<String, String>,
    mac_address: String,
    #[serde(rename = "IPAMConfig")]
    ipam_config: Ipam,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ipam {
    #[serde(rename = "IPv4Address")]
    ipv4: String,
    #[serde(rename = "IPv6Address")]
    ipv6: String,
    #[serde(rename = "LinkLocalIPs")]
    link_local: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HostConfig {
    binds: Vec<String>,
    log_config: LogConfig,
    network_mode: String,
    port_bindings: BTreeMap<String, Vec<Binding>>,
    restart_policy: RestartPolicy,
    auto_remove: bool,
    volumes_from: Vec<String>,
    mounts: Vec<MountPoint>,
    annotations: BTreeMap<String, String>,
    cap_add: Vec<String>,
    cap_drop: Vec<String>,
    cgroupns_mode: String,
    dns: Vec<String>,
    dns_options: Vec<String>,
    dns_search: Vec<String>,
    extra_hosts: Vec<String>,
    group_add: Vec<String>,
    ipc_mode: String,
    oom_score_adj: i32,
    pid_mode: String,
    privileged: bool,
    publish_all_ports: bool,
    readonly_rootfs: bool,
    security_opt: Vec<String>,
    storage_opt: BTreeMap<String, String>,
    tmpfs: BTreeMap<String, String>,
    #[serde(rename = "UTSMode")]
    uts_mode: String,
    userns_mode: String,
    shm_size: u64,
    sysctls: BTreeMap<String, String>,
    init: bool,
    links: Vec<String>,
    volume_driver: String,
    cgroup_parent: String,
    runtime: String,
    memory: i64,
    memory_swap: i64,
    nano_cpus: i64,
    cpu_shares: i64,
    cpu_period: i64,
    cpu_quota: i64,
    cpuset_cpus: String,
    pids_limit: i64,
    ulimits: Vec<Limit>,
    console_size: Vec<u16>,
    blkio_weight: u64,
    blkio_weight_device: Vec<Value>,
    blkio_device_read_bps: Vec<Value>,
    blkio_device_write_bps: Vec<Value>,
    #[serde(rename = "BlkioDeviceReadIOps")]
    blkio_device_read_iops: Vec<Value>,
    #[serde(rename = "BlkioDeviceWriteIOps")]
    blkio_device_write_iops: Vec<Value>,
    cpuset_mems: String,
    cpu_realtime_period: i64,
    cpu_realtime_runtime: i64,
    memory_reservation: i64,
    memory_swappiness: Option<i64>,
    oom_kill_disable: bool,
    masked_paths: Option<Vec<String>>,
    readonly_paths: Option<Vec<String>>,
    devices: Vec<Value>,
    device_requests: Vec<Value>,
    device_cgroup_rules: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct LogConfig {
    r#type: String,
    config: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Binding {
    host_ip: String,
    host_port: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct RestartPolicy {
    name: String,
    maximum_retry_count: u32,
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
struct MountPoint {
    r#type: String,
    source: String,
    target: String,
    read_only: bool,
    bind_options: BindOptions,
    volume_options: VolumeOptions,
    tmpfs_options: TmpfsOptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct BindOptions {
    create_mountpoint: bool,
    propagation: String,
    non_recursive: bool,
    read_only_force_recursive: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct VolumeOptions {
    no_copy: bool,
    subpath: String,
    labels: BTreeMap<String, String>,
    driver_config: DriverConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct DriverConfig {
    name: String,
    options: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct TmpfsOptions {
    size_bytes: u64,
    mode: u32,
    options: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Limit {
    name: String,
    soft: i64,
    hard: i64,
}

/// Creates a container.
pub fn create(state: &Shared, call: &mut Call) -> Result<Reply> {
    let name = call.query.get("name").map(str::to_owned);
    let platform = call.query.get("platform").map(str::to_owned);
    let asked: Asked = call.json()?;
    if asked.image.is_empty() {
        return Err(Failure::bad("no image was given"));
    }
    let warnings = asked.host_config.warnings();
    let size = asked.host_config.console_size.clone();
    // An empty list means no entry point, and what the image has for one is its command.
    let keeps_command = asked.entrypoint.as_ref().is_some_and(Words::is_empty);
    let mut options = asked.options(state, name)?;
    let config = &state.config;
    let reference: Reference = options.image.parse().map_err(of_image)?;
    let mut store = unpacker::store(config)?;
    if let Some(platform) = platform {
        store = store.with_platform(platform.parse().map_err(Failure::bad)?);
    }
    let image = store.inspect(&reference).map_err(|error| {
        let mut error = of_local(error);
        if error.kind == hull_engine::error::ErrorKind::NotFound {
            // Clients pull then; some look for these words.
            error = Error::not_found(format!("No such image: {}", options.image));
        }
        error
    })?;
    if keeps_command && options.command.is_empty() {
        options.command = image.config.cmd.iter().map(OsString::from).collect();
    }
    let timings = Timings::default();
    let run = Run::prepare(options, config, now_ns(), &timings)?;
    let _hold = store.hold(&image, run.id()).map_err(of_image)?;
    let created = run.create(&image)?;
    if let &[rows, columns] = &size[..]
        && rows > 0
        && columns > 0
    {
        let size = TerminalSize { rows, columns };
        state.windows.expect(&created.id, size);
    }
    Ok(Reply::Json(
        StatusCode::CREATED,
        json!({"Id": created.id, "Warnings": warnings}),
    ))
}

/// Applies a parser of the command line.
fn parse<T>(text: &str, parser: impl Fn(&str) -> std::result::Result<T, String>) -> Result<T> {
    parser(text).map_err(Failure::bad)
}

fn parse_all<T>(
    texts: &[String],
    parser: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Vec<T>> {
    texts.iter().map(|text| parse(text, &parser)).collect()
}

fn parse_given<T>(
    text: &str,
    parser: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Option<T>> {
    match text {
        "" => Ok(None),
        text => parse(text, parser).map(Some),
    }
}

impl Asked {
    fn options(self, state: &Shared, name: Option<String>) -> Result<RunOptions> {
        self.host_config.refuse()?;
        let host = &self.host_config;
        let (volumes, tmpfs) = self.mounts(state)?;
        let network = self.network(state)?;
        let environment = self.environment()?;
        let hostname = parse_given(&self.full_hostname(), values::hostname)?;
        let entrypoint = match self.entrypoint {
            None => None,
            Some(words) => match &words.list()[..] {
                [] => Some(OsString::new()),
                [one] if one.is_empty() => Some(OsString::new()),
                words => Some(Value::from(words).to_string().into()),
            },
        };
        let log = match host.log_config.r#type.as_str() {
            "" => false,
            driver => !parse(driver, values::log_driver)?,
        };
        for option in host.log_config.config.keys() {
            // Of the output the newest part is kept, in two files.
            if !matches!(option.as_str(), "max-size" | "max-file" | "mode") {
                return Err(Failure::unsupported(format_args!("log option {option}")));
            }
        }
        let max_size = host.log_config.config.get("max-size");
        let limits = host.ulimits.iter().map(|limit| {
            let text = format!("{}={}:{}", limit.name, limit.soft, limit.hard);
            parse(&text, values::ulimit)
        });
        let sysctls = host
            .sysctls
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
        Ok(RunOptions {
            command: self.cmd.list().into_iter().map(OsString::from).collect(),
            interactive: self.open_stdin,
            stdin_stays: self.open_stdin && !self.stdin_once,
            terminal: self.tty,
            remove: host.auto_remove,
            name: name
                .map(|name| parse(name.trim_start_matches('/'), values::container_name))
                .transpose()?,
            environment,
            directory: parse_given(&self.working_dir, values::directory)?,
            user: parse_given(&self.user, values::user)?,
            entrypoint,
            groups: parse_all(&host.group_add, values::group)?,
            privileged: host.privileged,
            oom_score_adj: Some(host.oom_score_adj).filter(|adjustment| *adjustment != 0),
            cpu_shares: positive(host.cpu_shares),
            stop_timeout: self.stop_timeout,
            expose: self
                .exposed_ports
                .keys()
                .map(|port| parse(port, publish::expose))
                .collect::<Result<_>>()?,
            publish_all: host.publish_all_ports,
            hostname,
            restart: host.restart_policy.policy()?.unwrap_or_default(),
            health: self.healthcheck.map(of_docker),
            init: host.init,
            stop_signal: parse_given(&self.stop_signal, values::signal_name)?,
            labels: self.labels.into_iter().collect(),
            annotations: host.annotations.clone().into_iter().collect(),
            log: values::LogOptions {
                off: log,
                max_size: max_size.map(|size| parse(size, values::size)).transpose()?,
            },
            memory: positive(host.memory),
            memory_swap: Some(host.memory_swap).filter(|both| *both != 0),
            host_cpus: parse_given(&host.cpuset_cpus, values::cpu_list)?.unwrap_or_default(),
            cpus_milli: cpus_milli(host.nano_cpus, host.cpu_quota, host.cpu_period),
            pids_limit: Some(host.pids_limit).filter(|limit| *limit != 0),
            ulimits: limits.collect::<Result<_>>()?,
            shm_size: Some(host.shm_size).filter(|size| *size != 0),
            storage_size: host
                .storage_opt
                .iter()
                .map(|(key, value)| parse(&format!("{key}={value}"), values::storage_option))
                .next()
                .transpose()?,
            read_only: host.readonly_rootfs,
            cap_add: host.cap_add.clone(),
            cap_drop: host.cap_drop.clone(),
            security: host
                .security_opt
                .iter()
                .filter(|text| !matches!(text.as_str(), "seccomp=builtin" | "seccomp:builtin"))
                .map(|text| parse(text, values::security_option))
                .collect::<Result<_>>()?,
            sysctl: sysctls
                .map(|text| parse(&text, values::sysctl))
                .collect::<Result<_>>()?,
            image: self.image,
            volumes,
            tmpfs,
            network,
            machine: None,
            kernel: None,
        })
    }

    fn full_hostname(&self) -> String {
        match (self.hostname.as_str(), self.domainname.as_str()) {
            (name, "") => name.to_owned(),
            ("", domain) => domain.to_owned(),
            (name, domain) => format!("{name}.{domain}"),
        }
    }

    /// A name without a value is the environment of who asks, which is not known here: it is left
    /// out, as Docker does.
    fn environment(&self) -> Result<Vec<OsString>> {
        let with_value = self.env.iter().filter(|text| text.contains('='));
        with_value
            .map(|text| {
                values::environment(OsStr::new(text))
                    .map(|variable| variable.unwrap_or_else(|| text.into()))
                    .map_err(Failure::bad)
            })
            .collect()
    }

    fn mounts(&self, state: &Shared) -> Result<(Vec<Volume>, Vec<volumes::Tmpfs>)> {
        let host = &self.host_config;
        let mut all = Vec::new();
        for bind in &host.binds {
            let volume = parse(bind, |text| volumes::volume(OsStr::new(text)))?;
            if let Source::Host(path) = &volume.source {
                create_missing(path)?;
            }
            all.push(volume);
        }
        let mut tmpfs = Vec::new();
        for mount in &host.mounts {
            match mount.parse()? {
                Mount::Volume(volume) => all.push(volume),
                Mount::Tmpfs(memory) => tmpfs.push(memory),
            }
        }
        for (place, options) in &host.tmpfs {
            let text = match options.as_str() {
                "" => place.clone(),
                options => format!("{place}:{options}"),
            };
            tmpfs.push(parse(&text, volumes::tmpfs)?);
        }
        for place in self.volumes.keys() {
            let place = parse(place, |text| volumes::volume(OsStr::new(text)))?;
            if !all
                .iter()
                .any(|volume| volume.destination == place.destination)
            {
                all.push(place);
            }
        }
        for other in &host.volumes_from {
            volumes::add_those_of(&mut all, &tmpfs, other, &state.config.paths())?;
        }
        Ok((all, tmpfs))
    }

    fn network(&self, state: &Shared) -> Result<NetworkOptions> {
        let host = &self.host_config;
        let mut options = NetworkOptions {
            network: match (self.network_disabled, host.network_mode.as_str()) {
                (true, _) => Some(Network::None),
                (false, "" | "default") => None,
                (false, mode) => Some(named(state, mode)?),
            },
            publish: Vec::new(),
            dns: parse_all(&host.dns, publish::dns)?,
            dns_search: parse_all(&host.dns_search, publish::dns_search)?,
            dns_option: parse_all(&host.dns_options, publish::dns_option)?,
            add_host: parse_all(&host.extra_hosts, publish::add_host)?,
            mac_address: parse_given(&self.mac_address, publish::mac_address)?,
            links: parse_all(&host.links, endpoint::link)?,
            ..NetworkOptions::default()
        };
        for (port, bindings) in &host.port_bindings {
            let none = [Binding::default()];
            let bindings = if bindings.is_empty() {
                &none[..]
            } else {
                &bindings[..]
            };
            for binding in bindings {
                let ip = match binding.host_ip.as_str() {
                    "" => String::new(),
                    ip if ip.contains(':') && !ip.starts_with('[') => format!("[{ip}]:"),
                    ip => format!("{ip}:"),
                };
                let outside = match (ip.is_empty(), binding.host_port.as_str()) {
                    (true, "") => String::new(),
                    (_, outside) => format!("{ip}{outside}:"),
                };
                options
                    .publish
                    .push(parse(&format!("{outside}{port}"), publish::publish)?);
            }
        }
        let first = options.network.as_ref().map(Network::to_string);
        // Old clients ask for the network by this only.
        let mut endpoints: Vec<_> = self.networking_config.endpoints_config.iter().collect();
        let mut named_endpoints = Vec::new();
        for (name, endpoint) in endpoints.drain(..) {
            named_endpoints.push((named(state, name)?, endpoint));
        }
        let is_first = |network: &Network| first.as_deref() == Some(&network.to_string());
        named_endpoints.sort_by_key(|(network, _)| !is_first(network));
        let mut networks = Vec::new();
        for (network, endpoint) in named_endpoints {
            let is_first = is_first(&network);
            if networks.is_empty() && !is_first && first.is_some() {
                networks.extend(
                    options
                        .network
                        .clone()
                        .map(|first| (first, Endpoint::default())),
                );
            }
            networks.push((network, endpoint.parse()?));
        }
        if !networks.is_empty() {
            options.join(networks)?;
        }
        Ok(options)
    }
}

/// A network, which may be given by its id.
fn named(state: &Shared, text: &str) -> Result<Network> {
    match parse(text, values::network)? {
        Network::Named(name) => {
            let name = endpoint::name_of(&state.config, &name)?;
            Ok(Network::Named(name))
        }
        other => Ok(other),
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

/// Docker creates the directory of the host that a bind names.
fn create_missing(path: &PathBuf) -> Result<()> {
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    std::fs::create_dir_all(path)
        .map_err(|error| Failure::bad(format!("create {}: {error}", path.display())))
}

/// Docker's zeros are what is not there.
fn of_docker(check: HealthCheck) -> HealthCheck {
    let some = |time: Option<u64>| time.filter(|time| *time != 0);
    HealthCheck {
        test: check.test,
        interval: some(check.interval),
        timeout: some(check.timeout),
        start_period: some(check.start_period),
        start_interval: some(check.start_interval),
        retries: check.retries.filter(|retries| *retries != 0),
    }
}

impl MountPoint {
    /// By way of the command line's notation, whose rules hold.
    fn parse(&self) -> Result<Mount> {
        for text in [&self.source, &self.target, &self.volume_options.subpath] {
            if text.contains(',') {
                return Err(Failure::unsupported(format_args!(
                    "a comma in the path {text:?}"
                )));
            }
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
                "DriverConfig.Options",
                !volume.driver_config.options.is_empty(),
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
            create_missing(&PathBuf::from(&self.source))?;
        }
        if kind == "volume" {
            if self.volume_options.no_copy {
                text.push_str(",volume-nocopy");
            }
            if !self.volume_options.subpath.is_empty() {
                text.push_str(&format!(",volume-subpath={}", self.volume_options.subpath));
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
    fn refuse(&self) -> Result<()> {
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
    fn warnings(&self) -> Vec<&'static str> {
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

/// Processors, in thousandths.
pub(super) fn cpus_milli(nano_cpus: i64, quota: i64, period: i64) -> Option<u64> {
    const DEFAULT_PERIOD: i64 = 100_000;
    let milli = match (nano_cpus, quota) {
        (nano @ 1.., _) => nano / 1_000_000,
        (_, quota @ 1..) => {
            let period = match period {
                period @ 1.. => period,
                _ => DEFAULT_PERIOD,
            };
            quota.saturating_mul(1000) / period
        }
        _ => return None,
    };
    u64::try_from(milli.max(1)).ok()
}
