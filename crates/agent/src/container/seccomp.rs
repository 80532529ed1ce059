//! The seccomp filter of a container.
//!
//! The agent compiles it, once per container; the child only passes the finished program to the
//! kernel. Processes executed later in the container get the same program. libseccomp knows the
//! numbers of the system calls; the program is generated here (`program`) with libseccomp's
//! semantics: a rule without conditions precedes those with, and system calls of architectures that
//! the profile does not name end the thread.
#![allow(unsafe_code)]

mod numbers;
mod program;

use std::io;

use libseccomp::ScmpArch;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::error::{Context, CreateError, Result};
use program::{Answer, Case, Comparison, Decision, Section, Test};

/// A compiled filter.
#[derive(Debug)]
pub(super) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

fn action(field: &str, action: LinuxSeccompAction, errno: Option<u32>) -> Result<Answer> {
    let number = errno.unwrap_or(libc::EPERM as u32);
    let number = u16::try_from(number).map_err(|_| {
        CreateError::invalid(field, format_args!("errnoRet {number} is out of range"))
    })?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            libc::SECCOMP_RET_KILL_THREAD
        }
        LinuxSeccompAction::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        LinuxSeccompAction::ScmpActErrno => libc::SECCOMP_RET_ERRNO | u32::from(number),
        LinuxSeccompAction::ScmpActTrace => libc::SECCOMP_RET_TRACE | u32::from(number),
        LinuxSeccompAction::ScmpActLog => libc::SECCOMP_RET_LOG,
        LinuxSeccompAction::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(CreateError::unsupported(field, "SCMP_ACT_NOTIFY"));
        }
    })
}

fn comparison(argument: &LinuxSeccompArg) -> Result<Comparison> {
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| {
            CreateError::invalid("linux.seccomp.syscalls.args", "index is not below 6")
        })?;
    let value = argument.value();
    let test = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => Test::Not(value),
        LinuxSeccompOperator::ScmpCmpLt => Test::Below(value),
        LinuxSeccompOperator::ScmpCmpLe => Test::AtMost(value),
        LinuxSeccompOperator::ScmpCmpEq => Test::Masked(u64::MAX, value),
        LinuxSeccompOperator::ScmpCmpGe => Test::AtLeast(value),
        LinuxSeccompOperator::ScmpCmpGt => Test::Above(value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The spec has the mask in `value` and the operand in `valueTwo`.
            Test::Masked(value, argument.value_two().unwrap_or(0))
        }
    };
    Ok(Comparison {
        argument: index,
        test,
    })
}

impl Filter {
    /// Compiles the profile of a spec.
    pub(super) fn new(spec: &LinuxSeccomp) -> Result<Filter> {
        let mut flags = 0;
        for flag in spec.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    return Err(CreateError::unsupported(
                        "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                        "user notification",
                    ));
                }
            };
        }
        let default = action(
            "linux.seccomp.defaultAction",
            spec.default_action(),
            spec.default_errno_ret(),
        )?;
        let mut architectures = vec![ScmpArch::native()];
        for architecture in spec.architectures().iter().flatten() {
            let name = architecture.to_string();
            let architecture: ScmpArch = name.parse().map_err(|error| {
                CreateError::invalid(format!("linux.seccomp: {name}").as_str(), error)
            })?;
            if !architectures.contains(&architecture) && numbers::is_executed(architecture) {
                architectures.push(architecture);
            }
        }
        let rules = spec
            .syscalls()
            .iter()
            .flatten()
            .map(|syscall| Rule::new(syscall, default))
            .collect::<Result<Vec<_>>>()?;
        let sections: Vec<Section> = architectures
            .into_iter()
            .map(|architecture| section(architecture, &rules, default))
            .collect();
        let program = program::program(&sections, default, libc::SECCOMP_RET_KILL_THREAD)
            .ok_or_else(|| {
                CreateError::invalid("linux.seccomp", "more rules than the kernel takes")
            })?;
        Ok(Filter { program, flags })
    }

    /// Installs the filter on the calling process, permanently. Needs CAP_SYS_ADMIN or
    /// no_new_privs.
    pub(super) fn load(&self) -> Result<()> {
        let program = libc::sock_fprog {
            len: self.program.len() as libc::c_ushort,
            // The kernel only reads it.
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the program outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error()).context(|| "cannot load linux.seccomp")
        } else {
            Ok(())
        }
    }
}

