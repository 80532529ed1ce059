//! Settings that the agent applies to a process waiting at its gate: resource limits, OOM score,
//! scheduling, I/O priority, CPU affinity.
//!
//! From outside, because raising them takes privileges in the guest's own user namespace, which a
//! container with a user namespace has left; and late, because they are for the command, not for
//! its preparation.
#![allow(unsafe_code)]

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType,
    Process, Scheduler,
};
use rustix::fs::CWD;
use rustix::process::Pid;
use rustix::thread::CpuSet;

use super::error::{Context, CreateError, Result, reason};
use super::sys;

/// Limits of one process.
#[derive(Debug, Default)]
pub(super) struct Limits {
    rlimits: Vec<(PosixRlimitType, libc::rlimit64)>,
    oom_score_adj: Option<i32>,
    scheduler: Option<SchedulerAttributes>,
    io_priority: Option<libc::c_int>,
    processors: Option<Vec<usize>>,
}

/// Argument of `sched_setattr`, as the kernel lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    clamp_minimum: u32,
    clamp_maximum: u32,
}

impl Limits {
    /// `executed`: the process is not the container's init, to which execCPUAffinity does not
    /// apply.
    pub(super) fn new(process: &Process, executed: bool) -> Result<Limits> {
        let mut limits = Limits {
            oom_score_adj: process.oom_score_adj(),
            ..Default::default()
        };
        for rlimit in process.rlimits().iter().flatten() {
            if limits.rlimits.iter().any(|(kind, _)| *kind == rlimit.typ()) {
                return Err(CreateError::invalid(
                    "process.rlimits",
                    format_args!("{} is named twice", rlimit.typ()),
                ));
            }
            let value = libc::rlimit64 {
                rlim_cur: rlimit.soft(),
                rlim_max: rlimit.hard(),
            };
            limits.rlimits.push((rlimit.typ(), value));
        }
        limits.scheduler = process.scheduler().as_ref().map(scheduler).transpose()?;
        limits.io_priority = process
            .io_priority()
            .as_ref()
            .map(io_priority)
            .transpose()?;
        if let Some(affinity) = process.exec_cpu_affinity().as_ref().filter(|_| executed) {
            // The process starts in the container's control group, so there is no earlier moment
            // for `initial`: it applies only without `final`.
            let list = affinity
                .cpu_affinity_final()
                .as_ref()
                .or(affinity.initial().as_ref());
            limits.processors = list.map(|list| processors(list)).transpose()?;
        }
        Ok(limits)
    }

    /// Applies all of it to `pid`.
    pub(super) fn apply(&self, pid: u32) -> Result<()> {
        for (kind, value) in &self.rlimits {
            // SAFETY: the new limit is valid for the call, the old one is not requested.
            let result = unsafe {
                libc::prlimit64(
                    pid as libc::pid_t,
                    resource(*kind),
                    value,
                    std::ptr::null_mut(),
                )
            };
            if result < 0 {
                let error = std::io::Error::last_os_error();
                return Err(CreateError::other(
                    format_args!("cannot set process.rlimits {kind}"),
                    reason(&error),
                ));
            }
        }
        if let Some(score) = self.oom_score_adj {
            sys::write_file(
                CWD,
                format!("/proc/{pid}/oom_score_adj").as_str(),
                score.to_string().as_bytes(),
            )
            .context(|| format!("cannot set process.oomScoreAdj to {score}"))?;
        }
        if let Some(attributes) = &self.scheduler {
            // SAFETY: the attributes are valid for the call and carry their size.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_sched_setattr,
                    pid,
                    std::ptr::from_ref(attributes),
                    0,
                )
            };
            if result < 0 {
                return Err(std::io::Error::last_os_error())
                    .context(|| "cannot set process.scheduler");
            }
        }
        if let Some(priority) = self.io_priority {
            const IOPRIO_WHO_PROCESS: libc::c_int = 1;
            // SAFETY: takes numbers only.
            let result =
                unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) };
            if result < 0 {
                return Err(std::io::Error::last_os_error())
                    .context(|| "cannot set process.ioPriority");
            }
        }
        if let Some(processors) = &self.processors {
            let mut set = CpuSet::new();
            for processor in processors {
                set.set(*processor);
            }
            rustix::thread::sched_setaffinity(Pid::from_raw(pid as i32), &set)
                .context(|| "cannot set process.execCPUAffinity")?;
        }
        Ok(())
    }
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn scheduler(scheduler: &Scheduler) -> Result<SchedulerAttributes> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(CreateError::unsupported(
                "process.scheduler.policy",
                "Linux never had SCHED_ISO",
            ));
        }
    };
    let mut flags = 0;
    for flag in scheduler.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => libc::SCHED_FLAG_RESET_ON_FORK,
            LinuxSchedulerFlag::SchedFlagReclaim => libc::SCHED_FLAG_RECLAIM,
            LinuxSchedulerFlag::SchedFlagDLOverrun => libc::SCHED_FLAG_DL_OVERRUN,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => libc::SCHED_FLAG_KEEP_POLICY,
            LinuxSchedulerFlag::SchedFlagKeepParams => libc::SCHED_FLAG_KEEP_PARAMS,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => libc::SCHED_FLAG_UTIL_CLAMP_MIN,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => libc::SCHED_FLAG_UTIL_CLAMP_MAX,
        } as u64;
    }
    let priority = scheduler.priority().unwrap_or(0);
    Ok(SchedulerAttributes {
        size: size_of::<SchedulerAttributes>() as u32,
        policy: policy as u32,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(priority).map_err(|_| {
            CreateError::invalid(
                "process.scheduler.priority",
                format_args!("{priority} is negative"),
            )
        })?,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        clamp_minimum: 0,
        clamp_maximum: 0,
    })
}

