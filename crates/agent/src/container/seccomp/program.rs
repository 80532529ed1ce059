//! From decisions by system call number to a program for the kernel.
//!
//! Neighbours with the same decision form one interval, and the program finds the interval by
//! binary search: a profile of hundreds of system calls takes about a hundred instructions, of
//! which each system call executes a dozen. Where the kernel has no compiler for filters it
//! interprets them, and where a page costs 50 µs to touch (user-mode Linux) the trees that
//! libseccomp builds in memory cost more than the start of the container.

use libc::sock_filter;

/// The kernel's limit on the length of a program (BPF_MAXINSNS).
const LONGEST: usize = 4096;

// Instructions of classic BPF (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const GO: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data` (linux/seccomp.h); guests are little-endian.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn low(argument: u32) -> u32 {
    16 + 8 * argument
}
const fn high(argument: u32) -> u32 {
    low(argument) + 4
}

/// Return value of a filter (`SECCOMP_RET_*`).
pub(super) type Answer = u32;

/// A condition on an argument; all comparisons are of 64 unsigned bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    pub argument: u32,
    pub test: Test,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Test {
    /// The argument, masked with the first, is the second.
    Masked(u64, u64),
    Not(u64),
    Above(u64),
    AtLeast(u64),
    Below(u64),
    AtMost(u64),
}

/// Decision for a system call.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Decision {
    Always(Answer),
    /// The answer of the first case whose conditions all hold, else the profile's default. An index
    /// into the caller's list.
    Cases(usize),
}

/// An answer under conditions.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub conditions: Vec<Comparison>,
    pub answer: Answer,
}

/// The decisions of one architecture.
#[derive(Debug)]
pub(super) struct Section {
    /// `AUDIT_ARCH_*` of linux/audit.h.
    pub architecture: u32,
    /// First number and decision of each interval, ascending; the first number is 0.
    pub intervals: Vec<(u32, Decision)>,
    pub cases: Vec<Vec<Case>>,
}

/// Builds the program; `None` if it exceeds the kernel's limit.
pub(super) fn program(
    sections: &[Section],
    default: Answer,
    foreign: Answer,
) -> Option<Vec<sock_filter>> {
    let mut program = vec![load(ARCHITECTURE)];
    for section in sections {
        let mut body = vec![load(NUMBER)];
        search(section, &section.intervals, default, &mut body);
        program.push(jump(IF_EQUAL, section.architecture, 1, 0));
        program.push(go(body.len()));
        program.append(&mut body);
    }
    program.push(answer(foreign));
    (program.len() <= LONGEST).then_some(program)
}

/// Binary search for the interval.
fn search(
    section: &Section,
    intervals: &[(u32, Decision)],
    default: Answer,
    program: &mut Vec<sock_filter>,
) {
    let middle = intervals.len() / 2;
    if middle == 0 {
        match intervals.first().map(|(_, decision)| decision) {
            Some(Decision::Always(always)) => program.push(answer(*always)),
            Some(Decision::Cases(index)) => {
                for case in &section.cases[*index] {
                    program.extend(one_case(case));
                }
                program.push(answer(default));
            }
            None => program.push(answer(default)),
        }
        return;
    }
    let (below, above) = intervals.split_at(middle);
    let at = program.len();
    program.push(jump(IF_GREATER_OR_EQUAL, above[0].0, 0, 0));
    search(section, below, default, program);
    let length = program.len() - at - 1;
    if let Ok(length) = u8::try_from(length) {
        program[at].jt = length;
    } else {
        // Too far for a conditional jump.
        program[at].jf = 1;
        program.insert(at + 1, go(length));
    }
    search(section, above, default, program);
}

/// Returns the answer if all conditions hold, else falls through. At most 32 instructions: 6
/// arguments.
fn one_case(case: &Case) -> Vec<sock_filter> {
    let mut code: Vec<Step> = Vec::new();
    for comparison in &case.conditions {
        let begin = code.len();
        steps(comparison, &mut code);
        // When this condition holds, the next one is tested.
        let end = code.len();
        for step in &mut code[begin..end] {
            for target in [&mut step.yes, &mut step.no] {
                if matches!(target, Target::Holds) {
                    *target = Target::At(end);
                }
            }
        }
    }
    let fails = code.len() + 1;
    let mut program: Vec<sock_filter> = code
        .iter()
        .enumerate()
        .map(|(at, step)| {
            let distance = |target: Target| match target {
                Target::Next => 0,
                Target::At(place) => (place - at - 1) as u8,
                Target::Holds | Target::Fails => (fails - at - 1) as u8,
            };
            jump(step.code, step.k, distance(step.yes), distance(step.no))
        })
        .collect();
    program.push(answer(case.answer));
    program
}

/// Target of a jump in a comparison.
#[derive(Clone, Copy, Debug)]
enum Target {
    Next,
    Holds,
    Fails,
    At(usize),
}

#[derive(Debug)]
struct Step {
    code: u16,
    k: u32,
    yes: Target,
    no: Target,
}

fn steps(comparison: &Comparison, code: &mut Vec<Step>) {
    use Target::{Fails, Holds, Next};
    let argument = comparison.argument;
    let mut step = |code_: u16, k: u32, yes: Target, no: Target| {
        code.push(Step {
            code: code_,
            k,
            yes,
            no,
        });
    };
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    // The upper halves decide unless they are equal.
    let mut ordered = |value: u64, operator: u16, yes: Target, no: Target| {
        let (upper, lower) = halves(value);
        step(LOAD, high(argument), Next, Next);
        step(IF_GREATER, upper, yes, Next);
        step(IF_EQUAL, upper, Next, no);
        step(LOAD, low(argument), Next, Next);
        step(operator, lower, yes, no);
    };
    match comparison.test {
        Test::Above(value) => ordered(value, IF_GREATER, Holds, Fails),
        Test::AtLeast(value) => ordered(value, IF_GREATER_OR_EQUAL, Holds, Fails),
        Test::Below(value) => ordered(value, IF_GREATER_OR_EQUAL, Fails, Holds),
        Test::AtMost(value) => ordered(value, IF_GREATER, Fails, Holds),
        Test::Not(value) => {
            let (upper, lower) = halves(value);
            step(LOAD, high(argument), Next, Next);
            step(IF_EQUAL, upper, Next, Holds);
            step(LOAD, low(argument), Next, Next);
            step(IF_EQUAL, lower, Fails, Holds);
        }
        Test::Masked(mask, value) => {
            let (upper_mask, lower_mask) = halves(mask);
            let (upper, lower) = halves(value & mask);
            for (place, mask, value) in [
                (high(argument), upper_mask, upper),
                (low(argument), lower_mask, lower),
            ] {
                if mask != 0 {
                    step(LOAD, place, Next, Next);
                    if mask != u32::MAX {
                        step(AND, mask, Next, Next);
                    }
                    step(IF_EQUAL, value, Next, Fails);
                }
            }
        }
    }
}

fn load(place: u32) -> sock_filter {
    jump(LOAD, place, 0, 0)
}

fn go(distance: usize) -> sock_filter {
    jump(GO, distance as u32, 0, 0)
}

fn answer(answer: Answer) -> sock_filter {
    jump(RETURN, answer, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
