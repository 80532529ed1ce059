//! The mounts of a spec: mounts of the guest, and shares of the host.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hull_sandbox::config::{self, Share, Writers, share_name};
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::shares::ReadOnly;
use serde_json::{Value, json};

use super::devices::guest_device;
use super::{HostShare, Plan, overlay, refused};
use crate::bundle::Bundle;

/// File systems that need no source on the host.
const OWN: [&str; 12] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "ramfs",
    "hugetlbfs",
    "bpf",
    "debugfs",
    "tracefs",
];

/// A block device to be bind mounted.
#[derive(Debug)]
pub(super) struct Bound {
    /// Path in the container.
    pub(super) destination: String,
    /// Path on the host.
    pub(super) source: PathBuf,
    /// Metadata of the node on the host.
    pub(super) node: fs::Metadata,
    /// The mount is read-only.
    pub(super) read_only: bool,
}

/// Plans the mounts. Returns the block devices among them, which the guest does not mount.
pub(super) fn plan(plan: &mut Plan, id: &str, bundle: &Bundle) -> Result<Vec<Bound>> {
    let Some(mounts) = plan.spec["mounts"].as_array_mut() else {
        return Ok(Vec::new());
    };
    let mut kept = Vec::new();
    let mut devices = Vec::new();
    let mut manages_groups = false;
    for (index, mut mount) in std::mem::take(mounts).into_iter().enumerate() {
        if is_hierarchy(&mount) {
            manages_groups |= !has_option(&mount, "ro");
            continue;
        }
        match one(plan, id, bundle, index, &mut mount)? {
            Some(device) => devices.push(device),
            None => kept.push(mount),
        }
    }
    if manages_groups {
        let groups = kept.iter_mut().filter(|mount| {
            let kind = mount["type"].as_str().unwrap_or_default();
            mount["destination"] == CGROUPS && matches!(kind, "cgroup" | "cgroup2")
        });
        for options in groups.filter_map(|mount| mount["options"].as_array_mut()) {
            options.retain(|option| option != "ro");
        }
        // Else it would not find the group that it is in.
        let namespaces = plan.spec["linux"]["namespaces"].as_array_mut();
        if let Some(namespaces) = namespaces
            && !namespaces
                .iter()
                .any(|namespace| namespace["type"] == "cgroup")
        {
            namespaces.push(json!({"type": "cgroup"}));
        }
    }
    plan.spec["mounts"] = Value::Array(kept);
    Ok(devices)
}

/// Where control groups are, on the host and in containers.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Whether a mount is a single hierarchy of cgroup v1, as podman has them for systemd. The guest
/// has one hierarchy for all, which systemd uses; it needs that to be writable.
fn is_hierarchy(mount: &Value) -> bool {
    let below = |name: &str| {
        let path = Path::new(mount[name].as_str().unwrap_or_default());
        path.starts_with(CGROUPS) && path != Path::new(CGROUPS)
    };
    let is_bind =
        has_option(mount, "bind") || has_option(mount, "rbind") || mount["type"] == "bind";
    is_bind && below("source") && below("destination")
}

fn has_option(mount: &Value, name: &str) -> bool {
    let mut options = mount["options"].as_array().into_iter().flatten();
    options.any(|option| option == name)
}

