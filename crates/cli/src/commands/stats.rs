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
use crate::format::{self, ListFormat};
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
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
    /// Do not shorten ids
    #[arg(long)]
    no_trunc: bool,
    /// Also containers of podman, Docker and other engines, when no names are given
    #[arg(long)]
    all_engines: bool,
    /// Names or ids; without any, all running containers
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
}

struct Sample {
    /// As it was asked for.
    container: String,
    id: String,
    name: String,
    stats: Metrics,
    taken: Instant,
}

/// Prints metrics of containers once, or until interrupted.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let is_table = match &args.format {
        None => !args.json,
        Some(format) => matches!(format, ListFormat::Usual | ListFormat::Columns(_)),
    };
    let clear = !args.no_stream && is_table && std::io::stdout().is_terminal();
    if clear {
        output::print("\x1b[2J")?;
    }
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
            let fields = || rows.iter().map(|row| row.fields(args.no_trunc)).collect();
            let format = args.format.as_ref().unwrap_or(&ListFormat::Usual);
            let text = format::list(format, &HEADINGS, fields())?;
            let text = text.unwrap_or_else(|| table(&rows, args.no_trunc).render());
            output::print(match clear {
                true => redrawn(&text),
                false => text,
            })?;
        }
        if args.no_stream {
            return Ok(0);
        }
        before = now;
    }
}

/// The text over what was there before: line by line, so that nothing flickers.
fn redrawn(text: &str) -> String {
    format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

fn sample(paths: &Paths, args: &Args) -> Result<Vec<Sample>> {
    if !args.containers.is_empty() {
        return args
            .containers
            .iter()
            .map(|name| sample_one(&container::find_any(paths, name)?, Some(name)))
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
        .filter_map(|container| sample_one(container, None).ok())
        .collect())
}

fn sample_one(container: &Any, asked: Option<&str>) -> Result<Sample> {
    let request = Request::Metrics {
        container: container.id().to_owned(),
    };
    match container.connect()?.ask(&request, &[])?.message {
        Reply::Metrics(metrics) => Ok(Sample {
            container: asked.unwrap_or(container.id()).to_owned(),
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
    #[serde(skip)]
    container: &'a str,
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
        container: &sample.container,
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

/// The fields of `--format`, with the headings of a table.
const HEADINGS: [(&str, &str); 10] = [
    ("Container", "CONTAINER"),
    ("Name", "NAME"),
    ("ID", "CONTAINER ID"),
    ("CPUPerc", "CPU %"),
    ("MemUsage", "MEM USAGE / LIMIT"),
    ("MemPerc", "MEM %"),
    ("HostMem", "HOST MEM"),
    ("NetIO", "NET I/O"),
    ("BlockIO", "BLOCK I/O"),
    ("PIDs", "PIDS"),
];

impl Figures<'_> {
    /// Texts in the order of [`HEADINGS`].
    fn texts(&self, no_trunc: bool) -> [String; 10] {
        let stats = self.stats;
        let limit = stats.memory.limit.unwrap_or(stats.guest_memory_total);
        let (received, sent) = stats.network_bytes();
        let (read, written) = stats.io_bytes();
        let id = match no_trunc {
            true => self.id,
            false => self.id.get(..12).unwrap_or(self.id),
        };
        // Docker's short id where none was asked for.
        let container = if self.container == self.id {
            id
        } else {
            self.container
        };
        [
            container.to_owned(),
            self.name.to_owned(),
            id.to_owned(),
            format!("{:.2}%", self.cpu_percent),
            format!("{} / {}", binary_size(self.memory_used), binary_size(limit)),
            percent(self.memory_used as f64, limit as f64),
            binary_size(self.host_memory_total),
            format!("{} / {}", decimal_size(received), decimal_size(sent)),
            format!("{} / {}", decimal_size(read), decimal_size(written)),
            stats.pids.current.to_string(),
        ]
    }

    fn fields(&self, no_trunc: bool) -> format::Row {
        let texts = HEADINGS.iter().zip(self.texts(no_trunc));
        texts.fold(format::Row::new(), |row, ((name, _), text)| {
            row.field(name, text)
        })
    }
}

fn table(rows: &[Figures<'_>], no_trunc: bool) -> Table {
    let mut headings = HEADINGS.map(|(_, heading)| heading);
    headings.swap(1, 2);
    let mut table = Table::new(&headings[1..]);
    for row in rows {
        let mut texts = row.texts(no_trunc);
        texts.swap(1, 2);
        table.push(texts[1..].to_vec());
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
            container: "c".into(),
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
        let text = table(&[row], false).render();
        assert!(
            text.contains("50.00%   20MiB / 80MiB       25.00%"),
            "{text}"
        );
    }
}
