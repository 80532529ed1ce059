//! The vhost-user protocol of a device against a front end that sends anything: messages in any
//! order, with descriptors that fit or not, memory, rings and kicks.
//!
//! Looks for panics, and for a device that is still served when its front end has gone.
#![no_main]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

use hull_devices::block::Block;
use hull_devices::device::Device;
use hull_devices::entropy::Entropy;
use hull_devices::fs::Fs;
use hull_devices::net::Net;
use hull_devices::transport::vhost_user::{FrontEnd, serve};
use hull_fuzz::{Input, descriptor, finish_threads};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const MEMORY: u64 = 0x2_0000;
const STEPS: usize = 48;
/// Where queue 0 is in memory.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

// Requests of a front end (the vhost-user specification).
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;

fn memory_file(size: u64) -> File {
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memory file"));
    ftruncate(&file, size).expect("its size");
    file
}

fn device(choice: u8) -> (&'static str, Box<dyn Device>) {
    match choice % 4 {
        0 => ("entropy", Box::new(Entropy::new().expect("a device"))),
        1 => {
            let disk = Block::new(memory_file(0x8000), choice & 4 != 0, "disk");
            ("disk", Box::new(disk.expect("a device")))
        }
        2 => (
            "net",
            Box::new(Net::new([2, 0, 0, 0, 0, 1]).expect("a device").0),
        ),
        _ => ("fs", Box::new(Fs::new().expect("a device").0)),
    }
}

