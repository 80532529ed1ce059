//! Why a machine ended.

use std::fmt;

use hull_jail::{SignalName, Status};
use rustix::io::Errno;

/// Why a machine ended, according to the exit status of its process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off, or rebooted on a machine that does not reboot.
    PoweredOff,
    /// The guest kernel panicked. Not every kind reports it: see [`Exit::PoweredOff`].
    Panicked,
    /// A signal ended the machine process.
    Killed {
        /// Its number.
        signal: i32,
    },
    /// The machine process failed.
    Failed {
        /// Its exit code.
        code: i32,
    },
    /// The exit status cannot be read.
    Unknown {
        /// The error of waiting for it.
        errno: Errno,
    },
}

impl Exit {
    /// Interprets an exit status. `panicked` is the kind's exit code for a panic of the guest
    /// kernel.
    pub(crate) fn interpret(status: Result<Status, Errno>, panicked: Option<i32>) -> Self {
        match status {
            Ok(Status::Signal(signal)) => Self::Killed { signal },
            Ok(Status::Code(code)) if Some(code) == panicked => Self::Panicked,
            Ok(Status::Code(0)) => Self::PoweredOff,
            Ok(Status::Code(code)) => Self::Failed { code },
            Err(errno) => Self::Unknown { errno },
        }
    }

    /// The reason as one line, with details from the console's last lines (see
    /// [`crate::ConsoleRing::tail`]). The guest controls the console, so this is only for display:
    /// it adds detail where the status is ambiguous.
    pub fn describe(&self, console: &[String]) -> String {
        let panic = || {
            let mut lines = console.iter().rev();
            lines.find_map(|line| Some(line.split_once("Kernel panic - not syncing: ")?.1.trim()))
        };
        match self {
            Self::PoweredOff => match panic() {
                Some(why) => format!("guest kernel panic: {why}"),
                None => "the guest shut down".to_owned(),
            },
            Self::Panicked => match panic() {
                Some(why) => format!("guest kernel panic: {why}"),
                None => "guest kernel panic".to_owned(),
            },
            Self::Killed { signal } => {
                format!("the machine process was killed by {}", SignalName(*signal))
            }
            Self::Failed { code } => match console.last() {
                Some(last) => format!("the machine process failed (exit code {code}): {last}"),
                None => format!("the machine process failed (exit code {code})"),
            },
            Self::Unknown { errno } => format!("the machine process has ended ({errno})"),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe(&[]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[&str]) -> Vec<String> {
        text.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn the_status_alone_decides() {
        let interpret = |status| Exit::interpret(Ok(status), Some(127));
        assert_eq!(interpret(Status::Code(0)), Exit::PoweredOff);
        assert_eq!(interpret(Status::Code(127)), Exit::Panicked);
        assert_eq!(interpret(Status::Code(1)), Exit::Failed { code: 1 });
        assert_eq!(interpret(Status::Signal(9)), Exit::Killed { signal: 9 });
        let code = Exit::interpret(Ok(Status::Code(127)), None);
        assert_eq!(code, Exit::Failed { code: 127 });
    }

    #[test]
    fn console_text_completes_the_reason_and_never_replaces_a_signal() {
        let console = lines(&[
            "[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009",
            "---[ end",
        ]);
        for exit in [Exit::PoweredOff, Exit::Panicked] {
            assert_eq!(
                exit.describe(&console),
                "guest kernel panic: Attempted to kill init! exitcode=0x00000009"
            );
        }
        assert_eq!(
            Exit::Killed { signal: 9 }.describe(&console),
            "the machine process was killed by SIGKILL"
        );
    }

    #[test]
    fn reasons_are_one_line() {
        assert_eq!(
            Exit::PoweredOff.describe(&lines(&["Linux version 7"])),
            "the guest shut down"
        );
        assert_eq!(
            Exit::Killed { signal: 31 }.to_string(),
            "the machine process was killed by SIGSYS (a forbidden system call)"
        );
        assert_eq!(
            Exit::Failed { code: 1 }.describe(&lines(&["ptrace: Operation not permitted"])),
            "the machine process failed (exit code 1): ptrace: Operation not permitted"
        );
        assert_eq!(Exit::Panicked.to_string(), "guest kernel panic");
    }
}
