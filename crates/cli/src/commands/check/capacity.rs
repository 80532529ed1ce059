//! What there is of the host for machines: memory, processors, user and group ids.

use hull_engine::config::Config;
use hull_machine::{Kind, Report};

use super::Finding;
use crate::output;

/// Ids that images of distributions use: up to `nobody` of Debian, 65534.
const USUAL_IDS: u64 = 65_536;

/// All of it.
pub fn findings(config: &Config, report: &Report) -> Vec<Finding> {
    let mut findings = Vec::new();
    let info = rustix::system::sysinfo();
    let memory = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    findings.push(of_memory(config.memory, memory));
    let kind = config.machine.kind();
    let kind = kind.or(report.auto.as_ref().ok().map(|choice| choice.kind));
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    findings.extend(kind.map(|kind| processors(kind, host)));
    for (what, file) in [("user ids", "uid_map"), ("group ids", "gid_map")] {
        // A kernel without user namespaces has no such file, and all ids.
        if let Ok(map) = std::fs::read_to_string(format!("/proc/self/{file}")) {
            findings.extend(ids(what, &map));
        }
    }
    findings
}

/// Memory of a machine that nobody asks more or less for, and of the host.
fn of_memory(machine: u64, host: u64) -> Finding {
    let what = "memory";
    let (shown, all) = (output::binary_size(machine), output::binary_size(host));
    match machine > host {
        true => Finding::note(
            what,
            format!("{shown} for a machine, more than the host's {all}"),
            Some("set a smaller memory in the configuration".to_owned()),
        ),
        false => Finding::ok(what, format!("{shown} for a machine, of the host's {all}")),
    }
}

fn processors(kind: Kind, host: usize) -> Finding {
    let what = "processors";
    let most = kind.backend().features().max_vcpus;
    match most.and_then(|most| usize::try_from(most).ok()) {
        Some(most) if most < host => Finding::note(
            what,
            format!("{most} for a machine of kind {kind}, of the host's {host}"),
            Some("--machine qemu, or kvm where it works, gives a container more".to_owned()),
        ),
        _ => Finding::ok(what, format!("up to {host} for a machine")),
    }
}

/// What files of images may belong to: a problem in a user namespace that has few ids.
fn ids(what: &'static str, map: &str) -> Option<Finding> {
    let number = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
    let total: u64 = map.lines().filter_map(number).sum();
    (total < USUAL_IDS).then(|| {
        Finding::note(
            what,
            format!("{total}: images with files of other ids cannot be unpacked"),
            Some("65536 ids in /etc/subuid and /etc/subgid: sudo usermod --add-subuids".to_owned()),
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Level;
    use super::*;

    #[test]
    fn what_does_not_fit_the_host_is_told() {
        assert_eq!(of_memory(256 << 20, 1 << 30).level, Level::Ok);
        assert_eq!(of_memory(2 << 30, 1 << 30).level, Level::Note);
        assert_eq!(processors(Kind::Uml, 1).level, Level::Ok);
        assert_eq!(processors(Kind::Uml, 2).level, Level::Note);
        assert_eq!(processors(Kind::Qemu, 64).level, Level::Ok);
    }

    #[test]
    fn few_ids_are_told() {
        assert_eq!(ids("user ids", "         0          0 4294967295\n"), None);
        assert_eq!(ids("user ids", "0 1000 1\n1 100000 65535\n"), None);
        let few = ids("user ids", "0 1000 1\n1 100000 1000\n").unwrap();
        assert!(few.found.starts_with("1001:"), "{}", few.found);
    }
}
