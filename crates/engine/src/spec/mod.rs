//! From an image's configuration and the options of `run` to the OCI spec that the agent receives.
//!
//! Pure: looks at nothing but its arguments. User names are left to the agent, which resolves them
//! inside the container: `process.user.username` carries `user[:group]` as given, and the numbers
//! are then ignored.

pub mod seccomp;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use hull_image::ImageConfig;
use hull_sandbox::config::{RawArgs, given_file, is_network_sysctl};
use serde_json::{Value, json};

use crate::dns;
use crate::error::{Error, Result};
use crate::volumes::{self, Volume};
use seccomp::Seccomp;

/// What `run` can ask for beyond the image's own wishes.
#[derive(Debug, Clone, Default)]
pub struct ContainerOptions {
    /// Arguments after the image; replaces the image's command.
    pub command: Vec<OsString>,
    /// Replaces the image's entry point; empty string clears it.
    pub entrypoint: Option<OsString>,
    /// `NAME=VALUE`, in order; later wins over earlier and over the image.
    pub environment: Vec<OsString>,
    /// Working directory.
    pub directory: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// Further groups, names or numbers.
    pub groups: Vec<String>,
    /// May do in its guest whatever root may there.
    pub privileged: bool,
    /// For programs that read the specification.
    pub annotations: Vec<(String, String)>,
    /// How gladly the guest's kernel kills it for lack of memory.
    pub oom_score_adj: Option<i32>,
    /// Its part of processors when others want them, too.
    pub cpu_shares: Option<u64>,
    /// Host name inside.
    pub hostname: String,
    /// With a terminal.
    pub terminal: bool,
    /// Root file system is read-only.
    pub read_only: bool,
    /// Directory and mount options, as `--tmpfs DIR[:OPTIONS]`.
    pub tmpfs: Vec<(PathBuf, Vec<String>)>,
    /// Shared with the host.
    pub volumes: Vec<Volume>,
    /// Capabilities to add, upper case without `CAP_`, or `ALL`.
    pub capabilities_add: Vec<String>,
    /// Capabilities to drop, likewise.
    pub capabilities_drop: Vec<String>,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// Set those that every machine's network has; not in the machine of another container.
    pub default_sysctl: bool,
    /// Resource limits: name without `RLIMIT_`, upper case; soft; hard.
    pub ulimits: Vec<(String, u64, u64)>,
    /// Size of /dev/shm, bytes.
    pub shm_size: u64,
    /// Run an init process that forwards signals and reaps.
    pub init: bool,
    /// Memory limit, bytes.
    pub memory: Option<u64>,
    /// Processors, in thousandths.
    pub cpus_milli: Option<u64>,
    /// Most processes.
    pub pids_limit: Option<i64>,
    /// Which system calls are let through.
    pub seccomp: Seccomp,
    /// The guest's kernel executes programs of 32 bits.
    pub has_32_bits: bool,
    /// Programs cannot bring privileges along.
    pub no_new_privileges: bool,
}

/// As Docker sets them (moby, daemon/oci_linux.go): everybody may use ping and low ports. There is
/// no host whose ports these would be.
const DEFAULT_SYSCTL: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Docker's default capabilities (moby, oci/caps/defaults.go): what root in a container may do.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// All capabilities of the kernel (linux/capability.h), in its order.
const ALL_CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Docker's default search path for images that have none (moby, oci/defaults.go).
pub(crate) const DEFAULT_PATH: &str =
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the agent's own executable appears in a container that wants an init process. It lies in
/// the container's /dev, which is a file system of its own, so the image is not changed.
pub const INIT_PATH: &str = "/dev/hull-init";

/// Paths that a container must not read, or not write: Docker's lists (moby, oci/defaults.go).
const MASKED_PATHS: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Where the guest finds what the host shares with it.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// The root file system.
    pub root: String,
    /// The container to which hosts, hostname and resolv.conf were given.
    pub files_of: String,
    /// Each volume, in the order of the options.
    pub volumes: Vec<VolumeLayout>,
}

