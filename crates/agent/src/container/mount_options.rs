//! Parses the options of one mount in the spec.
//!
//! Pure. An option is either known here or passed to the file system; whether an unknown one is
//! allowed depends on the mount, so [`super::mounts`] decides that.

use libc::c_ulong;

use super::sys::{
    MOUNT_ATTR_ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_RELATIME, MOUNT_ATTR_STRICTATIME, MountAttributes,
};

const MS_NOSYMFOLLOW: c_ulong = 256;

/// Parsed options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// For `mount(2)` of a new file system.
    pub(super) flags: c_ulong,
    /// The same flags as attributes of this one mount: for bind mounts.
    pub(super) attributes: MountAttributes,
    /// Attributes of this mount and all below it (`rro`, …).
    pub(super) recursive: MountAttributes,
    /// MS_SHARED, MS_PRIVATE, …, with MS_REC, in order.
    pub(super) propagation: Vec<c_ulong>,
    /// Some(true) with `rbind`.
    pub(super) bind: Option<bool>,
    /// The tmpfs starts as a copy of the directory that it hides.
    pub(super) copy_up: bool,
    /// What is bound gets what is at the destination first.
    pub(super) fill: bool,
    /// For the file system, joined with commas.
    pub(super) data: String,
}

/// Meaning of an option.
enum Word {
    /// A mount flag, and whether the option sets it; its attribute, if it has one.
    Flag(c_ulong, bool, Option<(u64, bool)>),
    /// Access times: the mount flag, and the value of the attribute field.
    Times(c_ulong, u64),
    /// Clears that mode of access times.
    NoTimes(c_ulong),
}

