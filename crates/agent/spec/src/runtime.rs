//! `oci_spec::runtime` with `Spec` and `Process` replaced. These two read the same JSON and have
//! the same accessors.

use std::collections::HashMap;
use std::path::PathBuf;

pub use oci_spec::runtime::*;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// Accessors of fields, by reference or as copies.
macro_rules! accessors {
    ($($field:ident: $type:ty),* ; $($copied:ident: $copied_type:ty),*) => {
        $(
            #[doc = concat!("The field `", stringify!($field), "`.")]
            pub fn $field(&self) -> &$type {
                &self.$field
            }
        )*
        $(
            #[doc = concat!("The field `", stringify!($copied), "`.")]
            pub fn $copied(&self) -> $copied_type {
                self.$copied
            }
        )*
    };
}

/// Contents of `config.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    #[serde(default, rename = "ociVersion")]
    version: String,
    root: Option<Root>,
    mounts: Option<Vec<Mount>>,
    process: Option<Process>,
    hostname: Option<String>,
    domainname: Option<String>,
    hooks: Option<Hooks>,
    annotations: Option<HashMap<String, String>>,
    linux: Option<Linux>,
    solaris: Option<IgnoredAny>,
    windows: Option<IgnoredAny>,
    vm: Option<IgnoredAny>,
    zos: Option<IgnoredAny>,
    hull_disks: Option<Vec<HullDisk>>,
    /// Not part of the OCI specification: files of the root file system have the ids that they have
    /// in the container's user namespace.
    hull_root_mapped: Option<bool>,
}

/// Not part of the OCI specification: names the block devices of the spec that are disks of this
/// machine.
///
/// `hullDisks: [{"major": 7, "minor": 3, "serial": "hull-disk0"}]`: block device 7:3 of the host,
/// in `linux.devices` and `linux.resources.devices`, means the disk of that serial number, whose
/// device number only the guest's kernel knows. `plug`, if it is there, makes the guest's kernel
/// probe that disk when it has not yet.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HullDisk {
    major: i64,
    minor: i64,
    serial: String,
    plug: Option<String>,
}

impl HullDisk {
    accessors! { serial: String, plug: Option<String>; major: i64, minor: i64 }
}

impl Spec {
    /// Mutable access to `linux`.
    pub fn linux_mut(&mut self) -> Option<&mut Linux> {
        self.linux.as_mut()
    }

    /// Mutable access to `mounts`.
    pub fn mounts_mut(&mut self) -> Option<&mut Vec<Mount>> {
        self.mounts.as_mut()
    }

    accessors! {
        version: String, root: Option<Root>, mounts: Option<Vec<Mount>>, process: Option<Process>,
        hostname: Option<String>, domainname: Option<String>, hooks: Option<Hooks>,
        annotations: Option<HashMap<String, String>>, linux: Option<Linux>,
        solaris: Option<IgnoredAny>,
        windows: Option<IgnoredAny>, vm: Option<IgnoredAny>, zos: Option<IgnoredAny>,
        hull_disks: Option<Vec<HullDisk>>;
        hull_root_mapped: Option<bool>
    }
}

/// One process of the spec.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    terminal: Option<bool>,
    console_size: Option<Box>,
    user: User,
    args: Option<Vec<String>>,
    command_line: Option<String>,
    env: Option<Vec<String>>,
    cwd: PathBuf,
    capabilities: Option<LinuxCapabilities>,
    rlimits: Option<Vec<PosixRlimit>>,
    no_new_privileges: Option<bool>,
    apparmor_profile: Option<String>,
    oom_score_adj: Option<i32>,
    selinux_label: Option<String>,
    io_priority: Option<LinuxIOPriority>,
    scheduler: Option<Scheduler>,
    #[serde(rename = "execCPUAffinity")]
    exec_cpu_affinity: Option<ExecCpuAffinity>,
}

