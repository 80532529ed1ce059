//! The lines that `events` prints: field names and units are those that engines expect from runc.
//!
//! Metrics that the guest does not report are left out, as runc leaves out zeros.

use hull_sandbox::metrics::{IoDevice, Metrics, Network, Pressure, PressureLine};
use serde_json::{Value, json};

/// The event that `events --stats` prints.
pub fn event(id: &str, stats: &Metrics) -> Value {
    json!({ "type": "stats", "id": id, "data": data(stats) })
}

/// The event of an OOM kill.
pub fn oom(id: &str) -> Value {
    json!({ "type": "oom", "id": id })
}

fn data(stats: &Metrics) -> Value {
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    json!({
        "cpu": {
            "usage": {
                "total": cpu.usage_ns,
                "kernel": cpu.system_ns,
                "user": cpu.user_ns,
            },
            "throttling": {
                "periods": cpu.periods.unwrap_or(0),
                "throttledPeriods": cpu.throttled_periods.unwrap_or(0),
                "throttledTime": cpu.throttled_ns.unwrap_or(0),
            },
            "psi": pressure(cpu.pressure.as_ref()),
        },
        "memory": {
            "usage": {
                // runc reports the largest number if there is no limit.
                "limit": memory.limit.unwrap_or(u64::MAX),
                "usage": memory.usage,
                "max": memory.peak.unwrap_or(0),
                "failcnt": memory.max_events,
            },
            "swap": {
                "limit": memory.swap_limit.unwrap_or(0),
                "usage": memory.swap_usage.unwrap_or(0),
                "failcnt": 0,
            },
            // Included in the container's memory by the guest's kernel.
            "kernel": { "limit": 0, "failcnt": 0 },
            "kernelTCP": { "limit": 0, "failcnt": 0 },
            "raw": memory.stat,
            "psi": pressure(memory.pressure.as_ref()),
        },
        "pids": { "current": stats.pids.current, "limit": stats.pids.limit.unwrap_or(0) },
        "blkio": block_io(stats),
        "hugetlb": hugetlb(stats),
        "intel_rdt": {},
        "network_interfaces": network(stats),
    })
}

/// Pressure, in percent and microseconds.
fn pressure(pressure: Option<&Pressure>) -> Value {
    let percent = |hundredths: u32| f64::from(hundredths) / 100.0;
    let line = |line: &PressureLine| {
        json!({
            "avg10": percent(line.avg10),
            "avg60": percent(line.avg60),
            "avg300": percent(line.avg300),
            "total": line.total_ns / 1000,
        })
    };
    match pressure {
        Some(pressure) => json!({ "some": line(&pressure.some), "full": line(&pressure.full) }),
        None => Value::Null,
    }
}

/// Per device, with the guest's device numbers, which mean nothing on the host.
fn block_io(stats: &Metrics) -> Value {
    if stats.io.devices.is_empty() {
        return json!({ "psi": pressure(stats.io.pressure.as_ref()) });
    }
    let entries = |read: fn(&IoDevice) -> u64, write: fn(&IoDevice) -> u64| -> Vec<Value> {
        let of = |device: &IoDevice, op, value| {
            let (major, minor) = (device.major, device.minor);
            json!({ "major": major, "minor": minor, "op": op, "value": value })
        };
        let devices = stats.io.devices.iter();
        devices
            .flat_map(|device| {
                [
                    of(device, "Read", read(device)),
                    of(device, "Write", write(device)),
                ]
            })
            .collect()
    };
    json!({
        "ioServiceBytesRecursive": entries(|io| io.read_bytes, |io| io.write_bytes),
        "ioServicedRecursive": entries(|io| io.reads, |io| io.writes),
        "psi": pressure(stats.io.pressure.as_ref()),
    })
}

/// Per page size.
fn hugetlb(stats: &Metrics) -> Value {
    let sizes = stats.hugetlb.iter().map(|pages| {
        let usage = json!({ "usage": pages.usage, "failcnt": pages.max_events });
        (pages.page_size.clone(), usage)
    });
    Value::Object(sizes.collect())
}

