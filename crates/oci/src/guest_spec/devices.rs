//! Devices: the guest's own can be had, those of the host cannot.

use std::path::Path;

use hull_sandbox::error::Result;

use super::{Plan, refused};
use crate::bundle::Bundle;

/// Character devices of the guest's kernel: numbers (Documentation/admin-guide/devices.txt of Linux) and path.
const GUEST_DEVICES: [(u32, u32, &str); 10] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// The path in the guest of a character device with these numbers.
pub fn guest_device(numbers: (u32, u32)) -> Option<&'static str> {
    GUEST_DEVICES
        .into_iter()
        .find(|(major, minor, _)| (*major, *minor) == numbers)
        .map(|(.., path)| path)
}

/// Whether the host has a device with these numbers. A node of one that there is nowhere is just a node.
fn is_of_host(kind: &str, (major, minor): (u32, u32)) -> bool {
    let kind = if kind == "b" { "block" } else { "char" };
    Path::new("/sys/dev")
        .join(kind)
        .join(format!("{major}:{minor}"))
        .exists()
}

pub(super) fn plan(plan: &mut Plan, bundle: &Bundle) -> Result<()> {
    let everything = allows_everything(bundle);
    let Some(devices) = plan.spec["linux"]["devices"].as_array_mut() else {
        return Ok(());
    };
    let mut kept = Vec::new();
    for device in std::mem::take(devices) {
        let number = |name: &str| {
            device[name]
                .as_i64()
                .and_then(|number| u32::try_from(number).ok())
                .unwrap_or(u32::MAX)
        };
        let kind = device["type"].as_str().unwrap_or_default();
        // Every container has a terminal multiplexer and a console of its own.
        let path = device["path"].as_str().unwrap_or_default();
        if path == "/dev/ptmx" || path == "/dev/console" {
            continue;
        }
        let own = match kind {
            "c" | "u" | "b" => {
                let numbers = (number("major"), number("minor"));
                (kind != "b" && guest_device(numbers).is_some()) || !is_of_host(kind, numbers)
            }
            // A named pipe; what else there is the agent refuses.
            _ => true,
        };
        if own {
            kept.push(device);
        } else if !everything {
            return Err(refused(
                format_args!(
                    "linux.devices: {} ({kind} {}:{})",
                    device["path"].as_str().unwrap_or_default(),
                    device["major"],
                    device["minor"]
                ),
                "it is a device of the host, and the guest has no such device",
            ));
        }
        // A privileged container gets every device that there is: in the guest that is every device of the guest.
    }
    *devices = kept;
    Ok(())
}

/// Whether the spec lets the container use every device: what engines make of `--privileged`.
fn allows_everything(bundle: &Bundle) -> bool {
    let rules = bundle
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default();
    rules.iter().any(|rule| {
        let wild = |number: Option<i64>| number.is_none_or(|number| number < 0);
        let all = rule
            .typ()
            .is_none_or(|kind| kind == oci_spec::runtime::LinuxDeviceType::A);
        rule.allow()
            && all
            && wild(rule.major())
            && wild(rule.minor())
            && rule
                .access()
                .as_ref()
                .is_none_or(|access| "rwm".chars().all(|letter| access.contains(letter)))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    /// The numbers of a device that this host has and guests have not.
    fn of_host() -> (u32, u32) {
        fs::read_dir("/sys/dev/char")
            .unwrap()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                let (major, minor) = name.split_once(':')?;
                Some((major.parse().ok()?, minor.parse().ok()?))
            })
            .find(|numbers| guest_device(*numbers).is_none())
            .unwrap()
    }

    fn planned(rules: Value) -> Result<Value> {
        let host = of_host();
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "linux": {
                "namespaces": [{"type": "network"}],
                "devices": [
                    {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                    {"path": "/dev/hosts", "type": "c", "major": host.0, "minor": host.1},
                    {"path": "/dev/none", "type": "b", "major": 4000, "minor": 1},
                ],
                "resources": {"devices": rules},
            },
        });
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let plan = Plan::new("c1", &Bundle::load(directory.path()).unwrap())?;
        Ok(plan.spec["linux"]["devices"].clone())
    }

    #[test]
    fn a_device_of_the_host_is_refused_by_name() {
        let error = planned(json!([{"allow": false, "access": "rwm"}])).unwrap_err();
        assert!(error.message.contains("/dev/hosts (c "), "{error}");
    }

    #[test]
    fn a_privileged_container_gets_those_that_the_guest_has() {
        let devices = planned(json!([{"allow": true, "access": "rwm"}])).unwrap();
        let paths: Vec<_> = devices
            .as_array()
            .unwrap()
            .iter()
            .map(|device| device["path"].as_str().unwrap())
            .collect();
        assert_eq!(paths, ["/dev/fuse", "/dev/none"]);
    }
}
