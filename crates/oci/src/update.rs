//! Converts runc's `update` flags or JSON to the resources of the specification.
//!
//! Pure except for [`read`]. Callers decide which of them apply in the guest and which on the host.

use std::fs::File;
use std::io::Read;

use hull_sandbox::{Error, Result};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};
use serde::Deserialize;

/// Longest accepted JSON, bytes.
const MAX_JSON: u64 = 1 << 20;

/// The flags of `update`, unparsed. An empty value counts as not given, as in runc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// `--blkio-weight`: 10 to 1000; 0 changes nothing.
    pub blkio_weight: Option<String>,
    /// `--cpu-period`, microseconds.
    pub cpu_period: Option<String>,
    /// `--cpu-quota`, microseconds per period; -1 for no limit.
    pub cpu_quota: Option<String>,
    /// `--cpu-burst`, microseconds.
    pub cpu_burst: Option<String>,
    /// `--cpu-share`, relative to other containers.
    pub cpu_share: Option<String>,
    /// `--cpuset-cpus`.
    pub cpuset_cpus: Option<String>,
    /// `--cpuset-mems`.
    pub cpuset_mems: Option<String>,
    /// `--cpu-rt-period`, microseconds.
    pub cpu_rt_period: Option<String>,
    /// `--cpu-rt-runtime`, microseconds.
    pub cpu_rt_runtime: Option<String>,
    /// `--cpu-idle`, 0 or 1.
    pub cpu_idle: Option<String>,
    /// `--memory`: bytes, or with a unit; -1 for no limit.
    pub memory: Option<String>,
    /// `--memory-reservation`, likewise.
    pub memory_reservation: Option<String>,
    /// `--memory-swap`, memory and swap together, likewise.
    pub memory_swap: Option<String>,
    /// `--pids-limit`; 0 changes nothing, -1 for no limit.
    pub pids_limit: Option<String>,
    /// `--kernel-memory`: ignored, with a warning.
    pub kernel_memory: Option<String>,
    /// `--kernel-memory-tcp`: ignored, with a warning.
    pub kernel_memory_tcp: Option<String>,
    /// `--l3-cache-schema`: refused.
    pub l3_cache_schema: Option<String>,
    /// `--mem-bw-schema`: refused.
    pub mem_bw_schema: Option<String>,
}

/// The value of a flag, unless empty.
fn given(flag: &Option<String>) -> Option<&str> {
    flag.as_deref().filter(|text| !text.is_empty())
}

fn invalid(flag: &str, why: impl std::fmt::Display) -> Error {
    Error::new(format!("invalid value for {flag}: {why}"))
}

/// A decimal number.
fn number<T: std::str::FromStr<Err = std::num::ParseIntError>>(
    flag: &str,
    text: &Option<String>,
) -> Result<Option<T>> {
    given(text)
        .map(|text| {
            text.parse()
                .map_err(|error| invalid(flag, format_args!("{text:?}: {error}")))
        })
        .transpose()
}

/// A size with a unit; -1 for no limit.
fn size(flag: &str, text: &Option<String>) -> Result<Option<i64>> {
    given(text)
        .map(|text| match text {
            "-1" => Ok(-1),
            _ => bytes(text).ok_or_else(|| invalid(flag, format_args!("invalid size: '{text}'"))),
        })
        .transpose()
}

