//! `hull check`: whether this host can run containers, and if not, how to fix it.

mod capacity;
mod overhead;

use std::path::Path;
use std::time::Instant;

use hull_machine::probe::{KvmState, State, remedy};
use hull_machine::{Choice, Kind, Report};
use hull_network::cni;
use hull_sandbox::cgroup;
use hull_sandbox::config::{EndPolicy, MachineConfig, SandboxConfig};
use hull_sandbox::control::client::Client;
use hull_sandbox::control::launch::launch;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::SandboxPath;
use rustix::fs::{StatVfsMountFlags, statfs};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::output::{self, Colours};
use hull_engine::config::Config;
use hull_engine::guest_files::GuestFiles;
use hull_engine::values::Network;

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Measure what a pod costs this host beside its containers, for a RuntimeClass of Kubernetes
    #[arg(long)]
    overhead: bool,
}

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// No problem.
    Ok,
    /// Something does not work, but containers run without it.
    Note,
    /// `hull run` cannot work.
    Error,
}

/// A result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    what: String,
    level: Level,
    /// What was found.
    found: String,
    /// How to fix it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding {
            what: what.into(),
            level: Level::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn note(what: impl Into<String>, found: impl Into<String>, remedy: Option<String>) -> Finding {
        Finding {
            level: Level::Note,
            remedy,
            ..Finding::ok(what, found)
        }
    }

    fn error(
        what: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding {
            level: Level::Error,
            remedy: Some(remedy.into()),
            ..Finding::ok(what, found)
        }
    }
}

/// All results, for JSON output.
#[derive(Serialize)]
struct Checked<'a> {
    ready: bool,
    machine: Option<&'a Choice>,
    findings: &'a [Finding],
    machines: &'a Report,
}

/// Checks everything that `hull run` needs. Returns exit status 0 only if it can work.
pub fn execute(args: Args) -> Result<u8> {
    let config = Config::load()?;
    if args.overhead {
        return overhead::execute(&config, args.json).map(|()| 0);
    }
    let guest = GuestFiles::locate(&config)?;
    // First, because the other checks need the privileges that it acquires.
    let mut findings = vec![privileges()];
    let report = hull_machine::probe(&guest.requirements(&config, None));
    findings.extend(machines(&config, &report));
    findings.extend(capacity::findings(&config, &report));
    findings.extend(guest_files(&guest));
    findings.push(control_groups(&config));
    findings.push(jail());
    findings.push(overlay());
    findings.push(network(&config));
    findings.push(writable("data directory", &config.data_dir));
    findings.push(run_directory(&config.run_dir));
    findings.push(configuration(&config));
    // Last: it says in other words what the others have found.
    if findings.iter().all(|finding| finding.level != Level::Error) {
        findings.push(start(&config, &guest, &report));
    }

    let ready = findings.iter().all(|finding| finding.level != Level::Error);
    if args.json {
        output::print_json(&Checked {
            ready,
            machine: report.auto.as_ref().ok(),
            findings: &findings,
            machines: &report,
        })?;
    } else {
        output::print(render(&findings, ready, Colours::for_stdout()))?;
    }
    Ok(u8::from(!ready))
}

fn render(findings: &[Finding], ready: bool, colours: Colours) -> String {
    let mut text = String::new();
    for finding in findings {
        // Padded before colouring, because escape sequences have no width.
        let mark = match finding.level {
            Level::Ok => colours.good("ok   "),
            Level::Note => colours.warning("note "),
            Level::Error => colours.bad("ERROR"),
        };
        text.push_str(&format!("{mark} {:16} {}\n", finding.what, finding.found));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("      {:16} → {remedy}\n", ""));
        }
    }
    text.push_str(match ready {
        true => "hull run can work here\n",
        false => "hull run cannot work here yet\n",
    });
    text
}