/// Where the guest finds a volume.
#[derive(Debug, Clone, Default)]
pub struct VolumeLayout {
    /// Its path.
    pub path: String,
    /// It gets what the image has at the place first.
    pub fill: bool,
}

/// The spec of a container.
#[derive(Debug, Clone)]
pub struct Built {
    /// The spec. Arguments and environment that are not UTF-8 are approximated in it.
    pub spec: Value,
    /// Those exactly, when the spec's are not.
    pub raw: RawArgs,
    /// Kernel parameters of the guest's own network, which are not in the spec.
    pub network_sysctl: BTreeMap<String, String>,
}

/// The words of an entry point that is given as an option: one, or those of a list in JSON, as
/// podman takes it.
pub fn entrypoint_words(text: &OsString) -> Vec<OsString> {
    let list = text.to_str().filter(|text| text.starts_with('['));
    let list = list.and_then(|text| serde_json::from_str::<Vec<String>>(text).ok());
    match list {
        Some(words) => words.into_iter().map(OsString::from).collect(),
        None if text.is_empty() => Vec::new(),
        None => vec![text.clone()],
    }
}

/// The arguments of init, from options and image, by Docker's rules: a new entry point forgets the
/// image's command.
///
/// # Errors
/// Neither names a command.
pub fn command(
    entrypoint: Option<&OsString>,
    given: &[OsString],
    image: &ImageConfig,
) -> Result<Vec<OsString>> {
    let of_image = |list: &[String]| list.iter().map(OsString::from).collect::<Vec<_>>();
    let mut command = match entrypoint {
        Some(text) => entrypoint_words(text),
        // As Docker: how builds take away that of the image below.
        None if image.entrypoint == [""] => Vec::new(),
        None => of_image(&image.entrypoint),
    };
    if given.is_empty() && entrypoint.is_none() {
        command.extend(of_image(&image.cmd));
    } else {
        command.extend(given.iter().cloned());
    }
    if command.is_empty() {
        return Err(
            Error::new("no command: the image has none, and none was given")
                .hint("hull run IMAGE COMMAND [ARG…]"),
        );
    }
    Ok(command)
}

/// The environment of init: image, then Docker's additions, then options; later values replace
/// earlier ones.
pub fn environment(options: &ContainerOptions, image: &ImageConfig) -> Vec<OsString> {
    let mut all: Vec<Vec<u8>> = vec![
        DEFAULT_PATH.into(),
        format!("HOSTNAME={}", options.hostname).into_bytes(),
    ];
    if options.terminal {
        all.push(b"TERM=xterm".to_vec());
    }
    all.extend(
        image
            .env
            .iter()
            .map(|variable| variable.clone().into_bytes()),
    );
    all.extend(
        options
            .environment
            .iter()
            .map(|variable| variable.clone().into_vec()),
    );
    keep_last_of_each(&mut all);
    all.into_iter().map(OsString::from_vec).collect()
}

/// Of `NAME=VALUE`s with the same name keeps the last, in the place of the first.
pub fn keep_last_of_each(variables: &mut Vec<Vec<u8>>) {
    fn name(variable: &[u8]) -> &[u8] {
        variable
            .split(|byte| *byte == b'=')
            .next()
            .unwrap_or(variable)
    }
    let mut merged: Vec<Vec<u8>> = Vec::with_capacity(variables.len());
    for variable in variables.drain(..) {
        match merged.iter().position(|old| name(old) == name(&variable)) {
            Some(index) => merged[index] = variable,
            None => merged.push(variable),
        }
    }
    *variables = merged;
}

/// Texts for JSON, and the exact bytes when some of them are not UTF-8.
fn for_json(list: Vec<OsString>) -> (Vec<String>, Vec<Vec<u8>>) {
    let texts: Vec<String> = list
        .iter()
        .map(|text| text.to_string_lossy().into_owned())
        .collect();
    let exact = list.iter().all(|text| text.to_str().is_some());
    let raw = if exact {
        Vec::new()
    } else {
        list.into_iter().map(OsString::into_vec).collect()
    };
    (texts, raw)
}