/// `512`, `512b`, `512k`, `1.5 GiB`: units are always powers of 1024.
fn bytes(text: &str) -> Option<i64> {
    let end = text
        .rfind(|letter: char| letter.is_ascii_digit())
        .map(|last| last + 1)?;
    let (number, unit) = text.split_at(end);
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let shift = match unit.strip_suffix('b').unwrap_or(&unit) {
        "" => 0,
        "k" | "ki" => 10,
        "m" | "mi" => 20,
        "g" | "gi" => 30,
        "t" | "ti" => 40,
        "p" | "pi" => 50,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole = whole.parse::<i64>().ok()?.checked_mul(1 << shift)?;
    let fraction = format!("0.{fraction}").parse::<f64>().ok()?;
    // Below one unit, so the conversion is precise enough and cannot overflow.
    whole.checked_add((fraction * (1i64 << shift) as f64) as i64)
}

impl Limits {
    /// Resources with the flags that were given set.
    ///
    /// # Errors
    /// A value is invalid (runc's message where it has a readable one), or a flag is one of
    /// [`Limits::refused`].
    pub fn resources(&self) -> Result<LinuxResources> {
        self.refused()?;
        let mut resources = LinuxResources::default();
        let cpu = self.cpu()?;
        if cpu != LinuxCpu::default() {
            resources.set_cpu(Some(cpu));
        }
        let memory = self.memory()?;
        if memory != LinuxMemory::default() {
            resources.set_memory(Some(memory));
        }
        if let Some(weight) = number::<u16>("blkio-weight", &self.blkio_weight)?.filter(|w| *w != 0)
        {
            let mut block_io = LinuxBlockIo::default();
            block_io.set_weight(Some(weight));
            resources.set_block_io(Some(block_io));
        }
        if let Some(limit) = number("pids-limit", &self.pids_limit)?.filter(|limit| *limit != 0) {
            let mut pids = LinuxPids::default();
            pids.set_limit(limit);
            resources.set_pids(Some(pids));
        }
        Ok(resources)
    }

    fn cpu(&self) -> Result<LinuxCpu> {
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(number("cpu-share", &self.cpu_share)?);
        cpu.set_quota(number("cpu-quota", &self.cpu_quota)?);
        cpu.set_period(number("cpu-period", &self.cpu_period)?);
        cpu.set_burst(number("cpu-burst", &self.cpu_burst)?);
        cpu.set_idle(number("cpu-idle", &self.cpu_idle)?);
        cpu.set_realtime_period(number("cpu-rt-period", &self.cpu_rt_period)?);
        cpu.set_realtime_runtime(number("cpu-rt-runtime", &self.cpu_rt_runtime)?);
        cpu.set_cpus(given(&self.cpuset_cpus).map(str::to_owned));
        cpu.set_mems(given(&self.cpuset_mems).map(str::to_owned));
        Ok(cpu)
    }

    fn memory(&self) -> Result<LinuxMemory> {
        let mut memory = LinuxMemory::default();
        memory.set_limit(size("memory", &self.memory)?);
        memory.set_reservation(size("memory-reservation", &self.memory_reservation)?);
        memory.set_swap(size("memory-swap", &self.memory_swap)?);
        Ok(memory)
    }

    /// Refuses flags that no guest supports, also beside `--resources`, which overrides all others.
    ///
    /// # Errors
    /// `--l3-cache-schema` or `--mem-bw-schema` is given.
    pub fn refused(&self) -> Result<()> {
        if given(&self.l3_cache_schema).is_some() {
            return Err(Error::new("Intel RDT/CAT: l3 cache schema is not enabled"));
        }
        if given(&self.mem_bw_schema).is_some() {
            return Err(Error::new(
                "Intel RDT/MBA: memory bandwidth schema is not enabled",
            ));
        }
        Ok(())
    }

    /// Warnings for flags that runc accepts and ignores.
    pub fn warnings(&self) -> Vec<String> {
        [
            ("kernel-memory", &self.kernel_memory),
            ("kernel-memory-tcp", &self.kernel_memory_tcp),
        ]
        .into_iter()
        .filter(|(_, value)| given(value).is_some())
        .map(|(flag, _)| format!("Setting --{flag} is ignored and will be removed"))
        .collect()
    }
}

/// Reads resources from the file given by `--resources`, or from standard input for `-`.
///
/// # Errors
/// The file cannot be read, or is not valid JSON for resources.
pub fn read(source: &str) -> Result<LinuxResources> {
    if source == "-" {
        return from_json(std::io::stdin().lock(), "standard input");
    }
    let file =
        File::open(source).map_err(|error| Error::new(format!("cannot open {source}: {error}")))?;
    from_json(file, source)
}

/// Reads the first JSON value and ignores the rest, as runc does.
fn from_json(reader: impl Read, source: &str) -> Result<LinuxResources> {
    let mut json = serde_json::Deserializer::from_reader(reader.take(MAX_JSON));
    // Require an object: serde would also accept a list.
    serde_json::Map::deserialize(&mut json)
        .and_then(|object| serde_json::from_value(object.into()))
        .map_err(|error| Error::new(format!("cannot read resources from {source}: {error}")))
}

/// Completes a change with current limits that the kernel needs together with it: quota and period
/// form one setting, as do the limits of memory and of memory plus swap.
pub fn complete(change: &mut LinuxResources, current: &LinuxResources) {
    if let Some(cpu) = change.cpu_mut() {
        let old = current.cpu().as_ref();
        if cpu.quota().is_some() || cpu.period().is_some() {
            cpu.set_quota(cpu.quota().or(old.and_then(LinuxCpu::quota)));
            cpu.set_period(cpu.period().or(old.and_then(LinuxCpu::period)));
        }
    }
    if let Some(memory) = change.memory_mut() {
        let old = current.memory().as_ref();
        if memory.limit() == Some(-1) && memory.swap().is_none() {
            // No memory limit implies no limit on memory plus swap.
            memory.set_swap(Some(-1));
        } else if memory.limit().is_some() || memory.swap().is_some() {
            memory.set_limit(memory.limit().or(old.and_then(LinuxMemory::limit)));
            memory.set_swap(memory.swap().or(old.and_then(LinuxMemory::swap)));
        }
    }
}

/// The limits after a change: those of `change`, otherwise those of `current`.
pub fn merge(current: &LinuxResources, change: &LinuxResources) -> Result<LinuxResources> {
    let json = |resources: &LinuxResources| {
        serde_json::to_value(resources)
            .map_err(|error| Error::new(format!("cannot write resources: {error}")))
    };
    let mut merged = json(current)?;
    overlay(&mut merged, json(change)?);
    serde_json::from_value(merged)
        .map_err(|error| Error::new(format!("cannot merge resources: {error}")))
}

fn overlay(under: &mut serde_json::Value, over: serde_json::Value) {
    match (under, over) {
        (serde_json::Value::Object(under), serde_json::Value::Object(over)) => {
            for (key, value) in over {
                overlay(under.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (_, serde_json::Value::Null) => {}
        (under, over) => *under = over,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn text(text: &str) -> Option<String> {
        Some(text.into())
    }

    fn resources(json: serde_json::Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn sizes_are_read_as_runc_reads_them() {
        let cases = [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("512m", Some(512 << 20)),
            ("512MB", Some(512 << 20)),
            ("512 MiB", Some(512 << 20)),
            ("1.5g", Some(3 << 29)),
            ("0.5k", Some(512)),
            ("7b", Some(7)),
            ("2T", Some(2 << 40)),
            ("1p", Some(1 << 50)),
            ("9223372036854775807", Some(i64::MAX)),
            ("99999999999999999999", None),
            ("9000p", None),
            ("-2", None),
            ("12x", None),
            ("1.m", None),
            (".5m", None),
            ("1  m", None),
            ("m", None),
            ("1.2.3", None),
            ("ü", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
    }

    #[test]
    fn flags_become_resources() {
        let limits = Limits {
            blkio_weight: text("500"),
            cpu_period: text("100000"),
            cpu_quota: text("-1"),
            cpu_burst: text("10"),
            cpu_share: text("512"),
            cpuset_cpus: text("0-1"),
            cpuset_mems: text("0"),
            cpu_rt_period: text("1"),
            cpu_rt_runtime: text("2"),
            cpu_idle: text("1"),
            memory: text("64m"),
            memory_reservation: text("32m"),
            memory_swap: text("-1"),
            pids_limit: text("10"),
            ..Limits::default()
        };
        let expected = resources(json!({
            "cpu": {
                "shares": 512, "quota": -1, "period": 100_000, "burst": 10, "idle": 1, "cpus": "0-1", "mems": "0",
                "realtimePeriod": 1, "realtimeRuntime": 2,
            },
            "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": -1},
            "blockIO": {"weight": 500},
            "pids": {"limit": 10},
        }));
        assert_eq!(limits.resources().unwrap(), expected);
    }

    #[test]
    fn what_is_not_given_changes_nothing() {
        let limits = Limits {
            memory: text(""),
            pids_limit: text("0"),
            blkio_weight: text("0"),
            ..Limits::default()
        };
        assert_eq!(limits.resources().unwrap(), LinuxResources::default());
        assert!(limits.warnings().is_empty());
    }

    #[test]
    fn wrong_values_are_named() {
        let base = Limits::default();
        let cases = [
            (
                Limits {
                    memory: text("12x"),
                    ..base.clone()
                },
                "invalid value for memory: invalid size: '12x'",
            ),
            (
                Limits {
                    cpu_share: text("-1"),
                    ..base.clone()
                },
                "invalid value for cpu-share: \"-1\"",
            ),
            (
                Limits {
                    blkio_weight: text("70000"),
                    ..base.clone()
                },
                "invalid value for blkio-weight",
            ),
            (
                Limits {
                    l3_cache_schema: text("x"),
                    ..base.clone()
                },
                "Intel RDT/CAT: l3 cache schema is not enabled",
            ),
            (
                Limits {
                    mem_bw_schema: text("x"),
                    ..base
                },
                "Intel RDT/MBA: memory bandwidth schema is not enabled",
            ),
        ];
        for (limits, words) in cases {
            let message = limits.resources().unwrap_err().message;
            assert!(message.starts_with(words), "{message}");
        }
    }

    #[test]
    fn memory_of_the_kernel_is_ignored_aloud() {
        let limits = Limits {
            kernel_memory: text("1m"),
            ..Limits::default()
        };
        assert_eq!(limits.resources().unwrap(), LinuxResources::default());
        let warning = "Setting --kernel-memory is ignored and will be removed";
        assert_eq!(limits.warnings(), [warning]);
    }

    #[test]
    fn resources_are_read_from_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.json");
        std::fs::write(&path, r#"{"cpu":{"shares":512},"foo":1} and more"#).unwrap();
        let read = |path: &std::path::Path| read(path.to_str().unwrap());
        let expected = resources(json!({"cpu": {"shares": 512}}));
        assert_eq!(read(&path).unwrap(), expected);
        for wrong in ["", "{", "[]", r#"{"cpu":{"shares":"x"}}"#] {
            std::fs::write(&path, wrong).unwrap();
            let message = read(&path).unwrap_err().message;
            assert!(
                message.starts_with("cannot read resources from /"),
                "{message}"
            );
        }
        let message = read(&directory.path().join("none")).unwrap_err().message;
        assert!(message.contains("No such file or directory"), "{message}");
    }

    #[test]
    fn endless_resources_are_not_read_to_their_end() {
        let error = from_json(std::io::repeat(b' '), "x").unwrap_err();
        assert!(error.message.contains("EOF"), "{}", error.message);
    }

    #[test]
    fn what_belongs_together_is_changed_together() {
        let current = resources(json!({
            "cpu": {"quota": 5000, "period": 10_000, "shares": 2},
            "memory": {"limit": 100, "swap": 200, "reservation": 50},
        }));
        let cases = [
            (
                json!({"cpu": {"period": 20_000}}),
                json!({"cpu": {"quota": 5000, "period": 20_000}}),
            ),
            (json!({"cpu": {"shares": 7}}), json!({"cpu": {"shares": 7}})),
            (
                json!({"memory": {"swap": 300}}),
                json!({"memory": {"limit": 100, "swap": 300}}),
            ),
            (
                json!({"memory": {"limit": -1}}),
                json!({"memory": {"limit": -1, "swap": -1}}),
            ),
            (
                json!({"memory": {"reservation": 1}}),
                json!({"memory": {"reservation": 1}}),
            ),
            (json!({}), json!({})),
        ];
        for (change, expected) in cases {
            let mut change = resources(change);
            complete(&mut change, &current);
            assert_eq!(change, resources(expected));
        }
    }

    #[test]
    fn changes_are_kept() {
        let current = resources(json!({"cpu": {"shares": 2, "cpus": "0"}, "pids": {"limit": 5}}));
        let change = resources(json!({"cpu": {"shares": 7}, "memory": {"limit": 100}}));
        let expected = resources(json!({
            "cpu": {"shares": 7, "cpus": "0"}, "pids": {"limit": 5}, "memory": {"limit": 100},
        }));
        assert_eq!(merge(&current, &change).unwrap(), expected);
    }
}