fn io_priority(io: &LinuxIOPriority) -> Result<libc::c_int> {
    const CLASS_SHIFT: u32 = 13;
    let class = match io.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let priority = libc::c_int::try_from(io.priority())
        .ok()
        .filter(|priority| (0..8).contains(priority));
    let priority = priority.ok_or_else(|| {
        CreateError::invalid(
            "process.ioPriority.priority",
            format_args!("{} is not between 0 and 7", io.priority()),
        )
    })?;
    Ok(class << CLASS_SHIFT | priority)
}

/// Reads a list such as `0-3,7`.
fn processors(list: &str) -> Result<Vec<usize>> {
    let invalid = || CreateError::invalid("process.execCPUAffinity", format_args!("{list:?}"));
    let mut processors = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.trim().parse().map_err(|_| invalid())?;
        let last: usize = last.trim().parse().map_err(|_| invalid())?;
        if first > last || last >= CpuSet::MAX_CPU {
            return Err(invalid());
        }
        processors.extend(first..=last);
    }
    Ok(processors)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn limits(rest: &str) -> Result<Limits> {
        let process: Process = serde_json::from_str(&format!(
            r#"{{"user":{{"uid":0,"gid":0}},"cwd":"/",{rest}}}"#
        ))
        .unwrap();
        Limits::new(&process, true)
    }

    #[test]
    fn processor_lists() {
        assert_eq!(processors("0-2,5").unwrap(), [0, 1, 2, 5]);
        assert!(processors("3-1").is_err());
        assert!(processors("x").is_err());
        assert!(processors("0-99999").is_err());
    }

    #[test]
    fn io_priorities() {
        let limits = limits(r#""ioPriority":{"class":"IOPRIO_CLASS_IDLE","priority":4}"#).unwrap();
        assert_eq!(limits.io_priority, Some(3 << 13 | 4));
    }

    #[test]
    fn wrong_ones_are_named() {
        for (json, words) in [
            (
                r#""ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#,
                "ioPriority",
            ),
            (r#""scheduler":{"policy":"SCHED_ISO"}"#, "SCHED_ISO"),
            (
                r#""scheduler":{"policy":"SCHED_RR","priority":-1}"#,
                "priority",
            ),
            (
                r#""rlimits":[{"type":"RLIMIT_CORE","soft":1,"hard":1},{"type":"RLIMIT_CORE","soft":1,"hard":1}]"#,
                "RLIMIT_CORE is named twice",
            ),
        ] {
            let message = limits(json).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn they_hold_for_another_process() {
        let limits = limits(
            r#""rlimits":[{"type":"RLIMIT_CORE","soft":0,"hard":0}],"oomScoreAdj":500,
               "scheduler":{"policy":"SCHED_BATCH","nice":5},"execCPUAffinity":{"initial":"0"}"#,
        )
        .unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("10")
            .spawn()
            .unwrap();
        let applied = limits.apply(child.id());
        let read =
            |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
        let (score, rlimits) = (read("oom_score_adj"), read("limits"));
        child.kill().unwrap();
        child.wait().unwrap();
        applied.unwrap();
        assert_eq!(score.trim(), "500");
        let core = rlimits
            .lines()
            .find(|line| line.starts_with("Max core file size"))
            .unwrap();
        assert!(core.contains(" 0 "), "{core}");
    }
}