fn privileges() -> Finding {
    let what = "privileges";
    let without_root = !rustix::process::geteuid().is_root();
    if without_root && let Err(failure) = hull_sandbox::rootless::enter() {
        let remedy = failure.hint.unwrap_or_else(|| "sudo hull …".to_owned());
        return Finding::error(what, failure.message, remedy);
    }
    if without_root && let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS) {
        return Finding::error(
            what,
            format!("not root, and a user namespace gives no rights here: {error}"),
            "the administrator: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or sudo hull …",
        );
    }
    // The sandbox process needs these for mounts and namespaces, for files of other users, and for
    // creating users.
    let needed = [
        (21, "SYS_ADMIN"),
        (0, "CHOWN"),
        (1, "DAC_OVERRIDE"),
        (3, "FOWNER"),
        (6, "SETGID"),
        (7, "SETUID"),
        (27, "MKNOD"),
    ];
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = needed
        .into_iter()
        .filter(|(number, _)| effective & (1 << number) == 0)
        .map(|(_, name)| name)
        .collect();
    match missing.is_empty() {
        true if without_root => Finding::ok(what, "not root: in a user namespace of your own"),
        true => Finding::ok(what, "root, with the capabilities needed"),
        false => Finding::error(
            what,
            format!("root without the capabilities {}", missing.join(", ")),
            "run hull outside of a container, or in one with --privileged",
        ),
    }
}

fn machines(config: &Config, report: &Report) -> Vec<Finding> {
    let mut findings = Vec::new();
    let kvm = report.kvm.to_string();
    findings.push(match &report.kvm {
        KvmState::Works { .. } => Finding::ok("kvm", kvm),
        KvmState::Pretends { .. } => Finding::note("kvm", kvm + "; not used", remedy(&report.kvm)),
        other => Finding::note("kvm", kvm, remedy(other)),
    });
    for kind in Kind::ALL {
        let what = format!("machine {kind}");
        findings.push(match report.state(kind) {
            State::Works { how } => Finding::ok(what, how.as_str()),
            State::Missing { why, hint } => Finding::note(what, why.as_str(), hint.clone()),
        });
    }
    let wanted = config.machine.kind();
    findings.push(match (&report.auto, wanted) {
        (_, Some(kind)) => {
            let works = matches!(report.state(kind), State::Works { .. });
            match works {
                true => Finding::ok("machine", format!("{kind}, as configured")),
                false => Finding::error(
                    "machine",
                    format!("{kind}, as configured, does not work here"),
                    "machine = \"auto\" in the configuration",
                ),
            }
        }
        (Ok(choice), None) => Finding::ok(
            "machine",
            format!("auto picks {}: {}", choice.kind, choice.why),
        ),
        (Err(why), None) => Finding::error(
            "machine",
            why.as_str(),
            "make kernels in hull's source directory; apt-get install qemu-system-x86",
        ),
    });
    if let Ok(choice) = &report.auto
        && !choice.hardware
    {
        findings.push(Finding::note(
            "isolation",
            format!(
                "{} isolates by a kernel of its own, not by hardware",
                choice.kind
            ),
            Some("isolation = \"hardware\" in the configuration refuses such machines".to_owned()),
        ));
    }
    findings
}

/// Whether a machine comes up as those of containers do: jailed, with devices, up to the agent's
/// first answer.
fn start(config: &Config, guest: &GuestFiles, report: &Report) -> Finding {
    let what = "start";
    let began = Instant::now();
    match machine_comes_up(config, guest, report) {
        Ok(kind) => Finding::ok(
            what,
            format!(
                "a {kind} machine is up in {} ms",
                began.elapsed().as_millis()
            ),
        ),
        Err(error) => Finding::error(
            what,
            error.message,
            error
                .hint
                .unwrap_or_else(|| "HULL_LOG=debug hull check; machine = \"qemu\"".to_owned()),
        ),
    }
}

fn machine_comes_up(config: &Config, guest: &GuestFiles, report: &Report) -> Result<Kind> {
    let choice = match config.machine.kind() {
        Some(kind) => hull_machine::choose(Some(kind), &guest.requirements(config, None))?,
        None => report.auto.clone().map_err(Error::new)?,
    };
    let kind = choice.kind;
    let machine = MachineConfig {
        initramfs: guest.initramfs()?,
        memory: config.memory,
        cpus: 1,
        nets: 0,
        spare_disks: 0,
        hull: None,
        choice,
    };
    with_machine(config, machine, |_| Ok(kind))
}

