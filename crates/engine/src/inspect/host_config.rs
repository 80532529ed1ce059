//! `HostConfig`: what was asked for, in Docker's words.

use hull_network::ports::HostPort;
use serde_json::{Map, Value, json};

use super::container::Known;
use super::{extend, list};
use crate::publish::{HOST_GATEWAY, HostAddress};
use crate::values::{Restart, SecurityOption};
use crate::volumes::{Source, Volume};

pub(super) fn host_config(known: &Known<'_>) -> Value {
    let (options, network) = (&known.options, &known.options.network);
    let linux = &known.spec["linux"];
    let limits = options.ulimits.iter().map(|limit| {
        // Docker's number for none.
        let number = |limit: u64| i64::try_from(limit).unwrap_or(-1);
        json!({
            "Name": limit.name.to_ascii_lowercase(),
            "Hard": number(limit.hard),
            "Soft": number(limit.soft),
        })
    });
    let hosts = network
        .add_host
        .iter()
        .map(|(name, address)| match address {
            HostAddress::Ip(address) => format!("{name}:{address}"),
            HostAddress::Gateway => format!("{name}:{HOST_GATEWAY}"),
        });
    let tmpfs: Map<String, Value> = options
        .tmpfs
        .iter()
        .map(|tmpfs| {
            let place = tmpfs.destination.display().to_string();
            (place, json!(tmpfs.options.join(",")))
        })
        .collect();
    let memory = options.memory.unwrap_or(0);
    let size = options
        .storage_size
        .map(|size| json!({"size": size.to_string()}));
    let mut asked = json!({
        "Binds": list(options.volumes.iter().filter_map(|volume| bind(known, volume))),
        "LogConfig": options.log.object(),
        "NetworkMode": known.details.network,
        "PortBindings": port_bindings(known),
        "RestartPolicy": restart_policy(options.restart),
        "AutoRemove": known.details.auto_remove,
        "Annotations": known.spec["annotations"],
        "CapAdd": list(options.cap_add.iter().cloned()),
        "CapDrop": list(options.cap_drop.iter().cloned()),
        "Dns": network.dns.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "DnsOptions": network.dns_option,
        "DnsSearch": network.dns_search,
        "ExtraHosts": list(hosts),
        "ReadonlyRootfs": options.read_only,
        "SecurityOpt": list(options.security.iter().map(security)),
        "StorageOpt": size,
        "Tmpfs": if tmpfs.is_empty() { Value::Null } else { Value::Object(tmpfs) },
        "ShmSize": options.shm_size.unwrap_or(0),
        "Sysctls": Known::map(&options.sysctl),
        "Runtime": "hull",
        "Memory": memory,
        "NanoCpus": options.cpus_milli.unwrap_or(0).saturating_mul(1_000_000),
        "MemorySwap": options.memory_swap.unwrap_or(0),
        "CpusetCpus": options.host_cpus.to_string(),
        "PidsLimit": options.pids_limit,
        "Ulimits": limits.collect::<Vec<_>>(),
        "Init": options.init,
        "GroupAdd": list(options.groups.iter().cloned()),
        "OomScoreAdj": options.oom_score_adj.unwrap_or(0),
        "Privileged": options.privileged,
        "PublishAllPorts": options.publish_all,
        "CpuShares": options.cpu_shares.unwrap_or(0),
        "MaskedPaths": linux["maskedPaths"],
        "ReadonlyPaths": linux["readonlyPaths"],
    });
    extend(&mut asked, not_there());
    asked
}

fn restart_policy(policy: Restart) -> Value {
    let (name, most) = match policy {
        Restart::No => ("no", 0),
        Restart::Always => ("always", 0),
        Restart::UnlessStopped => ("unless-stopped", 0),
        Restart::OnFailure(most) => ("on-failure", most.unwrap_or(0)),
    };
    json!({"Name": name, "MaximumRetryCount": most})
}

/// What cannot be asked for, with Docker's values for that.
fn not_there() -> Value {
    json!({
        "ContainerIDFile": "",
        "VolumeDriver": "",
        "VolumesFrom": null,
        "CgroupnsMode": "private",
        "IpcMode": "private",
        "Cgroup": "",
        "Links": null,
        "PidMode": "",
        "UTSMode": "",
        "UsernsMode": "",
        "Isolation": "",
        "CgroupParent": "",
        "BlkioWeight": 0,
        "CpuPeriod": 0,
        "CpuQuota": 0,
        "CpusetMems": "",
        "Devices": [],
        "MemoryReservation": 0,
        "MemorySwappiness": null,
        "OomKillDisable": false,
    })
}

/// A volume as `-v` takes it, unless it has no name.
fn bind(known: &Known<'_>, volume: &Volume) -> Option<String> {
    let source = match &volume.source {
        _ if known.is_anonymous(volume) => return None,
        Source::Host(path) => path.display().to_string(),
        Source::Named(name) => name.clone(),
        Source::Anonymous => return None,
    };
    let access = if volume.read_only { ":ro" } else { "" };
    Some(format!("{source}:{}{access}", volume.destination.display()))
}

/// What `--publish` asked for.
fn port_bindings(known: &Known<'_>) -> Value {
    let mut bindings = Map::new();
    let publish = &known.options.network.publish;
    for port in publish.iter().flat_map(|ports| &ports.0) {
        let inside = format!("{}/{}", port.container_port, port.protocol.name());
        let outside = match port.host_port {
            HostPort::Any => String::new(),
            HostPort::One(port) => port.to_string(),
            HostPort::OneOf(first, last) => format!("{first}-{last}"),
        };
        let address = port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
        let binding = json!({"HostIp": address, "HostPort": outside});
        match bindings.get_mut(&inside).and_then(Value::as_array_mut) {
            Some(bindings) => bindings.push(binding),
            None => {
                bindings.insert(inside, json!([binding]));
            }
        }
    }
    Value::Object(bindings)
}

fn security(option: &SecurityOption) -> String {
    match option {
        SecurityOption::Unconfined => "seccomp=unconfined".to_owned(),
        SecurityOption::Seccomp(file) => format!("seccomp={}", file.display()),
        SecurityOption::SeccompText(text) => format!("seccomp={text}"),
        SecurityOption::NoNewPrivileges(yes) => format!("no-new-privileges={yes}"),
    }
}
