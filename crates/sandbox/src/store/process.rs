//! Processes, told apart from later ones of the same id by the time of their start.

use std::fs;
use std::str::FromStr;

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

/// When a process was started. One that has ended and was not waited for yet is not there any more.
fn started(pid: i32) -> Option<u64> {
    let stat = ProcessStat::read(pid)?;
    (!matches!(stat.field(3)?, "Z" | "X")).then(|| stat.number(22))?
}

/// What the kernel says of a process: /proc/pid/stat, proc_pid_stat(5).
pub(crate) struct ProcessStat(String);

impl ProcessStat {
    /// `None` when there is no such process.
    pub fn read(pid: i32) -> Option<Self> {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .ok()
            .map(Self)
    }

    /// A field by its number in the manual, from the third on.
    fn field(&self, number: usize) -> Option<&str> {
        // The name in parentheses may hold anything: the third field comes after the last one.
        let (_, fields) = self.0.rsplit_once(')')?;
        fields.split_whitespace().nth(number.checked_sub(3)?)
    }

    /// The same for a field that is a number.
    pub fn number<T: FromStr>(&self, number: usize) -> Option<T> {
        self.field(number)?.parse().ok()
    }
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
