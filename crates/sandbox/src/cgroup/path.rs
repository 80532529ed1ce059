//! Where control groups are: the hierarchies of this host, and the group that `linux.cgroupsPath`
//! names in each.
//!
//! Pure: parses the contents of `/proc/self/mountinfo` and `/proc/self/cgroup`.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// A group, the same in each hierarchy. Paths are relative, without `..`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Location {
    /// Below the mount.
    Mount(PathBuf),
    /// Below the caller's group.
    Caller(PathBuf),
}

/// A hierarchy of control groups.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Mount point, absolute.
    pub(super) mount: PathBuf,
    /// Parent of [`Location::Caller`], relative to the mount.
    pub(super) caller: PathBuf,
    /// Its controllers with v1 (`cpu,cpuacct`); empty with v2.
    pub(super) controllers: String,
}

impl Hierarchy {
    pub(super) fn directory(&self, location: &Location) -> PathBuf {
        match location {
            Location::Mount(path) => self.mount.join(path),
            Location::Caller(path) => self.mount.join(&self.caller).join(path),
        }
    }
}

/// Interprets `linux.cgroupsPath`.
pub(super) fn location(cgroups_path: Option<&Path>, id: &str, systemd: bool) -> Result<Location> {
    let given = cgroups_path.filter(|path| !path.as_os_str().is_empty());
    if systemd {
        let default = PathBuf::from(format!(":hull:{id}"));
        return systemd_path(given.unwrap_or(&default)).map(Location::Mount);
    }
    let path = given.unwrap_or(Path::new(id));
    let clean = clean(path);
    if clean.as_os_str().is_empty() {
        return Err(Error::new(format!(
            "cannot use linux.cgroupsPath {}: it names no group of its own",
            path.display()
        )));
    }
    Ok(match path.is_absolute() {
        true => Location::Mount(clean),
        false => Location::Caller(clean),
    })
}

/// Makes a path relative, without `.` and `..`; `..` stops at the root.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// `slice:prefix:name` is the scope `prefix-name.scope`, or the slice `name` if it ends in
/// `.slice`; in `slice`, by default `system.slice`.
fn systemd_path(path: &Path) -> Result<PathBuf> {
    let text = path.to_str().unwrap_or_default();
    let parts: Vec<_> = text.split(':').collect();
    let &[slice, prefix, name] = &parts[..] else {
        // runc's message.
        return Err(Error::new(format!(
            "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {path:?} instead"
        )));
    };
    let unit = match name.ends_with(".slice") {
        true => name.to_owned(),
        false => format!("{prefix}-{name}.scope"),
    };
    if name.is_empty() || unit.contains('/') {
        return Err(Error::new(format!("invalid unit name: {unit}")));
    }
    let slice = match slice {
        "" => "system.slice",
        slice => slice,
    };
    Ok(expand_slice(slice)?.join(unit))
}

