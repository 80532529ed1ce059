//! `--mount`: volumes, directories of the host and file systems in memory in one notation.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, PathBuf};

use super::{Backing, Source, Tmpfs, Volume, container_path, host_path, tmpfs, volume_name};
use crate::values;

/// What one `--mount` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mount {
    /// `type=volume` or `type=bind`.
    Volume(Volume),
    /// `type=tmpfs`.
    Tmpfs(Tmpfs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Bind,
    Volume,
    Tmpfs,
}

/// Reads `type=volume|bind|tmpfs,source=…,target=…[,…]`.
pub fn mount(text: &OsStr) -> Result<Mount, String> {
    let wrong = |why: String| format!("invalid mount {text:?}: {why}");
    let fields = text.as_bytes().split(|byte| *byte == b',');
    let fields = fields.map(|field| {
        let mut parts = field.splitn(2, |byte| *byte == b'=');
        let key = parts.next().unwrap_or_default();
        (String::from_utf8_lossy(key).into_owned(), parts.next())
    });
    let fields: Vec<(String, Option<&[u8]>)> = fields.collect();
    let kind = match fields.iter().rev().find(|(key, _)| key == "type") {
        None => Type::Volume,
        Some((_, Some(b"bind"))) => Type::Bind,
        Some((_, Some(b"volume"))) => Type::Volume,
        Some((_, Some(b"tmpfs"))) => Type::Tmpfs,
        Some((_, other)) => {
            let other = String::from_utf8_lossy(other.unwrap_or_default());
            return Err(wrong(format!(
                "{other:?} is none of the types volume, bind, tmpfs"
            )));
        }
    };
    let mut read = Fields::default();
    for (key, value) in &fields {
        read.field(kind, key, *value).map_err(wrong)?;
    }
    read.finish(kind).map_err(wrong)
}

#[derive(Default)]
struct Fields<'t> {
    source: Option<&'t [u8]>,
    destination: Option<PathBuf>,
    read_only: bool,
    no_copy: bool,
    subpath: Option<PathBuf>,
    options: BTreeMap<String, String>,
    tmpfs: Vec<String>,
}

impl<'t> Fields<'t> {
    fn field(&mut self, kind: Type, key: &str, value: Option<&'t [u8]>) -> Result<(), String> {
        let needed = || value.ok_or_else(|| format!("{key} needs a value: {key}=…"));
        let text = || Ok::<_, String>(String::from_utf8_lossy(needed()?).into_owned());
        match (key, kind) {
            ("type", _) => {}
            ("source" | "src", Type::Bind | Type::Volume) => self.source = Some(needed()?),
            ("target" | "destination" | "dst", _) => {
                self.destination = Some(container_path(needed()?)?);
            }
            ("readonly" | "ro", _) => self.read_only = flag(key, value)?,
            ("volume-nocopy", Type::Volume) => self.no_copy = flag(key, value)?,
            ("volume-subpath", Type::Volume) => self.subpath = Some(subpath(needed()?)?),
            ("volume-driver", Type::Volume) if text()? == "local" => {}
            ("volume-driver", Type::Volume) => {
                return Err(format!("not supported: {key}: volumes are directories"));
            }
            ("volume-opt", Type::Volume) => {
                let text = text()?;
                let (option, value) = text.split_once('=').unwrap_or((&text, ""));
                self.options.insert(option.to_owned(), value.to_owned());
            }
            ("volume-label", Type::Volume) => {
                return Err(format!("not supported: {key}: hull volume create --label"));
            }
            ("bind-propagation", Type::Bind) => match &text()?[..] {
                "private" | "rprivate" => {}
                _ => {
                    return Err(
                        "not supported: mounts do not propagate into another kernel".to_owned()
                    );
                }
            },
            ("consistency" | "bind-recursive", _) => {}
            ("tmpfs-size", Type::Tmpfs) => {
                let size = values::size(&text()?)?;
                self.tmpfs.push(format!("size={size}"));
            }
            ("tmpfs-mode", Type::Tmpfs) => {
                let mode = text()?;
                if u32::from_str_radix(&mode, 8).is_err() {
                    return Err(format!("tmpfs-mode {mode:?} is no octal number"));
                }
                self.tmpfs.push(format!("mode={mode}"));
            }
            _ => return Err(format!("unknown field {key:?}")),
        }
        Ok(())
    }

