//! Converts the limits of a spec to files of a cgroup v2 directory and their values.
//!
//! Pure. The spec is written in terms of cgroup v1; a limit without a counterpart in v2 is an error
//! that names it. Device rules are in [`super::device_program`].

use std::borrow::Cow;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::container::error::{CreateError, Result};

/// One write to one file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Field of the spec, for errors.
    pub(crate) field: &'static str,
    pub(crate) file: Cow<'static, str>,
    pub(crate) value: String,
    /// What to do when the file does not exist.
    pub(crate) absent: Absent,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// The limit cannot be set: an error.
    Fail,
    /// The limit holds anyway.
    Ignore,
    /// Another file takes the same limit in other units.
    Write(&'static str, String),
}

/// All settings for `resources`, in the order of their writes.
pub(crate) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>> {
    let mut list = List(Vec::new());
    if let Some(cpu) = resources.cpu() {
        list.cpu(cpu)?;
    }
    if let Some(memory) = resources.memory() {
        list.memory(memory)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 means "no limit given".
        if pids.limit() != 0 {
            list.set(
                "linux.resources.pids.limit",
                "pids.max",
                limit(pids.limit()),
            );
        }
    }
    if let Some(block_io) = resources.block_io() {
        list.block_io(block_io)?;
    }
    for hugepages in resources.hugepage_limits().iter().flatten() {
        const FIELD: &str = "linux.resources.hugepageLimits";
        let size = hugepages.page_size();
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(CreateError::invalid(
                FIELD,
                format_args!("page size {size:?}"),
            ));
        }
        list.set(
            FIELD,
            format!("hugetlb.{size}.max"),
            limit(hugepages.limit()),
        );
        list.set_if_exists(
            FIELD,
            format!("hugetlb.{size}.rsvd.max"),
            limit(hugepages.limit()),
        );
    }
    for (device, rdma) in resources.rdma().iter().flatten() {
        let mut line = device.clone();
        for (name, number) in [
            ("hca_handle", rdma.hca_handles()),
            ("hca_object", rdma.hca_objects()),
        ] {
            if let Some(number) = number {
                line.push_str(&format!(" {name}={number}"));
            }
        }
        list.set("linux.resources.rdma", "rdma.max", line);
    }
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|class| class != 0) {
            return Err(without_counterpart("linux.resources.network.classID"));
        }
        if network
            .priorities()
            .as_ref()
            .is_some_and(|priorities| !priorities.is_empty())
        {
            return Err(without_counterpart("linux.resources.network.priorities"));
        }
    }
    // Last, because it may refine the fields above.
    for (file, value) in resources.unified().iter().flatten() {
        const FIELD: &str = "linux.resources.unified";
        if file.contains('/')
            || !file.contains('.')
            || file.starts_with('.')
            || file.starts_with("cgroup.")
        {
            return Err(CreateError::invalid(
                FIELD,
                format_args!("{file:?} is not a file of a controller"),
            ));
        }
        list.set(FIELD, file.clone(), value.clone());
    }
    Ok(list.0)
}

fn without_counterpart(field: &'static str) -> CreateError {
    CreateError::unsupported(field, "cgroup v2 has nothing like it")
}

/// The spec's -1 is "max".
fn limit(number: i64) -> String {
    if number < 0 {
        "max".into()
    } else {
        number.to_string()
    }
}

struct List(Vec<Setting>);

impl List {
    fn set(
        &mut self,
        field: &'static str,
        file: impl Into<Cow<'static, str>>,
        value: impl ToString,
    ) {
        self.push(field, file, value, Absent::Fail);
    }

    fn set_if_exists(
        &mut self,
        field: &'static str,
        file: impl Into<Cow<'static, str>>,
        value: impl ToString,
    ) {
        self.push(field, file, value, Absent::Ignore);
    }

