//! Processes, told apart from later ones of the same id by the time of their start.

use std::fs;

use serde::{Deserialize, Serialize};

/// A process of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its id; 0 for none.
    pub pid: i32,
    /// When it was started, in ticks since the host's boot (field 22 of proc_pid_stat(5)).
    pub started: u64,
}

impl ProcessId {
    /// A process that lives; `None` when there is none of this id.
    pub fn of(pid: i32) -> Option<Self> {
        let started = started(pid)?;
        Some(Self { pid, started })
    }

    /// This process.
    pub fn own() -> Self {
        let pid = std::process::id().cast_signed();
        // Only a host without /proc has no answer, on which nothing of hull works.
        Self::of(pid).unwrap_or(Self { pid, started: 0 })
    }

    /// Whether it still lives.
    pub fn lives(self) -> bool {
        self.pid > 0 && started(self.pid) == Some(self.started)
    }
}

fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything: the fields begin after the last parenthesis, with
    // the third.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    // A process that has ended and was not waited for yet is not there any more.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_of_the_same_id() {
        let own = ProcessId::own();
        assert!(own.started > 0 && own.lives());
        let later = ProcessId {
            started: own.started + 1,
            ..own
        };
        assert!(!later.lives());
        assert_eq!(ProcessId::of(i32::MAX), None);
        assert!(!ProcessId::default().lives());
    }
}
