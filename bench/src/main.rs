//! `make bench`: hull beside runc, on one machine, in one run.
//!
//! Everything is measured in rounds, with a turn for every contestant in each, so that a
//! temporarily busy machine affects all. The result is the median, with the number of rounds. The
//! first round warms the caches and does not count.
//!
//! Calls the staged `hull`, `runc`, `fio`, `iperf3` and `wrk` like a user, independent of hull's
//! internals. Results: a table on standard output; and with every single value as JSON and as a
//! picture, in `bench/results`.

mod containerd;
mod contestants;
mod files;
mod measure;
mod memory;
mod network;
mod oci;
mod pods;
mod report;
mod svg;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::contestants::{Contestant, Setup};
use crate::report::Results;

/// Options of the command line.
pub struct Options {
    /// Fewer rounds: to test the bench, not for publishable numbers.
    pub quick: bool,
    /// Groups to measure; all if empty.
    pub only: Vec<String>,
    /// Kinds of machine to measure; all that work if empty.
    pub machines: Vec<String>,
    /// The repository.
    pub repository: PathBuf,
}

impl Options {
    /// Whether one of these groups is measured.
    pub fn wants_any_of(&self, groups: &[&str]) -> bool {
        let wanted =
            |group: &&str| self.only.is_empty() || self.only.iter().any(|only| only == group);
        groups.iter().any(wanted)
    }

    /// Number of rounds, fewer if quick.
    pub fn rounds(&self, usual: usize) -> usize {
        if self.quick { usual.min(2) } else { usual }
    }
}

/// The groups, in the order of measurement.
const GROUPS: [&str; 9] = [
    "start",
    "exec",
    "oci",
    "containerd",
    "pods",
    "memory",
    "cpu",
    "files",
    "network",
];

fn main() -> Result<()> {
    let options = options()?;
    if !rustix::process::geteuid().is_root() {
        bail!("hull runs containers as root only, for now: sudo make bench");
    }
    let setup = Setup::prepare(&options)?;
    let mut results = Results::new(&setup)?;
    for group in GROUPS {
        if !options.wants_any_of(&[group]) {
            continue;
        }
        eprintln!("==> measuring: {group}");
        match group {
            "start" => measure::start(&options, &setup, &mut results),
            "exec" => measure::exec(&options, &setup, &mut results),
            "oci" => oci::measure(&options, &setup, &mut results),
            "containerd" => containerd::measure(&options, &setup, &mut results),
            "pods" => pods::measure(&options, &setup, &mut results),
            "memory" => memory::measure(&options, &setup, &mut results),
            "cpu" => measure::cpu(&options, &setup, &mut results),
            "network" => network::measure(&options, &setup, &mut results),
            _ => files::measure(&options, &setup, &mut results),
        }
        .with_context(|| format!("measuring {group}"))?;
    }
    print!("{}", results.table());
    results.store(&options)
}

fn options() -> Result<Options> {
    let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let mut options = Options {
        quick: false,
        only: Vec::new(),
        machines: Vec::new(),
        repository,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--only" => {
                let groups = arguments.next().context("--only: which groups?")?;
                options.only = groups.split(',').map(str::to_owned).collect();
                if let Some(wrong) = options
                    .only
                    .iter()
                    .find(|group| !GROUPS.contains(&group.as_str()))
                {
                    bail!("--only {wrong}: one of {}", GROUPS.join(", "));
                }
            }
            "--machine" => options
                .machines
                .push(arguments.next().context("--machine: which kind?")?),
            _ => bail!(
                "usage: hull-bench [--quick] [--machine KIND]... [--only {}]",
                GROUPS.join(",")
            ),
        }
    }
    Ok(options)
}

/// All contestants of a measurement, runc first, as the reference.
pub fn all(setup: &Setup) -> Vec<Contestant> {
    let mut all = vec![Contestant::Runc];
    all.extend(
        setup
            .machines
            .iter()
            .map(|machine| Contestant::Hull(machine)),
    );
    all
}
