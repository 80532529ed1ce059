//! Numbers of a container's control group and of the guest. Called by `service`.
//!
//! Every number comes from a file of the kernel; one that cannot be read (a controller that this kernel lacks, a
//! group that is just going away) counts as 0.

use std::fs;
use std::path::Path;

use hull_protocol::agent::StatsResponse;
use rustix::fs::{Mode, OFlags};

/// All numbers of a container. `pid` is a process in its network namespace.
pub fn read(cgroup: &Path, pid: u32) -> StatsResponse {
    let file = |name: &str| small_file(&cgroup.join(name));
    let guest = |path: &str| fs::read_to_string(path).unwrap_or_default();

    let cpu = file("cpu.stat");
    let io = file("io.stat");
    let meminfo = guest("/proc/meminfo");
    let (network_receive_bytes, network_transmit_bytes) =
        network(&guest(&format!("/proc/{pid}/net/dev")));
    StatsResponse {
        cpu_usage_us: keyed(&cpu, "usage_usec"),
        cpu_user_us: keyed(&cpu, "user_usec"),
        cpu_system_us: keyed(&cpu, "system_usec"),
        cpu_throttled_us: keyed(&cpu, "throttled_usec"),
        memory_usage: number(&file("memory.current")),
        memory_limit: number(&file("memory.max")),
        memory_inactive_file: keyed(&file("memory.stat"), "inactive_file"),
        memory_peak: number(&file("memory.peak")),
        oom_kills: oom_kills(cgroup),
        pids_current: number(&file("pids.current")),
        pids_limit: number(&file("pids.max")),
        io_read_bytes: nested(&io, "rbytes"),
        io_write_bytes: nested(&io, "wbytes"),
        network_receive_bytes,
        network_transmit_bytes,
        guest_memory_total: keyed(&meminfo, "MemTotal:") * 1024,
        guest_memory_available: keyed(&meminfo, "MemAvailable:") * 1024,
        ..Default::default()
    }
}

/// How many processes of the group, or of one below it, the kernel has killed for lack of memory.
pub fn oom_kills(cgroup: &Path) -> u64 {
    keyed(&small_file(&cgroup.join("memory.events")), "oom_kill")
}

/// A file of a control group, read in one piece: what is longer is cut. Answers of Wait pass here.
fn small_file(path: &Path) -> String {
    let mut buffer = [0; 8192];
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(file, &mut buffer))
        .map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned())
        .unwrap_or_default()
}

/// A file with one number. `max` means none.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A line `KEY NUMBER…`.
fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == key).then(|| words.next()?.parse().ok())?
        })
        .unwrap_or(0)
}

/// The sum over lines `DEVICE KEY=NUMBER …`.
fn nested(text: &str, key: &str) -> u64 {
    text.split_ascii_whitespace()
        .filter_map(|word| {
            word.strip_prefix(key)?
                .strip_prefix('=')?
                .parse::<u64>()
                .ok()
        })
        .fold(0, u64::saturating_add)
}

/// Received and sent bytes of all interfaces but the loopback one.
fn network(text: &str) -> (u64, u64) {
    let mut sums = (0u64, 0u64);
    for line in text.lines() {
        let Some((name, numbers)) = line.split_once(':') else {
            continue;
        };
        if name.trim() == "lo" {
            continue;
        }
        let mut numbers = numbers
            .split_ascii_whitespace()
            .map(|word| word.parse::<u64>().unwrap_or(0));
        sums.0 = sums.0.saturating_add(numbers.next().unwrap_or(0));
        sums.1 = sums.1.saturating_add(numbers.nth(7).unwrap_or(0));
    }
    sums
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_are_found_in_the_kernel_s_formats() {
        assert_eq!(number("4096\n"), 4096);
        assert_eq!(number("max\n"), 0);
        assert_eq!(keyed("usage_usec 12\nuser_usec 7\n", "user_usec"), 7);
        assert_eq!(keyed("oom 3\noom_kill 2\n", "oom_kill"), 2);
        assert_eq!(keyed("MemTotal:        2048 kB\n", "MemTotal:"), 2048);
        assert_eq!(keyed("", "x"), 0);
        assert_eq!(
            nested(
                "254:0 rbytes=10 wbytes=1\n254:16 rbytes=5 wbytes=2 rios=9\n",
                "rbytes"
            ),
            15
        );
    }

    #[test]
    fn traffic_is_counted_without_the_loopback_interface() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n    \
                    lo:     100       1    0    0    0     0          0         0      100       1    0\n  \
                    eth0:    1000      10    0    0    0     0          0         0     2000      20    0\n";
        assert_eq!(network(text), (1000, 2000));
    }

    #[test]
    fn a_group_without_files_has_no_numbers() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(read(empty.path(), 0).memory_usage, 0);
        assert_eq!(oom_kills(empty.path()), 0);
    }
}
