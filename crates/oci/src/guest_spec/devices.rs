//! Devices: those of the guest's kernel are available; block devices of the host become disks of
//! the machine; other devices of the host are refused.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hull_sandbox::config::{ContainerDisk, DiskConfig};
use hull_sandbox::error::Result;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use serde_json::{Value, json};

use super::mounts::Bound;
use super::{Plan, refused};
use crate::bundle::Bundle;

/// Character devices of the guest's kernel: numbers (Linux, Documentation/admin-guide/devices.txt)
/// and path.
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

/// Whether the host has a device with these numbers. A node for a device that does not exist is
/// harmless.
fn is_of_host(kind: &str, (major, minor): (u32, u32)) -> bool {
    let kind = if kind == "b" { "block" } else { "char" };
    Path::new("/sys/dev")
        .join(kind)
        .join(format!("{major}:{minor}"))
        .exists()
}

pub(super) fn plan(plan: &mut Plan, bundle: &Bundle, bound: Vec<Bound>) -> Result<()> {
    let rules = rules(bundle);
    let everything = rules.iter().any(allows_everything);
    let mut kept = Vec::new();
    let devices = plan.spec["linux"]["devices"].as_array_mut();
    for device in devices.map(std::mem::take).unwrap_or_default() {
        let number = |name: &str| {
            device[name]
                .as_i64()
                .and_then(|number| u32::try_from(number).ok())
                .unwrap_or(u32::MAX)
        };
        let kind = device["type"].as_str().unwrap_or_default();
        // Every container has its own /dev/ptmx and /dev/console.
        let path = device["path"].as_str().unwrap_or_default();
        if path == "/dev/ptmx" || path == "/dev/console" {
            continue;
        }
        let numbers = (number("major"), number("minor"));
        let own = match kind {
            "b" if is_of_host(kind, numbers) => {
                if !everything {
                    add_disk(plan, numbers, !can_be_written(&rules, numbers), path);
                }
                !everything
            }
            "c" | "u" => guest_device(numbers).is_some() || !is_of_host(kind, numbers),
            // A FIFO, or a block device that does not exist; the agent refuses anything else.
            _ => true,
        };
        if own {
            kept.push(device);
        } else if !everything {
            return Err(refused(
                format_args!(
                    "linux.devices: {path} ({kind} {}:{})",
                    device["major"], device["minor"]
                ),
                "it is a device of the host, and the guest has no such device",
            ));
        }
        // A privileged container's spec lists all devices of the host; it gets all devices of the
        // guest instead.
    }
    for Bound {
        destination,
        source,
        node,
        read_only,
    } in bound
    {
        if everything {
            return Err(refused(
                format_args!("mounts: {destination}: block device {}", source.display()),
                "a privileged container gets no disk of the host",
            )
            .hint("without --privileged it becomes a disk of the machine"));
        }
        let (major, minor) = (
            rustix::fs::major(node.rdev()),
            rustix::fs::minor(node.rdev()),
        );
        // The guest has a disk that the host opens: what no rule allows stays out of its reach.
        if !['r', 'w']
            .iter()
            .any(|letter| allowed(&rules, (major, minor), *letter))
        {
            return Err(refused(
                format_args!("mounts: {destination}: block device {}", source.display()),
                "no device rule lets the container read or write it",
            )
            .hint(
                "name it as a device (--device, volumeDevices), with a rule of linux.resources",
            ));
        }
        let read_only = read_only || !can_be_written(&rules, (major, minor));
        add_disk(plan, (major, minor), read_only, &destination);
        kept.push(json!({
            "path": destination,
            "type": "b",
            "major": major,
            "minor": minor,
            "fileMode": node.mode() & 0o7777,
            "uid": node.uid(),
            "gid": node.gid(),
        }));
    }
    if !kept.is_empty() || plan.spec["linux"]["devices"].is_array() {
        plan.spec["linux"]["devices"] = Value::Array(kept);
    }
    Ok(())
}

/// Adds a disk to the machine for a block device of the host. A device listed twice is writable if
/// one of the entries is.
fn add_disk(plan: &mut Plan, (major, minor): (u32, u32), read_only: bool, path: &str) {
    let read_only = read_only || is_read_only(major, minor);
    let known = plan
        .disks
        .iter_mut()
        .map(|disk| &mut disk.device)
        .find(|device| (device.major, device.minor) == (major, minor));
    match known {
        Some(device) => device.read_only &= read_only,
        None => plan.disks.push(ContainerDisk {
            device: DiskConfig {
                major,
                minor,
                read_only,
            },
            path: path.to_owned(),
        }),
    }
}

/// Whether the block device is read-only on the host.
fn is_read_only(major: u32, minor: u32) -> bool {
    fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
        .is_ok_and(|text| text.trim() == "1")
}

/// `linux.resources.devices`.
fn rules(bundle: &Bundle) -> Vec<LinuxDeviceCgroup> {
    bundle
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default()
}

/// Whether a rule matches this number; without a number, or with a negative one, it matches all.
fn covers(rule: Option<i64>, number: u32) -> bool {
    rule.is_none_or(|named| named < 0 || named == i64::from(number))
}

/// Whether any rule allows writing to a block device. The guest's kernel evaluates the rules in
/// their order; a device that no rule allows writing to is opened read-only on the host.
fn can_be_written(rules: &[LinuxDeviceCgroup], numbers: (u32, u32)) -> bool {
    allowed(rules, numbers, 'w')
}

