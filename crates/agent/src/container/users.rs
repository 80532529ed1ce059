//! Users by name: looks up `user[:group][+group…]` in the container's own /etc/passwd and
//! /etc/group.
//!
//! Called in the new process when its root already is the container's, so that links in those
//! files' paths cannot lead outside. The rules are Docker's: a number need not be in the files;
//! without a group the user's own group and all groups that list it apply; with one, only that one.
//! Further groups come on top. The group is always among the supplementary ones.

use std::os::fd::BorrowedFd;

use rustix::fs::{CWD, Mode, OFlags};

use super::sys;

/// Most bytes read of a file: a container's files are not trusted.
const MAX_FILE: usize = 4 << 20;

/// Largest user or group id: the last 32-bit value means "no change" to the kernel.
const MAX_ID: u32 = u32::MAX - 1;

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, when it has been looked up.
    pub home: Option<String>,
}

/// Looks up `user[:group][+group…]`. An error is one line of text.
pub fn find(text: &str) -> Result<User, String> {
    find_in(text, &read("/etc/passwd"), &read("/etc/group"))
}

/// The home directory of a user id; `/` when there is none.
pub fn home_of(uid: u32) -> String {
    home_in(uid, &read("/etc/passwd"))
}

fn home_in(uid: u32, passwd: &str) -> String {
    let uid = uid.to_string();
    entries(passwd, 7)
        .find(|fields| fields[2] == uid)
        .map_or_else(|| "/".into(), |fields| home(&fields))
}

/// A missing or unreadable file has no entries, as in an image without users. Whatever is there
/// must not block: a FIFO opens at once and reads as empty.
fn read(path: &str) -> String {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut text = Vec::new();
    if let Ok(file) = rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        // What was read before an error still counts.
        let _ = fill(sys::leak(file), &mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn fill(file: BorrowedFd<'_>, text: &mut Vec<u8>) -> rustix::io::Result<()> {
    let mut buffer = [0; 2048];
    while text.len() < MAX_FILE {
        let count = rustix::io::read(file, &mut buffer)?;
        text.extend(&buffer[..count]);
        // A short read is the end of the file: saves another call.
        if count < buffer.len() {
            break;
        }
    }
    Ok(())
}

fn entries(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(move |entry| entry.len() >= fields)
}

fn home(fields: &[&str]) -> String {
    match fields[5] {
        home if home.starts_with('/') => home.into(),
        _ => "/".into(),
    }
}

fn find_in(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let mut parts = text.split('+');
    let mut user = find_user(parts.next().unwrap_or_default(), passwd, group)?;
    // A process that changes its group keeps the rights of this one, also where those are fewer
    // than everybody's (CVE-2022-36109).
    user.groups.retain(|gid| *gid != user.gid);
    user.groups.insert(0, user.gid);
    for further in parts {
        let gid = find_group(further, group)?;
        if !user.groups.contains(&gid) {
            user.groups.push(gid);
        }
    }
    Ok(user)
}

fn find_group(wanted: &str, group: &str) -> Result<u32, String> {
    entries(group, 3)
        .find(|fields| fields[0] == wanted)
        .and_then(|fields| id(fields[2]))
        .or_else(|| id(wanted))
        .ok_or_else(|| format!("unable to find group {wanted}: no matching entries in group file"))
}

fn find_user(text: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user);
    let entry = entries(passwd, 7)
        .find(|fields| fields[0] == user)
        .or_else(|| entries(passwd, 7).find(|fields| number.is_some() && id(fields[2]) == number));
    let (uid, gid, home) = match (&entry, number) {
        (Some(fields), _) => {
            let uid =
                id(fields[2]).ok_or_else(|| format!("user {user:?} has no usable user id"))?;
            let gid =
                id(fields[3]).ok_or_else(|| format!("user {user:?} has no usable group id"))?;
            (uid, gid, home(fields))
        }
        (None, Some(uid)) => (uid, 0, "/".into()),
        (None, None) => {
            return Err(format!(
                "unable to find user {user}: no matching entries in passwd file"
            ));
        }
    };
    if let Some(wanted) = wanted_group {
        let gid = find_group(wanted, group)?;
        return Ok(User {
            uid,
            gid,
            groups: Vec::new(),
            home: Some(home),
        });
    }
    let name = entry.as_ref().map(|fields| fields[0]);
    let groups = entries(group, 4)
        .filter(|fields| fields[3].split(',').any(|member| Some(member) == name))
        .filter_map(|fields| id(fields[2]))
        .collect();
    Ok(User {
        uid,
        gid,
        groups,
        home: Some(home),
    })
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\nweb:x:33:34::/var/www:/bin/false\n7:x:70:70::/seven:\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:other,web\nvideo:x:44:web\nweb:x:34:\n";

    #[test]
    fn users_are_found_by_dockers_rules() {
        let cases: [(&str, u32, u32, &[u32], &str); 10] = [
            ("web", 33, 34, &[34, 50, 44], "/var/www"),
            ("33", 33, 34, &[34, 50, 44], "/var/www"),
            ("web:video", 33, 44, &[44], "/var/www"),
            ("web:99", 33, 99, &[99], "/var/www"),
            ("1000", 1000, 0, &[0], "/"),
            ("1000:1001", 1000, 1001, &[1001], "/"),
            ("", 0, 0, &[0], "/root"),
            ("7", 70, 70, &[70], "/seven"),
            ("web:web+video+7", 33, 34, &[34, 44, 7], "/var/www"),
            ("+staff", 0, 0, &[0, 50], "/root"),
        ];
        for (text, uid, gid, groups, home) in cases {
            let user = find_in(text, PASSWD, GROUP).unwrap();
            let expected = User {
                uid,
                gid,
                groups: groups.to_vec(),
                home: Some(home.into()),
            };
            assert_eq!(user, expected, "{text:?}");
        }
    }

    #[test]
    fn homes_are_absolute_or_the_root() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nbad:x:7:7::relative:\n";
        let homes = [0, 7, 5].map(|uid| home_in(uid, passwd));
        assert_eq!(homes, ["/root", "/", "/"]);
    }

    #[test]
    fn names_that_are_not_there_are_refused() {
        for text in ["nobody", "web:nogroup", "4294967295", "-1"] {
            assert!(find_in(text, PASSWD, GROUP).is_err(), "{text:?}");
        }
    }
}
