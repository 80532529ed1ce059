//! `POST /containers/create`: Docker's description of a container, as the options that `hull
//! create` takes. What would have an effect in Docker and has none here is refused by name.

use std::ffi::{OsStr, OsString};

use hull_engine::endpoint::{self, Endpoint};
use hull_engine::error::{Error, of_image};
use hull_engine::images::{of_local, own_platform};
use hull_engine::log_options::LogOptions;
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
use serde_json::{Value, json};

use super::description::{Asked, Binding, Words, parse, parse_all, parse_given};
use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};

/// Creates a container.
pub fn create(state: &Shared, call: &mut Call) -> Result<Reply> {
    let name = call.query.get("name").map(str::to_owned);
    let platform = own_platform(call.query.get("platform").unwrap_or_default())?;
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
        store = store.with_platform(platform);
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
        let log = &host.log_config;
        let options = log.config.iter().map(|(key, value)| (&key[..], &value[..]));
        let log = LogOptions::parse(&log.r#type, options).map_err(Failure::bad)?;
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
            log,
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
                volumes::create_missing(path)?;
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