/// Whether any rule allows an access (`r`, `w`) to a block device.
fn allowed(rules: &[LinuxDeviceCgroup], (major, minor): (u32, u32), letter: char) -> bool {
    rules.iter().any(|rule| {
        let access = rule.access().as_deref().unwrap_or_default();
        rule.allow()
            && matches!(
                rule.typ(),
                None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
            )
            && covers(rule.major(), major)
            && covers(rule.minor(), minor)
            && (access.is_empty() || access.contains(letter))
    })
}

/// Whether a rule allows all devices, as engines write for `--privileged`.
fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let wild = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rule.allow()
        && rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
        && wild(rule.major())
        && wild(rule.minor())
        && rule
            .access()
            .as_ref()
            .is_none_or(|access| "rwm".chars().all(|letter| access.contains(letter)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    /// The numbers of a device of this host that guests do not have.
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

    /// The numbers of a writable block device of this host, with its node in /dev.
    fn disk() -> Option<(u32, u32, std::path::PathBuf)> {
        let found = fs::read_dir("/sys/dev/block").ok()?.find_map(|entry| {
            let path = entry.ok()?.path();
            let (major, minor) = path.file_name()?.to_str()?.split_once(':')?;
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            let node = Path::new("/dev").join(fs::read_link(&path).ok()?.file_name()?);
            let numbers = rustix::fs::makedev(major, minor);
            (!is_read_only(major, minor) && fs::metadata(&node).ok()?.rdev() == numbers)
                .then_some((major, minor, node))
        });
        if found.is_none() {
            eprintln!("left out: this machine has no block device");
        }
        found
    }

    /// The plan for a container with these devices, mounts and rules.
    fn with(devices: Value, mounts: Value, rules: Value) -> Result<Plan> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "mounts": mounts,
            "hullDisks": [{"major": 1, "minor": 1, "serial": "hull-disk0"}],
            "linux": {
                "namespaces": [{"type": "network"}],
                "devices": devices,
                "resources": {"devices": rules},
            },
        });
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        Plan::new("c1", &Bundle::load(directory.path()).unwrap())
    }

    #[test]
    fn block_devices_of_the_host_become_disks_for_what_rules_allow() {
        let Some((major, minor, _)) = disk() else {
            return;
        };
        let denied = json!({"allow": false, "access": "rwm"});
        let devices = json!([
            {"path": "/dev/xvda", "type": "b", "major": major, "minor": minor},
            {"path": "/dev/again", "type": "b", "major": major, "minor": minor},
        ]);
        for (rule, read_only) in [
            (
                json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "rwm"}),
                false,
            ),
            (
                json!({"allow": true, "type": "b", "major": major, "minor": minor}),
                false,
            ),
            (
                json!({"allow": true, "type": "b", "major": major, "access": "w"}),
                false,
            ),
            (
                json!({"allow": true, "major": -1, "minor": minor, "access": "rw"}),
                false,
            ),
            (
                json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "rm"}),
                true,
            ),
            (
                json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "w"}),
                true,
            ),
            (
                json!({"allow": true, "type": "b", "major": major, "minor": minor + 1, "access": "w"}),
                true,
            ),
            (denied.clone(), true),
        ] {
            let plan = with(devices.clone(), json!([]), json!([denied, rule])).unwrap();
            let [disk] = plan.disks.as_slice() else {
                panic!("{:?}", plan.disks)
            };
            let device = DiskConfig {
                major,
                minor,
                read_only,
            };
            assert_eq!(
                (disk.device, disk.path.as_str()),
                (device, "/dev/xvda"),
                "{rule}"
            );
            assert_eq!(plan.spec["linux"]["devices"], devices);
            assert!(plan.spec.get("hullDisks").is_none());
        }
    }

    #[test]
    fn a_bound_block_device_is_a_device_and_no_mount() {
        let Some((major, minor, node)) = disk() else {
            return;
        };
        let rules = json!([{"allow": true, "type": "b", "major": major, "minor": minor}]);
        for options in [json!(["rbind"]), json!(["rbind", "ro"])] {
            let mounts = json!([
                {"destination": "/dev/xvda", "type": "bind", "source": node, "options": options},
                {"destination": "/proc", "type": "proc", "source": "proc"},
            ]);
            let plan = with(Value::Null, mounts.clone(), rules.clone()).unwrap();
            assert_eq!(plan.spec["mounts"], json!([mounts[1]]));
            let device = &plan.spec["linux"]["devices"][0];
            assert_eq!(device["path"], "/dev/xvda");
            assert_eq!(
                (&device["type"], &device["minor"]),
                (&json!("b"), &json!(minor))
            );
            assert!(device["fileMode"].is_u64());
            let read_only = options.as_array().unwrap().len() == 2;
            assert_eq!(plan.disks[0].device.read_only, read_only);
            // Refused by name rather than dropped: only the user can have asked for it.
            let error = with(
                Value::Null,
                mounts,
                json!([{"allow": true, "access": "rwm"}]),
            );
            let message = error.unwrap_err().message;
            assert!(
                message.contains("mounts: /dev/xvda: block device"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_privileged_container_gets_no_disk_of_the_host() {
        let Some((major, minor, _)) = disk() else {
            return;
        };
        let devices = json!([{"path": "/dev/xvda", "type": "b", "major": major, "minor": minor}]);
        let plan = with(
            devices,
            json!([]),
            json!([{"allow": true, "access": "rwm"}]),
        )
        .unwrap();
        assert!(plan.disks.is_empty());
        assert_eq!(plan.spec["linux"]["devices"], json!([]));
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
