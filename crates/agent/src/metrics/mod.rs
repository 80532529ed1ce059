//! Metrics of a container's control group and of the guest. Called by `rpc::service`.
//!
//! Everything comes from files of the kernel, each opened and read once per call and parsed in one
//! pass. A file that cannot be read (a controller that this kernel lacks, a group that is just
//! going away) leaves its fields unset. Nothing here grows with what a container does: lists have
//! bounds, and a file that is longer than the buffer is cut at its last whole line.

mod files;
mod memory;
mod network;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use hull_protocol::agent::{
    CpuStats, HugetlbStats, IoDeviceStats, IoStats, MemoryStats, NetworkStats, PidsStats, Pressure,
    PressureLine, StatsResponse,
};
use protobuf::MessageField;
use rustix::fs::{CWD, Mode, OFlags};

use self::files::{Files, entries, number};

/// Most block devices of one group that are reported.
const MAX_IO_DEVICES: usize = 64;

/// Most sizes of huge pages that are reported.
const MAX_PAGE_SIZES: usize = 8;

/// All metrics of a container. `pid` is a process in its network namespace.
pub fn read(cgroup: &Path, pid: u32) -> StatsResponse {
    let mut files = Files::new();
    let mut stats = match open_directory(cgroup) {
        Some(directory) => read_group(&mut files, directory),
        None => StatsResponse::new(),
    };
    stats.network = files
        .read_all(CWD, &format!("/proc/{pid}/net/dev"))
        .map(network::parse)
        .unwrap_or_default();
    if let Some(meminfo) = files.read(CWD, "/proc/meminfo") {
        (stats.guest_memory_total, stats.guest_memory_available) = memory::guest(meminfo);
    }
    stats.time_ns = crate::time::now_ns();
    summarize(&mut stats);
    stats
}

fn read_group(files: &mut Files, directory: OwnedFd) -> StatsResponse {
    let group = directory.as_fd();
    let mut stats = StatsResponse::new();
    if let Some(text) = files.read(group, "cpu.stat") {
        let mut cpu = parse_cpu(text);
        cpu.pressure = files.read(group, "cpu.pressure").map(parse_pressure).into();
        stats.cpu = MessageField::some(cpu);
    }
    stats.memory = memory::read(files, group).into();
    if let Some(current) = files.read(group, "pids.current").and_then(number) {
        let mut pids = PidsStats::new();
        pids.current = current;
        pids.limit = files.read(group, "pids.max").and_then(number);
        stats.pids = MessageField::some(pids);
    }
    if let Some(text) = files.read(group, "io.stat") {
        let mut io = IoStats::new();
        io.devices = parse_io(text);
        io.pressure = files.read(group, "io.pressure").map(parse_pressure).into();
        stats.io = MessageField::some(io);
    }
    for size in huge_page_sizes() {
        // The controller is on for groups with a limit only.
        let Some(usage) = files
            .read(group, &format!("hugetlb.{size}.current"))
            .and_then(number)
        else {
            break;
        };
        let mut hugetlb = HugetlbStats::new();
        hugetlb.page_size = size.clone();
        hugetlb.usage = usage;
        hugetlb.limit = files
            .read(group, &format!("hugetlb.{size}.max"))
            .and_then(number);
        hugetlb.max_events = files
            .read(group, &format!("hugetlb.{size}.events"))
            .and_then(|text| entries(text).find_map(|(key, value)| (key == "max").then_some(value)))
            .unwrap_or(0);
        stats.hugetlb.push(hugetlb);
    }
    stats
}