/// The capabilities of init, with `CAP_`, by Docker's rules for `--cap-add` and `--cap-drop`.
///
/// # Errors
/// There is no capability of a given name.
pub fn capabilities(add: &[String], drop: &[String]) -> Result<Vec<String>> {
    let known = |name: &String| -> Result<String> {
        let short = name.to_ascii_uppercase();
        let short = short.strip_prefix("CAP_").unwrap_or(&short).to_owned();
        if short == "ALL" || ALL_CAPABILITIES.contains(&short.as_str()) {
            Ok(short)
        } else {
            Err(Error::new(format!("unknown capability {name:?}"))
                .hint("man 7 capabilities lists them; ALL means all"))
        }
    };
    let add: Vec<String> = add.iter().map(known).collect::<Result<_>>()?;
    let drop: Vec<String> = drop.iter().map(known).collect::<Result<_>>()?;
    let all = |list: &[String]| list.iter().any(|name| name == "ALL");
    let has = |list: &[String], name: &str| list.iter().any(|other| other == name);
    Ok(ALL_CAPABILITIES
        .into_iter()
        .filter(|name| {
            if all(&add) {
                !has(&drop, name)
            } else if all(&drop) {
                has(&add, name)
            } else {
                (DEFAULT_CAPABILITIES.contains(name) && !has(&drop, name)) || has(&add, name)
            }
        })
        .map(|name| format!("CAP_{name}"))
        .collect())
}

/// The whole spec.
///
/// # Errors
/// No command, or an option that names something that does not exist.
pub fn build(options: &ContainerOptions, image: &ImageConfig, layout: &Layout) -> Result<Built> {
    let mut command = command(options.entrypoint.as_ref(), &options.command, image)?;
    if options.init {
        command.splice(0..0, [OsString::from(INIT_PATH), "--".into()]);
    }
    let (command, raw_args) = for_json(command);
    let (environment, raw_env) = for_json(environment(options, image));
    let user = options.user.as_deref().unwrap_or(&image.user);
    let directory = match options.directory.as_deref().unwrap_or(&image.workdir) {
        "" => "/",
        directory => directory,
    };
    if !directory.starts_with('/') {
        return Err(Error::new(format!(
            "working directory {directory:?} is not an absolute path"
        )));
    }
    let mut add = options.capabilities_add.clone();
    if options.privileged {
        add.push("ALL".to_owned());
    }
    let capabilities = capabilities(&add, &options.capabilities_drop)?;
    let rlimits: Vec<Value> = options
        .ulimits
        .iter()
        .map(|(name, soft, hard)| json!({"type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard}))
        .collect();

    // Those of a network belong to the guest's own, which is the container's. The defaults need not
    // be set before interfaces come.
    let (network_sysctl, sysctl): (BTreeMap<_, _>, BTreeMap<_, _>) = options
        .sysctl
        .clone()
        .into_iter()
        .partition(|(name, _)| is_network_sysctl(name));

    let mut sysctl = sysctl;
    if options.default_sysctl {
        for (name, value) in DEFAULT_SYSCTL {
            if !network_sysctl.contains_key(name)
                && !network_sysctl.contains_key(&name.replace('.', "/"))
            {
                sysctl.insert(name.into(), value.into());
            }
        }
    }

    let mut spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": layout.root, "readonly": options.read_only },
        "hostname": options.hostname,
        "process": {
            "terminal": options.terminal,
            "user": user_object(&with_groups(user, &options.groups)),
            "args": command,
            "env": environment,
            "cwd": directory,
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": rlimits,
            "noNewPrivileges": options.no_new_privileges,
        },
        "mounts": mounts(options, layout),
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
            ],
            "sysctl": sysctl,
            "resources": Limits {
                memory: options.memory,
                cpus_milli: options.cpus_milli,
                cpu_shares: options.cpu_shares,
                pids_limit: options.pids_limit,
            }
            .changed(),
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READ_ONLY_PATHS,
        },
    });
    if let Some(adjustment) = options.oom_score_adj {
        spec["process"]["oomScoreAdj"] = json!(adjustment);
    }
    if !options.annotations.is_empty() {
        let annotations = options.annotations.iter().cloned();
        spec["annotations"] = annotations
            .map(|(key, value)| (key, Value::from(value)))
            .collect();
    }
    let unconfined = Seccomp::Unconfined;
    let filter = match (options.privileged, &options.seccomp) {
        (true, Seccomp::Default) => &unconfined,
        (_, filter) => filter,
    };
    if options.privileged {
        let linux = &mut spec["linux"];
        linux["maskedPaths"] = json!([]);
        linux["readonlyPaths"] = json!([]);
        linux["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        linux["devices"] = PRIVILEGED_DEVICES
            .iter()
            .map(|(path, kind, major, minor)| {
                json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o660})
            })
            .collect();
    }
    if let Some(filter) = filter.for_capabilities(&capabilities, options.has_32_bits) {
        spec["linux"]["seccomp"] = filter;
    }
    Ok(Built {
        spec,
        raw: RawArgs {
            args: raw_args,
            env: raw_env,
        },
        network_sysctl,
    })
}

