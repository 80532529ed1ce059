//! The processes of a container, from its control group and /proc. Called by `service`.

use std::fs;
use std::io;
use std::path::Path;

use hull_protocol::agent::{ProcessInfo, ProcessesResponse};

use crate::rpc::status::{Failure, Result};

/// Lists the processes of a control group and of those below it. One that ends meanwhile is left
/// out.
pub fn list(cgroup: &Path) -> Result<ProcessesResponse> {
    let mut pids = Vec::new();
    collect(cgroup, &mut pids).map_err(|error| Failure::internal("list processes", &error))?;
    pids.sort_unstable();
    let boot = boot_time();
    let processes = pids
        .into_iter()
        .filter_map(|pid| describe(Path::new("/proc"), pid, boot))
        .collect();
    Ok(ProcessesResponse {
        processes,
        ..Default::default()
    })
}

fn collect(group: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let listed = match fs::read_to_string(group.join("cgroup.procs")) {
        Ok(listed) => listed,
        // The group is gone, or is a threaded one: its processes are listed above.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
            ) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    pids.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(group)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// Unix time at which the guest booted, in seconds.
fn boot_time() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
        .unwrap_or(0)
}

fn describe(proc: &Path, pid: u32, boot: u64) -> Option<ProcessInfo> {
    let directory = proc.join(pid.to_string());
    let stat = Stat::parse(&fs::read_to_string(directory.join("stat")).ok()?)?;
    let status = fs::read_to_string(directory.join("status")).ok()?;
    let arguments = fs::read(directory.join("cmdline")).unwrap_or_default();
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    Some(ProcessInfo {
        pid,
        // From the root namespace inwards; the second one is that of the container, if it has its
        // own.
        container_pid: word(&status, "NSpid:", 1).unwrap_or(pid),
        parent_pid: stat.parent,
        // Real, effective, saved, file system.
        uid: word(&status, "Uid:", 1).unwrap_or(0),
        gid: word(&status, "Gid:", 1).unwrap_or(0),
        state: stat.state.to_string(),
        cpu_time_us: stat.cpu_ticks.saturating_mul(1_000_000) / ticks,
        resident_bytes: stat
            .resident_pages
            .saturating_mul(rustix::param::page_size() as u64),
        started_at: boot + stat.started_ticks / ticks,
        terminal: stat.terminal(),
        command: command(&arguments, &stat.name),
        virtual_bytes: stat.virtual_bytes,
        name: stat.name,
        ..Default::default()
    })
}

/// The number at a place of the line that begins with `key`, or the last one when the line is
/// shorter.
fn word(status: &str, key: &str, place: usize) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    words
        .get(place.min(words.len().checked_sub(1)?))?
        .parse()
        .ok()
}

fn command(arguments: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(arguments);
    let text = text.trim_end_matches('\0');
    if text.is_empty() {
        format!("[{name}]")
    } else {
        text.replace('\0', " ")
    }
}

/// Fields of /proc/PID/stat, see proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    parent: u32,
    terminal: u32,
    cpu_ticks: u64,
    started_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name is up to the process, parentheses and spaces included: it ends at the last one.
        let (_, rest) = text.split_once('(')?;
        let (name, rest) = rest.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The first field after the name is number 3 of the manual page.
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            name: name.to_owned(),
            state: field(3)?.chars().next()?,
            parent: field(4)?.parse().ok()?,
            terminal: field(7)?.parse::<i64>().ok()? as u32,
            cpu_ticks: field(14)?
                .parse::<u64>()
                .ok()?
                .saturating_add(field(15)?.parse().ok()?),
            started_ticks: field(22)?.parse().ok()?,
            virtual_bytes: field(23)?.parse().ok()?,
            resident_pages: field(24)?.parse().ok()?,
        })
    }

    /// Name of the controlling terminal, empty without one. Those of containers are all
    /// pseudo-terminals.
    fn terminal(&self) -> String {
        let major = (self.terminal >> 8) & 0xfff;
        let minor = (self.terminal & 0xff) | ((self.terminal >> 12) & 0xfff00);
        match (self.terminal, major) {
            (0, _) => String::new(),
            (_, 136..=143) => format!("pts/{}", (major - 136) * 256 + minor),
            _ => format!("{major}:{minor}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name_is() {
        let text =
            "42 (a ) R (b) S 1 42 42 34816 42 4194304 89 0 0 0 3 4 0 0 20 0 1 0 250 1000 7 184";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.name, "a ) R (b");
        assert_eq!((stat.state, stat.parent, stat.cpu_ticks), ('S', 1, 7));
        assert_eq!((stat.started_ticks, stat.resident_pages), (250, 7));
        assert_eq!(stat.virtual_bytes, 1000);
        assert_eq!(stat.terminal(), "pts/0");
        assert_eq!(Stat::parse("42 (x"), None);
        assert_eq!(Stat::parse("42 (x) S 1"), None);
    }

    #[test]
    fn the_second_pid_is_the_container_s() {
        let status = "Name:\tsh\nUid:\t1\t2\t3\t4\nNSpid:\t42\t1\n";
        assert_eq!(word(status, "NSpid:", 1), Some(1));
        assert_eq!(word(status, "Uid:", 1), Some(2));
        assert_eq!(word(status, "Gid:", 1), None);
    }

    #[test]
    fn a_command_is_its_arguments_or_its_name() {
        assert_eq!(command(b"sh\0-c\0a b\0", "sh"), "sh -c a b");
        assert_eq!(command(b"", "kworker"), "[kworker]");
    }

    #[test]
    fn this_process_can_be_described() {
        let me = describe(Path::new("/proc"), std::process::id(), boot_time()).unwrap();
        assert_eq!(me.pid, std::process::id());
        assert!(me.resident_bytes > 0 && me.started_at > 1_000_000_000);
    }
}
