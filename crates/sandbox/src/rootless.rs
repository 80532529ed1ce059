//! hull without root: a user namespace in which the person who calls is root, with the subordinate
//! ids that the administrator gave (/etc/subuid, /etc/subgid) for everybody else. [`enter`] makes
//! one and puts the process in it; all further processes are started from there, and do what they
//! do with root's rights.
//!
//! Called by commands, first thing; what differs in a user namespace asks [`in_user_namespace`] and
//! [`top_id`]. Two commands of a person are in two namespaces with the same ids, so files and
//! processes of one are the other's.
#![allow(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

pub use hull_jail::in_user_namespace;
use rustix::process::{getegid, geteuid};
use rustix::thread::{
    Gid, Uid, UnshareFlags, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

use crate::error::{Context, Error, Result};

/// As many ids as images use: 0 to 65535.
const IDS: u32 = 1 << 16;

/// With fewer there is none to spare for a jailed process, and few images are usable.
const LEAST_IDS: u32 = 4096;

/// Waits until its standard input says something, and then maps ids of its parent. newuidmap and
/// newgidmap (package uidmap) may do that for subordinate ids, but only from outside of the
/// namespace.
const MAP_IDS: &str = r#"read -r go || exit; newuidmap $PPID $1 && exec newgidmap $PPID $2"#;

/// Makes this process root of a user namespace of its own. Call it before there are threads.
///
/// # Errors
/// The person has no subordinate ids, or the host allows no such namespace.
pub fn enter() -> Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let name = user_name(uid);
    let uids = map(uid, "/etc/subuid", &name, uid)?;
    let gids = map(gid, "/etc/subgid", &name, uid)?;
    let doing = || "start the mapping of ids".to_owned();
    let mut helper = Command::new("/bin/sh")
        .args(["-c", MAP_IDS, "sh", &uids, &gids])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context(doing)?;
    // SAFETY: only UnshareFlags::FILES would be unsound.
    let entered = unsafe { unshare_unsafe(UnshareFlags::NEWUSER) };
    if let Some(mut go) = helper.stdin.take()
        && entered.is_ok()
    {
        go.write_all(b"go\n").context(doing)?;
    }
    let mut said = String::new();
    if let Some(stderr) = &mut helper.stderr {
        stderr.read_to_string(&mut said).context(doing)?;
    }
    let mapped = helper.wait().context(doing)?;
    entered.map_err(|error| {
        Error::new(format!("cannot make a user namespace: {error}"))
            .hint("the administrator can allow it: sysctl user.max_user_namespaces=10000")
    })?;
    if !mapped.success() {
        let why = said.lines().last().unwrap_or("it failed").trim().to_owned();
        let failure = Error::new(format!("cannot map subordinate ids: {why}"));
        return Err(match said.contains("not found") {
            true => failure.hint("apt-get install uidmap"),
            false => failure,
        });
    }
    let root = || "become root of the user namespace".to_owned();
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context(root)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context(root)
}

/// In a user namespace: gives this thread a mount namespace that belongs to it, so that it may
/// mount. The path of this process's own executable may not be known from then on.
///
/// # Errors
/// The host allows no such namespace.
pub fn enter_mounts() -> Result<()> {
    if !in_user_namespace() {
        return Ok(());
    }
    // SAFETY: only UnshareFlags::FILES would be unsound.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context(|| "create a mount namespace")
}

/// A map of ids for newuidmap: the person is root, and the subordinate ids of a file are the next
/// ones.
fn map(own: u32, file: &str, name: &str, uid: u32) -> Result<String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut map = format!("0 {own} 1");
    let mut next = 1;
    for (first, count) in ranges(&text, name, uid) {
        let count = count.min(IDS - next);
        if count > 0 {
            map.push_str(&format!(" {next} {first} {count}"));
            next += count;
        }
    }
    if next >= LEAST_IDS {
        return Ok(map);
    }
    let has = match next - 1 {
        0 => "no".to_owned(),
        few => format!("only {few}"),
    };
    Err(Error::new(format!(
        "permission denied: {name} is not root and has {has} subordinate ids in {file}"
    ))
    .hint(format!(
        "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}, or sudo hull …"
    )))
}

/// The ranges of ids that a file (subuid(5)) gives to a person: first id and number.
fn ranges(text: &str, name: &str, uid: u32) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let is_own = owner == name || owner.parse() == Ok(uid);
        is_own.then_some((first, count))
    };
    text.lines().filter_map(range).collect()
}

/// The person's name: from the file of users, and where it is not in there, from the environment.
fn user_name(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(uid)).then(|| name.to_owned())
    });
    found
        .or_else(|| std::env::var("USER").ok())
        .unwrap_or_else(|| uid.to_string())
}

/// The ids of this process's user namespace, of users or groups: the first one in it, and how many,
/// for each range.
fn own_ids(map: &str) -> Vec<(u32, u32)> {
    let map = fs::read_to_string(Path::new("/proc/self").join(map)).unwrap_or_default();
    parse_own_ids(&map)
}

fn parse_own_ids(map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?))
    };
    map.lines().filter_map(range).collect()
}

/// The highest id that there is here, of users and of groups.
pub fn top_id() -> u32 {
    let top = |map| {
        let last = own_ids(map).into_iter().max();
        last.map_or(0, |(first, count)| {
            first.saturating_add(count.saturating_sub(1))
        })
    };
    top("uid_map").min(top("gid_map"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_by_number() {
        let text = "ann:100000:65536\nbob:165536:65536\n1000:300000:10\nann:broken\n";
        assert_eq!(ranges(text, "ann", 1000), [(100_000, 65536), (300_000, 10)]);
        assert_eq!(ranges(text, "carl", 7), []);
    }

    #[test]
    fn ids_of_a_namespace() {
        let all = parse_own_ids("         0          0 4294967295\n");
        assert_eq!(all, [(0, u32::MAX)]);
        let some =
            parse_own_ids("         0       1001          1\n         1     100000      65535\n");
        assert_eq!(some, [(0, 1), (1, 65535)]);
    }

    #[test]
    fn who_has_no_subordinate_ids_is_told_what_to_do() {
        let failure = map(7, "/dev/null", "ann", 7).unwrap_err();
        assert!(failure.message.contains("ann is not root"), "{failure}");
        assert!(failure.hint.unwrap().contains("--add-subuids"));
    }
}
