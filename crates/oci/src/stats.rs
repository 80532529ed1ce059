//! The lines that `events` prints: field names and units are runc's, which engines decode.
//!
//! A figure that the guest does not report is left out, as runc leaves out what is zero, instead of being guessed.

use hull_sandbox::metrics::Metrics;
use serde_json::{Value, json};

/// The event that `events --stats` prints.
pub fn event(id: &str, stats: &Metrics) -> Value {
    json!({ "type": "stats", "id": id, "data": data(stats) })
}

/// The event of a process that the kernel killed for lack of memory.
pub fn oom(id: &str) -> Value {
    json!({ "type": "oom", "id": id })
}

fn data(stats: &Metrics) -> Value {
    // Without a limit the guest says 0, and runc the largest number.
    let memory_limit = match stats.memory_limit {
        0 => u64::MAX,
        limit => limit,
    };
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds(stats.cpu_usage_us),
                "kernel": nanoseconds(stats.cpu_system_us),
                "user": nanoseconds(stats.cpu_user_us),
            },
            "throttling": { "throttledTime": nanoseconds(stats.cpu_throttled_us) },
        },
        "memory": {
            "usage": {
                "limit": memory_limit,
                "usage": stats.memory_usage,
                "max": stats.memory_peak,
                "failcnt": 0,
            },
            // A guest has no swap, and its kernel counts what is its own as the container's.
            "swap": { "limit": 0, "failcnt": 0 },
            "kernel": { "limit": 0, "failcnt": 0 },
            "kernelTCP": { "limit": 0, "failcnt": 0 },
            "raw": { "inactive_file": stats.memory_inactive_file },
        },
        "pids": { "current": stats.pids_current, "limit": stats.pids_limit },
        "blkio": block_io(stats),
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": network(stats),
    })
}

fn nanoseconds(microseconds: u64) -> u64 {
    microseconds.saturating_mul(1000)
}

/// Of all devices together: the guest's have numbers that mean nothing on the host.
fn block_io(stats: &Metrics) -> Value {
    if stats.io_read_bytes == 0 && stats.io_write_bytes == 0 {
        return json!({});
    }
    json!({
        "ioServiceBytesRecursive": [
            { "op": "Read", "value": stats.io_read_bytes },
            { "op": "Write", "value": stats.io_write_bytes },
        ],
    })
}

/// All interfaces but the loopback one, as one.
fn network(stats: &Metrics) -> Value {
    let (received, sent) = (stats.network_receive_bytes, stats.network_transmit_bytes);
    if received == 0 && sent == 0 {
        return Value::Null;
    }
    json!([{ "Name": "all", "RxBytes": received, "TxBytes": sent }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_runcs_names_and_units() {
        let stats = Metrics {
            cpu_usage_us: 30,
            cpu_user_us: 20,
            cpu_system_us: 10,
            cpu_throttled_us: 5,
            memory_usage: 4096,
            memory_limit: 8192,
            memory_inactive_file: 100,
            memory_peak: 5000,
            pids_current: 3,
            pids_limit: 10,
            io_read_bytes: 7,
            io_write_bytes: 8,
            network_receive_bytes: 1,
            network_transmit_bytes: 2,
            ..Metrics::default()
        };
        let event = event("c1", &stats);
        assert_eq!(event["type"], "stats");
        assert_eq!(event["id"], "c1");
        let data = &event["data"];
        assert_eq!(
            data["cpu"]["usage"],
            json!({"total": 30_000, "kernel": 10_000, "user": 20_000})
        );
        assert_eq!(data["cpu"]["throttling"]["throttledTime"], 5000);
        let usage = json!({"limit": 8192, "usage": 4096, "max": 5000, "failcnt": 0});
        assert_eq!(data["memory"]["usage"], usage);
        assert_eq!(data["memory"]["raw"]["inactive_file"], 100);
        assert_eq!(data["pids"], json!({"current": 3, "limit": 10}));
        let written = &data["blkio"]["ioServiceBytesRecursive"][1];
        assert_eq!(written, &json!({"op": "Write", "value": 8}));
        let interfaces = json!([{"Name": "all", "RxBytes": 1, "TxBytes": 2}]);
        assert_eq!(data["network_interfaces"], interfaces);
    }

    #[test]
    fn nothing_known_is_nothing_said() {
        let event = event("c1", &Metrics::default());
        let data = &event["data"];
        assert_eq!(data["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(data["blkio"], json!({}));
        assert_eq!(data["network_interfaces"], Value::Null);
    }

    #[test]
    fn large_figures_do_not_wrap() {
        let stats = Metrics {
            cpu_usage_us: u64::MAX,
            ..Metrics::default()
        };
        assert_eq!(
            event("c1", &stats)["data"]["cpu"]["usage"]["total"],
            u64::MAX
        );
    }

    #[test]
    fn an_event_of_memory_has_no_data() {
        assert_eq!(oom("c1"), json!({"type": "oom", "id": "c1"}));
    }
}
