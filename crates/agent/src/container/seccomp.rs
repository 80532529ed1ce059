//! The seccomp filter of a container.
//!
//! The agent compiles it, once per container, with libseccomp; the child only hands the finished program to the
//! kernel. Processes executed later in the container get the same program.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use rustix::fs::{MemfdFlags, SeekFrom};

use super::error::{Context, CreateError, Result};

/// A compiled filter.
#[derive(Debug)]
pub(super) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

fn failed(
    what: impl std::fmt::Display,
) -> impl FnOnce(libseccomp::error::SeccompError) -> CreateError {
    let what = format!("linux.seccomp: {what}");
    move |error| CreateError::invalid(what, error)
}

fn action(field: &str, action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let number = errno.unwrap_or(libc::EPERM as u32);
    let number = u16::try_from(number).map_err(|_| {
        CreateError::invalid(field, format_args!("errnoRet {number} is out of range"))
    })?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(number.into()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(number),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(CreateError::unsupported(field, "SCMP_ACT_NOTIFY"));
        }
    })
}

fn comparison(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| {
            CreateError::invalid("linux.seccomp.syscalls.args", "index is not below 6")
        })?;
    let mut datum = argument.value();
    let operator = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The spec has the mask in `value` and what it is compared with in `valueTwo`.
            datum = argument.value_two().unwrap_or(0);
            ScmpCompareOp::MaskedEqual(argument.value())
        }
    };
    Ok(ScmpArgCompare::new(index, operator, datum))
}

impl Filter {
    /// Compiles what the spec says.
    pub(super) fn new(spec: &LinuxSeccomp) -> Result<Filter> {
        if spec
            .listener_path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
        {
            return Err(CreateError::unsupported(
                "linux.seccomp.listenerPath",
                "user notification",
            ));
        }
        if spec
            .listener_metadata()
            .as_ref()
            .is_some_and(|metadata| !metadata.is_empty())
        {
            return Err(CreateError::unsupported(
                "linux.seccomp.listenerMetadata",
                "user notification",
            ));
        }
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
        let mut context = ScmpFilterContext::new(default).map_err(failed("defaultAction"))?;
        for architecture in spec.architectures().iter().flatten() {
            let name = architecture.to_string();
            let architecture: ScmpArch = name.parse().map_err(failed(&name))?;
            context.add_arch(architecture).map_err(failed(&name))?;
        }
        let syscalls = spec.syscalls().as_deref().unwrap_or_default();
        if syscalls
            .iter()
            .map(|syscall| syscall.names().len())
            .sum::<usize>()
            > 32
        {
            // A binary tree: every system call of the container runs through this, interpreted where the guest kernel
            // has no compiler for it.
            context
                .set_ctl_optimize(2)
                .map_err(failed("optimization"))?;
        }
        for syscall in syscalls {
            add_rules(&mut context, syscall, default)?;
        }
        Ok(Filter {
            program: export(&context)?,
            flags,
        })
    }

    /// Puts the filter on the calling process, for good. Needs CAP_SYS_ADMIN or no_new_privs.
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

fn add_rules(
    context: &mut ScmpFilterContext,
    syscall: &LinuxSyscall,
    default: ScmpAction,
) -> Result<()> {
    let action = action(
        "linux.seccomp.syscalls",
        syscall.action(),
        syscall.errno_ret(),
    )?;
    if action == default {
        // libseccomp refuses rules that say nothing.
        return Ok(());
    }
    let arguments = syscall.args().as_deref().unwrap_or_default();
    let comparisons = arguments
        .iter()
        .map(comparison)
        .collect::<Result<Vec<_>>>()?;
    // libseccomp takes one comparison per argument in a rule; several of one argument mean any of them.
    let repeats = arguments.iter().enumerate().any(|(position, argument)| {
        arguments[..position]
            .iter()
            .any(|other| other.index() == argument.index())
    });
    for name in syscall.names() {
        // Profiles name system calls of many kernels and architectures: one that is unknown here cannot be called.
        let Ok(number) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let added = if comparisons.is_empty() {
            context.add_rule(action, number)
        } else if repeats {
            comparisons
                .iter()
                .try_for_each(|comparison| {
                    context
                        .add_rule_conditional(action, number, &[*comparison])
                        .map(drop)
                })
                .map(|()| &mut *context)
        } else {
            context.add_rule_conditional(action, number, &comparisons)
        };
        added.map_err(failed(name))?;
    }
    Ok(())
}

/// The finished program. libseccomp before 2.6 only writes it to files.
fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    const WHAT: &str = "cannot compile linux.seccomp";
    let file = rustix::fs::memfd_create(c"seccomp", MemfdFlags::CLOEXEC).context(|| WHAT)?;
    context
        .export_bpf(file.as_fd())
        .map_err(|error| CreateError::other(WHAT, error))?;
    read(&file).context(|| WHAT)
}

fn read(file: &OwnedFd) -> rustix::io::Result<Vec<libc::sock_filter>> {
    const SIZE: usize = size_of::<libc::sock_filter>();
    let length = rustix::fs::seek(file, SeekFrom::End(0))? as usize;
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match rustix::io::pread(file, &mut bytes[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(bytes
        .chunks_exact(SIZE)
        .map(|chunk| libc::sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect())
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
        const X86_64: u32 = 0xc000_003e;
        const AARCH64: u32 = 0xc000_00b7;
        let architecture = if cfg!(target_arch = "x86_64") {
            X86_64
        } else {
            AARCH64
        };
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
            .filter_map(|number| ScmpSyscall::from_raw_syscall(number).get_name().ok())
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
    fn what_is_not_done_is_named() {
        for (json, words) in [
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
                "listenerPath",
            ),
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