    fn push(
        &mut self,
        field: &'static str,
        file: impl Into<Cow<'static, str>>,
        value: impl ToString,
        absent: Absent,
    ) {
        self.0.push(Setting {
            field,
            file: file.into(),
            value: value.to_string(),
            absent,
        });
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<()> {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.set(
                "linux.resources.cpu.shares",
                "cpu.weight",
                cpu_weight(shares),
            );
        }
        if let Some(idle) = cpu.idle() {
            self.set("linux.resources.cpu.idle", "cpu.idle", idle);
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let quota = limit(quota.unwrap_or(-1));
            self.set(
                "linux.resources.cpu.quota",
                "cpu.max",
                match period {
                    Some(period) => format!("{quota} {period}"),
                    None => quota,
                },
            );
        }
        if let Some(burst) = cpu.burst() {
            self.set("linux.resources.cpu.burst", "cpu.max.burst", burst);
        }
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
            return Err(without_counterpart("linux.resources.cpu.realtimeRuntime"));
        }
        if cpu.realtime_period().is_some_and(|period| period != 0) {
            return Err(without_counterpart("linux.resources.cpu.realtimePeriod"));
        }
        for (field, file, list) in [
            ("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus()),
            ("linux.resources.cpu.mems", "cpuset.mems", cpu.mems()),
        ] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                self.set(field, file, list);
            }
        }
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        let maximum = memory.limit().filter(|maximum| *maximum != 0);
        if let Some(maximum) = maximum {
            self.set("linux.resources.memory.limit", "memory.max", limit(maximum));
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
            self.set(
                "linux.resources.memory.reservation",
                "memory.low",
                limit(reservation),
            );
        }
        // The spec counts memory and swap together, v2 counts swap alone. Without swap in the guest
        // every limit of it holds.
        if let Some(both) = memory.swap().filter(|swap| *swap != 0) {
            const FIELD: &str = "linux.resources.memory.swap";
            let swap = match maximum {
                _ if both < 0 => -1,
                Some(maximum) if maximum < 0 => {
                    return Err(CreateError::invalid(FIELD, "limited while memory is not"));
                }
                None => return Err(CreateError::invalid(FIELD, "given without a memory limit")),
                Some(maximum) if both < maximum => {
                    return Err(CreateError::invalid(
                        FIELD,
                        "smaller than the memory limit that it includes",
                    ));
                }
                Some(maximum) => both - maximum,
            };
            self.set_if_exists(FIELD, "memory.swap.max", limit(swap));
        }
        #[allow(deprecated)]
        let kernel = memory.kernel();
        if kernel.is_some_and(|kernel| kernel > 0) {
            return Err(without_counterpart("linux.resources.memory.kernel"));
        }
        if memory.kernel_tcp().is_some_and(|kernel| kernel > 0) {
            return Err(without_counterpart("linux.resources.memory.kernelTCP"));
        }
        if memory.swappiness().is_some() {
            return Err(without_counterpart("linux.resources.memory.swappiness"));
        }
        if memory.disable_oom_killer() == Some(true) {
            return Err(without_counterpart(
                "linux.resources.memory.disableOOMKiller",
            ));
        }
        if memory.use_hierarchy() == Some(false) {
            return Err(without_counterpart("linux.resources.memory.useHierarchy"));
        }
        Ok(())
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) -> Result<()> {
        if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(without_counterpart("linux.resources.blockIO.leafWeight"));
        }
        if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
            const FIELD: &str = "linux.resources.blockIO.weight";
            let weight = checked_weight(FIELD, weight)?;
            let other = Absent::Write("io.weight", io_weight(weight).to_string());
            self.push(FIELD, "io.bfq.weight", weight, other);
        }
        for device in block_io.weight_device().iter().flatten() {
            const FIELD: &str = "linux.resources.blockIO.weightDevice";
            if device.leaf_weight().is_some_and(|weight| weight != 0) {
                return Err(without_counterpart(
                    "linux.resources.blockIO.weightDevice.leafWeight",
                ));
            }
            if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
                let weight = checked_weight(FIELD, weight)?;
                let name = format!("{}:{}", device.major(), device.minor());
                let other = Absent::Write("io.weight", format!("{name} {}", io_weight(weight)));
                self.push(FIELD, "io.bfq.weight", format!("{name} {weight}"), other);
            }
        }
        self.throttle(
            "linux.resources.blockIO.throttleReadBpsDevice",
            "rbps",
            block_io.throttle_read_bps_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleWriteBpsDevice",
            "wbps",
            block_io.throttle_write_bps_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleReadIOPSDevice",
            "riops",
            block_io.throttle_read_iops_device(),
        );
        self.throttle(
            "linux.resources.blockIO.throttleWriteIOPSDevice",
            "wiops",
            block_io.throttle_write_iops_device(),
        );
        Ok(())
    }

    fn throttle(
        &mut self,
        field: &'static str,
        key: &str,
        devices: &Option<Vec<LinuxThrottleDevice>>,
    ) {
        for device in devices.iter().flatten() {
            // The spec's 0 lifts the limit; v2 expects `max`.
            let rate = if device.rate() == 0 {
                "max".into()
            } else {
                device.rate().to_string()
            };
            self.set(
                field,
                "io.max",
                format!("{}:{} {key}={rate}", device.major(), device.minor()),
            );
        }
    }
}

fn checked_weight(field: &'static str, weight: u16) -> Result<u16> {
    if (10..=1000).contains(&weight) {
        Ok(weight)
    } else {
        Err(CreateError::invalid(
            field,
            format_args!("{weight} is not between 10 and 1000"),
        ))
    }
}

/// Maps 10…1000 to 1…10000 linearly.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight) - 10) * 9999 / 990
}

