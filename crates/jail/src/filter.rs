//! System call filters, one per role.
//!
//! Each is an allowlist (see [`crate::calls`]). A call outside it fails with ENOSYS, the answer of
//! an older kernel, which every library handles: a new version of a library does not end a machine.
//! Calls that have no legitimate use in a jail (mounting, namespaces, modules, keys, another
//! process's memory, …) kill the process instead.
//!
//! System calls of a guest's programs are not filtered: the user-mode kernel intercepts them
//! (PTRACE_SYSEMU) before the host's filter sees them.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::io::Errno;
use seccompiler::{BpfProgram, sock_filter};

use crate::calls::{
    COMMON, DANGEROUS, DEVICE, DEVICE_IOCTLS, DEVICE_PRCTLS, FILES, IO, IO_IOCTLS, KVM,
    NAMESPACE_FLAGS, QEMU, QEMU_IOCTLS, QEMU_PRCTLS, SUPERVISOR_REFUSED, THREAD, THREAD_PRCTLS,
    UML, UML_IOCTLS, UML_PRCTLS, UNPACK, UNPACK_IOCTLS, UNPACK_PRCTLS, VCPU_IOCTLS, VM_IOCTLS,
};
use crate::thread::ThreadRole;

/// What a jailed process does, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// hull's device process: fs, vsock, entropy and block back ends.
    Device,
    /// hull's virtual machine monitor, which has the same devices in itself.
    Vmm,
    /// A user-mode kernel and the processes that stand for its guest's.
    Uml,
    /// QEMU, emulating or with KVM.
    Qemu,
    /// hull unpacking a layer of an image.
    Unpack,
}

/// A compiled filter.
pub struct Filter {
    program: BpfProgram,
}

impl Filter {
    /// The filter of a role.
    pub fn of(role: Role) -> Self {
        Self {
            program: compile(&rules(role), &Verdict::Refuse),
        }
    }

    /// The filter of a process that starts jails: a list of what it may not call.
    pub fn of_supervisor() -> Self {
        let rules: Rules = SUPERVISOR_REFUSED
            .iter()
            .map(|call| (*call as u32, Verdict::Refuse))
            .collect();
        Self {
            program: compile(&rules, &Verdict::Allow),
        }
    }