/// A rule of the profile.
struct Rule<'a> {
    names: &'a [String],
    answer: Answer,
    /// Alternatives, each a list of conditions that must all hold.
    alternatives: Vec<Vec<Comparison>>,
}

impl Rule<'_> {
    fn new(syscall: &LinuxSyscall, default: Answer) -> Result<Rule<'_>> {
        let answer = action(
            "linux.seccomp.syscalls",
            syscall.action(),
            syscall.errno_ret(),
        )?;
        let arguments = syscall.args().as_deref().unwrap_or_default();
        let comparisons = arguments
            .iter()
            .map(comparison)
            .collect::<Result<Vec<_>>>()?;
        // As runc, whose libseccomp takes one comparison per argument in a rule: several on one
        // argument are alternatives.
        let repeats = comparisons.iter().enumerate().any(|(position, one)| {
            comparisons[..position]
                .iter()
                .any(|other| other.argument == one.argument)
        });
        let alternatives = if repeats {
            comparisons.into_iter().map(|one| vec![one]).collect()
        } else {
            vec![comparisons]
        };
        Ok(Rule {
            // A rule that only repeats the default has no effect, even beside other rules.
            names: if answer == default {
                &[]
            } else {
                syscall.names()
            },
            answer,
            alternatives,
        })
    }
}

/// A rule's reference to a system call. Small, and hundreds of them in one allocation: in a guest,
/// the first touch of memory is expensive.
struct Mention {
    number: u32,
    rule: u32,
    /// Which of `number`'s system calls, if it multiplexes several.
    which: Option<u32>,
}