/// Devices of the guest's kernel that a privileged container has, beside those of all
/// (Documentation/admin-guide/devices.txt): for file systems, tunnels and images of disks.
const PRIVILEGED_DEVICES: [(&str, &str, u32, u32); 8] = [
    ("/dev/kmsg", "c", 1, 11),
    ("/dev/fuse", "c", 10, 229),
    ("/dev/net/tun", "c", 10, 200),
    ("/dev/loop-control", "c", 10, 237),
    ("/dev/loop0", "b", 7, 0),
    ("/dev/loop1", "b", 7, 1),
    ("/dev/loop2", "b", 7, 2),
    ("/dev/loop3", "b", 7, 3),
];

/// A user with further groups, as the agent looks them up.
fn with_groups(user: &str, groups: &[String]) -> String {
    std::iter::once(user)
        .chain(groups.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join("+")
}

/// The OCI user object. Names cannot be looked up here: see the head of this module.
pub fn user_object(user: &str) -> Value {
    let mut object = json!({"uid": 0, "gid": 0});
    if !user.is_empty() {
        object["username"] = json!(user);
    }
    object
}

/// The mounts: those of every container, then the user's, those that are nearer to the root first,
/// as Docker, so that none hides another one whatever their order was.
fn mounts(options: &ContainerOptions, layout: &Layout) -> Vec<Value> {
    let standard = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        let options = Value::from(options);
        json!({"destination": destination, "type": kind, "source": source, "options": options})
    };
    let shm_size = format!("size={}", options.shm_size);
    let access = if options.privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        standard("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        standard(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        standard(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        standard(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        ),
        standard(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &[access, "nosuid", "noexec", "nodev"],
        ),
        standard(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        standard(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", &shm_size],
        ),
    ];
    if options.init {
        mounts.push(standard(INIT_PATH, "bind", "/init", &["bind", "ro"]));
    }
    // As Docker: no set-user-id programs, devices or execution in a --tmpfs unless asked for.
    let tmpfs = options.tmpfs.iter().map(|(directory, given)| {
        let mut all: Vec<String> = ["nosuid", "nodev", "noexec"].map(String::from).to_vec();
        for option in given {
            let positive = option.strip_prefix("no").unwrap_or(option);
            all.retain(|old| old != positive && old.strip_prefix("no") != Some(positive));
            all.push(option.clone());
        }
        let mount =
            json!({"destination": directory, "type": "tmpfs", "source": "tmpfs", "options": all});
        (directory.clone(), mount)
    });
    let mut of_user: Vec<(PathBuf, Value)> = tmpfs.collect();
    let files = dns::FILES.iter().map(|name| {
        json!({
            "destination": format!("/etc/{name}"),
            "type": "bind",
            "source": given_file(&layout.files_of, name),
            "options": ["bind", "rprivate"],
        })
    });
    let volumes = options.volumes.iter().zip(&layout.volumes);
    of_user.extend(volumes.map(|(volume, layout)| {
        let mut options = vec!["rbind", "rprivate"];
        options.push(if volume.read_only { "ro" } else { "rw" });
        if layout.fill {
            options.push("hull.fill");
        }
        let mount = json!({
            "destination": volume.destination,
            "type": "bind",
            "source": layout.path,
            "options": options,
        });
        (volume.destination.clone(), mount)
    }));
    of_user.sort_by_key(|(destination, _)| destination.components().count());
    // In a volume over /etc, and before one that replaces a file of them. In a directory that
    // cannot be written to there may be no place for them.
    let is_read_only = |mount: &Value| {
        let options = mount["options"].as_array();
        options.is_some_and(|options| options.iter().any(|option| option == "ro"))
    };
    let hides = |(destination, mount): &(PathBuf, Value)| {
        let file = destination
            .strip_prefix("/etc")
            .ok()
            .and_then(|file| file.to_str());
        match file {
            Some("") => is_read_only(mount),
            Some(name) => dns::FILES.contains(&name),
            None => false,
        }
    };
    let before = of_user.iter().position(hides).unwrap_or(of_user.len());
    let mut of_user: Vec<Value> = of_user.into_iter().map(|(_, mount)| mount).collect();
    of_user.splice(before..before, files);
    mounts.append(&mut of_user);
    mounts
}

/// The volumes that an image declares.
pub fn image_volumes(image: &ImageConfig) -> Vec<PathBuf> {
    let place = |text: &String| volumes::container_path(text.as_bytes()).ok();
    image.volumes.iter().filter_map(place).collect()
}

/// Limits of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory, bytes; 0 for none.
    pub memory: Option<u64>,
    /// Processors, in thousandths; 0 for none.
    pub cpus_milli: Option<u64>,
    /// Weight among others, as `cpu.shares` of control groups version 1.
    pub cpu_shares: Option<u64>,
    /// Processes; none at 0 and below.
    pub pids_limit: Option<i64>,
}