/// The listening socket of this process.
fn listener() -> (OwnedFd, &'static PathBuf) {
    static SOCKET: OnceLock<(UnixListener, PathBuf)> = OnceLock::new();
    let (listener, path) = SOCKET.get_or_init(|| {
        let path = PathBuf::from(format!("/dev/shm/hull-fuzz-vu-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        (UnixListener::bind(&path).expect("a socket"), path)
    });
    (listener.try_clone().expect("a descriptor").into(), path)
}

struct Guest {
    socket: UnixStream,
    memory: File,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Guest {
    fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut message = request.to_le_bytes().to_vec();
        message.extend(flags.to_le_bytes());
        message.extend((body.len() as u32).to_le_bytes());
        message.extend(body);
        // The device may have hung up, and full buffers are the fuzzer's loss.
        let _ = hull_ipc::packet::send(&self.socket, &message, fds);
    }

    /// A message that is right but for what the fuzzer changes.
    fn step(&self, input: &mut Input<'_>) {
        let choice = input.u8();
        let flags = 1 | u32::from(choice & 0x80 != 0) << 3;
        let queue = u32::from(choice >> 6 & 1);
        let numbers = |list: &[u32]| -> Vec<u8> {
            list.iter()
                .flat_map(|number| number.to_le_bytes())
                .collect()
        };
        let wide = |list: &[u64]| -> Vec<u8> {
            list.iter()
                .flat_map(|number| number.to_le_bytes())
                .collect()
        };
        let (kick, call) = ([self.kick.as_fd()], [self.call.as_fd()]);
        let index = wide(&[queue.into()]);
        match choice % 20 {
            0 => self.send(SET_OWNER, flags, &[], &[]),
            1 => self.send(
                SET_FEATURES,
                flags,
                &wide(&[1 << 32 | 3 << 28 | 1 << 30]),
                &[],
            ),
            2 => self.send(SET_FEATURES, flags, &input.bytes::<8>(), &[]),
            3 => self.send(
                SET_PROTOCOL_FEATURES,
                flags,
                &wide(&[1 << 9 | 1 | 1 << 3]),
                &[],
            ),
            4 | 5 => {
                let mut body = numbers(&[1, 0]);
                body.extend(wide(&[0, MEMORY, 0, 0]));
                self.send(SET_MEM_TABLE, flags, &body, &[self.memory.as_fd()]);
            }
            6 => {
                let count = u32::from(input.u8() % 10);
                let mut body = numbers(&[count, 0]);
                for _ in 0..count {
                    let at = |input: &mut Input<'_>| u64::from(input.u8()) << (input.u8() % 64);
                    body.extend(wide(&[at(input), at(input), at(input), at(input)]));
                }
                let fds = vec![self.memory.as_fd(); usize::from(input.u8() % 10)];
                self.send(SET_MEM_TABLE, flags, &body, &fds);
            }
            7 => {
                let size = u32::from(input.u8()) % 5 * 8;
                self.send(SET_VRING_NUM, flags, &numbers(&[queue, size]), &[]);
            }
            8 => self.send(
                SET_VRING_BASE,
                flags,
                &numbers(&[queue, input.u8().into()]),
                &[],
            ),
            9 | 10 => {
                let mut body = numbers(&[queue, 0]);
                body.extend(wide(&[TABLE, USED, AVAILABLE, 0]));
                self.send(SET_VRING_ADDR, flags, &body, &[]);
            }
            11 => {
                let body = input.bytes::<40>();
                self.send(SET_VRING_ADDR, flags, &body, &[]);
            }
            12 => self.send(SET_VRING_KICK, flags, &index, &kick),
            13 => self.send(SET_VRING_CALL, flags, &index, &call),
            14 => {
                let enable = u32::from(input.u8() & 1);
                self.send(SET_VRING_ENABLE, flags, &numbers(&[queue, enable]), &[]);
            }
            15 => self.send(GET_VRING_BASE, flags, &numbers(&[queue, 0]), &[]),
            16 => {
                let size = u32::from(input.u8());
                let mut body = numbers(&[input.u8().into(), size, 0]);
                body.resize(12 + size as usize, 0);
                self.send(GET_CONFIG, flags, &body, &[]);
            }
            17 | 18 => {
                // A chain, and a kick.
                for index in 0..u64::from(input.u8() % 4) {
                    let at = u64::from(input.u16()) * 2;
                    let (length, flags) = (input.u16().into(), input.u16() & 7);
                    let bytes = descriptor(at, length, flags, (input.u8() % 8).into());
                    self.memory
                        .write_all_at(&bytes, TABLE + index * 16)
                        .expect("memory");
                }
                let bytes = [input.u8(), 0, input.u8(), 0, input.u8() % 8, 0];
                self.memory
                    .write_all_at(&bytes[2..4], AVAILABLE + 2)
                    .expect("memory");
                self.memory
                    .write_all_at(&bytes[4..], AVAILABLE + 4)
                    .expect("memory");
                let _ = rustix::io::write(&self.kick, &u64::from(bytes[0] | 1).to_ne_bytes());
            }
            _ => {
                let length = usize::from(input.u8() % 64);
                let body: Vec<u8> = (0..length).map(|_| input.u8()).collect();
                let request = u32::from(input.u8() % 48);
                let fds = [self.kick.as_fd(), self.call.as_fd(), self.memory.as_fd()];
                let count = usize::from(input.u8() % 4);
                self.send(
                    request,
                    flags ^ u32::from(input.u8() & 7),
                    &body,
                    &fds[..count],
                );
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    finish_threads();
    let mut input = Input(data);
    let choice = input.u8();
    let (name, device) = device(choice);
    let (socket, path) = listener();
    let front_end = match choice & 8 {
        0 => FrontEnd::InOrder,
        _ => FrontEnd::EarlyEnable,
    };
    let (sender, ended) = channel();
    std::thread::spawn(move || {
        let _ = serve(name, device, socket, front_end);
        let _ = sender.send(());
    });
    let socket = UnixStream::connect(path).expect("a connection");
    socket.set_nonblocking(true).expect("a non-blocking socket");
    let flags = match choice & 16 {
        0 => EventfdFlags::CLOEXEC,
        _ => EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
    };
    let guest = Guest {
        socket,
        memory: memory_file(MEMORY),
        kick: eventfd(0, flags).expect("an eventfd"),
        call: eventfd(0, flags).expect("an eventfd"),
    };
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input);
    }
    drop(guest);
    ended
        .recv_timeout(Duration::from_secs(8))
        .expect("the device ends with its front end");
    finish_threads();
});
