//! Translates the limits of a specification to cgroup files and their contents.
//!
//! Pure functions. The specification uses cgroup v1 terms; values for v2 are converted as runc
//! does.

use crate::error::{Error, Result};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use serde::{Deserialize, Serialize};

/// One limit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The field of the specification, for errors.
    pub(super) field: &'static str,
    /// The controller's name in v1 and in v2, for errors.
    pub(super) controllers: [&'static str; 2],
    /// Files and their contents; the first file that exists is written.
    pub(super) ways: Vec<(&'static str, String)>,
    /// Not an error if no file exists.
    pub(super) optional: bool,
}

impl Setting {
    pub(super) fn is_memory(&self) -> bool {
        self.controllers == MEMORY
    }
}

/// The most that a machine may take of its host, whatever its guest does. Each is set where the
/// host has a controller for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bounds {
    /// Memory of all its processes, and page cache of files that they read, bytes.
    pub memory: Option<u64>,
    /// What of that, or beside it, may be in swap, bytes; as much as `memory` if absent.
    pub swap: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Processors at once.
    pub cpus: Option<u32>,
    /// Which ones; any when empty.
    pub host_cpus: Vec<u32>,
}

const MEMORY: [&str; 2] = ["memory", "memory"];
const CPU: [&str; 2] = ["cpu", "cpu"];
const CPUSET: [&str; 2] = ["cpuset", "cpuset"];
const BLOCK_IO: [&str; 2] = ["blkio", "io"];
const PIDS: [&str; 2] = ["pids", "pids"];

/// The kernel's default period of CPU quotas (kernel/sched/fair.c), microseconds.
const PERIOD: u64 = 100_000;

/// The limits that keep a machine within bounds.
pub(super) fn bounds(bounds: &Bounds) -> Vec<Setting> {
    let mut list = List(Vec::new());
    if let Some(memory) = bounds.memory {
        let swap = bounds.swap.unwrap_or(memory);
        list.add(
            "the machine's memory",
            MEMORY,
            [
                ("memory.limit_in_bytes", memory.to_string()),
                ("memory.max", memory.to_string()),
            ],
        );
        list.add(
            "the machine's swap",
            MEMORY,
            [
                (
                    "memory.memsw.limit_in_bytes",
                    memory.saturating_add(swap).to_string(),
                ),
                ("memory.swap.max", swap.to_string()),
            ],
        );
    }
    if let Some(processes) = bounds.processes {
        list.add(
            "the machine's processes",
            PIDS,
            [("pids.max", processes.to_string())],
        );
    }
    if let Some(cpus) = bounds.cpus {
        let quota = u64::from(cpus) * PERIOD;
        list.add(
            "the machine's processors",
            CPU,
            [
                ("cpu.cfs_quota_us", quota.to_string()),
                ("cpu.max", format!("{quota} {PERIOD}")),
            ],
        );
    }
    if !bounds.host_cpus.is_empty() {
        let cpus: Vec<_> = bounds.host_cpus.iter().map(u32::to_string).collect();
        list.add(
            "the machine's choice of processors",
            CPUSET,
            [("cpuset.cpus", cpus.join(","))],
        );
    }
    for setting in &mut list.0 {
        setting.optional = true;
    }
    list.0
}

/// All limits that apply on the host. Callers pass 0 for "not given". `overhead`: bytes, added to
/// memory limits. `quota_in_force`: first field of `cpu.max`, which also holds the period.
pub(super) fn settings(
    resources: &LinuxResources,
    overhead: u64,
    quota_in_force: Option<String>,
) -> Result<Vec<Setting>> {
    let mut list = List(Vec::new());
    if let Some(memory) = resources.memory() {
        list.memory(memory, overhead)?;
    }
    if let Some(cpu) = resources.cpu() {
        list.cpu(cpu, quota_in_force);
    }
    if let Some(block_io) = resources.block_io() {
        list.block_io(block_io)?;
    }
    Ok(list.0)
}

struct List(Vec<Setting>);