/// Plans one mount. The mount of a block device is returned unchanged.
fn one(
    plan: &mut Plan,
    id: &str,
    bundle: &Bundle,
    index: usize,
    mount: &mut Value,
) -> Result<Option<Bound>> {
    let text = |name: &str| mount[name].as_str().unwrap_or_default().to_owned();
    let (destination, kind) = (text("destination"), text("type"));
    let options: Vec<&str> = mount["options"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let recursive = options.contains(&"rbind");
    if !recursive && !options.contains(&"bind") && kind != "bind" {
        if OWN.contains(&kind.as_str()) || kind.is_empty() {
            return Ok(None);
        }
        if kind == "overlay" {
            let share = overlay::plan(share_name(id, &index.to_string()), mount)?;
            plan.shares.push(share);
            return Ok(None);
        }
        return Err(refused(
            format_args!("mounts: {destination}: type {kind:?}"),
            "its source is a device or a path of the host, and only bind mounts are shared with the guest",
        ));
    }
    let host_read_only = match (options.contains(&"ro"), options.contains(&"rro")) {
        (_, true) => ReadOnly::Recursive,
        (true, false) => ReadOnly::Top,
        (false, false) => ReadOnly::No,
    };
    let read_only = host_read_only != ReadOnly::No;
    let source = match text("source") {
        source if source.is_empty() => return Ok(None),
        source => bundle.path.join(source),
    };
    let found = fs::metadata(&source).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(format!(
            "cannot mount {destination}: stat {}: no such file or directory",
            source.display()
        )),
        _ => Error::new(format!(
            "cannot mount {destination}: cannot use {}: {error}",
            source.display()
        )),
    })?;

    if let Some(memory) = memory_volume(&source, &destination, read_only)? {
        *mount = with_mapped_ids(memory, mount);
        return Ok(None);
    }
    if destination == "/dev/shm" && found.is_dir() && on_tmpfs(&source)? {
        *mount = with_mapped_ids(shared_memory(&source, read_only)?, mount);
        return Ok(None);
    }
    if source.starts_with(CGROUPS) {
        // The container's control groups are in the guest.
        *mount = json!({
            "destination": destination,
            "type": "cgroup",
            "source": "cgroup",
            "options": if read_only { ["ro", "nosuid", "nodev", "noexec"] } else { ["rw", "nosuid", "nodev", "noexec"] },
        });
        return Ok(None);
    }
    let kind = found.file_type();
    if kind.is_char_device() {
        let numbers = (
            rustix::fs::major(found.rdev()),
            rustix::fs::minor(found.rdev()),
        );
        let path = guest_device(numbers).ok_or_else(|| {
            refused(
                format_args!("mounts: {destination}: device {}", source.display()),
                "the guest has no such device",
            )
        })?;
        mount["source"] = json!(path);
        return Ok(None);
    }
    if kind.is_block_device() {
        return Ok(Some(Bound {
            destination,
            source,
            node: found,
            read_only,
        }));
    }
    let share = Share {
        name: share_name(id, &index.to_string()),
        is_file: !found.is_dir(),
        writers: Writers::Anyone,
        sealed: false,
    };
    mount["source"] = json!(share.path());
    if recursive && host_read_only == ReadOnly::Top && has_mounts_below(&source)? {
        // In the guest they are one mount with what is mounted below, which stays as it is: the
        // host alone keeps the top from being written to.
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "ro");
        }
    }
    plan.shares.push(HostShare {
        share,
        source,
        overlay: None,
        recursive,
        read_only: host_read_only,
    });
    Ok(None)
}

/// A mount of the guest, with the mapped ids of the one that it stands for.
fn with_mapped_ids(mut mount: Value, of: &Value) -> Value {
    for field in ["uidMappings", "gidMappings"] {
        if let Some(mappings) = of.get(field) {
            mount[field] = mappings.clone();
        }
    }
    let words = of["options"].as_array().into_iter().flatten();
    let asked = words.filter(|word| *word == "idmap" || *word == "ridmap");
    if let Some(options) = mount["options"].as_array_mut() {
        options.extend(asked.cloned());
    }
    mount
}

/// Whether something is mounted below a directory of the host.
fn has_mounts_below(path: &Path) -> Result<bool> {
    let doing = || format!("use {}", path.display());
    let path = fs::canonicalize(path).context(doing)?;
    let mounts = Mounted::all().context(doing)?;
    let below = |mounted: &Mounted| mounted.path.starts_with(&path) && mounted.path != path;
    Ok(mounts.iter().any(below))
}

