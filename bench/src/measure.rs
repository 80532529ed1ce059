//! Times: start, ten parallel starts, exec, computing.

use std::process::Child;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::contestants::{Root, Setup};
use crate::report::{Better, Results};
use crate::{Options, all};

/// Number of parallel starts.
const AT_ONCE: usize = 10;

/// `run --rm IMAGE true`, one and ten in parallel.
pub fn start(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let name = "start: run --rm IMAGE true";
    results.row(name, "ms", Better::Lower);
    for round in 0..=options.rounds(30) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > options.rounds(6) {
                continue;
            }
            let mut command = setup.once(contestant, &["true"])?;
            let begin = Instant::now();
            let status = command.status()?;
            let took = begin.elapsed();
            if !status.success() {
                bail!("{}: {status}", contestant.name());
            }
            if round > 0 {
                results.add(name, contestant, took.as_secs_f64() * 1e3);
            }
        }
    }
    let name = "start: 10 at once, until the last has ended";
    results.row(name, "ms", Better::Lower);
    for round in 0..=options.rounds(5) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > options.rounds(2) {
                continue;
            }
            let mut commands = Vec::new();
            for _ in 0..AT_ONCE {
                commands.push(setup.once(contestant, &["true"])?);
            }
            let begin = Instant::now();
            let children = commands
                .iter_mut()
                .map(|command| command.spawn())
                .collect::<Result<Vec<Child>, _>>()?;
            for mut child in children {
                let status = child.wait()?;
                if !status.success() {
                    bail!("{}: {status}", contestant.name());
                }
            }
            if round > 0 {
                results.add(name, contestant, begin.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    Ok(())
}

/// `exec CONTAINER true`.
pub fn exec(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let name = "exec: true in a running container";
    results.row(name, "ms", Better::Lower);
    let mut containers = Vec::new();
    for contestant in all(setup) {
        containers.push((contestant, setup.start(contestant, Root::Busybox, None)?));
    }
    for round in 0..=options.rounds(30) {
        for (contestant, container) in &containers {
            let begin = Instant::now();
            let status = container.exec(&["true"]).status()?;
            let took = begin.elapsed();
            if !status.success() {
                bail!("{}: {status}", contestant.name());
            }
            if round > 0 {
                results.add(name, *contestant, took.as_secs_f64() * 1e3);
            }
        }
    }
    Ok(())
}

/// Costs of the processor and of system calls.
pub fn cpu(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let works = [
        ("cpu: integer loop", "cpu", "s", 1.0),
        ("cpu: system call (getppid)", "syscalls", "µs", 5.0),
        ("cpu: fork, exit, wait", "forks", "ms", 1.0),
    ];
    for (name, _, unit, _) in works {
        results.row(name, unit, Better::Lower);
    }
    for round in 0..options.rounds(3) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > 0 {
                continue;
            }
            let container = setup.start(contestant, Root::Tools, None)?;
            for (name, work, _, factor) in works {
                // Seconds for 200,000 calls times five are microseconds per call; for a thousand
                // forks, seconds are milliseconds per fork.
                for seconds in container.seconds(&["work", work])? {
                    results.add(name, contestant, seconds * factor);
                }
            }
        }
    }
    Ok(())
}