impl List {
    fn add<const N: usize>(
        &mut self,
        field: &'static str,
        controllers: [&'static str; 2],
        ways: [(&'static str, String); N],
    ) {
        self.0.push(Setting {
            field,
            controllers,
            ways: ways.into(),
            optional: false,
        });
    }

    fn memory(&mut self, memory: &LinuxMemory, overhead: u64) -> Result<()> {
        const SWAP: &str = "linux.resources.memory.swap";
        let invalid = |why| Err(Error::new(format!("cannot set {SWAP}: {why}")));
        let maximum = memory.limit().filter(|limit| *limit != 0);
        // No memory limit implies no swap limit.
        let both = match (memory.swap().filter(|swap| *swap != 0), maximum) {
            (None, Some(..0)) => Some(-1),
            (both, _) => both,
        };
        let wall = |limit: i64| match limit {
            ..0 => -1,
            limit => limit.saturating_add_unsigned(overhead),
        };
        if let Some(maximum) = maximum {
            self.add(
                "linux.resources.memory.limit",
                MEMORY,
                [
                    ("memory.limit_in_bytes", wall(maximum).to_string()),
                    ("memory.max", or_max(wall(maximum))),
                ],
            );
        }
        let Some(both) = both else {
            return Ok(());
        };
        let mut ways = vec![("memory.memsw.limit_in_bytes", wall(both).to_string())];
        // v2 limits swap alone.
        match (both, maximum) {
            (..0, _) => ways.push(("memory.swap.max", or_max(-1))),
            (_, Some(..0)) => return invalid("limited while memory is not"),
            (_, Some(maximum)) if both < maximum => {
                return invalid("smaller than the memory limit that it includes");
            }
            (_, Some(maximum)) => ways.push(("memory.swap.max", or_max(both - maximum))),
            (_, None) => {}
        }
        self.0.push(Setting {
            field: SWAP,
            controllers: MEMORY,
            ways,
            // Hosts without swap accounting are common, and the memory limit still holds.
            optional: true,
        });
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu, quota_in_force: Option<String>) {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.add(
                "linux.resources.cpu.shares",
                CPU,
                [
                    ("cpu.shares", shares.to_string()),
                    ("cpu.weight", cpu_weight(shares).to_string()),
                ],
            );
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if let Some(period) = period {
            let quota = match quota {
                Some(quota) => or_max(quota),
                None => quota_in_force.unwrap_or_else(|| or_max(-1)),
            };
            self.add(
                "linux.resources.cpu.period",
                CPU,
                [
                    ("cpu.cfs_period_us", period.to_string()),
                    ("cpu.max", format!("{quota} {period}")),
                ],
            );
        }
        if let Some(quota) = quota {
            self.add(
                "linux.resources.cpu.quota",
                CPU,
                [
                    ("cpu.cfs_quota_us", quota.max(-1).to_string()),
                    ("cpu.max", or_max(quota)),
                ],
            );
        }
        for (field, file, list) in [
            ("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus()),
            ("linux.resources.cpu.mems", "cpuset.mems", cpu.mems()),
        ] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.add(field, CPUSET, [(file, list.clone())]);
            }
        }
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) -> Result<()> {
        if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
            const FIELD: &str = "linux.resources.blockIO.weight";
            let converted = io_weight(FIELD, weight)?;
            self.add(
                FIELD,
                BLOCK_IO,
                [
                    ("blkio.bfq.weight", weight.to_string()),
                    ("blkio.weight", weight.to_string()),
                    ("io.bfq.weight", weight.to_string()),
                    ("io.weight", converted.to_string()),
                ],
            );
        }
        for device in block_io.weight_device().iter().flatten() {
            const FIELD: &str = "linux.resources.blockIO.weightDevice";
            let Some(weight) = device.weight().filter(|weight| *weight != 0) else {
                continue;
            };
            let converted = io_weight(FIELD, weight)?;
            let line = |weight| format!("{}:{} {weight}", device.major(), device.minor());
            self.add(
                FIELD,
                BLOCK_IO,
                [
                    ("blkio.bfq.weight_device", line(weight.into())),
                    ("blkio.weight_device", line(weight.into())),
                    ("io.bfq.weight", line(weight.into())),
                    ("io.weight", line(converted)),
                ],
            );
        }
        self.throttle(
            "linux.resources.blockIO.throttleReadBpsDevice",
            "blkio.throttle.read_bps_device",
            "rbps",
            block_io.throttle_read_bps_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleWriteBpsDevice",
            "blkio.throttle.write_bps_device",
            "wbps",
            block_io.throttle_write_bps_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleReadIOPSDevice",
            "blkio.throttle.read_iops_device",
            "riops",
            block_io.throttle_read_iops_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleWriteIOPSDevice",
            "blkio.throttle.write_iops_device",
            "wiops",
            block_io.throttle_write_iops_device(),
        );
        Ok(())
    }

    fn throttle(
        &mut self,
        field: &'static str,
        file: &'static str,
        key: &str,
        devices: &Option<Vec<LinuxThrottleDevice>>,
    ) {
        for device in devices.iter().flatten() {
            let (name, rate) = (
                format!("{}:{}", device.major(), device.minor()),
                device.rate(),
            );
            // 0 means no limit, which v2 spells "max".
            let word = match rate {
                0 => "max".into(),
                rate => rate.to_string(),
            };
            self.add(
                field,
                BLOCK_IO,
                [
                    (file, format!("{name} {rate}")),
                    ("io.max", format!("{name} {key}={word}")),
                ],
            );
        }
    }
}

/// The specification's -1 for "no limit" is "max" in v2.
fn or_max(number: i64) -> String {
    match number {
        ..0 => "max".into(),
        number => number.to_string(),
    }
}

/// 2…262144 (default 1024) to 1…10000 (default 100), mapping ends and defaults to each other: a
/// parabola of the logarithms, as in runc since 1.3.2 (runc issue 4896) and in the agent.
fn cpu_weight(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let logarithm = (shares as f64).log2();
            let exponent = (logarithm * logarithm + 125.0 * logarithm) / 612.0 - 7.0 / 34.0;
            // Round up, except for floating-point error.
            (10f64.powf(exponent) - 1e-6).ceil() as u64
        }
    }
}