/// A path as proc(5) writes it: with spaces, tabs, newlines and backslashes in octal.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let number = rest
            .get(1..4)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number.filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = rest.get(4..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn on_tmpfs(path: &Path) -> Result<bool> {
    /// TMPFS_MAGIC (linux/magic.h).
    const TMPFS: u64 = 0x0102_1994;
    let found = rustix::fs::statfs(path).context(|| format!("use {}", path.display()))?;
    Ok(u64::try_from(found.f_type) == Ok(TMPFS))
}

/// Engines create a tmpfs on the host for shared memory, and bind it. Two kernels cannot share such
/// memory, so the guest gets a tmpfs of the same size, one for all its containers that bind the
/// same source.
fn shared_memory(source: &Path, read_only: bool) -> Result<Value> {
    let flags = ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
    guest_memory(source, config::shared_memory, "/dev/shm", read_only, flags)
}

/// A mount of memory of the guest, with size, mode and owner of a tmpfs of the host, and further
/// options.
fn guest_memory(
    source: &Path,
    name: fn(u64) -> String,
    destination: &str,
    read_only: bool,
    further: Vec<String>,
) -> Result<Value> {
    let doing = || format!("use {}", source.display());
    let path = fs::canonicalize(source).context(doing)?;
    let found = fs::metadata(&path).context(doing)?;
    let limits = rustix::fs::statvfs(&path).context(doing)?;
    let mut options = vec![
        "bind".to_owned(),
        format!("size={}", limits.f_blocks.saturating_mul(limits.f_frsize)),
        format!("mode={:o}", found.mode() & 0o7777),
        format!("uid={}", found.uid()),
        format!("gid={}", found.gid()),
    ];
    options.extend(further);
    options.extend(read_only.then(|| "ro".to_owned()));
    Ok(json!({
        "destination": destination,
        "type": "bind",
        "source": name(identity(&path, &found)),
        "options": options,
    }))
}

/// What the kubelet's directories of volumes in memory have in their paths (pkg/volume/emptydir),
/// and where it mounts parts of volumes (pkg/volume/util/subpath).
const EMPTY_DIR: &str = "/volumes/kubernetes.io~empty-dir/";
const SUB_PATHS: &str = "/volume-subpaths/";

/// A volume of a pod in memory is a tmpfs of the guest, as its use counts to the containers that
/// write to it. It lives as long as the guest. A part of one (`subPath`) is found by the mount that
/// the kubelet has made of it.
fn memory_volume(source: &Path, destination: &str, read_only: bool) -> Result<Option<Value>> {
    if !on_tmpfs(source)? {
        return Ok(None);
    }
    // A path that leads through another process's files is none of the kubelet's.
    let Ok(path) = fs::canonicalize(source) else {
        return Ok(None);
    };
    let text = path.to_string_lossy();
    let is_part = text.contains(SUB_PATHS);
    if !(is_part || text.contains(EMPTY_DIR)) {
        return Ok(None);
    }
    let mounts = Mounted::all().context(|| "read the mounts")?;
    // The last one at a place is what is seen there.
    let Some(own) = mounts.iter().rev().find(|mounted| mounted.path == path) else {
        return Ok(None);
    };
    let volume = mounts.iter().find(|mounted| {
        mounted.device == own.device
            && mounted.root == Path::new("/")
            && mounted.path.to_string_lossy().contains(EMPTY_DIR)
    });
    let Some(volume) = volume else {
        return Ok(None);
    };
    let mut further = Vec::new();
    if is_part {
        let part = own.root.strip_prefix("/").unwrap_or(&own.root);
        let part = part.to_str().ok_or_else(|| {
            Error::unsupported(format_args!(
                "mounts: {destination}: {}: a part of a volume in memory whose name is not UTF-8",
                part.display()
            ))
        })?;
        further.push(format!("part={part}"));
    }
    let volume = &volume.path;
    guest_memory(volume, config::pod_memory, destination, read_only, further).map(Some)
}

/// A line of /proc/PID/mountinfo (proc(5)).
struct Mounted {
    device: String,
    /// What of its file system is mounted.
    root: PathBuf,
    path: PathBuf,
}

impl Mounted {
    /// What is mounted for this process, in the order of the kernel.
    fn all() -> std::io::Result<Vec<Self>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        Ok(mounts.lines().filter_map(Self::parse).collect())
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ').skip(2);
        Some(Self {
            device: fields.next()?.to_owned(),
            root: unescape(fields.next()?),
            path: unescape(fields.next()?),
        })
    }
}