fn open_directory(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

/// Fills the fields for older hosts.
fn summarize(stats: &mut StatsResponse) {
    let cpu: &CpuStats = &stats.cpu;
    stats.cpu_usage_us = cpu.usage_ns / 1000;
    stats.cpu_user_us = cpu.user_ns / 1000;
    stats.cpu_system_us = cpu.system_ns / 1000;
    stats.cpu_throttled_us = cpu.throttled_ns.unwrap_or(0) / 1000;
    let memory: &MemoryStats = &stats.memory;
    stats.memory_usage = memory.usage;
    stats.memory_limit = memory.limit.unwrap_or(0);
    stats.memory_inactive_file = memory.inactive_file;
    stats.memory_peak = memory.peak.unwrap_or(0);
    stats.oom_kills = memory.oom_kills;
    stats.pids_current = stats.pids.current;
    stats.pids_limit = stats.pids.limit.unwrap_or(0);
    let devices: &[IoDeviceStats] = &stats.io.devices;
    stats.io_read_bytes = sum(devices.iter().map(|device| device.read_bytes));
    stats.io_write_bytes = sum(devices.iter().map(|device| device.write_bytes));
    let interfaces: &[NetworkStats] = &stats.network;
    stats.network_receive_bytes = sum(interfaces.iter().map(|interface| interface.receive_bytes));
    stats.network_transmit_bytes = sum(interfaces.iter().map(|interface| interface.transmit_bytes));
}

fn sum(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn parse_cpu(text: &str) -> CpuStats {
    let mut cpu = CpuStats::new();
    for (key, value) in entries(text) {
        let ns = value.saturating_mul(1000);
        match key {
            "usage_usec" => cpu.usage_ns = ns,
            "user_usec" => cpu.user_ns = ns,
            "system_usec" => cpu.system_ns = ns,
            "nr_periods" => cpu.periods = Some(value),
            "nr_throttled" => cpu.throttled_periods = Some(value),
            "throttled_usec" => cpu.throttled_ns = Some(ns),
            _ => {}
        }
    }
    cpu
}

/// Lines `MAJOR:MINOR KEY=NUMBER …`. A device without a name, or without numbers, is left out.
fn parse_io(text: &str) -> Vec<IoDeviceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, fields) = line.split_once(' ')?;
            let (major, minor) = name.split_once(':')?;
            let mut device = IoDeviceStats::new();
            device.major = major.parse().ok()?;
            device.minor = minor.parse().ok()?;
            for field in fields.split_ascii_whitespace() {
                let (key, value) = field.split_once('=')?;
                let Ok(value) = value.parse() else { continue };
                match key {
                    "rbytes" => device.read_bytes = value,
                    "wbytes" => device.write_bytes = value,
                    "rios" => device.reads = value,
                    "wios" => device.writes = value,
                    _ => {}
                }
            }
            Some(device)
        })
        .take(MAX_IO_DEVICES)
        .collect()
}

/// Lines `some|full avg10=PERCENT avg60=PERCENT avg300=PERCENT total=MICROSECONDS`.
fn parse_pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next();
        let mut parsed = PressureLine::new();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => parsed.avg10 = hundredths(value),
                "avg60" => parsed.avg60 = hundredths(value),
                "avg300" => parsed.avg300 = hundredths(value),
                "total" => {
                    parsed.total_ns = value.parse::<u64>().unwrap_or(0).saturating_mul(1000);
                }
                _ => {}
            }
        }
        match kind {
            Some("some") => pressure.some = MessageField::some(parsed),
            Some("full") => pressure.full = MessageField::some(parsed),
            _ => {}
        }
    }
    pressure
}

/// A percentage that the kernel writes with two decimals.
fn hundredths(percent: &str) -> u32 {
    let (whole, decimals) = percent.split_once('.').unwrap_or((percent, "0"));
    let parse = |digits: &str| digits.parse::<u32>().unwrap_or(0);
    parse(whole)
        .saturating_mul(100)
        .saturating_add(parse(decimals).min(99))
}

/// The sizes of huge pages that the kernel has, as control groups name them.
fn huge_page_sizes() -> &'static [String] {
    static SIZES: OnceLock<Vec<String>> = OnceLock::new();
    SIZES.get_or_init(|| {
        std::fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .filter_map(|entry| page_size_name(entry.ok()?.file_name().to_str()?))
            .take(MAX_PAGE_SIZES)
            .collect()
    })
}

/// `hugepages-2048kB` is `2MB` to control groups (`mem_fmt` of mm/hugetlb_cgroup.c).
fn page_size_name(directory: &str) -> Option<String> {
    let kib: u64 = directory
        .strip_prefix("hugepages-")?
        .strip_suffix("kB")?
        .parse()
        .ok()?;
    Some(match kib {
        0x10_0000.. => format!("{}GB", kib >> 20),
        0x400.. => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    })
}

#[cfg(test)]
mod tests;
