//! The features document of the OCI runtime specification.
//!
//! It describes the build, not the machine it runs on: engines query it once and cache it. Features
//! of the guest are repeated here, because the host does not depend on guest code; a test compares
//! them with the agent's sources. Only features that a container can use are listed, not those that
//! are refused by name.

use serde_json::{Value, json};

/// Lowest accepted version of the specification.
pub const OCI_VERSION_MIN: &str = "1.0.0";
/// Implemented version of the specification, which `state` and `spec` report.
pub const OCI_VERSION: &str = "1.2.1";

/// Hooks, in the order of a container's lifecycle.
const HOOKS: &[&str] = &[
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// Mount options that are independent of the file system. `remount` is refused.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// Namespace types.
const NAMESPACES: &[&str] = &[
    "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
];

/// All of the kernel's capabilities, in its order.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Seccomp actions. User notification (`SCMP_ACT_NOTIFY`) is refused: its listener would be on the
/// host.
const SECCOMP_ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

/// Seccomp comparison operators.
const SECCOMP_OPERATORS: &[&str] = &[
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// Architectures that a filter can name. Those that the guest's kernel cannot execute are skipped;
/// big-endian ones and those unknown to libseccomp are refused.
const SECCOMP_ARCHITECTURES: &[&str] = &[
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
];

/// Supported seccomp filter flags.
const SECCOMP_FLAGS: &[&str] = &[
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
];

/// A flag that is known but refused, because it applies to user notification.
const SECCOMP_FLAG_REFUSED: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// Annotations that select the machine of a container: a user who may set them can join a pod.
const UNSAFE_ANNOTATIONS: &[&str] = &[
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.sandbox-id",
];

/// The features document, as `hull-oci features` prints it.
pub fn features() -> Value {
    let known_flags: Vec<&str> = SECCOMP_FLAGS
        .iter()
        .copied()
        .chain([SECCOMP_FLAG_REFUSED])
        .collect();
    json!({
        "ociVersionMin": OCI_VERSION_MIN,
        "ociVersionMax": OCI_VERSION,
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES,
            // On the host: the guest has only cgroup v2, and no RDMA.
            "cgroup": {
                "v1": true,
                "v2": true,
                "systemd": true,
                "systemdUser": false,
                "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHITECTURES,
                "knownFlags": known_flags,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
        "annotations": {
            "io.hull.version": env!("CARGO_PKG_VERSION"),
            "io.hull.checkpoint.enabled": "false",
        },
        "potentiallyUnsafeConfigAnnotations": UNSAFE_ANNOTATIONS,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    const OPTIONS: &str = include_str!("../../agent/src/container/mount_options.rs");
    const MOUNTS: &str = include_str!("../../agent/src/container/mounts.rs");
    const NAMESPACE_SOURCE: &str = include_str!("../../agent/src/container/namespaces.rs");
    const CAPABILITY_SOURCE: &str = include_str!("../../agent/src/container/capabilities.rs");
    const SECCOMP: &str = include_str!("../../agent/src/container/seccomp.rs");
    const HOOK_SOURCE: &str = include_str!("../../agent/src/container/hooks.rs");
    const CONTAINER: &str = include_str!("../../agent/src/container/mod.rs");
    const PROCESS: &str = include_str!("../../agent/src/container/process_plan.rs");

    /// The text between the first `start` and the next `end`.
    fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
        let rest = text.split_once(start).unwrap().1;
        rest.split_once(end).unwrap().0
    }

    fn list(value: &Value) -> BTreeSet<String> {
        let list: Vec<String> = serde_json::from_value(value.clone()).unwrap();
        let set: BTreeSet<String> = list.iter().cloned().collect();
        assert_eq!(set.len(), list.len(), "{list:?} names something twice");
        set
    }

    fn set<'a>(words: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        words.into_iter().map(str::to_owned).collect()
    }

    /// `KillThread` as `KILL_THREAD`.
    fn screaming(name: &str) -> String {
        let mut text = String::new();
        for (index, letter) in name.char_indices() {
            if letter.is_ascii_uppercase() && index > 0 {
                text.push('_');
            }
            text.push(letter.to_ascii_uppercase());
        }
        text
    }

    /// The variants of an enum named in the agent's source, each with the text up to the next one.
    fn variants<'a>(source: &'a str, prefix: &str) -> Vec<(String, &'a str)> {
        let source = source.split("#[cfg(test)]").next().unwrap();
        let variants = source.split(prefix).skip(1);
        variants
            .map(|rest| {
                let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric());
                let (name, after) = rest.split_at(end.unwrap());
                (screaming(name), after.split("\n    }").next().unwrap())
            })
            .collect()
    }

    fn kept(source: &str, prefix: &str) -> BTreeSet<String> {
        let variants = variants(source, prefix).into_iter();
        variants
            .filter(|(_, after)| !after.contains("unsupported("))
            .map(|(name, _)| name)
            .collect()
    }

    #[test]
    fn mount_options_are_those_that_the_agent_reads() {
        let words = between(OPTIONS, "Some(match option {", "_ => return None");
        let mut arms = words.split("\" =>").peekable();
        let mut expected = BTreeSet::new();
        while let Some(before) = arms.next() {
            let Some(arm) = arms.peek() else { break };
            let word = before.rsplit('"').next().unwrap();
            expected.insert(word.to_owned());
            let arm = arm.trim_start();
            if arm.starts_with("Times") || arm.starts_with("NoTimes") || arm.contains("Some(") {
                expected.insert(format!("r{word}"));
            }
        }
        assert!(expected.len() > 40, "{expected:?}");
        let words = between(OPTIONS, "let flag = match name {", "_ => return None");
        for word in words.split('"').skip(1).step_by(2) {
            expected.extend([word.to_owned(), format!("r{word}")]);
        }
        let words = between(OPTIONS, "match option {\n                \"bind\"", "_ =>");
        assert!(
            ["rbind", "tmpcopyup", "defaults"]
                .iter()
                .all(|word| words.contains(word))
        );
        expected.extend(set(["bind", "rbind", "tmpcopyup", "defaults"]));
        expected.extend(set(["idmap", "ridmap"]));
        assert_eq!(list(&features()["mountOptions"]), expected);
        assert!(MOUNTS.contains(r#""idmap" | "ridmap""#));
    }

    #[test]
    fn namespaces_are_those_that_the_agent_makes() {
        let expected: BTreeSet<String> = variants(NAMESPACE_SOURCE, "LinuxNamespaceType::")
            .into_iter()
            .map(|(name, _)| name.to_lowercase())
            .collect();
        assert_eq!(list(&features()["linux"]["namespaces"]), expected);
    }

    #[test]
    fn capabilities_are_those_that_the_agent_knows() {
        let names = between(CAPABILITY_SOURCE, "match capability {", "}\n}");
        let expected: Vec<String> = names
            .lines()
            .filter_map(|line| line.trim().split_once(" =>"))
            .map(|(name, _)| format!("CAP_{}", screaming(name)))
            .collect();
        assert_eq!(features()["linux"]["capabilities"], json!(expected));
    }

    #[test]
    fn seccomp_is_what_the_agent_compiles() {
        let seccomp = &features()["linux"]["seccomp"];
        for (field, prefix) in [
            ("actions", "LinuxSeccompAction::"),
            ("operators", "LinuxSeccompOperator::"),
            ("supportedFlags", "LinuxSeccompFilterFlag::"),
        ] {
            assert_eq!(list(&seccomp[field]), kept(SECCOMP, prefix), "{field}");
        }
        let known = variants(SECCOMP, "LinuxSeccompFilterFlag::").into_iter();
        let known: BTreeSet<String> = known.map(|(name, _)| name).collect();
        assert_eq!(list(&seccomp["knownFlags"]), known);
    }

    #[test]
    fn each_hook_runs_on_one_side() {
        let here = ["prestart", "createRuntime", "poststart", "poststop"];
        for hook in HOOKS {
            let in_the_guest = HOOK_SOURCE.contains(&format!("\"hooks.{hook}\""));
            assert_ne!(in_the_guest, here.contains(hook), "{hook}");
        }
    }

    #[test]
    fn what_is_said_to_be_missing_is_refused_in_the_guest() {
        for (source, field) in [
            (PROCESS, "process.apparmorProfile"),
            (PROCESS, "process.selinuxLabel"),
            (CONTAINER, "linux.intelRdt"),
        ] {
            assert!(source.contains(&format!("\"{field}\"")), "{field}");
        }
    }

    #[test]
    fn the_document_is_one_that_engines_can_read() {
        let features: oci_spec::runtime::Features = serde_json::from_value(features()).unwrap();
        assert_eq!(features.oci_version_min(), OCI_VERSION_MIN);
        let linux = features.linux().as_ref().unwrap();
        let seccomp = linux.seccomp().as_ref().unwrap();
        assert_eq!(
            seccomp.archs().as_ref().unwrap().len(),
            SECCOMP_ARCHITECTURES.len()
        );
    }
}
