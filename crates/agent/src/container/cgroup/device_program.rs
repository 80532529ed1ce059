//! Which device nodes a container may create and open, as an eBPF program on its control group:
//! cgroup v2 has no file for it.
//!
//! Rules are tried from the last to the first, as if each had been written after the ones before
//! it; a request for several kinds of access needs all of them. What no rule matches is denied. The
//! program is assembled here by hand.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::bpf::{self, CONTEXT, Instruction, RESULT, bpf, code, instruction};
use crate::container::error::{CreateError, Result};

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// One rule of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Allowed to every container: creating any node (opening it is another matter), and using the
/// standard ones.
const STANDARD: [Rule; 10] = [
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: None,
        minor: None,
        access: MKNOD,
    },
    Rule {
        allow: true,
        kind: Some(BLOCK),
        major: None,
        minor: None,
        access: MKNOD,
    },
    standard(1, Some(3)),
    standard(1, Some(5)),
    standard(1, Some(7)),
    standard(1, Some(8)),
    standard(1, Some(9)),
    standard(5, Some(0)),
    standard(5, Some(2)),
    // Terminals.
    standard(136, None),
];

const fn standard(major: i32, minor: Option<i32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: ALL,
    }
}

impl Rule {
    fn read(rule: &LinuxDeviceCgroup) -> Result<Rule> {
        const FIELD: &str = "linux.resources.devices";
        let number = |number: Option<i64>| match number {
            None | Some(-1) => Ok(None),
            Some(number) => i32::try_from(number).map(Some).map_err(|_| {
                CreateError::invalid(
                    FIELD,
                    format_args!("device number {number} is out of range"),
                )
            }),
        };
        let kind = match rule.typ().unwrap_or_default() {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::P => {
                return Err(CreateError::invalid(FIELD, "type p is not a device"));
            }
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or_default().chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                // "rwa", which runc takes: it has no meaning in cgroup v1 or v2.
                'a' => 0,
                _ => {
                    return Err(CreateError::invalid(
                        FIELD,
                        format_args!("unknown access {letter:?}"),
                    ));
                }
            };
        }
        if access == 0 {
            access = ALL;
        }
        Ok(Rule {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access,
        })
    }

    fn matches_all(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

const KIND: u8 = 2;
/// Register: the access that no rule has granted yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// The program for a list of rules; `None` if everything is allowed.
fn assemble(rules: &[Rule]) -> Option<Vec<Instruction>> {
    // Rules before one that decides everything have no effect.
    let start = rules.iter().rposition(Rule::matches_all);
    let decided = start.map(|start| rules[start].allow);
    let rules = &rules[start.map_or(0, |start| start + 1)..];
    if decided == Some(true) && rules.iter().all(|rule| rule.allow) {
        return None;
    }
    let mut program = vec![
        instruction(code::LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(code::MOVE_REGISTER, WANTED, KIND, 0, 0),
        instruction(code::AND, KIND, 0, 0, 0xffff),
        instruction(code::SHIFT_RIGHT, WANTED, 0, 0, 16),
        instruction(code::LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(code::LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        assemble_rule(rule, &mut program);
    }
    finish(decided.unwrap_or(false), &mut program);
    Some(program)
}

fn finish(allow: bool, program: &mut Vec<Instruction>) {
    program.push(instruction(code::MOVE, RESULT, 0, 0, allow.into()));
    program.push(instruction(code::EXIT, 0, 0, 0, 0));
}

fn assemble_rule(rule: &Rule, program: &mut Vec<Instruction>) {
    let mut consequence = Vec::with_capacity(4);
    if rule.allow {
        consequence.push(instruction(code::AND, WANTED, 0, 0, ALL & !rule.access));
        consequence.push(instruction(code::JUMP_NOT_EQUAL, WANTED, 0, 2, 0));
    } else {
        consequence.push(instruction(code::JUMP_ANY_BIT, WANTED, 0, 1, rule.access));
        consequence.push(instruction(code::JUMP, 0, 0, 2, 0));
    }
    finish(rule.allow, &mut consequence);
    let conditions: Vec<(u8, i32)> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(register, value)| value.map(|value| (register, value)))
        .collect();
    for (index, (register, value)) in conditions.iter().enumerate() {
        let skip = conditions.len() - index - 1 + consequence.len();
        program.push(instruction(
            code::JUMP_NOT_EQUAL,
            *register,
            0,
            skip as i16,
            *value,
        ));
    }
    program.append(&mut consequence);
}

/// An access list, compiled for a control group.
#[derive(Debug)]
pub(crate) struct DeviceProgram(Option<Vec<Instruction>>);

impl DeviceProgram {
    /// Compiles the list of a spec. The standard nodes are always allowed.
    pub(crate) fn new(list: &[LinuxDeviceCgroup]) -> Result<DeviceProgram> {
        let mut rules = list.iter().map(Rule::read).collect::<Result<Vec<Rule>>>()?;
        rules.extend(STANDARD);
        Ok(DeviceProgram(assemble(&rules)))
    }

    /// Attaches the program to a control group, in place of `replaces`. Returns the loaded program;
    /// `None` if nothing is forbidden.
    pub(crate) fn attach(
        &self,
        cgroup: BorrowedFd<'_>,
        replaces: Option<BorrowedFd<'_>>,
    ) -> io::Result<Option<OwnedFd>> {
        let Some(program) = &self.0 else {
            if let Some(old) = replaces {
                bpf(BPF_PROG_DETACH, &attachment(cgroup, Some(old), None))?;
            }
            return Ok(None);
        };
        let loaded = load(program)?;
        bpf(
            BPF_PROG_ATTACH,
            &attachment(cgroup, Some(as_borrowed(&loaded)), replaces),
        )?;
        Ok(Some(loaded))
    }
}

fn as_borrowed(fd: &OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(fd)
}

const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// Attributes of BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
struct Attachment {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
    replaces: RawFd,
}

fn attachment(
    cgroup: BorrowedFd<'_>,
    program: Option<BorrowedFd<'_>>,
    replaces: Option<BorrowedFd<'_>>,
) -> Attachment {
    Attachment {
        target: cgroup.as_raw_fd(),
        program: program.map_or(0, |fd| fd.as_raw_fd()),
        kind: BPF_CGROUP_DEVICE,
        flags: if replaces.is_some() {
            BPF_F_ALLOW_MULTI | BPF_F_REPLACE
        } else {
            BPF_F_ALLOW_MULTI
        },
        replaces: replaces.map_or(0, |fd| fd.as_raw_fd()),
    }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    bpf::load(BPF_PROG_TYPE_CGROUP_DEVICE, 0, "hull_devices", program)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Runs a program on one request, as the kernel would.
    fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0u32; 11];
        let context = [(access << 16 | kind) as u32, major as u32, minor as u32];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let mut jump = 0;
            match code {
                code::LOAD_WORD => registers[to] = context[offset as usize / 4],
                code::MOVE_REGISTER => registers[to] = registers[from],
                code::MOVE => registers[to] = immediate as u32,
                code::AND => registers[to] &= immediate as u32,
                code::SHIFT_RIGHT => registers[to] >>= immediate,
                code::JUMP => jump = offset,
                code::JUMP_NOT_EQUAL if registers[to] != immediate as u32 => jump = offset,
                code::JUMP_ANY_BIT if registers[to] & immediate as u32 != 0 => jump = offset,
                code::JUMP_NOT_EQUAL | code::JUMP_ANY_BIT => {}
                code::EXIT => return registers[0] != 0,
                _ => panic!("unknown instruction {code:#x}"),
            }
            assert!(jump >= 0, "programs do not jump backwards");
            at += 1 + jump as usize;
        }
    }

    fn program(json: &str) -> Vec<Instruction> {
        let list: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        DeviceProgram::new(&list).unwrap().0.unwrap()
    }

    #[test]
    fn the_standard_nodes_and_nothing_else() {
        for list in ["[]", r#"[{"allow":false,"access":"rwm"}]"#] {
            let program = program(list);
            assert!(run(&program, CHARACTER, READ | WRITE, 1, 3));
            assert!(run(&program, CHARACTER, READ | WRITE, 136, 77));
            assert!(run(&program, CHARACTER, READ, 5, 2));
            assert!(!run(&program, CHARACTER, READ, 5, 1));
            assert!(!run(&program, CHARACTER, READ, 1, 1));
            assert!(!run(&program, BLOCK, READ, 1, 3));
            assert!(run(&program, BLOCK, MKNOD, 8, 0));
            assert!(!run(&program, BLOCK, MKNOD | READ, 8, 0));
        }
    }

    #[test]
    fn rules_add_to_it() {
        let program = program(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]"#,
        );
        assert!(run(&program, CHARACTER, READ | WRITE, 10, 229));
        assert!(run(&program, CHARACTER, READ | WRITE | MKNOD, 10, 229));
        assert!(!run(&program, CHARACTER, READ, 10, 200));
    }

    #[test]
    fn later_rules_win() {
        let program = program(
            r#"[{"allow":true,"access":"rwm"},
                {"allow":false,"type":"b","access":"w"},
                {"allow":true,"type":"b","major":7,"access":"rw"}]"#,
        );
        assert!(run(&program, CHARACTER, ALL, 99, 1));
        assert!(run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(run(&program, BLOCK, READ | WRITE, 7, 3));
    }

    #[test]
    fn access_is_granted_piece_by_piece() {
        let program = program(
            r#"[{"allow":true,"type":"c","major":4,"minor":1,"access":"r"},
                {"allow":true,"type":"c","major":4,"minor":-1,"access":"w"}]"#,
        );
        assert!(run(&program, CHARACTER, READ | WRITE, 4, 1));
        assert!(run(&program, CHARACTER, WRITE, 4, 2));
        assert!(!run(&program, CHARACTER, READ | WRITE, 4, 2));
    }

    #[test]
    fn everything_allowed_needs_no_program() {
        let list: Vec<LinuxDeviceCgroup> =
            serde_json::from_str(r#"[{"allow":false},{"allow":true,"access":"rwm"}]"#).unwrap();
        assert!(DeviceProgram::new(&list).unwrap().0.is_none());
    }

    #[test]
    fn wrong_rules_are_named() {
        for (json, words) in [
            (r#"[{"allow":true,"access":"rx"}]"#, "'x'"),
            (r#"[{"allow":true,"type":"p"}]"#, "type p"),
            (r#"[{"allow":true,"major":99999999999}]"#, "99999999999"),
        ] {
            let list: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
            let message = DeviceProgram::new(&list).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn the_kernel_takes_it() {
        match load(&program("[]")) {
            Ok(_) => {}
            Err(error) => {
                eprintln!("skipped: this system does not let the test load eBPF: {error}")
            }
        }
    }
}
