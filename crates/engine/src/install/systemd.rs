//! Units of systemd: one that starts at boot what is to run then (containers with `--restart
//! always`, `unless-stopped`, `on-failure`), and two by which Docker's API is served when somebody
//! asks.

use std::path::{Path, PathBuf};

use super::{Change, missing_directories, read};
use crate::config::Config;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::values::Restart;

/// A unit.
struct Unit {
    /// Its file, relative to the root directory.
    path: &'static str,
    /// Its text, with hull's quoted path.
    text: fn(hull: &str) -> String,
    /// What follows hull's path in `ExecStart=`; `None` when it starts nothing.
    starts: Option<&'static str>,
}

/// All of them.
const UNITS: [Unit; 3] = [
    Unit {
        path: "etc/systemd/system/hull-containers.service",
        text: containers,
        starts: Some(" start --at-boot"),
    },
    Unit {
        path: "etc/systemd/system/hull-api.service",
        text: api,
        starts: Some(" api --time 300"),
    },
    Unit {
        path: "etc/systemd/system/hull-api.socket",
        text: socket,
        starts: None,
    },
];

const HEAD: &str =
    "# Written by \"hull install systemd\"; \"hull uninstall systemd\" takes it back.\n";

/// The executable, beside the runtime that engines call.
fn executable(runtime: &str) -> PathBuf {
    Path::new(runtime).with_file_name("hull")
}

/// A word of a unit's command line (systemd.service(5), "Command lines").
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let escaped = path.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", escaped.replace('%', "%%").replace('$', "$$"))
}

fn containers(hull: &str) -> String {
    format!(
        "{HEAD}
[Unit]
Description=Containers of hull that are to run
Documentation=man:hull-start(1)
Wants=network-online.target
After=network-online.target local-fs.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={hull} start --at-boot
ExecStop={hull} stop --all --until-boot
TimeoutStartSec=infinity
TimeoutStopSec=90

[Install]
WantedBy=multi-user.target
"
    )
}

/// Containers run on when it ends: it is not their parent.
fn api(hull: &str) -> String {
    format!(
        "{HEAD}
[Unit]
Description=Docker's API of hull
Documentation=man:hull-api(1)
Requires=hull-api.socket
After=hull-api.socket

[Service]
ExecStart={hull} api --time 300
KillMode=process
LimitNOFILE=65536
"
    )
}

fn socket(_: &str) -> String {
    format!(
        "{HEAD}
[Unit]
Description=Docker's API of hull
Documentation=man:hull-api(1)

[Socket]
ListenStream=/run/hull/api.sock
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"
    )
}

/// A unit for one container, which systemd starts, watches and stops: its output goes to the
/// journal, and its exit status is the unit's.
///
/// # Errors
/// The container is started again by hull, or removed when it ends.
pub fn container_unit(config: &Config, container: &Container) -> Result<String> {
    let details = &container.record.details;
    let name = &details.name;
    let options = details.options.as_deref();
    if options.is_some_and(|options| options.restart != Restart::No) {
        return Err(Error::invalid(format!(
            "container {name} has --restart: hull starts it again, and systemd would, too"
        ))
        .hint(format!("hull update --restart no {name}")));
    }
    if details.auto_remove {
        return Err(Error::invalid(format!(
            "container {name} is removed when it ends (--rm): there would be nothing to start"
        )));
    }
    let hull = quoted(&config.executable);
    let data = quoted(&config.data_dir);
    let asked = options.and_then(|options| options.stop_timeout);
    let patience = asked
        .unwrap_or(config.stop_timeout)
        .max(0)
        .saturating_add(30);
    Ok(format!(
        "# Written by \"hull generate systemd {name}\".

[Unit]
Description=Container {name} of hull
Documentation=man:hull-start(1)
Wants=network-online.target
After=network-online.target local-fs.target
RequiresMountsFor={data}

[Service]
ExecStart={hull} start --attach --sig-proxy=false {name}
ExecStop={hull} stop {name}
KillMode=process
Restart=on-failure
TimeoutStopSec={patience}

[Install]
WantedBy=multi-user.target
"
    ))
}

impl Unit {
    fn render(&self, executable: &Path) -> String {
        (self.text)(&quoted(executable))
    }

    /// Whether a text is as hull wrote it, whatever the path of its executable was.
    fn is_own(&self, text: &str) -> bool {
        let Some(starts) = self.starts else {
            return self.render(Path::new("")) == text;
        };
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix("ExecStart=\""));
        let word = line.and_then(|line| line.strip_suffix(starts)?.strip_suffix('"'));
        word.is_some_and(|word| {
            let plain = word.replace("$$", "$").replace("%%", "%");
            let path = plain.replace("\\\"", "\"").replace("\\\\", "\\");
            self.render(Path::new(&path)) == text
        })
    }

    fn own(&self, path: &Path) -> Result<Option<String>> {
        match read(path)? {
            Some(text) if !self.is_own(&text) => Err(Error::new(format!(
                "{} is not as hull wrote it: somebody has changed it",
                path.display()
            ))
            .hint("systemctl edit puts what is yours beside it; remove this file")),
            text => Ok(text),
        }
    }
}

/// The changes that add the units; none when they are there.
pub(super) fn install(root: &Path, runtime: &str) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for unit in UNITS {
        let path = root.join(unit.path);
        let before = unit.own(&path)?;
        let after = unit.render(&executable(runtime));
        if before.as_ref() != Some(&after) {
            changes.push(Change {
                directories: missing_directories(&path),
                path,
                before,
                after: Some(after),
            });
        }
    }
    Ok(changes)
}

/// The changes that remove them; none when they are not there.
pub(super) fn uninstall(root: &Path) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for unit in UNITS {
        let path = root.join(unit.path);
        if let Some(before) = unit.own(&path)? {
            changes.push(Change {
                path,
                before: Some(before),
                after: None,
                // systemd's own.
                directories: 0,
            });
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn units_are_understood_again_whatever_the_path_is() {
        for unit in UNITS {
            for path in ["/usr/bin/hull", "/opt/a b/hull", "/x/50%/$y/\"q\\/hull"] {
                assert!(unit.is_own(&unit.render(Path::new(path))), "{path}");
            }
            let changed = unit.render(Path::new("/usr/bin/hull")) + "X=y\n";
            assert!(!unit.is_own(&changed));
        }
    }

    #[test]
    fn units_are_added_once_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let runtime = "/usr/bin/hull-oci";
        assert_eq!(uninstall(root.path()).unwrap(), []);
        for change in install(root.path(), runtime).unwrap() {
            change.apply().unwrap();
        }
        assert_eq!(install(root.path(), runtime).unwrap(), []);
        let text = |unit: &Unit| std::fs::read_to_string(root.path().join(unit.path)).unwrap();
        assert!(text(&UNITS[0]).contains("ExecStart=\"/usr/bin/hull\" start --at-boot"));
        assert!(text(&UNITS[1]).contains("ExecStart=\"/usr/bin/hull\" api --time 300"));
        for change in uninstall(root.path()).unwrap() {
            change.apply().unwrap();
        }
        assert!(!root.path().join(UNITS[0].path).exists());
    }
}
