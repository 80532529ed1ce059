//! System call filters, one per role.
//!
//! Each is an allowlist, found by running the role's programs under strace through their usual and unusual paths
//! and by reading the sources of the user-mode kernel. A call outside it fails with ENOSYS: the answer of an older
//! kernel, which every library copes with, so that a new version of a library does not end a machine. Calls that
//! nothing in a jail can have an honest use for (mounting, namespaces, modules, keys, another process's memory, …)
//! kill the process instead: there, only an attacker asks.
//!
//! System calls that a guest's programs make never get here: the user-mode kernel intercepts them (PTRACE_SYSEMU)
//! before the host's filter sees them.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::io::Errno;
use seccompiler::{BpfProgram, sock_filter};

/// What a jailed process is, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// hull's device process: fs, vsock, entropy and block back ends.
    Device,
    /// A user-mode kernel and the processes that stand for its guest's.
    Uml,
    /// QEMU, emulating or with KVM.
    Qemu,
}

/// A compiled filter.
pub struct Filter {
    program: BpfProgram,
}

impl Filter {
    /// The filter of a role.
    pub fn of(role: Role) -> Self {
        Self {
            program: compile(&rules(role)),
        }
    }

    /// Installs it for the calling thread and what it starts.
    pub fn install(&self) -> Result<(), Errno> {
        seccompiler::apply_filter(&self.program).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => {
                Errno::from_io_error(&error).unwrap_or(Errno::INVAL)
            }
            _ => Errno::INVAL,
        })
    }
}

/// What happens to a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Allow,
    /// Fails with ENOSYS.
    Refuse,
    /// Ends the process.
    Kill,
    /// Allowed if the lower half of an argument is one of these.
    OneOf(u8, Vec<u32>),
    /// An ioctl, allowed if its request is one of these or belongs to this driver.
    Request(Vec<u32>, Option<u8>),
    /// Allowed if the lower half of an argument is not this.
    Not(u8, u32),
    /// Allowed if the lower half of an argument has none of these bits.
    Without(u8, u32),
}

/// What happens to each system call; the rest is refused.
fn rules(role: Role) -> BTreeMap<u32, Verdict> {
    let (calls, ioctls, prctls): (&[c_long], &[u64], &[i32]) = match role {
        Role::Device => (DEVICE, DEVICE_IOCTLS, DEVICE_PRCTLS),
        Role::Uml => (UML, UML_IOCTLS, UML_PRCTLS),
        Role::Qemu => (QEMU, QEMU_IOCTLS, QEMU_PRCTLS),
    };
    let mut rules: BTreeMap<u32, Verdict> = BTreeMap::new();
    rules.extend(DANGEROUS.iter().map(|call| (*call as u32, Verdict::Kill)));
    rules.extend(
        COMMON
            .iter()
            .chain(calls)
            .map(|call| (*call as u32, Verdict::Allow)),
    );
    let mut put = |call: c_long, verdict| rules.insert(call as u32, verdict);
    // Requests and options are ints: the kernel ignores the upper half of these arguments.
    let requests = ioctls.iter().map(|request| *request as u32).collect();
    let driver = (role == Role::Qemu).then_some(KVM);
    put(libc::SYS_ioctl, Verdict::Request(requests, driver));
    put(
        libc::SYS_prctl,
        Verdict::OneOf(0, prctls.iter().map(|option| *option as u32).collect()),
    );
    put(
        libc::SYS_socket,
        Verdict::OneOf(0, vec![libc::AF_UNIX as u32]),
    );
    put(
        libc::SYS_socketpair,
        Verdict::OneOf(0, vec![libc::AF_UNIX as u32]),
    );
    // Threads and processes, but no namespaces. The flags of clone3 lie in memory, where a filter cannot look:
    // it is refused, and C libraries fall back to clone.
    put(libc::SYS_clone, Verdict::Without(0, NAMESPACE_FLAGS));
    if role == Role::Uml {
        // How a panicking user-mode kernel ends: it sends itself SIGABRT until that works. PID 1 of a namespace is
        // immune to it, so it would never end; when the call fails, it exits.
        put(libc::SYS_kill, Verdict::Not(1, libc::SIGABRT as u32));
    }
    rules
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

// Instructions of the kernel's classic BPF, and where `struct seccomp_data` has what they load.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const KILL: u32 = 0x8000_0000;

/// A binary search for the call's number. The kernel walks the program once per system call there is when it is
/// installed, and a list of comparisons takes it a millisecond.
fn compile(rules: &BTreeMap<u32, Verdict>) -> BpfProgram {
    // Ranges of numbers with one verdict: where each begins. Numbers of the x32 ABI lie above all of them.
    let mut ranges: Vec<(u32, &Verdict)> = vec![(0, &Verdict::Refuse)];
    let mut begin = |number: u32, verdict| match ranges.last_mut() {
        Some(last) if last.1 == verdict => {}
        Some(last) if last.0 == number => last.1 = verdict,
        _ => ranges.push((number, verdict)),
    };
    let mut next = 0;
    for (number, verdict) in rules {
        if *number != next {
            begin(next, &Verdict::Refuse);
        }
        begin(*number, verdict);
        next = number + 1;
    }
    begin(next, &Verdict::Refuse);

    let mut program = vec![
        instruction(LOAD, ARCHITECTURE),
        jump(IF_EQUAL, AUDIT_ARCH, 1, 0),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER),
    ];
    program.extend(search(&ranges));
    program
}

