//! The mounts of a spec: which are the guest's own, which become shares of the host.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hull_sandbox::error::{Context, Failure, Result};
use hull_sandbox::pod::wire::Share;
use serde_json::{Value, json};

use super::devices::guest_device;
use super::{HostShare, Plan, refused, share_name};
use crate::bundle::Bundle;

/// File systems that the guest's kernel makes of nothing.
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

pub(super) fn plan(plan: &mut Plan, id: &str, bundle: &Bundle) -> Result<()> {
    let Some(mounts) = plan.spec["mounts"].as_array_mut() else {
        return Ok(());
    };
    let mut mounts = std::mem::take(mounts);
    for (index, mount) in mounts.iter_mut().enumerate() {
        one(plan, id, bundle, index, mount)?;
    }
    plan.spec["mounts"] = Value::Array(mounts);
    Ok(())
}

fn one(plan: &mut Plan, id: &str, bundle: &Bundle, index: usize, mount: &mut Value) -> Result<()> {
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
            return Ok(());
        }
        return Err(refused(
            format_args!("mounts: {destination}: type {kind:?}"),
            "its source is a device or a path of the host, and only bind mounts are shared with the guest",
        ));
    }
    let read_only = options.contains(&"ro") || options.contains(&"rro");
    let source = match text("source") {
        source if source.is_empty() => return Ok(()),
        source => bundle.path.join(source),
    };
    let found = fs::metadata(&source).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Failure::new(format!(
            "cannot mount {destination}: stat {}: no such file or directory",
            source.display()
        )),
        _ => Failure::new(format!(
            "cannot mount {destination}: cannot use {}: {error}",
            source.display()
        )),
    })?;

    if destination == "/dev/shm" && found.is_dir() && on_tmpfs(&source)? {
        *mount = shared_memory(&source)?;
        return Ok(());
    }
    if source.starts_with("/sys/fs/cgroup") {
        // The container's groups are the guest's.
        *mount = json!({
            "destination": destination,
            "type": "cgroup",
            "source": "cgroup",
            "options": if read_only { ["ro", "nosuid", "nodev", "noexec"] } else { ["rw", "nosuid", "nodev", "noexec"] },
        });
        return Ok(());
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
        return Ok(());
    }
    if kind.is_block_device() {
        return Err(refused(
            format_args!("mounts: {destination}: block device {}", source.display()),
            "block devices are not bound into containers",
        ));
    }
    let share = Share {
        name: share_name(id, &index.to_string()),
        is_file: !found.is_dir(),
        is_root: false,
    };
    mount["source"] = json!(share.path());
    plan.shares.push(HostShare {
        share,
        source,
        recursive,
        read_only,
    });
    Ok(())
}

fn on_tmpfs(path: &Path) -> Result<bool> {
    /// TMPFS_MAGIC (linux/magic.h).
    const TMPFS: u64 = 0x0102_1994;
    let found = rustix::fs::statfs(path).context(|| format!("use {}", path.display()))?;
    Ok(u64::try_from(found.f_type) == Ok(TMPFS))
}

/// Engines make the memory that processes share a tmpfs of the host and bind it. Memory that two kernels map is not
/// shared memory: the container gets a tmpfs of the guest of the same size.
fn shared_memory(source: &PathBuf) -> Result<Value> {
    let found = rustix::fs::statvfs(source).context(|| format!("use {}", source.display()))?;
    let size = found.f_blocks.saturating_mul(found.f_frsize);
    let mode = fs::metadata(source).map_or(0o1777, |found| found.mode() & 0o7777);
    Ok(json!({
        "destination": "/dev/shm",
        "type": "tmpfs",
        "source": "shm",
        "options": ["nosuid", "noexec", "nodev", format!("mode={mode:o}"), format!("size={size}")],
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn planned(mount: &Value) -> Result<(Value, Vec<HostShare>)> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "mounts": [mount],
            "linux": {"namespaces": [{"type": "network"}]},
        });
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let mut plan = Plan::new("c1", &Bundle::load(directory.path()).unwrap())?;
        plan.shares.remove(0);
        Ok((plan.spec["mounts"][0].clone(), plan.shares))
    }

    #[test]
    fn file_systems_of_the_guest_stay_as_they_are() {
        let mount = json!({"destination": "/proc", "type": "proc", "source": "proc"});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned, mount);
        assert!(shares.is_empty());
    }

    #[test]
    fn binds_become_shares() {
        let mount = json!({"destination": "/a", "source": "/usr", "options": ["rbind", "ro"]});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned["source"], "/run/hull/shares/c-c1-0");
        assert!(shares[0].recursive && shares[0].read_only && !shares[0].share.is_file);
        assert_eq!(shares[0].source, Path::new("/usr"));
    }

    #[test]
    fn a_file_relative_to_the_bundle_is_a_share_with_one_entry() {
        let mount = json!({"destination": "/a", "source": "file", "type": "bind"});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned["source"], "/run/hull/shares/c-c1-0/file");
        assert!(shares[0].share.is_file && !shares[0].recursive && !shares[0].read_only);
    }

    #[test]
    fn devices_are_the_guests() {
        let mount = json!({"destination": "/x", "source": "/dev/null", "options": ["bind"]});
        let (planned, shares) = planned(&mount).unwrap();
        assert_eq!(planned["source"], "/dev/null");
        assert!(shares.is_empty());
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
