//! `hull stats`: what containers use in the guest, and what their machines cost the host.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hull_engine::Paths;
use hull_engine::container::{self, Any};
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::metrics::Metrics;
use hull_sandbox::store::State;
use serde::Serialize;

use super::config_for_existing;
use crate::error::{Error, Result};
use crate::output::{self, Table, binary_size, decimal_size, percent};

/// Time between samples: the CPU share is what was used in between.
const INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `stats`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print once instead of again and again
    #[arg(long)]
    no_stream: bool,
    /// Print JSON, one line each time
    #[arg(long)]
    json: bool,
    /// Also containers of podman, Docker and other engines, when no names are given
    #[arg(long)]
    all_engines: bool,
    /// Names or ids; without any, all running containers
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
}

struct Sample {
    id: String,
    name: String,
    stats: Metrics,
    taken: Instant,
}

/// Prints metrics of containers once, or until interrupted.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let clear = !args.no_stream && !args.json && std::io::stdout().is_terminal();
    let mut before = sample(&paths, &args)?;
    loop {
        std::thread::sleep(INTERVAL);
        let now = sample(&paths, &args)?;
        let rows: Vec<Figures<'_>> = now.iter().map(|sample| figures(sample, &before)).collect();
        if args.json {
            let mut line = serde_json::to_string(&rows)
                .map_err(|error| Error::new(format!("cannot write JSON: {error}")))?;
            line.push('\n');
            output::print(line)?;
        } else {
            let table = table(&rows).render();
            let begin = if clear { "\x1b[H\x1b[2J" } else { "" };
            output::print(format!("{begin}{table}"))?;
        }
        if args.no_stream {
            return Ok(0);
        }
        before = now;
    }
}

fn sample(paths: &Paths, args: &Args) -> Result<Vec<Sample>> {
    if !args.containers.is_empty() {
        return args
            .containers
            .iter()
            .map(|name| sample_one(&container::find_any(paths, name)?))
            .collect();
    }
    let own = container::list(paths)?.into_iter().flatten();
    let mut all: Vec<Any> = own.map(|own| Any::Own(Box::new(own))).collect();
    if args.all_engines {
        let engines = container::engines(paths).into_iter().flatten();
        all.extend(engines.map(|other| Any::Engine(Box::new(other))));
    }
    // A container that exits meanwhile is not shown.
    Ok(all
        .iter()
        .filter(|container| matches!(container.state(), State::Running | State::Paused))
        .filter_map(|container| sample_one(container).ok())
        .collect())
}

fn sample_one(container: &Any) -> Result<Sample> {
    let request = Request::Metrics {
        container: container.id().to_owned(),
    };
    match container.connect()?.ask(&request, &[])?.message {
        Reply::Metrics(metrics) => Ok(Sample {
            id: container.id().to_owned(),
            name: container.name().to_owned(),
            stats: *metrics,
            taken: Instant::now(),
        }),
        other => Err(unexpected(&other)),
    }
}

/// Metrics of a container in the output.
#[derive(Serialize)]
struct Figures<'a> {
    id: &'a str,
    name: &'a str,
    /// Share of one CPU, percent.
    cpu_percent: f64,
    /// Without reclaimable page cache, as in Docker.
    memory_used: u64,
    host_memory_total: u64,
    #[serde(flatten)]
    stats: &'a Metrics,
}

fn figures<'a>(sample: &'a Sample, before: &[Sample]) -> Figures<'a> {
    let previous = before.iter().find(|other| other.id == sample.id);
    let cpu_percent = previous.map_or(0.0, |previous| {
        let used = sample
            .stats
            .cpu
            .usage_ns
            .saturating_sub(previous.stats.cpu.usage_ns);
        let time = sample.taken.duration_since(previous.taken).as_nanos();
        used as f64 / time.max(1) as f64 * 100.0
    });
    let stats = &sample.stats;
    Figures {
        id: &sample.id,
        name: &sample.name,
        cpu_percent,
        memory_used: stats
            .memory
            .usage
            .saturating_sub(stats.memory.stat.inactive_file),
        host_memory_total: stats.host_memory.total(),
        stats,
    }
}

fn table(rows: &[Figures<'_>]) -> Table {
    let mut table = Table::new(&[
        "CONTAINER ID",
        "NAME",
        "CPU %",
        "MEM USAGE / LIMIT",
        "MEM %",
        "HOST MEM",
        "NET I/O",
        "BLOCK I/O",
        "PIDS",
    ]);
    for row in rows {
        let stats = row.stats;
        let limit = stats.memory.limit.unwrap_or(stats.guest_memory_total);
        let (received, sent) = stats.network_bytes();
        let (read, written) = stats.io_bytes();
        table.row([
            row.id.get(..12).unwrap_or(row.id).to_owned(),
            row.name.to_owned(),
            format!("{:.2}%", row.cpu_percent),
            format!("{} / {}", binary_size(row.memory_used), binary_size(limit)),
            percent(row.memory_used as f64, limit as f64),
            binary_size(row.host_memory_total),
            format!("{} / {}", decimal_size(received), decimal_size(sent)),
            format!("{} / {}", decimal_size(read), decimal_size(written)),
            stats.pids.current.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_sandbox::metrics::{Cpu, Memory, MemoryStat};

    use super::*;

    #[test]
    fn processor_share_and_memory() {
        let taken = Instant::now();
        let sample = |usage_ns, taken| Sample {
            id: "c".into(),
            name: "c".into(),
            stats: Metrics {
                cpu: Cpu {
                    usage_ns,
                    ..Cpu::default()
                },
                memory: Memory {
                    usage: 30 << 20,
                    stat: MemoryStat {
                        inactive_file: 10 << 20,
                        ..MemoryStat::default()
                    },
                    ..Memory::default()
                },
                guest_memory_total: 80 << 20,
                ..Metrics::default()
            },
            taken,
        };
        let before = [sample(0, taken)];
        let now = sample(500_000_000, taken + INTERVAL);
        let row = figures(&now, &before);
        assert!((row.cpu_percent - 50.0).abs() < 0.01);
        let text = table(&[row]).render();
        assert!(
            text.contains("50.00%   20MiB / 80MiB       25.00%"),
            "{text}"
        );
    }
}
