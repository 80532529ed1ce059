//! The lifecycle of a sandbox without a machine: tables of who dies when, what its callers are
//! told, what is written down, and when nothing is left. Times are milliseconds of paused time.
//!
//! | module | what |
//! | --- | --- |
//! | `fake` | plays the guest: machine, device process, agent |
//! | `breakdowns` | each way in which its processes die, in each phase |
//! | `endings` | stop, delete, shutdown, and what ends with the last container |
//! | `connections` | an agent that comes late, breaks its connection, or does not answer |

#![allow(clippy::unwrap_used, clippy::panic)]

mod breakdowns;
mod connections;
mod endings;
mod fake;

use std::time::Duration;

use serde_json::value::RawValue;

use crate::config::{ProcessConfig, Stdio};

/// Ticks that sockets may take: each message costs one at most.
const HOPS: u64 = 25;

/// Longer than anything takes.
const FOREVER: Duration = Duration::from_secs(1000);

fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap()
}

fn process(container: &str) -> ProcessConfig {
    ProcessConfig {
        container: container.to_owned(),
        process: empty(),
        raw: Default::default(),
        stdio: Stdio::Null,
        keeper: None,
        size: None,
    }
}

/// Runs the cases of a table, and reports all that fail.
async fn each<C: std::fmt::Debug>(cases: &[C], run: impl AsyncFn(&C) -> Result<(), String>) {
    let mut failures = Vec::new();
    for case in cases {
        if let Err(what) = run(case).await {
            failures.push(format!("{case:?}:\n    {what}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Whether something took as long as it may.
fn took(milliseconds: u64, expected: u64, tick: u64) -> Result<(), String> {
    let range = expected..=expected + HOPS * tick;
    match range.contains(&milliseconds) {
        true => Ok(()),
        false => Err(format!("it took {milliseconds} ms, not {range:?}")),
    }
}

/// Whether something is as it should be.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, expected: T) -> Result<(), String> {
    match is == expected {
        true => Ok(()),
        false => Err(format!("{what}: {is:?}, not {expected:?}")),
    }
}