    /// The filter of a thread's role, to be added to that of its process.
    pub fn of_thread(role: ThreadRole) -> Self {
        Self {
            program: compile(&thread_rules(role), &Verdict::Refuse),
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
    /// prctl with one of these options. The parent death signal can only be set to SIGKILL: a
    /// process that clears it would outlive its sandbox.
    Prctl(Vec<u32>),
    /// Allowed if the lower half of an argument is not this.
    Not(u8, u32),
    /// Allowed if the lower half of an argument has none of these bits.
    Without(u8, u32),
}

type Rules = BTreeMap<u32, Verdict>;

/// The rules of an allowlist; a call that they do not name is refused.
fn allowlist(calls: &[&[c_long]], ioctls: &[u64], driver: Option<u8>, prctls: &[i32]) -> Rules {
    let mut rules = Rules::new();
    rules.extend(DANGEROUS.iter().map(|call| (*call as u32, Verdict::Kill)));
    let allowed = calls.iter().copied().flatten();
    rules.extend(allowed.map(|call| (*call as u32, Verdict::Allow)));
    // Requests and options are ints: the kernel ignores the upper half of these arguments.
    let requests = ioctls.iter().map(|request| *request as u32).collect();
    rules.insert(libc::SYS_ioctl as u32, Verdict::Request(requests, driver));
    rules.insert(
        libc::SYS_prctl as u32,
        Verdict::Prctl(prctls.iter().map(|option| *option as u32).collect()),
    );
    rules
}

fn rules(role: Role) -> Rules {
    let vmm_ioctls = [DEVICE_IOCTLS, VCPU_IOCTLS, VM_IOCTLS].concat();
    let (calls, ioctls, prctls): (&[&[c_long]], &[u64], &[i32]) = match role {
        Role::Device => (&[COMMON, FILES, DEVICE], DEVICE_IOCTLS, DEVICE_PRCTLS),
        Role::Vmm => (&[COMMON, FILES, DEVICE], &vmm_ioctls, DEVICE_PRCTLS),
        Role::Uml => (&[COMMON, UML], UML_IOCTLS, UML_PRCTLS),
        Role::Qemu => (&[COMMON, QEMU], QEMU_IOCTLS, QEMU_PRCTLS),
        Role::Unpack => (&[COMMON, FILES, UNPACK], UNPACK_IOCTLS, UNPACK_PRCTLS),
    };
    let driver = (role == Role::Qemu).then_some(KVM);
    let mut rules = allowlist(calls, ioctls, driver, prctls);
    let mut put = |call: c_long, verdict| rules.insert(call as u32, verdict);
    let local = || Verdict::OneOf(0, vec![libc::AF_UNIX as u32]);
    put(libc::SYS_socket, local());
    put(libc::SYS_socketpair, local());
    // Threads and processes, but no namespaces. The flags of clone3 lie in memory, where a filter
    // cannot look: it is refused, and C libraries fall back to clone.
    put(libc::SYS_clone, Verdict::Without(0, NAMESPACE_FLAGS));
    match role {
        // A panicking user-mode kernel sends itself SIGABRT until that works. PID 1 of a namespace
        // is immune to it, so it would never end; when the call fails, it exits.
        Role::Uml => {
            put(libc::SYS_kill, Verdict::Not(1, libc::SIGABRT as u32));
        }
        // Threads add filters of their own (`restrict_thread`).
        Role::Device | Role::Vmm => {
            const SECCOMP_SET_MODE_FILTER: u32 = 1;
            put(
                libc::SYS_seccomp,
                Verdict::OneOf(0, vec![SECCOMP_SET_MODE_FILTER]),
            );
        }
        Role::Qemu => {}
        // It has no use for sockets.
        Role::Unpack => {
            put(libc::SYS_socket, Verdict::Kill);
            put(libc::SYS_socketpair, Verdict::Kill);
        }
    }
    rules
}

fn thread_rules(role: ThreadRole) -> Rules {
    match role {
        ThreadRole::Vcpu => {
            let ioctls = [VCPU_IOCTLS, VM_IOCTLS].concat();
            allowlist(&[THREAD], &ioctls, None, THREAD_PRCTLS)
        }
        ThreadRole::Io => {
            let mut rules = allowlist(&[THREAD, IO], IO_IOCTLS, None, THREAD_PRCTLS);
            // A stream of the guest is one end of such a pair; the other one goes to the sandbox.
            let local = Verdict::OneOf(0, vec![libc::AF_UNIX as u32]);
            rules.insert(libc::SYS_socketpair as u32, local);
            rules
        }
    }
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

/// Numbers of the x32 ABI have this bit (__X32_SYSCALL_BIT, asm/unistd.h).
const X32_BIT: u32 = 0x4000_0000;

const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const KILL: u32 = 0x8000_0000;

/// Compiles to a binary search for the call's number. The kernel walks the program once for each
/// existing system call when it is installed, which takes a millisecond with a list of comparisons.
/// `otherwise` is for calls without a rule.
fn compile(rules: &Rules, otherwise: &Verdict) -> BpfProgram {
    // Ranges of numbers with one verdict: where each begins.
    let mut ranges: Vec<(u32, &Verdict)> = vec![(0, otherwise)];
    let mut begin = |number: u32, verdict| match ranges.last_mut() {
        Some(last) if last.1 == verdict => {}
        Some(last) if last.0 == number => last.1 = verdict,
        _ => ranges.push((number, verdict)),
    };
    let mut next = 0;
    for (number, verdict) in rules {
        if *number != next {
            begin(next, otherwise);
        }
        begin(*number, verdict);
        next = number + 1;
    }
    begin(next, otherwise);
    begin(X32_BIT, &Verdict::Refuse);

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
        Verdict::Prctl(options) if !options.contains(&(libc::PR_SET_PDEATHSIG as u32)) => {
            decide(&Verdict::OneOf(0, options.clone()))
        }
        Verdict::Prctl(options) => {
            const DEATH_SIGNAL: u32 = libc::PR_SET_PDEATHSIG as u32;
            let free = options.iter().filter(|option| **option != DEATH_SIGNAL);
            let free: Vec<u32> = free.copied().collect();
            let mut program = vec![argument(0)];
            for (position, option) in free.iter().enumerate() {
                // Over the other comparisons, the signal's three and the refusal.
                let over = (free.len() - position + 3) as u8;
                program.push(jump(IF_EQUAL, *option, over, 0));
            }
            program.extend([
                jump(IF_EQUAL, DEATH_SIGNAL, 0, 2),
                argument(1),
                jump(IF_EQUAL, libc::SIGKILL as u32, 1, 0),
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
    fn a_supervisor_may_call_all_but_what_is_refused() {
        let program = Filter::of_supervisor().program;
        for number in 0..600 {
            let refused = SUPERVISOR_REFUSED.contains(&number.into());
            let expected = if refused { REFUSE } else { ALLOW };
            assert_eq!(run(&program, number, [0; 6]), expected, "{number}");
        }
        // The same calls have other numbers in the x32 ABI.
        for number in [X32_BIT, X32_BIT + 101, u32::MAX] {
            assert_eq!(run(&program, number, [0; 6]), REFUSE, "{number:#x}");
        }
    }

    #[test]
    fn every_number_meets_its_verdict() {
        let processes = [Role::Device, Role::Vmm, Role::Uml, Role::Qemu, Role::Unpack];
        let threads = [ThreadRole::Vcpu, ThreadRole::Io];
        let all = processes
            .map(|role| (format!("{role:?}"), rules(role)))
            .into_iter()
            .chain(threads.map(|role| (format!("{role:?}"), thread_rules(role))));
        for (role, rules) in all {
            let program = compile(&rules, &Verdict::Refuse);
            assert!(program.len() < 4096, "{role}: {}", program.len());
            for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let answer = |arguments| run(&program, number, arguments);
                match rules.get(&number).unwrap_or(&Verdict::Refuse) {
                    Verdict::Allow => assert_eq!(answer([0; 6]), ALLOW, "{role} {number}"),
                    Verdict::Refuse => assert_eq!(answer([0; 6]), REFUSE, "{role} {number}"),
                    Verdict::Kill => assert_eq!(answer([0; 6]), KILL, "{role} {number}"),
                    Verdict::OneOf(index, values) => {
                        for value in values {
                            let mut arguments = [0; 6];
                            arguments[usize::from(*index)] = u64::from(*value);
                            assert_eq!(answer(arguments), ALLOW, "{role} {number} {value}");
                        }
                        assert_eq!(answer([0xdead_beef; 6]), REFUSE, "{role} {number}");
                    }
                    Verdict::Prctl(options) => {
                        for option in 0..300 {
                            for signal in [0, 9, 15, u64::from(u32::MAX)] {
                                let is_signal = option == libc::PR_SET_PDEATHSIG as u32;
                                let allowed =
                                    options.contains(&option) && (!is_signal || signal == 9);
                                let expected = if allowed { ALLOW } else { REFUSE };
                                let arguments = [u64::from(option), signal, 0, 0, 0, 0];
                                let answer = answer(arguments);
                                assert_eq!(answer, expected, "{role} prctl {option} {signal}");
                            }
                        }
                    }
                    Verdict::Request(values, driver) => {
                        let request = |value: u32| answer([0, u64::from(value), 0, 0, 0, 0]);
                        for value in values {
                            assert_eq!(request(*value), ALLOW, "{role} {value:#x}");
                        }
                        assert_eq!(request(0xdead_beef), REFUSE, "{role}");
                        let kvm = if driver.is_some() { ALLOW } else { REFUSE };
                        // KVM_CREATE_VM
                        assert_eq!(request(0x0000_ae01), kvm, "{role}");
                    }
                    Verdict::Not(index, value) => {
                        let mut arguments = [0; 6];
                        assert_eq!(answer(arguments), ALLOW, "{role} {number}");
                        arguments[usize::from(*index)] = u64::from(*value);
                        assert_eq!(answer(arguments), REFUSE, "{role} {number}");
                    }
                    Verdict::Without(_, bits) => {
                        assert_eq!(answer([0; 6]), ALLOW, "{role} {number}");
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

    #[test]
    fn a_thread_may_do_nothing_that_its_process_may_not() {
        for (process, thread) in [
            (Role::Device, ThreadRole::Io),
            (Role::Vmm, ThreadRole::Io),
            (Role::Vmm, ThreadRole::Vcpu),
        ] {
            let process = rules(process);
            for (call, verdict) in thread_rules(thread) {
                match (verdict, process.get(&call)) {
                    (Verdict::Kill, _) => {}
                    (Verdict::Request(few, None), Some(Verdict::Request(many, None))) => {
                        assert!(few.iter().all(|request| many.contains(request)));
                    }
                    (Verdict::Prctl(few), Some(Verdict::Prctl(many))) => {
                        assert!(few.iter().all(|option| many.contains(option)));
                    }
                    (verdict, found) => assert_eq!(found, Some(&verdict), "{call}"),
                }
            }
        }
        let vcpu = thread_rules(ThreadRole::Vcpu);
        for call in [libc::SYS_openat, libc::SYS_connect, libc::SYS_clone] {
            assert_eq!(vcpu.get(&(call as u32)), None);
        }
    }
}
