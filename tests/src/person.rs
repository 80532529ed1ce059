//! A user without root who runs hull: an entry among the host's users and subordinate id ranges, in
//! a private mount namespace for each command. The host's files are not changed.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::id;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::{executable, runtime};

/// What such a user may lack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lack {
    /// Nothing.
    #[default]
    Nothing,
    /// Subordinate ids.
    SubordinateIds,
    /// Permission to create taps.
    Taps,
    /// Pasta.
    Pasta,
}

/// A user without root.
pub struct Person {
    /// User and group id.
    pub uid: u32,
    /// The first of 65,536 subordinate ids.
    pub first_subordinate: u32,
    wrapper: PathBuf,
    executable: PathBuf,
}

impl Person {
    /// Creates a user and makes them the owner of `directory`.
    pub fn new(directory: &Path, lack: Lack) -> Person {
        runtime::needs(&["unshare", "setpriv", "newuidmap", "pasta"]);
        let uid = 200_000 + id() % 10_000;
        let first_subordinate = 0x4000_0000 + id() % 10_000 * 65_536;
        let file = |name: &str, text: String| {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            // Regardless of the umask: setuid programs read them.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            path.display().to_string()
        };
        let users = fs::read_to_string("/etc/passwd").unwrap();
        let users = file(
            "users",
            format!("{users}person:x:{uid}:{uid}::/nonexistent:/bin/sh\n"),
        );
        let ids = match lack {
            Lack::SubordinateIds => String::new(),
            _ => format!("person:{first_subordinate}:65536\n"),
        };
        let ids = file("subordinate-ids", ids);
        let tun = directory.join("tun");
        let mode = if lack == Lack::Taps { 0o600 } else { 0o666 };
        let number = makedev(10, 200);
        mknodat(CWD, &tun, FileType::CharacterDevice, Mode::empty(), number).unwrap();
        fs::set_permissions(&tun, fs::Permissions::from_mode(mode)).unwrap();
        let stage = executable().canonicalize().unwrap();
        let stage = stage.parent().and_then(Path::parent).unwrap();
        let own_stage = directory.join("stage");
        for directory in [&own_stage, &directory.join("home")] {
            fs::create_dir(directory).unwrap();
            chown(directory, Some(uid), Some(uid)).unwrap();
        }
        let without_pasta = match lack {
            Lack::Pasta => {
                let programs = directory.join("programs");
                fs::create_dir(&programs).unwrap();
                chown(&programs, Some(uid), Some(uid)).unwrap();
                for program in ["newuidmap", "newgidmap", "setpriv"] {
                    symlink(Path::new("/usr/bin").join(program), programs.join(program)).unwrap();
                }
                format!("PATH={}\n", programs.display())
            }
            _ => String::new(),
        };
        let (tun, stage, directory) = (tun.display(), stage.display(), directory.display());
        let wrapper = file(
            "as-person",
            format!(
                "set -e\nmount --bind {users} /etc/passwd\nfor file in subuid subgid; do\n\
                 [ -e /etc/$file ] || : >/etc/$file\nmount --bind {ids} /etc/$file\ndone\n\
                 mount --bind {tun} /dev/net/tun\nmount --bind {stage} {directory}/stage\n{without_pasta}\
                 cd {directory}/home\nunset XDG_RUNTIME_DIR XDG_DATA_HOME XDG_CONFIG_HOME\n\
                 [ -z \"${{RUNTIME-}}\" ] || export XDG_RUNTIME_DIR=$RUNTIME\n\
                 export HOME={directory}/home\n\
                 exec setpriv --reuid {uid} --regid {uid} --clear-groups -- \"$@\"\n"
            ),
        );
        chown(directory.to_string(), Some(uid), Some(uid)).unwrap();
        Person {
            uid,
            first_subordinate,
            wrapper: wrapper.into(),
            executable: own_stage.join("bin/hull"),
        }
    }

    /// Command prefix that runs a command as this user.
    pub fn wrapper(&self) -> Vec<&str> {
        let script = self.wrapper.to_str().expect("a path of the test's own");
        vec![
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            script,
        ]
    }

    /// The hull executable, where the user can access it.
    pub fn executable(&self) -> &Path {
        &self.executable
    }

    /// Whether a uid is this user's or one of its subordinate ids.
    pub fn owns(&self, uid: u32) -> bool {
        let subordinate = self.first_subordinate..self.first_subordinate + 65_536;
        uid == self.uid || subordinate.contains(&uid)
    }
}