/// All interfaces except loopback.
fn network(stats: &Metrics) -> Value {
    if stats.network.is_empty() {
        return Value::Null;
    }
    let interface = |one: &Network| {
        json!({
            "Name": one.name,
            "RxBytes": one.receive_bytes,
            "RxPackets": one.receive_packets,
            "RxErrors": one.receive_errors,
            "RxDropped": one.receive_dropped,
            "TxBytes": one.transmit_bytes,
            "TxPackets": one.transmit_packets,
            "TxErrors": one.transmit_errors,
            "TxDropped": one.transmit_dropped,
        })
    };
    stats.network.iter().map(interface).collect()
}

#[cfg(test)]
mod tests {
    use hull_sandbox::metrics::{Cpu, Io, Memory, MemoryStat, Pids};

    use super::*;

    #[test]
    fn figures_have_runcs_names_and_units() {
        let stats = Metrics {
            cpu: Cpu {
                usage_ns: 30,
                user_ns: 20,
                system_ns: 10,
                periods: Some(7),
                throttled_periods: Some(6),
                throttled_ns: Some(5),
                pressure: Some(Pressure {
                    some: PressureLine {
                        avg10: 150,
                        total_ns: 9000,
                        ..PressureLine::default()
                    },
                    ..Pressure::default()
                }),
            },
            memory: Memory {
                usage: 4096,
                limit: Some(8192),
                peak: Some(5000),
                max_events: 2,
                stat: MemoryStat {
                    inactive_file: 100,
                    ..MemoryStat::default()
                },
                ..Memory::default()
            },
            pids: Pids {
                current: 3,
                limit: Some(10),
            },
            io: Io {
                devices: vec![IoDevice {
                    major: 254,
                    read_bytes: 7,
                    write_bytes: 8,
                    ..IoDevice::default()
                }],
                ..Io::default()
            },
            network: vec![Network {
                name: "eth0".into(),
                receive_bytes: 1,
                transmit_bytes: 2,
                ..Network::default()
            }],
            ..Metrics::default()
        };
        let event = event("c1", &stats);
        assert_eq!(event["type"], "stats");
        assert_eq!(event["id"], "c1");
        let data = &event["data"];
        assert_eq!(
            data["cpu"]["usage"],
            json!({"total": 30, "kernel": 10, "user": 20})
        );
        assert_eq!(
            data["cpu"]["throttling"],
            json!({"periods": 7, "throttledPeriods": 6, "throttledTime": 5})
        );
        assert_eq!(data["cpu"]["psi"]["some"]["avg10"], 1.5);
        assert_eq!(data["cpu"]["psi"]["some"]["total"], 9);
        let usage = json!({"limit": 8192, "usage": 4096, "max": 5000, "failcnt": 2});
        assert_eq!(data["memory"]["usage"], usage);
        assert_eq!(data["memory"]["raw"]["inactive_file"], 100);
        assert_eq!(data["pids"], json!({"current": 3, "limit": 10}));
        let written = &data["blkio"]["ioServiceBytesRecursive"][1];
        assert_eq!(
            written,
            &json!({"major": 254, "minor": 0, "op": "Write", "value": 8})
        );
        assert_eq!(data["network_interfaces"][0]["Name"], "eth0");
        assert_eq!(data["network_interfaces"][0]["TxBytes"], 2);
    }

    #[test]
    fn nothing_known_is_nothing_said() {
        let event = event("c1", &Metrics::default());
        let data = &event["data"];
        assert_eq!(data["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(data["blkio"], json!({"psi": null}));
        assert_eq!(data["network_interfaces"], Value::Null);
    }

    #[test]
    fn an_event_of_memory_has_no_data() {
        assert_eq!(oom("c1"), json!({"type": "oom", "id": "c1"}));
    }
}
