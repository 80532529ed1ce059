//! Redirects what programs in the guest send to [`RESOLVER`] to another port of its address, where
//! the agent listens: eBPF programs on the root of all control groups. Called by `dns_proxy`.
//!
//! Port 53 itself stays free, as it is with Docker on its own: a container may be a name server and
//! bind every address. Docker uses the packet filter for that; here it would cost connection
//! tracking for every packet of the guest. These programs run when a socket is connected, when a
//! datagram is sent with an address, and when one is received and its sender is asked for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use hull_protocol::RESOLVER;
use rustix::fs::{Mode, OFlags};

use crate::bpf::{self, CONTEXT, Instruction, RESULT, code, instruction};

/// The root of all control groups.
const GROUPS: &str = "/sys/fs/cgroup";

// linux/bpf.h
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_CGROUP_UDP4_RECVMSG: u32 = 19;

// struct bpf_sock_addr: address and port are as in memory, in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

/// Working register.
const VALUE: u8 = 2;

/// In force while it exists.
pub struct Translation {
    _links: [OwnedFd; 3],
}

impl Translation {
    /// Redirects what is sent to [`RESOLVER`] to `port` of its address.
    pub fn begin(port: u16) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let groups = rustix::fs::open(GROUPS, flags, Mode::empty())?;
        let attach = |kind, name, from, to| {
            let program = bpf::load(
                BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
                kind,
                name,
                &translate(from, to),
            )?;
            bpf::link(program.as_fd(), groups.as_fd(), kind)
        };
        let asked = RESOLVER.port();
        Ok(Self {
            _links: [
                attach(BPF_CGROUP_INET4_CONNECT, "hull_connect", asked, port)?,
                attach(BPF_CGROUP_UDP4_SENDMSG, "hull_send", asked, port)?,
                attach(BPF_CGROUP_UDP4_RECVMSG, "hull_receive", port, asked)?,
            ],
        })
    }
}

/// The program that rewrites one port of [`RESOLVER`]'s address to another.
fn translate(from: u16, to: u16) -> [Instruction; 8] {
    let address = u32::from_ne_bytes(RESOLVER.ip().octets()).cast_signed();
    let in_network_order = |port: u16| i32::from(port.to_be());
    [
        instruction(code::LOAD_WORD, VALUE, CONTEXT, ADDRESS, 0),
        instruction(code::JUMP_NOT_EQUAL, VALUE, 0, 4, address),
        instruction(code::LOAD_WORD, VALUE, CONTEXT, PORT, 0),
        instruction(code::JUMP_NOT_EQUAL, VALUE, 0, 2, in_network_order(from)),
        instruction(code::MOVE, VALUE, 0, 0, in_network_order(to)),
        instruction(code::STORE_WORD, CONTEXT, VALUE, PORT, 0),
        // Proceed. Programs for received datagrams may return nothing else.
        instruction(code::MOVE, RESULT, 0, 0, 1),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it() {
        for kind in [
            BPF_CGROUP_INET4_CONNECT,
            BPF_CGROUP_UDP4_SENDMSG,
            BPF_CGROUP_UDP4_RECVMSG,
        ] {
            let program = translate(53, 40000);
            match bpf::load(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, kind, "hull_test", &program) {
                Ok(_) => {}
                Err(error) => {
                    eprintln!("skipped: this system does not let the test load eBPF: {error}")
                }
            }
        }
    }
}
