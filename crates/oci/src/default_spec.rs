//! The config.json that `spec` writes: a shell in a terminal, as a template.

use serde_json::{Value, json};

use crate::features::OCI_VERSION;

/// Capabilities of the shell.
const CAPABILITIES: [&str; 3] = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];

/// Kernel files that are hidden from the container.
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

/// Kernel files that the container must not change.
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// A specification template, for the root file system `rootfs` beside it. With `rootless`, root in
/// the container maps to the calling user, and there are no limits.
pub fn spec(rootless: bool) -> Value {
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let mut linux = json!({ "maskedPaths": MASKED_PATHS, "readonlyPaths": READONLY_PATHS });
    if rootless {
        namespaces.push("user");
        let one = |id: u32| json!([{ "containerID": 0, "hostID": id, "size": 1 }]);
        linux["uidMappings"] = one(rustix::process::geteuid().as_raw());
        linux["gidMappings"] = one(rustix::process::getegid().as_raw());
    } else {
        linux["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    }
    linux["namespaces"] = namespaces
        .into_iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "hull",
        "mounts": mounts(rootless),
        "linux": linux,
    })
}

fn mounts(rootless: bool) -> Value {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        let options = Value::from(options);
        json!({"destination": destination, "type": kind, "source": source, "options": options})
    };
    let mut terminals = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    if !rootless {
        // A single user has no mapping for the tty group.
        terminals.push("gid=5");
    }
    let tmpfs = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    let shared_memory = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
    json!([
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &tmpfs),
        mount("/dev/pts", "devpts", "devpts", &terminals),
        mount("/dev/shm", "tmpfs", "shm", &shared_memory),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"]
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"]
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"]
        ),
    ])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use oci_spec::runtime::{LinuxNamespaceType, Spec};

    use super::*;
    use crate::features;

    fn read(rootless: bool) -> Spec {
        serde_json::from_value(spec(rootless)).unwrap()
    }

    fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
        let linux = spec.linux().as_ref().unwrap();
        let mut namespaces = linux.namespaces().iter().flatten();
        namespaces.any(|namespace| namespace.typ() == kind)
    }

    #[test]
    fn it_is_a_specification_of_a_shell_in_a_terminal() {
        let spec = read(false);
        assert_eq!(spec.version(), OCI_VERSION);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.args().as_deref(), Some(&["sh".to_owned()][..]));
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.namespaces().as_ref().unwrap().len(), 6);
        assert!(linux.uid_mappings().is_none());
        assert!(!has(&spec, LinuxNamespaceType::User));
    }

    #[test]
    fn rootless_it_maps_the_caller_and_limits_nothing() {
        let spec = read(true);
        assert!(has(&spec, LinuxNamespaceType::User));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.resources().is_none());
        for (mappings, id) in [
            (linux.uid_mappings(), rustix::process::geteuid().as_raw()),
            (linux.gid_mappings(), rustix::process::getegid().as_raw()),
        ] {
            let mapping = mappings.as_ref().unwrap()[0];
            assert_eq!(
                (mapping.container_id(), mapping.host_id(), mapping.size()),
                (0, id, 1)
            );
        }
        let mounts = serde_json::to_string(spec.mounts()).unwrap();
        assert!(!mounts.contains("gid="), "{mounts}");
    }

    #[test]
    fn it_asks_for_nothing_that_features_does_not_name() {
        let features = features::features();
        let known = |list: &Value, word: &str| {
            let mut list = list.as_array().unwrap().iter();
            list.any(|known| known == word)
        };
        for rootless in [false, true] {
            let spec = spec(rootless);
            for namespace in spec["linux"]["namespaces"].as_array().unwrap() {
                let kind = namespace["type"].as_str().unwrap();
                assert!(known(&features["linux"]["namespaces"], kind), "{kind}");
            }
            for (_, set) in spec["process"]["capabilities"].as_object().unwrap() {
                for name in set.as_array().unwrap() {
                    let name = name.as_str().unwrap();
                    assert!(known(&features["linux"]["capabilities"], name), "{name}");
                }
            }
            for mount in spec["mounts"].as_array().unwrap() {
                for option in mount["options"].as_array().unwrap() {
                    let option = option.as_str().unwrap();
                    let of_file_system = option.contains('=') || option == "newinstance";
                    assert!(
                        of_file_system || known(&features["mountOptions"], option),
                        "{option}"
                    );
                }
            }
        }
    }
}