/// 10…1000 to 1…10000, linearly.
fn io_weight(field: &str, weight: u16) -> Result<u64> {
    match weight {
        10..=1000 => Ok(1 + (u64::from(weight) - 10) * 9999 / 990),
        _ => Err(Error::new(format!(
            "cannot set {field}: {weight} is not between 10 and 1000"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `file=value` of each setting, alternatives joined by `|`.
    fn read(json: &str, overhead: u64) -> Result<Vec<String>, String> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let settings = settings(&resources, overhead, Some("7000".into()));
        let settings = settings.map_err(|failure| failure.message)?;
        let text = |setting: Setting| {
            let ways = setting.ways.into_iter();
            ways.map(|(file, value)| format!("{file}={value}"))
                .collect::<Vec<_>>()
                .join("|")
        };
        Ok(settings.into_iter().map(text).collect())
    }

    #[test]
    fn nothing_asked_nothing_written() {
        for json in [
            "{}",
            r#"{"cpu":{"shares":0,"quota":0,"period":0,"cpus":""},"memory":{"limit":0,"swap":0},"blockIO":{"weight":0}}"#,
            r#"{"pids":{"limit":5},"hugepageLimits":[{"pageSize":"2MB","limit":5}],"unified":{"memory.max":"5"},
                "devices":[{"allow":false}],"memory":{"reservation":5},"cpu":{"burst":5,"idle":1}}"#,
        ] {
            assert!(read(json, 100).unwrap().is_empty(), "{json}");
        }
    }

    #[test]
    fn memory() {
        let read = |json: &str| read(&format!(r#"{{"memory":{json}}}"#), 100);
        assert_eq!(
            read(r#"{"limit":1000,"swap":1500}"#).unwrap(),
            [
                "memory.limit_in_bytes=1100|memory.max=1100",
                "memory.memsw.limit_in_bytes=1600|memory.swap.max=500",
            ]
        );
        assert_eq!(
            read(r#"{"limit":-1}"#).unwrap(),
            [
                "memory.limit_in_bytes=-1|memory.max=max",
                "memory.memsw.limit_in_bytes=-1|memory.swap.max=max",
            ]
        );
        assert_eq!(
            read(r#"{"swap":1500}"#).unwrap(),
            ["memory.memsw.limit_in_bytes=1600"]
        );
        assert_eq!(
            read(r#"{"limit":9223372036854775807}"#).unwrap()[0],
            "memory.limit_in_bytes=9223372036854775807|memory.max=9223372036854775807"
        );
        for (json, why) in [
            (r#"{"limit":1000,"swap":999}"#, "smaller than"),
            (r#"{"limit":-1,"swap":999}"#, "while memory is not"),
        ] {
            let message = read(json).unwrap_err();
            assert!(message.starts_with("cannot set linux.resources.memory.swap: "));
            assert!(message.contains(why), "{message}");
        }
    }

    #[test]
    fn a_machine_is_kept_within_bounds() {
        let all = bounds(&Bounds {
            memory: Some(1000),
            swap: None,
            processes: Some(7),
            cpus: Some(3),
            host_cpus: vec![0, 2],
        });
        assert!(all.iter().all(|setting| setting.optional));
        let ways: Vec<_> = all.into_iter().flat_map(|setting| setting.ways).collect();
        let text = |(file, value): &(&str, String)| format!("{file}={value}");
        assert_eq!(
            ways.iter().map(text).collect::<Vec<_>>(),
            [
                "memory.limit_in_bytes=1000",
                "memory.max=1000",
                "memory.memsw.limit_in_bytes=2000",
                "memory.swap.max=1000",
                "pids.max=7",
                "cpu.cfs_quota_us=300000",
                "cpu.max=300000 100000",
                "cpuset.cpus=0,2",
            ]
        );
        assert!(bounds(&Bounds::default()).is_empty());
    }

    #[test]
    fn cpu() {
        let read = |json: &str| read(&format!(r#"{{"cpu":{json}}}"#), 100).unwrap();
        assert_eq!(
            read(r#"{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1","mems":"0"}"#),
            [
                "cpu.shares=1024|cpu.weight=100",
                "cpu.cfs_period_us=100000|cpu.max=50000 100000",
                "cpu.cfs_quota_us=50000|cpu.max=50000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
            ]
        );
        assert_eq!(read(r#"{"quota":-1}"#), ["cpu.cfs_quota_us=-1|cpu.max=max"]);
        assert_eq!(
            read(r#"{"period":5000}"#),
            ["cpu.cfs_period_us=5000|cpu.max=7000 5000"]
        );
    }

    #[test]
    fn weights_meet_at_the_ends_and_the_default() {
        assert_eq!(
            [0, 2, 512, 1024, 2000, 22_000, 262_144, 1 << 40].map(cpu_weight),
            [1, 1, 59, 100, 170, 1204, 10_000, 10_000]
        );
        assert_eq!(
            [10, 500, 1000].map(|weight| io_weight("", weight)),
            [Ok(1), Ok(4950), Ok(10_000)]
        );
        assert!(io_weight("", 9).is_err() && io_weight("", 1001).is_err());
    }

    #[test]
    fn block_io() {
        assert_eq!(
            read(
                r#"{"blockIO":{"weight":1000,"weightDevice":[{"major":8,"minor":0,"weight":10}],
                    "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":600}],
                    "throttleWriteIOPSDevice":[{"major":8,"minor":16,"rate":0}]}}"#,
                100
            )
            .unwrap(),
            [
                "blkio.bfq.weight=1000|blkio.weight=1000|io.bfq.weight=1000|io.weight=10000",
                "blkio.bfq.weight_device=8:0 10|blkio.weight_device=8:0 10|io.bfq.weight=8:0 10|io.weight=8:0 1",
                "blkio.throttle.read_bps_device=8:0 600|io.max=8:0 rbps=600",
                "blkio.throttle.write_iops_device=8:16 0|io.max=8:16 wiops=max",
            ]
        );
    }
}