/// The decisions of one architecture.
fn section(architecture: ScmpArch, rules: &[Rule<'_>], default: Answer) -> Section {
    let names = rules.iter().map(|rule| rule.names.len()).sum();
    let mut mentions: Vec<Mention> = Vec::with_capacity(names);
    for (rule, position) in rules.iter().zip(0..) {
        for name in rule.names {
            // Profiles name system calls of many kernels and architectures: one that is unknown
            // here cannot be called.
            numbers::each(architecture, name, |number, which| {
                mentions.push(Mention {
                    number,
                    rule: position,
                    which,
                });
            });
        }
    }
    mentions.sort_unstable_by_key(|mention| (mention.number, mention.rule));
    let newer = if default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO {
        // System calls newer than the profile: ENOSYS, so that programs fall back to older ones.
        // EPERM would end them. As runc.
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
    } else {
        default
    };
    let mut intervals: Vec<(u32, Decision)> = Vec::new();
    let mut decide = |from: u32, decision: Decision| {
        if intervals.last().is_none_or(|(_, last)| *last != decision) {
            intervals.push((from, decision));
        }
    };
    let mut cases = Vec::new();
    let mut next = 0;
    for mentions in mentions.chunk_by(|one, other| one.number == other.number) {
        let number = mentions[0].number;
        if number > next {
            decide(next, Decision::Always(default));
        }
        decide(
            number,
            match decision(mentions, rules) {
                Ok(answer) => Decision::Always(answer),
                Err(conditional) => {
                    cases.push(conditional);
                    Decision::Cases(cases.len() - 1)
                }
            },
        );
        next = number + 1;
    }
    decide(next, Decision::Always(newer));
    Section {
        architecture: numbers::of_architecture(architecture),
        intervals,
        cases,
    }
}

/// The decision for one number: one answer, or cases.
fn decision(mentions: &[Mention], rules: &[Rule<'_>]) -> std::result::Result<Answer, Vec<Case>> {
    let mut cases = Vec::new();
    for mention in mentions {
        let rule = &rules[mention.rule as usize];
        for conditions in &rule.alternatives {
            let conditions = match mention.which {
                None if conditions.is_empty() => return Ok(rule.answer),
                None => conditions.clone(),
                Some(which) if conditions.is_empty() => vec![numbers::is(which)],
                // The multiplexing system call has arguments of its own.
                Some(_) => continue,
            };
            cases.push(Case {
                conditions,
                answer: rule.answer,
            });
        }
    }
    Err(cases)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn compile(json: &str) -> Result<Filter> {
        Filter::new(&serde_json::from_str(json).unwrap())
    }

    /// Runs a filter on one system call of this architecture, as the kernel would.
    fn run(filter: &Filter, number: i64, arguments: [u64; 6]) -> u32 {
        run_on(
            filter,
            numbers::of_architecture(ScmpArch::native()),
            number,
            arguments,
        )
    }

    fn run_on(filter: &Filter, architecture: u32, number: i64, arguments: [u64; 6]) -> u32 {
        let mut data = vec![number as u32, architecture, 0, 0];
        for argument in arguments {
            data.extend([argument as u32, (argument >> 32) as u32]);
        }
        let (mut accumulator, mut at) = (0u32, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = filter.program[at];
            at += 1;
            let jump = |condition: bool| usize::from(if condition { jt } else { jf });
            match code {
                0x20 => accumulator = data[k as usize / 4],
                0x54 => accumulator &= k,
                0x05 => at += k as usize,
                0x15 => at += jump(accumulator == k),
                0x25 => at += jump(accumulator > k),
                0x35 => at += jump(accumulator >= k),
                0x06 => return k,
                _ => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    #[test]
    fn rules_and_default() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"syscalls":[
                {"names":["read","no_such_call"],"action":"SCMP_ACT_ALLOW"},
                {"names":["mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#,
        )
        .unwrap();
        assert_eq!(run(&filter, libc::SYS_read, [0; 6]), ALLOW);
        assert_eq!(run(&filter, libc::SYS_mkdirat, [0; 6]), ERRNO | 5);
        assert_eq!(run(&filter, libc::SYS_write, [0; 6]), ERRNO | 38);
    }

    #[test]
    fn arguments() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {"names":["socket"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":40,"op":"SCMP_CMP_EQ"}]},
                {"names":["personality"],"action":"SCMP_ACT_ERRNO","args":[
                    {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]},
                {"names":["clone"],"action":"SCMP_ACT_ERRNO","args":[
                    {"index":0,"value":268435456,"valueTwo":268435456,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
        )
        .unwrap();
        assert_eq!(
            run(&filter, libc::SYS_socket, [40, 0, 0, 0, 0, 0]),
            ERRNO | 1
        );
        assert_eq!(run(&filter, libc::SYS_socket, [2, 0, 0, 0, 0, 0]), ALLOW);
        for (value, answer) in [(1, ERRNO | 1), (2, ERRNO | 1), (3, ALLOW)] {
            assert_eq!(
                run(&filter, libc::SYS_personality, [value, 0, 0, 0, 0, 0]),
                answer
            );
        }
        assert_eq!(
            run(&filter, libc::SYS_clone, [0x1000_0011, 0, 0, 0, 0, 0]),
            ERRNO | 1
        );
        assert_eq!(run(&filter, libc::SYS_clone, [0x11, 0, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn large_profiles_decide_the_same() {
        let names: Vec<String> = (0..300)
            .filter_map(|number| libseccomp::ScmpSyscall::from(number).get_name().ok())
            .filter(|name| name != "reboot")
            .collect();
        let filter = compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":{},"action":"SCMP_ACT_ALLOW"}}]}}"#,
            serde_json::to_string(&names).unwrap()
        ))
        .unwrap();
        assert_eq!(run(&filter, libc::SYS_read, [0; 6]), ALLOW);
        assert_eq!(run(&filter, libc::SYS_reboot, [0; 6]), ERRNO | 1);
    }

    #[test]
    fn comparisons_are_of_64_bits() {
        type Holds = fn(u64) -> bool;
        const VALUE: u64 = 0x5_0000_0007;
        let values = [
            0,
            7,
            8,
            0x5_0000_0006,
            VALUE,
            VALUE + 1,
            0x4_0000_0009,
            0x6_0000_0001,
            u64::MAX,
        ];
        let tests: [(&str, Holds); 7] = [
            ("NE", |value| value != VALUE),
            ("LT", |value| value < VALUE),
            ("LE", |value| value <= VALUE),
            ("EQ", |value| value == VALUE),
            ("GE", |value| value >= VALUE),
            ("GT", |value| value > VALUE),
            ("MASKED_EQ", |value| value & VALUE == 5),
        ];
        for (operator, expected) in tests {
            let filter = compile(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["ioctl"],"action":"SCMP_ACT_ALLOW","args":[
                    {{"index":0,"value":1,"op":"SCMP_CMP_EQ"}},
                    {{"index":5,"value":{VALUE},"valueTwo":5,"op":"SCMP_CMP_{operator}"}}]}}]}}"#
            ))
            .unwrap();
            for value in values {
                for first in [1, 2, 1 << 32 | 1] {
                    let answer = run(&filter, libc::SYS_ioctl, [first, 0, 0, 0, 0, value]);
                    let allowed = first == 1 && expected(value);
                    assert_eq!(answer == ALLOW, allowed, "{operator} {first:#x} {value:#x}");
                }
            }
        }
    }

    #[test]
    fn newer_calls_than_the_profile_knows_are_not_there() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {"names":["read","fchmodat2"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        const X32: i64 = 0x4000_0000;
        assert_eq!(run(&filter, 452, [0; 6]), ALLOW);
        assert_eq!(run(&filter, 451, [0; 6]), ERRNO | 1);
        for number in [453, 1000, X32 | libc::SYS_read, -1] {
            assert_eq!(run(&filter, number, [0; 6]), ERRNO | 38, "{number}");
        }
    }

    #[test]
    fn a_rule_without_conditions_goes_before_those_with() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {"names":["clone"],"action":"SCMP_ACT_LOG","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
                {"names":["clone"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        assert_eq!(run(&filter, libc::SYS_clone, [1, 0, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn far_jumps_lead_to_the_same_decisions() {
        // Every other system call: nothing can be put together.
        let names: Vec<String> = (0..300)
            .step_by(2)
            .filter_map(|number| libseccomp::ScmpSyscall::from(number).get_name().ok())
            .collect();
        let filter = compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":{},"action":"SCMP_ACT_ALLOW"}}]}}"#,
            serde_json::to_string(&names).unwrap()
        ))
        .unwrap();
        assert!(filter.program.len() > 512);
        for number in 0..290 {
            let name = libseccomp::ScmpSyscall::from(number).get_name();
            let expected = name.is_ok_and(|name| names.contains(&name));
            assert_eq!(
                run(&filter, number.into(), [0; 6]) == ALLOW,
                expected,
                "{number}"
            );
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn programs_of_32_bits_have_their_own_numbers() {
        const X86: u32 = 0x4000_0003;
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86","SCMP_ARCH_X32","SCMP_ARCH_S390X"],
                "syscalls":[{"names":["read","bind"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap();
        let x86 = |number, first| run_on(&filter, X86, number, [first, 0, 0, 0, 0, 0]);
        assert_eq!(x86(3, 0), ALLOW);
        assert_eq!(x86(0, 0), ERRNO | 1);
        // bind, and bind as a case of socketcall; connect is another.
        assert_eq!(x86(361, 0), ALLOW);
        assert_eq!(x86(102, 2), ALLOW);
        assert_eq!(x86(102, 3), ERRNO | 1);
        // An architecture that the profile does not name: the thread ends.
        assert_eq!(run_on(&filter, 0xc000_00b7, 3, [0; 6]), 0);
        let native = compile(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        assert_eq!(run_on(&native, X86, 3, [0; 6]), 0);
    }

    #[test]
    fn what_is_not_done_is_named() {
        for (json, words) in [
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
                "WAIT_KILLABLE",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
                    "args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
                "index",
            ),
        ] {
            let message = compile(json).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
