//! Figures of a container, in Docker's words.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hull_engine::container::{self, Container};
use hull_engine::time;
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply as Answered, Request};
use hull_sandbox::metrics::Metrics;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};

use super::find;
use crate::Shared;
use crate::call::{Call, JSON, Reply};
use crate::failure::Result;

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// Figures at one time.
struct Sample {
    metrics: Metrics,
    /// Processor time of the host, nanoseconds.
    host_ns: u64,
    at: i128,
}

fn sample(container: &Container) -> Result<Sample> {
    let request = Request::Metrics {
        container: container.record.id.clone(),
    };
    match container::connect(container)?.ask(&request, &[])?.message {
        Answered::Metrics(metrics) => Ok(Sample {
            metrics: *metrics,
            host_ns: host_ns(),
            at: now(),
        }),
        other => Err(unexpected(&other).into()),
    }
}

fn now() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i128)
}

/// What the host's processors have been through since its boot: the first line of /proc/stat
/// (proc(5)), in hundredths of a second.
fn host_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = text.lines().next().unwrap_or_default().split_whitespace();
    // Without guest times, which user time has already.
    let ticks: u64 = ticks.skip(1).take(8).flat_map(str::parse::<u64>).sum();
    ticks.saturating_mul(10_000_000)
}

/// Sends figures once, or every second until the container ends.
pub fn stats(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let streams = call.query.flag_or("stream", true);
    let one_shot = call.query.flag("one-shot");
    if container::is_idle(&container) {
        return Ok(Reply::ok(object(&container, None, None)));
    }
    let first = sample(&container)?;
    if !streams {
        let (before, now) = match one_shot {
            true => (None, first),
            false => {
                std::thread::sleep(INTERVAL);
                (Some(first), sample(&container)?)
            }
        };
        return Ok(Reply::ok(object(&container, before.as_ref(), Some(&now))));
    }
    let mut stream = call.stream(JSON)?;
    let mut before = None;
    let mut now = first;
    loop {
        // Fails when the caller has gone.
        if stream
            .line(&object(&container, before.as_ref(), Some(&now)))
            .is_err()
        {
            return Ok(Reply::Taken);
        }
        let mut caller = [PollFd::new(&stream, PollFlags::empty())];
        let timeout = Timespec {
            tv_sec: INTERVAL.as_secs() as _,
            tv_nsec: 0,
        };
        let _ = poll(&mut caller, Some(&timeout));
        if !caller[0].revents().is_empty() {
            return Ok(Reply::Taken);
        }
        // Fails when it has ended.
        let Ok(next) = sample(&container) else {
            stream.finish();
            return Ok(Reply::Taken);
        };
        before = Some(std::mem::replace(&mut now, next));
    }
}

fn object(container: &Container, before: Option<&Sample>, now: Option<&Sample>) -> Value {
    let at = |sample: Option<&Sample>| match sample {
        Some(sample) => time::format_rfc3339(sample.at),
        None => "0001-01-01T00:00:00Z".to_owned(),
    };
    let mut object = json!({
        "name": format!("/{}", container.record.details.name),
        "id": container.record.id,
        "read": at(now),
        "preread": at(before),
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": processors(container, now),
        "precpu_stats": processors(container, before),
        "memory_stats": {},
        "pids_stats": {},
        "blkio_stats": {},
    });
    let Some(Sample { metrics, .. }) = now else {
        return object;
    };
    let memory = &metrics.memory;
    object["memory_stats"] = json!({
        "usage": memory.usage,
        "limit": memory.limit.unwrap_or(metrics.guest_memory_total),
        "stats": memory.stat,
    });
    object["pids_stats"] = json!({"current": metrics.pids.current, "limit": metrics.pids.limit});
    let bytes = metrics.io.devices.iter().flat_map(|device| {
        [("read", device.read_bytes), ("write", device.write_bytes)].map(|(operation, value)| {
            json!({
                "major": device.major,
                "minor": device.minor,
                "op": operation,
                "value": value,
            })
        })
    });
    object["blkio_stats"] = json!({"io_service_bytes_recursive": bytes.collect::<Vec<_>>()});
    let networks: Map<String, Value> = metrics
        .network
        .iter()
        .map(|network| {
            let figures = json!({
                "rx_bytes": network.receive_bytes,
                "rx_packets": network.receive_packets,
                "rx_errors": network.receive_errors,
                "rx_dropped": network.receive_dropped,
                "tx_bytes": network.transmit_bytes,
                "tx_packets": network.transmit_packets,
                "tx_errors": network.transmit_errors,
                "tx_dropped": network.transmit_dropped,
            });
            (network.name.clone(), figures)
        })
        .collect();
    object["networks"] = Value::Object(networks);
    object
}

fn processors(container: &Container, sample: Option<&Sample>) -> Value {
    let Some(Sample {
        metrics, host_ns, ..
    }) = sample
    else {
        return json!({
            "cpu_usage": {
                "total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0,
            },
            "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
        });
    };
    let cpu = &metrics.cpu;
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    json!({
        "cpu_usage": {
            "total_usage": cpu.usage_ns,
            "usage_in_kernelmode": cpu.system_ns,
            "usage_in_usermode": cpu.user_ns,
        },
        "system_cpu_usage": host_ns,
        // Clients divide by the time of the host's.
        "online_cpus": host_cpus.max(container.record.details.cpus as usize),
        "throttling_data": {
            "periods": cpu.periods.unwrap_or(0),
            "throttled_periods": cpu.throttled_periods.unwrap_or(0),
            "throttled_time": cpu.throttled_ns.unwrap_or(0),
        },
    })
}
