//! Reports which machines this host can run, and why not the others: for `hull check` and
//! [`crate::choose()`].
//!
//! Everything is tested, not assumed: KVM by running and timing guest code (see [`kvm`]), tracing
//! by tracing.

mod kvm;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::choose::{Choice, Requirements, choose};
use crate::{Backend, Kind, kvm as own_monitor, qemu, uml};

/// The report on machines for `hull check`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Hardware virtualization.
    pub kvm: KvmState,
    /// hull's own monitor.
    pub monitor: State,
    /// The user-mode kernel.
    pub uml: State,
    /// QEMU.
    pub qemu: State,
    /// QEMU's version, if installed.
    pub qemu_version: Option<String>,
    /// The choice of `auto`.
    pub auto: Result<Choice, String>,
}

/// Whether a kind of machine can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// It can be used.
    Works {
        /// Details, in a few words.
        how: String,
    },
    /// It cannot be used.
    Missing {
        /// The reason.
        why: String,
        /// The remedy, if there is one.
        hint: Option<String>,
    },
}

/// Result of probing KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum KvmState {
    /// Guest kernel code runs on the processor.
    Works {
        /// Millions of instructions per second.
        million_per_second: u64,
    },
    /// `/dev/kvm` accepts every call and interprets guest kernel code.
    Pretends {
        /// Millions of instructions per second.
        million_per_second: u64,
    },
    /// There is no `/dev/kvm`.
    Absent,
    /// The caller may not open `/dev/kvm`.
    NoPermission,
    /// KVM cannot run guest code at all.
    Fails {
        /// The step that failed.
        why: String,
    },
}

impl fmt::Display for KvmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works { million_per_second } => {
                write!(f, "works ({million_per_second} million instructions/s)")
            }
            Self::Pretends {
                million_per_second: 0,
            } => f.write_str("pretends: less than a million instructions/s, interpreted"),
            Self::Pretends { million_per_second } => {
                write!(
                    f,
                    "pretends: {million_per_second} million instructions/s, interpreted"
                )
            }
            Self::Absent => f.write_str("absent: there is no /dev/kvm"),
            Self::NoPermission => f.write_str("no permission to open /dev/kvm"),
            Self::Fails { why } => write!(f, "fails: {why}"),
        }
    }
}

/// A kind of machine that works.
#[derive(Debug, Clone)]
pub struct Works {
    /// Whether it uses hardware virtualization.
    pub hardware: bool,
    /// The guest kernel that it boots.
    pub kernel: PathBuf,
    /// Its advantage, for display.
    pub why: String,
}

/// Probes everything. Takes a few tenths of a second once per boot of the host, then a few
/// milliseconds.
pub fn probe(requirements: &Requirements) -> Report {
    let host = &requirements.host;
    Report {
        kvm: kvm_cached(&host.data_directory),
        monitor: own_monitor::Kvm.diagnose(host),
        uml: uml::Uml.diagnose(host),
        qemu: qemu::Qemu.diagnose(host),
        qemu_version: qemu::find_program()
            .and_then(|program| qemu::version(&program))
            .ok(),
        auto: choose(None, requirements).map_err(|error| error.to_string()),
    }
}

impl Report {
    /// State of a kind.
    pub fn state(&self, kind: Kind) -> &State {
        match kind {
            Kind::Kvm => &self.monitor,
            Kind::Uml => &self.uml,
            Kind::Qemu => &self.qemu,
        }
    }
}

/// What the user can do about a KVM that does not work.
pub fn remedy(kvm: &KvmState) -> Option<String> {
    match kvm {
        KvmState::Works { .. } | KvmState::Fails { .. } => None,
        KvmState::Pretends { .. } => {
            Some("hull needs the processor's virtualization: a host that has it, or nesting".into())
        }
        KvmState::NoPermission => Some("run hull as root, or join the group of /dev/kvm".into()),
        KvmState::Absent => Some(absent(&processor_flags())),
    }
}

