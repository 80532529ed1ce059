//! What keeps the content of a volume, in the words of the options that Docker's driver `local`
//! takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_sandbox::{rootless, shares};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::values;

/// What keeps the content of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A directory of hull's.
    Directory,
    /// A directory of the host: `type=none`, `o=bind`, `device=PATH`.
    Host(PathBuf),
    /// A file system of this size, bytes: `size=`, or `o=size=`. It is in a file beside the
    /// content, and mounted there from its first use on.
    Sized(u64),
}

impl Backing {
    /// Reads options.
    ///
    /// # Errors
    /// One is unknown, or they do not go together.
    pub fn parse(options: &BTreeMap<String, String>) -> std::result::Result<Self, String> {
        let (mut kind, mut device, mut size, mut bind) = ("", None, None, false);
        let read_size = |text: &str| {
            let size = values::size(text)?;
            shares::check_disk_size(size).map_err(|error| error.message)?;
            Ok::<_, String>(Some(size))
        };
        for (key, value) in options {
            match key.as_str() {
                "type" => kind = value,
                "device" => device = Some(PathBuf::from(value)),
                "size" => size = read_size(value)?,
                "o" => {
                    for option in value.split(',').filter(|option| !option.is_empty()) {
                        match option.split_once('=') {
                            None if matches!(option, "bind" | "rbind") => bind = true,
                            None if option == "rw" => {}
                            Some(("size", text)) => size = read_size(text)?,
                            _ => return Err(unsupported(&format!("o={option}"))),
                        }
                    }
                }
                _ => return Err(unsupported(key)),
            }
        }
        match (kind, device, bind, size) {
            ("", None, false, None) => Ok(Self::Directory),
            ("" | "ext4", None, false, Some(size)) => Ok(Self::Sized(size)),
            ("" | "none" | "bind", Some(device), true, None) => match device.is_absolute() {
                true => Ok(Self::Host(device)),
                false => Err(format!(
                    "volume option device={}: give an absolute path of the host",
                    device.display()
                )),
            },
            ("tmpfs", ..) => Err(
                "not supported: a volume of type tmpfs: --tmpfs gives a container memory of its \
                 own"
                .to_owned(),
            ),
            ("" | "none" | "bind", ..) => Err(
                "volume options do not go together: give size=, or type=none, o=bind and device="
                    .to_owned(),
            ),
            _ => Err(format!(
                "not supported: a volume of type {kind}: mount it on the host, and give the \
                 directory with type=none, o=bind and device="
            )),
        }
    }

    /// Makes the content available at its place.
    ///
    /// # Errors
    /// It cannot be mounted; the host has no such directory.
    pub(super) fn prepare(&self, name: &str, content: &Path) -> Result<()> {
        match self {
            Self::Directory => Ok(()),
            Self::Host(path) => {
                let doing = || format!("find {} of volume {name}", path.display());
                match std::fs::metadata(path).context(doing)?.is_dir() {
                    true => Ok(()),
                    false => Err(Error::invalid(format!(
                        "{} of volume {name} is no directory",
                        path.display()
                    ))),
                }
            }
            Self::Sized(_) if rootless::in_user_namespace() => Err(Error::with_kind(
                ErrorKind::Unsupported,
                format!("not supported without root: a size of volume {name}"),
            )),
            Self::Sized(size) => shares::mount_disk(&shares::Disk {
                file: image(content),
                place: content.to_owned(),
                size: *size,
            }),
        }
    }
}

/// The file that has the file system of a volume with a size.
pub(super) fn image(content: &Path) -> PathBuf {
    content.with_file_name("volume.img")
}

fn unsupported(option: &str) -> String {
    format!("not supported: volume option {option}: give size=, or type=none, o=bind and device=")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(options: &[(&str, &str)]) -> std::result::Result<Backing, String> {
        let options = options.iter().copied();
        Backing::parse(
            &options
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        )
    }

    #[test]
    fn options_say_what_keeps_a_volume() {
        assert_eq!(parse(&[]), Ok(Backing::Directory));
        assert_eq!(parse(&[("size", "1g")]), Ok(Backing::Sized(1 << 30)));
        assert_eq!(parse(&[("o", "size=64m")]), Ok(Backing::Sized(64 << 20)));
        let bind = [("type", "none"), ("o", "bind"), ("device", "/srv")];
        assert_eq!(parse(&bind), Ok(Backing::Host("/srv".into())));
        for (options, why) in [
            (&[("size", "1k")][..], "too small"),
            (&[("size", "big")], "big"),
            (&[("color", "red")], "color"),
            (&[("type", "tmpfs"), ("device", "tmpfs")], "--tmpfs"),
            (&[("type", "nfs"), ("device", ":/x")], "type nfs"),
            (&[("device", "/srv")], "do not go together"),
            (&[("o", "bind"), ("device", "srv")], "absolute"),
            (&[("o", "bind,uid=1"), ("device", "/srv")], "o=uid=1"),
        ] {
            let error = parse(options).unwrap_err();
            assert!(error.contains(why), "{options:?}: {error}");
        }
    }
}