/// Maps 2…262144 to 1…10000 so that the defaults, 1024 and 100, meet: a parabola of the logarithms.
fn cpu_weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let logarithm = (shares as f64).log2();
    let exponent = (logarithm * logarithm + 125.0 * logarithm) / 612.0 - 7.0 / 34.0;
    // Rounded up, but not because of floating-point error.
    (10f64.powf(exponent) - 1e-6).ceil() as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(json: &str) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        Ok(settings(&resources)?
            .into_iter()
            .map(|setting| (setting.file.into_owned(), setting.value))
            .collect())
    }

    fn pairs(json: &str) -> Vec<(String, String)> {
        read(json).unwrap()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.into(), value.into())
    }

    #[test]
    fn nothing_asked_nothing_written() {
        assert!(pairs("{}").is_empty());
        assert!(
            pairs(r#"{"pids":{"limit":0},"cpu":{"shares":0,"quota":0},"memory":{}}"#).is_empty()
        );
    }

    #[test]
    fn cpu() {
        assert_eq!(
            pairs(
                r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1","burst":10}}"#
            ),
            [
                pair("cpu.weight", "100"),
                pair("cpu.max", "50000 100000"),
                pair("cpu.max.burst", "10"),
                pair("cpuset.cpus", "0-1"),
            ]
        );
        assert_eq!(pairs(r#"{"cpu":{"quota":-1}}"#), [pair("cpu.max", "max")]);
        assert_eq!(
            pairs(r#"{"cpu":{"period":5000}}"#),
            [pair("cpu.max", "max 5000")]
        );
        assert_eq!(pairs(r#"{"cpu":{"idle":1}}"#), [pair("cpu.idle", "1")]);
    }

    #[test]
    fn weights_meet_at_the_ends_and_the_default() {
        assert_eq!(
            [0, 2, 1024, 262_144, 1 << 40].map(cpu_weight),
            [1, 1, 100, 10_000, 10_000]
        );
        assert!(
            (3..262_144)
                .step_by(97)
                .all(|shares| (1..=10_000).contains(&cpu_weight(shares)))
        );
        assert_eq!([10, 1000].map(io_weight), [1, 10_000]);
    }

    #[test]
    fn memory() {
        assert_eq!(
            pairs(r#"{"memory":{"limit":1000,"reservation":500,"swap":1500}}"#),
            [
                pair("memory.max", "1000"),
                pair("memory.low", "500"),
                pair("memory.swap.max", "500"),
            ]
        );
        assert_eq!(
            pairs(r#"{"memory":{"limit":-1,"swap":-1}}"#),
            [pair("memory.max", "max"), pair("memory.swap.max", "max")]
        );
        assert_eq!(
            pairs(r#"{"memory":{"limit":1000,"swap":1000}}"#)[1],
            pair("memory.swap.max", "0")
        );
        assert!(read(r#"{"memory":{"swap":1000}}"#).is_err());
        assert!(read(r#"{"memory":{"limit":1000,"swap":10}}"#).is_err());
    }

    #[test]
    fn block_io() {
        let json = r#"{"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":100}],
            "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]}}"#;
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let list = settings(&resources).unwrap();
        assert_eq!(list[0].absent, Absent::Write("io.weight", "4950".into()));
        assert_eq!(list[1].value, "8:0 rbps=100");
        assert_eq!(list[2].value, "8:0 wiops=max");
        assert!(read(r#"{"blockIO":{"weight":5}}"#).is_err());
    }

    #[test]
    fn others() {
        assert_eq!(pairs(r#"{"pids":{"limit":-1}}"#), [pair("pids.max", "max")]);
        assert_eq!(
            pairs(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4}]}"#)[0],
            pair("hugetlb.2MB.max", "4")
        );
        assert_eq!(
            pairs(r#"{"unified":{"memory.high":"5"}}"#),
            [pair("memory.high", "5")]
        );
        assert_eq!(
            pairs(r#"{"rdma":{"m":{"hcaHandles":3}}}"#),
            [pair("rdma.max", "m hca_handle=3")]
        );
    }

    #[test]
    fn what_v2_cannot_do_is_an_error_by_name() {
        for (json, field) in [
            (r#"{"cpu":{"realtimeRuntime":5}}"#, "realtimeRuntime"),
            (r#"{"cpu":{"realtimePeriod":5}}"#, "realtimePeriod"),
            (r#"{"memory":{"swappiness":5}}"#, "swappiness"),
            (r#"{"memory":{"kernel":5}}"#, "memory.kernel"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "disableOOMKiller",
            ),
            (r#"{"network":{"classID":5}}"#, "classID"),
            (r#"{"blockIO":{"leafWeight":5}}"#, "leafWeight"),
            (r#"{"unified":{"../x":"1"}}"#, "unified"),
            (r#"{"unified":{"cgroup.procs":"1"}}"#, "unified"),
            (
                r#"{"hugepageLimits":[{"pageSize":"../x","limit":4}]}"#,
                "hugepageLimits",
            ),
        ] {
            let message = read(json).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