impl Process {
    accessors! {
        user: User, args: Option<Vec<String>>, command_line: Option<String>,
        env: Option<Vec<String>>,
        cwd: PathBuf, capabilities: Option<LinuxCapabilities>, rlimits: Option<Vec<PosixRlimit>>,
        apparmor_profile: Option<String>, selinux_label: Option<String>,
        io_priority: Option<LinuxIOPriority>, scheduler: Option<Scheduler>,
        exec_cpu_affinity: Option<ExecCpuAffinity>;
        terminal: Option<bool>, console_size: Option<Box>, no_new_privileges: Option<bool>,
        oom_score_adj: Option<i32>
    }
}

/// CPUs that an executed process runs on. Lists of numbers and ranges, checked where they are used.
#[derive(Debug, Deserialize)]
pub struct ExecCpuAffinity {
    initial: Option<String>,
    #[serde(rename = "final")]
    cpu_affinity_final: Option<String>,
}

impl ExecCpuAffinity {
    accessors! { initial: Option<String>, cpu_affinity_final: Option<String>; }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A spec with every field that the library supports, parsed by both.
    #[test]
    fn a_spec_is_read_as_the_library_reads_it() {
        let json = serde_json::json!({
            "ociVersion": "1.2.1",
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro"]}],
            "process": {
                "terminal": true,
                "consoleSize": {"height": 24, "width": 80},
                "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]},
                "args": ["sh"], "env": ["A=b"], "cwd": "/x",
                "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
                "noNewPrivileges": true, "apparmorProfile": "p", "oomScoreAdj": 5, "selinuxLabel": "l",
                "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 4},
                "scheduler": {"policy": "SCHED_BATCH", "nice": 1},
                "execCPUAffinity": {"initial": "0", "final": "0-1"}
            },
            "hostname": "h", "domainname": "d",
            "hooks": {"poststop": [{"path": "/bin/true"}]},
            "annotations": {"k": "v"},
            "linux": {"namespaces": [{"type": "pid"}]},
            "vm": {"kernel": {"path": "/k"}}
        })
        .to_string();
        let ours: Spec = serde_json::from_str(&json).unwrap();
        let theirs: oci_spec::runtime::Spec = serde_json::from_str(&json).unwrap();
        macro_rules! same {
            ($ours:expr, $theirs:expr, $($field:ident)*) => {
                $(assert_eq!(format!("{:?}", $ours.$field()), format!("{:?}", $theirs.$field()));)*
            };
        }
        same!(ours, theirs, version root mounts hostname domainname hooks annotations linux);
        assert!(
            ours.vm().is_some()
                && ours.windows().is_none()
                && ours.solaris().is_none()
                && ours.zos().is_none()
        );
        let (ours, theirs) = (
            ours.process().as_ref().unwrap(),
            theirs.process().as_ref().unwrap(),
        );
        same!(ours, theirs, terminal console_size user args command_line env cwd capabilities
            rlimits
            no_new_privileges apparmor_profile oom_score_adj selinux_label io_priority scheduler);
        let ours = ours.exec_cpu_affinity().as_ref().unwrap();
        assert_eq!(
            (
                ours.initial().as_deref(),
                ours.cpu_affinity_final().as_deref()
            ),
            (Some("0"), Some("0-1"))
        );
    }

    #[test]
    fn disks_of_the_machine_are_read() {
        let spec: Spec =
            serde_json::from_str(r#"{"hullDisks":[{"major":7,"minor":3,"serial":"hull-disk0","plug":"/sockets/disk0:2"}]}"#)
                .unwrap();
        let [disk] = spec.hull_disks().as_deref().unwrap() else {
            panic!("{spec:?}")
        };
        assert_eq!(
            (disk.major(), disk.minor(), disk.serial().as_str()),
            (7, 3, "hull-disk0")
        );
        assert_eq!(disk.plug().as_deref(), Some("/sockets/disk0:2"));
    }

    #[test]
    fn an_empty_spec_is_read() {
        let spec: Spec = serde_json::from_str("{}").unwrap();
        assert!(spec.process().is_none() && spec.version().is_empty());
    }
}
