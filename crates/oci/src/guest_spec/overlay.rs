//! Mounts of type `overlay`: their directories are the host's, so the host mounts them, and the
//! guest gets a share.

use std::path::PathBuf;

use hull_sandbox::config::{Share, Writers};
use hull_sandbox::error::Result;
use hull_sandbox::shares::{EngineOverlay, ReadOnly};
use serde_json::{Value, json};

use super::{HostShare, refused};

/// Options without a value that are the overlay's.
const FLAGS: [&str; 2] = ["volatile", "userxattr"];

/// Options with a value that are the overlay's, beside its directories.
const VALUES: [&str; 6] = [
    "index",
    "metacopy",
    "redirect_dir",
    "xino",
    "nfs_export",
    "uuid",
];

/// Plans such a mount, which becomes a bind mount of the share in the guest.
///
/// # Errors
/// `Unsupported` if it has no lower directory, a relative one, or an upper one without one for the
/// overlay's work.
pub(super) fn plan(name: String, mount: &mut Value) -> Result<HostShare> {
    let destination = mount["destination"].as_str().unwrap_or_default().to_owned();
    let wrong = |why: &str| refused(format_args!("mounts: {destination}: type \"overlay\""), why);
    let mut overlay = EngineOverlay::default();
    let (mut upper, mut work) = (None, None);
    let mut rest = vec!["bind".to_owned()];
    let options = mount["options"].as_array().into_iter().flatten();
    for option in options.filter_map(Value::as_str) {
        match option.split_once('=') {
            Some(("lowerdir", paths)) => overlay.lower = split(paths),
            Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
            Some(("workdir", path)) => work = Some(PathBuf::from(path)),
            Some((name, value)) if VALUES.contains(&name) => {
                overlay.values.push((name.into(), value.into()));
            }
            None if FLAGS.contains(&option) => overlay.flags.push(option.into()),
            _ => rest.push(option.into()),
        }
    }
    overlay.upper = match (upper, work) {
        (Some(upper), Some(work)) => Some((upper, work)),
        (None, None) => None,
        _ => return Err(wrong("it needs both upperdir and workdir, or none")),
    };
    let upper = overlay.upper.iter().flat_map(|(upper, work)| [upper, work]);
    if overlay.lower.is_empty()
        || overlay
            .lower
            .iter()
            .chain(upper)
            .any(|path| !path.is_absolute())
    {
        return Err(wrong("its directories need to be named, by absolute paths"));
    }
    let read_only = rest.iter().any(|option| option == "ro") || overlay.upper.is_none();
    let share = Share {
        name,
        is_file: false,
        writers: Writers::Anyone,
        sealed: false,
    };
    *mount = json!({
        "destination": destination, "type": "bind", "source": share.path(), "options": rest,
    });
    Ok(HostShare {
        share,
        source: PathBuf::new(),
        overlay: Some(overlay),
        recursive: false,
        read_only: if read_only {
            ReadOnly::Top
        } else {
            ReadOnly::No
        },
    })
}

/// The paths of `lowerdir`: separated by colons, unless a backslash is before one.
fn split(paths: &str) -> Vec<PathBuf> {
    let mut found = vec![String::new()];
    let mut characters = paths.chars();
    while let Some(character) = characters.next() {
        let last = found.last_mut();
        match (character, last) {
            (':', _) => found.push(String::new()),
            ('\\', Some(last)) => last.extend(characters.next()),
            (other, Some(last)) => last.push(other),
            // There is always one.
            (_, None) => {}
        }
    }
    found.retain(|path| !path.is_empty());
    found.into_iter().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mount(options: &[&str]) -> Value {
        json!({"destination": "/x", "type": "overlay", "source": "overlay", "options": options})
    }

    #[test]
    fn the_host_mounts_an_overlay_and_the_guest_a_share() {
        let mut mount = mount(&[
            r"lowerdir=/a\:b:/c",
            "upperdir=/u",
            "workdir=/w",
            "index=off",
            "volatile",
            "private",
            "nodev",
        ]);
        let share = plan("c-1".into(), &mut mount).unwrap();
        let overlay = share.overlay.unwrap();
        assert_eq!(overlay.lower, [PathBuf::from("/a:b"), PathBuf::from("/c")]);
        assert_eq!(overlay.upper.unwrap(), ("/u".into(), "/w".into()));
        assert_eq!(overlay.values, [("index".to_owned(), "off".to_owned())]);
        assert_eq!(overlay.flags, ["volatile"]);
        assert_eq!(share.read_only, ReadOnly::No);
        assert_eq!(mount["type"], "bind");
        assert_eq!(mount["options"], json!(["bind", "private", "nodev"]));
    }

    #[test]
    fn an_overlay_without_an_upper_directory_is_read_only() {
        let share = plan("c-1".into(), &mut mount(&["lowerdir=/a:/b"])).unwrap();
        assert_eq!(share.read_only, ReadOnly::Top);
        for options in [
            &["upperdir=/u"][..],
            &["lowerdir=a"],
            &["lowerdir=/a", "workdir=/w"],
        ] {
            plan("c-1".into(), &mut mount(options)).unwrap_err();
        }
    }
}