/// Boots a machine without containers, and ends it when `each` has looked at it.
fn with_machine<T>(
    config: &Config,
    machine: MachineConfig,
    each: impl FnOnce(&Client) -> Result<T>,
) -> Result<T> {
    let path = SandboxPath::new(&config.run_dir, &format!("check-{}", std::process::id()));
    let config = SandboxConfig::new(machine, EndPolicy::LastContainer);
    let client = launch(&path, &config, &[])?;
    let done = client.do_(&Request::Ready).and_then(|()| each(&client));
    // Nobody holds it any more, so it ends.
    drop(client);
    path.wait_for_end()?;
    path.sweep()?;
    done
}

fn guest_files(guest: &GuestFiles) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (architecture, kinds) in hull_machine::kernels() {
        let what = match architecture == std::env::consts::ARCH {
            true => "kernel native",
            false => "kernel um",
        };
        let Some(kind) = kinds.first() else { continue };
        let path = guest.kernel_path(*kind);
        findings.push(match GuestFiles::information(&path) {
            Ok(information) if path.is_file() => {
                let version = match information.version.as_str() {
                    "" => "version unknown",
                    version => version,
                };
                Finding::ok(what, format!("{version}, {}", path.display()))
            }
            Ok(_) => Finding::note(
                what,
                format!("there is no {}", path.display()),
                Some("make kernels in hull's source directory".to_owned()),
            ),
            Err(error) => Finding::note(
                what,
                error.message,
                Some("make kernels in hull's source directory".to_owned()),
            ),
        });
    }
    findings.push(match guest.initramfs() {
        Ok(path) => Finding::ok("initramfs", path.display().to_string()),
        Err(error) => Finding::error(
            "initramfs",
            error.message,
            "make guest in hull's source directory",
        ),
    });
    findings
}

fn control_groups(config: &Config) -> Finding {
    let what = "control groups";
    // File system magic numbers (linux/magic.h).
    const CGROUP2: i64 = 0x6367_7270;
    const TMPFS: i64 = 0x0102_1994;
    let kind = |path: &str| statfs(path).map(|found| found.f_type).unwrap_or(0);
    let found = match (kind("/sys/fs/cgroup"), kind("/sys/fs/cgroup/unified")) {
        (CGROUP2, _) => "version 2",
        (TMPFS, CGROUP2) => "version 1 with version 2 beside it",
        (TMPFS, _) => "version 1",
        _ => {
            return Finding::note(
                what,
                "not mounted: limits of containers hold in their guests, not for the machines \
                 themselves",
                Some("mount -t cgroup2 none /sys/fs/cgroup".to_owned()),
            );
        }
    };
    let Some(parent) = &config.cgroup_parent else {
        let found = format!("{found}; machines have none (cgroup_parent is empty)");
        return Finding::note(what, found, None);
    };
    match cgroup::reach(parent) {
        Ok(limits) if limits.len() == cgroup::LIMITS.len() => Finding::ok(
            what,
            format!("{found}; each machine is limited in {}", limits.join(", ")),
        ),
        Ok(limits) => {
            let missing: Vec<_> = cgroup::LIMITS
                .into_iter()
                .filter(|name| !limits.contains(name))
                .collect();
            Finding::note(
                what,
                format!(
                    "{found}; machines are not limited in {}",
                    missing.join(", ")
                ),
                None,
            )
        }
        Err(error) => Finding::note(
            what,
            format!("{found}; machines have none: {}", error.message),
            config
                .without_root
                .then(|| "systemd-run --user --scope hull run …".to_owned()),
        ),
    }
}

fn jail() -> Finding {
    let what = "jail";
    let always = "namespaces, capabilities, system call filters";
    match hull_jail::landlock_version() {
        Some(version) => Finding::ok(what, format!("{always}, Landlock (version {version})")),
        None => Finding::note(
            what,
            format!("{always}; the host's kernel has no Landlock, or does not use it"),
            Some("a kernel since 5.13 with lsm=landlock,… on its command line".to_owned()),
        ),
    }
}

fn overlay() -> Finding {
    let what = "overlayfs";
    let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match file_systems
        .lines()
        .any(|line| line.trim_start_matches("nodev").trim() == "overlay")
    {
        true => Finding::ok(what, "there"),
        false => Finding::error(
            what,
            "the host's kernel does not have it",
            "modprobe overlay",
        ),
    }
}

