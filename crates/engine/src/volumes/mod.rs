//! `--volume`, `--mount` and `--tmpfs`: what a container sees at which path. Checks the notation;
//! whether a host path exists is checked by `run` itself, so that the error can say what to do.
//! Volumes with names are in [`store`].

mod backing;
mod mount;
pub mod store;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::container;
use crate::error::{Context, Error};
use crate::exact;
use crate::names;
use crate::paths::Paths;

pub use backing::Backing;
pub use mount::{Mount, mount};

/// Where the content of a volume is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A directory or file of the host, absolute.
    Host(#[serde(with = "exact")] PathBuf),
    /// A volume with a name.
    Named(String),
    /// A volume of this container alone.
    Anonymous,
}

/// A directory or file that outlives the container's root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its content.
    pub source: Source,
    /// In the container, absolute.
    #[serde(with = "exact")]
    pub destination: PathBuf,
    /// The container cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// An empty volume stays empty; else it gets what the image has at the destination.
    #[serde(default)]
    pub no_copy: bool,
    /// What is shown of the volume, relative to it.
    #[serde(default, with = "exact::option")]
    pub subpath: Option<PathBuf>,
    /// Options of a volume with a name that is created for this: see [`Backing`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
}

impl Volume {
    /// A volume of one container alone.
    pub fn anonymous(destination: PathBuf) -> Self {
        Self {
            source: Source::Anonymous,
            destination,
            read_only: false,
            no_copy: false,
            subpath: None,
            options: BTreeMap::new(),
        }
    }
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.source {
            Source::Host(path) => write!(f, "{}:", path.display())?,
            Source::Named(name) => write!(f, "{name}:")?,
            Source::Anonymous => {}
        }
        let access = if self.read_only { "ro" } else { "rw" };
        write!(f, "{}:{access}", self.destination.display())
    }
}

/// Reads `[SOURCE:]CONTAINER[:OPTIONS]`.
pub fn volume(text: &OsStr) -> Result<Volume, String> {
    let wrong = |why: &str| format!("invalid volume {text:?}: {why}");
    let parts: Vec<&[u8]> = text.as_bytes().split(|byte| *byte == b':').collect();
    let (source, destination, options) = match parts[..] {
        [destination] if destination.starts_with(b"/") => (None, destination, &b""[..]),
        [source, destination] => (Some(source), destination, &b""[..]),
        [source, destination, options] => (Some(source), destination, options),
        _ => {
            return Err(wrong(
                "give HOST:CONTAINER[:OPTIONS] or NAME:CONTAINER[:OPTIONS]",
            ));
        }
    };
    let destination = container_path(destination).map_err(|why| wrong(&why))?;
    let source = source.map_or(Ok(Source::Anonymous), read_source);
    let source = source.map_err(|why| wrong(&why))?;
    let (mut read_only, mut no_copy) = (false, false);
    for option in options
        .split(|byte| *byte == b',')
        .filter(|option| !option.is_empty())
    {
        match option {
            b"ro" => read_only = true,
            b"rw" => read_only = false,
            b"nocopy" => no_copy = true,
            b"copy" => no_copy = false,
            // Labels of SELinux, and caching on other systems: nothing to do here. Private
            // propagation is what a guest has.
            b"z" | b"Z" | b"consistent" | b"cached" | b"delegated" | b"private" | b"rprivate" => {}
            b"shared" | b"rshared" | b"slave" | b"rslave" => {
                return Err(wrong(
                    "not supported: mounts do not propagate into another kernel",
                ));
            }
            other => {
                let other = String::from_utf8_lossy(other);
                return Err(wrong(&format!("unknown option {other:?}: ro or rw")));
            }
        }
    }
    Ok(Volume {
        source,
        destination,
        read_only,
        no_copy,
        subpath: None,
        options: BTreeMap::new(),
    })
}

/// Creates the directory of the host that `-v` names, as Docker does, unless something is there.
///
/// # Errors
/// It cannot be created.
pub fn create_missing(path: &Path) -> crate::error::Result<()> {
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    std::fs::create_dir_all(path).context(|| format!("create {} for a volume", path.display()))
}

/// As with Docker, a relative path begins with a dot; another word is the name of a volume.
fn read_source(source: &[u8]) -> Result<Source, String> {
    if source.is_empty() {
        return Err("no host path, and no name of a volume".to_owned());
    }
    if source.starts_with(b"/") || source.starts_with(b".") {
        return host_path(source).map(Source::Host);
    }
    let name = String::from_utf8_lossy(source);
    match volume_name(&name) {
        Ok(name) => Ok(Source::Named(name)),
        Err(why) if source.contains(&b'/') => {
            Err(format!("{why}; a relative path of the host begins with ./"))
        }
        Err(why) => Err(why),
    }
}

fn host_path(source: &[u8]) -> Result<PathBuf, String> {
    let path = PathBuf::from(OsString::from_vec(source.to_vec()));
    if path.is_absolute() {
        return Ok(path);
    }
    let here = std::env::current_dir().map_err(|error| format!("no current directory: {error}"))?;
    Ok(here.join(path))
}

/// The name of a volume.
pub fn volume_name(text: &str) -> Result<String, String> {
    match names::is_valid(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "invalid volume name {text:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]+ is allowed"
        )),
    }
}

/// A path in a container, without `.` and `..`.
pub(crate) fn container_path(path: &[u8]) -> Result<PathBuf, String> {
    let path = Path::new(OsStr::from_bytes(path));
    if !path.is_absolute() {
        return Err("the path in the container must be absolute".to_owned());
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if clean == Path::new("/") {
        return Err("the path in the container cannot be /".to_owned());
    }
    Ok(clean)
}

/// A file system in memory inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// In the container, absolute.
    #[serde(with = "exact")]
    pub destination: PathBuf,
    /// Mount options as given, checked. Docker's own are added when the spec is built.
    pub options: Vec<String>,
}

