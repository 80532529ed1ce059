//! Which of a guest's two processes failed, judged by how they ended.
//!
//! Machine and devices end together: a machine without devices cannot go on, and the device process
//! exits with code 0 when the machine closes its connections. So when one end has been seen, the
//! other one is near, and which is the cause is in the exit statuses. [`supervise`] has no clock
//! and no processes; [`super::processes`] watches those and waits where it is told to.

use hull_jail::{SignalName, Status};
use hull_machine::{Exit, ProcessRole};
use rustix::io::Errno;

/// How the processes have ended, as far as that has been seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// The machine; `None` while it runs.
    pub machine: Option<Exit>,
    /// The device process; `None` while it runs. The error is that of waiting for it.
    pub devices: Option<Result<Status, Errno>>,
    /// Whose end was seen first, unless both were seen at once.
    pub first: Option<ProcessRole>,
    /// There is no device process: the machine process has the devices.
    pub own_devices: bool,
}

/// What is known of the end of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Both processes run.
    Running,
    /// The end of this process, if it follows, can change the reason.
    WaitFor(ProcessRole),
    /// This is the reason.
    Ended(Reason),
}

/// Why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The machine ended.
    Machine(Exit),
    /// The device process failed.
    Devices(Result<Status, Errno>),
    /// The machine has closed the connections to its devices, and runs.
    Detached,
}

/// Judges what has been seen. `waited`: the process that [`Verdict::WaitFor`] named has had its
/// time.
pub fn supervise(ends: &Ends, waited: bool) -> Verdict {
    let wait = |role, reason| match waited {
        true => Verdict::Ended(reason),
        false => Verdict::WaitFor(role),
    };
    match (&ends.machine, ends.devices) {
        (None, None) => Verdict::Running,
        (Some(exit), _) if ends.own_devices => Verdict::Ended(Reason::Machine(exit.clone())),
        // The regular end of a device process: the machine has left, or is about to end.
        (None, Some(Ok(Status::Code(0)))) => wait(ProcessRole::Machine, Reason::Detached),
        (Some(exit), Some(Ok(Status::Code(0)))) => Verdict::Ended(Reason::Machine(exit.clone())),
        // A signal is not an effect of what the device process does.
        (Some(exit @ Exit::Killed { .. }), devices)
            if devices.is_none() || ends.first == Some(ProcessRole::Machine) =>
        {
            Verdict::Ended(Reason::Machine(exit.clone()))
        }
        // It does not fail because a machine ended.
        (_, Some(status)) => Verdict::Ended(Reason::Devices(status)),
        // A guest that loses its devices ends in any of these ways.
        (Some(exit), None) => wait(ProcessRole::Devices, Reason::Machine(exit.clone())),
    }
}

