//! `--volume` and `--tmpfs`: what a container sees at which path. Checks the notation; whether a
//! host path exists is checked by `run` itself, so that the error can say what to do.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// A host directory or file inside the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host, absolute.
    pub source: PathBuf,
    /// In the container, absolute.
    pub destination: PathBuf,
    /// The container cannot write to it.
    pub read_only: bool,
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let access = if self.read_only { "ro" } else { "rw" };
        write!(
            f,
            "{}:{}:{access}",
            self.source.display(),
            self.destination.display()
        )
    }
}

/// Reads `HOST:CONTAINER[:OPTIONS]`.
pub fn volume(text: &OsStr) -> Result<Volume, String> {
    let wrong = |why: &str| format!("invalid volume {text:?}: {why}");
    let parts: Vec<&[u8]> = text.as_bytes().split(|byte| *byte == b':').collect();
    let (source, destination, options) = match parts[..] {
        [path] if path.starts_with(b"/") => {
            return Err(wrong(
                "not supported: a volume without a host path; give HOST:CONTAINER",
            ));
        }
        [source, destination] => (source, destination, &b""[..]),
        [source, destination, options] => (source, destination, options),
        _ => return Err(wrong("give HOST:CONTAINER[:OPTIONS]")),
    };
    let destination = container_path(destination).map_err(|why| wrong(&why))?;
    let source = host_path(source).map_err(|why| wrong(&why))?;
    let mut read_only = false;
    for option in options
        .split(|byte| *byte == b',')
        .filter(|option| !option.is_empty())
    {
        match option {
            b"ro" => read_only = true,
            b"rw" => read_only = false,
            // Labels of SELinux, copying into new volumes and caching on other systems: nothing to
            // do for a host path here. Private propagation is what a guest has.
            b"z" | b"Z" | b"nocopy" | b"consistent" | b"cached" | b"delegated" | b"private"
            | b"rprivate" => {}
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
    })
}

fn host_path(source: &[u8]) -> Result<PathBuf, String> {
    let path = PathBuf::from(OsString::from_vec(source.to_vec()));
    if path.is_absolute() {
        return Ok(path);
    }
    if source.is_empty() {
        return Err("no host path".to_owned());
    }
    // As with Docker, a relative path begins with a dot; another word is the name of a volume.
    if !source.starts_with(b".") {
        return Err("not supported: named volumes; a host path begins with / or ./".to_owned());
    }
    let here = std::env::current_dir().map_err(|error| format!("no current directory: {error}"))?;
    Ok(here.join(path))
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// In the container, absolute.
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
        let expected = |source: &str, destination: &str, read_only| Volume {
            source: source.into(),
            destination: destination.into(),
            read_only,
        };
        for (text, volume) in [
            ("/a:/b", expected("/a", "/b", false)),
            ("/a:/b:ro", expected("/a", "/b", true)),
            ("/a:/b/../c/./d:rw,z", expected("/a", "/c/d", false)),
        ] {
            assert_eq!(read(text), Ok(volume), "{text}");
        }
        assert!(read("./a:/b").unwrap().source.is_absolute());
        for (text, why) in [
            ("", "give HOST:CONTAINER"),
            ("/a", "without a host path"),
            ("a:/b", "named volumes"),
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
        assert_eq!(read.source.as_os_str().as_bytes(), b"/a\xff");
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