const TMPFS_FLAGS: [&str; 20] = [
    "ro",
    "rw",
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "sync",
    "async",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "mand",
];
const TMPFS_VALUES: [&str; 6] = ["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks"];

/// Reads `PATH[:OPTIONS]`.
pub fn tmpfs(text: &str) -> Result<Tmpfs, String> {
    let (path, given) = text.split_once(':').unwrap_or((text, ""));
    let destination =
        container_path(path.as_bytes()).map_err(|why| format!("invalid tmpfs {text:?}: {why}"))?;
    let mut options = Vec::new();
    for option in given.split(',').filter(|option| !option.is_empty()) {
        let known = match option.split_once('=') {
            Some((name, value)) => TMPFS_VALUES.contains(&name) && !value.is_empty(),
            None => TMPFS_FLAGS.contains(&option),
        };
        if !known {
            return Err(format!("invalid tmpfs {text:?}: unknown option {option:?}"));
        }
        options.push(option.to_owned());
    }
    Ok(Tmpfs {
        destination,
        options,
    })
}

/// Adds the volumes of another container, `NAME[:ro|:rw]`, where nothing else is wanted.
///
/// # Errors
/// There is no such container, or an older hull created it.
pub fn add_those_of(
    volumes: &mut Vec<Volume>,
    tmpfs: &[Tmpfs],
    other: &str,
    paths: &Paths,
) -> crate::error::Result<()> {
    let (name, read_only) = match other.rsplit_once(':') {
        Some((name, "ro")) => (name, true),
        Some((name, "rw")) => (name, false),
        _ => (other, false),
    };
    let container = container::find(paths, name)?;
    let Some(options) = &container.record.details.options else {
        return Err(Error::unsupported(format_args!(
            "--volumes-from {name}: an older hull created that container"
        )));
    };
    for (index, volume) in options.volumes.iter().enumerate() {
        let mut taken = volumes.iter().map(|volume| &volume.destination);
        let mut hidden = tmpfs.iter().map(|tmpfs| &tmpfs.destination);
        if taken.any(|place| *place == volume.destination)
            || hidden.any(|place| *place == volume.destination)
        {
            continue;
        }
        let mut volume = volume.clone();
        if volume.source == Source::Anonymous {
            // It goes with the other container, as far as names are concerned.
            let located = store::source(paths, container.directory.path(), index, &volume)?;
            volume.source = Source::Host(located.path);
        }
        volume.read_only |= read_only;
        volumes.push(volume);
    }
    Ok(())
}

/// Refuses two mounts at one place.
pub fn check_distinct(volumes: &[Volume], tmpfs: &[Tmpfs]) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    let places = volumes
        .iter()
        .map(|volume| &volume.destination)
        .chain(tmpfs.iter().map(|tmpfs| &tmpfs.destination));
    for place in places {
        if !seen.insert(place) {
            return Err(format!("two mounts at {}", place.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn volumes() {
        let read = |text: &str| volume(OsStr::new(text));
        let expected = |source, destination: &str, read_only| Volume {
            source,
            read_only,
            ..Volume::anonymous(destination.into())
        };
        let host = || Source::Host("/a".into());
        for (text, volume) in [
            ("/a:/b", expected(host(), "/b", false)),
            ("/a:/b:ro", expected(host(), "/b", true)),
            ("/a:/b/../c/./d:rw,z", expected(host(), "/c/d", false)),
            ("/a", Volume::anonymous("/a".into())),
            ("db:/b", expected(Source::Named("db".into()), "/b", false)),
        ] {
            assert_eq!(read(text), Ok(volume), "{text}");
        }
        assert!(read("db:/b:nocopy").unwrap().no_copy);
        let Source::Host(path) = read("./a:/b").unwrap().source else {
            panic!("a path that begins with a dot is the host's")
        };
        assert!(path.is_absolute());
        for (text, why) in [
            ("", "give HOST:CONTAINER"),
            ("a:/b", "invalid volume name \"a\""),
            ("a/b:/b", "begins with ./"),
            ("..", "give HOST:CONTAINER"),
            (":/b", "no host path"),
            ("/a:b", "must be absolute"),
            ("/a:/", "cannot be /"),
            ("/a:/b/..", "cannot be /"),
            ("/a:/b:rx", "unknown option \"rx\""),
            ("/a:/b:rshared", "do not propagate"),
            ("/a:/b:ro:x", "give HOST:CONTAINER"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn volumes_with_any_bytes() {
        let read = volume(OsStr::from_bytes(b"/a\xff:/b\xfe")).unwrap();
        let host = Path::new(OsStr::from_bytes(b"/a\xff")).to_owned();
        assert_eq!(read.source, Source::Host(host));
        assert_eq!(read.destination.as_os_str().as_bytes(), b"/b\xfe");
    }

    #[test]
    fn file_systems_in_memory() {
        let options = |text: &str| tmpfs(text).unwrap().options.join(",");
        assert_eq!(options("/run"), "");
        assert_eq!(options("/run:size=64m,exec"), "size=64m,exec");
        for text in ["run", "/", "/run:siez=1", "/run:size=", "/run:bogus"] {
            assert!(tmpfs(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_mount_at_a_place() {
        let volume = volume(OsStr::new("/a:/run")).unwrap();
        let tmpfs = tmpfs("/run/.").unwrap();
        assert!(check_distinct(std::slice::from_ref(&volume), &[]).is_ok());
        assert_eq!(
            check_distinct(&[volume], &[tmpfs]),
            Err("two mounts at /run".to_owned())
        );
    }
}