/// Whether a container without `--network` can have the configured network.
fn network(config: &Config) -> Finding {
    let what = "network";
    let Network::Named(name) = &config.network else {
        return Finding::ok(what, "none, as configured");
    };
    let remedy = |remedy: Option<&str>| {
        let instead = "network = \"none\" in the configuration";
        match remedy {
            Some(remedy) => format!("{remedy}; or {instead}"),
            None => instead.to_owned(),
        }
    };
    if config.without_root {
        return match (installed("pasta"), accessible_tun()) {
            (false, _) => Finding::error(
                what,
                "pasta, the network without root, is not installed",
                remedy(Some("apt-get install passt")),
            ),
            (_, Err(error)) => Finding::error(
                what,
                format!("cannot open /dev/net/tun: {error}"),
                remedy(Some("the administrator: chmod 0666 /dev/net/tun")),
            ),
            _ => Finding::ok(what, "default, by pasta"),
        };
    }
    let checked = hull_engine::network::list(&config.paths(), name, true)
        .and_then(|list| Ok(cni::Runner::default().require(&list)?));
    if let Err(error) = checked {
        return Finding::error(what, error.message, remedy(error.hint.as_deref()));
    }
    if !Path::new("/dev/net/tun").exists() {
        return Finding::error(
            what,
            "there is no /dev/net/tun",
            remedy(Some("modprobe tun")),
        );
    }
    match installed("iptables") || name != cni::DEFAULT_NAME {
        true => Finding::ok(what, name.as_str()),
        false => Finding::error(
            what,
            "iptables, which network plugins call, is not installed",
            remedy(Some("apt-get install iptables")),
        ),
    }
}

/// Whether a program of this name is installed.
fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).exists())
}

/// Whether taps can be created.
fn accessible_tun() -> rustix::io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map(drop)
}

/// Whether a directory, or the parent in which it will be created, is writable.
fn writable(what: &'static str, directory: &Path) -> Finding {
    let existing = directory
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(directory);
    let shown = directory.display();
    if let Err(error) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        return Finding::error(
            what,
            format!("{shown} cannot be written to: {error}"),
            "run hull as root",
        );
    }
    match rustix::fs::statvfs(existing) {
        Ok(found) if found.f_flag.contains(StatVfsMountFlags::RDONLY) => Finding::error(
            what,
            format!("{shown} is read-only"),
            "set another directory in the configuration",
        ),
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let found = format!("{shown}, {} free", output::decimal_size(free));
            match free < 64 << 20 {
                true => Finding::note(what, found, Some("df -h; hull image prune".to_owned())),
                false => Finding::ok(what, found),
            }
        }
        Err(error) => Finding::error(
            what,
            format!("{shown}: {error}"),
            "set another directory in the configuration",
        ),
    }
}

fn run_directory(directory: &Path) -> Finding {
    let what = "run directory";
    match hull_engine::run::check_length(directory) {
        Ok(()) => writable(what, directory),
        Err(error) => Finding::error(what, error.message, error.hint.unwrap_or_default()),
    }
}

fn configuration(config: &Config) -> Finding {
    let set = config
        .origins
        .iter()
        .filter(|origin| origin.place != "default")
        .count();
    let found = match set {
        0 => "all defaults".to_owned(),
        1 => "one key set".to_owned(),
        set => format!("{set} keys set"),
    };
    Finding::ok("configuration", format!("{found}; see hull config"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_line_up_with_their_remedies() {
        let findings = [
            Finding::ok("a", "fine"),
            Finding::error("b", "broken", "mend it"),
        ];
        let text = render(&findings, false, Colours::for_stdout());
        assert!(text.contains("a                fine\n"), "{text}");
        assert!(
            text.contains("broken\n                       → mend it\n"),
            "{text}"
        );
        assert!(text.ends_with("cannot work here yet\n"));
    }

    #[test]
    fn directories() {
        assert_ne!(
            writable("x", Path::new("/tmp/not/there/yet")).level,
            Level::Error
        );
        assert_eq!(writable("x", Path::new("/proc/not")).what, "x");
    }
}
