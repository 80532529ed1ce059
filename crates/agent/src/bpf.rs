//! eBPF programs: their instructions, loading and attaching them. Called by `container::cgroup`
//! and `loopback`, whose programs are written by hand: each needs a dozen instructions and no
//! compiler.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// One instruction, as the kernel lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the low half, source in the high half.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// Codes of instructions (linux/bpf.h).
pub mod code {
    pub const LOAD_WORD: u8 = 0x61;
    pub const STORE_WORD: u8 = 0x63;
    pub const MOVE_REGISTER: u8 = 0xbc;
    pub const MOVE: u8 = 0xb7;
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const JUMP: u8 = 0x05;
    pub const JUMP_NOT_EQUAL: u8 = 0x56;
    pub const JUMP_ANY_BIT: u8 = 0x46;
    pub const EXIT: u8 = 0x95;
}

/// Register of a program's return value.
pub const RESULT: u8 = 0;
/// Register of a program's argument.
pub const CONTEXT: u8 = 1;

/// An instruction.
pub fn instruction(
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
) -> Instruction {
    Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    }
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;

/// Attributes of BPF_PROG_LOAD, up to the last one in use.
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// Attributes of BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// Calls bpf(2).
pub fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are the leading part of the union that the command reads, with their
    // true size; the pointers in them are alive.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Loads a program to be attached as `attach_type`. The name is cut to 15 bytes.
pub fn load(
    program_type: u32,
    attach_type: u32,
    name: &str,
    program: &[Instruction],
) -> io::Result<OwnedFd> {
    let mut short = [0; 16];
    for (to, from) in short[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let attributes = Load {
        program_type,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: short,
        interface: 0,
        attach_type,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: a new descriptor without another owner; the kernel opens it close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a program to a control group for as long as the result is open.
pub fn link(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let attributes = Link {
        program: program.as_raw_fd(),
        target: cgroup.as_raw_fd(),
        attach_type,
        flags: 0,
    };
    let fd = bpf(BPF_LINK_CREATE, &attributes)?;
    // SAFETY: a new descriptor without another owner; the kernel opens it close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
