//! Memory of an idle container on the host: the proportional set size of all its processes, by
//! process.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::contestants::{Root, Setup};
use crate::report::{Better, Results};
use crate::{Options, all};

/// Measures one container and ten.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    for count in [1, 10] {
        let total = format!("memory: idle container, n = {count}");
        results.row(&total, "MB", Better::Lower);
        for role in ["sandbox", "devices", "machine"] {
            results.row(
                &format!("  of it {role} process, n = {count}"),
                "MB",
                Better::Lower,
            );
        }
        for contestant in all(setup) {
            for _ in 0..options.rounds(if contestant.is_slow() { 1 } else { 3 }) {
                let mut containers = Vec::new();
                for _ in 0..count {
                    containers.push(setup.start(contestant, Root::Busybox, None)?);
                }
                // Wait for deferred work of the start.
                sleep(Duration::from_secs(2));
                let children = children()?;
                let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
                for container in &containers {
                    let roots = container.processes()?;
                    for (role, pid) in &roots {
                        // The sandbox process is the parent of the others, which are counted
                        // separately.
                        let others: Vec<i64> = roots
                            .iter()
                            .map(|(_, other)| *other)
                            .filter(|other| other != pid)
                            .collect();
                        *sums.entry(role).or_default() += tree(*pid, &children, &others)?;
                    }
                }
                let each = |sum: f64| sum / f64::from(count);
                results.add(&total, contestant, each(sums.values().sum()));
                for (role, sum) in &sums {
                    if *role != "container" {
                        results.add(
                            &format!("  of it {role} process, n = {count}"),
                            contestant,
                            each(*sum),
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// Megabytes (10⁶) of a process and its descendants except `others`.
fn tree(pid: i64, children: &BTreeMap<i64, Vec<i64>>, others: &[i64]) -> Result<f64> {
    let mut sum = proportional(pid)?;
    for child in children
        .get(&pid)
        .into_iter()
        .flatten()
        .filter(|child| !others.contains(child))
    {
        sum += tree(*child, children, others)?;
    }
    Ok(sum)
}

/// Megabytes of one process, including its share of shared pages.
pub fn proportional(pid: i64) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    // A process that has just ended, or is a zombie, has no memory.
    let text = fs::read_to_string(path).unwrap_or_default();
    let Some(line) = text.lines().find(|line| line.starts_with("Pss:")) else {
        return Ok(0.0);
    };
    let kilobytes: f64 = line
        .split_whitespace()
        .nth(1)
        .context("Pss: has a number")?
        .parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// Parent → children, of all processes.
fn children() -> Result<BTreeMap<i64, Vec<i64>>> {
    let mut map: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The name, in parentheses, may contain anything.
        let Some((_, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        if let Some(Ok(parent)) = rest.split(' ').nth(1).map(str::parse) {
            map.entry(parent).or_default().push(pid);
        }
    }
    Ok(map)
}