fn search(ranges: &[(u32, &Verdict)]) -> BpfProgram {
    if let [(_, verdict)] = ranges {
        return decide(verdict);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let first = high.first().map_or(u32::MAX, |range| range.0);
    let (below, above) = (search(low), search(high));
    let mut program = match u8::try_from(below.len()) {
        Ok(over) => vec![jump(IF_AT_LEAST, first, over, 0)],
        // Too far for a conditional jump.
        Err(_) => vec![
            jump(IF_AT_LEAST, first, 0, 1),
            instruction(JUMP, below.len() as u32),
        ],
    };
    program.extend(below);
    program.extend(above);
    program
}

fn decide(verdict: &Verdict) -> BpfProgram {
    let argument = |index: u8| instruction(LOAD, ARGUMENTS + 8 * u32::from(index));
    let (allow, refuse) = (instruction(RETURN, ALLOW), instruction(RETURN, REFUSE));
    match verdict {
        Verdict::Allow => vec![allow],
        Verdict::Refuse => vec![refuse],
        Verdict::Kill => vec![instruction(RETURN, KILL)],
        Verdict::OneOf(index, values) => {
            let mut program = vec![argument(*index)];
            for (position, value) in values.iter().enumerate() {
                // Over the other comparisons and the refusal. The lists are short.
                program.push(jump(IF_EQUAL, *value, (values.len() - position) as u8, 0));
            }
            program.extend([refuse, allow]);
            program
        }
        Verdict::Request(values, driver) => {
            let mut program = vec![argument(1)];
            for (position, value) in values.iter().enumerate() {
                // Over the other comparisons, the driver's two and the refusal.
                program.push(jump(
                    IF_EQUAL,
                    *value,
                    (values.len() - position + 2) as u8,
                    0,
                ));
            }
            let driver = driver.map_or(u32::MAX, |driver| u32::from(driver) << 8);
            program.extend([
                instruction(AND, 0xff00),
                jump(IF_EQUAL, driver, 1, 0),
                refuse,
                allow,
            ]);
            program
        }
        Verdict::Not(index, value) => {
            vec![
                argument(*index),
                jump(IF_EQUAL, *value, 0, 1),
                refuse,
                allow,
            ]
        }
        Verdict::Without(index, bits) => vec![
            argument(*index),
            instruction(AND, *bits),
            jump(IF_EQUAL, 0, 1, 0),
            refuse,
            allow,
        ],
    }
}

fn instruction(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

const NAMESPACE_FLAGS: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWCGROUP) as u32;

/// Memory, signals, time, threads, and descriptors one already has.
const COMMON: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_getdents64,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_memfd_create,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getcwd,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_prlimit64,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_arch_prctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// The fs device does to files what a guest asks for, as the user the guest names.
const DEVICE: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_mknodat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_renameat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_copy_file_range,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_umask,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capget,
    libc::SYS_capset,
];

const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;
const BLKGETSIZE64: u64 = 0x8008_1272;

const DEVICE_IOCTLS: &[u64] = &[
    libc::FIONBIO,
    libc::FIONREAD,
    libc::FIOCLEX,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    BLKGETSIZE64,
];

const DEVICE_PRCTLS: &[i32] = &[
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_PDEATHSIG,
    libc::PR_GET_DUMPABLE,
    libc::PR_CAPBSET_READ,
    PR_SET_VMA,
];

/// Names for anonymous memory, which C libraries give.
const PR_SET_VMA: i32 = 0x5356_4d41;

/// ptrace and execveat are how a user-mode kernel runs its guest's programs: each is a process of ours, started
/// from a stub in a memory file and traced.
const UML: &[c_long] = &[
    libc::SYS_signalfd4,
    libc::SYS_ptrace,
    libc::SYS_execveat,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_statfs,
    libc::SYS_setsid,
    libc::SYS_personality,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_delete,
    libc::SYS_setitimer,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_sched_setaffinity,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigsuspend,
    libc::SYS_signalfd4,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pipe,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_create,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_getpgrp,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pause,
];