impl Reason {
    /// The reason as one line for people. `console`: the last lines of the guest's console;
    /// `diagnostics`: the last message of the process that has the devices, if it left one.
    pub fn describe(&self, console: &[String], diagnostics: Option<&str>) -> String {
        match self {
            // A machine that is hull's own says itself why it failed.
            Self::Machine(exit @ Exit::Failed { .. }) => match diagnostics {
                Some(message) => message.trim_start_matches("error: ").to_owned(),
                None => exit.describe(console),
            },
            Self::Machine(exit) => exit.describe(console),
            Self::Devices(Ok(Status::Signal(signal))) => {
                format!("the device process was killed by {}", SignalName(*signal))
            }
            Self::Devices(Ok(Status::Code(code))) => match diagnostics {
                Some(message) => format!("the device process ended with status {code}: {message}"),
                None => format!("the device process ended with status {code}"),
            },
            Self::Devices(Err(errno)) => format!("the device process has ended ({errno})"),
            Self::Detached => "the machine has left its devices".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILLED: Exit = Exit::Killed { signal: 9 };
    const FAILED: Exit = Exit::Failed { code: 1 };
    const DONE: Result<Status, Errno> = Ok(Status::Code(0));
    const BROKEN: Result<Status, Errno> = Ok(Status::Code(1));
    const SHOT: Result<Status, Errno> = Ok(Status::Signal(9));
    const LOST: Result<Status, Errno> = Err(Errno::CHILD);
    const MACHINE: Option<ProcessRole> = Some(ProcessRole::Machine);
    const DEVICES: Option<ProcessRole> = Some(ProcessRole::Devices);

    fn ends(
        machine: Option<Exit>,
        devices: Option<Result<Status, Errno>>,
        first: Option<ProcessRole>,
    ) -> Ends {
        Ends {
            machine,
            devices,
            first,
            own_devices: false,
        }
    }

    fn machine(exit: &Exit) -> Verdict {
        Verdict::Ended(Reason::Machine(exit.clone()))
    }

    fn devices(status: Result<Status, Errno>) -> Verdict {
        Verdict::Ended(Reason::Devices(status))
    }

    #[test]
    fn nothing_has_ended() {
        for waited in [false, true] {
            assert_eq!(supervise(&Ends::default(), waited), Verdict::Running);
        }
    }

    #[test]
    fn a_machine_with_devices_of_its_own_is_the_only_cause() {
        for exit in [Exit::PoweredOff, FAILED, KILLED] {
            let ends = Ends {
                own_devices: true,
                ..ends(Some(exit.clone()), None, MACHINE)
            };
            assert_eq!(supervise(&ends, false), machine(&exit));
        }
    }

    #[test]
    fn the_device_process_alone() {
        for waited in [false, true] {
            for status in [BROKEN, SHOT, LOST] {
                let ends = ends(None, Some(status), DEVICES);
                assert_eq!(supervise(&ends, waited), devices(status));
            }
        }
        let ends = ends(None, Some(DONE), DEVICES);
        let wait = Verdict::WaitFor(ProcessRole::Machine);
        assert_eq!(supervise(&ends, false), wait);
        assert_eq!(supervise(&ends, true), Verdict::Ended(Reason::Detached));
    }

    #[test]
    fn the_machine_alone() {
        let wait = Verdict::WaitFor(ProcessRole::Devices);
        for exit in [
            Exit::PoweredOff,
            Exit::Panicked,
            FAILED,
            Exit::Unknown {
                errno: Errno::CHILD,
            },
        ] {
            let ends = ends(Some(exit.clone()), None, MACHINE);
            assert_eq!(supervise(&ends, false), wait);
            assert_eq!(supervise(&ends, true), machine(&exit));
        }
        // A signal needs no second opinion.
        let ends = ends(Some(KILLED), None, MACHINE);
        assert_eq!(supervise(&ends, false), machine(&KILLED));
    }

    #[test]
    fn both_and_the_device_process_ended_regularly() {
        for first in [MACHINE, DEVICES, None] {
            for waited in [false, true] {
                for exit in [Exit::PoweredOff, Exit::Panicked, FAILED, KILLED] {
                    let ends = ends(Some(exit.clone()), Some(DONE), first);
                    assert_eq!(supervise(&ends, waited), machine(&exit));
                }
            }
        }
    }

    #[test]
    fn both_and_the_device_process_failed() {
        for waited in [false, true] {
            for status in [BROKEN, SHOT, LOST] {
                for exit in [Exit::PoweredOff, Exit::Panicked, FAILED] {
                    for first in [MACHINE, DEVICES, None] {
                        let ends = ends(Some(exit.clone()), Some(status), first);
                        assert_eq!(supervise(&ends, waited), devices(status));
                    }
                }
                // Two independent causes: the first one.
                for (first, verdict) in [
                    (MACHINE, machine(&KILLED)),
                    (DEVICES, devices(status)),
                    (None, devices(status)),
                ] {
                    let ends = ends(Some(KILLED), Some(status), first);
                    assert_eq!(supervise(&ends, waited), verdict);
                }
            }
        }
    }

    #[test]
    fn reasons_are_described() {
        let say = |reason: Reason| reason.describe(&[], Some("error: no"));
        assert_eq!(
            say(Reason::Machine(Exit::PoweredOff)),
            "the guest shut down"
        );
        assert_eq!(
            say(Reason::Devices(SHOT)),
            "the device process was killed by SIGKILL"
        );
        assert_eq!(
            say(Reason::Devices(BROKEN)),
            "the device process ended with status 1: error: no"
        );
        assert_eq!(
            Reason::Devices(BROKEN).describe(&[], None),
            "the device process ended with status 1"
        );
        assert_eq!(say(Reason::Detached), "the machine has left its devices");
    }
}