    fn finish(self, kind: Type) -> Result<Mount, String> {
        let destination = self
            .destination
            .ok_or("no target: give target=/PATH in the container")?;
        let source = match (kind, self.source) {
            (Type::Tmpfs, _) => {
                let mut options = self.tmpfs;
                if self.read_only {
                    options.push("ro".to_owned());
                }
                // One notation decides what can be asked for.
                let checked = tmpfs(&format!("/x:{}", options.join(",")))?;
                return Ok(Mount::Tmpfs(Tmpfs {
                    destination,
                    ..checked
                }));
            }
            (Type::Bind, None) => return Err("no source: give source=/PATH of the host".to_owned()),
            (Type::Bind, Some(path)) => Source::Host(host_path(path)?),
            (Type::Volume, None | Some(b"")) => Source::Anonymous,
            (Type::Volume, Some(name)) => {
                Source::Named(volume_name(&String::from_utf8_lossy(name))?)
            }
        };
        Backing::parse(&self.options)?;
        if !self.options.is_empty() && !matches!(source, Source::Named(_)) {
            return Err("volume-opt is for a volume with a name: give source=NAME".to_owned());
        }
        Ok(Mount::Volume(Volume {
            source,
            destination,
            read_only: self.read_only,
            no_copy: self.no_copy,
            subpath: self.subpath,
            options: self.options,
        }))
    }
}

fn flag(key: &str, value: Option<&[u8]>) -> Result<bool, String> {
    match value {
        None | Some(b"true" | b"1") => Ok(true),
        Some(b"false" | b"0") => Ok(false),
        Some(other) => Err(format!(
            "{key} is true or false, not {:?}",
            String::from_utf8_lossy(other)
        )),
    }
}

/// A path below a volume.
fn subpath(text: &[u8]) -> Result<PathBuf, String> {
    let path = PathBuf::from(OsStr::from_bytes(text));
    let below = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    match below && !text.is_empty() {
        true => Ok(path),
        false => Err(format!(
            "volume-subpath {:?} is no path below the volume",
            path.display().to_string()
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(text: &str) -> Result<Mount, String> {
        mount(OsStr::new(text))
    }

    fn as_volume(text: &str) -> Volume {
        match read(text).unwrap() {
            Mount::Volume(volume) => volume,
            Mount::Tmpfs(tmpfs) => panic!("{text}: {tmpfs:?}"),
        }
    }

    #[test]
    fn all_types_in_dockers_notation() {
        let volume = as_volume("type=volume,source=db,target=/data,readonly,volume-nocopy=true");
        assert_eq!(volume.source, Source::Named("db".into()));
        assert_eq!(volume.destination, PathBuf::from("/data"));
        assert!(volume.read_only && volume.no_copy);
        assert_eq!(as_volume("dst=/data").source, Source::Anonymous);
        let bind = as_volume("type=bind,src=/etc,dst=/x,ro=false");
        assert_eq!(bind.source, Source::Host("/etc".into()));
        assert!(!bind.read_only);
        let below = as_volume("src=db,dst=/x,volume-subpath=a/b");
        assert_eq!(below.subpath, Some("a/b".into()));
        let Mount::Tmpfs(memory) = read("type=tmpfs,dst=/x,tmpfs-size=1m,tmpfs-mode=1777").unwrap()
        else {
            panic!("not in memory")
        };
        assert_eq!(memory.options, ["size=1048576", "mode=1777"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, why) in [
            ("type=npipe,dst=/x", "\"npipe\" is none of the types"),
            ("type=bind,dst=/x", "no source"),
            ("src=db", "no target"),
            ("src=db,dst=x", "must be absolute"),
            ("src=d/b,dst=/x", "invalid volume name \"d/b\""),
            ("src=db,dst=/x,size=1", "unknown field \"size\""),
            ("src=db,dst=/x,tmpfs-size=1", "unknown field \"tmpfs-size\""),
            ("src=db,dst=/x,ro=maybe", "ro is true or false"),
            ("src=db,dst=/x,volume-subpath=../y", "no path below"),
            ("src=db,dst=/x,volume-opt=color=red", "volume option color"),
            ("dst=/x,volume-opt=size=1g", "a volume with a name"),
            (
                "type=bind,src=/a,dst=/x,bind-propagation=shared",
                "do not propagate",
            ),
            ("type=tmpfs,dst=/x,tmpfs-mode=9", "no octal number"),
            ("dst", "dst needs a value"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