const UML_IOCTLS: &[u64] = &[
    libc::TCGETS,
    libc::TIOCGWINSZ,
    libc::FIONBIO,
    libc::FIONREAD,
];

const UML_PRCTLS: &[i32] = &[
    libc::PR_SET_NAME,
    libc::PR_SET_PDEATHSIG,
    libc::PR_SET_NO_NEW_PRIVS,
    PR_SET_VMA,
];

/// QEMU opens its firmware and talks to its devices' sockets; the rest is memory and threads.
const QEMU: &[c_long] = &[
    libc::SYS_execveat,
    libc::SYS_connect,
    libc::SYS_statfs,
    libc::SYS_wait4,
    libc::SYS_setsid,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_get_mempolicy,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_getgroups,
    libc::SYS_getpriority,
    libc::SYS_rt_sigpending,
    libc::SYS_signalfd4,
    libc::SYS_unlinkat,
    libc::SYS_seccomp,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_pipe,
];

const QEMU_IOCTLS: &[u64] = &[
    libc::TCGETS,
    libc::TCSETS,
    libc::TIOCGWINSZ,
    libc::FIONBIO,
    libc::FIONREAD,
];

/// All requests of KVM. Without its device node in the jail there is nothing to make them to.
const KVM: u8 = 0xae;

const QEMU_PRCTLS: &[i32] = &[
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_DUMPABLE,
    libc::PR_GET_DUMPABLE,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_SECCOMP,
    libc::PR_SET_TIMERSLACK,
    PR_SET_VMA,
];

/// Calls that nothing in a jail can have an honest use for. A role that allows one of them is exempt from it.
const DANGEROUS: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does.
    fn run(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
        let load = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => AUDIT_ARCH,
            _ => arguments[(offset - ARGUMENTS) as usize / 8] as u32,
        };
        let (mut at, mut value) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            let over = |condition: bool| usize::from(if condition { step.jt } else { step.jf });
            match step.code {
                LOAD => value = load(step.k),
                AND => value &= step.k,
                JUMP => at += step.k as usize,
                IF_EQUAL => at += over(value == step.k),
                IF_AT_LEAST => at += over(value >= step.k),
                RETURN => return step.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn every_number_meets_its_verdict() {
        for role in [Role::Device, Role::Uml, Role::Qemu] {
            let rules = rules(role);
            let program = compile(&rules);
            assert!(program.len() < 4096, "{role:?}: {}", program.len());
            for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let answer = |arguments| run(&program, number, arguments);
                match rules.get(&number).unwrap_or(&Verdict::Refuse) {
                    Verdict::Allow => assert_eq!(answer([0; 6]), ALLOW, "{role:?} {number}"),
                    Verdict::Refuse => assert_eq!(answer([0; 6]), REFUSE, "{role:?} {number}"),
                    Verdict::Kill => assert_eq!(answer([0; 6]), KILL, "{role:?} {number}"),
                    Verdict::OneOf(index, values) => {
                        for value in values {
                            let mut arguments = [0; 6];
                            arguments[usize::from(*index)] = u64::from(*value);
                            assert_eq!(answer(arguments), ALLOW, "{role:?} {number} {value}");
                        }
                        assert_eq!(answer([0xdead_beef; 6]), REFUSE, "{role:?} {number}");
                    }
                    Verdict::Request(values, driver) => {
                        let request = |value: u32| answer([0, u64::from(value), 0, 0, 0, 0]);
                        for value in values {
                            assert_eq!(request(*value), ALLOW, "{role:?} {value:#x}");
                        }
                        assert_eq!(request(0xdead_beef), REFUSE, "{role:?}");
                        let kvm = if driver.is_some() { ALLOW } else { REFUSE };
                        assert_eq!(request(0x0000_ae80), kvm, "{role:?}");
                    }
                    Verdict::Not(index, value) => {
                        let mut arguments = [0; 6];
                        assert_eq!(answer(arguments), ALLOW, "{role:?} {number}");
                        arguments[usize::from(*index)] = u64::from(*value);
                        assert_eq!(answer(arguments), REFUSE, "{role:?} {number}");
                    }
                    Verdict::Without(_, bits) => {
                        assert_eq!(answer([0; 6]), ALLOW, "{role:?} {number}");
                        assert_eq!(answer([u64::from(bits & bits.wrapping_neg()); 6]), REFUSE);
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_user_mode_kernel_traces() {
        let ptrace = libc::SYS_ptrace as u32;
        assert_eq!(rules(Role::Uml)[&ptrace], Verdict::Allow);
        assert_eq!(rules(Role::Qemu)[&ptrace], Verdict::Kill);
        assert_eq!(rules(Role::Device)[&ptrace], Verdict::Kill);
    }
}