/// Why there is no `/dev/kvm`, by what the processor has.
fn absent(flags: &str) -> String {
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    let module = match (has("vmx"), has("svm")) {
        (true, _) => "kvm_intel",
        (_, true) => "kvm_amd",
        _ => {
            return "the processor shows no virtualization: enable it in the firmware, or nesting \
                    on the host of this machine"
                .into();
        }
    };
    format!("modprobe {module}")
}

fn processor_flags() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = cpuinfo.lines();
    lines
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map(|(_, flags)| flags.to_owned())
        .unwrap_or_default()
}

/// Tests whether a process can trace another one here.
pub(crate) fn tracing_works() -> bool {
    kvm::in_child(kvm::tracing_works)
}

/// Why the Yama security module forbids an unprivileged process to trace its own children.
pub fn tracing_forbidden() -> Option<String> {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?;
    let scope: u32 = scope.trim().parse().ok()?;
    (scope >= 2)
        .then(|| format!("tracing processes is forbidden (kernel.yama.ptrace_scope = {scope})"))
}

/// A cached result and the host boot that it is valid for.
#[derive(Serialize, Deserialize)]
struct Cached {
    host: String,
    kvm: KvmState,
}

/// The state of KVM: the result cached for this boot of this host, otherwise that of a new probe.
pub fn kvm_cached(data_directory: &Path) -> KvmState {
    let path = data_directory.join("probe.json");
    let host = host_identity();
    let cached = std::fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Cached>(&text).ok());
    match cached {
        // The device node can appear and disappear, and permissions depend on the caller: these are
        // checked each time.
        Some(cached) if cached.host == host && kvm::openable().is_ok() => cached.kvm,
        _ => {
            let kvm = kvm::probe();
            if !matches!(kvm, KvmState::Absent | KvmState::NoPermission) {
                cache(
                    &path,
                    &Cached {
                        host,
                        kvm: kvm.clone(),
                    },
                );
            }
            kvm
        }
    }
}

fn cache(path: &Path, cached: &Cached) {
    let write = || -> std::io::Result<()> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let new: PathBuf = path.with_extension(format!("json.{}", std::process::id()));
        std::fs::write(&new, serde_json::to_vec(cached)?)?;
        std::fs::rename(new, path)
    };
    if let Err(error) = write() {
        tracing::warn!(
            "cannot cache the result of the KVM probe in {}: {error}",
            path.display()
        );
    }
}

/// Identifies this boot of this host, for which a KVM result is valid.
fn host_identity() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))
        .unwrap_or_default();
    let boot = read("/proc/sys/kernel/random/boot_id");
    let version = read("/proc/version");
    format!("{}\n{}\n{}", boot.trim(), model.trim(), version.trim())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_mends_a_missing_kvm_is_said() {
        assert_eq!(absent("fpu vmx sse"), "modprobe kvm_intel");
        assert_eq!(absent("svm"), "modprobe kvm_amd");
        assert!(absent("fpu svm_lock").contains("firmware"));
        assert!(
            remedy(&KvmState::NoPermission)
                .unwrap()
                .contains("/dev/kvm")
        );
    }

    #[test]
    fn a_cached_result_is_valid_for_the_same_boot_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("probe.json");
        let kvm = KvmState::Works {
            million_per_second: 123_456_789,
        };
        cache(
            &path,
            &Cached {
                host: host_identity(),
                kvm: kvm.clone(),
            },
        );
        if kvm::openable().is_ok() {
            assert_eq!(kvm_cached(directory.path()), kvm);
        }
        cache(
            &path,
            &Cached {
                host: "another".into(),
                kvm: kvm.clone(),
            },
        );
        assert_ne!(kvm_cached(directory.path()), kvm);
        std::fs::write(&path, "{").unwrap();
        assert_ne!(kvm_cached(directory.path()), kvm);
    }
}