/// `a-b.slice` is within `a.slice`; `-.slice` is the root.
fn expand_slice(slice: &str) -> Result<PathBuf> {
    let invalid = || Error::new(format!("invalid slice name: {slice}"));
    let stem = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    let mut path = PathBuf::new();
    if stem == "-" {
        return Ok(path);
    }
    let mut prefix = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains('/') {
            return Err(invalid());
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Ok(path)
}

/// The hierarchies that are mounted and that the calling process is in.
pub(super) fn hierarchies(mountinfo: &str, own: &str) -> Vec<Hierarchy> {
    let mut mounts: Vec<_> = mountinfo.lines().filter_map(Mount::parse).collect();
    // Of several mounts of one hierarchy, prefer the usual place.
    mounts.sort_by_key(|mount| !mount.point.starts_with("/sys/fs/cgroup"));
    let only_v2 = own
        .lines()
        .all(|line| line.starts_with("0::") || !mounts.iter().any(|mount| mount.is_of(line)));
    let mut hierarchies = Vec::new();
    for line in own.lines() {
        let Some(mount) = mounts.iter().find(|mount| mount.is_of(line)) else {
            continue;
        };
        let group = clean(Path::new(line.splitn(3, ':').nth(2).unwrap_or_default()));
        let mut caller = group
            .strip_prefix(clean(mount.root))
            .map(Path::to_owned)
            .unwrap_or_default();
        if only_v2 {
            caller.pop();
        }
        hierarchies.push(Hierarchy {
            mount: mount.point.to_owned(),
            caller,
            controllers: line.split(':').nth(1).unwrap_or_default().to_owned(),
        });
    }
    hierarchies
}

/// Those that have a controller which limits a machine: with v1 the others only cost time.
pub(super) fn for_machine(mut hierarchies: Vec<Hierarchy>) -> Vec<Hierarchy> {
    const NEEDED: [&str; 3] = ["memory", "cpu", "pids"];
    let is_needed = |hierarchy: &Hierarchy| {
        let mut controllers = hierarchy.controllers.split(',');
        controllers.any(|name| NEEDED.contains(&name))
    };
    if hierarchies.iter().any(is_needed) {
        hierarchies.retain(is_needed);
    } else {
        hierarchies.retain(|hierarchy| hierarchy.controllers.is_empty());
    }
    hierarchies
}

/// A line of mountinfo.
struct Mount<'a> {
    /// The group that is mounted.
    root: &'a Path,
    point: &'a Path,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Mount<'a>> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let mut after = after.split(' ');
        Some(Mount {
            root: Path::new(before.next()?),
            point: Path::new(before.next()?),
            kind: after.next()?,
            options: after.nth(1)?,
        })
    }

    /// Whether a line of /proc/self/cgroup (`number:controllers:group`) is about this hierarchy.
    fn is_of(&self, line: &str) -> bool {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        match controllers {
            "" => self.kind == "cgroup2" && line.starts_with("0::"),
            _ => {
                self.kind == "cgroup"
                    && controllers
                        .split(',')
                        .all(|name| self.options.split(',').any(|option| option == name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(path: &str, systemd: bool) -> Result<Location, String> {
        location(Some(Path::new(path)), "c1", systemd).map_err(|failure| failure.message)
    }

    fn below_mount(path: &str) -> Result<Location, String> {
        Ok(Location::Mount(path.into()))
    }

    fn below_caller(path: &str) -> Result<Location, String> {
        Ok(Location::Caller(path.into()))
    }

    #[test]
    fn plain_paths() {
        assert_eq!(at("/pod/c1", false), below_mount("pod/c1"));
        assert_eq!(at("pod//./c1/", false), below_caller("pod/c1"));
        assert_eq!(at("", false), below_caller("c1"));
        assert_eq!(
            location(None, "c1", false),
            Ok(Location::Caller("c1".into()))
        );
        assert_eq!(at("/../../etc", false), below_mount("etc"));
        assert_eq!(at("a/../../b", false), below_caller("b"));
        assert_eq!(
            at("slice:docker:c1", false),
            below_caller("slice:docker:c1")
        );
        for nothing in ["/", "/a/..", "..", "."] {
            assert!(
                at(nothing, false)
                    .unwrap_err()
                    .contains("no group of its own")
            );
        }
    }

    #[test]
    fn systemd_paths() {
        assert_eq!(
            at("test-a-b.slice:docker:c1", true),
            below_mount("test.slice/test-a.slice/test-a-b.slice/docker-c1.scope")
        );
        assert_eq!(
            location(None, "c1", true),
            Ok(Location::Mount("system.slice/hull-c1.scope".into()))
        );
        assert_eq!(at("-.slice:p:n", true), below_mount("p-n.scope"));
        assert_eq!(
            at("a.slice::a-b.slice", true),
            below_mount("a.slice/a-b.slice")
        );
        for slice in ["x", "-a.slice", "a--b.slice", ".slice", "a/b.slice"] {
            let message = at(&format!("{slice}:p:n"), true).unwrap_err();
            assert_eq!(message, format!("invalid slice name: {slice}"));
        }
        for unit in ["a.slice:p:", "a.slice:../p:n", "a.slice::/n.slice"] {
            assert!(
                at(unit, true).unwrap_err().starts_with("invalid unit name"),
                "{unit}"
            );
        }
        for path in ["/pod/c1", "a:b", "a:b:c:d"] {
            assert!(
                at(path, true)
                    .unwrap_err()
                    .contains("\"slice:prefix:name\""),
                "{path}"
            );
        }
    }

    fn found(mountinfo: &str, own: &str) -> Vec<(String, String)> {
        hierarchies(mountinfo, own)
            .iter()
            .map(|hierarchy| {
                let text = |path: &Path| path.to_str().unwrap().to_owned();
                (text(&hierarchy.mount), text(&hierarchy.caller))
            })
            .collect()
    }

    fn pair(mount: &str, caller: &str) -> (String, String) {
        (mount.into(), caller.into())
    }

    #[test]
    fn hybrid() {
        let mountinfo = "\
            31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            40 31 0:29 / /mnt/memory rw shared:3 - cgroup cgroup rw,memory\n\
            32 31 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
            33 31 0:30 /docker/1 /sys/fs/cgroup/cpu,cpuacct rw shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct\n\
            34 31 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let own = "5:pids:/user\n4:cpu,cpuacct:/docker/1/x\n3:name=systemd:/init.scope\n2:memory:/a/b\n0::/u\n";
        assert_eq!(
            found(mountinfo, own),
            [
                pair("/sys/fs/cgroup/cpu,cpuacct", "x"),
                pair("/sys/fs/cgroup/systemd", "init.scope"),
                pair("/sys/fs/cgroup/memory", "a/b"),
                pair("/sys/fs/cgroup/unified", "u"),
            ]
        );
    }

    #[test]
    fn v2_puts_relative_groups_beside_the_callers() {
        let mountinfo = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let at = |own| found(mountinfo, own);
        assert_eq!(
            at("0::/user.slice/session-1.scope\n"),
            [pair("/sys/fs/cgroup", "user.slice")]
        );
        assert_eq!(at("0::/\n"), [pair("/sys/fs/cgroup", "")]);
        // Outside of the control group namespace.
        assert_eq!(at("0::/../other/x\n"), [pair("/sys/fs/cgroup", "other")]);
    }

    #[test]
    fn a_machine_has_groups_only_where_its_limits_are() {
        let own = "6:freezer:/\n5:pids:/\n4:cpu,cpuacct:/\n3:name=systemd:/\n2:memory:/\n0::/\n";
        let mountinfo: String = ["freezer", "pids", "cpu,cpuacct", "name=systemd", "memory"]
            .iter()
            .map(|name| format!("1 1 0:1 / /c/{name} rw - cgroup cgroup rw,{name}\n"))
            .collect();
        let v2 = "1 1 0:2 / /c/unified rw - cgroup2 cgroup2 rw\n";
        let of = |mountinfo: &str| {
            for_machine(hierarchies(mountinfo, own))
                .into_iter()
                .map(|hierarchy| hierarchy.controllers)
                .collect::<Vec<_>>()
        };
        assert_eq!(of(&(mountinfo + v2)), ["pids", "cpu,cpuacct", "memory"]);
        assert_eq!(of(v2), [""]);
        assert!(of("").is_empty());
    }

    #[test]
    fn nothing_mounted() {
        assert!(found("23 1 0:2 / / rw - ext4 /dev/vda rw\n", "0::/\n").is_empty());
        assert!(found("", "").is_empty());
    }
}
