//! The relay that orders messages of QEMU's net device, against a front end that writes anything.
//!
//! Looks for panics and for a relay that does not end, and compares what it forwards with a second,
//! simpler account of what it should.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use hull_devices::transport::early_enable::{MAX_EARLY, MAX_PAYLOAD, relay};
use libfuzzer_sys::fuzz_target;

const HEADER: usize = 12;
const SET_FEATURES: u32 = 2;
const SET_VRING_ENABLE: u32 = 18;
const NEED_REPLY: u32 = 1 << 3;
/// What fits into the sockets' buffers, so that nobody waits.
const MAX_INPUT: usize = 64 << 10;

fn word(message: &[u8], index: usize) -> u32 {
    let bytes = &message[index * 4..index * 4 + 4];
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// What the library should receive.
fn expected(mut data: &[u8]) -> Vec<u8> {
    let (mut out, mut held) = (Vec::new(), Some(Vec::new()));
    while data.len() >= HEADER {
        let length = word(data, 2) as usize;
        if length > MAX_PAYLOAD || data.len() < HEADER + length {
            break;
        }
        let (message, rest) = data.split_at(HEADER + length);
        data = rest;
        let mut message = message.to_vec();
        match (word(&message, 0), &mut held) {
            (SET_VRING_ENABLE, Some(held)) => {
                if held.len() == MAX_EARLY {
                    break;
                }
                let flags = word(&message, 1) & !NEED_REPLY;
                message[4..8].copy_from_slice(&flags.to_le_bytes());
                held.push(message);
            }
            (number, _) => {
                out.extend(message);
                if number == SET_FEATURES {
                    out.extend(held.take().into_iter().flatten().flatten());
                }
            }
        }
    }
    out
}

/// Makes numbers of messages and lengths small, or the fuzzer would never make a second message.
fn shape(data: &[u8]) -> Vec<u8> {
    let mut shaped = data[..data.len().min(MAX_INPUT)].to_vec();
    if shaped.first().is_none_or(|first| first % 4 == 0) {
        return shaped;
    }
    let mut at = 0;
    while at + HEADER <= shaped.len() {
        let message = &mut shaped[at..];
        let number = match message[0] % 4 {
            0 => SET_FEATURES,
            1 => u32::from(message[0]),
            _ => SET_VRING_ENABLE,
        };
        message[..4].copy_from_slice(&number.to_le_bytes());
        let length = u32::from(message[8] % 16);
        message[8..12].copy_from_slice(&length.to_le_bytes());
        at += HEADER + length as usize;
    }
    shaped
}

fuzz_target!(|data: &[u8]| {
    let data = shape(data);
    let pair = || UnixStream::pair().expect("a socket pair");
    let ((mut front, near), (mut back, far)) = (pair(), pair());
    front.write_all(&data).expect("room in the socket");
    front.shutdown(Shutdown::Write).expect("an end");
    let (near, far) = (OwnedFd::from(near), OwnedFd::from(far));
    let mut forwarded = Vec::new();
    std::thread::scope(|scope| {
        // What is malformed ends it with an error.
        let relay = scope.spawn(|| drop(relay(&near, &far)));
        back.read_to_end(&mut forwarded)
            .expect("what was forwarded");
        relay.join().expect("a relay that does not panic");
    });
    assert_eq!(forwarded, expected(&data));
});
