//! systemd starts what is to run at boot: one unit for all containers that have such a policy
//! (`--restart always`, `unless-stopped`, `on-failure`).

use std::path::{Path, PathBuf};

use super::{Change, missing_directories, read};
use crate::error::{Error, Result};

/// The unit, relative to the root directory.
const PATH: &str = "etc/systemd/system/hull-containers.service";

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

fn render(executable: &Path) -> String {
    let hull = quoted(executable);
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

/// The executable that a unit starts, if the unit is as hull wrote it.
fn understand(text: &str) -> Option<PathBuf> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=\""))?;
    let word = line.strip_suffix("\" start --at-boot")?;
    let plain = word.replace("$$", "$").replace("%%", "%");
    let path = PathBuf::from(plain.replace("\\\"", "\"").replace("\\\\", "\\"));
    (render(&path) == text).then_some(path)
}

fn own(path: &Path) -> Result<Option<String>> {
    match read(path)? {
        Some(text) if understand(&text).is_none() => Err(Error::new(format!(
            "{} is not as hull wrote it: somebody has changed it",
            path.display()
        ))
        .hint("systemctl edit puts what is yours beside it; remove this file")),
        text => Ok(text),
    }
}

/// The change that adds the unit; `None` when it is there.
pub(super) fn install(root: &Path, runtime: &str) -> Result<Option<Change>> {
    let path = root.join(PATH);
    let before = own(&path)?;
    let after = render(&executable(runtime));
    if before.as_ref() == Some(&after) {
        return Ok(None);
    }
    Ok(Some(Change {
        directories: missing_directories(&path),
        path,
        before,
        after: Some(after),
    }))
}

/// The change that removes it; `None` when it is not there.
pub(super) fn uninstall(root: &Path) -> Result<Option<Change>> {
    let path = root.join(PATH);
    Ok(own(&path)?.map(|before| Change {
        path,
        before: Some(before),
        after: None,
        // systemd's own.
        directories: 0,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_unit_is_understood_again_whatever_the_path_is() {
        for path in ["/usr/bin/hull", "/opt/a b/hull", "/x/50%/$y/\"q\\/hull"] {
            assert_eq!(understand(&render(Path::new(path))), Some(path.into()));
        }
        let changed = render(Path::new("/usr/bin/hull")).replace("90", "10");
        assert_eq!(understand(&changed), None);
    }

    #[test]
    fn the_unit_is_added_once_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let runtime = "/usr/bin/hull-oci";
        assert_eq!(uninstall(root.path()).unwrap(), None);
        install(root.path(), runtime)
            .unwrap()
            .unwrap()
            .apply()
            .unwrap();
        assert_eq!(install(root.path(), runtime).unwrap(), None);
        let text = std::fs::read_to_string(root.path().join(PATH)).unwrap();
        assert!(
            text.contains("ExecStart=\"/usr/bin/hull\" start --at-boot"),
            "{text}"
        );
        uninstall(root.path()).unwrap().unwrap().apply().unwrap();
        assert!(!root.path().join(PATH).exists());
    }
}