impl Limits {
    /// As `linux.resources` of a spec: what is set, and where there is no limit that there is none.
    pub fn changed(&self) -> Value {
        let mut resources = json!({});
        let or_none = |limit: u64| i64::try_from(limit).ok().filter(|limit| *limit > 0);
        if let Some(limit) = self.memory {
            let limit = or_none(limit).unwrap_or(-1);
            // No swap in the guest: a limit that memory and swap share is the limit itself.
            resources["memory"] = json!({"limit": limit, "swap": limit});
        }
        if let Some(milli) = self.cpus_milli {
            let quota = or_none(milli).map_or(-1, |milli| milli.saturating_mul(100));
            // Period in microseconds: the kernel's own default (kernel/sched/fair.c).
            resources["cpu"] = json!({"period": 100_000, "quota": quota});
        }
        if let Some(shares) = self.cpu_shares {
            resources["cpu"]["shares"] = json!(shares);
        }
        if let Some(limit) = self.pids_limit {
            resources["pids"] = json!({"limit": if limit > 0 { limit } else { -1 }});
        }
        resources
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["one".into()],
            env: vec!["PATH=/bin".into(), "A=image".into()],
            user: "nobody".into(),
            workdir: "/work".into(),
            ..Default::default()
        }
    }

    fn words<T: for<'a> From<&'a str>>(list: &[&str]) -> Vec<T> {
        list.iter().map(|word| T::from(*word)).collect()
    }

    #[test]
    fn entry_point_and_command_combine_as_dockers() {
        let cases: [(Option<&str>, &[&str], &[&str]); 8] = [
            (None, &[], &["/entry", "one"]),
            (None, &["two"], &["/entry", "two"]),
            (Some("/other"), &[], &["/other"]),
            (Some("/other"), &["two"], &["/other", "two"]),
            (Some(""), &["two"], &["two"]),
            (Some(r#"["/a", "b c"]"#), &["two"], &["/a", "b c", "two"]),
            (Some("[]"), &["two"], &["two"]),
            (Some("[x"), &[], &["[x"]),
        ];
        for (entrypoint, given, expected) in cases {
            let entrypoint = entrypoint.map(OsString::from);
            let command = command(entrypoint.as_ref(), &words(given), &image()).unwrap();
            assert_eq!(command, expected, "{entrypoint:?} {given:?}");
        }
        let image = ImageConfig {
            entrypoint: vec![String::new()],
            ..image()
        };
        assert_eq!(command(None, &[], &image).unwrap(), ["one"]);
        assert_eq!(command(None, &words(&["two"]), &image).unwrap(), ["two"]);
        let none = command(None, &[], &ImageConfig::default());
        assert!(none.unwrap_err().message.contains("no command"));
    }

    #[test]
    fn the_environment_of_the_command_line_wins_over_the_images() {
        let options = ContainerOptions {
            environment: words(&["A=command", "B=x=y"]),
            hostname: "box".into(),
            ..Default::default()
        };
        let environment = environment(&options, &image());
        assert_eq!(
            environment,
            ["PATH=/bin", "HOSTNAME=box", "A=command", "B=x=y"]
        );
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_dockers() {
        let caps = |add: &[&str], drop: &[&str]| capabilities(&words(add), &words(drop)).unwrap();
        assert_eq!(caps(&[], &[]).len(), 14);
        assert_eq!(caps(&[], &["ALL"]), [""; 0]);
        assert_eq!(caps(&["ALL"], &[]).len(), 41);
        assert_eq!(
            caps(&["net_bind_service"], &["all"]),
            ["CAP_NET_BIND_SERVICE"]
        );
        assert!(!caps(&[], &["CAP_CHOWN"]).contains(&"CAP_CHOWN".to_owned()));
        assert!(caps(&["SYS_PTRACE"], &[]).contains(&"CAP_SYS_PTRACE".to_owned()));
        let error = capabilities(&words(&["FLY"]), &[]).unwrap_err();
        assert!(error.message.contains("unknown capability \"FLY\""));
    }

    #[test]
    fn arguments_that_are_not_utf8_are_kept_exactly() {
        let options = ContainerOptions {
            command: vec![OsString::from_vec(vec![0xff, b'x'])],
            ..Default::default()
        };
        let built = build(&options, &image(), &Layout::default()).unwrap();
        assert_eq!(built.raw.args, [b"/entry".to_vec(), vec![0xff, b'x']]);
        assert_eq!(built.raw.env, Vec::<Vec<u8>>::new());
    }

    #[test]
    fn limits_reach_the_spec() {
        let options = ContainerOptions {
            memory: Some(64 << 20),
            cpus_milli: Some(1500),
            pids_limit: Some(10),
            ..Default::default()
        };
        let spec = build(&options, &image(), &Layout::default()).unwrap().spec;
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], 64 << 20);
        assert_eq!(resources["cpu"]["quota"], 150_000);
        assert_eq!(resources["pids"]["limit"], 10);
        assert_eq!(spec["process"]["user"]["username"], "nobody");
        assert_eq!(spec["process"]["cwd"], "/work");
    }

    #[test]
    fn tmpfs_is_not_executable_unless_asked_for() {
        let options = ContainerOptions {
            tmpfs: vec![
                ("/a".into(), vec![]),
                ("/b".into(), words(&["exec", "size=1m"])),
            ],
            ..Default::default()
        };
        let mounts = mounts(&options, &Layout::default());
        let of = |path: &str| {
            let found = mounts
                .iter()
                .find(|mount| mount["destination"] == path)
                .unwrap();
            found["options"].as_array().unwrap().clone()
        };
        assert_eq!(of("/a"), ["nosuid", "nodev", "noexec"]);
        assert_eq!(of("/b"), ["nosuid", "nodev", "exec", "size=1m"]);
    }
}