/// Identifies a directory of the host while the guest runs: its inode number alone may be reused
/// meanwhile, and so may its path. FNV-1a, which does not change between versions of hull.
fn identity(path: &Path, found: &fs::Metadata) -> u64 {
    let numbers = [found.dev(), found.ino()].map(u64::to_le_bytes);
    path.as_os_str()
        .as_bytes()
        .iter()
        .chain(numbers.as_flattened())
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn planned(mount: &Value) -> Result<(Value, Vec<HostShare>)> {
        let (mounts, shares) = all_planned(std::slice::from_ref(mount))?;
        Ok((mounts[0].clone(), shares))
    }

    fn all_planned(mounts: &[Value]) -> Result<(Value, Vec<HostShare>)> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": "network"}]},
        });
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let mut plan = Plan::new("c1", &Bundle::load(directory.path()).unwrap())?;
        plan.shares.remove(0);
        Ok((plan.spec["mounts"].take(), plan.shares))
    }

    #[test]
    fn file_systems_of_the_guest_stay_as_they_are() {
        let mount = json!({"destination": "/proc", "type": "proc", "source": "proc"});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned, mount);
        assert!(shares.is_empty());
    }

    #[test]
    fn a_recursive_bind_with_mounts_below_is_read_only_on_the_host_alone() {
        // Something is mounted below it everywhere.
        let mount = json!({"destination": "/a", "source": "/proc/..", "options": ["rbind", "ro"]});
        let (plan, shares) = planned(&mount).unwrap();
        assert_eq!(plan["options"], json!(["rbind"]));
        assert_eq!(shares[0].read_only, ReadOnly::Top);
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(r"/a\9"), Path::new(r"/a\9"));
    }

    #[test]
    fn systemd_gets_the_guests_one_hierarchy_writable() {
        let groups = json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "ro"],
        });
        let systemd = |option: &str| {
            json!({
                "destination": "/sys/fs/cgroup/systemd", "type": "bind",
                "source": "/sys/fs/cgroup/systemd/x", "options": ["bind", option],
            })
        };
        for (option, options) in [("rw", json!(["nosuid"])), ("ro", json!(["nosuid", "ro"]))] {
            let (plan, shares) = all_planned(&[groups.clone(), systemd(option)]).unwrap();
            assert!(shares.is_empty());
            assert_eq!(plan.as_array().unwrap().len(), 1);
            assert_eq!(plan[0]["options"], options);
        }
    }

    #[test]
    fn binds_become_shares() {
        let mount = json!({"destination": "/a", "source": "/usr", "options": ["rbind", "ro"]});
        let (plan, shares) = planned(&mount).unwrap();
        assert_eq!(plan["source"], "/run/hull/shares/c-c1-0");
        assert!(shares[0].recursive && !shares[0].share.is_file);
        assert_eq!(shares[0].read_only, ReadOnly::Top);
        assert_eq!(shares[0].source, Path::new("/usr"));
        let mount = json!({"destination": "/a", "source": "/usr", "options": ["rbind", "rro"]});
        assert_eq!(planned(&mount).unwrap().1[0].read_only, ReadOnly::Recursive);
    }

    #[test]
    fn a_file_relative_to_the_bundle_is_a_share_with_one_entry() {
        let mount = json!({"destination": "/a", "source": "file", "type": "bind"});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned["source"], "/run/hull/shares/c-c1-0/file");
        assert!(shares[0].share.is_file && !shares[0].recursive);
        assert_eq!(shares[0].read_only, ReadOnly::No);
    }

    #[test]
    fn devices_are_the_guests() {
        let mount = json!({"destination": "/x", "source": "/dev/null", "options": ["bind"]});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned["source"], "/dev/null");
        assert!(shares.is_empty());
    }

    #[test]
    fn shared_memory_is_known_by_where_it_is() {
        let directory = match tempfile::tempdir_in("/dev/shm") {
            Ok(directory) if on_tmpfs(directory.path()).unwrap() => directory,
            other => return eprintln!("left out: no tmpfs at /dev/shm: {other:?}"),
        };
        let paths = ["a", "b"].map(|name| directory.path().join(name));
        for path in &paths {
            fs::create_dir(path).unwrap();
        }
        let of = |source: &Path, options: Value| {
            let mount = json!({"destination": "/dev/shm", "source": source, "options": options});
            let (planned, shares) = planned(&mount).unwrap();
            assert!(shares.is_empty());
            planned
        };
        let (a, b) = (
            of(&paths[0], json!(["bind"])),
            of(&paths[1], json!(["bind"])),
        );
        let name = a["source"].as_str().unwrap();
        assert_eq!(name.strip_prefix("hull-shm:").unwrap().len(), 16);
        assert_ne!(a["source"], b["source"]);
        let winding = paths[1].join("../a");
        assert_eq!(of(&winding, json!(["bind", "ro"]))["source"], a["source"]);
        // Another directory at the same path is different memory.
        fs::rename(&paths[0], directory.path().join("c")).unwrap();
        fs::rename(&paths[1], &paths[0]).unwrap();
        assert_ne!(of(&paths[0], json!(["bind"]))["source"], a["source"]);
        let options = a["options"].as_array().unwrap();
        assert!(options.contains(&json!("bind")) && !options.contains(&json!("ro")));
        let size = rustix::fs::statvfs("/dev/shm").unwrap();
        let size = format!("size={}", size.f_blocks * size.f_frsize);
        assert!(options.contains(&json!(size)), "{options:?}");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (mount, words) in [
            (
                json!({"destination": "/a", "source": "/no/such", "options": ["bind"]}),
                "no such file or directory",
            ),
            (
                json!({"destination": "/a", "type": "ext4", "source": "/dev/sda1"}),
                "ext4",
            ),
        ] {
            let error = planned(&mount).unwrap_err();
            assert!(error.message.contains(words), "{error}");
        }
    }
}