fn word(option: &str) -> Option<Word> {
    use Word::{Flag, NoTimes, Times};
    Some(match option {
        "ro" => Flag(libc::MS_RDONLY, true, Some((MOUNT_ATTR_RDONLY, true))),
        "rw" => Flag(libc::MS_RDONLY, false, Some((MOUNT_ATTR_RDONLY, false))),
        "nosuid" => Flag(libc::MS_NOSUID, true, Some((MOUNT_ATTR_NOSUID, true))),
        "suid" => Flag(libc::MS_NOSUID, false, Some((MOUNT_ATTR_NOSUID, false))),
        "nodev" => Flag(libc::MS_NODEV, true, Some((MOUNT_ATTR_NODEV, true))),
        "dev" => Flag(libc::MS_NODEV, false, Some((MOUNT_ATTR_NODEV, false))),
        "noexec" => Flag(libc::MS_NOEXEC, true, Some((MOUNT_ATTR_NOEXEC, true))),
        "exec" => Flag(libc::MS_NOEXEC, false, Some((MOUNT_ATTR_NOEXEC, false))),
        "nodiratime" => Flag(
            libc::MS_NODIRATIME,
            true,
            Some((MOUNT_ATTR_NODIRATIME, true)),
        ),
        "diratime" => Flag(
            libc::MS_NODIRATIME,
            false,
            Some((MOUNT_ATTR_NODIRATIME, false)),
        ),
        "nosymfollow" => Flag(MS_NOSYMFOLLOW, true, Some((MOUNT_ATTR_NOSYMFOLLOW, true))),
        "symfollow" => Flag(MS_NOSYMFOLLOW, false, Some((MOUNT_ATTR_NOSYMFOLLOW, false))),
        "sync" => Flag(libc::MS_SYNCHRONOUS, true, None),
        "async" => Flag(libc::MS_SYNCHRONOUS, false, None),
        "dirsync" => Flag(libc::MS_DIRSYNC, true, None),
        "iversion" => Flag(libc::MS_I_VERSION, true, None),
        "noiversion" => Flag(libc::MS_I_VERSION, false, None),
        "lazytime" => Flag(libc::MS_LAZYTIME, true, None),
        "nolazytime" => Flag(libc::MS_LAZYTIME, false, None),
        "mand" => Flag(libc::MS_MANDLOCK, true, None),
        "nomand" => Flag(libc::MS_MANDLOCK, false, None),
        "silent" => Flag(libc::MS_SILENT, true, None),
        "loud" => Flag(libc::MS_SILENT, false, None),
        "relatime" => Times(libc::MS_RELATIME, MOUNT_ATTR_RELATIME),
        "noatime" => Times(libc::MS_NOATIME, MOUNT_ATTR_NOATIME),
        "strictatime" => Times(libc::MS_STRICTATIME, MOUNT_ATTR_STRICTATIME),
        "norelatime" => NoTimes(libc::MS_RELATIME),
        "atime" => NoTimes(libc::MS_NOATIME),
        "nostrictatime" => NoTimes(libc::MS_STRICTATIME),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<c_ulong> {
    let (name, recursive) = match option.strip_prefix('r') {
        Some(rest) => (rest, libc::MS_REC),
        None => (option, 0),
    };
    let flag = match name {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

impl MountAttributes {
    fn attribute(&mut self, attribute: u64, set: bool) {
        if set {
            self.set |= attribute;
            self.clear &= !attribute;
        } else {
            self.set &= !attribute;
            self.clear |= attribute;
        }
    }

    fn times(&mut self, value: u64) {
        self.set = self.set & !MOUNT_ATTR_ATIME | value;
        self.clear |= MOUNT_ATTR_ATIME;
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == MountAttributes::default()
    }
}

impl MountOptions {
    /// Parses options in order; later ones win.
    pub(super) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> MountOptions {
        let mut parsed = MountOptions::default();
        for option in options {
            parsed.option(option);
        }
        parsed
    }

    fn option(&mut self, option: &str) {
        if let Some(word) = word(option) {
            self.apply(word);
        } else if let Some(flags) = propagation(option) {
            self.propagation.push(flags);
        } else if let Some(word) = option
            .strip_prefix('r')
            .and_then(word)
            .filter(|word| word.has_attribute())
        {
            match word {
                Word::Flag(_, _, Some((attribute, set))) => {
                    self.recursive.attribute(attribute, set)
                }
                Word::Times(_, value) => self.recursive.times(value),
                Word::Flag(_, _, None) | Word::NoTimes(_) => {
                    self.recursive.times(MOUNT_ATTR_RELATIME)
                }
            }
        } else {
            match option {
                "bind" => self.bind = Some(self.bind.unwrap_or(false)),
                "rbind" => self.bind = Some(true),
                "tmpcopyup" => self.copy_up = true,
                // hull's own: a new volume.
                "hull.fill" => self.fill = true,
                "defaults" | "" => {}
                _ => {
                    if !self.data.is_empty() {
                        self.data.push(',');
                    }
                    self.data.push_str(option);
                }
            }
        }
    }

    fn apply(&mut self, word: Word) {
        const TIMES: c_ulong = libc::MS_RELATIME | libc::MS_NOATIME | libc::MS_STRICTATIME;
        match word {
            Word::Flag(flag, set, attribute) => {
                if set {
                    self.flags |= flag;
                } else {
                    self.flags &= !flag;
                }
                if let Some((attribute, set)) = attribute {
                    self.attributes.attribute(attribute, set);
                }
            }
            Word::Times(flag, value) => {
                self.flags = self.flags & !TIMES | flag;
                self.attributes.times(value);
            }
            Word::NoTimes(flag) => {
                self.flags &= !flag;
                self.attributes.times(MOUNT_ATTR_RELATIME);
            }
        }
    }

    /// Whether there are flags that a bind mount cannot have of its own, because they belong to the
    /// whole file system.
    pub(super) fn filesystem_wide(&self) -> bool {
        self.flags
            & (libc::MS_SYNCHRONOUS
                | libc::MS_DIRSYNC
                | libc::MS_I_VERSION
                | libc::MS_LAZYTIME
                | libc::MS_MANDLOCK)
            != 0
    }
}

impl Word {
    fn has_attribute(&self) -> bool {
        !matches!(self, Word::Flag(_, _, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> MountOptions {
        MountOptions::parse(options.split(','))
    }

    #[test]
    fn flags_and_data() {
        let options = parse("nosuid,strictatime,mode=755,size=65536k");
        assert_eq!(options.flags, libc::MS_NOSUID | libc::MS_STRICTATIME);
        assert_eq!(options.data, "mode=755,size=65536k");
        assert_eq!(options.bind, None);
    }

    #[test]
    fn the_last_word_wins() {
        assert_eq!(parse("ro,rw").flags, 0);
        assert_eq!(parse("rw,ro").flags, libc::MS_RDONLY);
        assert_eq!(parse("noatime,strictatime").flags, libc::MS_STRICTATIME);
        let attributes = parse("ro,nosuid,rw").attributes;
        assert_eq!(attributes.set, MOUNT_ATTR_NOSUID);
        assert_eq!(attributes.clear, MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn bind_words() {
        assert_eq!(parse("bind").bind, Some(false));
        assert_eq!(parse("rbind").bind, Some(true));
        assert_eq!(parse("rbind,bind").bind, Some(true));
        assert_eq!(parse("ro").bind, None);
    }

    #[test]
    fn access_times_are_one_field() {
        let attributes = parse("noatime,relatime").attributes;
        assert_eq!(
            (attributes.set, attributes.clear),
            (MOUNT_ATTR_RELATIME, MOUNT_ATTR_ATIME)
        );
        let attributes = parse("relatime,noatime").attributes;
        assert_eq!(
            (attributes.set, attributes.clear),
            (MOUNT_ATTR_NOATIME, MOUNT_ATTR_ATIME)
        );
    }

    #[test]
    fn recursive_attributes() {
        let options = parse("rbind,rro,rnosuid,rexec,rnoatime");
        assert_eq!(options.attributes, MountAttributes::default());
        assert_eq!(
            options.recursive.set,
            MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOATIME
        );
        assert_eq!(
            options.recursive.clear,
            MOUNT_ATTR_NOEXEC | MOUNT_ATTR_ATIME
        );
        assert_eq!(options.data, "");
    }

    #[test]
    fn relatime_is_not_recursive_elatime() {
        let options = parse("relatime");
        assert_eq!(options.flags, libc::MS_RELATIME);
        assert!(options.recursive.is_empty());
        assert_eq!(parse("rrelatime").recursive.clear, MOUNT_ATTR_ATIME);
    }

    #[test]
    fn propagation_words() {
        assert_eq!(
            parse("rslave,shared").propagation,
            [libc::MS_SLAVE | libc::MS_REC, libc::MS_SHARED]
        );
        assert_eq!(
            parse("rprivate,unbindable").propagation,
            [libc::MS_PRIVATE | libc::MS_REC, libc::MS_UNBINDABLE]
        );
    }

    #[test]
    fn unknown_words_are_data() {
        let options = parse("idmap,rsync,gid=5");
        assert_eq!(options.data, "idmap,rsync,gid=5");
    }
}
